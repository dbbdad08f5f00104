"""The end of a job: every row once, in order if asked, whenever it is interrupted; and done again without an engine."""

import dataclasses
import json
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sere.conf.errors import ConfigError
from sere.conf.schema import GenerateConfig
from sere.pipeline.data.describe import describe_file
from sere.pipeline.data.find import find_sources
from sere.pipeline.data.read import read_file
from sere.pipeline.data.scan import unify
from sere.pipeline.generate import arrange as arrange_module
from sere.pipeline.generate import finish as finish_module
from sere.pipeline.generate.columns import input_spec
from sere.pipeline.generate.finish import finish
from sere.pipeline.generate.identity import GENERATE
from sere.pipeline.generate.parts import PartFacts, Parts
from sere.pipeline.generate.record import Session, read_manifest, sweep, write_session
from sere.pipeline.generate.replica.answers import Answer, answer_table
from sere.pipeline.runtime.job_folder import JobFolder
from sere.pipeline.runtime.storage import Storage
from sere.pipeline.tracking.tracker import NullTracker
from tests.examples import examples

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray")]
NUM_ROWS = 23


@pytest.fixture
def config(tmp_path):
    lines = [json.dumps({"prompt": f"p{n}", "reference": f"P{n}", "other": "P1", "task": "t"}) for n in range(NUM_ROWS)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    return GenerateConfig(model="m", data=str(tmp_path / "data.jsonl"), output=str(tmp_path / "run"))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(arrange_module, "_rows_per_part", lambda finished, target: 5)


class Job:
    """A job all of whose rows are answered, out of order; what an engine would leave."""

    def __init__(self, config, errors=()):
        self.config = config
        listing = find_sources(input_spec(config))
        self.source = unify(listing, [describe_file(listing, 0)])
        with self.open() as folder:
            parts = Parts(folder.storage, folder.digest)
            (table,) = read_file(self.source, 0, rows_per_table=100)
            for start in (15, 0, 8):
                some = table.slice(start, {15: 8, 0: 8, 8: 7}[start])
                rows = [
                    (0, index, Answer(error="bad") if row in errors else Answer(prompt.upper(), 1, 2, "stop"))
                    for index, (prompt, row) in enumerate(
                        zip(some["prompt"].to_pylist(), some["source_row"].to_pylist(), strict=True)
                    )
                ]
                # One part as an earlier version wrote them, unscored.
                references = "reference" if start else ""
                answers = answer_table(list(reversed(rows)), {0: some}, self.source.schema, "id", references)
                parts.write(f"s0001-ab-r0000-{99 - start:06d}", answers)

    def open(self):
        return JobFolder(Storage(self.config.output), GENERATE, {"a": 1}, overwrite=False)

    def finish(self, *, is_ordered=False, **changes):
        config = dataclasses.replace(self.config, **changes)
        with self.open() as folder:
            parts = Parts(folder.storage, folder.digest)
            return finish(config, self.source, folder, parts, NullTracker(), is_ordered=is_ordered)

    def results(self, column="source_row"):
        """A column of the files that the manifest names, in order; and whether there are others."""
        with self.open() as folder:
            parts = Parts(folder.storage, folder.digest)
            manifest = read_manifest(parts)
            assert manifest is not None
            sweep(parts, manifest)
            assert list(parts.storage.sizes("results")) == sorted(manifest["files"])
            return [row[column] for name in manifest["files"] for row in pq.read_table(parts.storage.locate(name)).to_pylist()]


def test_figures_and_order(config, small):
    job = Job(config, errors={3})
    metrics = job.finish()
    assert (metrics["num_rows"], metrics["num_errors"]) == (NUM_ROWS, 1)
    assert metrics["exact_match"] == pytest.approx((NUM_ROWS - 1) / NUM_ROWS)
    assert sorted(job.results()) == list(range(NUM_ROWS)) != job.results()
    assert len(Storage(config.output).sizes("results")) == 1, "small files become one"
    assert dict(zip(job.results(), job.results("exact_match"), strict=True)) == {row: row != 3 for row in range(NUM_ROWS)}
    # Other figures, and another order, of the same answers.
    metrics = job.finish(reference_column="other", preserve_order=True)
    assert metrics["exact_match"] == pytest.approx(1 / NUM_ROWS)
    assert job.results() == list(range(NUM_ROWS))
    assert len(Storage(config.output).sizes("results")) == 5
    assert job.results("exact_match") == [row == 1 for row in range(NUM_ROWS)]
    before = Storage(config.output).sizes("results")
    job.finish(is_ordered=True, reference_column="other", preserve_order=True)
    assert Storage(config.output).sizes("results") == before, "nothing is written again without need"
    metrics = job.finish(is_ordered=True, preserve_order=True)
    assert metrics["exact_match"] == pytest.approx((NUM_ROWS - 1) / NUM_ROWS)
    assert job.results() == list(range(NUM_ROWS)) and job.results("exact_match") == [row != 3 for row in range(NUM_ROWS)]
    metrics = job.finish(is_ordered=True, preserve_order=True, reference_column="none")
    assert "exact_match" not in metrics
    with pytest.raises(KeyError):
        job.results("exact_match")


def test_what_prefix_caches_had_over_all_sessions(config):
    job = Job(config)
    storage = Storage(config.output)
    write_session(storage, Session(1))
    assert "prefix_cache_hit_rate" not in job.finish(), "nobody asked"
    write_session(storage, Session(2, prefix_cache_queries=300, prefix_cache_hits=210))
    write_session(storage, Session(3, prefix_cache_queries=100, prefix_cache_hits=10))
    assert job.finish()["prefix_cache_hit_rate"] == storage.get_json("summary.json")["prefix_cache_hit_rate"] == 0.55


@settings(max_examples=examples(50), deadline=None)
@given(st.lists(st.integers(1, 20), max_size=12), st.integers(1, 400))
def test_row_groups_are_the_same_rows_and_of_a_size(lengths, most):
    tables = [pa.table({"n": range(10 * number, 10 * number + length)}) for number, length in enumerate(lengths)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrange_module, "_ROW_GROUP_BYTES", most)
        groups = list(arrange_module._row_groups(iter(tables)))
    assert [n for group in groups for n in group["n"].to_pylist()] == [n for table in tables for n in table["n"].to_pylist()]
    assert all(group.nbytes >= most for group in groups[:-1]) and all(group.nbytes < most + 8 * 20 for group in groups)


MORE_STEPS = [pytest.param(step, marks=pytest.mark.long) for step in ("sort", "first part")]


@pytest.mark.parametrize("step", [*MORE_STEPS, "third part", "manifest", "delete"])
def test_interrupted_at_any_point_every_row_is_there_once(config, small, monkeypatch, step):
    job = Job(config)

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    def some_tasks(calls, folder):
        yield from islice(original(calls, folder), {"first part": 1, "third part": 3}[step])
        raise KeyboardInterrupt

    original = arrange_module.run_tasks
    with monkeypatch.context() as patch:
        if step == "sort":
            patch.setattr(arrange_module, "_in_order", interrupt)
        elif step == "manifest":
            patch.setattr(finish_module, "write_manifest", interrupt)
        elif step == "delete":
            patch.setattr(Storage, "remove_all", interrupt)
        else:
            patch.setattr(arrange_module, "run_tasks", some_tasks)
        with pytest.raises(KeyboardInterrupt):
            job.finish(preserve_order=True)
    if step == "delete":
        assert job.results() == list(range(NUM_ROWS)), "it was finished"
    metrics = job.finish(preserve_order=True)
    assert metrics["num_rows"] == NUM_ROWS and metrics["exact_match"] == 1
    assert job.results() == list(range(NUM_ROWS))


@pytest.mark.parametrize("preserve_order", [True, False])
def test_rows_that_are_lost_on_the_way_lose_nothing(config, small, monkeypatch, preserve_order):
    job = Job(config)

    def write(parts, name, table):
        _, size = parts.write(name, table.slice(1))
        return f"results/part-{name}.parquet", PartFacts(size, len(table), 0, "")

    def write_rows(parts, name, references, spans, *tables):
        return write(parts, name, tables[0].slice(*spans[0]).drop_columns(["sere_file"]))

    def rewrite(parts, name, references, names):
        return [write(parts, name, pa.concat_tables(parts.read_all(names), promote_options="default"))]

    with monkeypatch.context() as patch:
        patch.setattr(arrange_module, "_write_rows", write_rows)
        patch.setattr(arrange_module, "_rewrite", rewrite)
        with pytest.raises(ConfigError, match=rf"of {NUM_ROWS} rows to be written once more \d+ are there. Nothing was rem"):
            job.finish(preserve_order=preserve_order)
    job.finish(preserve_order=True)
    assert job.results() == list(range(NUM_ROWS))


def test_nothing_is_removed_by_a_process_that_has_lost_the_folder(config, monkeypatch):
    job = Job(config)
    before = Storage(config.output).sizes("results")

    def lost(folder, *, now=False):
        if now:
            raise ConfigError("another one goes on")

    with monkeypatch.context() as patch:
        patch.setattr(JobFolder, "check", lost)
        with pytest.raises(ConfigError, match="another one goes on"):
            job.finish(preserve_order=True)
    assert set(before) <= set(Storage(config.output).sizes("results"))
    assert Storage(config.output).get("manifest.json") is None


def test_a_job_of_which_too_many_rows_fail_is_not_finished(config):
    job = Job(config, errors=set(range(20)))
    assert job.finish()["num_errors"] == 20, "few rows say little"
    with pytest.raises(ConfigError, match=r"20 of 23 rows failed.*retry_errors=true"):
        job.finish(max_error_ratio=0.1)
