"""What a calibration job does: which rows are held out, and which rows form which shard. Pure functions of the rows."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np

from calibration_jobs.inputs import RowRemark, TextRow
from conf.schema import CalibrateConfig, ConfigError


@dataclass(frozen=True)
class TokenRow:
    """The tokens of one text."""

    tokens: tuple[int, ...]
    domain: str


@dataclass(frozen=True)
class Shard:
    """What one worker does at a time: rows of one domain."""

    index: int
    domain: str
    half: int
    """0 or 1. The two halves of a domain's shards are compared to see how reliable its matrices are."""
    rows: tuple[TokenRow, ...]

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

    @property
    def domains(self) -> list[str]:
        return sorted({shard.domain for shard in self.shards})

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
                remarks.append(RowRemark(row.file, row.number, "skipped: no tokens"))
                continue
            if len(tokens) > config.sequence_length:
                remark = f"cut: {len(tokens)} tokens, of which the first {config.sequence_length} are used"
                remarks.append(RowRemark(row.file, row.number, remark))
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
    """Hold out rows evenly over the data, and split each domain's others into shards.

    Raises:
        ConfigError: if there are fewer rows than are to be held out, or none is left.
    """
    num_held_out = config.judge.held_out_rows
    if num_held_out >= len(rows):
        raise ConfigError(
            f"{config.data} has {len(rows)} usable rows, of which judge.held_out_rows={num_held_out} leaves none to calibrate "
            "on: give more rows (num_sequences), hold out fewer, or none with judge.held_out_rows=0"
        )
    by_domain: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        by_domain[row.domain].append(number)
    # Domain after domain, then evenly: every domain gives its share whatever the order of the rows.
    in_order = [number for domain in sorted(by_domain) for number in by_domain[domain]]
    chosen = {in_order[int((i + 0.5) * len(rows) / num_held_out)] for i in range(num_held_out)}
    chunks: dict[str, list[tuple[TokenRow, ...]]] = {}
    for domain, numbers in sorted(by_domain.items()):
        kept = [rows[number] for number in numbers if number not in chosen]
        # Two shards at least, or there are no halves to compare.
        size = max(1, min(config.shard_rows, -(-len(kept) // 2)))
        chunks[domain] = [tuple(kept[start : start + size]) for start in range(0, len(kept), size)]
    # The domains take turns, so that a first part of the shards is like all of them.
    shards = [
        Shard(index, domain, place % 2, chunk)
        for index, (domain, place, chunk) in enumerate(
            (domain, place, turn[i])
            for place, turn in enumerate(zip_longest(*chunks.values()))
            for i, domain in enumerate(chunks)
            if turn[i] is not None
        )
    ]
    return Plan(tuple(shards), tuple(rows[number] for number in sorted(chosen)), _digest(rows))
