"""Regrowing: the count holds, and what goes and what comes is what the papers say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from orchestrator.errors import NotFinite, UnknownName
from orchestrator.pruning.regrow import REGROW, fraction_at, needs, regrow

WEIGHT = torch.tensor([[4.0, -1.0, 0.0], [-3.0, 0.0, 2.0]])
MASK = torch.tensor([[True, True, False], [True, False, True]])
EXCHANGES = [name for name in REGROW.names if name != "all"]


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def supply(by: str, shape: Any, seed: int = 0) -> dict[str, Any]:
    given = {"gradient": torch.randn(shape, generator=drawn(seed)), "generator": drawn(seed + 1)}
    return {need: given[need] for need in needs(by)}


def test_the_smallest_goes_and_the_steepest_comes() -> None:
    gradient = torch.tensor([[9.0, 0.5, -1.0], [9.0, 0.1, 9.0]])
    after = regrow("rigl", MASK, WEIGHT, 0.25, gradient=gradient)
    assert after.tolist() == [[True, False, True], [True, False, True]]


def test_a_dropped_weight_may_come_back_at_once() -> None:
    gradient = torch.tensor([[0.0, 5.0, 1.0], [0.0, 0.1, 0.0]])
    assert torch.equal(regrow("rigl", MASK, WEIGHT, 0.25, gradient=gradient), MASK)
    # Two go, -1 and 2; of the four that are out then, the two with the steepest gradients come.
    assert regrow("rigl", MASK, WEIGHT, 0.5, gradient=gradient).tolist() == [[True, True, True], [True, False, False]]


def test_how_many_are_exchanged_is_rounded_half_up() -> None:
    gradient = (~MASK).float()
    for fraction, exchanged in [(0.12, 0), (0.125, 1), (0.37, 1), (0.375, 2), (0.5, 2)]:
        after = regrow("rigl", MASK, WEIGHT, fraction, gradient=gradient)
        assert int((MASK & ~after).sum()) == exchanged, fraction


def test_random_growth_reaches_every_place_that_is_out() -> None:
    found = {tuple(regrow("set", MASK, WEIGHT, 0.25, generator=drawn(seed)).flatten().tolist()) for seed in range(40)}
    grown = [(1, 0, 1, 1, 0, 1), (1, 1, 0, 1, 0, 1), (1, 0, 0, 1, 1, 1)]
    assert found == {tuple(map(bool, kept)) for kept in grown}


def test_all_releases_the_mask() -> None:
    assert regrow("all", MASK, WEIGHT, 0.0).all()
    assert not MASK.all()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_count_is_the_same_before_and_after(data: st.DataObject) -> None:
    by = data.draw(st.sampled_from(EXCHANGES))
    shape = data.draw(st.sampled_from([(0,), (1,), (7,), (4, 5), (3, 2, 2, 2)]))
    fraction = data.draw(st.floats(0, 1))
    draw = drawn(data.draw(st.integers(0, 99)))
    mask = torch.rand(shape, generator=draw) < data.draw(st.floats(0, 1))
    # Whole numbers, so that there are ties.
    weight = torch.randint(-2, 3, shape, generator=draw).to(data.draw(st.sampled_from([torch.float32, torch.bfloat16])))
    weight = weight * mask
    given_by = supply(by, shape)
    if "gradient" in given_by:
        given_by["gradient"] = given_by["gradient"].round().to(weight.dtype)
    before = mask.clone(), weight.clone()
    after = regrow(by, mask, weight, fraction, **given_by)
    assert after.dtype == torch.bool and after.shape == mask.shape
    assert int(after.sum()) == int(mask.sum())
    assert torch.equal(mask, before[0]) and torch.equal(weight, before[1])
    dropped, stayed = mask & ~after, mask & after
    assert int(dropped.sum()) <= int(fraction * int(mask.sum()) + 0.5)
    if by == "rigl" and dropped.any() and (after & ~mask).any():
        assert given_by["gradient"][after & ~mask].abs().min() >= given_by["gradient"][dropped].abs().max()
    if dropped.any() and stayed.any() and (after & ~mask).sum() == int(fraction * int(mask.sum()) + 0.5):
        assert weight[dropped].abs().max() <= weight[stayed].abs().min()  # none of them came back


@pytest.mark.parametrize("by", EXCHANGES)
def test_dense_and_empty_tensors_and_no_fraction_change_nothing(by: str) -> None:
    for mask, fraction in [(torch.ones(2, 3) > 0, 0.5), (torch.zeros(2, 3) > 0, 0.5), (MASK, 0.0), (MASK, 0.1)]:
        after = regrow(by, mask, WEIGHT * mask, fraction, **supply(by, (2, 3)))
        assert torch.equal(after, mask) and after is not mask


@pytest.mark.parametrize("by", EXCHANGES)
def test_the_same_draw_gives_the_same_mask(by: str) -> None:
    mask = torch.rand(30, 30, generator=drawn(0)) < 0.3
    weight = torch.randn(30, 30, generator=drawn(1)) * mask
    one, same, other = (regrow(by, mask, weight, 0.3, **supply(by, (30, 30), seed)) for seed in (5, 5, 6))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_ties_do_not_fall_by_position() -> None:
    mask = torch.arange(64).reshape(8, 8) < 32
    flat: Tensor = torch.ones(8, 8) * mask
    after = regrow("rigl", mask, flat, 0.25, gradient=torch.zeros(8, 8))
    # Gradients tie, so magnitude decides: the ones that were dropped come back.
    assert torch.equal(after, mask)
    gradient = (~mask).float()
    grown = regrow("rigl", mask, flat, 0.25, name="fc.weight", gradient=gradient)
    gone = (mask & ~grown).nonzero()[:, 0].unique()
    came = (grown & ~mask).nonzero()[:, 0].unique()
    assert len(gone) > 2 and len(came) > 2, "a whole row at once"
    assert not torch.equal(grown, regrow("rigl", mask, flat, 0.25, name="out.weight", gradient=gradient))


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(NotFinite):
        regrow("rigl", MASK, WEIGHT, 0.25, gradient=torch.full((2, 3), float("nan")))
    with pytest.raises(NotFinite):
        regrow("set", MASK, WEIGHT * float("inf"), 0.25, generator=drawn(0))


def test_unknown_and_unsupplied() -> None:
    with pytest.raises(UnknownName, match=r"^unknown regrowth 'rgl'; did you mean 'rigl'\? Known: all, rigl, set$"):
        regrow("rgl", MASK, WEIGHT, 0.25)
    with pytest.raises(AssertionError, match="'rigl' needs gradient"):
        regrow("rigl", MASK, WEIGHT, 0.25)
    assert [needs(by) for by in ("set", "rigl", "all")] == [("generator",), ("gradient",), ()]


def test_the_fraction_falls_along_half_a_cosine() -> None:
    assert fraction_at(0.3, 0, 100) == 0.3
    assert fraction_at(0.3, 50, 100) == pytest.approx(0.15)
    assert fraction_at(0.3, 25, 100) == pytest.approx(0.15 * (1 + 0.5**0.5))
    assert [fraction_at(0.3, step, 100) for step in (100, 101, 10**6)] == [0, 0, 0]
    assert fraction_at(0.3, 0, 0) == 0
