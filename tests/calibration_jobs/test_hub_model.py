"""`sere calibrate` of a model of the hub, through the command line: begun before its download, gone on with after it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sere.ops.model_digest import model_digest
from sere.ops.similarity import SimilarityArtifact
from tests.conftest import ROOT
from tests.hub_server import hub_server

NAME = "somebody/tiny-moe"


@pytest.mark.cluster
def test_a_hub_model_is_one_job_until_its_branch_moves(tiny_model, texts, tmp_path):
    def sere(*overrides: str, status: int = 0, **variables: str) -> str:
        settings = [
            f"model={NAME}", f"data={texts}", f"output={tmp_path}/similarity.safetensors", "sequence_length=32",
            "num_sequences=24", "shard_rows=8", "block_tokens=64", "judge.held_out_rows=0", "tables=[]", "tracking.uri=",
            "domain_column=domain",
        ]  # fmt: skip
        command = [sys.executable, "-m", "sere.pipeline.cli", "calibrate", "conf/calibrate.yaml", *settings, *overrides]
        environment = os.environ | hub.environment(tmp_path / "home") | variables
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == status, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout if status == 0 else done.stderr.splitlines()[-1]

    with hub_server() as hub:
        commit = hub.commit(NAME, tiny_model)
        assert "Wrote" in sere()
        of = SimilarityArtifact.load(tmp_path / "similarity.safetensors").manifest["model"]
        assert (of["name"], of["commit"], of["digest"]) == (NAME, commit, model_digest(tiny_model))
        job = json.loads((tmp_path / "calibration" / "job.json").read_text())
        assert job["settings"]["model_digest"] == f"commit:{commit}" and "model_revision" not in job["settings"]
        assert all("/resolve/main/" not in request for request in hub.requests), "everybody asks for the commit"

        # The files are here now, and do without the hub. What is left to do is done by the same command.
        (tmp_path / "calibration" / "finished.json").unlink()
        assert "Wrote" in sere(HF_HUB_OFFLINE="1")

        moved = hub.commit(NAME, _changed(tiny_model, tmp_path / "changed"))
        error = sere(status=2)
        assert f"model_digest was 'commit:{commit}', is 'commit:{moved}'" in error and "model_revision=COMMIT" in error
        assert "Finished before" in sere(f"model_revision={commit}")


def _changed(model: Path, folder: Path) -> Path:
    """The model with other weights."""
    import transformers

    shutil.copytree(model, folder)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        loaded.lm_head.weight.mul_(2)
    loaded.save_pretrained(folder)
    return folder


_STRUCTURE = """
import sys
from sere.calibration_jobs.workers.model import make_empty_model
from sere.pipeline.runtime.model_facts import read_model_facts
facts = read_model_facts(sys.argv[1], revision=sys.argv[2], trust_remote_code=True)
print(make_empty_model(facts, trust_remote_code=True).written_for)
"""


@pytest.mark.slow
def test_code_that_comes_with_a_model_is_that_of_the_commit(tiny_model, tmp_path):
    commits = []
    with hub_server() as hub:
        for name in ("first", "second"):
            folder = shutil.copytree(tiny_model, tmp_path / name)
            values = json.loads((folder / "config.json").read_text())
            values["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own"}
            (folder / "config.json").write_text(json.dumps(values))
            code = f"import transformers\nclass Own(transformers.Qwen3MoeForCausalLM):\n    written_for = {name!r}\n"
            (folder / "modeling_own.py").write_text(code)
            commits.append(hub.commit(NAME, folder))
        command = [sys.executable, "-c", _STRUCTURE, NAME, commits[0]]
        environment = os.environ | hub.environment(tmp_path / "home")
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "first", done.stderr[-2000:]
