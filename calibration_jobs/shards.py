"""What a calibration job does: which rows are held out, and which rows form which shard. Pure functions of the rows."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sere.calibration_jobs.texts import RowRemark, TextRow
from sere.conf.errors import ConfigError
from sere.conf.schema import CalibrateConfig

# Each has sums of its own, which every shard computes, sends and stores.
_MAX_DOMAINS = 16


@dataclass(frozen=True)
class TokenRow:
    """The tokens of one text."""

    tokens: tuple[int, ...]
    domain: str


@dataclass(frozen=True)
class Shard:
    """What one worker does at a time."""

    index: int
    rows: tuple[TokenRow, ...]

    @property
    def half(self) -> int:
        """0 or 1. The two halves of the data are compared to see how reliable the matrices are."""
        return self.index % 2

    @property
    def name(self) -> str:
        return f"shard-{self.index:06d}"


@dataclass(frozen=True)
class Plan:
    """A job's rows, assigned."""

    shards: tuple[Shard, ...]
    held_out: tuple[TokenRow, ...]
    digest: str
    """SHA-256 of all tokens and domains, in order."""

    domains: tuple[str, ...]
    """Those that are calibrated on, sorted."""

    @property
    def num_calibration_rows(self) -> int:
        return sum(len(shard.rows) for shard in self.shards)


def tokenize(config: CalibrateConfig, tokenizer: Any, rows: Sequence[TextRow]) -> tuple[list[TokenRow], list[RowRemark]]:
    """Rows as tokens, cut to `sequence_length`; remarks on those that were cut, or left out as they have no tokens."""
    found, remarks = [], []
    for start in range(0, len(rows), 1000):
        part = rows[start : start + 1000]
        for row, tokens in zip(part, tokenizer([row.text for row in part])["input_ids"], strict=True):
            if not tokens:
                remarks.append(RowRemark(row.file, row.number, "skipped: no tokens", is_skipped=True))
                continue
            if len(tokens) > config.sequence_length:
                remark = f"cut: {len(tokens)} tokens, of which the first {config.sequence_length} are used"
                remarks.append(RowRemark(row.file, row.number, remark, is_skipped=False))
            found.append(TokenRow(tuple(tokens[: config.sequence_length]), row.domain))
    if not found:
        raise ConfigError(f"{config.data}: none of {len(rows)} rows has any tokens")
    return found, remarks


def _digest(rows: Sequence[TokenRow]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{row.domain!r} {len(row.tokens)}\n".encode())
        digest.update(np.asarray(row.tokens, dtype=np.int64).tobytes())
    return digest.hexdigest()


def make_plan(config: CalibrateConfig, rows: Sequence[TokenRow]) -> Plan:
    """Hold out rows evenly over the data, and split the others into shards at random (the same way each time).

    At random, so that every shard, and every minibatch of its tokens, is a sample of all the data: text sorted by domain or
    by source would bias the CKA estimate.

    Raises:
        ConfigError: if there are fewer rows than are to be held out, or none is left.
    """
    num_held_out = config.judge.held_out_rows
    if num_held_out >= len(rows):
        raise ConfigError(
            f"{config.data} has {len(rows)} usable rows, of which judge.held_out_rows={num_held_out} leaves none to calibrate "
            "on: give more rows (num_sequences), hold out fewer, or none with judge.held_out_rows=0"
        )
    # Domain after domain, then evenly: every domain gives its share whatever the order of the rows.
    in_order = sorted(range(len(rows)), key=lambda number: rows[number].domain)
    chosen = {in_order[int((i + 0.5) * len(rows) / num_held_out)] for i in range(num_held_out)}
    kept = [row for number, row in enumerate(rows) if number not in chosen]
    random.Random(0).shuffle(kept)
    # Two shards at least, or there are no halves to compare.
    size = max(1, min(config.shard_rows, -(-len(kept) // 2)))
    shards = [Shard(index, tuple(kept[start : start + size])) for index, start in enumerate(range(0, len(kept), size))]
    domains = tuple(sorted({row.domain for row in kept}))
    if len(domains) > _MAX_DOMAINS:
        raise ConfigError(
            f"column {config.domain_column!r} has {len(domains)} values, at most {_MAX_DOMAINS} domains are compared: set "
            "domain_column to a coarser one, or to null"
        )
    return Plan(tuple(shards), tuple(rows[number] for number in sorted(chosen)), _digest(rows), domains)
