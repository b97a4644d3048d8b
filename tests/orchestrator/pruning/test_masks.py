"""Exactly k are kept, the best of them, and ties favour no position."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from orchestrator.errors import NotFinite
from orchestrator.pruning.masks import index_hashes, keep_top, sparsity

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

GOLDEN = [2302758161036742528, -8865852959363070961]
"""Masks on storage depend on these; a change would give other tickets for the same key."""


def top(scores: Tensor, keep: int, magnitudes: Tensor | None = None, hashes: Tensor | None = None) -> Tensor:
    return keep_top(
        scores,
        keep,
        lambda: (
            torch.zeros_like(scores) if magnitudes is None else magnitudes,
            index_hashes("w", scores.numel()) if hashes is None else hashes,
        ),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_four_numbers(dtype: torch.dtype) -> None:
    scores = torch.tensor([1.0, 4.0, -3.0, 2.0], dtype=dtype)
    assert top(scores, 0).tolist() == [False, False, False, False]
    assert top(scores, 1).tolist() == [False, True, False, False]
    assert top(scores, 2).tolist() == [False, True, False, True]
    assert top(scores, 3).tolist() == [True, True, False, True]
    assert top(scores, 4).tolist() == [True, True, True, True]


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_fall_by_magnitude_then_by_hash(dtype: torch.dtype) -> None:
    scores = torch.tensor([5.0, 5.0, 5.0, 9.0], dtype=dtype)
    magnitudes = torch.tensor([1.0, 3.0, 2.0, 0.0], dtype=dtype)
    assert top(scores, 2, magnitudes).tolist() == [False, True, False, True]
    assert top(scores, 3, magnitudes).tolist() == [False, True, True, True]
    hashes = torch.tensor([7, -7, 0, 1])
    assert top(scores, 2, hashes=hashes).tolist() == [False, True, False, True]
    assert top(scores, 3, hashes=hashes).tolist() == [False, True, True, True]


def test_minus_zero_ties_with_zero() -> None:
    scores = torch.tensor([0.0, -0.0, 0.0, -0.0])
    assert top(scores, 1, hashes=torch.tensor([4, 1, 3, 2])).tolist() == [False, True, False, False]
    assert top(scores, 1, magnitudes=scores, hashes=torch.tensor([4, 2, 1, 3])).tolist() == [False, False, True, False]


@given(st.lists(st.floats(-4, 4, width=16), min_size=1, max_size=40), st.data())
def test_laws(values: list[float], data: st.DataObject) -> None:
    keep = data.draw(st.integers(0, len(values)))
    scores = torch.tensor(values)
    kept = top(scores, keep, scores.abs())
    assert int(kept.sum()) == keep
    if 0 < keep < len(values):
        assert scores[kept].min() >= scores[~kept].max()
    # Where the entries stand does not matter, when each takes its hash along.
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(len(values)))
    moved = top(scores[order], keep, scores.abs()[order], index_hashes("w", len(values))[order])
    assert torch.equal(moved, kept[order])


@given(st.integers(1, 200), st.data())
def test_one_more_is_kept_and_none_given_up(count: int, data: st.DataObject) -> None:
    scores = torch.zeros(count)
    keep = data.draw(st.integers(0, count - 1))
    assert not (top(scores, keep) & ~top(scores, keep + 1)).any()


def test_ties_favour_no_position() -> None:
    kept = top(torch.zeros(10_000), 5_000).reshape(100, 100)
    halves = torch.stack([kept[:50], kept[50:], kept[:, :50].T, kept[:, 50:].T]).flatten(1).sum(1)
    # 2,500 each are expected, give or take 25.
    assert (halves - 2_500).abs().max() < 125
    assert int(kept.sum(1).min()) > 25


def test_a_rule_by_position_would_be_caught() -> None:
    kept = top(torch.zeros(10_000), 5_000, hashes=torch.arange(10_000)).reshape(100, 100)
    assert int(kept.sum(1).min()) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_no_order_without_finite_scores(bad: float) -> None:
    with pytest.raises(NotFinite, match=r"^1 of 3 scores are NaN or infinite$"):
        top(torch.tensor([1.0, bad, 2.0]), 1)


def test_hashes_are_fixed_and_differ_between_tensors() -> None:
    assert index_hashes("fc1.weight", 3).tolist() == [index_hashes("fc1.weight", 9)[index].item() for index in range(3)]
    assert index_hashes("fc1.weight", 2).tolist() == GOLDEN
    assert not set(index_hashes("a", 1000).tolist()) & set(index_hashes("b", 1000).tolist())
    assert index_hashes("a", 0).shape == (0,)


def test_sparsity_is_exact() -> None:
    assert sparsity({"w": torch.tensor([True, True, True, True, False])}, 5) == 0.2
    assert sparsity({"w": torch.tensor([False, False])}, 10) == 0.2
    assert sparsity({}, 3) == 0.0
