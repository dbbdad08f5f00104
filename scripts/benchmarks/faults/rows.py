"""The rows of a job: making them, and what became of them."""

import io
import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from simulated_engine import answer_to

from sere.pipeline.runtime.storage import Storage

Place = tuple[str, int]
"""File and row of the input."""
Expected = dict[Place, tuple[str, str]]
"""Id and answer of each row."""
COUNTS = ("lost", "doubled", "changed", "errors", "out of order", "beside", "half-written files")


def make_rows(folder: Path, num_rows: int, *, num_files: int = 4) -> Expected:
    """Write JSONL files, and say what simulated engines answer to them."""
    folder.mkdir(parents=True)
    expected: Expected = {}
    for number in range(num_files):
        name = f"{number:02d}.jsonl"
        with (folder / name).open("w") as opened:
            for row in range(num_rows // num_files):
                values = {"id": f"{number}-{row}", "prompt": f"What is {row} times {number}? {'Think. ' * 8}"}
                opened.write(json.dumps(values) + "\n")
                expected[name, row] = (values["id"], answer_to(values["prompt"]).generated_text)
    return expected


def count_rows(storage: Storage, expected: Expected) -> Counter[str]:
    """What became of the rows of a finished job, by `COUNTS`.

    Rows are those of the files that the manifest names; *beside* counts rows in further files of `results/`.
    """
    manifest = storage.get_json("manifest.json")
    found: dict[Place, list[tuple[str, str | None, str | None]]] = {}
    order: list[Place] = []
    counts: Counter[str] = Counter()
    for name in storage.sizes("results"):
        rows = _read(storage, name)
        if name not in manifest["files"]:
            counts["beside"] += len(rows)
            continue
        for row in rows:
            place = (row["source_file"], row["source_row"])
            order.append(place)
            found.setdefault(place, []).append((row["id"], row["generated_text"], row["error"]))
    counts["lost"] = len(set(expected) - set(found))
    counts["doubled"] = sum(len(rows) - 1 for rows in found.values())
    counts["errors"] = sum(error is not None for rows in found.values() for _, _, error in rows)
    answers = [(place, row[:2]) for place, rows in found.items() for row in rows if row[2] is None]
    counts["changed"] = sum(answer != expected.get(place) for place, answer in answers)
    if manifest["finish"]["preserve_order"]:
        counts["out of order"] = sum(one > other for one, other in pairwise(order))
    if storage.is_local:
        files = (file for file in Path(storage.path).rglob(".*") if file.is_file())
        counts["half-written files"] = sum(bool(re.fullmatch(r"\..+\.[0-9a-f]{32}", file.name)) for file in files)
    return counts


def whole_rows(storage: Storage) -> set[Place]:
    """Rows that are in parts now, finished or not: those of which no answer may ever be thrown away."""
    places: set[Place] = set()
    for name in storage.sizes("results"):
        places |= {(row["source_file"], row["source_row"]) for row in _read(storage, name)}
    return places


def _read(storage: Storage, name: str) -> list[dict[str, Any]]:
    # As a whole, and again where a store fails on purpose; a part may go meanwhile.
    content = storage.get(name)
    return pq.read_table(io.BytesIO(content)).to_pylist() if content is not None else []
