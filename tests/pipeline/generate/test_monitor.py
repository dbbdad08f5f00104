"""What a job records of its replicas while it runs, without replicas: their statuses are given."""

import pytest

from sere.conf.schema import GenerateConfig
from sere.pipeline.generate import monitor as monitor_module
from sere.pipeline.generate.dispatch.dispatcher import Dispatcher
from sere.pipeline.generate.dispatch.work import Handle
from sere.pipeline.generate.identity import GENERATE
from sere.pipeline.generate.monitor import Monitor
from sere.pipeline.generate.parts import Finished
from sere.pipeline.generate.record import Session, read_sessions
from sere.pipeline.generate.replica.spec import ReplicaStatus
from sere.pipeline.runtime.job_folder import JobFolder
from sere.pipeline.runtime.storage import Storage
from sere.pipeline.tracking.tracker import NullTracker

GAUGES = ("num_running", "num_waiting", "kv_cache_usage")


class Tracker(NullTracker):
    """Keeps what is recorded of the progress."""

    def __init__(self):
        self.records = []

    def log_progress(self, metrics, *, step):
        self.records.append(dict(metrics))


@pytest.fixture
def watch(tmp_path, monkeypatch):
    """A dispatcher without replicas, a function that has its monitor record them, and the folder's storage."""
    monkeypatch.setattr(monitor_module, "_RECORD_S", -1.0)
    nothing = dict(num_replicas=0, concurrent_batches=1, max_retries=0, stall_timeout_s=1)
    dispatcher = Dispatcher(None, None, **nothing, left_of=None, give_up=None, split=None)
    tracker, storage = Tracker(), Storage(str(tmp_path / "run"))
    with JobFolder(storage, GENERATE, {"a": 1}, overwrite=False) as folder:
        monitor = Monitor(
            config=GenerateConfig(model="m", data="d", output=str(tmp_path / "run")),
            num_rows=100,
            session=Session(1),
            before=Finished(),
            earlier=[],
            folder=folder,
            tracker=tracker,
            wanted=lambda: "",
        )

        def update(*, final=False):
            monitor.update(dispatcher, final=final)
            return tracker.records[-1]

        yield dispatcher, update, storage


def replica(name, **figures):
    return Handle(name, f"actor of {name}", 0.0, status=ReplicaStatus(**figures))


def gauges(record, name):
    return {gauge: record[f"replica/{name}/{gauge}"] for gauge in GAUGES if f"replica/{name}/{gauge}" in record}


def die(dispatcher, handle):
    del dispatcher.replicas[handle.actor]
    dispatcher.gone.append(handle)


def test_gauges_of_a_dead_replica_end_at_zero(watch):
    dispatcher, update, storage = watch
    at_work = dict(num_running=16, num_waiting=3, kv_cache_usage=0.5)
    one, other = replica("r0", **at_work, num_rows=20, generated_tokens=200), replica("r1", **at_work, num_rows=10)
    dispatcher.replicas = {handle.actor: handle for handle in (one, other)}
    assert gauges(update(), "r0") == at_work
    die(dispatcher, one)
    record = update()
    assert gauges(record, "r0") == dict.fromkeys(GAUGES, 0) and gauges(record, "r1") == at_work
    assert record["replica/r0/generated_tokens"] == 200, "a sum stays what it was"
    record = update()
    assert not [name for name in record if name.startswith("replica/r0/")] and gauges(record, "r1") == at_work
    assert record["progress/rows"] == 30, "its rows count"
    die(dispatcher, other)
    assert gauges(update(final=True), "r1") == dict.fromkeys(GAUGES, 0), "stopped in order, at the end"
    (session,) = read_sessions(storage)
    assert (session.num_rows, session.generated_tokens) == (30, 200)


def test_what_prefix_caches_had_is_summed_over_replicas(watch):
    """Also over those that are gone."""
    dispatcher, update, storage = watch
    one, other = (replica(f"r{n}", prefix_cache_queries=100 * n, prefix_cache_hits=60 * n) for n in (1, 3))
    dispatcher.replicas = {handle.actor: handle for handle in (one, other)}
    assert update()["progress/prefix_cache_hit_rate"] == 0.6
    die(dispatcher, one)
    other.status.prefix_cache_queries += 100
    assert update(final=True)["progress/prefix_cache_hit_rate"] == 0.48
    (session,) = read_sessions(storage)
    assert (session.prefix_cache_queries, session.prefix_cache_hits) == (500, 240)


def test_active_experts_of_a_dead_replica_are_recorded_once_more(watch):
    """Since its last record it has made steps, which then count once."""
    dispatcher, update, _ = watch

    def counts(steps):
        return {0: {"steps": steps, "active_experts_before": 8 * steps, "active_experts_after": 4 * steps}}

    handle = replica("r0", counters=counts(3))
    dispatcher.replicas = {handle.actor: handle}
    update()
    handle.status = ReplicaStatus(counters=counts(5))
    die(dispatcher, handle)
    assert update()["replica/r0/active_experts_after"] == 4
    assert "replica/r0/active_experts_after" not in update()
