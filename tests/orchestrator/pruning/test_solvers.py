"""Weights that make up for what goes: against least squares, and never a weight too many or too few."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from orchestrator.errors import NotFinite, StageFailed
from orchestrator.pruning import solvers
from orchestrator.pruning.criteria import CRITERIA, obs
from orchestrator.pruning.masks import index_hashes, keep_top
from orchestrator.pruning.solvers import surgeon, sweep


def correlated(rows: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Inputs of which each is much like its neighbours: (rows, width)."""
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, width, generator=draw, dtype=dtype)
    return noise.cumsum(dim=1) / 2 + 0.3 * torch.randn(rows, width, generator=draw, dtype=dtype)


def gram(inputs: Tensor) -> Tensor:
    return inputs.t() @ inputs / len(inputs)


def weights(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def best(scores: Tensor, keep: int) -> Tensor:
    flat = scores.reshape(-1)
    return keep_top(flat, keep, lambda: (flat, index_hashes("t", len(flat)))).reshape(scores.shape)


def dense(weight: Tensor) -> Tensor:
    return torch.ones(weight.shape, dtype=torch.bool)


def refitted(inputs: Tensor, outputs: Tensor, kept: Tensor) -> Tensor:
    """One row's weights by least squares over the kept inputs alone."""
    weight = torch.zeros(len(kept), dtype=torch.float64)
    weight[kept] = torch.linalg.lstsq(inputs[:, kept], outputs.unsqueeze(1)).solution.squeeze(1)
    return weight


# Optimal Brain Surgeon


@pytest.mark.parametrize("removed", [*combinations(range(5), 1), *combinations(range(5), 3), (0, 1, 2, 3, 4), ()])
def test_the_surgeon_refits_a_linear_regression(removed: tuple[int, ...]) -> None:
    inputs, targets = correlated(30, 5), weights(30)
    weight = refitted(inputs, targets, torch.ones(5, dtype=torch.bool))
    after = torch.ones(5, dtype=torch.bool)
    after[list(removed)] = False
    moved = surgeon(weight, dense(weight), after, 2 * gram(inputs).unsqueeze(0), damping=0.0)
    assert torch.allclose(moved, refitted(inputs, targets, after), rtol=1e-9, atol=1e-12)
    assert moved[~after].tolist() == [0.0] * len(removed)


def test_the_surgeon_s_rise_in_loss_is_the_saliency() -> None:
    inputs, targets = correlated(30, 5), weights(30)
    weight = refitted(inputs, targets, torch.ones(5, dtype=torch.bool))
    hessian = 2 * gram(inputs).unsqueeze(0)
    after = torch.tensor([True, True, False, True, True])
    moved = surgeon(weight, dense(weight), after, hessian, damping=0.0)
    rise = (inputs @ moved - targets).square().mean() - (inputs @ weight - targets).square().mean()
    assert float(obs(weight, hessian, damping=0.0)[2]) == pytest.approx(float(rise), rel=1e-9)


def test_the_surgeon_does_not_wake_what_was_masked_before() -> None:
    inputs, targets = correlated(30, 5), weights(30)
    before = torch.tensor([True, False, True, True, True])
    after = torch.tensor([True, False, False, True, True])
    weight = refitted(inputs, targets, before)
    moved = surgeon(weight, before, after, 2 * gram(inputs).unsqueeze(0), damping=0.0)
    assert torch.allclose(moved, refitted(inputs, targets, after), rtol=1e-9, atol=1e-12)
    assert moved[~after].tolist() == [0.0, 0.0]


def test_blocks_make_up_for_their_own_weights_alone() -> None:
    inputs, targets = correlated(30, 5), weights(30)
    weight = refitted(inputs, targets, torch.ones(5, dtype=torch.bool))
    whole = 2 * gram(inputs)
    blocks = torch.stack([whole[:3, :3], torch.eye(3, dtype=torch.float64)])
    blocks[1, :2, :2] = whole[3:, 3:]
    after = torch.tensor([True, False, True, True, True])
    moved = surgeon(weight, dense(weight), after, blocks, damping=0.0)
    alone = surgeon(weight[:3], dense(weight[:3]), after[:3], whole[:3, :3].unsqueeze(0), damping=0.0)
    assert torch.equal(moved, torch.cat([alone, weight[3:]]))


def test_many_blocks_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    spread = weights(7, 3, 3)
    blocks = spread @ spread.mT
    weight = weights(4, 5)
    after = best(weight.abs(), 9)
    whole = obs(weight, blocks), surgeon(weight, dense(weight), after, blocks)
    monkeypatch.setattr(solvers, "BLOCKS_AT_ONCE", 18)
    assert torch.equal(obs(weight, blocks), whole[0])
    assert torch.equal(surgeon(weight, dense(weight), after, blocks), whole[1])


def test_a_surgeon_s_hessian_must_have_an_inverse() -> None:
    weight = torch.ones(2)
    with pytest.raises(StageFailed, match="a larger one is needed"):
        surgeon(weight, dense(weight), dense(weight), torch.ones(1, 2, 2), damping=0.0)


# SparseGPT


def test_two_of_three_by_hand() -> None:
    # With the inputs of columns 0 and 1 equal but for a little, column 1 takes over what column 0 did.
    inputs = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    weight = torch.tensor([[1.0, 3.0]], dtype=torch.float64)
    mask, moved = sweep(weight, dense(weight), 1, None, gram(inputs), damping=0.0)
    assert mask.tolist() == [[False, True]]
    assert torch.allclose(moved, torch.tensor([[0.0, 3.5]], dtype=torch.float64))


def test_a_row_is_refitted_when_its_first_columns_go() -> None:
    inputs = correlated(50, 6)
    weight = weights(1, 6)
    weight[:, :3] *= 1e-3  # these go, and everything to their right makes up for them
    mask, moved = sweep(weight, dense(weight), 3, None, gram(inputs), damping=0.0)
    assert mask.tolist() == [[False] * 3 + [True] * 3]
    assert torch.allclose(moved[0], refitted(inputs, inputs @ weight[0], mask[0]), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [4, 16, 128])
def test_it_beats_magnitude_in_the_layer_s_output(
    columns: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solvers, "COLUMNS", columns)
    inputs = correlated(200, 32, dtype=dtype)
    weight = weights(16, 32, dtype=dtype)
    keep = 200
    mask, moved = sweep(weight, dense(weight), keep, None, gram(inputs))
    assert moved.dtype == dtype
    magnitude = best(weight.abs(), keep)

    def error(pruned: Tensor) -> float:
        return float((inputs @ (pruned - weight).t()).square().sum())

    assert int(mask.sum()) == keep
    assert error(moved) < error(weight * mask) / 3
    assert error(moved) < error(weight * magnitude) / 3


def test_a_pattern_beats_magnitude_under_the_same_pattern() -> None:
    inputs, weight = correlated(200, 32), weights(16, 32)
    mask, moved = sweep(weight, dense(weight), None, (2, 4), gram(inputs))
    groups = weight.abs().reshape(16, 8, 4)
    magnitude = (groups >= groups.topk(2).values[..., 1:]).reshape(16, 32)
    assert mask.reshape(16, 8, 4).sum(dim=2).eq(2).all()
    errors = [float((inputs @ (pruned - weight).t()).square().sum()) for pruned in (moved, weight * magnitude)]
    assert errors[0] < errors[1] / 4


def test_columns_whose_inputs_are_never_on_go_first() -> None:
    inputs = correlated(50, 8)
    inputs[:, :4] = 0
    mask, _ = sweep(torch.ones(3, 8), dense(torch.ones(3, 8)), 12, None, gram(inputs))
    assert mask.tolist() == [[False] * 4 + [True] * 4] * 3


def test_equal_scores_do_not_fall_by_position() -> None:
    weight = torch.ones(8, 64)
    mask, moved = sweep(weight, dense(weight), 256, None, torch.eye(64))
    assert int(mask.sum()) == 256
    assert all(0 < int(row.sum()) < 64 for row in mask)
    assert all(0 < int(column.sum()) < 8 for column in mask.t())
    assert torch.equal(moved, mask.float())
    again, _ = sweep(weight, dense(weight), 256, None, torch.eye(64))
    assert torch.equal(mask, again)


def test_a_convolution_is_swept_as_the_linear_layer_on_its_patches() -> None:
    images = torch.randn(6, 4, 7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(dim=2)
    kernels = weights(5, 4, 3, 3)
    patches = F.unfold(images, 3).transpose(1, 2).reshape(-1, 36)
    mask, moved = sweep(kernels, dense(kernels), 90, None, gram(patches))
    by_place = torch.arange(36).reshape(4, 9).t().reshape(-1)
    flat = kernels.reshape(5, 36)[:, by_place]
    expected = sweep(flat, dense(flat), 90, None, gram(patches[:, by_place]))
    assert torch.equal(mask.reshape(5, 36)[:, by_place], expected[0])
    assert torch.allclose(moved.reshape(5, 36)[:, by_place], expected[1])
    errors = [
        float((F.conv2d(images, pruned - kernels)).square().sum())
        for pruned in (moved, kernels * best(kernels.abs(), 90))
    ]
    assert errors[0] < 0.75 * errors[1]


def test_a_convolution_s_pattern_runs_along_its_input_channels() -> None:
    kernels = weights(3, 8, 2, 2)
    mask, _ = sweep(kernels, dense(kernels), None, (1, 4), gram(correlated(100, 32)))
    assert mask.reshape(3, 2, 4, 2, 2).sum(dim=2).eq(1).all()


def test_groups_are_swept_apart() -> None:
    kernels, inputs = weights(4, 3, 2), [correlated(40, 6, seed) for seed in (1, 2)]
    rows = torch.tensor([2, 5, 0, 6])
    mask, moved = sweep(kernels, dense(kernels), rows, None, torch.stack([gram(x) for x in inputs]))
    # One damping for the layer, so apart they have the same only undamped.
    exact = sweep(kernels, dense(kernels), rows, None, torch.stack([gram(x) for x in inputs]), damping=0.0)
    for group, x in enumerate(inputs):
        mine = slice(2 * group, 2 * group + 2)
        alone = sweep(kernels[mine], dense(kernels[mine]), rows[mine], None, gram(x), damping=0.0)
        assert torch.equal(exact[0][mine], alone[0])
        assert torch.allclose(exact[1][mine], alone[1])
    assert mask.flatten(1).sum(dim=1).tolist() == rows.tolist()
    assert moved.shape == kernels.shape


def test_what_does_not_fit_is_refused() -> None:
    weight = weights(2, 6)
    with pytest.raises(StageFailed, match=r"^2:4 does not fit a weight of 6 inputs$"):
        sweep(weight, dense(weight), None, (2, 4), torch.eye(6))
    with pytest.raises(StageFailed, match=r"input_gram of shape \(5, 5\) does not fit a weight of shape \(2, 6\)"):
        sweep(weight, dense(weight), 3, None, torch.eye(5))
    with pytest.raises(StageFailed, match="a larger one is needed"):
        sweep(weight, dense(weight), 3, None, torch.ones(6, 6), damping=0.0)
    with pytest.raises(NotFinite, match="NaN or infinite"):
        sweep(weight / 0, dense(weight), torch.tensor([3, 3]), None, torch.eye(6))


# Both


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """A weight with ties in it, a mask so far, and a Gram matrix of its inputs that may be singular."""
    rows, groups, seed = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(0, 99))
    shape = (rows, 4 * groups, *draw(st.sampled_from([(), (2,), (2, 1)])))
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-2, 3, shape, generator=generator).float()
    before = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.4, 0.9, 1.0]))
    inputs = correlated(draw(st.integers(1, 40)), weight[0].numel(), seed)
    return weight * before, before, gram(inputs)


