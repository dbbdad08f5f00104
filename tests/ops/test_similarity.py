"""`SimilarityArtifact`: what is saved comes back, and what is wrong does not load."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from sere.ops.model_digest import ModelIdentity, model_digest
from sere.ops.similarity import FORMAT_VERSION, SimilarityArtifact, SimilarityError
from sere.ops.similarity_checks import TABLES


def matrix(seed=0, num_experts=6):
    values = torch.rand(num_experts, num_experts, generator=torch.Generator().manual_seed(seed))
    return ((values + values.T) / 2).fill_diagonal_(1)


def artifact(**changes):
    matrices = {(layer, metric): matrix(layer) for layer in (0, 2) for metric in ("cosine", "cka")}
    manifest = {
        "num_experts": 6,
        "layers": [0, 2],
        "metrics": ["cosine", "cka"],
        "model": {"name": "m", "digest": "ab" * 32},
    }
    return SimilarityArtifact(matrices, {**manifest, **changes})


def test_round_trip(tmp_path):
    saved = artifact(data={"rows": 3})
    path = saved.save(tmp_path / "deep" / "a.safetensors")
    loaded = SimilarityArtifact.load(path)
    assert loaded.manifest == {**saved.manifest, "format_version": FORMAT_VERSION}
    assert loaded.layers == [0, 2] and loaded.metrics == ["cosine", "cka"]
    assert torch.equal(loaded.matrix(2, "cka"), saved.matrix(2, "cka"))
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"], "nothing is left beside the file"


def test_loads_from_a_folder(tmp_path):
    artifact().save(tmp_path / "similarity.safetensors")
    assert SimilarityArtifact.load(tmp_path).num_experts == 6


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.rand(6, 5), r"must be float32 \[6, 6\]"),
        (matrix(num_experts=7), r"must be float32 \[6, 6\]"),
        (matrix().double(), "must be float32"),
        (matrix().index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(float("nan"))), "NaN"),
        (matrix() * 2, r"outside \[0, 1\]"),
        (matrix() - 0.9, r"outside \[0, 1\]"),
        (matrix().index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(0.001)), "not symmetric"),
        (matrix().fill_diagonal_(0.5), "diagonal of 1"),
        (torch.eye(6), "identity"),
    ],
)
def test_wrong_matrix_is_refused_on_save_and_load(tmp_path, wrong, message):
    bad = artifact()
    bad.matrices[2, "cka"] = wrong
    with pytest.raises(SimilarityError, match=f"cka matrix of layer 2.*{message}"):
        bad.save(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
    tensors = {f"layers.{layer}.{metric}": m.contiguous() for (layer, metric), m in bad.matrices.items()}
    text = json.dumps({**bad.manifest, "format_version": FORMAT_VERSION})
    save_file(tensors, tmp_path / "a.safetensors", metadata={"manifest": text})
    with pytest.raises(SimilarityError, match=f"a.safetensors: the cka matrix of layer 2.*{message}"):
        SimilarityArtifact.load(tmp_path / "a.safetensors")


def test_missing_and_extra_matrices_are_refused(tmp_path):
    missing = artifact()
    del missing.matrices[0, "cka"]
    with pytest.raises(SimilarityError, match="cka matrix of layer 0 is missing"):
        missing.save(tmp_path / "a")
    with pytest.raises(SimilarityError, match="not in the manifest"):
        artifact(layers=[0]).save(tmp_path / "a")
    with pytest.raises(SimilarityError, match="lacks 'model'"):
        artifact(model={}).save(tmp_path / "a")


def test_unknown_layer_and_metric_are_named():
    with pytest.raises(SimilarityError, match=r"no matrix for layer 1: it has \[0, 2\]"):
        artifact().matrix(1, "cka")
    with pytest.raises(SimilarityError, match="no metric 'frobenius': it has cosine, cka"):
        artifact().matrix(0, "frobenius")


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all", b"\x00" * 64])
def test_no_artifact_there(tmp_path, content):
    path = tmp_path / "a.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SimilarityError, match="sere calibrate"):
        SimilarityArtifact.load(path)


def test_other_format_version_is_refused(tmp_path):
    artifact().save(tmp_path / "a")
    text = json.dumps({**artifact().manifest, "format_version": FORMAT_VERSION + 1})
    save_file({"layers.0.cosine": matrix()}, tmp_path / "b", metadata={"manifest": text})
    with pytest.raises(SimilarityError, match=f"format version {FORMAT_VERSION + 1}, this program reads 1 to {FORMAT_VERSION}"):
        SimilarityArtifact.load(tmp_path / "b")


def with_tables(rank=2, hidden_size=5):
    made = artifact(tables=list(TABLES), surrogate_rank=rank)
    sizes = {"1": 1, "E": 6, "H": hidden_size, "R": rank, "ER": 6 * rank}
    for layer in made.layers:
        for name, table in TABLES.items():
            values = torch.rand([sizes[dimension] for dimension in table.shape])
            made.tables[layer, name] = values.round().to(table.dtype) if name == "protected" else values.to(table.dtype)
    return made


def test_tables_come_back(tmp_path):
    saved = with_tables()
    loaded = SimilarityArtifact.load(saved.save(tmp_path / "a"))
    assert loaded.table_names == list(TABLES) and loaded.metrics == ["cosine", "cka"]
    assert loaded.tables.keys() == saved.tables.keys() and loaded.matrices.keys() == saved.matrices.keys()
    for key, table in saved.tables.items():
        assert loaded.tables[key].dtype == table.dtype and torch.equal(loaded.tables[key], table)
    of_layer = loaded.layer_tables(2)
    assert set(of_layer) == {"cosine", "cka", *TABLES} and torch.equal(of_layer["norms"], saved.tables[2, "norms"])
    with pytest.raises(SimilarityError, match="no matrix for layer 1"):
        loaded.layer_tables(1)


def test_format_1_is_read_and_saved_as_format_2(tmp_path):
    old = artifact()
    tensors = {f"layers.{layer}.{metric}": m for (layer, metric), m in old.matrices.items()}
    save_file(tensors, tmp_path / "old", metadata={"manifest": json.dumps({**old.manifest, "format_version": 1})})
    loaded = SimilarityArtifact.load(tmp_path / "old")
    assert loaded.tables == {} and loaded.table_names == [] and set(loaded.layer_tables(0)) == {"cosine", "cka"}
    again = SimilarityArtifact.load(loaded.save(tmp_path / "new"))
    assert again.manifest["format_version"] == 2 and torch.equal(again.matrix(2, "cka"), old.matrix(2, "cka"))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("norms", lambda t: t.double(), r"must be torch.float32 \[6\], is torch.float64"),
        ("norms", lambda t: -t - 1, r"outside \[0, inf\]"),
        ("protected", lambda t: t + 2, r"outside \[-inf, 1\]"),
        ("beta", lambda t: t.repeat(2), r"must be torch.float32 \[1\]"),
        ("folds", lambda t: t * 100, r"outside \[-4, 4\]"),
        ("fold_losses", lambda t: t[:5], r"must be torch.float32 \[6, 6\]"),
        ("means", lambda t: t * float("nan"), "NaN"),
        ("surrogate_in", lambda t: t[:6], r"must be torch.bfloat16 \[12, 5\]"),
        ("surrogate_means", lambda t: t[..., :4], r"must be torch.bfloat16 \[2, 6, 5\]"),
    ],
)
def test_wrong_table_is_refused_with_layer_and_remedy(tmp_path, name, change, message):
    bad = with_tables()
    bad.tables[2, name] = change(bad.tables[2, name].clone() + 0)
    with pytest.raises(SimilarityError, match=f"table {name} of layer 2 .*{message}.*sere calibrate"):
        bad.save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_missing_unknown_and_rankless_tables_are_refused(tmp_path):
    missing = with_tables()
    del missing.tables[0, "beta"]
    with pytest.raises(SimilarityError, match="table beta of layer 0 is missing"):
        missing.save(tmp_path / "a")
    extra = with_tables()
    extra.manifest["tables"].remove("beta")
    with pytest.raises(SimilarityError, match="table beta of layer 0 is not in the manifest"):
        extra.save(tmp_path / "a")
    with pytest.raises(SimilarityError, match=r"does not know \(magic\)"):
        artifact(tables=["magic"]).save(tmp_path / "a")
    rankless = with_tables()
    rankless.manifest["surrogate_rank"] = 0
    with pytest.raises(SimilarityError, match="surrogate_rank of at least 1, has 0"):
        rankless.save(tmp_path / "a")


def test_model_must_match():
    same = ModelIdentity(digest="ab" * 32)
    artifact().check_model(num_experts=6, model=same)
    artifact().check_model(num_experts=6, model=None)
    for model in (same, None):
        with pytest.raises(SimilarityError, match="6 experts per layer, the model has 8"):
            artifact().check_model(num_experts=8, model=model)
    with pytest.raises(SimilarityError, match=r"other weights .*digest abab.* than this model's \(digest cdcd.*check_model"):
        artifact().check_model(num_experts=6, model=ModelIdentity(digest="cd" * 32))


def test_a_model_of_the_hub_is_known_by_its_commit():
    of_hub = artifact(model={"name": "a/b", "digest": "ab" * 32, "commit": "c" * 40})
    of_hub.check_model(num_experts=6, model=ModelIdentity(commit="c" * 40))
    of_hub.check_model(num_experts=6, model=ModelIdentity(commit="d" * 40, digest="ab" * 32))
    moved = ModelIdentity(commit="d" * 40)
    with pytest.raises(SimilarityError, match=rf"other weights .*commit {'c' * 40}.* than this model's \(commit {'d' * 40}\)"):
        of_hub.check_model(num_experts=6, model=moved)
    with pytest.raises(SimilarityError, match=rf"model_revision={'c' * 40}"):
        of_hub.check_model(num_experts=6, model=moved, files_to_come=True)


def test_an_artifact_that_cannot_be_compared_is_no_artifact_of_this_model():
    """One made at a hub model's first download used to pass for any model."""
    nothing = artifact(model={"name": "a/b", "digest": None})
    for model in (ModelIdentity(digest="ab" * 32), ModelIdentity(commit="c" * 40), ModelIdentity()):
        for files_to_come in (False, True):
            with pytest.raises(SimilarityError, match=r"cannot be known: calibrate this model anew, or set check_model to"):
                nothing.check_model(num_experts=6, model=model, files_to_come=files_to_come)
    of_folder, before_download = artifact(), ModelIdentity(commit="c" * 40)
    of_folder.check_model(num_experts=6, model=before_download, files_to_come=True)
    with pytest.raises(SimilarityError, match="cannot be known"):
        of_folder.check_model(num_experts=6, model=before_download)


