"""Folders for rewritten weights."""

import subprocess
import sys
from pathlib import Path

from sere.calibration_jobs.workers.offload import offload_folder


def test_offloaded_weights_of_killed_workers_are_removed(tmp_path):
    code = (
        "import os, sys\nfrom sere.calibration_jobs.workers.offload import offload_folder\n"
        "made = offload_folder(sys.argv[1])\nprint(made.name, flush=True)\nos.kill(os.getpid(), 9)"
    )
    dead = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    left = Path(dead.stdout.strip())
    assert left.is_dir() and left.parent == tmp_path, dead.stderr
    for name in ("sere-offload-being-made", "other"):
        (tmp_path / name).mkdir()
    with offload_folder(str(tmp_path)) as first, offload_folder(str(tmp_path)) as second:
        kept = {path.name for path in tmp_path.iterdir()}
        assert kept == {"sere-offload-being-made", "other", Path(first).name, Path(second).name}, "this process runs"
    assert {path.name for path in tmp_path.iterdir()} == {"sere-offload-being-made", "other"}
