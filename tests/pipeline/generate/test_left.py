"""Rows that are left, as Ray Data reads and sorts them: grouped by what their prompts begin with, wherever they were."""

import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sere.conf.errors import ConfigError
from sere.conf.schema import EngineConfig, GenerateConfig
from sere.pipeline.data import describe as describe_module
from sere.pipeline.data.describe import describe_file
from sere.pipeline.data.find import find_sources
from sere.pipeline.data.scan import unify
from sere.pipeline.generate.columns import check_columns, input_spec
from sere.pipeline.generate.dispatch.remaining import read
from sere.pipeline.generate.left import read_batches
from sere.pipeline.generate.parts import Finished

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray")]
NUM_GROUPS, GROUP = 30, 8
PREFIXES = [f"{number:02d} {'instructions that eight rows share ' * 4}" for number in range(NUM_GROUPS)]


@pytest.fixture
def data(tmp_path):
    """Rows in four files, shuffled; some have no prompt."""
    rows = [{"prompt": prefix + str(number), "kind": number % 2} for prefix in PREFIXES for number in range(GROUP)]
    rows += [{"prompt": None, "kind": 0}, {"prompt": "", "kind": 1}] * 4
    random.Random(0).shuffle(rows)
    for file in range(4):
        (tmp_path / f"{file}.jsonl").write_text("\n".join(json.dumps(row) for row in rows[file::4]))
    return tmp_path


def config_of(data, **changes):
    return GenerateConfig(model="m", data=str(data), output="o", **{"batch_size": 16, "group_by_prefix": True, **changes})


def source_of(config):
    listing = find_sources(input_spec(config))
    return unify(listing, [describe_file(listing, index) for index in range(len(listing.files))])


def batches_of(config, finished=None):
    """Batches and their rows."""
    source = source_of(config)
    return source, [(batch, read(batch.rows)) for batch in read_batches(source, finished or Finished(), config)]


def rows_of(batches):
    return [row for _, table in batches for row in table.to_pylist()]


def places(rows):
    return {(row["source_file"], row["source_row"]) for row in rows}


def test_rows_that_begin_alike_are_in_one_batch(data):
    source, batches = batches_of(config_of(data))
    rows = rows_of(batches)
    assert len(places(rows)) == len(rows) == source.num_rows == NUM_GROUPS * GROUP + 8
    assert set(rows[0]) == {"prompt", "kind", "source_file", "source_row", "sere_problem"}
    prompts = [row["prompt"] or "" for row in rows]
    assert prompts == sorted(prompts), "in order across the blocks that Ray Data made"
    groups = [{row["prompt"][:3] for row in table.to_pylist() if row["prompt"]} for _, table in batches]
    assert sum(map(len, groups)) == NUM_GROUPS, "no group is cut"
    assert [(batch.place, batch.shared) for batch, _ in batches] == [(number, 0) for number in range(len(batches))]


def test_batches_that_go_on_with_a_prefix(data):
    """Four rows of a group, then its other four."""
    _, batches = batches_of(config_of(data, batch_size=4))
    assert [batch.shared > 100 for batch, _ in batches[2:]] == [False, True] * NUM_GROUPS


def test_what_is_finished_is_left_out(data):
    _, batches = batches_of(config_of(data))
    some = batches[3][1].slice(0, 5).to_pylist()
    finished = Finished()
    for file in {row["source_file"] for row in some}:
        finished.rows[file] = np.array(sorted(row["source_row"] for row in some if row["source_file"] == file))
    _, left = batches_of(config_of(data), finished)
    assert places(rows_of(left)) == places(rows_of(batches)) - places(some)


def test_within_order_by(data):
    _, batches = batches_of(config_of(data, order_by=("kind",)))
    order = [(row["kind"], row["prompt"] or "") for row in rows_of(batches)]
    assert order == sorted(order)


def test_by_template(data):
    _, batches = batches_of(config_of(data, template="{{ kind }} {{ prompt }}"))
    rendered = [f"{row['kind']} {row['prompt']}" for row in rows_of(batches)]
    assert rendered == sorted(rendered)


def test_without_it_in_the_inputs_order(data):
    _, batches = batches_of(config_of(data, group_by_prefix=False))
    assert all(batch.place is None and len(table) == 16 for batch, table in batches[:-1])
    order = [(row["source_file"], row["source_row"]) for row in rows_of(batches)]
    assert order == sorted(order)


def test_what_is_refused(data):
    engine = EngineConfig(engine_kwargs={"enable_prefix_caching": False})
    assert not config_of(data, engine=engine, group_by_prefix=False).group_by_prefix
    with pytest.raises(ConfigError, match=r"^group_by_prefix needs .*enable_prefix_caching=false.*leave out one.*$"):
        config_of(data, engine=engine)
    (data / "0.jsonl").write_text('{"prompt": "a", "sere_prompt": "b"}')
    with pytest.raises(ConfigError, match="column 'sere_prompt', which the result would overwrite: rename it"):
        check_columns(config_of(data), source_of(config_of(data)).schema)


def test_a_large_file_is_read_by_several_tasks(tmp_path, monkeypatch):
    monkeypatch.setattr(describe_module, "_PIECE_BYTES", 1)
    pq.write_table(pa.table({"prompt": [str(row) for row in range(50)]}), tmp_path / "a.parquet", row_group_size=10)
    config = config_of(tmp_path / "a.parquet", group_by_prefix=False)
    finished = Finished(rows={"a.parquet": np.array([*range(10, 20), 33])})
    source, batches = batches_of(config, finished)
    assert len(source.files[0].pieces) == 5
    left = [row for row in range(50) if not 10 <= row < 20 and row != 33]
    assert [row["source_row"] for row in rows_of(batches)] == left
    assert [row["prompt"] for row in rows_of(batches)] == [str(row) for row in left]