def test_model_digest_sees_weights_but_not_the_folder(tmp_path):
    def model(name, value):
        (tmp_path / name).mkdir()
        save_file({"w": torch.full((300, 300), value)}, tmp_path / name / "model.safetensors")
        return model_digest(tmp_path / name)

    assert model("a", 1.0) == model("b", 1.0) != model("c", 1.5)
    (tmp_path / "empty").mkdir()
    assert model_digest(tmp_path / "empty") is None
    assert model_digest(str(tmp_path / "nowhere")) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=8), values, max_size=3),
    max_leaves=6,
)
LOOK_ALIKE = st.sampled_from(
    [[0.0, 2.0], [True, 2], ["0", "2"], [0, 0, 2], [-1], [[0], [2]], {"0": 2}, "cosine", [1e400], [None]]
)


def refused_in_one_line(file):
    with pytest.raises(SimilarityError) as refused:
        SimilarityArtifact.load(file)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600


def crafted(folder, text, tensors=None):
    """A file whose manifest is `text`."""
    if tensors is None:
        tensors = {f"layers.{layer}.{name}": value for (layer, name), value in artifact().matrices.items()}
    save_file(tensors, folder / "crafted.safetensors", metadata={"manifest": text})
    return folder / "crafted.safetensors"


@pytest.mark.parametrize(
    "text", ["[1]", "null", "1", "NaN", '"x"', "{}", "[" * 100_000, '{"a":' * 100_000, "9" * 5000, "x\n\ny"]
)
def test_a_manifest_that_is_none_is_refused_in_one_line(tmp_path, text):
    refused_in_one_line(crafted(tmp_path, text))


