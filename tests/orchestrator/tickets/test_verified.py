"""Canaries: every way in which a published control was silently none is planted, and caught."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from orchestrator.errors import PlanError, StageFailed
from orchestrator.state import State
from orchestrator.tickets.controls import CONTROLS
from orchestrator.tickets.verified import control, verify
from tests.orchestrator.tickets.test_controls import KINDS, magnitudes, net, ticket_of

OVER_ANCESTOR = ["shuffled", "random", "random-layer", "inverted"]
OVER_OTHER = ["reinitialised", "sign-kept", "sign-constant"]

ANCESTOR, OTHER = net(0), net(1)
TICKET = ticket_of(ANCESTOR)
TRAINED = replace(
    TICKET, weights={name: w + 1 if w.is_floating_point() else w for name, w in ANCESTOR.weights.items()}
).masked()


def honest(kind: str) -> State:
    return control(kind, TICKET, ANCESTOR, seed=3, other=OTHER, scores=magnitudes(ANCESTOR), trained=TRAINED)


def caught(kind: str, planted: State, reason: str, *, ancestor: State = ANCESTOR, other: State = OTHER) -> None:
    with pytest.raises(StageFailed, match=f"^control '{kind}' does not control: {reason}"):
        verify(kind, TICKET, ancestor, planted, seed=3, other=other, trained=TRAINED)


def over(weights: State, masks: dict[str, Tensor]) -> State:
    return replace(weights, masks=masks).masked()


@pytest.mark.parametrize("kind", KINDS)
def test_an_honest_control_passes(kind: str) -> None:
    verify(kind, TICKET, ANCESTOR, honest(kind), seed=3, other=OTHER, trained=TRAINED)


@pytest.mark.parametrize("kind", OVER_ANCESTOR)
def test_canary_a_shuffle_that_moves_nothing(kind: str) -> None:
    caught(
        kind, over(ANCESTOR, dict(TICKET.masks)), "(the mask of 'fc.weight' is|the masks are) the ticket's own|it keeps"
    )


def test_canary_one_layer_that_is_not_shuffled() -> None:
    masks = {**honest("shuffled").masks, "out.weight": TICKET.masks["out.weight"]}
    caught("shuffled", over(ANCESTOR, masks), "the mask of 'out.weight' is the ticket's own")


@pytest.mark.parametrize("kind", OVER_ANCESTOR)
def test_canary_zeros_where_new_weights_should_be(kind: str) -> None:
    """The new mask over the ticket's weights instead of the ancestor's."""
    masks = dict(honest(kind).masks)
    caught(kind, over(replace(TICKET, masks={}), masks), "zeros stand where new weights of '.*' should be$")


@pytest.mark.parametrize("kind", OVER_ANCESTOR)
def test_canary_an_ancestor_that_was_masked_before(kind: str) -> None:
    masked = replace(TICKET, masks={})
    caught(kind, over(masked, dict(honest(kind).masks)), ".*they were masked before$", ancestor=masked)


@pytest.mark.parametrize("kind", OVER_ANCESTOR)
def test_canary_weights_that_were_never_reset(kind: str) -> None:
    trained = State(weights=TRAINED.weights)
    masks = dict(honest(kind).masks)
    if kind != "inverted":
        caught(kind, over(trained, masks), "(the weights of|zeros stand)")
    dense = replace(ANCESTOR, weights={n: w + 1 if w.is_floating_point() else w for n, w in ANCESTOR.weights.items()})
    if any((mask & TICKET.masks[name]).any() for name, mask in masks.items()):
        caught(kind, over(dense, masks), "its weights are the trained ones: they were never reset$", ancestor=dense)
    caught(kind, over(dense, masks), "the values of 'fc.bias'|the weights of 'fc.weight' are not the ancestor's$")


@pytest.mark.parametrize("kind", OVER_OTHER)
def test_canary_a_reinit_that_returns_trained_weights(kind: str) -> None:
    trained = State(weights=TRAINED.weights)
    caught(kind, over(trained, dict(TICKET.masks)), "(the weights|the signs) of 'fc.weight' are not the")
    dense = replace(ANCESTOR, weights={n: w + 1 if w.is_floating_point() else w for n, w in ANCESTOR.weights.items()})
    caught(
        kind, over(dense, dict(TICKET.masks)), "its weights are the trained ones: they were never reset$", other=dense
    )


@pytest.mark.parametrize("kind", OVER_OTHER)
def test_canary_a_reinit_that_returns_the_same_weights(kind: str) -> None:
    same = over(ANCESTOR, dict(TICKET.masks))
    caught(kind, same, "the weights of 'fc.weight' are not the other init's$")
    caught(kind, same, "the other init's 'fc.weight' is the ancestor's own$", other=ANCESTOR)


def test_canary_a_reinit_that_leaves_one_layer_as_it_was() -> None:
    weights = {**OTHER.weights, "out.weight": ANCESTOR.weights["out.weight"]}
    half = replace(OTHER, weights=weights)
    caught(
        "reinitialised",
        over(half, dict(TICKET.masks)),
        "the other init's 'out.weight' is the ancestor's own$",
        other=half,
    )
    caught("reinitialised", over(half, dict(TICKET.masks)), "the weights of 'out.weight' are not the other init's$")


@pytest.mark.parametrize("kind", OVER_OTHER)
def test_canary_zeros_in_a_reinit(kind: str) -> None:
    found = honest(kind)
    weights = {**found.weights, "out.weight": torch.zeros(3, 4)}
    caught(kind, replace(found, weights=weights), "zeros stand where new weights of 'out.weight' should be$")


@pytest.mark.parametrize("kind", OVER_OTHER)
def test_canary_another_mask_in_a_reinit(kind: str) -> None:
    caught(kind, over(OTHER, dict(honest("shuffled").masks)), "the mask of 'fc.weight' is not the ticket's$")


@pytest.mark.parametrize("kind", KINDS)
def test_canary_a_missing_seed(kind: str) -> None:
    with pytest.raises(PlanError, match=f"^control '{kind}' has no seed; legal: a whole number"):
        verify(kind, TICKET, ANCESTOR, honest(kind), seed=None, other=OTHER)


@pytest.mark.parametrize("kind", KINDS)
def test_canary_another_sparsity(kind: str) -> None:
    masks = {name: mask.clone() for name, mask in honest(kind).masks.items()}
    masks["fc.weight"].view(-1)[int((~masks["fc.weight"]).reshape(-1).long().argmax())] = True
    caught(kind, over(ANCESTOR, masks), "it keeps (10 weights of 'fc.weight', the ticket 9|15 weights)|the mask of")


def test_canary_the_right_count_in_the_wrong_layers() -> None:
    masks = {"fc.weight": torch.zeros(4, 6).bool(), "out.weight": torch.ones(3, 4).bool()}
    masks["fc.weight"][0, :2] = True
    verify("random", TICKET, ANCESTOR, over(ANCESTOR, masks), seed=3)
    caught("shuffled", over(ANCESTOR, masks), "it keeps 2 weights of 'fc.weight', the ticket 9$")


@pytest.mark.parametrize("kind", KINDS)
def test_canary_values_under_the_mask(kind: str) -> None:
    found = honest(kind)
    weights = {**found.weights, "fc.weight": found.weights["fc.weight"] + 1}
    caught(kind, replace(found, weights=weights), "masked weights of 'fc.weight' have values$")


@pytest.mark.parametrize("kind", KINDS)
def test_canary_one_weight_or_bias_that_is_wrong(kind: str) -> None:
    found = honest(kind)
    for name in ("fc.weight", "fc.bias", "norm.count"):
        planted = found.weights[name].clone()
        planted.view(-1)[int(planted.reshape(-1).ne(0).long().argmax())] *= 2
        if torch.equal(planted, found.weights[name]):
            planted += 1
        caught(
            kind, replace(found, weights={**found.weights, name: planted}), f"the (weights|values) of '{name}' are not"
        )


@pytest.mark.parametrize("kind", ["sign-kept", "sign-constant"])
def test_canary_a_sign_that_was_not_kept(kind: str) -> None:
    found = honest(kind)
    caught(kind, replace(found, weights={**found.weights, "out.weight": -found.weights["out.weight"]}), "the signs of")


def test_canary_an_inverse_that_keeps_what_the_ticket_keeps() -> None:
    caught(
        "inverted",
        over(ANCESTOR, dict(TICKET.masks)),
        "it keeps 9 of the ticket's weights in 'fc.weight', where 0 would",
    )


def test_canary_tensors_that_went_missing() -> None:
    found = honest("shuffled")
    caught(
        "shuffled", replace(found, masks={"fc.weight": found.masks["fc.weight"]}), "it is not of the ticket's tensors"
    )


def test_a_layer_may_start_from_one_constant() -> None:
    ones = {"fc.weight": torch.zeros(4, 6)}
    ancestor = replace(ANCESTOR, weights={**ANCESTOR.weights, **ones})
    other = replace(OTHER, weights={**OTHER.weights, **ones})
    ticket = replace(TICKET, weights={**TICKET.weights, **ones})
    for kind in ("reinitialised", "sign-kept", "shuffled"):
        control(kind, ticket, ancestor, seed=3, other=other)


def test_every_kind_has_its_canaries() -> None:
    assert {entry.name for entry in CONTROLS} == {*OVER_ANCESTOR, *OVER_OTHER}
