"""The small models are of the shapes that are documented, and their training is what its arguments say."""

import json
from itertools import islice
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import DEMO_MODEL, ROOT
from tests.examples import examples as drawn


def test_the_default_style_is_the_bundled_model(scripts):
    from styles import STYLES
    from tasks import TASKS
    from train import arguments

    args = arguments([])
    assert (args.style, args.output, args.work) == ("bundled", DEMO_MODEL, ROOT / "runs" / "train-demo-moe")
    trained = json.loads((DEMO_MODEL / "training.json").read_text())
    assert {name: trained[name] for name in ("steps", "learning_rate", "balance", "seed")} == {
        name: vars(args)[name] for name in ("steps", "learning_rate", "balance", "seed")
    }
    style, shipped = STYLES["bundled"], json.loads((DEMO_MODEL / "config.json").read_text())
    made = style.config(shipped["vocab_size"]).to_dict()
    # Written when a model is saved, not when it is made.
    left_out = {"architectures", "dtype", "transformers_version"}
    assert {name: made[name] for name in shipped.keys() - left_out} == {n: shipped[n] for n in shipped.keys() - left_out}
    assert style.tasks == tuple(TASKS)


def test_another_style_never_lands_in_the_assets(scripts):
    from styles import STYLES
    from train import arguments

    for style in STYLES.keys() - {"bundled"}:
        args = arguments(["--style", style])
        assert (args.output, args.work) == (ROOT / "runs" / "models" / style, ROOT / "runs" / f"train-{style}")


@settings(max_examples=drawn(50), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.integers(1, 5000), step=st.integers(0, 5000), minutes=st.floats(0.1, 100), elapsed_s=st.floats(0, 10_000))
def test_training_ends_after_its_steps_or_its_minutes(scripts, steps, step, minutes, elapsed_s):
    from train import share_left

    counted = share_left(SimpleNamespace(steps=steps, minutes=None), step, elapsed_s)
    assert (counted > 0) == (step < steps) and (counted == 1) == (step == 0)
    timed = share_left(SimpleNamespace(steps=steps, minutes=minutes), step, elapsed_s)
    assert (timed > 0) == (elapsed_s / 60 < minutes) or timed == pytest.approx(0, abs=1e-9)


def test_named_tasks_only_and_none_held_out(scripts):
    from tasks import examples, split_of

    chosen = list(islice(examples("train", 3, ("zip", "add")), 40))
    assert [task for task, _, _ in chosen] == ["zip", "add"] * 20
    assert all(prompt.startswith(f"{task} ") and split_of(prompt) == "train" for task, prompt, _ in chosen)
    assert list(islice(examples("train", 3), 20)) != chosen[:20]


def test_bias_moves_against_the_load_of_its_own_layer(scripts):
    import torch
    from styles import STYLES, RouterWatch, make_model

    torch.manual_seed(0)
    model = make_model(STYLES["v3"], 258)
    watch = RouterWatch(model)
    assert len(watch.gates) == model.config.num_hidden_layers - 1, "the first layer is dense"
    ids = torch.randint(2, 258, (4, 32))
    model(input_ids=ids, use_cache=False)
    loads = torch.stack([watch.load(ids) for _, ids in watch.routed])
    assert torch.allclose(loads.sum(1), torch.full((len(loads),), 32.0))
    watch.balance_loss()
    watch.move_bias(0.25)
    biases = torch.stack([gate.e_score_correction_bias for gate in watch.gates])
    assert torch.equal(biases, 0.25 * (1 - loads).sign())
    watch.move_bias(0.25)
    assert torch.equal(biases, torch.stack([gate.e_score_correction_bias for gate in watch.gates])), "counts were forgotten"
    for _ in range(60):
        model(input_ids=ids, use_cache=False)
        watch.balance_loss()
        watch.move_bias(0.01)
    model(input_ids=ids, use_cache=False)
    assert (watch.loads().max(1).values < loads.max(1).values).all()


def test_a_saved_model_is_loaded_as_it_was(scripts, tmp_path):
    import torch
    from styles import STYLES, RouterWatch, make_model
    from train import save
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    model = make_model(STYLES["v3"], 258)
    gates = RouterWatch(model).gates
    for gate in gates:
        gate.e_score_correction_bias.normal_(std=0.1)
    save(model, tmp_path, {"curve": []})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    for gate, other in zip(gates, RouterWatch(loaded).gates, strict=True):
        assert torch.equal(gate.e_score_correction_bias, other.e_score_correction_bias), "float32, unrounded"
        assert torch.equal(gate.weight.bfloat16(), other.weight)
    # The head is tied while it is trained; vLLM's class reads one of its own.
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.bfloat16())
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer.encode("sort ab=")) == "sort ab="
