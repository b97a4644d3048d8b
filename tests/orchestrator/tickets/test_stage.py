"""The ticket ops on states that can be checked by eye, and pruning to a reference's counts against brute force."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from orchestrator.errors import PlanError, StageFailed
from orchestrator.ops import Combine, Control, Prune, Transfer
from orchestrator.pruning.prune import Network, prune
from orchestrator.state import State
from orchestrator.tickets.stage import combine, controlled, like_reference, transferred

NAMES = ("a.weight", "b.weight")
ANCESTOR = State(
    weights={
        "a.weight": torch.tensor([[1.0, -2.0], [3.0, -4.0]]),
        "b.weight": torch.tensor([[5.0, 6.0]]),
        "b.bias": torch.tensor([7.0]),
    },
    optimizer={"exp_avg/a.weight": torch.ones(2, 2)},
    position=3,
)


def mask(*kept: int) -> Tensor:
    return torch.tensor([kept], dtype=torch.bool).reshape(2, 2) if len(kept) == 4 else torch.tensor([kept]).bool()


def search(a: Sequence[int], b: Sequence[int] = (1, 1), sizes: Sequence[float] = (1, 1, 1, 1)) -> State:
    """A search's last state: trained weights under its masks."""
    trained = ANCESTOR.weights | {"a.weight": torch.tensor(sizes, dtype=torch.float32).reshape(2, 2)}
    return State(weights=trained, masks={"a.weight": mask(*a), "b.weight": mask(*b)}, position=9).masked()


def kept(state: State, name: str = "a.weight") -> list[int]:
    return [int(each) for each in state.masks[name].reshape(-1)]


A, B, C = search((1, 1, 0, 0)), search((1, 0, 1, 0)), search((1, 0, 1, 1))


@pytest.mark.parametrize(
    ("op", "wanted"),
    [
        (Combine(rule="intersection"), [1, 0, 0, 0]),
        (Combine(rule="union"), [1, 1, 1, 1]),
        (Combine(rule="at-least", least=2), [1, 0, 1, 0]),
        (Combine(rule="weighted", weights=(5.0, 1.0, 1.0)), [1, 1, 0, 0]),
        (Combine(rule="weighted", weights=(1.0, 1.0, 5.0)), [1, 0, 1, 1]),
        (Combine(rule="most-voted", sparsity=2 / 6), [1, 0, 1, 0]),
    ],
)
def test_a_rule_makes_one_mask_of_three(op: Combine, wanted: list[int]) -> None:
    made = combine(op, [A, B, C, ANCESTOR], NAMES)
    assert kept(made) == wanted and kept(made, "b.weight") == [1, 1]


def test_a_ticket_has_the_ancestor_s_weights_optimizer_and_position() -> None:
    made = combine(Combine(rule="intersection"), [A, B, ANCESTOR], NAMES)
    assert made.weights["a.weight"].tolist() == [[1, 0], [0, 0]]
    assert torch.equal(made.weights["b.bias"], ANCESTOR.weights["b.bias"])
    assert made.optimizer["exp_avg/a.weight"].tolist() == [[1, 0], [0, 0]]
    assert made.position == 3 and made.remarks == {}


def test_searches_that_start_from_a_masked_state_are_refused() -> None:
    masked = replace(ANCESTOR, masks={"a.weight": mask(1, 1, 1, 0)}).masked()
    with pytest.raises(StageFailed, match="their ancestor has a mask of 'a.weight'"):
        combine(Combine(rule="union"), [A, B, masked], NAMES)


def test_a_layer_that_is_cut_off_is_repaired_and_remarked() -> None:
    one, other = search((1, 1, 0, 0), sizes=(1, 3, 0, 0)), search((0, 0, 1, 0), sizes=(0, 0, 2, 0))
    made = combine(Combine(rule="intersection"), [one, other, ANCESTOR], NAMES)
    assert made.remarks == {"repaired": {"a.weight": 1}}
    assert kept(made) == [0, 1, 0, 0]  # of those with a vote, the one with the best mean rank
    assert made.weights["a.weight"].tolist() == [[0, -2], [0, 0]]


