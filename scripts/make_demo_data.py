"""Write the demo datasets: assets/calibration.parquet and assets/evaluation.parquet.

    python scripts/make_demo_data.py

Both are disjoint from what the demo model is trained on (`demo_tasks.split_of`) and from each other.
"""

import itertools
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from demo_tasks import END_OF_TEXT, TASKS, examples, library_text

ASSETS = Path(__file__).resolve().parent.parent / "assets"
NUM_CALIBRATION_ROWS = 400
CALIBRATION_BYTES = 192
NUM_EVALUATION_ROWS = 64 * len(TASKS)


def calibration_rows() -> list[dict[str, str]]:
    """Alternately a passage of library text and a run of solved tasks."""
    rng = random.Random(0)
    text = library_text("calibration").decode("utf-8", errors="ignore")
    solved = examples("calibration", 0)
    rows = []
    for number in range(NUM_CALIBRATION_ROWS // 2):
        start = rng.randrange(len(text) - CALIBRATION_BYTES)
        rows.append({"id": f"text-{number:03d}", "text": text[start : start + CALIBRATION_BYTES]})
        row = ""
        while len(row) < CALIBRATION_BYTES:
            _, prompt, answer = next(solved)
            row += f"{prompt}{answer}{END_OF_TEXT}"
        rows.append({"id": f"tasks-{number:03d}", "text": row})
    return rows


def evaluation_rows() -> list[dict[str, str]]:
    chosen = itertools.islice(examples("evaluation", 0), NUM_EVALUATION_ROWS)
    return [
        {"id": f"{task}-{number:03d}", "prompt": prompt, "reference": answer, "task": task}
        for number, (task, prompt, answer) in enumerate(chosen)
    ]


def main() -> None:
    ASSETS.mkdir(exist_ok=True)
    for name, rows in (("calibration", calibration_rows()), ("evaluation", evaluation_rows())):
        pq.write_table(pa.Table.from_pylist(rows), ASSETS / f"{name}.parquet")
        print(f"{name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
