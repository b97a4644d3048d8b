"""Each kind of control is what its name says, with exactly as many weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from orchestrator.errors import PlanError, StageFailed, UnknownName
from orchestrator.state import State
from orchestrator.tickets.controls import CONTROLS
from orchestrator.tickets.verified import control

KINDS = CONTROLS.names


def net(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return State(
        weights={
            "fc.weight": torch.randn(4, 6, generator=generator),
            "fc.bias": torch.randn(4, generator=generator),
            "out.weight": torch.randn(3, 4, generator=generator),
            "norm.count": torch.tensor(seed),
        },
        position=7,
    )


def magnitudes(state: State) -> dict[str, Tensor]:
    return {name: state.weights[name].abs() for name in ("fc.weight", "out.weight")}


def ticket_of(ancestor: State, fc: int = 9, out: int = 5) -> State:
    """The largest of each layer."""
    masks = {}
    for (name, scores), keep in zip(magnitudes(ancestor).items(), (fc, out), strict=True):
        mask = torch.zeros(scores.numel(), dtype=torch.bool)
        mask[scores.reshape(-1).argsort(descending=True)[:keep]] = True
        masks[name] = mask.reshape(scores.shape)
    return State(weights=ancestor.weights, masks=masks, position=7).masked()


def made(kind: str, seed: int = 3, **given: Any) -> State:
    ancestor = net(0)
    return control(kind, given.pop("ticket", ticket_of(ancestor)), ancestor, seed=seed, other=net(1), **given)


def kept(state: State) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in state.masks.items()}


def test_the_kinds_there_are() -> None:
    assert KINDS == [
        "shuffled",
        "random",
        "random-layer",
        "inverted",
        "reinitialised",
        "sign-kept",
        "sign-constant",
    ]
    assert all(entry.summary for entry in CONTROLS)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 2**40), fc=st.integers(0, 24), out=st.integers(1, 11))
@settings(max_examples=25)
def test_every_kind_keeps_exactly_as_many(kind: str, seed: int, fc: int, out: int) -> None:
    found = made(kind, seed, ticket=ticket_of(net(0), fc, out))
    if kind == "random":
        assert sum(kept(found).values()) == fc + out
    else:
        assert kept(found) == {"fc.weight": fc, "out.weight": out}
    for name, mask in found.masks.items():
        assert not found.weights[name][~mask].any()
        assert found.weights[name][mask].all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_made_again_by_its_seed(kind: str) -> None:
    first, again = made(kind), made(kind)
    assert all(torch.equal(first.weights[name], again.weights[name]) for name in first.weights)
    if kind in ("shuffled", "random", "random-layer"):
        assert any(not torch.equal(mask, made(kind, 4).masks[name]) for name, mask in first.masks.items())


@pytest.mark.parametrize("kind", ["shuffled", "random", "random-layer", "inverted"])
def test_other_masks_stand_over_the_ancestors_unmasked_weights(kind: str) -> None:
    found, ancestor = made(kind), net(0)
    for name, mask in found.masks.items():
        assert torch.equal(found.weights[name][mask], ancestor.weights[name][mask])
        assert not torch.equal(mask, ticket_of(ancestor).masks[name])
    assert torch.equal(found.weights["fc.bias"], ancestor.weights["fc.bias"])
    assert found.position == 7


@pytest.mark.parametrize("kind", ["shuffled", "random-layer"])
def test_a_shuffle_favours_no_other_mask(kind: str) -> None:
    ancestor = State(weights={"w": torch.arange(1.0, 4.0)})
    ticket = State(weights=ancestor.weights, masks={"w": torch.tensor([True, False, False])}).masked()
    counts = torch.zeros(3)
    for seed in range(300):
        counts += control(kind, ticket, ancestor, seed=seed).masks["w"]
    assert counts[0] == 0
    assert abs(counts[1] - 150) < 45


def test_the_inverse_keeps_the_lowest_scores() -> None:
    ancestor = net(0)
    scores = magnitudes(ancestor)
    found = made("inverted", scores=scores)
    for name, mask in found.masks.items():
        assert scores[name][mask].max() < scores[name][~mask].min()


def test_the_inverse_of_a_dense_layer_keeps_its_worst_besides() -> None:
    ancestor = net(0)
    scores = magnitudes(ancestor)
    ticket = ticket_of(ancestor, fc=20, out=8)
    found = made("inverted", ticket=ticket, scores=scores)
    assert int((found.masks["fc.weight"] & ticket.masks["fc.weight"]).sum()) == 16
    assert scores["fc.weight"][found.masks["fc.weight"]].max() < scores["fc.weight"][~found.masks["fc.weight"]].min()


def test_without_scores_the_inverse_is_drawn_from_what_was_dropped() -> None:
    ticket = ticket_of(net(0))
    drawn = {tuple(made("inverted", seed).masks["fc.weight"].reshape(-1).tolist()) for seed in range(5)}
    assert len(drawn) == 5
    assert not (made("inverted").masks["fc.weight"] & ticket.masks["fc.weight"]).any()


def test_a_reinit_is_the_same_mask_over_the_other_init() -> None:
    found, other = made("reinitialised"), net(1)
    for name, mask in ticket_of(net(0)).masks.items():
        assert torch.equal(found.masks[name], mask)
        assert torch.equal(found.weights[name], other.weights[name] * mask)
    assert torch.equal(found.weights["fc.bias"], other.weights["fc.bias"])
    assert found.weights["norm.count"] == 1


def test_signs_are_kept_and_sizes_are_not() -> None:
    ancestor, other = net(0), net(1)
    drawn, constant = made("sign-kept"), made("sign-constant")
    for name, mask in ticket_of(ancestor).masks.items():
        for found in (drawn, constant):
            assert torch.equal(found.weights[name].sign(), ancestor.weights[name].sign() * mask)
        assert torch.equal(drawn.weights[name].abs(), other.weights[name].abs() * mask)
        sizes = torch.tensor(sorted(set(constant.weights[name][mask].abs().tolist())))
        assert sizes.tolist() == pytest.approx([float(other.weights[name].std(correction=0))])


def test_what_is_missing_is_named() -> None:
    ancestor = net(0)
    ticket = ticket_of(ancestor)
    with pytest.raises(UnknownName, match="unknown control 'shufled'; did you mean 'shuffled'"):
        control("shufled", ticket, ancestor, seed=0)
    for kind in KINDS:
        with pytest.raises(PlanError, match="has no seed"):
            control(kind, ticket, ancestor, seed=None, other=net(1))
    with pytest.raises(PlanError, match="control 'reinitialised' needs the state of another init"):
        control("reinitialised", ticket, ancestor, seed=0)
    with pytest.raises(PlanError, match="but the ancestor has a mask of 'fc.weight'"):
        control("shuffled", ticket, ticket, seed=0)
    with pytest.raises(PlanError, match=r"the other init has no 'fc.weight' of shape \(4, 6\)"):
        control("reinitialised", ticket, ancestor, seed=0, other=State(weights={"fc.weight": torch.ones(6, 4)}))


def test_where_nothing_can_differ_there_is_no_control() -> None:
    ancestor = net(0)
    for kind in ("shuffled", "random-layer", "random"):
        with pytest.raises(StageFailed, match="is full or empty, so that no mask can differ"):
            control(kind, ticket_of(ancestor, 24, 12), ancestor, seed=0)