@settings(max_examples=60, deadline=None)
@given(problem=problems(), data=st.data())
def test_masks_shrink_to_the_exact_count(problem: tuple[Tensor, Tensor, Tensor], data: st.DataObject) -> None:
    weight, before, inputs = problem
    copies = [tensor.clone() for tensor in problem]
    how = data.draw(st.sampled_from(["all", "row", "pattern"]))
    left = before.reshape(len(before), -1).sum(dim=1)
    keep: int | Tensor | None = None
    pattern = None
    if how == "all":
        keep = data.draw(st.integers(0, int(left.sum())))
    elif how == "row":
        keep = torch.tensor([data.draw(st.integers(0, int(count))) for count in left])
    else:
        pattern = data.draw(st.sampled_from([(1, 4), (2, 4), (1, 2)]))
    mask, moved = sweep(weight, before, keep, pattern, inputs)
    assert mask.shape == moved.shape == weight.shape
    assert not (mask & ~before).any(), "a mask grew"
    assert torch.isfinite(moved).all()
    assert not moved[~mask].any()
    assert not moved[~mask].signbit().any(), "-0.0 differs from 0.0 in its bytes"
    if isinstance(keep, Tensor):
        assert torch.equal(mask.reshape(len(mask), -1).sum(dim=1), keep)
    elif pattern is None:
        assert int(mask.sum()) == keep
    else:
        n, m = pattern
        groups = (table.reshape(len(table), -1, m, *table.shape[2:]).sum(dim=2) for table in (mask, before))
        found, there = groups
        assert torch.equal(found, there.clamp(max=n))
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(problem, copies, strict=True))
    again = sweep(weight, before, keep, pattern, inputs)
    assert torch.equal(mask, again[0]) and torch.equal(moved, again[1])


