"""How far a model can be pruned at most, counted beforehand: a budget below it is refused before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor, prod

from orchestrator.errors import PlanError
from orchestrator.ops import Prune
from orchestrator.pruning.allocation import PROTECTED, Tensors, at_fraction, by_group, exact, rounded_half_up
from orchestrator.pruning.patterns import block_count, block_size
from orchestrator.tasks.info import Layer, Piece, TaskInfo

DIGITS = 10**4
"""What would be legal is said in so many parts."""


@dataclass(frozen=True, kw_only=True)
class _Rest:
    """What is left at least: of each tensor that shrinks, and of all heads of an attention, a fraction."""

    tensors: Mapping[str, Fraction]
    heads: Mapping[str, Fraction]


def refuse_unreachable(op: Prune, info: TaskInfo) -> None:
    """Refuse a budget, or a sparsity of units, that is not met where all goes that may.

    What may not go is what is protected, held by the floor or filled up by `round_to`, and what the structure does not
    touch. Where units are of unlike sizes, the smallest are taken to stay, so that nothing is refused that can be met.

    Raises:
        PlanError: says how much is left at least, and what would be legal.
    """
    sparsity = op.sparsity if op.structure != "weight" else None
    if op.flops_budget is not None:
        name, asked, what, costs, heads = "flops_budget", op.flops_budget, "FLOPs", info.flops, info.head_flops
    elif op.params_budget is not None and info.parameters:
        name, asked, what, costs, heads = "params_budget", op.params_budget, "parameters", _sizes(op, info), {}
    elif sparsity is not None:
        costs, heads = {layer.name: layer.size for layer in info.layers}, {}
        name, asked, what = "sparsity", sparsity, "prunable weights"
    else:
        return
    whole = sum(costs.values()) + sum(heads.values())
    if not whole:
        return
    rest = _rest(op, info, costs, heads)
    left = _total(costs, rest.tensors) + _total(heads, rest.heads)
    budgeted = sparsity is None
    room = exact(asked) * whole if budgeted else Fraction(whole - rounded_half_up(exact(asked) * whole))
    if left <= room:
        return
    share = left / whole
    legal = (
        f"{ceil(share * DIGITS) / DIGITS:g} or more"
        if budgeted
        else f"{floor((1 - share) * DIGITS) / DIGITS:g} or less"
    )
    holds = [f"prune.floor = {op.floor}"] if op.floor else []
    holds += [f"prune.round_to = {op.round_to}"] if op.round_to > 1 else []
    holds += ["layers of their own factors"] if op.factors else []
    why = f" (with {', '.join(holds)})" if holds else ""
    if share > 1 - Fraction(1, DIGITS):
        legal = "another structure"
    raise PlanError(
        f"{name} {asked:g} cannot be met: structure {op.structure!r} leaves at least {float(share):.4g} of the "
        f"{what}{why}; legal: {legal}"
    )


def _sizes(op: Prune, info: TaskInfo) -> dict[str, int]:
    """The weights of every parameter that can shrink by its name, and of the others under ""."""
    sizes = {layer.name: layer.size for layer in info.layers}
    if op.structure in info.units:
        found = info.units[op.structure].pieces.values()
        sizes |= {piece.tensor: piece.numel for pieces in found for piece in pieces}
    return sizes | {"": info.parameters - sum(sizes.values())}


def _total(costs: Mapping[str, int], left: Mapping[str, Fraction]) -> Fraction:
    return sum((cost * left.get(name, Fraction(1)) for name, cost in costs.items()), Fraction(0))


def _rest(op: Prune, info: TaskInfo, costs: Mapping[str, int], heads: Mapping[str, int]) -> _Rest:
    if op.structure not in info.units:
        return _rest_of_tensors(op, info.layers)
    found = info.units[op.structure]
    asked, shapes = by_group(op, found.groups)
    left = _left(asked, shapes)
    gone: dict[tuple[str, int], Fraction] = {}
    of_heads: dict[str, Fraction] = {}
    for name, pieces in found.pieces.items():
        held = prod(shapes[name + PROTECTED]) if name + PROTECTED in shapes else 0
        count = len(pieces[0].widths)
        stays = held + (_filled(op, left[(name,)], held, count) if name in shapes else 0)
        for piece, removed in _removed(pieces, stays, costs, heads):
            place = (piece.tensor, piece.dim)
            gone[place] = gone.get(place, Fraction(0)) + Fraction(removed, piece.size)
        if op.structure == "head":
            of_heads[name] = Fraction(stays, count)
    tensors: dict[str, Fraction] = {}
    for (tensor, _), share in gone.items():
        tensors[tensor] = tensors.get(tensor, Fraction(1)) * (1 - share)
    # Heads go with the whole layer that they are in.
    of_heads |= {name: tensors[name] for name in heads if op.structure == "layer" and name in tensors}
    return _Rest(tensors=tensors, heads=of_heads)


def _rest_of_tensors(op: Prune, layers: Iterable[Layer]) -> _Rest:
    """Of single weights, or of blocks."""
    block = block_size(op.structure)
    shapes = {layer.name: layer.rows_first for layer in layers}
    counted = shapes if block is None else {name: (block_count(shape, *block),) for name, shape in shapes.items()}
    tensors = {}
    for (name,), kept in _left(op, counted).items():
        size = prod(shapes[name])
        weights = kept if block is None else _smallest(_block_sizes(shapes[name], *block), kept)
        tensors[name] = Fraction(weights, size)
    return _Rest(tensors=tensors, heads={})


def _left(op: Prune, shapes: Mapping[str, tuple[int, ...]]) -> dict[tuple[str, ...], int]:
    """How many stay in each layer, or group, where all goes that may; under the name of one alone."""
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    found = at_fraction(op, Tensors(shapes=shapes, kept=sizes), Fraction(1))
    held = {name: sizes.get(name + PROTECTED, 0) for name in sizes}
    return {
        (name,): max(0 if len(group) > 1 else kept, min(max(0, op.floor - held[name]), sizes[name]))
        for group, kept in found.items()
        for name in group
    }


def _filled(op: Prune, kept: int, held: int, count: int) -> int:
    """`kept` filled up to a multiple of `round_to`, held ones counted."""
    return min(count, ceil(Fraction(kept + held, op.round_to)) * op.round_to) - held


def _removed(
    pieces: tuple[Piece, ...], stays: int, costs: Mapping[str, int], heads: Mapping[str, int]
) -> list[tuple[Piece, int]]:
    """How many places go from each tensor, at most."""
    if all(sum(width > 0 for width in piece.widths) == 1 for piece in pieces):  # whole layers, each with its tensors
        units = range(len(pieces[0].widths))
        mine = [{piece.tensor for piece in pieces if piece.widths[unit]} for unit in units]
        prices = [sum(costs.get(name, 0) + heads.get(name, 0) for name in tensors) for tensors in mine]
        cheapest = set(sorted(units, key=prices.__getitem__)[:stays])
        return [(p, sum(width for unit, width in enumerate(p.widths) if unit not in cheapest)) for p in pieces]
    return [(piece, sum(piece.widths) - sum(sorted(piece.widths)[:stays])) for piece in pieces]


def _block_sizes(shape: tuple[int, ...], rows: int, columns: int) -> dict[int, int]:
    """How many blocks of a tensor hold how many weights."""
    height, width = shape[0], prod(shape[1:])
    sizes: dict[int, int] = {}
    for tall, down in ((rows, height // rows), (height % rows, 1)):
        for wide, across in ((columns, width // columns), (width % columns, 1)):
            if tall and wide:
                sizes[tall * wide] = sizes.get(tall * wide, 0) + down * across
    return sizes


def _smallest(sizes: Mapping[int, int], count: int) -> int:
    """How many weights the `count` smallest hold together."""
    total = 0
    for size, there in sorted(sizes.items()):
        taken = min(there, count)
        total, count = total + size * taken, count - taken
    return total
