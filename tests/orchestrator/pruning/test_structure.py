"""Units own positions; masks, scores and counts follow from who owns what."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from orchestrator.pruning.structure import NORMS, Slice, Units, kept_units, rounded, unit_scores, without

OWNER = torch.tensor([0, 1, 0, 2])
PAIRS = Units(
    name="fc.weight",
    count=2,
    slices=(
        Slice(tensor="fc.weight", dim=0, owner=torch.tensor([0, 0, 1, -1]), role="makes"),
        Slice(tensor="fc.bias", dim=0, owner=torch.tensor([0, 0, 1, -1]), role="makes"),
        Slice(tensor="norm.running_mean", dim=0, owner=torch.tensor([0, 0, 1, -1]), role="buffer"),
        Slice(tensor="out.weight", dim=1, owner=torch.tensor([0, 0, 1, -1]), role="reads"),
    ),
)
SHAPES = {"fc.weight": (4, 2), "fc.bias": (4,), "out.weight": (1, 4)}


def ones() -> dict[str, Tensor]:
    return {name: torch.ones(shape, dtype=torch.bool) for name, shape in SHAPES.items()}


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        ("l1", [4.0, 2.0, 4.0]),
        ("l2", [10**0.5, 2.0, 4.0]),
        ("linf", [3.0, 2.0, 4.0]),
        ("sum", [-2.0, 2.0, -4.0]),
        ("mean", [-1.0, 2.0, -4.0]),
        ("first", [1.0, 2.0, -4.0]),
    ],
)
def test_a_norm_puts_scores_together_by_owner(norm: str, expected: list[float]) -> None:
    found = NORMS[norm].function(torch.tensor([1.0, 2.0, -3.0, -4.0]), OWNER, 3)
    assert found.tolist() == pytest.approx(expected)


@given(st.permutations(range(12)))
def test_the_first_score_is_the_first_one_however_many_there_are(order: list[int]) -> None:
    owner = torch.tensor(order) % 3
    scores = torch.arange(12.0)
    expected = [float(scores[owner == unit][0]) for unit in range(3)]
    assert NORMS["first"].function(scores, owner, 3).tolist() == expected


def test_scores_run_over_the_slices_of_the_roles_asked_for() -> None:
    scores = {"fc.weight": torch.ones(4, 2), "fc.bias": torch.full((4,), 5.0), "out.weight": torch.tensor([[1.0] * 4])}
    assert unit_scores(PAIRS, scores, "sum", ("makes",)).tolist() == [14.0, 7.0]
    assert unit_scores(PAIRS, scores, "sum", ("reads",)).tolist() == [2.0, 1.0]
    assert unit_scores(PAIRS, {"out.weight": scores["out.weight"]}, "sum", ("makes", "reads")).tolist() == [2.0, 1.0]


def test_a_dead_unit_is_masked_wherever_it_lies_and_nothing_else_is() -> None:
    masks = without([(PAIRS, torch.tensor([False, True]))], {}, SHAPES)
    assert set(masks) == set(SHAPES), "a buffer is cut, not masked"
    assert masks["fc.weight"].tolist() == [[False] * 2, [False] * 2, [True] * 2, [True] * 2]
    assert masks["fc.bias"].tolist() == [False, False, True, True]
    assert masks["out.weight"].tolist() == [[False, False, True, True]]


@given(st.lists(st.booleans(), min_size=2, max_size=2))
def test_what_was_masked_away_is_what_is_not_kept(kept: list[bool]) -> None:
    masks = without([(PAIRS, torch.tensor(kept))], ones(), SHAPES)
    assert kept_units(PAIRS, masks).tolist() == kept


def test_a_unit_lives_while_anything_that_makes_it_does() -> None:
    masks = without([(PAIRS, torch.tensor([False, True]))], {}, SHAPES)
    masks["fc.weight"][1, 0] = True
    assert kept_units(PAIRS, masks).tolist() == [True, True]
    masks["fc.weight"][1, 0] = False
    assert kept_units(PAIRS, masks).tolist() == [False, True]
    del masks["fc.bias"]
    assert kept_units(PAIRS, masks).tolist() == [True, True], "a tensor without a mask is dense"


def test_masks_that_were_there_stay() -> None:
    before = ones()
    before["fc.weight"][2, 1] = False
    masks = without([(PAIRS, torch.tensor([True, True]))], before, SHAPES)
    assert masks["fc.weight"].tolist() == before["fc.weight"].tolist()


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 16))
def test_kept_units_are_rounded_up_to_a_multiple_if_there_are_enough(kept: int, more: int, multiple: int) -> None:
    found = rounded(kept, kept + more, multiple)
    assert kept <= found <= kept + more and found - kept < multiple
    assert found % multiple == 0 or found == kept + more
