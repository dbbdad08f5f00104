"""What a key means is written once, and every place that says it says the same."""

import shutil

import pytest

from scripts.document_keys import ROOT, document, main


@pytest.fixture
def checkout(tmp_path):
    """A copy of all that the script reads and writes."""
    shutil.copytree(ROOT / "conf", tmp_path / "conf", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


def replace(file, old, new):
    text = file.read_text()
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {file.name}"
    file.write_text(text.replace(old, new))


def test_comments_and_table_are_the_docstrings(capsys):
    assert main(["--check"]) == 0, capsys.readouterr().out


def test_changed_docstring_is_noticed_and_carried_everywhere(checkout, capsys):
    replace(checkout / "conf/schema/reroute.py", '"""Seed of policy random."""', '"""Seed | of\n    all."""')
    assert main(["--check"], checkout) == 1
    shown = capsys.readouterr().out
    assert "conf/generate.yaml: reroute.seed differs" in shown
    assert "README.md: seed differs" in shown
    assert document(checkout, check=False) == ["conf/generate.yaml: reroute.seed", "README.md: seed"]
    assert "  # Seed | of all.\n  seed: 0\n" in (checkout / "conf/generate.yaml").read_text()
    assert "| `seed` | 0 | Seed \\| of all. |\n" in (checkout / "README.md").read_text()
    assert main(["--check"], checkout) == 0


@pytest.mark.parametrize(
    ("file", "old", "new", "place"),
    [
        ("conf/sweep.yaml", "# Quality loss allowed", "# Loss allowed", "conf/sweep.yaml: max_loss"),
        ("conf/calibrate.yaml", "  # Seed of the first of them.\n", "", "conf/calibrate.yaml: judge.seed"),
        ("README.md", "Seed of policy random", "Seed of random", "README.md: seed"),
        ("README.md", "| `policy` | `sere` |", "| `policy` | `none` |", "README.md: policy"),
        ("conf/schema/reroute.py", "max_tokens: int = 1024", "max_tokens: int = 2048", "README.md: max_tokens"),
        ("README.md", "| `seed` | 0 |", "| `sede` | 1 | No key. |\n| `seed` | 0 |", "README.md: rows, or their order"),
    ],
)
def test_changed_text_is_noticed(checkout, file, old, new, place):
    replace(checkout / file, old, new)
    before = {path: path.read_text() for path in (checkout / "conf").glob("*.yaml")}
    assert document(checkout, check=True) == [place]
    assert before == {path: path.read_text() for path in before}, "a check writes nothing"
    assert document(checkout, check=False) == [place]
    assert document(checkout, check=True) == []


def test_values_header_and_notes_stay(checkout):
    file = checkout / "conf/sweep.yaml"
    text = file.read_text()
    changed = text.replace("by: active_experts", "# Here: what the demo shows best,\n# on the CPU.\nby: speed   # for now")
    file.write_text(changed.replace("# What it is chosen by", "# Chosen by"))
    document(checkout, check=False)
    assert file.read_text() == changed
