"""The units of a model by the name of their structure."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from orchestrator.pruning.attention import find_heads
from orchestrator.pruning.coupling import Found, find_units
from orchestrator.pruning.depth import find_layers
from orchestrator.pruning.recurrent import find_recurrent
from orchestrator.pruning.structure import Units
from orchestrator.tasks.data import Nested


def find(model: nn.Module, example: Nested, structure: str, prunable: Sequence[str]) -> Found:
    """The units that can be removed, and for the other layers of that structure why not.

    Args:
        model: stays as it is.
        example: inputs of the model.
        structure: "neuron", "filter", "channel", "head" or "layer".
        prunable: names of the weights that may be pruned.
    """
    if structure == "head":
        return find_heads(model, prunable)
    if structure == "layer":
        return find_layers(model, example, prunable)
    found = find_units(model, example, structure, prunable)
    if structure == "filter":
        return found
    recurrent = find_recurrent(model, example, prunable)
    mine = {group.name for group in recurrent.units}
    refused = {label: reason for label, reason in found.refused.items() if label not in mine}
    return Found(units=(*found.units, *recurrent.units), refused={**refused, **recurrent.refused})


def removable(model: nn.Module, example: Nested, prunable: Sequence[str]) -> tuple[Units, ...]:
    """All units that `shrink` can cut away: of every width, every attention head, and whole layers."""
    return tuple(
        u for structure in ("channel", "head", "layer") for u in find(model, example, structure, prunable).units
    )
