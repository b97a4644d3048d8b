"""How many weights, or units, stay where: exact counts, as plain integers.

The driver resolves counts to see that a plan leaves weights everywhere; the worker resolves the same counts to prune.
What is said of weights and tensors holds for units and the groups that they lie in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import floor, prod
from random import Random

from orchestrator.errors import PlanError, StageFailed
from orchestrator.ops import Prune
from orchestrator.registry import Registry
from orchestrator.seeds import derive


@dataclass(frozen=True, kw_only=True)
class Tensors:
    """The prunable tensors in model order: their shapes, and how many weights of each are kept now."""

    shapes: Mapping[str, tuple[int, ...]]
    kept: Mapping[str, int]

    @property
    def total(self) -> int:
        """All prunable weights, protected ones included: the denominator of sparsity."""
        return sum(prod(shape) for shape in self.shapes.values())


PROTECTED = " (protected)"
"""Ends the name under which the protected units of a group are counted."""

SCOPES: Registry[Callable[[Prune, Tensors], dict[tuple[str, ...], int]]] = Registry("scope")
ALLOCATIONS: Registry[Callable[[Prune, Tensors, int], dict[str, Fraction]]] = Registry("allocation")
scope = SCOPES.register
allocation = ALLOCATIONS.register


def counts(op: Prune, tensors: Tensors) -> dict[tuple[str, ...], int]:
    """How many weights stay in each group of tensors that are ranked together, for a `rate` or a `sparsity`.

    Raises:
        StageFailed: the asked-for sparsity needs more weights than the unprotected tensors still have.
    """
    return SCOPES[op.scope].function(op, tensors)


def after_rate(kept: int, rate: Fraction) -> int:
    """kept - floor(rate · kept + ½), exactly as the rate is written in decimal."""
    return kept - rounded_half_up(rate * kept)


def rounded_half_up(value: Fraction) -> int:
    """floor(value + ½)."""
    return floor(value + Fraction(1, 2))


def at_fraction(op: Prune, tensors: Tensors, fraction: Fraction) -> dict[tuple[str, ...], int]:
    """How many stay in each group when `fraction` of what is left is dropped everywhere, times each layer's factor.

    Never more at a higher fraction, so that a fraction for any target can be found by bisection.
    """
    free = _free(op, tensors)
    if op.scope == "global":
        return {free: after_rate(_kept(free, tensors), fraction)}
    factors = dict(op.factors)
    shares = {name: min(Fraction(1), fraction * exact(factors.get(name, 1.0))) for name in free}
    return {(name,): after_rate(tensors.kept[name], shares[name]) for name in free}


def by_row(op: Prune, name: str, kept: Sequence[int], total: int) -> list[int]:
    """How many weights stay in each row of a tensor.

    Under a rate every row gives that rate of what it has; under a final sparsity the rows share the tensor's `total` in
    proportion to what they have, the largest remainders rounded up. Where rows would come to less than the floor of
    the tensor, they share the floor like that.

    Args:
        op: with scope "row".
        name: of the tensor.
        kept: how many weights each row has now.
        total: how many stay in the tensor, from `counts`.
    """
    if op.rate is not None:
        rate = _rate(op, name)
        after = {count: after_rate(count, rate) for count in set(kept)}
        total = sum(after[count] for count in kept)
    floor_ = min(op.floor, sum(kept))
    if op.rate is not None and total >= floor_:
        return [after[count] for count in kept]
    whole = max(1, sum(kept))
    rows = list(range(len(kept)))
    Random(derive(0, "rows", name)).shuffle(rows)  # among equal remainders no row comes first by its place
    shares = _whole({str(row): Fraction(max(total, floor_) * kept[row], whole) for row in rows})
    return [shares[str(row)] for row in range(len(kept))]


def by_group(
    op: Prune, groups: Mapping[str, Mapping[tuple[str, ...], int]]
) -> tuple[Prune, dict[str, tuple[int, ...]]]:
    """The op with groups of units in the place of tensors, and the shape of each group: how many units it has.

    A unit is protected with any tensor that makes it; those of a group that are not all protected count under a name
    of their own. Of several makers, the smallest factor and the smallest target hold.

    Args:
        op: whose factors and targets are those of tensors.
        groups: by group, how many units are made by which tensors together.
    """
    factors, targets = dict(op.factors), dict(op.targets)
    shapes: dict[str, tuple[int, ...]] = {}
    scaled: dict[str, float] = {}
    given: dict[str, float] = {}
    for name, made_by in groups.items():
        free = {makers: count for makers, count in made_by.items() if all(factors.get(m, 1.0) for m in makers)}
        makers = [maker for names in free for maker in names]
        if free:
            shapes[name] = (sum(free.values()),)
            scaled[name] = min((factors.get(maker, 1.0) for maker in makers), default=1.0)
            given |= (
                {name: min(targets[maker] for maker in makers if maker in targets)} if targets.keys() & makers else {}
            )
        if len(free) < len(made_by):
            held = name + PROTECTED
            shapes[held], scaled[held] = (sum(made_by.values()) - sum(free.values()),), 0.0
    return replace(op, factors=tuple(scaled.items()), targets=tuple(given.items())), shapes


def exact(value: float) -> Fraction:
    """The decimal number that `value` was written as."""
    return Fraction(repr(value))


@scope("global")
def global_scope(op: Prune, tensors: Tensors) -> dict[tuple[str, ...], int]:
    """All tensors are ranked together."""
    free = _free(op, tensors)
    kept = sum(tensors.kept[name] for name in free)
    if op.rate is not None:
        return {free: after_rate(kept, exact(op.rate))}
    return {free: kept - _still_to_drop(op, tensors, kept)}


@scope("layer")
def layer_scope(op: Prune, tensors: Tensors) -> dict[tuple[str, ...], int]:
    """Each tensor is ranked by itself."""
    free = _free(op, tensors)
    if op.rate is not None:
        return {(name,): after_rate(tensors.kept[name], _rate(op, name)) for name in free}
    wanted = ALLOCATIONS[op.allocation].function(op, tensors, _still_to_drop(op, tensors, _kept(free, tensors)))
    return {(name,): kept for name, kept in _whole(wanted).items()}


@scope("row")
def row_scope(op: Prune, tensors: Tensors) -> dict[tuple[str, ...], int]:
    """Each output's weights are ranked by themselves: the rows of a matrix, the filters of a convolution."""
    if op.rate is None:
        return layer_scope(op, tensors)
    rows = {name: max(1, tensors.shapes[name][0]) for name in _free(op, tensors)}
    # Rows that were dense have equally many; what differs is counted where the masks are at hand.
    return {(n,): rows[n] * after_rate(tensors.kept[n] // rows[n], _rate(op, n)) for n in _free(op, tensors)}


@allocation("uniform")
def uniform(op: Prune, tensors: Tensors, drop: int) -> dict[str, Fraction]:
    """The same fraction of what is left in every layer, times the layer's factor."""
    free = [name for name in _free(op, tensors) if tensors.kept[name]]
    factors = {name: exact(dict(op.factors).get(name, 1.0)) for name in free}
    kept = {name: Fraction(tensors.kept[name]) for name in free}
    dropped: dict[str, Fraction] = {}
    # A layer whose share would exceed what it has gives all of it, and the others share the rest.
    while True:
        open_ = [name for name in free if name not in dropped]
        weight = sum(factors[name] * kept[name] for name in open_)
        rest = drop - sum(dropped.values())
        share = rest / weight if weight else Fraction(0)
        full = [name for name in open_ if share * factors[name] > 1]
        if not full:
            break
        dropped.update((name, kept[name]) for name in full)
    dropped.update((name, share * factors[name] * kept[name]) for name in open_)
    return {name: kept[name] - dropped[name] for name in free}


@allocation("erk")
def erk(op: Prune, tensors: Tensors, drop: int) -> dict[str, Fraction]:
    """Density in proportion to (sum of a layer's dimensions) / (their product) (Evci et al., 2020)."""
    _refuse_factors(op)
    free = [name for name in _free(op, tensors) if tensors.kept[name]]
    keep = sum(tensors.kept[name] for name in free) - drop
    raw = {name: Fraction(sum(tensors.shapes[name])) for name in free}  # density x size
    result: dict[str, Fraction] = {}
    while True:
        open_ = [name for name in free if name not in result]
        room = sum((raw[name] for name in open_), Fraction(0))
        scale = (keep - sum(result.values())) / room if open_ else Fraction(0)
        full = [name for name in open_ if scale * raw[name] > tensors.kept[name]]
        if not full:
            break
        result.update((name, Fraction(tensors.kept[name])) for name in full)
    result.update((name, scale * raw[name]) for name in open_)
    return {name: result[name] for name in free}


@allocation("given")
def given(op: Prune, tensors: Tensors, drop: int) -> dict[str, Fraction]:
    """Each layer's own target, as the study gives it; the other layers share the rest evenly."""
    _refuse_factors(op)
    targets = {name: exact(target) for name, target in op.targets}
    sizes = {name: prod(shape) for name, shape in tensors.shapes.items()}
    named = {
        name: Fraction(min(tensors.kept[name], rounded_half_up(sizes[name] * (1 - targets[name]))))
        for name in _free(op, tensors)
        if name in targets
    }
    rest = drop - sum((tensors.kept[name] - kept for name, kept in named.items()), Fraction(0))
    others = {name: tensors.kept[name] for name in _free(op, tensors) if name not in named}
    left = sum(others.values())
    if not others and abs(rest) <= len(named):
        rest = Fraction(0)  # each layer comes to a whole number of weights, and all together only nearly
    if rest < 0 or rest > left:
        raise PlanError(f"the layers' own targets cannot come to an overall sparsity of {op.sparsity}")
    shared = {name: kept - Fraction(rest * kept, max(1, left)) for name, kept in others.items()}
    return {name: (named | shared)[name] for name in _free(op, tensors)}


def _rate(op: Prune, name: str) -> Fraction:
    """The rate in one tensor: its own target, or the op's times the layer's factor."""
    assert op.rate is not None
    given = dict(op.targets)
    rate = exact(given[name]) if name in given else exact(op.rate) * exact(dict(op.factors).get(name, 1.0))
    if rate >= 1:
        raise PlanError(f"the rate in {name!r} comes to {float(rate):g}; legal: below 1")
    return rate


def _refuse_factors(op: Prune) -> None:
    for name, factor in op.factors:
        if factor not in (0, 1):
            raise PlanError(f"the factor {factor:g} of {name!r} goes with allocation 'uniform', not {op.allocation!r}")


def _free(op: Prune, tensors: Tensors) -> tuple[str, ...]:
    factors = dict(op.factors)
    return tuple(name for name in tensors.shapes if factors.get(name, 1.0) > 0)


def _kept(names: tuple[str, ...], tensors: Tensors) -> int:
    return sum(tensors.kept[name] for name in names)


def _still_to_drop(op: Prune, tensors: Tensors, kept: int) -> int:
    assert op.sparsity is not None
    wanted = rounded_half_up(exact(op.sparsity) * tensors.total)
    masked = tensors.total - sum(tensors.kept.values())
    if wanted - masked > kept:
        what, things = ("sparsity", "weights") if op.unit_sparsity is None else ("unit_sparsity", "units")
        raise StageFailed(
            f"a {what} of {op.sparsity:g} masks {wanted} {things}, but only {masked + kept} are not protected"
        )
    return max(0, wanted - masked)


def _whole(wanted: Mapping[str, Fraction]) -> dict[str, int]:
    """Whole numbers with the same sum: the largest remainders are rounded up, the earlier layer first among equals."""
    whole = {name: floor(value) for name, value in wanted.items()}
    missing = rounded_half_up(sum(wanted.values(), Fraction(0))) - sum(whole.values())
    by_remainder = sorted(wanted, key=lambda name: wanted[name] - whole[name], reverse=True)
    for name in by_remainder[:missing]:
        whole[name] += 1
    return whole
