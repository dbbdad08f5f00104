"""A tiny random MoE model on disk, text in three domains, and configs for both; a finished job, and what is asked of one."""

import functools
import json
import random
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers

from sere.calibration_jobs.job import Calibration, calibrate
from sere.conf.schema import CalibrateConfig, JudgeConfig, TrackingConfig
from sere.ops.similarity import SimilarityArtifact
from tests.conftest import DEMO_MODEL

NOT_JUDGED = JudgeConfig(held_out_rows=0)
NUM_EXPERTS, NUM_LAYERS, TOP_K, HIDDEN = 8, 2, 3, 32


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Qwen3-MoE with random weights and the demo model's tokenizer (one token a byte)."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=258,
        hidden_size=HIDDEN,
        intermediate_size=24,
        moe_intermediate_size=16,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        max_position_embeddings=64,
        norm_topk_prob=True,
    )
    folder = tmp_path_factory.mktemp("tiny") / "tiny-moe"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """80 rows in two domains, of different lengths, some of them unusable or too long."""
    rng = random.Random(0)
    rows = [
        {
            "text": "".join(rng.choices("abcdefgh " if number % 2 else "0123456789+=", k=rng.randint(20, 32))),
            "domain": "letters" if number % 2 else "digits",
        }
        for number in range(80)
    ]
    rows[3]["text"], rows[10]["text"], rows[20]["text"] = None, " ", "x" * 100
    file = tmp_path_factory.mktemp("texts") / "texts.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file


def config_of(model, texts, folder, /, **changes) -> CalibrateConfig:
    """A config of the tiny model; keyword arguments change it."""
    values = {
        "model": str(model),
        "data": str(texts),
        "output": str(folder / "similarity.safetensors"),
        "domain_column": "domain",
        "sequence_length": 32,
        "shard_rows": 8,
        "batch_size": 4,
        "block_tokens": 64,
        "tracking": TrackingConfig(uri=""),
        "judge": JudgeConfig(
            held_out_rows=24,
            batch_sizes=(4, 8),
            primary_top_k=(1, 2, 4),
            emulate_batch_sizes=(8,),
            reference_batch_size=8,
        ),
    }
    return CalibrateConfig(**{**values, **changes})


@pytest.fixture
def make_config(tiny_model, texts, tmp_path):
    """Makes configs whose output is this test's; keyword arguments change them."""
    return functools.partial(config_of, tiny_model, texts, tmp_path / "out")


@pytest.fixture
def not_judged(make_config):
    return lambda **changes: make_config(judge=NOT_JUDGED, **changes)


@pytest.fixture(scope="package")
def cluster():
    """A Ray cluster of three nodes on this machine, to which this process is joined."""
    import ray
    from ray.cluster_utils import Cluster

    # Ray counts these cores without occupying them.
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for _ in range(2):
        started.add_node(num_cpus=2)
    ray.init(address=started.address, log_to_driver=False, logging_level="ERROR")
    yield started
    ray.shutdown()
    started.shutdown()


@pytest.fixture(scope="package")
def plain_job(cluster, tiny_model, texts, tmp_path_factory) -> Calibration:
    """A finished job without judging, to be looked at or copied."""
    return calibrate(config_of(tiny_model, texts, tmp_path_factory.mktemp("plain"), judge=NOT_JUDGED))


def results(artifact: str | Path) -> dict[str, int]:
    """Every result on disk, and when it was written."""
    folder = Path(artifact).parent / "calibration" / "results"
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}


def quality(artifact: str | Path) -> dict:
    return json.loads((Path(artifact).parent / "calibration" / "quality.json").read_text())


def copied(done: Calibration, config):
    """A config whose output is a copy of a finished job's: where a job lies is not part of what it is."""
    shutil.copytree(done.file.parent, Path(config.output).parent)
    return config


def assert_same(first: SimilarityArtifact, other: SimilarityArtifact) -> None:
    assert first.manifest == other.manifest
    for mine, others in ((first.matrices, other.matrices), (first.tables, other.tables)):
        assert mine.keys() == others.keys() and all(torch.equal(tensor, others[key]) for key, tensor in mine.items())
