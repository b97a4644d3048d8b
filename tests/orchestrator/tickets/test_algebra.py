"""Every rule is exact, symmetric in its searches, and says where it cuts a layer off."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from orchestrator.errors import PlanError, StageFailed
from orchestrator.tickets.algebra import (
    at_least,
    cut_off,
    intersection,
    keep_for,
    most_voted,
    poll,
    repair,
    union,
    weighted_vote,
)
from orchestrator.tickets.packed import Masks
from orchestrator.tickets.votes import merge_standing, standing

RULES: list[Callable[[Sequence[Masks]], dict[str, Tensor]]] = [
    intersection,
    union,
    lambda masks: at_least(masks, (len(masks) + 1) // 2),
    lambda masks: most_voted(poll(masks), keep_for({"a": (2, 3), "b": (3,)}, 0.5), seed=3),
    lambda masks: most_voted(poll(masks), keep_for({"a": (2, 3), "b": (3,)}, 0.5, per_layer=True), seed=3),
]


def of(bits: str) -> dict[str, Tensor]:
    """Six bits of `a`, three of `b`."""
    flat = torch.tensor([bit == "1" for bit in bits])
    return {"a": flat[:6].reshape(2, 3), "b": flat[6:]}


def text(masks: Masks) -> str:
    return "".join("1" if bit else "0" for name in ("a", "b") for bit in masks[name].reshape(-1).tolist())


nine = st.text("01", min_size=9, max_size=9)


def test_by_eye() -> None:
    masks = [of("110100100"), of("110010100"), of("101100010")]
    assert text(intersection(masks)) == "100000000"
    assert text(union(masks)) == "111110110"
    assert text(at_least(masks, 2)) == "110100100"
    assert text(weighted_vote(masks, [1, 1, 2])) == "111100110"
    assert text(weighted_vote(masks, [1, 1, 2], share=0.75)) == "100100000"


@pytest.mark.parametrize("rule", RULES)
@given(st.lists(nine, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_the_order_of_the_searches_does_not_matter(rule: Callable, bits: list[str], random) -> None:  # type: ignore[no-untyped-def, type-arg]
    shuffled = list(bits)
    random.shuffle(shuffled)
    assert text(rule([of(each) for each in bits])) == text(rule([of(each) for each in shuffled]))


@given(st.lists(nine, min_size=1, max_size=6), st.data())
def test_at_least_k_lies_between_intersection_and_union(bits: list[str], data: st.DataObject) -> None:
    masks = [of(each) for each in bits]
    assert text(at_least(masks, 1)) == text(union(masks))
    assert text(at_least(masks, len(masks))) == text(intersection(masks))
    k = data.draw(st.integers(1, len(masks)))
    fewer, more = at_least(masks, k), at_least(masks, max(1, k - 1))
    assert all(not (fewer[name] & ~more[name]).any() for name in fewer)
    equal = weighted_vote(masks, [0.3] * len(masks), share=k / len(masks) - 1e-6)
    assert text(equal) == text(fewer)


@given(st.lists(nine, min_size=1, max_size=6), st.integers(0, 9), st.integers(0, 99))
def test_the_most_voted_are_exactly_as_many_as_wanted(bits: list[str], keep: int, seed: int) -> None:
    masks = [of(each) for each in bits]
    votes = sum(torch.tensor([int(bit) for bit in each]) for each in bits)
    kept = text(most_voted(poll(masks), {("a", "b"): keep}, seed))
    assert kept.count("1") == keep
    chosen = torch.tensor([bit == "1" for bit in kept])
    if 0 < keep < 9:
        assert torch.as_tensor(votes)[chosen].min() >= torch.as_tensor(votes)[~chosen].max()


def test_ties_fall_by_mean_rank_and_then_by_the_seed() -> None:
    masks = [of("100000000"), of("010000000")]
    first = {"a": torch.tensor([[9.0, 4.0, 1.0], [0.0, 0.0, 0.0]]), "b": torch.zeros(3)}
    second = {"a": torch.tensor([[5.0, 9.0, 8.0], [0.0, 0.0, 0.0]]), "b": torch.zeros(3)}
    groups = [("a", "b")]
    ranks = merge_standing(standing(first, groups), standing(second, groups))
    # a[0, 0] is first and third, a[0, 1] second and first: one vote each, but the better mean rank.
    assert text(most_voted(poll(masks), {("a", "b"): 1}, 0, ranks)) == "010000000"
    assert text(most_voted(poll(masks), {("a", "b"): 3}, 0, ranks)) == "111000000"
    drawn = {text(most_voted(poll(masks), {("a", "b"): 1}, seed)) for seed in range(20)}
    assert drawn == {"100000000", "010000000"}


def test_no_position_is_favoured_in_a_tie() -> None:
    nothing = [{"w": torch.zeros(20_000, dtype=torch.bool)}]
    kept = most_voted(poll(nothing), {("w",): 10_000}, 5)["w"]
    assert abs(int(kept[:10_000].sum()) - 5_000) < 250


def test_how_many_stay_for_a_sparsity() -> None:
    shapes = {"a": (10, 10), "b": (3,)}
    assert keep_for(shapes, 0.9) == {("a", "b"): 10}
    assert keep_for(shapes, 0.5) == {("a", "b"): 51}  # 51.5 masked are rounded up
    assert keep_for(shapes, 0.9, per_layer=True) == {("a",): 10, ("b",): 0}
    assert keep_for(shapes, 0.8, per_layer=True) == {("a",): 20, ("b",): 1}
    assert keep_for(shapes, 0.5, total=203) == {("a", "b"): 1}  # a hundred protected weights are dense
    with pytest.raises(StageFailed, match="a sparsity of 0.9 masks 183 weights, but only 103 can be masked"):
        keep_for(shapes, 0.9, total=203)
    with pytest.raises(PlanError, match="legal: 0 to 1"):
        keep_for(shapes, 1.5)


def test_a_layer_that_is_cut_off_is_found_and_repaired() -> None:
    masks = [of("110000110"), of("100000001"), of("101000110")]
    joint = intersection(masks)
    assert cut_off(joint) == ["b"]
    mended = repair(joint, poll(masks), seed=0)
    # The second search kept one weight of `b`; the first two have most votes.
    assert mended.added == {"b": 1}
    assert torch.equal(mended.masks["a"], joint["a"])
    assert text(mended.masks)[6:] in ("100", "010")
    assert cut_off(mended.masks) == []


def test_a_layer_that_a_search_cut_off_itself_gets_one_weight() -> None:
    masks = [of("111111000"), of("111111111")]
    mended = repair(intersection(masks), poll(masks), seed=0)
    assert mended.added == {"b": 1}
    assert int(mended.masks["b"].sum()) == 1


def test_what_is_whole_is_not_repaired() -> None:
    masks = [of("110000110")] * 2
    mended = repair(intersection(masks), poll(masks), seed=0)
    assert mended.added == {}
    assert text(mended.masks) == text(masks[0])
    assert cut_off({"none": torch.zeros(0, dtype=torch.bool)}) == []


def test_masks_of_other_tensors_are_refused_by_every_rule() -> None:
    wrong = [of("110000110"), {"a": torch.ones(2, 3, dtype=torch.bool)}]
    for rule in RULES:
        with pytest.raises(PlanError, match="'b' is in only some of them"):
            rule(wrong)
    with pytest.raises(PlanError, match="2 weights for 1 masks; legal: one for each"):
        weighted_vote([of("110000110")], [1, 2])
    with pytest.raises(PlanError, match="at least 3 of 2 votes; legal: 1 to 2"):
        at_least([of("110000110")] * 2, 3)
    with pytest.raises(PlanError, match="'b' is in only some of them"):
        repair(of("110000110"), poll([{"a": torch.ones(2, 3, dtype=torch.bool)}]), seed=0)
