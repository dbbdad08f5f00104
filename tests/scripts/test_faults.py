"""What the fault matrix strikes with and counts; no job is run here."""

import asyncio
import importlib
import signal
import subprocess
import sys
from types import SimpleNamespace

import pyarrow as pa
import pytest

from sere.pipeline.generate.parts import Parts
from sere.pipeline.generate.record import write_manifest
from sere.pipeline.generate.replica.answers import Answer, answer_table
from sere.pipeline.runtime.storage import Storage
from tests.conftest import ROOT

SCRIPTS = ROOT / "scripts" / "benchmarks"
DIE = """
import sys
sys.path.insert(0, {scripts!r})
from faults.deaths import Death, arm
from sere.pipeline.runtime.storage import Storage
arm(Death({operations!r}, 1, {moment!r}))
storage = Storage({folder!r})
for name in ("a", "b", "c"):
    storage.put(f"results/{{name}}", b"0123456789")
storage.remove_all(["results/none"])
storage.remove_all(["results/a", "results/b", "results/c"])
"""


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module
    for name in [name for name in sys.modules if name.split(".")[0] in ("faults", "simulated_engine", "benchmark")]:
        sys.modules.pop(name)


@pytest.mark.parametrize(
    ("operations", "moment", "left"),
    [
        ("put results/", "before", ["a"]),
        ("put results/", "midst", ["a", "half of b"]),
        ("put results/", "after", ["a", "b"]),
        ("remove", "before", ["a", "b", "c"]),
        ("remove", "midst", ["b", "c"]),
        ("remove", "after", []),
    ],
)
def test_a_death_at_one_exact_operation(tmp_path, operations, moment, left):
    code = DIE.format(scripts=str(SCRIPTS), operations=operations, moment=moment, folder=str(tmp_path))
    died = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    files = sorted((tmp_path / "results").iterdir(), key=lambda file: file.name.lstrip("."))
    half = [f"half of {file.name[1]}" if file.name[0] == "." else file.name for file in files]
    assert half == left
    assert [file.read_bytes() for file in files] == [b"0123456789"[: 5 if file.name[0] == "." else 10] for file in files]


def test_what_became_of_rows(load, tmp_path):
    rows = load("faults.rows")
    expected = rows.make_rows(tmp_path / "data", 12, num_files=2)
    assert len(expected) == 12 and len((tmp_path / "data/00.jsonl").read_text().splitlines()) == 6
    parts = Parts(Storage(str(tmp_path / "run")), "digest")

    def write(name, answers):
        places = list(answers)
        made = {
            "id": [expected[place][0] for place in places],
            "source_file": [place[0] for place in places],
            "source_row": pa.array([place[1] for place in places], pa.int64()),
        }
        table = [(0, number, answer) for number, answer in enumerate(answers.values())]
        parts.write(name, answer_table(table, {0: pa.table(made)}, pa.schema([("id", pa.string())]), "id"))

    right = {place: Answer(text, 1, 1, "stop") for place, (_, text) in expected.items()}
    write("a", right)
    write_manifest(parts, {"finish": {"preserve_order": True}}, parts.names())
    assert not any(rows.count_rows(parts.storage, expected).values())
    lost, wrong, failed, twice = ("00.jsonl", 0), ("00.jsonl", 1), ("00.jsonl", 2), ("01.jsonl", 3)
    write(
        "a",
        {place: answer for place, answer in right.items() if place != lost} | {wrong: Answer("x"), failed: Answer(error="e")},
    )
    write("b", {twice: right[twice]})
    write_manifest(parts, {"finish": {"preserve_order": True}}, parts.names())
    write("c", {lost: right[lost], twice: right[twice]})
    (tmp_path / "run/results/.part-d.parquet.0123456789abcdef0123456789abcdef").write_bytes(b"PAR1")
    assert rows.count_rows(parts.storage, expected) == {
        "lost": 1,
        "changed": 1,
        "errors": 1,
        "doubled": 1,
        "out of order": 1,
        "beside": 2,
        "half-written files": 1,
    }
    assert rows.whole_rows(parts.storage) == set(expected)


def test_simulated_engines_answer_by_the_prompt(load):
    module = load("simulated_engine")
    for delay_s in (0.0, 0.05):
        engine = module.SimulatedEngine(delay_s)
        found = [asyncio.run(engine.answer(SimpleNamespace(prompt=prompt), None)) for prompt in "aba"]
        assert found == [module.answer_to(prompt) for prompt in "aba"] and found[0] == found[2] != found[1]
        assert engine.num_steps == 3


def test_lines_of_single_jobs_are_one_line(load):
    plain = load("faults.tally").plain
    lines = [
        f"sere: {place}/results/part-s0001-{token}-r0000-000010.parquet cannot be used ([Errno 28] No space): mend that"
        for place, token in (("/tmp/sere-faults-a1/job-001/run", "0a1b2c"), ("s3://runs/job-002", "ffffff"))
    ]
    assert {plain(line) for line in lines} == {
        "sere: RUN/results/part-SESSION-rN-N.parquet cannot be used ([Errno N] No space): mend that"
    }


def test_kinds_measured_before_stay_on_the_page(load, tmp_path):
    page, tally, jobs = load("faults.page"), load("faults.tally"), load("faults.jobs")
    report = load("benchmark").report
    for kind in ("one", "two"):
        found = tally.Tally(kind, "simulated", num_jobs=1, num_strikes=3, num_rows=10)
        found.ended(jobs.Ended(-9, "Generating: 3 of 10 rows"))
        found.ended(jobs.Ended(75, "sere: another process works in /a/b/run | wait"))
        kinds = page.read_kinds(tmp_path / "faults") | {kind: found.as_values() | {"environment": "here"}}
        about = dict.fromkeys(kinds, "What is done.")
        report("Title", page.lines(kinds, about), tmp_path / "faults", kinds=kinds)
    text = (tmp_path / "faults.md").read_text()
    assert "6 strikes in 2 jobs" in text and text.count("| one |") == 4
    assert "| two | 75 | 1 | sere: another process works in RUN / wait |" in text
    assert "| two | killed | 1 |  |" in text