@settings(max_examples=40, deadline=None)
@given(problem=problems(), share=st.floats(0, 1), size=st.integers(1, 7))
def test_the_surgeon_keeps_to_the_mask(problem: tuple[Tensor, Tensor, Tensor], share: float, size: int) -> None:
    weight, before, _ = problem
    count = -(-weight.numel() // size)
    spread = weights(count, size, size)
    blocks = spread @ spread.mT
    blocks[-1, weight.numel() - (count - 1) * size :] = 0
    blocks[-1, :, weight.numel() - (count - 1) * size :] = 0
    blocks[-1].diagonal()[weight.numel() - (count - 1) * size :] = 1
    scores = obs(weight, blocks).where(before, -1)
    after = best(scores, round(share * int(before.sum())))
    moved = surgeon(weight, before, after, blocks)
    assert moved.dtype == weight.dtype
    assert not moved[~after].any() and not moved[~after].signbit().any()
    assert torch.isfinite(moved).all()

    def rise(new: Tensor) -> float:
        step = (new.double() - weight.double()).reshape(-1)
        padded = F.pad(step, (0, blocks.shape[0] * size - len(step))).reshape(-1, size)
        return float(torch.einsum("bi,bij,bj->", padded, blocks, padded))

    # The damping may take a little away, no more than it adds to the diagonal.
    assert rise(moved) <= rise(weight * after) * (1 + 1e-6) + 1e-3


def test_criteria_find_their_solvers() -> None:
    inputs, weight = correlated(30, 5), weights(2, 5)
    whole = dense(weight)
    solve, compensate = CRITERIA["sparsegpt"].facts["solve"], CRITERIA["obs"].facts["compensate"]
    found = solve(weight, whole, 4, None, input_gram=gram(inputs), damping=0.1)
    assert torch.equal(found[0], sweep(weight, whole, 4, None, gram(inputs), 0.1)[0])
    hessian = torch.kron(torch.eye(2).double(), gram(inputs)).unsqueeze(0)
    after = best(weight.abs(), 4)
    moved = compensate(weight, whole, after, hessian_blocks=hessian, damping=0.1)
    assert torch.equal(moved, surgeon(weight, whole, after, hessian, 0.1))
