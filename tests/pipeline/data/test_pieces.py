"""Large files are read in pieces: together they are the file, whatever of it is left out."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sere.conf.errors import ConfigError
from sere.pipeline.data import describe
from sere.pipeline.data.known import from_json, to_json
from sere.pipeline.data.read import read_file
from tests.examples import examples
from tests.pipeline.data.opening import open_source, read


@settings(max_examples=examples(40), deadline=None)
@given(st.data())
def test_pieces_of_a_file_are_the_file(tmp_path_factory, data):
    num_rows, group = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 12))
    file = tmp_path_factory.mktemp("data") / "a.parquet"
    pq.write_table(pa.table({"prompt": [str(row) for row in range(num_rows)]}), file, row_group_size=group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(describe, "_PIECE_BYTES", data.draw(st.integers(1, 300)))
        source = open_source(file, num_rows=data.draw(st.none() | st.integers(1, 45)))
    described = source.files[0]
    assert from_json(to_json(described)) == described
    pieces = described.pieces
    assert [end for _, end in pieces] == [*(first for first, _ in pieces[1:]), described.num_rows]
    skip = np.array(sorted(data.draw(st.sets(st.integers(0, num_rows - 1)))), np.int64)
    found = [
        row
        for piece in pieces
        for table in read_file(source, 0, rows_per_table=3, skip=skip, piece=piece)
        for row in table.to_pylist()
    ]
    assert found == read(source, skip=skip)
    assert [row["source_row"] for row in found] == [row for row in range(described.num_rows) if row not in skip]
    assert all(row["prompt"] == str(row["source_row"]) for row in found)


def test_a_file_that_was_written_anew_in_other_groups(tmp_path):
    file = tmp_path / "a.parquet"
    table = pa.table({"prompt": [str(row) for row in range(20)]})
    pq.write_table(table, file, row_group_size=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(describe, "_PIECE_BYTES", 1)
        source = open_source(file)
    assert len(source.files[0].pieces) == 4
    pq.write_table(table, file, row_group_size=7)
    with pytest.raises(ConfigError, match="has changed since the job looked at it"):
        list(read_file(source, 0, rows_per_table=3, piece=(5, 10)))


def test_small_files_and_lines_are_one_piece(tmp_path):
    pq.write_table(pa.table({"prompt": ["a"] * 10}), tmp_path / "a.parquet", row_group_size=2)
    assert open_source(tmp_path / "a.parquet").files[0].pieces == [(0, 10)]
    (tmp_path / "b.txt").write_text("a\nb\n")
    assert open_source(tmp_path / "b.txt").files[0].pieces == [(0, 2)]
