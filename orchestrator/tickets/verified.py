"""Controls that cannot lie: each is made and then checked, bit for bit, against what its kind promises.

Four published implementations had a control that was silently none: a shuffle that rebound a local name, zeros where
new weights should have been, weights that were never reset, a statistic of the wrong weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from orchestrator.errors import PlanError, StageFailed
from orchestrator.state import State
from orchestrator.tickets.controls import CONTROLS, layer_constant
from orchestrator.tickets.packed import Masks


def control(
    kind: str,
    ticket: State,
    ancestor: State,
    *,
    seed: int | None,
    other: State | None = None,
    scores: Mapping[str, Tensor] | None = None,
    trained: State | None = None,
) -> State:
    """The control of that kind, verified.

    Args:
        kind: a name in `CONTROLS`.
        ticket: the masks that are controlled, over their starting weights.
        ancestor: the dense state whose weights the ticket starts from, unmasked.
        seed: of the draw; for kinds over another init, that init's seed.
        other: that init's state, for the kinds that need one.
        scores: that the ticket's masks were chosen by, for "inverted".
        trained: the trained state that the ticket was found in, to see that its weights were reset.

    Raises:
        UnknownName: there is no such kind.
        PlanError: the seed or the other init is missing, or the states are not of one model.
        StageFailed: the control does not control; the message says why.
    """
    function, needs = CONTROLS[kind].function, CONTROLS[kind].facts["needs"]
    _check_given(kind, ticket, ancestor, seed, other)
    given = {"other": other, "scores": scores}
    made = function(ticket, ancestor, seed, **{need: given[need] for need in needs})
    verify(kind, ticket, ancestor, made, seed=seed, other=other, trained=trained)
    return made


def verify(
    kind: str,
    ticket: State,
    ancestor: State,
    made: State,
    *,
    seed: int | None,
    other: State | None = None,
    trained: State | None = None,
) -> None:
    """See that `made` controls: its masks and weights are exactly what the kind promises. Arguments as for `control`.

    Raises:
        PlanError: the seed or the other init is missing, or the states are not of one model.
        StageFailed: a shuffle that moved nothing, other counts than the ticket's, zeros where new weights should be,
            weights that were never reset, or an init that is no other one; the message names the tensor.
    """
    facts = CONTROLS[kind].facts
    _check_given(kind, ticket, ancestor, seed, other)
    if made.masks.keys() != ticket.masks.keys() or made.weights.keys() != ancestor.weights.keys():
        raise _none(kind, "it is not of the ticket's tensors")
    MASK_RULES[facts["masks"]](kind, ticket.masks, made.masks)
    source = ancestor if facts["weights"] == "ancestor" else other
    assert source is not None
    _verify_dense(kind, ticket, source)
    if trained is not None:
        _verify_reset(kind, made, source, trained)
    if facts["weights"] != "ancestor":
        _verify_other(kind, made, ancestor, source)
    for name in sorted(made.weights, key=lambda name: name not in made.masks):
        _verify_weight(kind, name, made, source, ancestor)


def _check_given(kind: str, ticket: State, ancestor: State, seed: int | None, other: State | None) -> None:
    if seed is None:
        raise PlanError(f"control {kind!r} has no seed; legal: a whole number, so that it can be made again")
    if "other" in CONTROLS[kind].facts["needs"] and other is None:
        raise PlanError(f"control {kind!r} needs the state of another init")
    for what, state in (("ancestor", ancestor), ("other init", other)):
        if state is None:
            continue
        if state.masks:
            name = min(state.masks)
            raise PlanError(f"control {kind!r} is made over dense weights, but the {what} has a mask of {name!r}")
        for name, mask in ticket.masks.items():
            if name not in state.weights or state.weights[name].shape != mask.shape:
                raise PlanError(f"control {kind!r}: the {what} has no {name!r} of shape {tuple(mask.shape)}")


def _none(kind: str, reason: str) -> StageFailed:
    return StageFailed(f"control {kind!r} does not control: {reason}")


def _moved(kind: str, before: Masks, after: Masks) -> None:
    """As many in each layer, and in each layer other ones."""
    _same_counts(kind, before, after)
    if not any(_free(mask) for mask in before.values()):
        raise _none(kind, "every layer is full or empty, so that no mask can differ")
    for name, mask in before.items():
        if _free(mask) and torch.equal(mask, after[name]):
            raise _none(kind, f"the mask of {name!r} is the ticket's own")


def _moved_overall(kind: str, before: Masks, after: Masks) -> None:
    """As many in all, and somewhere other ones."""
    wanted, found = (sum(int(mask.sum()) for mask in masks.values()) for masks in (before, after))
    if wanted != found:
        raise _none(kind, f"it keeps {found} weights, the ticket {wanted}")
    if not 0 < wanted < sum(mask.numel() for mask in before.values()):
        raise _none(kind, "the ticket is full or empty, so that no mask can differ")
    if all(torch.equal(mask, after[name]) for name, mask in before.items()):
        raise _none(kind, "the masks are the ticket's own")


def _inverted(kind: str, before: Masks, after: Masks) -> None:
    """As many in each layer, and no more of the ticket's than must be."""
    _same_counts(kind, before, after)
    for name, mask in before.items():
        common, least = int((mask & after[name]).sum()), max(0, 2 * int(mask.sum()) - mask.numel())
        if common != least:
            raise _none(kind, f"it keeps {common} of the ticket's weights in {name!r}, where {least} would do")


