"""What is seen of a job while it runs: a progress display, metrics over time in MLflow, and the session's file."""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sere.conf.errors import ConfigError
from sere.conf.schema import GenerateConfig
from sere.pipeline.generate.parts import Finished
from sere.pipeline.generate.record import Session, write_session
from sere.pipeline.runtime.job_folder import JobFolder
from sere.pipeline.tracking.tracker import NullTracker

if TYPE_CHECKING:
    from sere.pipeline.generate.dispatch.dispatcher import Dispatcher
    from sere.pipeline.generate.dispatch.work import Handle

_log = logging.getLogger(__name__)
_RECORD_S = 10.0
# Between lines of progress where the output is a file.
_LINE_S = 30.0
# An engine that works makes a step more often.
_SILENT_S = 30.0
# A replica that was not placed within this time waits for room, or for a node.
_PLACED_S = 60.0
_REMIND_S = 600.0
# What a replica's status says of a moment.
_GAUGES = ("num_running", "num_waiting", "kv_cache_usage")
# Fewer rows than this say little about how many fail.
_LEAST_ROWS_JUDGED = 100


class Monitor:
    """Follows a dispatcher. Use as a context manager: the display is there while it is open."""

    def __init__(
        self,
        *,
        config: GenerateConfig,
        num_rows: int,
        session: Session,
        before: Finished,
        earlier: list[Session],
        folder: JobFolder,
        tracker: NullTracker,
        wanted: Callable[[], str],
    ) -> None:
        """Nothing is shown yet.

        Args:
            config: Of the job.
            num_rows: Rows of the input.
            session: This driver's.
            before: What was finished when it began.
            earlier: Sessions of drivers before.
            folder: Gets this session's file.
            tracker: Gets the metrics; their step is the seconds that all drivers worked.
            wanted: Says what room a replica needs, and what there is.
        """
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._config, self._num_rows, self._before = config, num_rows, before
        self._folder, self._tracker = folder, tracker
        self.session = session
        self._offset_s = sum(session.elapsed_s for session in earlier)
        self._started = self._recorded = time.monotonic()
        self._printed, self._said_waiting = 0.0, -math.inf
        self._wanted = wanted
        self._last: dict[str, Any] = {}
        self._ended: set[str] = set()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[figures]}"),
        )
        self._task = self._progress.add_task("Starting engines", total=num_rows, completed=before.num_rows, figures="")

    def __enter__(self) -> "Monitor":
        if self._progress.console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def update(self, dispatcher: "Dispatcher", *, final: bool = False) -> None:
        """Take in the replicas' latest figures; to be called about once a second, and with `final` at the end, however it came.

        Raises:
            ConfigError: if too many rows fail.
        """
        handles = [handle for handle in [*dispatcher.gone, *dispatcher.replicas.values()] if handle.status is not None]
        session = self.session
        now = time.monotonic()
        session.elapsed_s = now - self._started
        if dispatcher.first_ready is not None:
            session.startup_s = dispatcher.first_ready - self._started
            session.working_s = (dispatcher.finished or now) - dispatcher.first_ready
        # A row that is answered twice because its replica died counts twice here, and once in the results.
        session.num_rows = sum(handle.status.num_rows for handle in handles)
        session.generated_tokens = sum(handle.status.generated_tokens for handle in handles)
        session.prefix_cache_queries = sum(handle.status.prefix_cache_queries for handle in handles)
        session.prefix_cache_hits = sum(handle.status.prefix_cache_hits for handle in handles)
        session.num_replaced = dispatcher.num_replaced
        firsts = [handle.status.first_request for handle in handles if handle.status.first_request is not None]
        lasts = [handle.status.last_answer for handle in handles if handle.status.last_answer is not None]
        if firsts and lasts:
            session.generation_s = max(0.0, max(lasts) - min(firsts))
        session.counters = _sum_counters(handles)
        num_errors = sum(handle.status.num_errors for handle in handles)
        self._show(dispatcher, num_errors)
        if final or now - self._recorded > _RECORD_S:
            self._recorded = now
            self._record(handles, {handle.name for handle in dispatcher.gone}, num_errors)
            write_session(self._folder.storage, session)
        self._folder.check()
        if not final:
            self._judge(handles, session.num_rows, num_errors)

    def _show(self, dispatcher: "Dispatcher", num_errors: int) -> None:
        session = self.session
        done = min(self._num_rows, self._before.num_rows + session.num_rows)
        figures = []
        now = time.monotonic()
        silent = {h.name: now - h.progressed for h in dispatcher.replicas.values() if h.running}
        silent = {name: seconds for name, seconds in silent.items() if seconds > _SILENT_S}
        if session.generation_s > 0:
            figures.append(f"{session.generated_tokens / session.generation_s:.0f} tokens/s")
            left = (self._num_rows - done) * session.generation_s / max(1, session.num_rows)
            # Of replicas none of which works nobody knows.
            if len(silent) < max(1, len(dispatcher.replicas)):
                figures.append(f"{_duration(left)} left")
        figures.append(f"{len(dispatcher.replicas)} replicas")
        figures += [f"{name} has made no step for {_duration(seconds)}" for name, seconds in list(silent.items())[:3]]
        if num_waiting := dispatcher.starts.unplaced(_PLACED_S):
            figures.append(f"{num_waiting} replicas wait for room in the cluster")
        if num_errors + self._before.num_errors:
            figures.append(f"{num_errors + self._before.num_errors} errors")
        if session.num_replaced:
            figures.append(f"{session.num_replaced} replaced")
        description = "Generating" if dispatcher.replicas else "Starting engines"
        self._progress.update(self._task, description=description, completed=done, figures=", ".join(figures))
        console = self._progress.console
        if num_waiting and now - self._said_waiting > _REMIND_S:
            self._said_waiting = now
            _log.warning("%d replicas wait for room: %s", num_waiting, self._wanted())
        if not console.is_terminal and session.elapsed_s - self._printed > _LINE_S:
            self._printed = session.elapsed_s
            console.print(
                f"{description}: {done} of {self._num_rows} rows, {', '.join(figures)}", soft_wrap=True, highlight=False
            )

    def _record(self, handles: list["Handle"], gone: set[str], num_errors: int) -> None:
        session = self.session
        step = int(self._offset_s + session.elapsed_s)
        before, self._last = self._last, {"time": time.monotonic(), "tokens": session.generated_tokens}
        metrics: dict[str, float] = {
            "progress/rows": min(self._num_rows, self._before.num_rows + session.num_rows),
            "progress/errors": self._before.num_errors + num_errors,
            "progress/replaced_replicas": session.num_replaced,
        }
        if before:
            seconds = self._last["time"] - before["time"]
            metrics["progress/tokens_per_s"] = max(0, session.generated_tokens - before["tokens"]) / max(seconds, 1e-9)
        if session.prefix_cache_queries:
            metrics["progress/prefix_cache_hit_rate"] = session.prefix_cache_hits / session.prefix_cache_queries
        for handle in handles:
            if handle.name in self._ended:
                continue
            status = handle.status
            prefix = f"replica/{handle.name}"
            for gauge in _GAUGES:
                # Once more for one that is gone: what its last status says is no longer so.
                metrics[f"{prefix}/{gauge}"] = 0 if handle.name in gone else getattr(status, gauge)
            metrics[f"{prefix}/generated_tokens"] = status.generated_tokens
            self._last[handle.name] = status.counters
            metrics |= _recent(status.counters, before.get(handle.name, {}), prefix)
        self._ended |= gone
        self._tracker.log_progress(metrics, step=step)

    def _judge(self, handles: list["Handle"], num_rows: int, num_errors: int) -> None:
        rows, errors = num_rows + self._before.num_rows, num_errors + self._before.num_errors
        first = [text for handle in handles for text in handle.status.first_errors]
        check_errors(self._config, num_rows=rows, num_errors=errors, first=first, where=self._folder.storage.shown)


