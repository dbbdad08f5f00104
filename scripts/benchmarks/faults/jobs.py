"""Jobs that are struck: their command is started as often as it takes, and what it says each time is kept."""

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sere.pipeline.runtime.storage import Storage

ROOT = Path(__file__).resolve().parents[3]
_HEAVY = (
    "ray.data",
    "torch",
    # What reading the bundled model's configuration imports.
    "transformers.models.qwen3_moe.configuration_qwen3_moe",
    "pyarrow.parquet",
    "mlflow",
    "s3fs",
    "rich.console",
    "faults.session",
)
_HUNG_S = 900.0


@dataclass(frozen=True)
class Ended:
    """How a session of a job ended."""

    status: int | None
    """Exit status, or minus the signal; None: it did not end by itself."""
    line: str
    """The last one on the screen, but for those indented below it."""


@functools.cache
def _forks() -> Any:
    """Processes that have imported everything: starting Python anew would take longer than a small job does."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", *_HEAVY])
    return context


class Session:
    """One run of a job's command, in a process of its own."""

    def __init__(self, process: Any, log: Path) -> None:
        self._process, self._log = process, log
        self.pid: int = process.pid

    @property
    def status(self) -> int | None:
        """None while it runs."""
        return self._process.poll() if isinstance(self._process, subprocess.Popen) else self._process.exitcode

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.status is None:
            os.kill(self.pid, number)

    def wait(self, *, timeout_s: float = _HUNG_S) -> Ended:
        """Wait for its end; one that takes too long is killed."""
        end = time.monotonic() + timeout_s
        while self.status is None and time.monotonic() < end:
            time.sleep(0.05)
        status = self.status
        if status is None:
            self.kill(signal.SIGCONT)
            self.kill()
            while self.status is None:
                time.sleep(0.05)
        return Ended(status, self.last_line)

    @property
    def last_line(self) -> str:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return next((line.strip() for line in reversed(lines) if not line.startswith(" ")), "")


class Job:
    """A job: its settings, and its folder."""

    def __init__(
        self, folder: Path, data: Path, settings: Sequence[str] = (), *, output: str = "", options: dict[str, Any] | None = None
    ) -> None:
        """Nothing is started yet.

        Args:
            folder: For logs, and for the run directory unless another is named.
            data: The input.
            settings: As on the command line.
            output: The run directory.
            options: Of its file system, for whoever looks at it from here.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.output = output or str(folder / "run")
        self.settings = [f"data={data}", f"output={self.output}", *settings]
        self.storage = Storage(self.output, options)
        self.operations = folder / "operations.log"
        self.more: Sequence[str] = ()
        """Settings of its own."""
        self._num_sessions = 0

    def _log(self) -> Path:
        self._num_sessions += 1
        return self.folder / f"session-{self._num_sessions:02d}.log"

    def start(self, plan: Any = None, *more: str) -> Session:
        """Start the command, with a `faults.session.Plan` for simulated engines, or without one for real ones.

        Args:
            plan: What shall happen.
            more: Further settings.
        """
        log, arguments = self._log(), ["generate", "conf/generate.yaml", *self.settings, *more]
        log.touch()
        if plan is not None:
            from faults.session import run_session

            process = _forks().Process(
                target=run_session, args=(arguments, ROOT, log, self.operations, plan, os.environ["RAY_ADDRESS"])
            )
            process.start()
            return Session(process, log)
        with log.open("ab") as opened:
            command = [sys.executable, "-m", "sere.pipeline.cli", *arguments]
            return Session(subprocess.Popen(command, cwd=ROOT, stdout=opened, stderr=opened, start_new_session=True), log)

    @property
    def num_parts(self) -> int:
        return len(self.storage.sizes("results"))

    def wait_for(self, condition: Callable[[], bool], session: Session, *, timeout_s: float = _HUNG_S) -> bool:
        """Wait until something is so; False if the session ended before, or it takes too long."""
        end = time.monotonic() + timeout_s
        while not condition():
            if session.status is not None or time.monotonic() > end:
                return False
            time.sleep(0.005)
        return True