def _same(kind: str, before: Masks, after: Masks) -> None:
    for name, mask in before.items():
        if not torch.equal(mask, after[name]):
            raise _none(kind, f"the mask of {name!r} is not the ticket's")


MASK_RULES = {"moved": _moved, "moved overall": _moved_overall, "inverted": _inverted, "same": _same}
"""What a kind says of its masks in the registry -> how that is seen."""


def _same_counts(kind: str, before: Masks, after: Masks) -> None:
    for name, mask in before.items():
        wanted, found = int(mask.sum()), int(after[name].sum())
        if wanted != found:
            raise _none(kind, f"it keeps {found} weights of {name!r}, the ticket {wanted}")


def _free(mask: Tensor) -> bool:
    return 0 < int(mask.sum()) < mask.numel()


def _verify_dense(kind: str, ticket: State, source: State) -> None:
    for name, mask in ticket.masks.items():
        weight = source.weights[name]
        if _free(mask) and weight.any() and not weight[~mask].any():
            raise _none(kind, f"zeros stand where new weights of {name!r} should be: they were masked before")


def _verify_reset(kind: str, made: State, source: State, trained: State) -> None:
    """The weights it starts from are not those that training ended with, wherever both keep one."""
    compared = False
    for name, mask in made.masks.items():
        both = mask & trained.masks.get(name, torch.ones_like(mask))
        if not torch.equal(source.weights[name][both], trained.weights[name][both]):
            return
        compared = compared or bool(both.any())
    if compared:
        raise _none(kind, "its weights are the trained ones: they were never reset")


def _verify_other(kind: str, made: State, ancestor: State, other: State) -> None:
    for name in made.masks:
        weight = other.weights[name]
        # A layer may well start from one constant under every seed.
        if torch.equal(weight, ancestor.weights[name]) and (weight != weight.reshape(-1)[:1]).any():
            raise _none(kind, f"the other init's {name!r} is the ancestor's own")


def _verify_weight(kind: str, name: str, made: State, source: State, ancestor: State) -> None:
    """Zero under the mask; elsewhere the source's weight, or its size under the ancestor's sign."""
    weight, mask, whole = made.weights[name], made.masks.get(name), source.weights[name]
    whose = "the ancestor's" if source is ancestor else "the other init's"
    if mask is None:
        if not torch.equal(weight, whole):
            raise _none(kind, f"the values of {name!r} are not {whose}")
        return
    if weight[~mask].any():
        raise _none(kind, f"masked weights of {name!r} have values")
    kept, expected = weight[mask], whole[mask]
    if ((kept == 0) & (expected != 0)).any():
        raise _none(kind, f"zeros stand where new weights of {name!r} should be")
    size = SIZES.get(CONTROLS[kind].facts["weights"])
    if size is not None:
        if not torch.equal(torch.signbit(kept), torch.signbit(ancestor.weights[name][mask])):
            raise _none(kind, f"the signs of {name!r} are not the ancestor's")
        kept, expected = kept.abs(), size(whole)[mask]
    if not torch.equal(kept, expected):
        raise _none(kind, f"the weights of {name!r} are not {whose}")


SIZES: Mapping[str, Callable[[Tensor], Tensor]] = {"magnitudes": torch.abs, "constants": layer_constant}
"""What a kind that keeps signs says of its weights in the registry -> their sizes, from the other init's tensor."""
