"""Train a small mixture-of-experts model on library text and string tasks: the bundled demo model, or one of another style.

    python scripts/demo_model/train.py            # writes assets/demo-moe: about an hour on two busy cores
    python scripts/demo_model/train.py --resume   # goes on from the last checkpoint
    python scripts/demo_model/train.py --style v3 --output /tmp/models/v3 --minutes 25

Each step sees a batch of library text and a batch of tasks (loss on the answers only). The load-balancing loss is taken
per layer and per batch kind: the one in Transformers pools all layers, which leaves single layers unbalanced.
"""

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

# The activations are large and short-lived: keeping glibc from returning them to the kernel makes a step 1.8x faster.
_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "1000000000"}
if __name__ == "__main__" and "MALLOC_MMAP_MAX_" not in os.environ:
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **_MALLOC})

import torch
from styles import STYLES, RouterWatch, make_model
from tasks import CONTEXT_LENGTH, TASKS, Split, examples, library_text, make_tokenizer
from torch.nn import functional
from transformers import Glm4MoeForCausalLM, PreTrainedModel

ROOT = Path(__file__).resolve().parents[2]
TASK_ROWS, TASK_LENGTH = 48, 128
VALIDATION_EXAMPLES = 640
VALIDATION_TEXT_ROWS = 128


def encode(text: bytes) -> torch.Tensor:
    """Token ids of raw bytes under the byte-level tokenizer, int64 `[len(text)]`."""
    tokenizer = make_tokenizer()
    table = torch.zeros(256, dtype=torch.long)
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    for byte, character in bytes_to_unicode().items():
        table[byte] = tokenizer.convert_tokens_to_ids(character)
    return table[torch.frombuffer(bytearray(text), dtype=torch.uint8).long()]


def task_rows(split: Split, seed: int, length: int, tasks: Sequence[str]) -> Iterator[tuple[list[int], list[int]]]:
    """Endless rows of whole examples, padded: `(ids, labels)`, labels -100 outside the answers."""
    tokenizer = make_tokenizer()
    source = examples(split, seed, tasks)
    ids: list[int] = []
    labels: list[int] = []
    while True:
        _, prompt, answer = next(source)
        p, a = tokenizer.encode(prompt), [*tokenizer.encode(answer), tokenizer.eos_token_id]
        if len(ids) + len(p) + len(a) > length:
            padding = length - len(ids)
            yield ids + [tokenizer.pad_token_id] * padding, labels + [-100] * padding
            ids, labels = [], []
        ids += p + a
        labels += [-100] * len(p) + a


def loss_of(model: PreTrainedModel, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)


@torch.no_grad()
def validate(
    model: PreTrainedModel, watch: RouterWatch, text: torch.Tensor, tasks: Sequence[str] = tuple(TASKS)
) -> dict[str, object]:
    """Held-out text: perplexity per byte and load. Held-out tasks: exact match of the greedy answer.

    With teacher forcing, every position's argmax equals the reference exactly when greedy decoding gives the reference.
    """
    model.eval()
    watch.routed.clear()
    tokenizer = make_tokenizer()
    rows = text[: VALIDATION_TEXT_ROWS * CONTEXT_LENGTH].view(-1, CONTEXT_LENGTH)
    losses, loads = [], torch.zeros(len(watch.gates), watch.num_experts)
    for chunk in rows.split(16):
        losses.append(loss_of(model, chunk, chunk).item())
        loads += watch.loads() * (len(chunk) / len(rows))
    hits = {task: [0, 0] for task in tasks}
    source = examples("validation", 0, tasks)
    chosen = sorted((next(source) for _ in range(VALIDATION_EXAMPLES)), key=lambda e: len(e[1]) + len(e[2]))
    for start in range(0, len(chosen), 32):
        group = chosen[start : start + 32]
        length = max(len(p) + len(a) + 1 for _, p, a in group)
        ids = torch.full((len(group), length), tokenizer.pad_token_id)
        for i, (_, p, a) in enumerate(group):
            ids[i, : len(p) + len(a) + 1] = torch.tensor([*tokenizer.encode(p + a), tokenizer.eos_token_id])
        predicted = model(input_ids=ids, use_cache=False).logits.argmax(-1)
        for i, (task, p, a) in enumerate(group):
            answer = slice(len(p), len(p) + len(a) + 1)
            hits[task][0] += bool((predicted[i, len(p) - 1 : len(p) + len(a)] == ids[i, answer]).all())
            hits[task][1] += 1
        watch.routed.clear()
    model.train()
    return {
        "text_perplexity_per_byte": round(float(torch.tensor(losses).mean().exp()), 4),
        "exact_match": round(sum(h for h, _ in hits.values()) / VALIDATION_EXAMPLES, 4),
        "exact_match_by_task": {task: round(h / n, 3) for task, (h, n) in hits.items()},
        "min_expert_load": round(loads.min().item(), 3),
        "max_expert_load": round(loads.max().item(), 3),
    }


