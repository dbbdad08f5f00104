"""Writes what a key means into every place that says it: `python scripts/document_keys.py [--check]`.

The docstring of a field in `conf/schema/` is the source. The comments of the YAML files in `conf/` and the table of keys in
the README are made from it. Values, their order, a file's header, and notes on the shipped value (`# Here: ...`) stay as they
were written.
"""

import argparse
import ast
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
JOBS = {"calibrate": "CalibrateConfig", "generate": "GenerateConfig", "sweep": "SweepConfig"}
# The class whose keys the README lists, and the head of that table.
README_CLASS = "RerouteConfig"
README_HEAD = "| key | default | |\n|---|---|---|\n"
WIDTH = 120
NOTE = "# Here:"


@dataclass(frozen=True)
class Field:
    """One key, as its schema describes it."""

    text: str
    """Its docstring in one line; empty where the name says it all."""
    default: str
    """As YAML has it; empty for null, and where the value must be given."""
    section: str | None
    """Class of the keys below it."""


Schema = dict[str, dict[str, Field]]


def read_schema(folder: Path) -> Schema:
    """The fields of every class in the folder's files, by class and name."""
    files = [ast.parse(file.read_text()) for file in sorted(folder.glob("*.py"))]
    classes = [node for file in files for node in file.body if isinstance(node, ast.ClassDef)]
    names = {node.name for node in classes}
    return {node.name: dict(_fields(node, names)) for node in classes}


def _fields(node: ast.ClassDef, classes: set[str]) -> Iterator[tuple[str, Field]]:
    for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        text = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            text = " ".join(str(following.value.value).split())
        named = {part.id for part in ast.walk(statement.annotation) if isinstance(part, ast.Name)}
        section = next(iter(named & classes), None)
        yield statement.target.id, Field(text, _default(statement.value), section)


def _default(value: ast.expr | None) -> str:
    if not isinstance(value, ast.Constant) or value.value is None:
        return ""
    return f"`{value.value}`" if isinstance(value.value, str) else str(value.value).lower()


def document_yaml(text: str, schema: Schema, root_class: str) -> tuple[str, list[str]]:
    """The file with the comments its keys should have, and the keys whose comment was another."""
    lines = text.splitlines()
    keys = dict(_keys(yaml.compose(text), schema, root_class))
    # The header ends with the first empty line.
    start = lines.index("") + 1
    written, pending, changed = lines[:start], [], []
    for number, line in enumerate(lines[start:], start):
        if line.lstrip().startswith("#"):
            pending.append(line)
            continue
        if number in keys:
            key, meaning = keys[number]
            wanted = _comment(meaning, pending, " " * (len(line) - len(line.lstrip())))
            if wanted != pending:
                changed.append(key)
            pending = wanted
        written += [*pending, line]
        pending = []
    return "\n".join([*written, *pending]) + "\n", changed


def _keys(node: yaml.Node, schema: Schema, class_name: str, prefix: str = "") -> Iterator[tuple[int, tuple[str, str]]]:
    """Line, name and meaning of the keys of a mapping and of the sections in it."""
    assert isinstance(node, yaml.MappingNode)
    for key, value in node.value:
        field = schema[class_name][key.value]
        yield key.start_mark.line, (f"{prefix}{key.value}", field.text)
        if field.section and isinstance(value, yaml.MappingNode):
            yield from _keys(value, schema, field.section, f"{prefix}{key.value}.")


def _comment(meaning: str, old: list[str], indent: str) -> list[str]:
    """The meaning, wrapped, and the old comment from its first note on."""
    note = next((number for number, line in enumerate(old) if line.lstrip().startswith(NOTE)), len(old))
    start = f"{indent}# "
    wrapped = textwrap.wrap(
        meaning, WIDTH, initial_indent=start, subsequent_indent=start, break_long_words=False, break_on_hyphens=False
    )
    return wrapped + old[note:]


def document_readme(text: str, fields: dict[str, Field]) -> tuple[str, list[str]]:
    """The README with the table of keys as it should be, and the keys whose row was another."""
    before, head, after = text.partition(README_HEAD)
    if not head:
        raise ValueError(f"the README has no table of keys, which begins with {README_HEAD!r}")
    old = re.match(r"(\|.*\n)*", after)[0]
    rows = [_row(f"`{name}`", field.default, field.text) for name, field in fields.items()]
    changed = [name for name, row in zip(fields, rows, strict=True) if row not in old]
    if not changed and old != "".join(rows):
        changed = ["rows, or their order"]
    return before + head + "".join(rows) + after[len(old) :], changed


def _row(*cells: str) -> str:
    return "".join(f"| {cell.replace('|', chr(92) + '|')} " if cell else "| " for cell in cells) + "|\n"


def document(root: Path, *, check: bool) -> list[str]:
    """Rewrite the files below `root`, or with `check` only compare; returns FILE: KEY of all that differed."""
    schema = read_schema(root / "conf" / "schema")
    different = []
    for path in [*(root / "conf" / f"{job}.yaml" for job in JOBS), root / "README.md"]:
        text = path.read_text()
        if path.suffix == ".yaml":
            wanted, changed = document_yaml(text, schema, JOBS[path.stem])
        else:
            wanted, changed = document_readme(text, schema[README_CLASS])
        different += [f"{path.relative_to(root)}: {key}" for key in changed]
        if wanted != text and not check:
            path.write_text(wanted)
    return different


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Returns 1 if a check found a difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if a file would change")
    check = parser.parse_args(arguments).check
    different = document(root, check=check)
    for place in different:
        print(f"{place} {'differs from its docstring in conf/schema: run scripts/document_keys.py' if check else 'rewritten'}")
    return 1 if check and different else 0


if __name__ == "__main__":
    sys.exit(main())
