"""The dispatcher on a real cluster with small actors that die: every row once, whatever happens. No engines, so it is quick."""

import asyncio
import os
import random
import signal
import time
from functools import partial

import pyarrow as pa
import pytest

from sere.conf.errors import ConfigError, TryAgainError
from sere.pipeline.generate.attempts import Tried
from sere.pipeline.generate.dispatch.dispatcher import Dispatcher
from sere.pipeline.generate.dispatch.prefixes import cut_at_prefixes, measure
from sere.pipeline.generate.dispatch.remaining import Split, left_of, read
from sere.pipeline.generate.dispatch.work import Batch, Rows, cut, joined
from sere.pipeline.generate.parts import Parts
from sere.pipeline.generate.replica.answers import Answer, answer_table
from sere.pipeline.generate.replica.spec import ReplicaStatus
from sere.pipeline.runtime.storage import Storage

pytestmark = pytest.mark.cluster

SCHEMA = pa.schema([("prompt", pa.string())])


class Worker:
    """Answers like a replica, after a moment; a prompt `die` ends its process."""

    def __init__(self, name, parts, checkpoint_rows, start_error=None):
        self.name, self.parts, self.checkpoint_rows, self.start_error = name, parts, checkpoint_rows, start_error
        self.finished, self.tables, self.left, self.written, self.num_parts = [], {}, {}, [], 0
        self.num_rows = self.num_written = 0

    async def node(self):
        return self.start_error or str(os.getpid())

    async def start(self):
        if self.start_error == "killed":
            os._exit(1)
        if self.start_error:
            await asyncio.sleep(0.5)
            raise ConfigError(f"not with this model, says {self.start_error}")
        return str(os.getpid())

    async def generate(self, number, num_tries, alone, spans, *blocks):
        table = joined(spans, blocks)
        self.tables[number], self.left[number] = table, len(table)
        for index, prompt in enumerate(table["prompt"].to_pylist()):
            await asyncio.sleep(random.random() / 500)
            if prompt == "die":
                os._exit(1)
            if prompt.startswith("stop") and not os.path.exists(prompt[5:]):
                open(prompt[5:], "w").close()
                os.kill(os.getpid(), signal.SIGSTOP)
            if prompt.startswith("full"):
                kind = ConfigError if prompt == "full" else TryAgainError
                raise kind("cannot be used (No space left on device)")
            self.finished.append((number, index, Answer(prompt.upper(), 1, 1, "stop")))
            self.num_rows += 1
            if len(self.finished) >= self.checkpoint_rows:
                await self.write()
        return await self.status()

    async def write(self):
        rows, self.finished = self.finished, []
        if rows:
            self.num_parts += 1
            self.parts.write(f"{self.name}-{self.num_parts}", answer_table(rows, self.tables, SCHEMA, "id"))
        self.num_written += len(rows)
        for number, _, _ in rows:
            self.left[number] -= 1
            if not self.left[number]:
                self.written.append(number)

    async def status(self):
        written, self.written = self.written, []
        return ReplicaStatus(num_rows=self.num_rows, num_written=self.num_written, num_steps=self.num_rows, written=written)

    async def flush(self):
        await self.write()
        return await self.status()

    stop = flush


