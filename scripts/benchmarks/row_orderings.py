"""Ways to order the rows of a dataset so that rows decoded together are alike, or unlike. Used by `bench_ordering.py`.

An ordering is a permutation of row numbers; a static decode batch is `batch` consecutive rows of it.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

Order = list[int]
Vectors = NDArray[np.float64]


def shuffled(num_rows: int, seed: int) -> Order:
    return np.random.default_rng(seed).permutation(num_rows).tolist()


def by_key(keys: Sequence, order: Sequence[int]) -> Order:
    """Sorted by a key; rows of one key stay as they are in `order`."""
    return sorted(order, key=lambda row: keys[row])


def round_robin(groups: Sequence[str]) -> Order:
    """One row of each group in turn: batches as unlike as the groups allow."""
    seen: dict[str, int] = {}
    turns = []
    for row, group in enumerate(groups):
        turns.append((seen.setdefault(group, 0), group, row))
        seen[group] += 1
    return [row for *_, row in sorted(turns)]


def balanced_clusters(vectors: Vectors, batch: int, *, num_iterations: int = 8) -> Order:
    """k-means whose clusters have `batch` rows each (the last one maybe fewer), one cluster after another.

    The first centres are evenly spaced rows of `leaf_order`; every assignment is the cheapest one with equal sizes.
    """
    from scipy.optimize import linear_sum_assignment

    num_clusters = -(-len(vectors) // batch)
    cluster = np.empty(len(vectors), dtype=int)
    cluster[leaf_order(vectors)] = np.arange(len(vectors)) // batch
    for _ in range(num_iterations):
        centres = np.stack([vectors[cluster == number].mean(0) for number in range(num_clusters)])
        squared = ((vectors[:, None] - centres[None]) ** 2).sum(-1)
        # A place per row: `batch` places of each cluster.
        _, place = linear_sum_assignment(squared.repeat(batch, axis=1)[:, : len(vectors)])
        if (place // batch == cluster).all():
            break
        cluster = place // batch
    return np.argsort(cluster, kind="stable").tolist()


def leaf_order(vectors: Vectors) -> Order:
    """Leaves of an average-linkage tree, neighbours as near as the tree allows."""
    from scipy.cluster.hierarchy import leaves_list, linkage

    return leaves_list(linkage(vectors, "average", optimal_ordering=True)).tolist()


def nearest_chain(vectors: Vectors) -> Order:
    """From row 0 always on to the nearest row that is left."""
    order, left = [0], set(range(1, len(vectors)))
    while left:
        rows = sorted(left)
        distances = ((vectors[rows] - vectors[order[-1]]) ** 2).sum(1)
        order.append(rows[int(distances.argmin())])
        left.remove(order[-1])
    return order


def router_vectors(model: str, prompts: Sequence[str], answers: Sequence[str]) -> dict[str, Vectors]:
    """Router probabilities of every row, from one pass through the Transformers model in float32.

    Args:
        model: Folder or hub name of a model that can return its `router_logits`.
        prompts: Text of each row.
        answers: What is generated, for the upper bound: the positions that a decode step would compute.

    Returns:
        `[num_rows, num_layers * num_experts]`: `prompt mean` and `prompt last` over the prompt's tokens, `answer mean` over the
        answer's.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    network.set_experts_implementation("grouped_mm")
    vectors: dict[str, list[NDArray]] = {"prompt mean": [], "prompt last": [], "answer mean": []}
    with torch.inference_mode():
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = tokenizer(prompt + answer, return_tensors="pt")["input_ids"]
            length = len(tokenizer(prompt)["input_ids"])
            logits = network(input_ids=ids, use_cache=False, output_router_logits=True).router_logits
            # [num_tokens, num_layers * num_experts]
            probabilities = torch.cat([layer.float().softmax(-1) for layer in logits], dim=-1).double().numpy()
            vectors["prompt mean"].append(probabilities[:length].mean(0))
            vectors["prompt last"].append(probabilities[length - 1])
            vectors["answer mean"].append(probabilities[length:].mean(0))
    return {name: np.stack(rows) for name, rows in vectors.items()}


def make_orderings(
    rows: Sequence[dict[str, str]], vectors: dict[str, Vectors], num_seeds: int
) -> dict[str, list[Callable[[int], Order]]]:
    """Every ordering by name: one function of the decode batch per seed, one alone where nothing is drawn.

    Args:
        rows: With `prompt`, `reference` and `task`.
        vectors: From `router_vectors`.
        num_seeds: Of the orderings that have random ties.
    """
    tasks = [row["task"] for row in rows]
    lengths = [len(row["prompt"]) for row in rows]
    answers = [len(row["reference"]) for row in rows]
    shuffles = [shuffled(len(rows), seed) for seed in range(num_seeds)]

    def fixed(order: Order) -> list[Callable[[int], Order]]:
        return [lambda batch: order]

    def clusters(vectors: Vectors) -> list[Callable[[int], Order]]:
        return [functools.cache(lambda batch: balanced_clusters(vectors, batch))]

    return {
        "random": [order for shuffle in shuffles for order in fixed(shuffle)],
        "round robin over tasks": fixed(round_robin(tasks)),
        "prompt length": fixed(by_key(lengths, shuffles[0])),
        "answer length *": fixed(by_key(answers, shuffles[0])),
        "task": [order for shuffle in shuffles[:3] for order in fixed(by_key(tasks, shuffle))],
        "task, then prompt length": fixed(by_key(list(zip(tasks, lengths, strict=True)), shuffles[0])),
        "router, prompt mean: leaf order": fixed(leaf_order(vectors["prompt mean"])),
        "router, prompt mean: chain": fixed(nearest_chain(vectors["prompt mean"])),
        "router, prompt mean: clusters": clusters(vectors["prompt mean"]),
        "router, last token: leaf order": fixed(leaf_order(vectors["prompt last"])),
        "router, last token: clusters": clusters(vectors["prompt last"]),
        "router, answer: clusters *": clusters(vectors["answer mean"]),
    }