@given(st.sampled_from(["num_experts", "layers", "metrics", "model", "tables", "format_version", "quality"]), JSON | LOOK_ALIKE)
def test_a_manifest_with_anything_in_it_is_refused_or_right(tmp_path_factory, key, value):
    manifest = {**artifact().manifest, "format_version": FORMAT_VERSION}
    file = crafted(tmp_path_factory.getbasetemp(), json.dumps({**manifest, key: value}))
    try:
        loaded = SimilarityArtifact.load(file)
    except SimilarityError as error:
        assert len(str(error)) < 600
    else:
        assert loaded.validate().layers == [0, 2] and loaded.num_experts == 6


@pytest.mark.parametrize(
    "key", ["x", "layers.a.cosine", "layers.1.2.3", "layers.-1.cosine", "layers.0.means", "layers.0.", ".."]
)
@pytest.mark.parametrize("shape", [(), (0,), (6,), (6, 6), (1, 1, 1)])
def test_tensors_that_are_not_there_for_anything_are_refused(tmp_path, key, shape):
    tensors = {f"layers.{layer}.{name}": value for (layer, name), value in artifact().matrices.items()}
    text = json.dumps({**artifact().manifest, "format_version": FORMAT_VERSION, "tables": ["means"]})
    refused_in_one_line(crafted(tmp_path, text, {**tensors, key: torch.zeros(shape).bfloat16()}))