@pytest.fixture
def job(local_ray, tmp_path):
    """A function that runs prompts through workers, and returns the rows in the parts."""
    parts = Parts(Storage(str(tmp_path / "run")), "d")

    def run(
        prompts, *, batch=5, num_replicas=2, max_retries=3, checkpoint_rows=7, while_running=None, start_error=None, **options
    ):
        def start(number):
            name = f"r{number:04d}"
            error = start_error(number) if start_error else None
            actor = local_ray.remote(Worker).options(num_cpus=1, max_concurrency=100)
            return name, actor.remote(name, parts, checkpoint_rows, error)

        def give_up(rows, why):
            table = read(rows)
            answers = [(0, row, Answer(error=why)) for row in range(len(table))]
            parts.write(f"driver-{time.time_ns()}", answer_table(answers, {0: table}, SCHEMA, "id"))

        def blocks():
            # Of another size than batches.
            for at in range(0, len(prompts), 13):
                some = prompts[at : at + 13]
                positions = pa.array(range(at, at + len(some)), pa.int64())
                table = pa.table({"prompt": some, "source_file": ["f"] * len(some), "source_row": positions})
                if options.get("group_by_prefix"):
                    table = table.append_column("sere_prompt", pa.array([prompt.encode() for prompt in some]))
                yield Rows(((local_ray.put(table), 0, len(table)),))

        is_grouped = options.get("group_by_prefix")
        batches = cut_at_prefixes(measure(blocks()), batch) if is_grouped else map(Batch, cut(blocks(), batch))

        dispatcher = Dispatcher(
            start,
            local_ray.kill,
            num_replicas=num_replicas,
            concurrent_batches=3,
            max_retries=max_retries,
            stall_timeout_s=options.get("stall_timeout_s", 600),
            left_of=partial(left_of, parts),
            give_up=give_up,
            split=Split(options.get("tries", {}), max_retries=max_retries),
        )
        try:
            for _ in dispatcher.run(batches):
                if while_running is not None:
                    while_running(dispatcher)
        finally:
            dispatcher.close(timeout_s=10)
        assert parts.scan().num_duplicates == 0, "a dead worker's parts are read before its rows go to another one"
        names = parts.names()
        tables = [table.to_pylist() for table in parts.read_all(names)]
        rows = [row | {"part": name} for name, table in zip(names, tables, strict=True) for row in table]
        return sorted(rows, key=lambda row: row["source_row"]), dispatcher

    return run


def test_every_row_once(job):
    prompts = [f"p{number}" for number in range(203)]
    rows, dispatcher = job(prompts)
    assert [row["generated_text"] for row in rows] == [prompt.upper() for prompt in prompts]
    assert [row["id"] for row in rows[:2]] == ["f#0", "f#1"]
    assert dispatcher.num_replaced == 0


def test_nothing_to_do(job):
    assert job([])[0] == []


def test_workers_killed_at_random(job):
    prompts = [f"p{number}" for number in range(6000)]
    rng = random.Random(0)
    killed = []

    def kill(dispatcher):
        if len(killed) < 5 and dispatcher.replicas:
            handle = rng.choice(list(dispatcher.replicas.values()))
            os.kill(int(handle.node), signal.SIGKILL)
            killed.append(handle.name)

    rows, dispatcher = job(prompts, batch=20, checkpoint_rows=33, while_running=kill)
    assert len(killed) >= 2 and dispatcher.num_replaced >= len(set(killed))
    assert [row["generated_text"] for row in rows] == [prompt.upper() for prompt in prompts]


@pytest.mark.parametrize("max_retries", [0, 1, pytest.param(3, marks=pytest.mark.long)])
def test_a_row_that_kills_takes_no_other_with_it(job, max_retries):
    prompts = [f"p{number}" for number in range(60)]
    prompts[17] = prompts[41] = "die"
    rows, _ = job(prompts, max_retries=max_retries)
    bad = [row for row in rows if row["error"]]
    assert len(rows) == 60 and {17, 41} <= {row["source_row"] for row in bad}
    if max_retries:
        assert len(bad) == 2
    assert "times with this row" in bad[0]["error"]
    assert all(row["generated_text"] == row["prompt"].upper() for row in rows if not row["error"])


def test_others_go_on_while_a_row_is_found_out(job):
    prompts = ["die", *(f"p{number}" for number in range(400))]
    rows, dispatcher = job(prompts, batch=8, max_retries=1)
    assert [row["source_row"] for row in rows if row["error"]] == [0] and len(rows) == 401
    assert dispatcher.num_replaced == 5, "once with others, then in groups of 8, 4, 2 and 1"


PREFIXES = [f"{number:02d} {'what these share ' * 6}" for number in range(24)]


def test_prompts_that_begin_alike_go_to_one_worker(job):
    prompts = [f"{prefix}{number:02d}" for prefix in PREFIXES for number in range(60)]
    rows, dispatcher = job(prompts, batch=20, group_by_prefix=True)
    assert [row["generated_text"] for row in rows] == [prompt.upper() for prompt in prompts]
    assert "sere_prompt" not in rows[0] and dispatcher.num_replaced == 0
    workers = [{row["part"].split("-")[1] for row in rows[start : start + 60]} for start in range(0, len(rows), 60)]
    assert sum(len(some) == 1 for some in workers) >= 20, "of 24; some are taken over at the end, so that nobody waits"


