"""Votes are exact, and merge as a tree in any order, to the byte."""

from __future__ import annotations

from fractions import Fraction
from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import NotFinite, PlanError
from orchestrator.tickets.packed import pack, unpack
from orchestrator.tickets.votes import (
    Votes,
    at_least,
    cast,
    counts,
    merge,
    merge_standing,
    needed,
    standing,
    whole_weights,
)


def same(a: Votes, b: Votes) -> bool:
    alike = (a.shapes, a.total, a.fewest) == (b.shapes, b.total, b.fewest)
    return alike and all(
        len(a.planes[n]) == len(b.planes[n]) and all(map(np.array_equal, a.planes[n], b.planes[n])) for n in a.planes
    )


polls = st.tuples(st.integers(1, 9), st.integers(1, 70)).flatmap(
    lambda shape: st.lists(
        st.tuples(st.integers(1, 20), st.lists(st.booleans(), min_size=shape[1], max_size=shape[1])),
        min_size=shape[0],
        max_size=shape[0],
    )
)


@given(polls, st.randoms(use_true_random=False), st.data())
def test_votes_add_up_in_any_order_and_grouping(
    poll: list[tuple[int, list[bool]]], random: object, data: st.DataObject
) -> None:
    searches = [cast(pack({"w": torch.tensor(bits)}), weight) for weight, bits in poll]
    straight = reduce(merge, searches)
    tree = list(data.draw(st.permutations(searches)))
    while len(tree) > 1:
        at = data.draw(st.integers(0, len(tree) - 2))
        tree[at : at + 2] = [merge(tree[at], tree[at + 1])]
    assert same(tree[0], straight)
    expected = sum(weight * torch.tensor(bits).long() for weight, bits in poll)
    assert torch.equal(counts(straight)["w"], torch.as_tensor(expected))
    assert straight.total == sum(weight for weight, _ in poll)
    assert straight.fewest == {"w": min(sum(bits) for _, bits in poll)}
    threshold = data.draw(st.integers(1, straight.total))
    assert torch.equal(unpack(at_least(straight, threshold))["w"], torch.as_tensor(expected) >= threshold)


def test_thresholds_out_of_range_are_refused() -> None:
    votes = cast(pack({"w": torch.tensor([True, False])}), 3)
    for threshold in (0, 4):
        with pytest.raises(PlanError, match="legal: 1 to 3$"):
            at_least(votes, threshold)
    with pytest.raises(PlanError, match="a vote of 0; legal: 1 and more"):
        cast(pack({"w": torch.tensor([True])}), 0)


def test_weights_become_whole_numbers_without_rounding() -> None:
    assert whole_weights([0.5, 0.25]) == [2, 1]
    assert whole_weights([0.1, 0.2, 0.3]) == [1, 2, 3]
    assert whole_weights([7, 7.0]) == [1, 1]
    long = [0.9733333333333334, 0.98]
    found = whole_weights(long)
    assert Fraction(found[0], found[1]) == Fraction("0.9733333333333334") / Fraction("0.98")
    for bad in ([0.0], [-1.0], [float("nan")], [float("inf")]):
        with pytest.raises(PlanError, match="legal: above 0"):
            whole_weights(bad)
    with pytest.raises(PlanError, match="no search has a vote"):
        whole_weights([])


def test_long_weights_are_voted_exactly_though_no_integer_holds_them() -> None:
    weights = whole_weights([1.23456789012345, 1e-5, 1.23457789012345])
    bits = ([True, True, False], [True, False, False], [False, False, True])
    votes = reduce(merge, (cast(pack({"w": torch.tensor(b)}), w) for b, w in zip(bits, weights, strict=True)))
    assert unpack(at_least(votes, weights[2]))["w"].tolist() == [True, False, True]
    assert unpack(at_least(votes, weights[0] + weights[1] + 1))["w"].tolist() == [False, False, False]
    with pytest.raises(PlanError, match="fewer digits"):
        counts(cast(pack({"w": torch.tensor([True])}), 2**62))


def test_the_votes_needed_for_a_share() -> None:
    assert needed(0.5, 4) == 2
    assert needed(0.5, 5) == 3
    assert needed(0.6, 5) == 3  # in binary 0.6 · 5 is a little less, and 0.1 · 30 a little more
    assert needed(0.1, 30) == 3
    assert needed(1.0, 7) == 7
    assert needed(0.001, 7) == 1
    for bad in (0.0, 1.1, float("nan")):
        with pytest.raises(PlanError, match="legal: above 0, at most 1"):
            needed(bad, 5)


def test_ranks_share_their_mean_and_are_whole() -> None:
    scores = {"a": torch.tensor([[3.0, 1.0], [3.0, 7.0]]), "b": torch.tensor([0.0])}
    # In order: 0, 1, 3, 3, 7. Twice the mean rank from 1, less 1: 1, 3, 6, 6, 9.
    assert {n: r.tolist() for n, r in standing(scores, [("a", "b")]).items()} == {"a": [[6, 3], [6, 9]], "b": [1]}
    assert {n: r.tolist() for n, r in standing(scores, [("a",), ("b",)]).items()} == {"a": [[4, 1], [4, 7]], "b": [1]}
    total = merge_standing(standing(scores, [("a",), ("b",)]), standing(scores, [("a", "b")]))
    assert total["a"].tolist() == [[10, 4], [10, 16]]


@given(st.lists(st.sampled_from([-1.5, -0.0, 0.0, 1e-30, 2.0]) | st.floats(-3, 3, width=32), max_size=30))
def test_ranks_count_what_lies_below_and_what_does_not_lie_above(values: list[float]) -> None:
    scores = torch.tensor(values)
    ranks = standing({"w": scores}, [("w",)])["w"]
    below, level = (scores < scores[:, None]).sum(dim=1), (scores == scores[:, None]).sum(dim=1)
    assert torch.equal(ranks, 2 * below + level)


def test_ranks_of_what_is_not_finite_are_refused() -> None:
    with pytest.raises(NotFinite, match="scores of a, b are NaN or infinite"):
        standing({"a": torch.tensor([1.0]), "b": torch.tensor([float("nan")])}, [("a", "b")])
