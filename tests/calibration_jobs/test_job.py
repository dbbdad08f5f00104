"""The calibration job on the bundled model, and its inputs' errors."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from calibration_jobs.inputs import data_digest, read_texts
from calibration_jobs.job import CalibrationWorker
from conf.schema import CalibrateConfig, ConfigError, TrackingConfig

TEXTS = [f"text {i} " + "abc def " * (i % 4) for i in range(12)]


def config(data, **changes):
    values = dict(model="assets/demo-moe", data=str(data), output="x/similarity.safetensors", sequence_length=32)
    return CalibrateConfig(**{**values, "tracking": TrackingConfig(uri=""), **changes})


@pytest.fixture(params=["parquet", "jsonl"])
def data(request, tmp_path):
    file = tmp_path / f"d.{request.param}"
    if request.param == "parquet":
        pq.write_table(pa.table({"text": TEXTS}), file)
    else:
        file.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return file


def test_reads_the_first_rows(data):
    assert read_texts(config(data)) == TEXTS
    assert read_texts(config(data, num_sequences=5)) == TEXTS[:5]
    assert data_digest(TEXTS) != data_digest(TEXTS[::-1])


def test_input_errors(tmp_path):
    with pytest.raises(ConfigError, match="no data at"):
        read_texts(config(tmp_path / "none.parquet"))
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ConfigError, match="all parquet or all JSONL"):
        read_texts(config(tmp_path / "a.csv"))
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "null.parquet")
    with pytest.raises(ConfigError, match="row 1 has no text"):
        read_texts(config(tmp_path / "null.parquet"))
    with pytest.raises(ConfigError, match=r"no column 'body' \(there: text\)"):
        read_texts(config(tmp_path / "null.parquet", text_column="body"))
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    (tmp_path / "bad.jsonl").write_text("{not json")
    with pytest.raises(ConfigError, match="empty or damaged"):
        read_texts(config(tmp_path / "bad.jsonl"))
    with pytest.raises(ConfigError, match="empty or damaged"):
        read_texts(config(tmp_path / "empty.parquet"))


def test_worker_shards_equal_one_pass():
    """Two workers with half of the batches each, merged, give what one gives that saw all: padding and order aside."""
    settings = config("unused")
    batches = [TEXTS[:4], TEXTS[4:8], TEXTS[8:]]
    whole, first, second = (CalibrationWorker(settings) for _ in range(3))
    tokens = sum(whole.run(batch) for batch in batches)
    second.run(batches[2])
    first.run(batches[1])
    first.run(batches[0])
    assert tokens == sum(min(32, len(text)) for text in TEXTS)
    for key, metric in first.sums.items():
        metric.merge(second.sums[key])
        assert metric.num_tokens == tokens
        torch.testing.assert_close(metric.finalize(), whole.sums[key].finalize(), atol=1e-5, rtol=0)