def save(model: PreTrainedModel, output: Path, report: dict[str, object]) -> None:
    """Write a copy of the model in bfloat16, its tokenizer and `training.json`; a selection bias stays in float32."""
    half = copy.deepcopy(model).to(torch.bfloat16)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            half.get_submodule(name.rpartition(".")[0]).e_score_correction_bias = buffer.clone()
    if isinstance(model, Glm4MoeForCausalLM):
        # vLLM's class takes no head that is tied to the embedding, and would answer with an uninitialised one.
        half.config.tie_word_embeddings = False
        half.lm_head.weight = torch.nn.Parameter(half.lm_head.weight.detach().clone())
    half.save_pretrained(output)
    make_tokenizer().save_pretrained(output)
    (output / "training.json").write_text(json.dumps(report, indent=1) + "\n")


def share_left(args: argparse.Namespace, step: int, elapsed_s: float) -> float:
    """How much of the training is still to be done, 1 to 0, by the clock if minutes are given."""
    return 1 - (step / args.steps if args.minutes is None else elapsed_s / (60 * args.minutes))


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--style", choices=list(STYLES), default="bundled")
    parser.add_argument("--output", type=Path, help="default: assets/demo-moe, or runs/models/STYLE for another style")
    parser.add_argument("--work", type=Path, help="checkpoint folder, with the model so far in `model`")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=3200)
    length.add_argument("--minutes", type=float, help="train for this long instead of a number of steps")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--balance", type=float, help="weight of the load-balancing loss; default: the style's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=200, help="steps between validations and checkpoints")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args(argv)
    bundled = args.style == "bundled"
    args.output = args.output or (ROOT / "assets" / "demo-moe" if bundled else ROOT / "runs" / "models" / args.style)
    args.work = args.work or ROOT / "runs" / f"train-{'demo-moe' if bundled else args.style}"
    args.balance = STYLES[args.style].balance if args.balance is None else args.balance
    return args


def main() -> None:
    args = arguments()
    style = STYLES[args.style]
    torch.manual_seed(args.seed)
    model = make_model(style, len(make_tokenizer()))
    watch = RouterWatch(model)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)

    curve: list[dict[str, object]] = []
    first_step, trained_s = 0, 0.0
    checkpoint = args.work / "checkpoint.pt"
    if args.resume:
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first_step, trained_s, curve = state["step"], state.get("trained_s", 0.0), json.loads(state["curve"])
    args.work.mkdir(parents=True, exist_ok=True)

    train_text, validation_text = encode(library_text("train")), encode(library_text("validation"))
    rows = task_rows("train", args.seed + first_step, TASK_LENGTH, style.tasks)
    generator = torch.Generator().manual_seed(args.seed + first_step)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(train_text):,} bytes of text", flush=True)

    settings = {k: v for k, v in vars(args).items() if k in ("steps", "learning_rate", "balance", "seed")}
    if args.minutes is not None:
        del settings["steps"]  # The curve ends with how many there were.
    if args.style != "bundled" or args.minutes is not None:
        settings |= {"style": args.style, "minutes": args.minutes, "tasks": style.tasks}
    settings["tokens_per_step"] = TASK_ROWS * TASK_LENGTH + style.text_rows * CONTEXT_LENGTH
    started, recent, step = time.perf_counter() - trained_s, [], first_step
    while (left := share_left(args, step, time.perf_counter() - started)) > 0:
        # Warm up, hold, then go down linearly over the last 60% of the training.
        scale = min(1.0, (step + 1) / 100, left / 0.6)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * scale
        task_ids, task_labels = map(torch.tensor, zip(*(next(rows) for _ in range(TASK_ROWS)), strict=True))
        starts = torch.randint(len(train_text) - CONTEXT_LENGTH, (style.text_rows,), generator=generator)
        text_ids = torch.stack([train_text[s : s + CONTEXT_LENGTH] for s in starts])
        losses = []
        for ids, labels in ((task_ids, task_labels), (text_ids, text_ids)):
            loss = loss_of(model, ids, labels)
            balance = watch.balance_loss()
            (loss + args.balance * balance).backward()
            losses.append((loss.item(), balance.item()))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if style.bias_step:
            watch.move_bias(style.bias_step * scale)
        recent.append(losses)
        step += 1
        elapsed_s = time.perf_counter() - started
        if step % 20 == 0:
            (task, task_balance), (text, text_balance) = torch.tensor(recent[-20:]).mean(0).tolist()
            print(
                f"step {step:5d}  tasks {task:.4f} (balance {task_balance:.3f})  text {text:.4f} "
                f"(balance {text_balance:.3f})  {(elapsed_s - trained_s) / (step - first_step):.2f} s/step",
                flush=True,
            )
        if step % args.every == 0 or share_left(args, step, elapsed_s) <= 0:
            (task, _), (text, _) = torch.tensor(recent).mean(0).tolist()
            recent.clear()
            entry = {"step": step, "task_loss": round(task, 4), "text_loss": round(text, 4)}
            curve.append({**entry, **validate(model, watch, validation_text, style.tasks)})
            print(json.dumps(curve[-1]), flush=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "trained_s": elapsed_s}
            torch.save({**state, "curve": json.dumps(curve)}, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
            save(model, args.work / "model", {**settings, "curve": curve})
    save(model, args.output, {**settings, "curve": curve})


if __name__ == "__main__":
    main()
