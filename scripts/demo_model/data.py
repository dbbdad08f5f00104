"""Write the demo datasets: assets/calibration.parquet and assets/evaluation.parquet.

    python scripts/demo_model/data.py

Both are disjoint from what the demo model is trained on (`tasks.split_of`) and from each other.
"""

import ast
import inspect
import itertools
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tasks import END_OF_TEXT, TASKS, examples, library_files

ASSETS = Path(__file__).resolve().parents[2] / "assets"
NUM_CALIBRATION_ROWS = 600
CALIBRATION_BYTES = 192
NUM_EVALUATION_ROWS = 64 * len(TASKS)


def split_prose(source: str) -> tuple[str, str]:
    """A module's code without docstrings and comments on lines of their own, and its docstrings."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return "", ""
    lines, prose = source.splitlines(keepends=True), []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        text = ast.get_docstring(node) if isinstance(node, documented) else None
        if text is not None:
            prose.append(inspect.cleandoc(text))
            string = node.body[0]
            lines[string.lineno - 1 : string.end_lineno] = [""] * (string.end_lineno - string.lineno + 1)
    code = "".join(line for line in lines if line.strip() and not line.lstrip().startswith("#"))
    return code, "\n\n".join(text for text in prose if len(text) > 200)


def calibration_rows() -> list[dict[str, str]]:
    """In turn: a passage of library code, one of its English documentation, and a run of solved tasks."""
    rng = random.Random(0)
    modules = [split_prose(source.decode("utf-8", errors="ignore")) for source in library_files("calibration")]
    texts = {"code": "\n\n".join(code for code, _ in modules), "english": "\n\n".join(prose for _, prose in modules)}
    solved = examples("calibration", 0)
    rows = []
    for number in range(NUM_CALIBRATION_ROWS // 3):
        for domain, text in texts.items():
            start = rng.randrange(len(text) - CALIBRATION_BYTES)
            passage = text[start : start + CALIBRATION_BYTES]
            rows.append({"id": f"{domain}-{number:03d}", "domain": domain, "text": passage})
        row = ""
        while len(row) < CALIBRATION_BYTES:
            _, prompt, answer = next(solved)
            row += f"{prompt}{answer}{END_OF_TEXT}"
        rows.append({"id": f"tasks-{number:03d}", "domain": "tasks", "text": row})
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
