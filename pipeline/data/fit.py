"""Columns as the common schema wants them, with every value as it is."""

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from sere.pipeline.data.infer import text_of
from sere.pipeline.data.widen import is_text, plain


def fit(table: pa.Table, field: pa.Field) -> pa.ChunkedArray | pa.Array:
    """A column of a table as a field of the common schema; null where the table lacks it.

    Raises:
        ArrowException, ValueError: if the type does not hold every value.
    """
    if field.name not in table.column_names:
        return pa.nulls(len(table), field.type)
    column = table[field.name]
    if column.type.equals(field.type):
        return column
    if pt.is_run_end_encoded(column.type):
        column = pa.chunked_array([pc.run_end_decode(chunk) for chunk in column.chunks], column.type.value_type)
    if isinstance(column.type, pa.BaseExtensionType):
        column = column.cast(column.type.storage_type)
    if is_text(field.type) and not (is_text(plain(column.type)) or pt.is_null(column.type)):
        column = _as_text(column)
    # Arrow's casts are safe ones: a value that would change is an error.
    return column.cast(field.type)


def _as_text(column: pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    kind = column.type
    if pt.is_duration(kind):
        # Arrow's text of it has no unit.
        return pa.array([None if n is None else f"{n} {kind.unit}" for n in column.cast(pa.int64()).to_pylist()], pa.string())
    if pt.is_temporal(kind):
        texts = column.cast(pa.string())
        if any(text is not None and text.startswith("<") for text in texts.to_pylist()):
            raise ValueError(f"there is a {kind} that has no text, after the year 32767 or before -32767")
        return texts
    return pa.array([None if value is None else text_of(value) for value in column.to_pylist()], pa.string())
