"""Input as a job opens it, without Ray."""

from sere.conf.schema import GenerateConfig
from sere.pipeline.data.describe import describe_file
from sere.pipeline.data.find import find_sources
from sere.pipeline.data.read import read_file
from sere.pipeline.data.scan import unify
from sere.pipeline.data.source import PROBLEM
from sere.pipeline.generate.columns import check_columns, input_spec


def config(data, **changes):
    return GenerateConfig(**{"model": "m", "output": "o", "data": str(data), **changes})


def open_source(data, **changes):
    made = config(data, **changes)
    listing = find_sources(input_spec(made))
    files = [describe_file(listing, index) for index in range(len(listing.files))]
    source = unify(listing, files, num_rows=made.num_rows)
    check_columns(made, source.schema)
    return source


def read(source, index=0, *, rows_per_table=3, skip=None):
    tables = list(read_file(source, index, rows_per_table=rows_per_table, skip=skip))
    assert all(0 < len(table) <= rows_per_table for table in tables)
    return [row for table in tables for row in table.to_pylist()]


def prompts(data, **changes):
    source = open_source(data, **changes)
    rows = [row for index in range(len(source.files)) for row in read(source, index)]
    assert len(rows) == source.num_rows
    return [(row["source_file"], row["source_row"], row["prompt"], row[PROBLEM]) for row in rows]