def check_errors(config: GenerateConfig, *, num_rows: int, num_errors: int, first: list[str], where: str) -> None:
    """Refuse a job of which too many rows fail.

    Raises:
        ConfigError: if more rows have errors than `max_error_ratio` allows.
    """
    if num_errors > config.max_error_ratio * max(num_rows, _LEAST_ROWS_JUDGED):
        raise ConfigError(
            f"{num_errors} of {num_rows} rows failed, more than max_error_ratio {config.max_error_ratio:g} allows: "
            f"{'; '.join(' '.join(text.split())[:200] for text in first[:3])}. Mend the cause and "
            f"run again with retry_errors=true, or raise max_error_ratio; rows with errors are in {where}/results"
        )


def _sum_counters(handles: list["Handle"]) -> dict[str, dict[str, int]]:
    layers: dict[str, Counter[str]] = {}
    for handle in handles:
        for layer, counts in handle.status.counters.items():
            layers.setdefault(str(layer), Counter()).update(counts)
    return {layer: dict(counts) for layer, counts in layers.items()}


def _recent(counters: dict[int, dict[str, int]], before: dict[int, dict[str, int]], prefix: str) -> dict[str, float]:
    """Active experts per step since the last time."""
    from sere.ops.engine.counters import LayerCounts, summarize

    layers = [
        LayerCounts(layer, {name: count - before.get(layer, {}).get(name, 0) for name, count in counts.items()})
        for layer, counts in counters.items()
    ]
    names = ("active_experts_before", "active_experts_after")
    return {f"{prefix}/{name}": value for name, value in summarize(layers).items() if name in names}


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}d {hours}h" if days else f"{hours}h {minutes}m" if hours else f"{minutes}m {seconds}s"
