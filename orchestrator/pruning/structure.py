"""Units: weights that are removed as one, and masks that remove them.

A unit is a neuron, a filter, a channel, an attention head or a whole layer. It owns positions along one dimension of
each tensor that makes it (weight, bias, a norm's scale and shift) and of each tensor that reads it, so that masking all
of these removes it exactly: nothing of it is left that could reach an output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from orchestrator.registry import Registry

Role = Literal["makes", "norm", "reads", "buffer"]
"""What a tensor is to a unit: makes it (weight and bias), normalises it (scale and shift), reads it, or keeps figures
of it that are no parameters (running statistics), which are cut with it and never masked."""


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Where the units of one group lie in one tensor.

    Args:
        tensor: the parameter's or buffer's name; a tied parameter's first.
        dim: the dimension along which the units lie.
        owner: int64 of shape (size of `dim`,): the unit that owns each position, or -1 where none does.
        role: what the tensor is to the units.
    """

    tensor: str
    dim: int
    owner: Tensor
    role: Role


@dataclass(frozen=True, kw_only=True)
class Units:
    """Units of one kind that lie side by side, such as the channels of all layers that a residual sum ties together.

    Args:
        name: the label of the first layer that makes them.
        count: how many there are, kept or not.
        slices: everything that is masked, or cut, with a unit.
    """

    name: str
    count: int
    slices: tuple[Slice, ...]


NORMS: Registry[Callable[[Tensor, Tensor, int], Tensor]] = Registry("norm")
"""How the scores of a unit's weights become one score: from (scores, owner, units), both of shape (n,), to (units,)."""
norm = NORMS.register


@norm("l1")
def l1(scores: Tensor, owner: Tensor, units: int) -> Tensor:
    """Sum of the absolute scores (Li et al., 2017)."""
    return _added(scores.abs(), owner, units)


@norm("l2")
def l2(scores: Tensor, owner: Tensor, units: int) -> Tensor:
    """Root of the sum of the squared scores (He et al., 2018)."""
    return _added(scores.square(), owner, units).sqrt()


@norm("linf")
def linf(scores: Tensor, owner: Tensor, units: int) -> Tensor:
    """The largest absolute score."""
    return scores.new_zeros(units).scatter_reduce(0, owner, scores.abs(), "amax")


@norm("sum")
def total(scores: Tensor, owner: Tensor, units: int) -> Tensor:
    """Sum of the scores, signs kept: for scores that add up, as first-order changes of the loss do."""
    return _added(scores, owner, units)


@norm("mean")
def mean(scores: Tensor, owner: Tensor, units: int) -> Tensor:
    """Mean of the scores, signs kept: makes units of different sizes comparable."""
    return _added(scores, owner, units) / _added(torch.ones_like(scores), owner, units).clamp(min=1)


@norm("first")
def first(scores: Tensor, owner: Tensor, units: int) -> Tensor:
    """The score of the unit's first weight: for scores that are drawn, of which a unit needs one."""
    places = torch.arange(scores.numel(), device=scores.device)
    earliest = torch.zeros(units, dtype=torch.int64, device=scores.device)
    return scores[earliest.scatter_reduce(0, owner, places, "amin", include_self=False)]


def unit_scores(units: Units, scores: Mapping[str, Tensor], norm: str, roles: Sequence[Role]) -> Tensor:
    """One score for each unit, in double precision: shape (units.count,).

    Args:
        units: whose units to score.
        scores: of single weights, by tensor name and of the tensor's shape; tensors without scores are passed over.
        norm: the name of how scores are put together.
        roles: which of a unit's tensors count.
    """
    parts, owners = [], []
    for piece in units.slices:
        if piece.role in roles and piece.tensor in scores:
            table = scores[piece.tensor].double().movedim(piece.dim, 0)
            owned = piece.owner >= 0
            width = table[0].numel()
            parts.append(table[owned].reshape(-1))
            owners.append(piece.owner[owned].repeat_interleave(width))
    assert parts, f"no tensor of {units.name!r} is scored"
    return NORMS[norm].function(torch.cat(parts), torch.cat(owners), units.count)


def kept_units(units: Units, masks: Mapping[str, Tensor]) -> Tensor:
    """Which units are kept, bool of shape (units.count,): those of which anything that makes them is."""
    kept = torch.zeros(units.count, dtype=torch.bool)
    for piece in units.slices:
        if piece.role != "makes":
            continue
        alive = piece.owner >= 0
        if piece.tensor in masks:
            alive = alive & masks[piece.tensor].movedim(piece.dim, 0).reshape(len(alive), -1).any(dim=1)
        kept[piece.owner[alive]] = True
    return kept


def rounded(kept: int, count: int, multiple: int) -> int:
    """`kept` of `count` units, rounded up to a multiple where there are enough."""
    assert 0 <= kept <= count and multiple >= 1, (kept, count, multiple)
    return min(count, -(-kept // multiple) * multiple)


def without(
    units: Iterable[tuple[Units, Tensor]], masks: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    """The masks without the units that are not kept; every tensor that one of them touches gets a mask.

    Args:
        units: each group with its kept units, bool of shape (count,).
        masks: before; a tensor without one is dense.
        shapes: of every parameter.
    """
    after = dict(masks)
    for group, kept in units:
        for piece in group.slices:
            if piece.role == "buffer":
                continue
            shape = tuple(shapes[piece.tensor])
            stays = kept[piece.owner.clamp(min=0)] | (piece.owner < 0)
            view = [1] * len(shape)
            view[piece.dim] = -1
            mask = after.get(piece.tensor)
            mask = torch.ones(shape, dtype=torch.bool) if mask is None else mask
            after[piece.tensor] = mask & stays.view(view)
    return after


def _added(values: Tensor, owner: Tensor, units: int) -> Tensor:
    return values.new_zeros(units).index_add(0, owner, values)
