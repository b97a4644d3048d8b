"""Exactly k are kept, the best of them, and ties favour no position."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from orchestrator.errors import NotFinite
from orchestrator.pruning import masks
from orchestrator.pruning.masks import count, hashes_at, index_hashes, keep_top, ranks, ranks_in_rows, select, sparsity

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
    assert sparsity({"w": torch.tensor([True, True, True, True, False])}, {"w": 5}) == 0.2
    assert sparsity({"w": torch.tensor([False, False])}, {"w": 2, "v": 8}) == 0.2
    assert sparsity({}, {"w": 3}) == 0.0


def test_the_mask_of_a_bias_is_no_sparsity() -> None:
    assert sparsity({"w": torch.tensor([True, False]), "b": torch.tensor([False])}, {"w": 2}) == 0.5


# Against sorting, on numbers that sorting by bits gets wrong first: both zeros, denormals, the largest and the smallest.

NUMBERS = [0.0, -0.0, 1.0, -1.0, 1.5, 5e-324, -5e-324, 1e-45, -1e-45, 1e-40, 3e38, -3e38, 1e-300, 1e300, 0.1, 2.0**-24]


def ties_of(tensors: list[Tensor]) -> masks.Ties:
    return lambda number, places: (tensors[number].reshape(-1)[places].abs(), hashes_at(str(number), places))


def sorted_by_hand(scores: list[Tensor], among: list[Tensor | None], sizes: list[Tensor]) -> list[tuple[int, int]]:
    """(tensor, flat place) from the best to the worst of those that are in `among`."""
    found = []
    for number, (tensor, where) in enumerate(zip(scores, among, strict=True)):
        hashes = index_hashes(str(number), tensor.numel()).tolist()
        for place, value in enumerate(tensor.reshape(-1).tolist()):
            if where is None or bool(where.reshape(-1)[place]):
                size = abs(float(sizes[number].reshape(-1)[place]))
                found.append(((-value, -size, hashes[place]), (number, place)))
    return [where for _, where in sorted(found)]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_select_and_ranks_are_sorting(data: st.DataObject) -> None:
    dtypes = data.draw(st.sampled_from([*([dtype] for dtype in DTYPES), [torch.float32, torch.float64], DTYPES]))
    scores: list[Tensor] = []
    among: list[Tensor | None] = []
    for dtype in data.draw(st.lists(st.sampled_from(dtypes), min_size=1, max_size=4)):
        values = data.draw(st.lists(st.sampled_from(NUMBERS), min_size=1, max_size=12))
        tensor = torch.tensor(values, dtype=torch.float64).to(dtype)
        tensor = torch.where(tensor.isfinite(), tensor, torch.zeros((), dtype=dtype))
        scores.append(tensor.reshape(2, -1).t() if len(values) % 2 == 0 else tensor)
        mask = data.draw(st.none() | st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
        among.append(None if mask is None else torch.tensor(mask).reshape(scores[-1].shape))
    sizes = [torch.ones_like(tensor) if data.draw(st.booleans()) else tensor.abs() for tensor in scores]
    order = sorted_by_hand(scores, among, sizes)
    keep = data.draw(st.integers(0, len(order)))
    chunk = masks.CHUNK
    try:
        masks.CHUNK = data.draw(st.integers(1, 9))
        kept = select(scores, among, keep, ties_of(sizes))
    finally:
        masks.CHUNK = chunk
    found = {(n, place) for n, mask in enumerate(kept) for place in mask.reshape(-1).nonzero().flatten().tolist()}
    assert found == set(order[:keep])
    assert [mask.shape for mask in kept] == [tensor.shape for tensor in scores]
    places = ranks(scores, among, ties_of(sizes))
    assert [int(places[number].reshape(-1)[place]) for number, place in order] == list(range(len(order)))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.data())
def test_ranks_in_rows_are_those_of_each_row(rows: int, width: int, data: st.DataObject) -> None:
    drawn = data.draw(st.lists(st.sampled_from(NUMBERS[:9]), min_size=rows * width, max_size=rows * width))
    where = data.draw(st.lists(st.booleans(), min_size=rows * width, max_size=rows * width))
    scores, among = torch.tensor(drawn).reshape(rows, width), torch.tensor(where).reshape(rows, width)
    hashes = index_hashes("0", rows * width).reshape(rows, width)
    found = ranks_in_rows(scores, among, scores.abs(), hashes)
    for row in range(rows):

        def ties(_: int, places: Tensor, row: int = row) -> tuple[Tensor, Tensor]:
            return scores[row][places].abs(), hashes[row][places]

        assert torch.equal(found[row], ranks([scores[row]], [among[row]], ties)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_threshold_is_found_bit_by_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # Three values that differ in the last bit alone, a hundred of each: the search goes down to it.
    one = torch.ones(100, dtype=dtype)
    near = torch.cat([one, torch.nextafter(one, 2 * one), torch.nextafter(one, 0 * one)])
    monkeypatch.setattr(masks, "CHUNK", 64)
    kept = select([near], [None], 150, ties_of([near]))[0]
    assert [count(kept[start : start + 100]) for start in (100, 0, 200)] == [100, 50, 0]


def test_a_threshold_between_two_precisions_is_not_rounded() -> None:
    # 0.1 in single precision is a little more than in double precision.
    scores = [torch.tensor([0.1]), torch.tensor([0.1, 0.1], dtype=torch.float64)]
    kept = select(scores, [None, None], 1, ties_of([torch.zeros(1), torch.ones(2)]))
    assert [mask.tolist() for mask in kept] == [[True], [False, False]]


def test_scores_may_lie_in_memory_as_they_like() -> None:
    scores = torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last)
    kept = select([scores], [None], 5, ties_of([scores]))[0]
    assert kept.reshape(-1).nonzero().flatten().tolist() == [19, 20, 21, 22, 23]
    flat = torch.zeros(6).reshape(2, 3).t()
    assert count(select([flat], [flat == 0], 4, ties_of([flat]))[0]) == 4
