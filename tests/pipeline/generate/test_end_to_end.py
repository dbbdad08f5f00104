"""The main job on real engines, through the command line: calibrate, generate on two replicas, compare."""

import json
import os
import subprocess
import sys

import mlflow
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from tests.conftest import DEMO_MODEL, ROOT

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("end-to-end")


def sere(*arguments, status=0, **variables):
    left_out = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL")
    environment = {name: value for name, value in os.environ.items() if name not in left_out} | variables
    command = [sys.executable, "-m", "sere.pipeline.cli", *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == status, result.stdout[-3000:] + result.stderr[-6000:]
    return result.stdout if status == 0 else result.stderr


@pytest.fixture(scope="module")
def calibrated(folder):
    settings = [f"output={folder}/similarity.safetensors", "num_sequences=48", "num_workers=2", "shard_rows=8"]
    settings += [
        "judge.held_out_rows=16",
        "judge.batch_sizes=[4,16]",
        "judge.primary_top_k=[2]",
        "promote_if=lower_held_out_error",
    ]
    printed = sere("calibrate", "conf/calibrate.yaml", *settings, f"tracking.uri=sqlite:///{folder}/ml.db")
    assert "version 1 of sere-demo-moe and its champion" in printed
    return folder / "similarity.safetensors"


@pytest.fixture(scope="module")
def rows(folder):
    """Evaluation prompts with extra columns, three of which cannot be answered."""
    rows = pq.read_table(ROOT / "assets" / "evaluation.parquet").to_pylist()[:60]
    for number, row in enumerate(rows):
        row |= {"model": "a column", "number": number, "tags": ["x"] * (number % 3), "meta": {}}
    rows[3]["prompt"], rows[10]["prompt"], rows[20]["prompt"] = None, "", "x" * 300
    (folder / "data").mkdir()
    for part in range(2):
        lines = "\n".join(json.dumps(row) for row in rows[part::2])
        (folder / "data" / f"{part}.jsonl").write_text(lines)
    return rows[0::2] + rows[1::2]


def generate(folder, name, *overrides):
    settings = [f"data={folder}/data", f"output={folder}/{name}", f"tracking.uri=sqlite:///{folder}/ml.db"]
    sere("generate", "conf/generate.yaml", *settings, "tracking.experiment=e", f"tracking.run_name={name}", *overrides)
    return pq.read_table(folder / name / "results")


def runs(folder, experiment):
    mlflow.set_tracking_uri(f"sqlite:///{folder}/ml.db")
    try:
        found = mlflow.search_runs(experiment_names=[experiment], output_format="list")
        return {run.info.run_name: run for run in found}
    finally:
        mlflow.set_tracking_uri(None)


def test_calibration_run(calibrated, folder):
    from sere.ops.similarity import SimilarityArtifact

    artifact = SimilarityArtifact.load(calibrated)
    assert artifact.layers == [0, 1, 2, 3] and artifact.metrics == ["frobenius", "cosine", "cka", "weights"]
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    rows = pq.read_table(ROOT / "assets" / "calibration.parquet").to_pylist()[:48]
    lengths = sorted(min(128, len(tokenizer(row["text"]).input_ids)) for row in rows)
    assert sum(lengths[:32]) <= artifact.manifest["num_tokens"] <= sum(lengths[-32:]), "16 of 48 rows are held out"
    assert artifact.manifest["data"]["domains"] == ["code", "english", "tasks"]
    (run,) = runs(folder, "sere-calibration").values()
    assert run.info.status == "FINISHED"
    assert 0 < run.data.metrics["cka/off_diagonal_mean"] < 1
    assert 0 < run.data.metrics["held_out_error/cosine"] < 1 and run.data.metrics["emulation_kl/none_B16"] == 0
    assert run.data.params["model_digest"] == artifact.manifest["model"]["digest"]
    mlflow.set_tracking_uri(f"sqlite:///{folder}/ml.db")
    try:
        pictures = mlflow.artifacts.list_artifacts(run_id=run.info.run_id, artifact_path="heatmaps")
        assert len(pictures) == 4
        version = mlflow.MlflowClient().get_model_version_by_alias("sere-demo-moe", "candidate").version
        assert str(version) == "1"
    finally:
        mlflow.set_tracking_uri(None)


def test_looking_at_versions(calibrated, folder):
    uri = f"sqlite:///{folder}/ml.db"
    shown = sere("artifact", "inspect", "models:/sere-demo-moe@champion", "--uri", uri, "--output", f"{folder}/pictures")
    assert "Held-out re-routing error" in shown and "Teacher-forced decode emulation" in shown
    assert (folder / "pictures" / "held_out_error.png").stat().st_size > 5000
    assert "Provenance: the same" in sere("artifact", "diff", str(calibrated), "models:/sere-demo-moe/1", "--uri", uri)
    assert "champion is version 1, was 1" in sere("artifact", "promote", "models:/sere-demo-moe@candidate", "--uri", uri)
    error = sere("artifact", "promote", "models:/sere-demo-moe/2", "--uri", uri, status=2)
    assert "models:/sere-demo-moe/2 cannot be promoted" in error and "Traceback" not in error


def test_generation_and_comparison(calibrated, rows, folder):
    settings = ["reroute.policy=sere_t", "reroute.primary_top_k=2", "reroute.compensation.rank=2", "batch_size=16"]
    settings += [f"reroute.stats_dir={folder}/stats", "engine.num_replicas=2", f"reroute.similarity={calibrated}"]
    result = generate(folder, "sere", *settings)
    assert [row["id"] for row in result.to_pylist()] == [row["id"] for row in rows], "every row, in order"
    for expected, row in zip(rows, result.to_pylist(), strict=True):
        assert {key: row[key] for key in expected} == expected | {"meta": "{}"}, "the input's columns come back"
        if not expected["prompt"] or len(expected["prompt"]) == 300:
            assert row["error"] and row["generated_text"] is None and row["num_generated_tokens"] is None
        else:
            assert row["error"] is None and row["finish_reason"] in ("stop", "length")
            assert row["num_prompt_tokens"] == len(row["prompt"]) and 0 < row["num_generated_tokens"] <= 48
    messages = [row["error"] for row in result.to_pylist() if row["error"]]
    assert sum("prompt is null" in m for m in messages) == sum("prompt is empty" in m for m in messages) == 1
    assert any("maximum context length is 256" in m for m in messages)

    generate(folder, "unmodified", "reroute.policy=none")
    found = runs(folder, "e")
    metrics = found["sere"].data.metrics
    assert metrics["num_rows"] == 60 and metrics["num_errors"] == 3
    assert metrics["generated_tokens"] == sum(row["num_generated_tokens"] or 0 for row in result.to_pylist())
    assert 0 < metrics["active_experts_after"] < metrics["active_experts_before"] and metrics["rerouted_share"] > 0
    assert metrics["tokens_per_s"] > 0 and 0 <= metrics["exact_match"] <= 1
    assert found["sere"].inputs.dataset_inputs
    # Counters add up over replicas: each token but the first of an answer was a decode row.
    from sere.ops.engine.counters import read_counters

    counted = [layer for replica in (folder / "stats").iterdir() for layer in read_counters(replica)]
    assert len(counted) == 2 * 4, "a file per replica, four layers"
    decoded = metrics["generated_tokens"] - (metrics["num_rows"] - metrics["num_errors"])
    for number in range(4):
        assert sum(layer.counts["decode_rows"] for layer in counted if layer.layer == number) == decoded

    table = sere("compare", "e", "--uri", f"sqlite:///{folder}/ml.db", "--output", str(folder / "out"))
    assert "unmodified" in table and "sere_t S=2, compensation.rank=2" in table
    assert (folder / "out" / "compare.csv").is_file() and (folder / "out" / "compare.png").is_file()


def test_refusal_inside_an_engine_is_one_line(calibrated, folder):
    """What only the engine can find out reaches the user, though the engine runs in another process."""
    from sere.ops.similarity import SimilarityArtifact

    whole = SimilarityArtifact.load(calibrated)
    matrices = {key: matrix for key, matrix in whole.matrices.items() if key[0] != 2}
    tables = {key: table for key, table in whole.tables.items() if key[0] != 2}
    SimilarityArtifact(matrices, {**whole.manifest, "layers": [0, 1, 3]}, tables).save(folder / "partial.safetensors")
    settings = [f"output={folder}/refused", "tracking.uri=''", f"reroute.similarity={folder}/partial.safetensors"]
    settings.append("reroute.policy=sere")
    error = sere("generate", "conf/generate.yaml", *settings, status=2)
    assert "sere: the artifact has no matrix for layer 2: it has [0, 1, 3]" in error.splitlines()[-1]
    assert "Traceback" not in error
    assert not list((folder / "refused").glob("results/*"))


def test_an_engine_that_would_not_re_route_is_refused(folder):
    """VLLM_PLUGINS names other plugins: vLLM would decode the unmodified model, and say so in its log at most."""
    settings = ["num_rows=16", f"output={folder}/off", "tracking.uri=", "reroute.policy=random"]
    error = sere("generate", "conf/generate.yaml", *settings, status=2, VLLM_PLUGINS="other")
    last = error.splitlines()[-1]
    assert "sere: nothing is re-routed" in last and "unset VLLM_PLUGINS" in last and "Traceback" not in error
    assert not list((folder / "off").glob("results/*"))


@pytest.fixture(scope="module")
def chat_model(folder):
    """The demo model with a chat template."""
    model = folder / "chat-model"
    model.mkdir()
    for file in DEMO_MODEL.iterdir():
        (model / file.name).symlink_to(file)
    (model / "tokenizer_config.json").unlink()
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    values = json.loads((DEMO_MODEL / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (model / "tokenizer_config.json").write_text(json.dumps(values))
    return model


def test_chat_with_parameters_of_each_row(folder, chat_model):
    """On one replica, and a second one if there is room; in the order of finishing."""
    asked = [
        ("add 455+116=", None),
        ("add 455+116=", {"structured_output": {"choice": ["yes", "no"]}}),
        ("sort gzekfwdefg=", {"max_tokens": 2}),
        ("sort gzekfwdefg=", {"max_tokens": "two"}),
        ("sort gzekfwdefg=", {"structured_output": {"regex": "[0-9]{3}"}}),
        (None, None),
        ("add 455+116=", {"seed": 10**30}),
        ("add 455+116=", {"structured_output": {"choice": 5}}),
        ("add 455+116=", {"structured_output": {"regex": "("}}),
    ]
    rows = [
        {"m": [{"role": "user", "content": text}] if text else None, "s": None if values is None else json.dumps(values)}
        for text, values in asked
    ]
    (folder / "chat.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    result = generate(
        folder,
        "chat",
        f"model={chat_model}",
        f"data={folder}/chat.jsonl",
        "reroute=null",
        "messages_column=m",
        "sampling_column=s",
        "preserve_order=false",
        "order_by=[s]",
        "engine.max_replicas=2",
    )
    found = {row["source_row"]: row for row in result.to_pylist()}
    assert sorted(found) == list(range(9)) and result.num_rows == 9
    assert found[0]["generated_text"].strip() == "571" and found[0]["num_prompt_tokens"] == len("add 455+116=")
    assert found[1]["generated_text"] in ("yes", "no")
    assert found[2]["num_generated_tokens"] == 2 and found[2]["finish_reason"] == "length"
    assert "max_tokens must be int, got 'two'" in found[3]["error"]
    assert len(found[4]["generated_text"]) == 3 and found[4]["generated_text"].isdigit()
    assert found[5]["error"] == "m is null"
    errors = pq.read_table(folder / "chat" / "errors.parquet")
    assert sorted(errors["source_row"].to_pylist()) == [3, 5, 6, 7, 8]


def test_rows_that_begin_alike_find_their_prefix_in_the_cache(folder):
    rows = [{"prompt": f"{number} {'abcdefgh' * 16} {row}="} for number in range(8) for row in range(8)]
    rows = [rows[8 * (n % 8) + n // 8] for n in range(64)]
    (folder / "shared.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    settings = [f"data={folder}/shared.jsonl", "reroute=null", "batch_size=8", "concurrent_batches=2", "sampling.max_tokens=8"]
    # The cache holds one row at a time, or little more.
    settings += ["engine.max_num_seqs=1", "engine.kv_cache_gib=0.0006", "engine.engine_kwargs={block_size: 32}"]
    texts, rates = [], []
    for name in ("scattered", "grouped"):
        result = generate(folder, name, *settings, f"group_by_prefix={str(name == 'grouped').lower()}")
        assert result["source_row"].to_pylist() == list(range(64)) and not any(result["error"].to_pylist())
        texts.append(result["generated_text"].to_pylist())
        rates.append(json.loads((folder / name / "summary.json").read_text())["prefix_cache_hit_rate"])
    assert texts[0] == texts[1]
    assert rates[0] < 0.1 and 0.6 < rates[1] < 128 / 134, "seven of eight rows find 128 tokens"
    assert runs(folder, "e")["grouped"].data.metrics["prefix_cache_hit_rate"] == rates[1]


def test_too_many_errors_end_the_job(folder):
    (folder / "bad.jsonl").write_text("\n".join(json.dumps({"prompt": None}) for _ in range(120)))
    settings = [f"data={folder}/bad.jsonl", f"output={folder}/bad", "tracking.uri=", "reroute=null", "max_error_ratio=0.1"]
    error = sere("generate", "conf/generate.yaml", *settings, status=2)
    assert "rows failed, more than max_error_ratio 0.1 allows: prompt is null" in error and "Traceback" not in error
    # The same command does not let them pass because nothing is left to do.
    error = sere("generate", "conf/generate.yaml", *settings, status=2)
    assert "rows failed, more than max_error_ratio" in error


def test_a_model_without_chat_template_is_refused(folder):
    (folder / "m.jsonl").write_text(json.dumps({"m": [{"role": "user", "content": "a"}]}))
    settings = [f"data={folder}/m.jsonl", f"output={folder}/m", "tracking.uri=", "reroute=null", "messages_column=m"]
    assert "has no chat template" in sere("generate", "conf/generate.yaml", *settings, status=2)
