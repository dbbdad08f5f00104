"""What the benchmark scripts share: percentiles, the line that says where and with what a number was made, and the files."""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def positive(text: str) -> int:
    """An argument that is a positive integer."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a positive integer is needed, got {text!r}")
    return int(text)


def integers(text: str) -> list[int]:
    """An argument that is a list of positive integers, as in 1,8,32."""
    return [positive(part) for part in text.split(",")]


def report_path(text: str) -> Path:
    """An argument that says where a report goes: found unusable before anything is measured, not after."""
    path = Path(text)
    if not path.name:
        raise argparse.ArgumentTypeError(f"a file name without its ending is needed, got {text!r}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot make {path.parent}: {error.strerror}") from error
    if not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write into {path.parent}")
    return path


def summary(values: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    quantiles = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    p20, median, p80 = quantiles.tolist()
    return {"median": median, "p20": p20, "p80": p80}


def spread(numbers: dict[str, float], digits: int = 2) -> str:
    return f"{numbers['median']:,.{digits}f} ({numbers['p20']:,.{digits}f} to {numbers['p80']:,.{digits}f})"


def environment(*more: str) -> str:
    """Date, device, versions and commit."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    parts = [
        datetime.date.today().isoformat(),
        device,
        *more,
        f"torch {torch.__version__}",
        f"Python {platform.python_version()}",
    ]
    return ", ".join([*parts, f"commit {commit or 'unknown'}"])


def _processor() -> str:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def report(title: str, lines: list[str], out: Path | None, **results: Any) -> None:
    """Print the report; with `out`, also write OUT.md, and OUT.json with the results as they were measured."""
    command = " ".join(["python", *sys.argv])
    text = "\n".join([f"# {title}", "", f"    {command}", "", *lines]) + "\n"
    print(text, flush=True)
    if out is not None:
        # Not with_suffix, which cuts a name at its last dot: decode-S2.5 is one.
        raw = json.dumps({"title": title, "command": command, **results}, indent=1) + "\n"
        # Where this checkout lies says nothing.
        raw = raw.replace(f"{Path(__file__).resolve().parents[2]}/", "")
        out.with_name(out.name + ".json").write_text(raw)
        out.with_name(out.name + ".md").write_text(text)
