"""States in the coordinates of a shrunk model, to be trained there, and back in full."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from orchestrator.errors import StageFailed
from orchestrator.state import State, of_model

if TYPE_CHECKING:
    from orchestrator.removal.shrinking import Shrunk


def in_part(state: State, shrunk: Shrunk) -> State:
    """The state in the coordinates of its shrunk model.

    Raises:
        StageFailed: the shrunk model has other parameters than the whole one, so that they cannot go back and forth.
    """
    from orchestrator.removal.shrinking import narrow

    weights = narrow(state.weights, shrunk.kept)
    others = of_model(shrunk.model).keys() ^ weights.keys()
    if others:
        raise StageFailed(f"cannot train the shrunk model: {min(others)!r} is in only one of it and the whole model")
    masks = {name: mask for name, mask in narrow(state.masks, shrunk.kept).items() if not mask.all()}
    optimizer: dict[str, Tensor] = {}
    for slot, moments in _by_slot(state.optimizer).items():
        optimizer |= _named(slot, narrow(moments, shrunk.kept))
    gathered: dict[str, Tensor] = {}
    for what, sums in _by_slot(state.gathered).items():
        gathered |= _named(what, narrow(sums, shrunk.kept))
    return replace(state, weights=weights, masks=masks, optimizer=optimizer, gathered=gathered)


def in_full(small: State, whole: State, shrunk: Shrunk, trained: Sequence[str]) -> State:
    """The inverse of `in_part`: what was cut away is masked and zero, as it is in `whole`.

    Args:
        small: trained in the shrunk model's coordinates.
        whole: the state that it was made of, in full ones.
        shrunk: of `whole`.
        trained: the names of all parameters that the whole model would train; each of them has its optimizer slots.
    """
    from orchestrator.removal.shrinking import scatter

    optimizer: dict[str, Tensor] = {}
    for slot, moments in _by_slot(small.optimizer).items():
        single = next((moment for moment in moments.values() if not moment.dim()), None)
        nothing = {name: torch.zeros_like(whole.weights[name]) if single is None else single for name in trained}
        optimizer |= _named(slot, scatter(moments, shrunk.kept, nothing))
    gathered = dict(whole.gathered)
    for what, sums in _by_slot(small.gathered).items():
        before = {n: whole.gathered.get(f"{what}/{n}", torch.zeros_like(whole.weights[n])) for n in sums}
        gathered |= _named(what, scatter(sums, shrunk.kept, before))
    weights = scatter(small.weights, shrunk.kept, whole.weights)
    return replace(small, weights=weights, masks=whole.masks, optimizer=optimizer, gathered=gathered).masked()


def _by_slot(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors named "slot/parameter", by slot."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        slot, _, parameter = name.partition("/")
        found.setdefault(slot, {})[parameter] = tensor
    return found


def _named(slot: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{slot}/{name}": tensor for name, tensor in tensors.items()}
