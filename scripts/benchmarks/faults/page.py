"""The page of all kinds, from figures that may come from several runs of the command."""

import json
from pathlib import Path
from typing import Any

from faults.rows import COUNTS

# A result that has any of these is wrong; what else is counted is only said.
WRONG = ("lost", "doubled", "changed", "errors", "out of order", "thrown away", "unfinished", "hung", "left over")
_COLUMNS = (*COUNTS, "thrown away", "left over", "hung", "unfinished")


def read_kinds(out: Path | None) -> dict[str, dict[str, Any]]:
    """What an earlier run of the command has measured, by kind."""
    file = out and out.with_name(out.name + ".json")
    return json.loads(file.read_text()).get("kinds", {}) if file and file.is_file() else {}


def lines(kinds: dict[str, dict[str, Any]], about: dict[str, str]) -> list[str]:
    """The report's lines.

    Args:
        kinds: By name, as of `Tally.as_values`, with `environment`.
        about: By name, what is done to a job, and when.
    """
    made = sorted({values["environment"] for values in kinds.values()})
    total = sum(values["num_strikes"] for values in kinds.values())
    found = [*made, "", f"{total} strikes in {sum(values['num_jobs'] for values in kinds.values())} jobs.", "", _NOTES, ""]
    columns = [name for name in _COLUMNS if name not in ("hung", "unfinished") or _sum(kinds, name)]
    head = ["kind", "engines", "strikes", "jobs", "sessions", "rows", *columns]
    found += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, values in kinds.items():
        numbers = [values[key] for key in ("num_strikes", "num_jobs", "num_sessions", "num_rows")]
        cells = [name, values["engines"], *numbers, *(values["counts"].get(column, 0) for column in columns)]
        found.append(f"| {' | '.join(map(str, cells))} |")
    found += ["", "## What is done to a job", "", "| kind | |", "|---|---|"]
    for name, values in kinds.items():
        notes = "; ".join(f"{note}: {number}" for note, number in values["notes"].items())
        found.append(f"| {name} | {about[name]}{f' ({notes})' if notes else ''} |")
    found += [
        "",
        "## What the command said",
        "",
        "Exit status and last line of each session, without names and numbers of single jobs.",
        "",
    ]
    found += ["| kind | status | times | last line |", "|---|---|---|---|"]
    for name, values in kinds.items():
        for end in sorted(values["ends"], key=lambda end: -end["times"]):
            status = "killed" if (end["status"] or 0) < 0 else "hung" if end["status"] is None else end["status"]
            found.append(f"| {name} | {status} | {end['times']} | {end['line'].replace('|', '/')} |")
    return found


def _sum(kinds: dict[str, dict[str, Any]], count: str) -> int:
    return sum(values["counts"].get(count, 0) for values in kinds.values())


_NOTES = """After its strikes the same command is run again until it ends with 0. Then the rows of the files that the manifest
names are compared with those expected. *engines*: real ones are two vLLM replicas of the bundled model on a Ray cluster of
three nodes on one machine; simulated ones answer with a hash of the prompt, and all else of the job is real. *sessions*: starts
of the command. *changed*: the id or the text is not the one expected, which with real engines is that of an undisturbed run,
decoded in other batches. *beside*: rows in files of `results/` that the manifest does not name. *half-written files*: under the
names that files have until they are whole. *thrown away*: rows that were in a part before a strike, and in none after it. *left
over*: processes that outlived the job by 15 seconds."""
