"""Which things stay: so many of the best, those above a threshold, or as many as a budget allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache, partial

import torch
from torch import Tensor

from orchestrator.errors import NotFinite
from orchestrator.ops import Prune
from orchestrator.pruning.allocation import at_fraction, by_row, counts
from orchestrator.pruning.budget import Goal, least
from orchestrator.pruning.masks import count, hashes_at, ranks, ranks_in_rows, select
from orchestrator.pruning.parts import Part, Things
from orchestrator.pruning.structure import rounded

STEPS = 1 << 20
"""Where a goal is reached by bisection layer by layer, the fraction that is dropped is a multiple of one in so many."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What stays of each part, bool of its scores' shape, and the parts that only the floor left what they have."""

    kept: Mapping[str, Tensor]
    floored: Sequence[str] = ()


def best(things: Things) -> Chosen:
    """As many of the best as a rate, a sparsity or a `unit_sparsity` leaves."""
    op = things.op if things.op.unit_sparsity is None else replace(things.op, sparsity=things.op.unit_sparsity)
    named = {part.name: part for part in things.parts}
    kept: dict[str, Tensor] = {}
    floored: list[str] = []
    for group, keep in counts(op, things.counts).items():
        parts = [named[name] for name in group]
        found, held = _best_by_row(op, parts[0], keep) if op.scope == "row" else _best(op, parts, keep)
        kept |= found
        floored += held
    return Chosen(kept=kept, floored=floored)


def above(things: Things, unit: Callable[[Part], float]) -> Chosen:
    """Those with a score of at least the op's threshold, times the part's `unit`.

    Raises:
        NotFinite: a score is NaN or infinite.
    """
    op = things.op
    assert op.threshold is not None
    kept, floored = {}, []
    for part in things.parts:
        among = torch.ones(part.scores.shape, dtype=torch.bool) if part.among is None else part.among
        bad = count(among & ~part.scores.isfinite())
        if bad:
            raise NotFinite(f"{bad} of {part.kept} scores are NaN or infinite")
        mask = among & (part.scores.double() >= op.threshold * unit(part))
        if count(mask) < _floor(op, part):
            mask = _first(part, _floor(op, part))
            floored.append(part.name)
        kept[part.name] = _filled_up(op, part, mask)
    return Chosen(kept=kept, floored=floored)


def within(things: Things, goal: Goal, masks: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]) -> Chosen:
    """All but the fewest that have to go until the goal is met.

    Args:
        things: to choose among.
        goal: what the masks have to come down to.
        masks: of all parameters, from what stays of each part.

    Raises:
        StageFailed: it is not met even where everything goes that may.
    """
    op = things.op
    named = {part.name: part for part in things.parts}
    together = [list(things.parts)] if op.scope == "global" else [[part] for part in things.parts]
    order: dict[str, Tensor] = {}
    for parts in together:
        found = ranks([part.scores for part in parts], [part.among for part in parts], partial(_ties, parts))
        order |= {part.name: places for part, places in zip(parts, found, strict=True)}
    most = STEPS if op.scope == "layer" else max(1, sum(part.kept for part in things.parts))
    firsts = cache(lambda name: _first(named[name], _floor(op, named[name])))

    def at(step: int) -> Chosen:
        kept, floored = {}, []
        for group, keep in at_fraction(op, things.counts, Fraction(step, most)).items():
            for name in group:
                mask = order[name] < keep
                if count(mask) < _floor(op, named[name]):
                    mask = firsts(name)
                    floored.append(name)
                kept[name] = _filled_up(op, named[name], mask)
        return Chosen(kept=kept, floored=floored)

    return at(least(lambda step: goal.left(masks(at(step).kept)), most, goal))


def _best(op: Prune, parts: Sequence[Part], keep: int) -> tuple[dict[str, Tensor], list[str]]:
    """The `keep` best of all parts together, and of each part its floor."""
    scores, among = [part.scores for part in parts], [part.among for part in parts]
    kept = select(scores, among, keep, partial(_ties, parts))
    floors = [_floor(op, part) for part in parts]
    low = [part.name for part, mask, floor in zip(parts, kept, floors, strict=True) if floor and count(mask) < floor]
    if low:
        first = [_first(part, floor) for part, floor in zip(parts, floors, strict=True)]
        rest = [~mask if part.among is None else part.among & ~mask for part, mask in zip(parts, first, strict=True)]
        others = select(scores, rest, max(0, keep - sum(floors)), partial(_ties, parts))
        kept = [one | two for one, two in zip(first, others, strict=True)]
    return {part.name: _filled_up(op, part, mask) for part, mask in zip(parts, kept, strict=True)}, low


def _best_by_row(op: Prune, part: Part, total: int) -> tuple[dict[str, Tensor], list[str]]:
    """The best weights of each row."""
    rows = len(part.scores)
    among = torch.ones(part.scores.shape, dtype=torch.bool) if part.among is None else part.among
    there = among.reshape(rows, -1).sum(dim=1).tolist()
    keep = by_row(op, part.name, there, total)
    floored = keep != by_row(replace(op, floor=0), part.name, there, total)
    magnitudes, hashes = _ties([part], 0, torch.arange(part.scores.numel()))
    tables = (values.reshape(rows, -1) for values in (part.scores, among, magnitudes, hashes))
    mask = (ranks_in_rows(*tables) < torch.tensor(keep).unsqueeze(1)).reshape(part.scores.shape) & among
    return {part.name: mask}, [part.name] if floored else []


def _floor(op: Prune, part: Part) -> int:
    """How many of the part stay at least, beside those that are protected."""
    return min(max(0, op.floor - part.aside), part.kept)


def _first(part: Part, keep: int) -> Tensor:
    """The part's best."""
    return select([part.scores], [part.among], keep, partial(_ties, [part]))[0]


def _filled_up(op: Prune, part: Part, mask: Tensor) -> Tensor:
    """The mask with as many more of the part's best as make a multiple of `round_to`, protected ones counted."""
    if op.round_to == 1:
        return mask
    wanted = rounded(count(mask) + part.aside, part.scores.numel(), op.round_to) - part.aside
    return _first(part, min(wanted, part.kept))


def _ties(parts: Sequence[Part], number: int, places: Tensor) -> tuple[Tensor, Tensor]:
    return parts[number].magnitudes(places), hashes_at(parts[number].name, places)
