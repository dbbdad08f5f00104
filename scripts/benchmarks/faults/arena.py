"""Where strikes take place: one Ray cluster, input for all jobs, and what a job is made of."""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults.jobs import Job, Session
from faults.rows import Expected, make_rows
from faults.session import Plan
from faults.tally import Tally

_NUM_ROWS = 1200
_SETTINGS = (
    "tracking.uri=null",
    "reroute=null",
    "engine.num_replicas=2",
    "engine.cpus_per_replica=0.1",
    "batch_size=32",
    "concurrent_batches=2",
    "checkpoint_rows=64",
    "checkpoint_interval_s=2",
    # Small, so that a small job has many files.
    "part_mib=0.02",
)


@dataclass
class Arena:
    """What jobs with simulated engines share."""

    scratch: Path
    rng: random.Random
    data: Path = field(init=False)
    expected: Expected = field(init=False)
    _num_jobs: int = 0

    def __post_init__(self) -> None:
        self.data = self.scratch / "data"
        self.expected = make_rows(self.data, _NUM_ROWS)

    def job(self, *settings: str, bucket: str | None = None, options: dict[str, Any] | None = None) -> Job:
        """A job that nobody has begun.

        Args:
            settings: Beside those that all jobs have.
            bucket: Where its run directory is; None: on the disk.
            options: Of the object store.
        """
        self._num_jobs += 1
        name = f"job-{self._num_jobs:03d}"
        output = f"s3://{bucket}/{name}" if bucket else ""
        job = Job(self.scratch / name, self.data, [*_SETTINGS, *settings], output=output, options=options)
        job.more = settings
        return job

    def tally(self, kind: str) -> Tally:
        return Tally(kind, "simulated")

    def finish(self, job: Job, tally: Tally, *more: str) -> None:
        """Run its command until it is done, and judge what it made."""
        tally.until_done(job, self.expected, Plan(), *more)

    def wait_for_share(self, job: Job, session: Session, share: float) -> bool:
        """Wait until about this share of a job's parts is written; False if the session ended before."""
        return job.wait_for(lambda: job.num_parts >= share * _NUM_ROWS / 32, session)
