"""Each metric against a double loop over experts and tokens, written from its definition."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sere.calibration_jobs.metrics import METRIC_CLASSES, similarity_matrices
from tests.examples import examples


def outputs(num_experts=5, num_tokens=12, hidden_size=7, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(1, num_tokens, hidden_size, generator=generator)
    return (common + torch.randn(num_experts, num_tokens, hidden_size, generator=generator)).to(dtype)


def direct_cosine(a, b):
    pairs = zip(a.tolist(), b.tolist(), strict=True)
    return sum(
        (sum(x * y for x, y in zip(u, v, strict=True)) / math.hypot(*u) / math.hypot(*v) + 1) / 2 for u, v in pairs
    ) / len(a)


def direct_frobenius(a, b):
    return math.sqrt(((a.double() - b.double()) ** 2).sum().item())


def direct_hsic(a, b):
    """Song et al. 2012, equation 4, term by term."""
    n = a.shape[0]
    k, q = a.double() @ a.double().T, b.double() @ b.double().T
    k.fill_diagonal_(0)
    q.fill_diagonal_(0)
    one = torch.ones(n, 1, dtype=torch.float64)
    first = torch.trace(k @ q)
    second = (one.T @ k @ one) * (one.T @ q @ one) / ((n - 1) * (n - 2))
    third = 2 / (n - 2) * (one.T @ k @ q @ one)
    return ((first + second - third) / (n * (n - 3))).item()


def direct(name, y):
    num_experts = y.shape[0]
    result = torch.eye(num_experts)
    distances = {(i, j): direct_frobenius(y[i], y[j]) for i, j in itertools.product(range(num_experts), repeat=2)}
    for i, j in itertools.permutations(range(num_experts), 2):
        if name == "cosine":
            result[i, j] = direct_cosine(y[i], y[j])
        elif name == "frobenius":
            result[i, j] = 1 - distances[i, j] / max(distances.values())
        else:
            hsic = direct_hsic(y[i], y[j]) / math.sqrt(direct_hsic(y[i], y[i]) * direct_hsic(y[j], y[j]))
            result[i, j] = min(1.0, max(0.0, hsic))
    return result


@pytest.mark.parametrize("name", sorted(METRIC_CLASSES))
@settings(max_examples=examples(25), deadline=None)
@given(
    num_experts=st.integers(2, 6),
    num_tokens=st.integers(5, 20),
    hidden_size=st.integers(2, 9),
    seed=st.integers(0, 999),
)
def test_equals_definition(name, num_experts, num_tokens, hidden_size, seed):
    y = outputs(num_experts, num_tokens, hidden_size, seed)
    torch.testing.assert_close(similarity_matrices(y, [name])[name], direct(name, y), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", sorted(METRIC_CLASSES))
@settings(max_examples=examples(25), deadline=None)
@given(cuts=st.lists(st.integers(4, 30), min_size=1, max_size=5), order=st.randoms())
def test_shards_equal_one_pass(name, cuts, order):
    batches = [outputs(num_tokens=size, seed=i) for i, size in enumerate(cuts)]
    one_pass = METRIC_CLASSES[name](5)
    for batch in batches:
        one_pass.update(batch)
    order.shuffle(batches)
    shards = [METRIC_CLASSES[name](5) for _ in range(3)]
    for i, batch in enumerate(batches):
        shards[i % 3].update(batch)
    merged = shards.pop()
    for shard in shards:
        merged.merge(shard)
    assert merged.num_tokens == one_pass.num_tokens == sum(cuts)
    torch.testing.assert_close(merged.finalize(), one_pass.finalize(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["cosine", "frobenius"])
def test_minibatches_equal_all_tokens_at_once(name):
    y = outputs(num_tokens=40)
    metric = METRIC_CLASSES[name](5)
    for part in y.split(7, dim=1):
        metric.update(part)
    torch.testing.assert_close(metric.finalize(), similarity_matrices(y, [name])[name], atol=1e-5, rtol=0)


def test_small_minibatches_do_not_inflate_cka():
    generator = torch.Generator().manual_seed(0)
    metric = METRIC_CLASSES["cka"](2)
    for _ in range(300):
        metric.update(torch.randn(2, 8, 32, generator=generator))
    assert metric.finalize()[0, 1] < 0.1, "independent outputs are not similar"


def test_minibatch_under_four_tokens_is_left_out_of_cka():
    y = outputs(num_tokens=20)
    metric = METRIC_CLASSES["cka"](5)
    metric.update(y)
    metric.update(outputs(num_tokens=3, seed=9))
    torch.testing.assert_close(metric.finalize(), similarity_matrices(y, ["cka"])["cka"])


def test_cka_minibatches_add_up_as_they_are():
    # Loud minibatches weigh more: scaled to equal size, their sum would be another estimate.
    parts = [outputs(num_experts=3, num_tokens=6, seed=i) * 4**i for i in range(5)]
    metric = METRIC_CLASSES["cka"](3)
    for part in parts:
        metric.update(part)
    hsic = torch.tensor([[sum(direct_hsic(part[i], part[j]) for part in parts) for j in range(3)] for i in range(3)])
    scale = hsic.diagonal().sqrt()
    torch.testing.assert_close(metric.finalize(), (hsic / scale / scale[:, None]).clamp(0, 1), atol=1e-5, rtol=0)


def test_cka_does_not_depend_on_the_mean():
    y = outputs(num_tokens=40)
    # Whole numbers of 1/1024 stay exact in float32 when the mean is added.
    y = (y * 1024).round() / 1024
    far = y + torch.arange(5)[:, None, None] * 1000
    torch.testing.assert_close(similarity_matrices(far, ["cka"]), similarity_matrices(y, ["cka"]), atol=1e-5, rtol=0)


def test_blocks_do_not_change_the_result(monkeypatch):
    y = outputs(num_tokens=33)
    whole = similarity_matrices(y)
    monkeypatch.setattr("sere.calibration_jobs.metrics.base._CPU_BLOCK_ELEMENTS", 200)
    for name, matrix in similarity_matrices(y).items():
        torch.testing.assert_close(matrix, whole[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", sorted(METRIC_CLASSES))
def test_finished_matrix_is_proper(name):
    y = outputs(8, 64, 16) * torch.logspace(-3, 3, 8)[:, None, None]
    matrix = similarity_matrices(y, [name])[name]
    assert matrix.dtype == torch.float32
    assert torch.equal(matrix, matrix.T)
    assert (matrix.diagonal() == 1).all() and matrix.min() >= 0 and matrix.max() <= 1


def test_no_tokens_and_bad_values_are_errors():
    with pytest.raises(ValueError, match="no tokens"):
        similarity_matrices(outputs()[:, :0])
    with pytest.raises(ValueError, match="not finite"):
        similarity_matrices(outputs().index_put((torch.tensor(0),) * 3, torch.tensor(float("nan"))))
    with pytest.raises(ValueError, match="unknown metric 'euclid'"):
        similarity_matrices(outputs(), ["euclid"])
    with pytest.raises(ValueError, match=r"must be \[3"):
        METRIC_CLASSES["cka"](3).update(outputs())
