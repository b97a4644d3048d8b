"""How many weights stay where: exact counts, as plain integers.

The driver resolves counts to see that a plan leaves weights everywhere; the worker resolves the same counts to prune.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import floor, prod

from orchestrator.errors import PlanError, StageFailed
from orchestrator.ops import Prune
from orchestrator.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Tensors:
    """The prunable tensors in model order: their shapes, and how many weights of each are kept now."""

    shapes: Mapping[str, tuple[int, ...]]
    kept: Mapping[str, int]

    @property
    def total(self) -> int:
        """All prunable weights, protected ones included: the denominator of sparsity."""
        return sum(prod(shape) for shape in self.shapes.values())


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
    return kept - floor(rate * kept + Fraction(1, 2))


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
    factors = dict(op.factors)
    given = dict(op.targets)
    if op.rate is not None:
        rates = {n: exact(given[n]) if n in given else exact(op.rate) * exact(factors.get(n, 1.0)) for n in free}
        for name, rate in rates.items():
            if rate >= 1:
                raise PlanError(f"the rate in {name!r} comes to {float(rate):g}; legal: below 1")
        return {(name,): after_rate(tensors.kept[name], rates[name]) for name in free}
    wanted = ALLOCATIONS[op.allocation].function(op, tensors, _still_to_drop(op, tensors, _kept(free, tensors)))
    return {(name,): kept for name, kept in _whole(wanted).items()}


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
        name: min(Fraction(tensors.kept[name]), sizes[name] * (1 - targets[name]))
        for name in _free(op, tensors)
        if name in targets
    }
    rest = drop - sum(tensors.kept[name] - kept for name, kept in named.items())
    others = {name: tensors.kept[name] for name in _free(op, tensors) if name not in named}
    left = sum(others.values())
    if rest < 0 or rest > left:
        raise PlanError(f"the layers' own targets cannot come to an overall sparsity of {op.sparsity}")
    shared = {name: kept - Fraction(rest * kept, max(1, left)) for name, kept in others.items()}
    return {name: (named | shared)[name] for name in _free(op, tensors)}


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
    wanted = floor(exact(op.sparsity) * tensors.total + Fraction(1, 2))
    masked = tensors.total - sum(tensors.kept.values())
    if wanted - masked > kept:
        raise StageFailed(
            f"a sparsity of {op.sparsity:g} masks {wanted} weights, but only {masked + kept} are not protected"
        )
    return max(0, wanted - masked)


def _whole(wanted: Mapping[str, Fraction]) -> dict[str, int]:
    """Whole numbers with the same sum: the largest remainders are rounded up, the earlier layer first among equals."""
    whole = {name: floor(value) for name, value in wanted.items()}
    missing = floor(sum(wanted.values()) + Fraction(1, 2)) - sum(whole.values())
    by_remainder = sorted(wanted, key=lambda name: wanted[name] - whole[name], reverse=True)
    for name in by_remainder[:missing]:
        whole[name] += 1
    return whole
