"""Files of lines: JSON, CSV and text, compressed or not, with what is wrong with each row."""

import csv
import io
import json
import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from sere.pipeline.data.source import Source, SourceFile
from sere.pipeline.runtime.storage import open_filesystem

# Bytes that are not UTF-8, as "surrogateescape" decodes them.
_NOT_UTF8 = re.compile("[\udc80-\udcff]")


def read_lines(source: Source, file: SourceFile) -> Iterator[tuple[dict[str, Any] | None, str]]:
    """Rows of a file of lines, and what is wrong with each: a bad one has no columns."""
    filesystem, _ = open_filesystem(source.spec.data, source.spec.storage_options)
    zstd = file.path.endswith(".zst")
    with filesystem.open(file.path, "rb", compression=None if zstd else "infer") as opened:
        # fsspec needs one more package for zstd; pyarrow does not.
        raw = pa.CompressedInputStream(opened, "zstd") if zstd else opened
        lines = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
        if source.kind == "text":
            for number, line in enumerate(lines, start=1):
                if _NOT_UTF8.search(line):
                    yield None, f"line {number} is not UTF-8"
                else:
                    yield {source.spec.text_column: line.rstrip("\r\n")}, ""
        elif source.kind == "csv":
            yield from _csv_rows(lines, "\t" if ".tsv" in file.path else ",")
        else:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                if _NOT_UTF8.search(line):
                    yield None, f"line {number} is not UTF-8"
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                if number == 1 and (isinstance(row, list) or line.strip() == "["):
                    raise ValueError("it is one JSON array, where one object a line is needed: jq -c '.[]' converts it")
                good = isinstance(row, dict)
                yield (row if good else None), ("" if good else f"line {number} is not a JSON object")


def _csv_rows(lines: io.TextIOWrapper, delimiter: str) -> Iterator[tuple[dict[str, Any] | None, str]]:
    # A field may hold a long document.
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header = next(reader, [])
    if len(set(header)) < len(header):
        name = next(name for name in header if header.count(name) > 1)
        raise ValueError(f"two columns are named {name!r}")
    while True:
        first = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "end of data" in str(error):
                # The rest of the file would pass for one field of one bad row.
                raise ValueError(f"the row of line {first} opens a quote that nothing closes") from error
            yield None, f"line {reader.line_num} is malformed: {error}"
            continue
        if not fields:
            continue
        if any(_NOT_UTF8.search(field) for field in fields):
            yield None, f"line {reader.line_num} is not UTF-8"
        elif len(fields) == len(header):
            yield dict(zip(header, fields, strict=True)), ""
        else:
            yield None, f"line {reader.line_num} has {len(fields)} fields, the header {len(header)}"
