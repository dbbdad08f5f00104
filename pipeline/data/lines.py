"""Files of lines: JSON, CSV and text, compressed or not, with what is wrong with each row."""

import csv
import io
import json
import math
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from sere.pipeline.data.opened import open_lines
from sere.pipeline.data.source import Source, SourceFile

Row = tuple[dict[str, Any] | None, str]
# Bytes that are not UTF-8, as "surrogateescape" decodes them.
_NOT_UTF8 = re.compile("[\udc80-\udcff]")
# Half of a character, as JSON may write it; mostly the other half follows.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_lines(source: Source, file: SourceFile) -> Iterator[Row]:
    """Rows of a file of lines, and what is wrong with each: a bad one has no columns."""
    with open_lines(source.spec, file.path) as lines:
        if source.kind == "text":
            for number, line in enumerate(lines, start=1):
                if _NOT_UTF8.search(line):
                    yield None, f"line {number} is not UTF-8"
                else:
                    yield {source.spec.text_column: line.rstrip("\r\n")}, ""
        elif source.kind == "csv":
            yield from _csv_rows(lines, "\t" if ".tsv" in file.path else ",")
        else:
            yield from _json_rows(lines)


def _json_rows(lines: io.TextIOWrapper) -> Iterator[Row]:
    is_first = True
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text:
            continue
        if is_first and text.startswith("["):
            raise ValueError("it is one JSON array, where one object a line is needed: jq -c '.[]' converts it")
        if is_first and text == "{":
            raise ValueError("its objects are indented, where one object a line is needed: jq -c . converts it")
        is_first = False
        yield _json_row(line, number)


def _json_row(line: str, number: int) -> Row:
    if _NOT_UTF8.search(line):
        return None, f"line {number} is not UTF-8"
    try:
        row = _DECODER.decode(line)
        if not isinstance(row, dict):
            return None, f"line {number} is not a JSON object"
        if _SURROGATE.search(line):
            json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return None, f"line {number} has half of a surrogate pair, which is no text"
    except (ValueError, ArithmeticError, RecursionError):
        return None, f"line {number} is not a JSON object"
    return row, ""


def _number(text: str) -> float | Decimal:
    """A number with a point or an exponent: what a double does not hold stays what it is.

    A double that is written with all of its 17 digits is that double.
    """
    value = float(text)
    if len(text) <= 16 and "e" not in text and "E" not in text:
        # 15 digits at most: every such number has a double of its own.
        return value
    exact = Decimal(text)
    return value if math.isfinite(value) and exact in (Decimal(repr(value)), Decimal(f"{value:.16e}")) else exact


_DECODER = json.JSONDecoder(parse_float=_number)


def _csv_rows(lines: io.TextIOWrapper, delimiter: str) -> Iterator[Row]:
    # A field may hold a long document.
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header = next((fields for fields in reader if fields), [])
    if any(map(_NOT_UTF8.search, header)):
        raise ValueError("its header is not UTF-8")
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
