"""Calibration text: the usable rows of the input, and what is wrong with the unusable ones."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sere.conf.errors import ConfigError
from sere.conf.masking import mask_uri
from sere.conf.schema import CalibrateConfig
from sere.pipeline.data.find import find_sources
from sere.pipeline.data.read import naming_file, read_tables
from sere.pipeline.data.source import InputSpec, Source, SourceFile

_ROWS_PER_TABLE = 1000


@dataclass(frozen=True)
class TextRow:
    """A usable row."""

    file: str
    number: int
    """Within its file, from 0."""
    text: str
    domain: str


@dataclass(frozen=True)
class RowRemark:
    """What was wrong with a row, and what was done about it."""

    file: str
    number: int
    remark: str
    is_skipped: bool
    """Whether it is not calibrated on at all."""


def read_rows(config: CalibrateConfig) -> tuple[list[TextRow], list[RowRemark]]:
    """The first `num_sequences` usable rows, in order, and the unusable ones among them: null, empty, not text.

    Raises:
        ConfigError: if there is no such file or column, or no usable row.
    """
    spec = InputSpec(
        data=config.data,
        text_column=config.text_column,
        data_format=config.data_format,
        data_split=config.data_split,
        data_revision=config.data_revision,
        storage_options=config.storage_options,
    )
    source = find_sources(spec)
    remarks: list[RowRemark] = []

    def usable() -> Iterator[TextRow]:
        for file in source.files:
            for number, (text, domain, problem) in enumerate(_values(config, source, file)):
                problem = problem or _problem(text)
                if problem:
                    remarks.append(RowRemark(file.path, number, f"skipped: {problem}", is_skipped=True))
                else:
                    yield TextRow(file.path, number, text, domain)

    rows = list(islice(usable(), config.num_sequences))
    if not rows:
        reason = f"all {len(remarks)} rows are unusable, the first is {remarks[0].remark}" if remarks else "there are no rows"
        raise ConfigError(f"{mask_uri(config.data)} has no usable text in {config.text_column!r}: {reason}")
    return rows, remarks


def _values(config: CalibrateConfig, source: Source, file: SourceFile) -> Iterator[tuple[Any, str, str]]:
    """Text, domain and problem ("" if there is none) of each row of a file."""
    with naming_file(file):
        for table, problems in read_tables(source, file, _ROWS_PER_TABLE):
            problems = problems if problems is not None else [""] * len(table)
            for key in ("text_column", "domain_column"):
                column = getattr(config, key)
                if column is not None and column not in table.column_names and not all(problems):
                    there = ", ".join(table.column_names)
                    raise ConfigError(f"{mask_uri(file.path)} has no column {column!r} (there: {there}): set {key}")
            # Rows that all have a problem have no columns, and the table no length.
            nothing = [None] * len(problems)
            texts = table[config.text_column].to_pylist() if config.text_column in table.column_names else nothing
            domains = [""] * len(problems)
            if config.domain_column is not None:
                known = config.domain_column in table.column_names
                domains = [str(value) for value in (table[config.domain_column].to_pylist() if known else nothing)]
            yield from zip(texts, domains, problems, strict=True)


def _problem(text: Any) -> str:
    if text is None:
        return "null"
    if not isinstance(text, str):
        return f"not text but {type(text).__name__}"
    return "" if text.strip() else "empty"
