"""The one way to write a local file: aside, then renamed, so that it is there whole or not at all."""

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """A file to write to instead, in the same folder, which takes the name of `file` at the end of the block.

    The content is on the disk by then. If the block raises, nothing is left, and a file that was there stays as it was.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        yield aside
        with aside.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what processes that were killed had half written into a folder, in which nobody else writes now."""
    for file in folder.iterdir() if folder.is_dir() else ():
        if re.fullmatch(r"\..+\.[0-9a-f]{32}", file.name):
            file.unlink()