def test_equal_votes_fall_by_mean_rank_across_the_searches() -> None:
    # Each of the first two weights has one vote; both searches together rank the second higher.
    one, other = search((1, 0, 1, 0), sizes=(2, 0, 3, 0)), search((0, 1, 1, 0), sizes=(0, 4, 3, 0))
    for searches in ([one, other], [other, one]):
        made = combine(Combine(rule="most-voted", sparsity=2 / 6, seed=1), [*searches, ANCESTOR], NAMES)
        assert kept(made) == [0, 1, 1, 0]


def test_a_layer_that_no_search_prunes_stays_whole_and_counts_in_the_sparsity() -> None:
    everywhere = search((1, 1, 1, 0))
    made = combine(Combine(rule="most-voted", sparsity=0.5), [everywhere, everywhere, ANCESTOR], NAMES)
    assert kept(made, "b.weight") == [1, 1]
    assert sum(kept(made)) == 1  # 3 of 6 in all


def test_more_cannot_be_masked_than_searches_may_prune() -> None:
    with pytest.raises(StageFailed, match="only 4 can be masked"):
        combine(Combine(rule="most-voted", sparsity=0.9), [A, B, ANCESTOR], NAMES)


@given(st.permutations([A, B, C]))
def test_the_order_of_the_searches_is_none(order: list[State]) -> None:
    for op in (Combine(rule="intersection"), Combine(rule="most-voted", sparsity=0.5, seed=3)):
        made, again = combine(op, [A, B, C, ANCESTOR], NAMES), combine(op, [*order, ANCESTOR], NAMES)
        assert all(torch.equal(made.masks[name], again.masks[name]) for name in NAMES)


# --- Controls and transfer -----------------------------------------------------------------------------------------


def test_a_control_is_made_over_the_unmasked_ancestor() -> None:
    ticket = combine(Combine(rule="intersection"), [A, A, ANCESTOR], NAMES)
    made = controlled(Control(kind="shuffled", seed=1), [ticket, ANCESTOR])
    assert kept(made) != kept(ticket) and sum(kept(made)) == 2
    assert torch.equal(made.weights["a.weight"], ANCESTOR.weights["a.weight"] * made.masks["a.weight"])
    assert made.position == 3


def test_a_ticket_in_the_place_of_its_ancestor_is_noticed() -> None:
    ticket = combine(Combine(rule="intersection"), [A, A, ANCESTOR], NAMES)
    with pytest.raises(PlanError, match="made over dense weights, but the ancestor has a mask"):
        controlled(Control(kind="shuffled", seed=1), [ticket, ticket])


def test_zeros_in_the_place_of_new_weights_are_noticed() -> None:
    ticket = combine(Combine(rule="intersection"), [A, A, ANCESTOR], NAMES)
    unmasked = replace(ticket, masks={})  # what is left when a mask is dropped and the weights are not
    with pytest.raises(StageFailed, match="zeros stand where new weights of 'a.weight' should be"):
        controlled(Control(kind="random-layer", seed=1), [ticket, unmasked])


def test_a_reinit_of_the_same_init_is_noticed() -> None:
    ticket = combine(Combine(rule="intersection"), [A, A, ANCESTOR], NAMES)
    with pytest.raises(StageFailed, match="the ancestor's own"):
        controlled(Control(kind="reinitialised", seed=0), [ticket, ANCESTOR, ANCESTOR])


def test_what_a_ticket_takes_along_is_remarked() -> None:
    ticket = combine(Combine(rule="intersection"), [A, B, ANCESTOR], NAMES)
    other = State(weights={name: tensor + 1 for name, tensor in ANCESTOR.weights.items()})
    made = transferred(Transfer(leave=("b",)), [ticket, other])
    assert "a.weight" in made.remarks["taken"] and "b.weight" in made.remarks["dense"]
    assert torch.equal(made.weights["b.weight"], other.weights["b.weight"])


