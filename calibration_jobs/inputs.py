"""Input files: which there are, and the texts in them."""

import glob
import hashlib
from pathlib import Path

from conf.schema import CalibrateConfig, ConfigError

_SUFFIXES = {".parquet": "parquet", ".jsonl": "json", ".ndjson": "json", ".json": "json"}


def find_files(data: str) -> tuple[str, list[Path]]:
    """The files behind a path, folder or glob, and their kind: parquet or json (one object a line).

    Raises:
        ConfigError: if there are none, or of several kinds.
    """
    path = Path(data)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES)
    else:
        files = sorted(Path(file) for file in glob.glob(data, recursive=True))
    if not files:
        raise ConfigError(
            f"no data at {data} (seen from {Path.cwd()}): give a parquet or JSONL file, a folder of them, or a glob"
        )
    kinds = {_SUFFIXES.get(file.suffix, file.suffix or "no suffix") for file in files}
    if len(kinds) > 1 or not kinds <= {"parquet", "json"}:
        raise ConfigError(f"data must be all parquet or all JSONL, {data} has {', '.join(sorted(kinds))}")
    return kinds.pop(), files


def read_texts(config: CalibrateConfig) -> list[str]:
    """The first `num_sequences` texts, in order.

    Raises:
        ConfigError: if there is no such file or column, no rows, or a row without text.
    """
    import datasets
    import pyarrow as pa

    kind, files = find_files(config.data)
    datasets.disable_progress_bars()
    try:
        stream = datasets.load_dataset(kind, data_files=[str(file) for file in files], split="train", streaming=True)
        rows = list(stream.take(config.num_sequences))
    except (pa.ArrowException, datasets.exceptions.DatasetsError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{config.data} cannot be read ({reason}): it is empty or damaged") from error
    texts = []
    for number, row in enumerate(rows):
        if config.text_column not in row:
            raise ConfigError(f"{config.data} has no column {config.text_column!r} (there: {', '.join(row)}): set text_column")
        if not isinstance(row[config.text_column], str) or not row[config.text_column]:
            raise ConfigError(f"{config.data}: row {number} has no text in {config.text_column!r}: remove or mend it")
        texts.append(row[config.text_column])
    if not texts:
        raise ConfigError(f"{config.data} has no rows")
    return texts


def data_digest(texts: list[str]) -> str:
    """SHA-256 of the texts, in order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()
