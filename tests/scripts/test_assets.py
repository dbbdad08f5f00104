"""The bundled model and datasets are what the documentation says."""

import pyarrow.parquet as pq
import pytest

from tests.conftest import DEMO_MODEL, ROOT

pytestmark = pytest.mark.slow


def test_datasets_are_held_out_and_disjoint(scripts):
    from tasks import END_OF_TEXT, TASKS, split_of

    evaluation = pq.read_table(ROOT / "assets" / "evaluation.parquet")
    assert evaluation.column_names == ["id", "prompt", "reference", "task"]
    assert evaluation.num_rows >= 512 and len(set(evaluation["id"].to_pylist())) == evaluation.num_rows
    assert set(evaluation["task"].to_pylist()) == set(TASKS)
    assert {split_of(prompt) for prompt in evaluation["prompt"].to_pylist()} == {"evaluation"}
    calibration = pq.read_table(ROOT / "assets" / "calibration.parquet").to_pylist()
    solved = [line for row in calibration if row["id"].startswith("tasks") for line in row["text"].split(END_OF_TEXT) if line]
    assert len(solved) > 500
    assert {split_of(line[: line.index("=") + 1]) for line in solved} == {"calibration"}


def test_model_is_as_good_and_as_balanced_as_documented(scripts):
    import torch
    from train import RouterWatch, encode, library_text, validate
    from transformers import AutoModelForCausalLM

    assert (DEMO_MODEL / "model.safetensors").stat().st_size <= 24e6
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    model.set_experts_implementation("grouped_mm")
    assert (model.config.num_experts, model.config.num_experts_per_tok, model.config.num_hidden_layers) == (64, 8, 4)
    report = validate(model, RouterWatch(model), encode(library_text("validation")))
    assert report["exact_match"] >= 0.85
    assert report["text_perplexity_per_byte"] < 3
    assert report["min_expert_load"] >= 0.2