def test_prefixes_and_workers_killed_at_random(job):
    prompts = [f"{prefix}{number:03d}" for prefix in PREFIXES[:8] for number in range(400)]
    rng, killed = random.Random(0), []

    def kill(dispatcher):
        if len(killed) < 3 and dispatcher.replicas:
            handle = rng.choice(list(dispatcher.replicas.values()))
            os.kill(int(handle.node), signal.SIGKILL)
            killed.append(handle.name)

    rows, dispatcher = job(prompts, batch=20, checkpoint_rows=33, while_running=kill, group_by_prefix=True)
    assert dispatcher.num_replaced >= len(set(killed)) >= 2
    assert [row["generated_text"] for row in rows] == [prompt.upper() for prompt in prompts]


def test_rows_that_earlier_sessions_died_with_among_prefixes(job):
    prompts = [f"{prefix}{number}" for prefix in PREFIXES[:3] for number in range(10)]
    tries = {3: Tried(1), 7: Tried(3), 8: Tried(3), 12: Tried(5, 4), 20: Tried(6, 1)}
    rows, _ = job(prompts, tries={"f": tries}, group_by_prefix=True)
    assert [row["source_row"] for row in rows if row["error"]] == [20] and len(rows) == 30


def test_a_stopped_worker_counts_as_dead(job, tmp_path):
    prompts = [f"p{number}" for number in range(40)]
    prompts[13] = f"stop {tmp_path / 'stopped'}"
    rows, dispatcher = job(prompts, stall_timeout_s=3)
    assert dispatcher.num_replaced == 1 and len(rows) == 40 and not any(row["error"] for row in rows)


def test_a_full_disk_ends_the_job_at_once(job):
    with pytest.raises(ConfigError, match=r"cannot be used \(No space left on device"):
        job(["a", "full"])


def test_a_storage_that_fails_costs_the_worker(job):
    with pytest.raises(ConfigError, match=r"died one after the other.*No space"):
        job(["full, for a while"] * 3, batch=1)


def test_rows_that_earlier_sessions_died_with(job):
    prompts = [f"p{number}" for number in range(30)]
    tries = {3: Tried(1), 7: Tried(3), 8: Tried(3), 12: Tried(5, 4), 20: Tried(6, 1)}
    rows, _ = job(prompts, tries={"f": tries})
    assert [row["source_row"] for row in rows if row["error"]] == [20] and len(rows) == 30
    assert "sessions ended 6 times while this row was being answered" in rows[20]["error"]


def test_workers_that_always_die_end_the_job(job):
    with pytest.raises(ConfigError, match="died one after the other without finishing a row"):
        job(["die"] * 40, batch=1, max_retries=100)


def test_refusal_at_start(job):
    with pytest.raises(ConfigError, match="not with this model"):
        job(["a"], start_error=lambda number: "node a")
    with pytest.raises(ConfigError, match=r"not with this model, says node [ab]"):
        job(["a"], num_replicas=3, start_error=lambda number: f"node {'ab'[number % 2]}")


def test_one_bad_node_does_not_end_the_job(job):
    rows, _ = job(["a"] * 30, num_replicas=3, start_error=lambda number: "bad node" if number in (0, 1) else None)
    assert len(rows) == 30


def test_start_that_dies(job):
    rows, _ = job(["a"] * 9, start_error=lambda number: "killed" if number < 2 else None)
    assert len(rows) == 9
    with pytest.raises(ConfigError, match="replicas die while they start"):
        job(["b"], start_error=lambda number: "killed")


def test_bad_input_is_raised(job, tmp_path):
    def broken():
        raise ConfigError("file x is damaged")
        yield

    nothing = dict(num_replicas=0, concurrent_batches=1, max_retries=0, stall_timeout_s=1)
    dispatcher = Dispatcher(None, None, **nothing, left_of=None, give_up=None, split=None)
    with pytest.raises(ConfigError, match="file x is damaged"):
        for _ in dispatcher.run(broken()):
            pass
