"""Tables: each against its definition, and the same however tokens are cut into blocks and shards."""

import pytest
import torch

from sere.calibration_jobs.capture.experts import TokenBlock
from sere.calibration_jobs.tables import TABLE_CLASSES
from sere.calibration_jobs.tables.base import TableSpec
from sere.calibration_jobs.tables.norms import super_experts
from sere.calibration_jobs.tables.surrogates import SurrogateSums, leading_directions, predicted_directions

EXPERTS, TOKENS, HIDDEN, TOP_K = 6, 200, 12, 2
SPEC = TableSpec(num_experts=EXPERTS, rank=3)


def drawn(num_tokens: int = TOKENS, seed: int = 0) -> TokenBlock:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(num_tokens, HIDDEN, generator=generator)
    maps = torch.randn(EXPERTS, HIDDEN, HIDDEN, generator=generator) / 4
    selection = torch.randn(num_tokens, EXPERTS, generator=generator).softmax(1)
    weights, ids = selection.topk(TOP_K)
    outputs = torch.tanh(states @ maps) + torch.randn(EXPERTS, 1, HIDDEN, generator=generator)
    return TokenBlock(hidden_states=states, outputs=outputs, topk_ids=ids, topk_weights=weights, selection=selection)


def part_of(block: TokenBlock, rows: slice) -> TokenBlock:
    return TokenBlock(
        hidden_states=block.hidden_states[rows],
        outputs=block.outputs[:, rows],
        topk_ids=block.topk_ids[rows],
        topk_weights=block.topk_weights[rows],
        selection=None if block.selection is None else block.selection[rows],
    )


def made(name: str, block: TokenBlock, spec: TableSpec = SPEC) -> dict[str, torch.Tensor]:
    sums = TABLE_CLASSES[name](spec)
    sums.update(block)
    return sums.finalize()


@pytest.mark.parametrize("name", TABLE_CLASSES)
def test_blocks_and_shards_in_any_order(name):
    block, cuts = drawn(), [slice(150, 200), slice(0, 30), slice(30, 150)]
    whole, merged = TABLE_CLASSES[name](SPEC), TABLE_CLASSES[name](SPEC)
    whole.update(block)
    for cut in cuts:
        shard = TABLE_CLASSES[name](SPEC)
        shard.update(part_of(block, cut))
        # As a result on disk brings it back.
        merged.merge(TABLE_CLASSES[name](SPEC, {key: value.float() for key, value in shard.sums.items()}))
    assert set(whole.sums) == set(merged.sums)
    for key, value in whole.sums.items():
        torch.testing.assert_close(merged.sums[key], value, rtol=1e-5, atol=1e-4)


def test_norms_and_means():
    block = drawn()
    norms = block.outputs.norm(dim=2).mean(1)
    torch.testing.assert_close(made("norms", block)["norms"], norms / norms.mean())
    torch.testing.assert_close(made("means", block)["means"].float(), block.outputs.mean(1), rtol=1e-2, atol=1e-2)


def test_beta_is_the_median_ratio():
    block = drawn()
    ratios = block.topk_weights[:, 1] / block.topk_weights[:, 0]
    assert abs(made("beta", block)["beta"].item() - ratios.median().item()) < 1e-2
    single = TokenBlock(
        hidden_states=block.hidden_states,
        outputs=block.outputs,
        topk_ids=block.topk_ids[:, :1],
        topk_weights=block.topk_weights[:, :1],
        selection=None,
    )
    assert 0 <= made("beta", single)["beta"].item() < 1e-3, "with one slot a row nothing is skipped"


def test_super_experts_are_told_over_all_layers():
    largest = {0: torch.full((300,), 1.0), 1: torch.full((300,), 2.0)}
    largest[1][7] = 90.0
    found = super_experts(largest)
    assert found[0].sum() == 0 and found[1].nonzero().flatten().tolist() == [7]
    # None stands out from a tenth of itself, but 99.5% lie below it.
    assert sum(int(values.sum()) for values in super_experts({0: torch.ones(300)}).values()) == 0
    block, sums = drawn(), TABLE_CLASSES["protected"](SPEC)
    sums.update(block)
    for expert in range(EXPERTS):
        rows = (block.topk_ids == expert).any(1)
        assert sums.sums["largest"][expert] == block.outputs[expert, rows].abs().max()


def test_folds():
    block, found = drawn(), None
    found = made("folds", block)
    for u in range(EXPERTS):
        for v in range(EXPERTS):
            rows = (block.topk_ids == u).any(1) & (block.topk_ids == v).any(1)
            a, b = block.outputs[u, rows].double(), block.outputs[v, rows].double()
            weight = a.norm(dim=1)
            product = (weight * (a * b).sum(1)).sum()
            fold = (product / ((weight * b.square().sum(1)).sum() + 1e-3)).clamp(-4, 4)
            torch.testing.assert_close(found["folds"][u, v].double(), fold, rtol=1e-4, atol=1e-6)
            if u != v and rows.any():
                loss = 1 - fold * product / (weight * a.square().sum(1)).sum()
                torch.testing.assert_close(found["fold_losses"][u, v].double(), loss.clamp(0, 1), rtol=1e-4, atol=1e-5)
    assert (found["fold_losses"].diagonal() == 0).all()


