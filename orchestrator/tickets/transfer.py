"""A ticket tried on another task: its mask and starting weights where the other model has the same tensor."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from orchestrator.errors import PlanError
from orchestrator.state import State


@dataclass(frozen=True, kw_only=True)
class Transferred:
    """The other task's init with the ticket in it.

    Args:
        state: the ticket's masks and values where they fit, the other init's elsewhere, dense.
        taken: the tensors that come from the ticket.
        dense: those that come from the other init.
    """

    state: State
    taken: tuple[str, ...]
    dense: tuple[str, ...]


def transfer(ticket: State, other: State, leave: Collection[str] = ()) -> Transferred:
    """The ticket on another model (Morcos et al., 2019): same body, any head.

    A tensor is taken where its name and shape agree, in the other model's type. A head of the same shape would be taken
    too: name it in `leave`.

    Args:
        ticket: masks over the weights that the ticket starts from; a dense state gives its weights alone.
        other: the other task's init, dense.
        leave: names of tensors that stay the other init's.

    Raises:
        PlanError: no masked tensor fits, or of a dense state none at all; the other init has masks, or `leave` names a
            tensor that it does not have.
    """
    if other.masks:
        raise PlanError(f"a ticket goes into a dense init, but the other has a mask of {min(other.masks)!r}")
    unknown = sorted(set(leave) - other.weights.keys())
    if unknown:
        raise PlanError(f"{unknown[0]!r} cannot be left out: the other model has {', '.join(other.weights)}")
    taken = [
        name
        for name, weight in other.weights.items()
        if name not in leave and name in ticket.weights and ticket.weights[name].shape == weight.shape
    ]
    if not ticket.masks and not taken:
        raise PlanError(f"no tensor fits the other model: it has {', '.join(other.weights)}")
    if ticket.masks and not any(name in ticket.masks for name in taken):
        raise PlanError(f"no masked tensor of the ticket fits the other model: {_first_misfit(ticket, other, leave)}")
    weights = {
        name: ticket.weights[name].to(weight.dtype) if name in taken else weight
        for name, weight in other.weights.items()
    }
    masks = {name: ticket.masks[name] for name in taken if name in ticket.masks}
    return Transferred(
        state=replace(other, weights=weights, masks=masks).masked(),
        taken=tuple(taken),
        dense=tuple(name for name in other.weights if name not in taken),
    )


def _first_misfit(ticket: State, other: State, leave: Collection[str]) -> str:
    for name, mask in ticket.masks.items():
        if name in leave:
            return f"{name!r} is left out"
        if name in other.weights:
            return f"{name!r} is {tuple(mask.shape)} in the ticket, {tuple(other.weights[name].shape)} there"
    return f"it has {', '.join(ticket.masks) or 'no masks'}, the other {', '.join(other.weights)}"
