"""The main job, whole, on the bundled model: calibrate, generate under six configurations, compare. Run by `make demo`.

Every step is a `sere` command that is printed before it runs; they share one local Ray.
"""

import shlex
import shutil
import sys
import time
from pathlib import Path

from sere.pipeline.cli import main as sere

FOLDER = Path("runs/demo")
URI = f"sqlite:///{FOLDER}/mlflow.db"
EXPERIMENT = "sere-demo"
# The recommended policy at two dials; at one of them that with surrogates, the paper's, and dropping instead of re-routing.
CONFIGURATIONS = {
    "unmodified": "reroute.policy=none",
    "oea-s3": "reroute.policy=oea reroute.primary_top_k=3",
    "oea-s2": "reroute.policy=oea reroute.primary_top_k=2",
    "sere_t-s2": "reroute.policy=sere_t reroute.primary_top_k=2 reroute.compensation.rank=2",
    "sere-s2": "reroute.policy=sere reroute.primary_top_k=2",
    "top_k-s2": "reroute.policy=top_k reroute.primary_top_k=2",
}


def run(command: str) -> None:
    """Print and run one `sere` command; stop if it fails."""
    print(f"\n$ sere {command}", flush=True)
    status = sere(shlex.split(command))
    if status != 0:
        sys.exit(status)


def main() -> None:
    started = time.monotonic()
    # Only what an earlier demo wrote.
    shutil.rmtree(FOLDER, ignore_errors=True)
    tracking = f"tracking.uri={URI}"
    run(f"calibrate conf/calibrate.yaml output={FOLDER}/similarity.safetensors {tracking}")
    for name, settings in CONFIGURATIONS.items():
        run(
            f"generate conf/generate.yaml output={FOLDER}/{name} tracking.run_name={name} "
            f"tracking.experiment={EXPERIMENT} {tracking} {settings}"
        )
    run(f"compare {EXPERIMENT} --uri {URI} --output {FOLDER}")
    print(f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes. All runs, heatmaps and versions:\n")
    print(f"    .venv/bin/mlflow ui --backend-store-uri {URI} --host 127.0.0.1 --port 5000\n")
    print(f"and open http://127.0.0.1:5000. The comparison on one page, with pictures: {FOLDER}/report.html")


if __name__ == "__main__":
    main()
