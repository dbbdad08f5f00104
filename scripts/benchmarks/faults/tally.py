"""What the strikes of one kind did, added up over its jobs."""

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from faults.jobs import Ended, Job
from faults.processes import left_over
from faults.rows import Expected, count_rows

_MOST_AGAIN = 8


@dataclass
class Tally:
    """Of one kind."""

    kind: str
    engines: str
    """real or simulated."""
    num_jobs: int = 0
    num_strikes: int = 0
    num_sessions: int = 0
    num_rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    """See `faults.rows.COUNTS`; and `left over` (processes), `unfinished` (jobs), `hung` (sessions)."""
    ends: Counter[tuple[int | None, str]] = field(default_factory=Counter)
    """How sessions ended: status, and the last line without what differs from job to job."""
    notes: Counter[str] = field(default_factory=Counter)
    """Further figures of this kind."""

    def ended(self, ended: Ended) -> Ended:
        """Take in the end of a session."""
        self.num_sessions += 1
        self.counts["hung"] += ended.status is None
        self.ends[ended.status, "" if (ended.status or 0) < 0 else plain(ended.line)] += 1
        return ended

    def judge(self, job: Job, expected: Expected) -> None:
        """Take in what became of a finished job."""
        self.num_jobs += 1
        self.num_rows += len(expected)
        self.counts.update(count_rows(job.storage, expected))
        self.counts["left over"] += len(left_over())

    def until_done(self, job: Job, expected: Expected, plan: Any = None, *more: str) -> None:
        """Run the same command until it ends with 0, as whoever has jobs run would, and judge what it made."""
        for _ in range(_MOST_AGAIN):
            if self.ended(job.start(plan, *more).wait()).status == 0:
                self.judge(job, expected)
                return
        self.counts["unfinished"] += 1
        self.num_jobs += 1

    def as_values(self) -> dict[str, Any]:
        """As JSON values."""
        values = {name: value for name, value in vars(self).items() if name not in ("counts", "ends", "notes")}
        ends = [{"status": status, "line": line, "times": times} for (status, line), times in self.ends.most_common()]
        return {**values, "counts": dict(self.counts), "ends": ends, "notes": dict(self.notes)}


def plain(line: str) -> str:
    """A line without the names and numbers that are of one job alone."""
    line = re.sub(r"(?:s3:/)?/[\w.:/-]*/run\b|s3://runs/[\w-]+", "RUN", line)
    line = re.sub(r"(?:/[\w.-]+){2,}/", "", line)
    line = re.sub(r"\b[0-9a-f]{12,}\b", "HEX", line)
    line = re.sub(r"s\d{4}-[0-9a-f]{6}", "SESSION", line)
    return re.sub(r"\d+(?:\.\d+)?", "N", line)[:200]
