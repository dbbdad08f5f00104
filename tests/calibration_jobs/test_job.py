"""The whole job on a tiny model, over a cluster of several nodes: any number of workers, resume, damage, refusals."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest
import torch

from sere.calibration_jobs.capture.batches import pad_rows
from sere.calibration_jobs.job import Calibration, calibrate
from sere.calibration_jobs.workers.model import load_model
from sere.calibration_jobs.workers.room import result_sizes
from sere.conf.errors import ConfigError
from sere.conf.schema import CalibrateConfig, JudgeConfig, TrackingConfig
from sere.ops.similarity import SimilarityArtifact
from sere.ops.similarity_checks import TABLES
from tests.calibration_jobs.conftest import assert_same, config_of, copied, quality, results

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("cluster")]


@pytest.fixture(scope="module")
def judged_job(cluster, tiny_model, texts, tmp_path_factory) -> Calibration:
    """A finished job with judging, to be looked at or copied."""
    return calibrate(config_of(tiny_model, texts, tmp_path_factory.mktemp("judged"), num_workers=2))


def test_any_number_of_workers_gives_the_same(plain_job, not_judged, tmp_path):
    """Bit for bit: every shard is computed alike, and merged in order."""
    jobs = [plain_job]  # of one worker
    for num_workers in (2, 5):
        output = str(tmp_path / str(num_workers) / "similarity.safetensors")
        jobs.append(calibrate(not_judged(output=output, num_workers=num_workers)))
    for done in jobs:
        assert done.num_done == len(results(done.file)) == 11  # 10 shards and the weights
    first, *others = (SimilarityArtifact.load(done.file) for done in jobs)
    for other in others:
        assert_same(first, other)


def assert_as_large_as_said(file, **changes):
    """What is asked of the disk before a job begins is what its results take."""
    config = dataclasses.replace(
        CalibrateConfig(model="m", data="d", output="o", judge=JudgeConfig(held_out_rows=0)), **changes
    )
    facts = SimpleNamespace(layers=(0, 1), num_experts=8, hidden_size=32)
    said = result_sizes(config, facts, tables=config.tables, num_domains=2)
    folder = file.parent / "calibration" / "results"
    for name, size in (("shard-000000", said.group), ("directions", said.directions)):
        there = folder / f"{name}.safetensors"
        # Names, shapes and the checksum aside.
        assert size < there.stat().st_size < size + 15_000 if size else not there.exists()


def test_what_results_take_is_known_before(plain_job, not_judged, monkeypatch, tmp_path):
    assert_as_large_as_said(plain_job.file)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=9_000_000))
    with pytest.raises(ConfigError, match=r"the results of \d+ groups of shards and \d checkpoints take .* GB in .*shard_rows"):
        calibrate(not_judged(output=str(tmp_path / "full" / "similarity.safetensors"), shard_rows=1))


def test_a_model_wider_than_the_directions_of_its_surrogates(not_judged, tmp_path):
    """Whatever the number of workers, and with sums that do not grow with the hidden size squared."""
    jobs = [
        calibrate(
            not_judged(
                output=str(tmp_path / str(number) / "similarity.safetensors"),
                num_workers=number,
                surrogate_directions=12,
                metrics=("weights",),
                tables=("means", "surrogates"),
            )
        )
        for number in (1, 2)
    ]
    assert all(name in results(jobs[0].file) for name in ("directions.safetensors", "shard-000000.safetensors"))
    first, other = (SimilarityArtifact.load(done.file) for done in jobs)
    assert set(first.table_names) == {"means", "surrogate_in", "surrogate_out", "surrogate_means"}
    assert all(torch.equal(table, other.tables[key]) for key, table in first.tables.items())
    assert first.tables[1, "surrogate_in"].shape == (16, 32) and first.manifest["num_tokens"] > 1000
    assert_as_large_as_said(jobs[0].file, surrogate_directions=12, metrics=("weights",), tables=("means", "surrogates"))
    explained = first.manifest["surrogate_explained"]
    assert explained[0] == pytest.approx(0, abs=1e-6) and 0 < explained[1] < explained[2] < 1
    # What is explained is a share of all variance, not of that in the directions alone.
    whole = calibrate(not_judged(output=str(tmp_path / "whole" / "similarity.safetensors"), tables=("surrogates",)))
    best = SimilarityArtifact.load(whole.file).manifest["surrogate_explained"]
    assert explained[2] < best[2]


def test_equals_one_pass_over_all_tokens(not_judged, texts):
    """Shards, batches, blocks and domains aside, the sums are those of all tokens at once."""
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer

    from sere.calibration_jobs.capture.experts import observe_experts
    from sere.calibration_jobs.metrics import similarity_matrices

    # Many sequences in a batch: a block of few sequences, which are alike within, is no sample of all tokens to CKA.
    config = not_judged(num_workers=2, shard_rows=39, batch_size=39, block_tokens=256)
    artifact = SimilarityArtifact.load(calibrate(config).file)
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    rows = [row for row in pq.read_table(texts)["text"].to_pylist() if row and row.strip()]
    tokens = [tokenizer(row)["input_ids"][:32] for row in rows]
    seen: dict[int, torch.Tensor] = {}
    observe_experts(
        load_model(config, ""), [pad_rows(tokens)], lambda layer, outputs, _: seen.update({layer: outputs}), block_tokens=10**6
    )
    assert artifact.manifest["num_tokens"] == seen[0].shape[1] == sum(len(row) for row in tokens)
    assert artifact.manifest["data"]["num_sequences"] == 78
    for layer, outputs in seen.items():
        whole = similarity_matrices(outputs)
        for metric, tolerance in (("frobenius", 1e-5), ("cosine", 1e-5), ("cka", 0.05)):
            torch.testing.assert_close(artifact.matrix(layer, metric), whole[metric], atol=tolerance, rtol=0)


def test_rows_that_were_cut_or_skipped_are_listed(plain_job):
    lines = (plain_job.file.parent / "calibration" / "rows.jsonl").read_text().splitlines()
    remarks = {row["number"]: row["remark"] for row in map(json.loads, lines)}
    assert remarks[3] == "skipped: null" and remarks[10] == "skipped: empty"
    assert remarks[20].startswith("cut: 100 tokens") and len(remarks) == 3


def test_finished_job_does_nothing_and_a_damaged_shard_is_redone(plain_job, not_judged, caplog):
    config = copied(plain_job, not_judged())
    file = Path(config.output)
    content, before = file.read_bytes(), results(file)
    again = calibrate(dataclasses.replace(config, num_workers=3))
    assert again.was_finished and again.num_done == 0 and results(file) == before
    # A lost artifact is made again from the shards, without any work on the model.
    file.unlink()
    rebuilt = calibrate(config)
    assert not rebuilt.was_finished and rebuilt.num_done == 0 and file.read_bytes() == content
    damaged = file.parent / "calibration" / "results" / "shard-000002.safetensors"
    flipped = bytearray(damaged.read_bytes())
    flipped[-5] ^= 1
    damaged.write_bytes(flipped)
    file.unlink()
    mended = calibrate(config)
    assert mended.num_done == 1 and file.read_bytes() == content
    assert "shard-000002.safetensors is not what was written there" in caplog.text
    assert {name for name, when in results(file).items() if when != before[name]} == {damaged.name}


def test_other_settings_are_refused_and_judging_anew_keeps_the_sums(judged_job, make_config):
    config = copied(judged_job, make_config())
    for change in ({"sequence_length": 16}, {"dtype": "bfloat16"}, {"num_sequences": 50}):
        with pytest.raises(ConfigError, match=f"holds another job .*{next(iter(change))}"):
            calibrate(make_config(**change))
    before = results(config.output)
    judged = calibrate(make_config(judge=dataclasses.replace(config.judge, reference_primary_top_k=1)))
    assert not judged.was_finished
    assert {name: when for name, when in results(config.output).items() if name.startswith("shard")} == {
        name: when for name, when in before.items() if name.startswith("shard")
    }
    assert calibrate(make_config(sequence_length=16, overwrite=True)).num_done > 0


def test_refusals_before_any_work(make_config, tmp_path, tiny_model):
    bad = [
        ({"output": "a/b.safetensors"}, "must be a path ending in similarity.safetensors"),
        ({"sequence_length": 65}, "sequence_length must be at most the model's context, 64, got 65"),
        ({"max_activation_bytes": 9999}, r"max_activation_bytes must be at least 12288 for this model \(4 tokens of 8 experts"),
        ({"data": str(tmp_path / "none.parquet")}, "no data at"),
        ({"model": str(tmp_path)}, "cannot be read"),
    ]
    for change, message in bad:
        with pytest.raises(ConfigError, match=message):
            calibrate(make_config(**change))
    assert not (tmp_path / "out").exists()


def test_a_worker_without_room_is_refused(not_judged):
    with pytest.raises(ConfigError, match=r"a worker needs 1 GPUs and this machine has 0: lower num_gpus_per_worker"):
        calibrate(not_judged(num_gpus_per_worker=1))


def test_quality_record(judged_job):
    found = quality(judged_job.file)
    assert set(found["reliability"][-1]["metrics"]) == {"frobenius", "cosine", "cka"}
    assert [step["num_tokens"] for step in found["reliability"]] == sorted(step["num_tokens"] for step in found["reliability"])
    assert set(found["transfer"]) == {"frobenius", "cosine", "cka"} and found["transfer"]["cka"]["domains"] == [
        "digits",
        "letters",
    ]
    rows = found["held_out"]
    assert {row["primary_top_k"] for row in rows} == {1, 2}, "S=4 is not below the model's top_k"
    assert {row["candidate"] for row in rows} == {"frobenius", "cosine", "cka", "weights", "random"}
    assert {row["batch_size"] for row in rows} == {4, 8}
    for row in rows:
        assert 0 < row["error"] < 2 and row["active_after"] <= row["active_before"]
        assert (row["critical_share"] == 0) == (row["threshold"] == 0) or row["critical_share"] < 1
    for domain in ("digits", "letters"):
        names = {row["candidate"] for row in found["transfer_error"][domain]}
        assert names == {"cosine", "cosine@digits", "cosine@letters", "random"}
    emulated = {(row["policy"], row["primary_top_k"]): row for row in found["emulation"]}
    assert emulated["none", None]["kl"] == 0 and emulated["none", None]["agreement"] == 1
    assert len(emulated) == 1 + 2 * 8
    compensated = emulated["sere_t", 1]
    assert compensated["charged_experts"] > compensated["active_experts"] and compensated["kl"] > 0
    artifact = SimilarityArtifact.load(judged_job.file)
    manifest = artifact.manifest
    assert set(manifest["tables"]) == set(TABLES) and len(manifest["surrogate_explained"]) == 3
    assert all(set(artifact.layer_tables(layer)) > set(TABLES) for layer in artifact.layers)
    assert manifest["quality"]["reference"] == found["reference"] and manifest["block_tokens"] == 64
    assert "layers" not in manifest["quality"]["held_out"][0]


def test_versions_champion_and_one_run(make_config, tmp_path):
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/ml.db", experiment="e")
    config = make_config(tracking=tracking, promote_if="lower_held_out_error")
    try:
        first = calibrate(config)
        assert first.name == "sere-tiny-moe" and (first.version, first.promoted) == ("1", True), "the first is the champion"
        # The record of the end is lost, as after a kill: the run and the version stay one.
        (tmp_path / "out" / "calibration" / "finished.json").unlink()
        again = calibrate(config)
        assert (again.version, again.num_done, again.was_finished, again.promoted) == ("1", 0, False, True)
        client = mlflow.MlflowClient(tracking.uri)
        (run,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
        assert run.info.status == "FINISHED" and run.data.params["used_block_tokens"] == "64"
        names = set(run.data.metrics)
        assert {"reliability/cka_spearman", "held_out_error/random", "layer_held_out_error/cosine", "num_skipped_rows"} <= names
        assert "emulation_kl/sere_cosine_B8_S2" in names and run.data.metrics["num_cut_rows"] == 1
        pictures = {file.path for file in client.list_artifacts(run.info.run_id)}
        assert {"reliability.png", "held_out_error.png", "emulation.png", "heatmaps", "transfer", "quality.json"} <= pictures
        # Fewer tokens: a second version, judged beside the champion on its own held-out rows.
        other = make_config(
            tracking=tracking,
            promote_if="lower_held_out_error",
            num_sequences=60,
            output=str(tmp_path / "second" / "similarity.safetensors"),
        )
        second = calibrate(other)
        errors = {row["candidate"]: row["error"] for row in quality(other.output)["held_out"] if _is_reference(row)}
        assert second.version == "2" and second.promoted == (errors["cosine"] < errors["champion"])
        champion = client.get_model_version_by_alias("sere-tiny-moe", "champion").version
        assert str(champion) == ("2" if second.promoted else "1")
        assert str(client.get_model_version_by_alias("sere-tiny-moe", "candidate").version) == "2"
        tags = client.get_model_version("sere-tiny-moe", "2").tags
        assert float(tags["held_out_error.cosine"]) == pytest.approx(errors["cosine"], rel=1e-4)
        assert tags["metrics"] == "frobenius,cosine,cka,weights" and tags["data_digest"]
    finally:
        mlflow.set_tracking_uri(None)


def _is_reference(row) -> bool:
    return (row["batch_size"], row["primary_top_k"], row["threshold"]) == (8, 2, 0.0)
