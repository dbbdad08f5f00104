"""The `sere` command: user errors are one line and exit status 2; nothing is written and no engine starts."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sere.ops.similarity import SimilarityArtifact
from sere.pipeline.cli import main
from tests.conftest import DEMO_MODEL, ROOT

pytestmark = pytest.mark.cluster


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Run a command in the repository; return its status and its error line."""
    monkeypatch.chdir(ROOT)

    def command(*arguments):
        status = main([*arguments, *(["tracking.uri=''"] if arguments[0] != "compare" else [])])
        return status, capfd.readouterr().err

    return command


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    """Started here because Ray's log handler keeps the error stream it finds, and each test has its own."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def refused(result, *parts):
    status, error = result
    line = [text for text in error.splitlines() if text.startswith("sere: ")]
    assert status == 2 and len(line) == 1 and "Traceback" not in error, error
    for part in parts:
        assert part in line[0]


@pytest.fixture
def generate(run, tmp_path, demo_artifact):
    def command(*overrides):
        settings = [f"output={tmp_path}/out", f"reroute.similarity={demo_artifact}", "reroute.policy=sere", *overrides]
        result = run("generate", "conf/generate.yaml", *settings)
        assert not list(tmp_path.glob("*out*")), "nothing is written"
        return result

    return command


def test_settings(generate):
    refused(generate("reroute.primary_top_k=9"), "primary_top_k must be between 1 and the model's top_k (8), got 9")
    refused(generate("reroute.primary_top_k=0"), "primary_top_k must be at least 1, got 0")
    settings = ["reroute.policy=oea", "reroute.similarity=null"]
    refused(generate(*settings, "reroute.primary_top_k=.nan"), "primary_top_k must be at least 1 and finite, got nan")
    refused(generate(*settings, "reroute.per_layer={99: {primary_top_k: 4}}"), "per_layer.99", "the model has 4 layers")
    budget = ["reroute.policy=xshare", "reroute.similarity=null", "reroute.votes={budget: 65}"]
    refused(generate(*budget), "votes.budget must be at most the model's experts (64), got 65")
    refused(generate("reroute.threshold=1.5"), "threshold must be between 0 and 1, got 1.5")
    refused(generate("reroute.treshold=0.5"), "unknown key 'reroute.treshold'", "did you mean 'threshold'")
    refused(generate("reroute.metric=cka"), "no metric 'cka'")
    refused(generate("engine.num_replicas=0"), "num_replicas must be at least 1")


def test_stats_folder_of_an_earlier_run(generate, tmp_path):
    (tmp_path / "stats").mkdir()
    (tmp_path / "stats" / "x.json").write_text("{}")
    refused(generate(f"reroute.stats_dir={tmp_path}/stats"), "holds an earlier run's counters")


def test_missing_files(generate, run, tmp_path):
    refused(generate("data=/nowhere.parquet"), "no data at /nowhere.parquet")
    refused(generate("model=/nowhere/model"), "model /nowhere/model cannot be read")
    refused(generate("reroute.similarity=/nowhere"), "no similarity artifact at /nowhere")
    refused(generate("reroute.similarity=models:/none@such"), "needs an MLflow store")
    refused(run("generate", "/nowhere.yaml"), "config file /nowhere.yaml does not exist")
    refused(run("calibrate", "conf/calibrate.yaml", f"output={tmp_path}/similarity.safetensors", "model=/no"), "model /no")
    refused(run("calibrate", "conf/calibrate.yaml", f"output={tmp_path}/x"), "similarity.safetensors")
    refused(run("compare", "nothing", "--uri", f"sqlite:///{tmp_path}/ml.db"), "no MLflow store at")
    assert not (tmp_path / "ml.db").exists()
    refused(run("compare", "nothing", "--uri", "foo://x"), "MLflow store 'foo://x' cannot be used")
    refused(run("compare", "nothing", "--uri", "http://127.0.0.1:1"), "http://127.0.0.1:1", "cannot be used")


def test_dense_model_cannot_be_calibrated(run, tmp_path):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    sizes = dict(vocab_size=258, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "dense")
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(tmp_path / "dense")
    settings = [f"output={tmp_path}/similarity.safetensors", f"model={tmp_path}/dense", "num_sequences=8"]
    refused(run("calibrate", "conf/calibrate.yaml", *settings), "LlamaForCausalLM has no experts module")
    assert not (tmp_path / "similarity.safetensors").exists()


def test_artifact_of_another_model(generate, demo_artifact, tmp_path):
    loaded = SimilarityArtifact.load(demo_artifact)
    other = {**loaded.manifest, "model": {"name": "another", "digest": "0" * 64}}
    path = SimilarityArtifact(loaded.matrices, other).save(tmp_path / "other.safetensors")
    refused(generate(f"reroute.similarity={path}"), "computed from other weights (another")


def test_datasets(generate, tmp_path):
    def data(name, rows):
        file = tmp_path / name
        if name.endswith("parquet"):
            pq.write_table(rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), file)
        else:
            file.write_text(rows if isinstance(rows, str) else "\n".join(json.dumps(row) for row in rows))
        return f"data={file}"

    good = {"id": "a", "prompt": "x"}
    refused(
        generate(data("a.parquet", pa.table({"id": pa.array([], pa.string()), "prompt": pa.array([], pa.string())}))), "no rows"
    )
    refused(generate(data("e.parquet", [{"id": 1, "text": "x"}])), "no column 'prompt'", "set prompt_column")
    refused(generate(data("f.parquet", [{"id": 1, "prompt": 7}])), "column 'prompt'", "is int64, not text")
    refused(generate(data("g.parquet", [{**good, "error": "x"}])), "has a column 'error'", "rename it")
    (tmp_path / "torn.parquet").write_text("PAR1x")
    refused(generate(f"data={tmp_path}/torn.parquet"), "torn.parquet cannot be read")
    refused(generate(data("i.doc", "x")), "files of several or unknown kinds (.doc)", "set data_format")


def test_replicas_that_do_not_fit(generate):
    # Ray runs by now, started for one replica.
    refused(
        generate("engine.num_replicas=500"),
        "a job of 500 replicas",
        "needs 501 CPUs",
        "lower engine.num_replicas",
    )


def test_output_of_something_else(run, tmp_path, demo_artifact):
    (tmp_path / "out" / "results").mkdir(parents=True)
    (tmp_path / "out" / "results" / "mine.parquet").write_text("x")
    settings = [f"output={tmp_path}/out", f"reroute.similarity={demo_artifact}", "reroute.policy=sere"]
    refused(run("generate", "conf/generate.yaml", *settings), "has results/mine.parquet, which this program did not write")
    refused(run("generate", "conf/generate.yaml", "output=nosuch://x/y", *settings[1:]), "nosuch://x/y cannot be opened")


def test_usage(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["generat"])
    assert stop.value.code == 2
    assert DEMO_MODEL.is_dir()
