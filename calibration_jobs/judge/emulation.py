"""Teacher-forced decode emulation: a policy's effect on the whole model's predictions, at a stated decode batch.

Held-out text runs through the Transformers model with every token given, and the policy is applied to groups of tokens, as a
decode step would see them. Deterministic: no token is drawn. Prompts, where rows have any, stay exact, as in the engine.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sere.calibration_jobs.capture.batches import pad_rows
from sere.calibration_jobs.capture.experts import ExpertsCall, intercept_experts
from sere.calibration_jobs.judge.candidates import Emulated
from sere.calibration_jobs.judge.decode_steps import refilled_steps, static_steps
from sere.calibration_jobs.judge.policy_router import PolicyRouter

SUMS = ("nll", "kl", "agreement", "tokens", "active_experts", "layer_steps", "charged_experts")
"""What is summed for each configuration: over predicted tokens, and over steps and layers. `charged_experts`: active ones, and
what compensation reads, in experts."""
ROW_FIGURES = ("nll", "kl", "agreement", "tokens", "correct")
"""What is summed for each row of text with answers. `correct`: tokens that are the model's first choice; a row is an exact
match of greedy decoding where all are."""
# Elements of log-probabilities held at once beside the logits (256 MiB of float64).
_BLOCK_ELEMENTS = 1 << 25


def emulate(model: nn.Module, rows: Sequence[Sequence[int]], policies: Sequence[Emulated], *, device: Any = "cpu") -> Tensor:
    """Sums of figures for one decode batch: as many sequences as `rows` has, all of whose tokens are decoded.

    Args:
        model: A Transformers MoE model in evaluation mode.
        rows: Tokens of different sequences, two at least in each to predict anything.
        policies: What is compared with the unmodified model.
        device: Where the model's inputs belong.

    Returns:
        float64 `[num_policies, len(SUMS)]`.
    """
    batch = pad_rows(rows, device)
    valid = batch["attention_mask"].bool()
    predicted = valid[:, 1:].flatten()
    targets = batch["input_ids"][:, 1:].flatten()[predicted]
    steps = static_steps([len(row) for row in rows], len(rows), valid.shape[1])
    sums = torch.zeros(len(policies), len(SUMS), dtype=torch.float64)
    with torch.inference_mode():
        unmodified = _predictions(model, batch, None)[:, :-1].flatten(0, 1)[predicted]
        for line, emulated in zip(sums, policies, strict=True):
            router = PolicyRouter(emulated, steps)
            logits = _predictions(model, batch, router)[:, :-1].flatten(0, 1)[predicted]
            for figures in _figures(logits, unmodified, targets):
                line[:3] += figures[:, :3].sum(0).cpu()
            counts = router.counts
            active, num_steps = counts["active_experts_after"], counts["steps"]
            line[3:] += torch.tensor([len(targets), active, num_steps, active + num_steps * router.charge], dtype=torch.float64)
    return sums


def _predictions(model: nn.Module, batch: dict[str, Any], handle: Callable[[ExpertsCall], Tensor] | None) -> Tensor:
    if handle is None:
        return model(**{"use_cache": False, **batch}).logits
    with intercept_experts(model, handle):
        return model(**{"use_cache": False, **batch}).logits


def _figures(logits: Tensor, unmodified: Tensor, targets: Tensor) -> Iterator[Tensor]:
    """Of each token: `ROW_FIGURES`, float64 `[num_tokens, 5]`, block by block."""
    block = max(1, _BLOCK_ELEMENTS // unmodified.shape[1])
    for ours, theirs, tokens in zip(logits.split(block), unmodified.split(block), targets.split(block), strict=True):
        log_p, log_q = theirs.double().log_softmax(1), ours.double().log_softmax(1)
        choice = ours.argmax(1)
        yield torch.stack(
            [
                -log_q.gather(1, tokens[:, None]).squeeze(1),
                (log_p.exp() * (log_p - log_q)).sum(1),
                (choice == theirs.argmax(1)).double(),
                torch.ones_like(log_q[:, 0]),
                (choice == tokens).double(),
            ],
            dim=1,
        )


@dataclass(frozen=True)
class Answered:
    """A row with a prompt, which is read exactly, and an answer, which is decoded."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    """With its end-of-text token."""


@dataclass(frozen=True)
class Outcome:
    """What one policy did to rows with answers."""

    rows: Tensor
    """float64 `[num_rows, len(ROW_FIGURES)]`."""
    counts: dict[str, int]
    """`COUNTERS`, summed over layers."""
    charge: float
    """As `PolicyRouter.charge`."""


class AnswerEmulation:
    """Rows with answers through one model, policy after policy: prompts are read once."""

    def __init__(self, model: nn.Module, rows: Sequence[Answered], *, device: Any = "cpu") -> None:
        """Read the prompts.

        Args:
            model: A Transformers MoE model in evaluation mode.
            rows: Rows in the order in which they are decoded.
            device: Where the model's inputs belong.
        """
        self._model, self._rows = model, rows
        # The last prompt token predicts the answer's first, in a prefill step; the answer's last token is never an input.
        self._lengths = [len(row.answer) - 1 for row in rows]
        prompts = pad_rows([row.prompt[::-1] for row in rows], device)
        # Padded on the left: every answer begins at the same place.
        prompts = {name: values.flip(1) for name, values in prompts.items()}
        answers = pad_rows([row.answer for row in rows], device)
        self._targets, self._answered = answers["input_ids"], answers["attention_mask"].bool()
        first = prompts["attention_mask"].sum(1, keepdim=True)
        self._batch = {
            "input_ids": self._targets[:, :-1],
            "attention_mask": torch.cat((prompts["attention_mask"], answers["attention_mask"][:, :-1]), dim=1),
            "position_ids": first + torch.arange(max(self._lengths), device=first.device),
            "use_cache": True,
        }
        with torch.inference_mode():
            positions = (prompts["attention_mask"].cumsum(1) - 1).clamp(min=0)
            read = model(**prompts, position_ids=positions, use_cache=True)
            self._cache, self._first = read.past_key_values, read.logits[:, -1:]
        self._unmodified = self._logits(None)

    def _logits(self, handle: Callable[[ExpertsCall], Tensor] | None) -> Tensor:
        """Logits of every answer token, `[answer tokens of all rows, vocabulary]`."""
        with torch.inference_mode():
            # A pass adds to its cache; not every kind can be cropped again.
            logits = _predictions(self._model, {**self._batch, "past_key_values": copy.deepcopy(self._cache)}, handle)
            return torch.cat((self._first, logits), dim=1)[self._answered]

    def run(self, emulated: Emulated, *, batch_size: int, refill: bool = False) -> Outcome:
        """Decode all rows under a policy.

        Args:
            emulated: The policy.
            batch_size: Decode batch.
            refill: A place whose row has ended takes the next row; else rows are decoded in batches that run out.
        """
        make = refilled_steps if refill else static_steps
        router = PolicyRouter(emulated, make(self._lengths, batch_size, max(self._lengths)))
        logits = self._logits(router)
        tokens = torch.cat(list(_figures(logits, self._unmodified, self._targets[self._answered]))).cpu()
        row_of = torch.arange(len(self._rows)).repeat_interleave(self._answered.sum(1).cpu())
        rows = torch.zeros(len(self._rows), len(ROW_FIGURES), dtype=torch.float64).index_add_(0, row_of, tokens)
        return Outcome(rows, router.counts, router.charge)
