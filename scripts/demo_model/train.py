"""Train the bundled demo model: a small Qwen3-MoE with many small experts. Writes assets/demo-moe.

    python scripts/demo_model/train.py            # about an hour on two busy cores
    python scripts/demo_model/train.py --resume   # goes on from the last checkpoint

Each step sees a batch of library text and a batch of tasks (loss on the answers only). The load-balancing loss is taken
per layer and per batch kind: the one in Transformers pools all layers, which leaves single layers unbalanced.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

# The activations are large and short-lived: keeping glibc from returning them to the kernel makes a step 1.8x faster.
_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "1000000000"}
if __name__ == "__main__" and "MALLOC_MMAP_MAX_" not in os.environ:
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **_MALLOC})

import torch
from tasks import CONTEXT_LENGTH, TASKS, Split, examples, library_text, make_tokenizer
from torch.nn import functional
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

ROOT = Path(__file__).resolve().parents[2]
TASK_ROWS, TASK_LENGTH = 48, 128
TEXT_ROWS = 8
VALIDATION_EXAMPLES = 640
VALIDATION_TEXT_ROWS = 128


def make_model(tokenizer_size: int) -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=tokenizer_size,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=256,
        num_experts=64,
        num_experts_per_tok=8,
        moe_intermediate_size=64,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=CONTEXT_LENGTH,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    return model


class RouterWatch:
    """Collects the router logits of every MoE layer during one forward pass."""

    def __init__(self, model: Qwen3MoeForCausalLM) -> None:
        self.logits: list[torch.Tensor] = []
        self.num_experts, self.top_k = model.config.num_experts, model.config.num_experts_per_tok
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(self._collect)

    def _collect(self, module: torch.nn.Module, args: tuple, output: tuple) -> None:
        weight = module.weight
        self.logits.append(functional.linear(args[0].reshape(-1, weight.shape[1]), weight))

    def load(self, logits: torch.Tensor) -> torch.Tensor:
        """Share of the slots each expert gets times the number of experts: 1 is fair. Float `[num_experts]`."""
        ids = logits.topk(self.top_k, dim=-1).indices.flatten()
        return torch.bincount(ids, minlength=self.num_experts).float() * (self.num_experts / ids.numel())

    def balance_loss(self) -> torch.Tensor:
        """Mean over layers of the Switch Transformer balance loss (1 when balanced); forgets the logits."""
        losses = [(self.load(x.detach()) * x.float().softmax(-1).mean(0)).sum() for x in self.logits]
        self.logits.clear()
        return torch.stack(losses).mean()


def encode(text: bytes) -> torch.Tensor:
    """Token ids of raw bytes under the byte-level tokenizer, int64 `[len(text)]`."""
    tokenizer = make_tokenizer()
    table = torch.zeros(256, dtype=torch.long)
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    for byte, character in bytes_to_unicode().items():
        table[byte] = tokenizer.convert_tokens_to_ids(character)
    return table[torch.frombuffer(bytearray(text), dtype=torch.uint8).long()]


def task_rows(split: Split, seed: int, length: int) -> Iterator[tuple[list[int], list[int]]]:
    """Endless rows of whole examples, padded: `(ids, labels)`, labels -100 outside the answers."""
    tokenizer = make_tokenizer()
    source = examples(split, seed)
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


def loss_of(model: Qwen3MoeForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)


@torch.no_grad()
def validate(model: Qwen3MoeForCausalLM, watch: RouterWatch, text: torch.Tensor) -> dict[str, object]:
    """Held-out text: perplexity per byte and load. Held-out tasks: exact match of the greedy answer.

    With teacher forcing, every position's argmax equals the reference exactly when greedy decoding gives the reference.
    """
    model.eval()
    watch.logits.clear()
    tokenizer = make_tokenizer()
    rows = text[: VALIDATION_TEXT_ROWS * CONTEXT_LENGTH].view(-1, CONTEXT_LENGTH)
    losses, loads = [], torch.zeros(model.config.num_hidden_layers, model.config.num_experts)
    for chunk in rows.split(16):
        losses.append(loss_of(model, chunk, chunk).item())
        loads += torch.stack([watch.load(x) for x in watch.logits]) * (len(chunk) / len(rows))
        watch.logits.clear()
    hits = {task: [0, 0] for task in TASKS}
    source = examples("validation", 0)
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
        watch.logits.clear()
    model.train()
    return {
        "text_perplexity_per_byte": round(float(torch.tensor(losses).mean().exp()), 4),
        "exact_match": round(sum(h for h, _ in hits.values()) / VALIDATION_EXAMPLES, 4),
        "exact_match_by_task": {task: round(h / n, 3) for task, (h, n) in hits.items()},
        "min_expert_load": round(loads.min().item(), 3),
        "max_expert_load": round(loads.max().item(), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "assets" / "demo-moe")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "train-demo-moe", help="checkpoint folder")
    parser.add_argument("--steps", type=int, default=3200)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--balance", type=float, default=0.1, help="weight of the load-balancing loss")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=200, help="steps between validations and checkpoints")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer))
    watch = RouterWatch(model)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)

    curve: list[dict[str, object]] = []
    first_step = 0
    checkpoint = args.work / "checkpoint.pt"
    if args.resume:
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first_step, curve = state["step"], json.loads(state["curve"])
    args.work.mkdir(parents=True, exist_ok=True)

    train_text, validation_text = encode(library_text("train")), encode(library_text("validation"))
    rows = task_rows("train", args.seed + first_step, TASK_LENGTH)
    generator = torch.Generator().manual_seed(args.seed + first_step)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(train_text):,} bytes of text", flush=True)

    started, recent = time.perf_counter(), []
    for step in range(first_step, args.steps):
        # Warm up, hold, then go down linearly over the last 60% of the steps.
        scale = min(1.0, (step + 1) / 100, (args.steps - step) / (0.6 * args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * scale
        task_ids, task_labels = map(torch.tensor, zip(*(next(rows) for _ in range(TASK_ROWS)), strict=True))
        starts = torch.randint(len(train_text) - CONTEXT_LENGTH, (TEXT_ROWS,), generator=generator)
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
        recent.append(losses)
        if (step + 1) % 20 == 0:
            (task, task_balance), (text, text_balance) = torch.tensor(recent[-20:]).mean(0).tolist()
            elapsed_s = time.perf_counter() - started
            print(
                f"step {step + 1:5d}  tasks {task:.4f} (balance {task_balance:.3f})  text {text:.4f} "
                f"(balance {text_balance:.3f})  {elapsed_s / (step + 1 - first_step):.2f} s/step",
                flush=True,
            )
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            (task, _), (text, _) = torch.tensor(recent).mean(0).tolist()
            recent.clear()
            entry = {"step": step + 1, "task_loss": round(task, 4), "text_loss": round(text, 4)}
            curve.append({**entry, **validate(model, watch, validation_text)})
            print(json.dumps(curve[-1]), flush=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save({**state, "curve": json.dumps(curve)}, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)

    model.to(torch.bfloat16)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    settings = {k: v for k, v in vars(args).items() if k in ("steps", "learning_rate", "balance", "seed")}
    report = {**settings, "tokens_per_step": TASK_ROWS * TASK_LENGTH + TEXT_ROWS * CONTEXT_LENGTH, "curve": curve}
    (args.output / "training.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
