"""What is ranked: single weights, blocks of them, or units, layer by layer; and the masks that keep some of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor

from orchestrator.errors import StageFailed
from orchestrator.ops import Prune
from orchestrator.pruning.allocation import PROTECTED, Tensors, by_group
from orchestrator.pruning.masks import count
from orchestrator.pruning.patterns import block_owner, turned
from orchestrator.pruning.structure import Role, Slice, Units, kept_units, unit_scores
from orchestrator.tasks.info import Piece


@dataclass(frozen=True, kw_only=True)
class Part:
    """Things of one layer: its weights, its blocks, or the units of a group.

    Args:
        name: of the tensor or the group.
        scores: one for each thing; for weights of the tensor's shape.
        among: which of them are kept now and may go, of the scores' shape; None: all.
        magnitudes: the sizes of the things at flat places, which decide between equal scores.
        held: which of them are protected; None: none.
    """

    name: str
    scores: Tensor
    among: Tensor | None
    magnitudes: Callable[[Tensor], Tensor]
    held: Tensor | None = None

    @property
    def kept(self) -> int:
        """How many are kept now and may go."""
        return self.scores.numel() if self.among is None else count(self.among)

    @property
    def aside(self) -> int:
        """How many are protected."""
        return 0 if self.held is None else count(self.held)


@dataclass(frozen=True, kw_only=True)
class Things:
    """Everything that may be ranked under an op.

    Args:
        op: with factors and targets under the names of the parts.
        parts: of what is not protected.
        counts: of everything, protected or not, by layer.
    """

    op: Prune
    parts: tuple[Part, ...]
    counts: Tensors


def single_weights(
    op: Prune, scores: Mapping[str, Tensor], weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> Things:
    """The weights of every scored tensor; the others are protected."""
    parts = tuple(
        Part(name=name, scores=found, among=masks.get(name), magnitudes=partial(_sizes, weights[name]))
        for name, found in scores.items()
    )
    kept = {name: count(masks[name]) if name in masks else weight.numel() for name, weight in weights.items()}
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    return Things(op=op, parts=parts, counts=Tensors(shapes=shapes, kept=kept))


def grouped(
    op: Prune,
    groups: Sequence[Units],
    scores: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    *,
    norm: str,
    roles: tuple[Role, ...],
) -> Things:
    """The units of every group.

    Args:
        op: protects the units of which it protects a maker.
        groups: of units; blocks are units of flat tensors.
        scores: of weights, by tensor; a protected tensor has none.
        weights: all prunable ones.
        masks: of all parameters; one without is dense.
        norm: how the scores of weights become one of a unit.
        roles: which tensors of a unit are scored.

    Raises:
        StageFailed: the units of a group have no weights of these roles.
    """
    asked, shapes = by_group(op, {group.name: made_by(group, weights) for group in groups})
    protected = {name for name, factor in op.factors if factor == 0}
    parts, kept = [], {}
    for group in groups:
        alive = kept_units(group, masks)
        held = torch.zeros(group.count, dtype=torch.bool)
        for owned in _made(group, protected).values():
            held |= owned
        if group.name + PROTECTED in shapes:
            kept[group.name + PROTECTED] = count(alive & held)
        if group.name not in shapes:
            continue
        if not any(piece.tensor in scores and piece.role in roles for piece in group.slices):
            raise StageFailed(
                f"criterion {op.criterion!r} scores a unit over the weights that read it, and no prunable weight reads "
                f"those of {group.name!r}"
            )
        part = Part(
            name=group.name,
            scores=unit_scores(group, scores, norm, roles),
            among=alive & ~held,
            magnitudes=partial(_unit_sizes, group, weights, masks),
            held=held,
        )
        parts.append(part)
        kept[group.name] = part.kept
    return Things(op=asked, parts=tuple(parts), counts=Tensors(shapes=shapes, kept=kept))


def made_by(group: Units, names: Collection[str]) -> dict[tuple[str, ...], int]:
    """How many of a group's units are made by which of the tensors `names` together."""
    made = _made(group, names)
    if not made:
        return {(): group.count}
    rows, counts = torch.unique(torch.stack(list(made.values())), dim=1, return_counts=True)
    tensors = list(made)
    return {
        tuple(name for name, makes in zip(tensors, column.tolist(), strict=True) if makes): number
        for column, number in zip(rows.T, counts.tolist(), strict=True)
    }


def pieces(group: Units, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Piece, ...]:
    """Where the units of a group lie in the parameters called by `shapes`, as plain data."""
    return tuple(
        Piece(
            tensor=piece.tensor,
            dim=piece.dim,
            size=shapes[piece.tensor][piece.dim],
            role=piece.role,
            widths=tuple(torch.bincount(piece.owner[piece.owner >= 0], minlength=group.count).tolist()),
            numel=prod(shapes[piece.tensor]),
        )
        for piece in group.slices
        if piece.role != "buffer"
    )


def blocks(shapes: Mapping[str, Sequence[int]], rows: int, columns: int, transposed: Mapping[str, int]) -> list[Units]:
    """Each tensor's blocks as units of the flat tensor.

    Args:
        shapes: with the outputs first.
        rows, columns: of a block.
        transposed: the groups of tensors that really lie inputs first.
    """
    groups = []
    for name, shape in shapes.items():
        owner, number = block_owner(shape, rows, columns)
        owner = turned(owner, transposed[name]) if name in transposed else owner
        piece = Slice(tensor=name, dim=0, owner=owner.reshape(-1), role="makes")
        groups.append(Units(name=name, count=number, slices=(piece,)))
    return groups


def _sizes(weight: Tensor, places: Tensor) -> Tensor:
    """The magnitudes of the weights at flat places."""
    return weight.reshape(-1)[places].abs()


def _unit_sizes(group: Units, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], places: Tensor) -> Tensor:
    mine = {piece.tensor for piece in group.slices if piece.tensor in weights}
    kept = {name: weights[name].where(masks[name], 0) if name in masks else weights[name] for name in mine}
    return unit_scores(group, kept, "l2", ("makes",))[places]


def _made(group: Units, names: Collection[str]) -> dict[str, Tensor]:
    """For each of the tensors that makes units, which it makes: bool of shape (units,)."""
    made: dict[str, Tensor] = {}
    for piece in group.slices:
        if piece.role == "makes" and piece.tensor in names:
            owned = made.setdefault(piece.tensor, torch.zeros(group.count, dtype=torch.bool))
            owned[piece.owner[piece.owner >= 0]] = True
    return made
