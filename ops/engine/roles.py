"""Which rows of a step are decode, prefill or padding rows: one int8 buffer per engine worker, filled once per step.

The buffer stays at one address and is filled with tensor operations only, so CUDA graphs that read it replay correctly.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sere.ops.reference import DECODE, PADDING, PREFILL


class TokenRoles:
    """The roles of the current step's rows, with `min_tokens`, `max_tokens` and `phase` already applied.

    Attributes:
        roles: int8 `[capacity]`. In a step that is to be left alone decode rows are marked as prefill rows, which no policy
            touches: the decision is taken here, on the device, and policies need not know of it.
        step: int64 `[3]`: decode rows of the step (whether it is left alone or not), rows that are not padding, and 1 if any
            row's role is DECODE.
        capacity: Most rows a step can have.
        may_reroute: False in a step in which surely no row's role is DECODE. On a GPU only the device knows: True.
    """

    def __init__(
        self, *, capacity: int, device: torch.device, decode_length: int, phase: str, min_tokens: int, max_tokens: int
    ) -> None:
        """Make the buffers of a worker.

        Args:
            capacity: Most rows a step can have, padding included.
            device: Where the layers run.
            decode_length: Most query tokens of a sequence that is decoding: 1, plus the speculative tokens.
            phase: decode, or all to treat prefill rows as decode rows.
            min_tokens: Fewer decode rows than this: left alone.
            max_tokens: More rows than this: left alone.
        """
        self.capacity = capacity
        self.roles = torch.zeros(capacity, dtype=torch.int8, device=device)
        self.may_reroute = device.type != "cpu"
        self._last_rows = self.roles
        self.step = torch.zeros(3, dtype=torch.int64, device=device)
        # The buffers' memory as NumPy sees it.
        self._host = (self.roles.numpy(), self.step.numpy()) if device.type == "cpu" else None
        self._last_starts: list[int] | None = None
        self._rows = torch.arange(capacity, dtype=torch.int64, device=device)
        self._decode_length = capacity if phase == "all" else decode_length
        self._min_tokens, self._max_tokens = min_tokens, max_tokens

    def rows(self, num_rows: int) -> Tensor:
        """The roles of a step's rows: all layers of a step ask for as many."""
        if self._last_rows.shape[0] != num_rows:
            self._last_rows = self.roles[:num_rows]
        return self._last_rows

    def clear(self) -> None:
        """A step without known roles (profiling, warm-up): every row is padding."""
        self.roles.zero_()
        self.step.zero_()
        self.may_reroute, self._last_starts = self._host is None, None

    def fill(self, query_start_loc: Tensor) -> None:
        """Set the roles of a step.

        Args:
            query_start_loc: int32 `[num_sequences + 1]`: first row of each sequence, then the number of rows that are not
                padding. Sequences that are padding repeat the last value.
        """
        if self.roles.is_cuda:
            from sere.ops.kernels import cuda

            starts = query_start_loc.to(device=self.roles.device, dtype=torch.int32).contiguous()
            limits = dict(min_tokens=self._min_tokens, max_tokens=self._max_tokens)
            cuda.fill_roles(starts, self.roles, self.step, decode_length=self._decode_length, **limits)
            return
        if self._host is not None:
            starts_now = query_start_loc.tolist()
            # A batch that decodes has the same rows step after step.
            if starts_now != self._last_starts:
                self._fill_on_host(starts_now, *self._host)
                self._last_starts = starts_now
            return
        starts = query_start_loc.to(dtype=torch.int64)
        lengths = starts.diff()
        sequence = torch.bucketize(self._rows, starts[1:], right=True).clamp_(max=lengths.numel() - 1)
        real = self._rows < starts[-1]
        decode = (lengths[sequence] <= self._decode_length).logical_and_(real)
        self._store(real, decode)

    def _fill_on_host(self, starts: list[int], roles: Any, step: Any) -> None:
        """The same in plain Python: torch's operations on so few numbers would take as long as some layers do."""
        runs: list[tuple[int, int, bool]] = []
        num_decode_rows, num_rows = 0, starts[-1]
        for start, end in pairwise(starts):
            is_decode = end - start <= self._decode_length
            num_decode_rows += (end - start) * is_decode
            if runs and runs[-1][2] == is_decode:
                runs[-1] = (runs[-1][0], end, is_decode)
            else:
                runs.append((start, end, is_decode))
        self.may_reroute = num_decode_rows >= self._min_tokens and num_rows <= self._max_tokens
        for start, end, is_decode in runs:
            roles[start:end] = DECODE if is_decode and self.may_reroute else PREFILL
        roles[num_rows:] = PADDING
        step[:] = num_decode_rows, num_rows, self.may_reroute

    def fill_counts(self, num_decode_rows: int, num_prefill_rows: int) -> None:
        """Set the roles of a step whose decode rows come first."""
        real = self._rows < num_decode_rows + num_prefill_rows
        decode = self._rows < (num_decode_rows if self._decode_length < self._rows.numel() else real.numel())
        self._store(real, decode & real)

    def _store(self, real: Tensor, decode: Tensor) -> None:
        num_decode_rows, num_rows = decode.sum(), real.sum()
        reroutes = (num_decode_rows >= self._min_tokens) & (num_rows <= self._max_tokens)
        self.step.copy_(torch.stack([num_decode_rows, num_rows, reroutes]))
        self.roles.copy_(torch.where(decode & reroutes, DECODE, torch.where(real, PREFILL, PADDING)))
        self.may_reroute, self._last_starts = self._host is None or bool(reroutes), None


def _fields(metadata_class: type[Any]) -> set[str]:
    return {name for base in metadata_class.__mro__ for name in getattr(base, "__annotations__", ())}


def metadata_gives_starts(metadata_class: type[Any]) -> bool:
    """Whether an attention backend's metadata says where each sequence's rows begin: roles are known in every step."""
    return "query_start_loc" in _fields(metadata_class)


def metadata_gives_counts(metadata_class: type[Any]) -> bool:
    """Whether an attention backend's metadata says at least how many rows decode. It may count padding (full CUDA graphs), or
    leave out rows with speculative tokens."""
    return {"num_decode_tokens", "num_prefill_tokens"} <= _fields(metadata_class)


def fill_from_metadata(roles: TokenRoles, metadata: Any) -> None:
    """Fill from one attention layer's metadata of this step (see `metadata_gives_starts` and `metadata_gives_counts`)."""
    starts = getattr(metadata, "query_start_loc", None)
    if starts is not None:
        roles.fill(starts)
    else:
        # Backends that count order the batch so that decode rows come first.
        roles.fill_counts(metadata.num_decode_tokens, metadata.num_prefill_tokens)
