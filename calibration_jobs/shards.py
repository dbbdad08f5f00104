"""What a calibration job does: which rows are held out, which form a shard, and which shards a group. Pure functions."""

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
    """Rows whose sums a worker adds to those of the shards before it."""

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
class Group:
    """Shards of one half of the data that one worker sums up, in order: what the driver gets, keeps and merges at a time."""

    index: int
    shards: tuple[Shard, ...]

    @property
    def half(self) -> int:
        """0 or 1, as of its shards."""
        return self.shards[0].half

    @property
    def name(self) -> str:
        """Another one for other shards."""
        first, last = self.shards[0], self.shards[-1]
        return first.name if first is last else f"shards-{first.index:06d}-{last.index:06d}"


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


def make_groups(shards: Sequence[Shard], max_groups: int | None) -> tuple[Group, ...]:
    """Which shards are summed up together: a function of their number, as sums in another grouping differ in the last bits.

    Groups come in pairs, one of each half and both of the same size (the last one lacks a shard where their number is odd).
    Sizes begin at one and double, so that the halves can be compared at powers of two; then they fall steadily to a few shards,
    so that workers end at nearly the same time (trapezoid self-scheduling: Tzen and Ni 1993).

    Args:
        shards: All of the plan.
        max_groups: At most so many, at least 2; None: each shard by itself.
    """
    num_pairs, max_pairs = -(-len(shards) // 2), (max_groups or len(shards) + 1) // 2
    groups: list[Group] = []
    start = 0
    while start < num_pairs:
        left, pairs_left = num_pairs - start, max_pairs - len(groups) // 2
        falling = 2 * left // (pairs_left + 1)
        size = max(1, min(start, falling) if pairs_left > 1 else left)
        here = shards[2 * start : 2 * (start + size)]
        groups += [Group(len(groups) + half, tuple(here[half::2])) for half in (0, 1) if here[half::2]]
        start += size
    return tuple(groups)


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