def linear(rank: int) -> TokenBlock:
    """Experts that are exactly of a rank, with an intercept."""
    generator = torch.Generator().manual_seed(3)
    block = drawn(600)
    maps = torch.randn(EXPERTS, HIDDEN, rank, generator=generator) @ torch.randn(EXPERTS, rank, HIDDEN, generator=generator)
    outputs = block.hidden_states @ maps + torch.randn(EXPERTS, 1, HIDDEN, generator=generator)
    return TokenBlock(
        hidden_states=block.hidden_states,
        outputs=outputs,
        topk_ids=block.topk_ids,
        topk_weights=block.topk_weights,
        selection=block.selection,
    )


def estimate(tables: dict[str, torch.Tensor], states: torch.Tensor, rank: int) -> torch.Tensor:
    v, u = (tables[name].float().view(EXPERTS, -1, HIDDEN)[:, :rank] for name in ("surrogate_in", "surrogate_out"))
    means = tables["surrogate_means"][rank - 1].float().unsqueeze(1)
    return means + torch.einsum("th,erh,ero->eto", states, v, u)


def test_surrogates_find_experts_of_a_low_rank():
    block = linear(2)
    sums = SurrogateSums(SPEC)
    sums.update(block)
    tables = sums.finalize()
    error = (estimate(tables, block.hidden_states, 2) - block.outputs).square().mean() / block.outputs.square().mean()
    assert error < 1e-3, "but for the ridge and bfloat16"
    explained = sums.explained()
    assert explained[0] == pytest.approx(0, abs=1e-9) and explained[1] < explained[2] and explained[2] > 0.999
    better = [(estimate(tables, block.hidden_states, rank) - block.outputs).square().mean() for rank in (1, 2)]
    assert better[1] < better[0] / 10


def test_tokens_near_an_expert_count_more():
    block = drawn()
    weights = SurrogateSums(SPEC)._weights(block)
    best = block.selection.topk(2 * TOP_K, dim=1).indices
    assert torch.equal(weights == 1, torch.zeros_like(weights).scatter_(1, best, 1.0) == 1)
    assert weights.min() == pytest.approx(0.05)
    unknown = TokenBlock(**{**vars(block), "selection": None})
    assert ((SurrogateSums(SPEC)._weights(unknown) == 1).sum(1) == TOP_K).all()


def test_wide_models_see_leading_directions_of_inputs_and_predicted_ones_of_outputs():
    """Inputs that lie in few directions and outputs of a low rank lose nothing by being projected."""
    generator = torch.Generator().manual_seed(5)
    inside = torch.linalg.qr(torch.randn(HIDDEN, 4, generator=generator)).Q
    block = linear(2)
    states = block.hidden_states @ inside @ inside.T
    maps = torch.randn(EXPERTS, 4, 2, generator=generator) @ torch.randn(EXPERTS, 2, HIDDEN, generator=generator)
    # What cannot be predicted is larger than what can: the leading directions of the outputs are not those.
    noise = 3 * torch.randn(EXPERTS, 1, HIDDEN, generator=generator) * torch.randn(EXPERTS, 600, 1, generator=generator)
    outputs = states @ inside @ maps + noise + 1
    flat = TokenBlock(**{**vars(block), "hidden_states": states, "outputs": outputs})
    inputs = leading_directions(states, 4)
    sample = SurrogateSums(TableSpec(num_experts=EXPERTS, rank=2, input_directions=inputs))
    sample.update(part_of(flat, slice(0, 300)))
    found = predicted_directions(sample, 3)
    assert inputs.shape == (4, HIDDEN) and found.shape == (EXPERTS, 3, HIDDEN)
    torch.testing.assert_close(inputs @ inputs.T, torch.eye(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(found @ found.transpose(1, 2), torch.eye(3).expand(EXPERTS, 3, 3), atol=1e-4, rtol=0)
    full, few = (
        SurrogateSums(TableSpec(num_experts=EXPERTS, rank=2, input_directions=i, output_directions=o))
        for i, o in ((None, None), (inputs, found))
    )
    for sums in (full, few):
        sums.update(flat)
    assert few.sums["products"].shape == (EXPERTS, 5, 3) and few.sums["squares"].shape == (EXPERTS, 5, 5)
    assert few.explained() == pytest.approx(full.explained(), abs=0.01) and 0 < few.explained()[1] < few.explained()[2]
    for rank in (1, 2):
        a, b = (estimate(sums.finalize(), states, rank) for sums in (few, full))
        assert (a - b).square().mean() < 0.01 * (b - b.mean(1, keepdim=True)).square().mean()


def test_what_is_said_to_be_explained_is():
    block, sums = drawn(), SurrogateSums(SPEC)
    sums.spec = TableSpec(num_experts=EXPERTS, rank=3, output_directions=torch.eye(HIDDEN)[:7].expand(EXPERTS, 7, HIDDEN))
    sums.update(block)
    weights = sums._weights(block).T.unsqueeze(2)
    centred = block.outputs - (weights * block.outputs).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
    total = (weights * centred.square()).sum()
    tables = sums.finalize()
    for rank in (1, 2, 3):
        left = (weights * (block.outputs - estimate(tables, block.hidden_states, rank)).square()).sum()
        assert sums.explained()[rank] == pytest.approx(float(1 - left / total), abs=5e-3)


def test_directions_of_fewer_vectors_than_dimensions():
    vectors = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    found = leading_directions(vectors, 3)
    exact = torch.linalg.svd(vectors.double(), full_matrices=False).Vh[:3].float()
    torch.testing.assert_close((found @ exact.T).abs().det(), torch.tensor(1.0), atol=0.2, rtol=0)
    assert leading_directions(vectors, 9).shape[0] <= 9