# --- As much as in the reference -----------------------------------------------------------------------------------

Counts = list[tuple[int, int, int]]
COUNTS = st.lists(
    st.integers(1, 2000).flatmap(lambda size: st.tuples(st.just(size), st.integers(0, size), st.integers(0, size))),
    min_size=1,
    max_size=4,
)
"""For each tensor its size and two counts of kept weights."""


def states(counts: Counts, which: int) -> State:
    """Random weights that keep the first so many of each tensor."""
    weights = {
        f"{n}.weight": torch.rand(c[0], generator=torch.Generator().manual_seed(n)) + 0.1 for n, c in enumerate(counts)
    }
    masks = {f"{n}.weight": torch.arange(c[0]) < c[which] for n, c in enumerate(counts)}
    return State(weights=weights, masks=masks).masked()


def pruned(op: Prune, state: State, reference: State) -> dict[str, int]:
    sizes = {name: tensor.numel() for name, tensor in state.weights.items()}
    resolved = like_reference(op, state, reference, sizes)
    assert resolved.like == "" and resolved.part == 1

    def nothing_needed(need: str) -> Any:
        raise AssertionError(need)

    done = prune(resolved, Network(weights=state.weights, masks=state.masks), nothing_needed)
    return {name: int(tensor.sum()) for name, tensor in done.masks.items()}


LIKE_LAYERS = Prune(criterion="magnitude", scope="layer", like="layers")
LIKE_OVERALL = Prune(criterion="magnitude", scope="global", like="overall")


@given(COUNTS)
def test_each_layer_keeps_exactly_what_the_reference_keeps(counts: Counts) -> None:
    ordered = [(size, max(one, other), min(one, other)) for size, one, other in counts]
    found = pruned(LIKE_LAYERS, states(ordered, 1), states(ordered, 2))
    assert list(found.values()) == [count for _, _, count in ordered]


@given(COUNTS)
def test_overall_exactly_as_many_stay_as_in_the_reference(counts: Counts) -> None:
    now, wanted = sum(c[1] for c in counts), sum(c[2] for c in counts)
    which, reference = (1, 2) if now >= wanted else (2, 1)
    found = pruned(LIKE_OVERALL, states(counts, which), states(counts, reference))
    assert sum(found.values()) == min(now, wanted)


@given(COUNTS, st.integers(1, 12))
def test_in_parts_the_last_has_the_reference_s_counts(counts: Counts, rounds: int) -> None:
    """Never more than before, in every layer; equal rates as far as whole weights allow."""
    state, reference = states([(size, size, size) for size, _, _ in counts], 0), states(counts, 2)
    state = replace(state, masks={})
    for place in range(1, rounds + 1):
        part = round(place / rounds, 12)
        found = pruned(replace(LIKE_LAYERS, part=part), state, reference)
        wanted = [round(size * (count / size) ** part) for size, _, count in counts]
        assert list(found.values()) == wanted
        masks = {name: torch.arange(tensor.numel()) < found[name] for name, tensor in state.weights.items()}
        state = replace(state, masks=masks)
    assert list(found.values()) == [count for _, _, count in counts]


@pytest.mark.parametrize("op", [LIKE_LAYERS, LIKE_OVERALL])
def test_pruning_to_more_than_there_is_fails_and_says_so(op: Prune) -> None:
    with pytest.raises(StageFailed, match="pruning cannot add weights: .* keeps 2, and 4 are to be left"):
        pruned(op, states([(8, 2, 4)], 1), states([(8, 2, 4)], 2))


def test_the_floor_does_not_hold_back_what_the_reference_dropped() -> None:
    assert pruned(replace(LIKE_LAYERS, floor=1), states([(8, 8, 0)], 1), states([(8, 8, 0)], 2)) == {"0.weight": 0}
