"""What may be claimed of a ticket: paired differences over seeds on the test split, with every comparison counted.

A claim needs five seeds. "beats" and "loses to" need a Holm-adjusted p below 5 %, over all comparisons that are printed
together; "matches" needs the whole 95 % interval within the margin, for not to have found a difference is not to have
found none; the rest is "not distinguishable from".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

from orchestrator.errors import PlanError

Floats = NDArray[np.float64]
Seed = int | tuple[int, int]
"""A run's seed, or its (init, order) seeds."""
Claim = Literal["beats", "loses to", "matches", "not distinguishable from", "too few"]

LEVEL = 0.05
LEAST_SEEDS = 5


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How a measure is read.

    Args:
        unit: what differences are printed in.
        factor: units in 1 of the measure.
        margin: in units; differences within it are none. None: nothing ever "matches".
        higher_is_better: which way round a difference counts for the ticket.
        resolution: the smallest step that the measure can take, in the measure; for accuracy 1 / n_test by itself.
        digits: decimals in sentences.
    """

    unit: str = "points"
    factor: float = 100.0
    margin: float | None = 1.0
    higher_is_better: bool = True
    resolution: float | None = None
    digits: int = 1


ACCURACY = Scale()


def steps(evaluate_every: int) -> Scale:
    """Learning speed: steps to the best validation loss, known to the evaluation; fewer are better."""
    return Scale(
        unit="steps", factor=1.0, margin=None, higher_is_better=False, resolution=float(evaluate_every), digits=0
    )


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A ticket, or what it is compared with.

    Args:
        name: as it stands in the sentence: "the shuffled mask".
        test: the measure on the test split by seed; several draws under one seed, as of a reinit, are averaged.
        kept: how many prunable weights each run keeps, by seed; None for a dense one, which is compared as it is.
    """

    name: str
    test: Mapping[Seed, float | Sequence[float]]
    kept: Mapping[Seed, int | Sequence[int]] | None


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A ticket and one contender, matched and measured but not yet judged.

    Args:
        against: the contender's name.
        differences: ticket - contender for each seed, in the scale's units.
        sparsity: mean of the ticket's.
        gap: the largest difference in kept weights; None against a dense contender.
        n_test: examples in the test split.
        scale: of the measure.
    """

    against: str
    differences: tuple[float, ...]
    sparsity: float
    gap: int | None
    n_test: int
    scale: Scale


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A judged pair.

    Args:
        against: the contender's name.
        difference: mean over seeds of ticket - contender, in the scale's units; its sign is that of the measure.
        half_width: of the 95 % interval, in units; None with one seed.
        n: seeds.
        p: two-sided, of the paired t-test; None with one seed.
        p_holm: adjusted for all comparisons judged together; None with one seed.
        claim: what may be said.
        sentence: the claim with its numbers.
        sparsity: mean of the ticket's.
        gap: the largest difference in kept weights; None against a dense contender.
    """

    against: str
    difference: float
    half_width: float | None
    n: int
    p: float | None
    p_holm: float | None
    claim: Claim
    sentence: str
    sparsity: float
    gap: int | None


def pair(
    ticket: Contender, contender: Contender, *, n_test: int, prunable: int, scale: Scale = ACCURACY, tolerance: int = 0
) -> Pair:
    """Match a ticket with one contender, seed by seed.

    Args:
        ticket: with the kept weights of each run.
        contender: of the same seeds.
        n_test: examples in the test split.
        prunable: all prunable weights, the denominator of sparsity.
        scale: of the measure.
        tolerance: by how many kept weights the two of a pair may differ.

    Raises:
        PlanError: the contender has other seeds, another sparsity (by more than the tolerance) or a number that is not
            finite, or the ticket comes without counts.
    """
    if ticket.kept is None or not ticket.test or n_test < 1 or prunable < 1:
        raise PlanError(f"{ticket.name} comes without a seed, kept weights, prunable weights or test examples")
    _check_seeds(ticket, contender)
    gap = _gap(ticket, contender, tolerance)
    seeds = sorted(ticket.test, key=str)
    differences = (_values(ticket, seeds) - _values(contender, seeds)) * scale.factor
    sparsity = 1 - float(np.mean([np.mean(ticket.kept[seed]) for seed in seeds])) / prunable
    return Pair(
        against=contender.name,
        differences=tuple(differences.tolist()),
        sparsity=sparsity,
        gap=gap,
        n_test=n_test,
        scale=scale,
    )


def decide(pairs: Sequence[Pair], least_seeds: int = LEAST_SEEDS) -> tuple[Comparison, ...]:
    """What may be claimed of each pair: hand over every comparison that will be printed, of all measures and tickets.

    Args:
        pairs: one family; the p-values are adjusted for their number.
        least_seeds: with fewer the claim is withheld.
    """
    found = [paired(np.array(each.differences), _resolution(each)) for each in pairs]
    adjusted = holm(np.array([float(p) for _, _, p in found]))
    return tuple(
        _judged(each, float(mean), float(half_width), float(p), p_holm, least_seeds)
        for each, (mean, half_width, p), p_holm in zip(pairs, found, adjusted.tolist(), strict=True)
    )


def summary(comparisons: Sequence[Comparison]) -> str:
    """Every comparison in one line, in the order in which they came."""
    text = "; ".join(comparison.sentence for comparison in comparisons) or "nothing was compared"
    return text[:1].upper() + text[1:] + "."


def paired(differences: Floats, resolution: float) -> tuple[Floats, Floats, Floats]:
    """Mean, half width of the 95 % Student-t interval and two-sided p of paired differences.

    Where all differences of a comparison are equal their spread is unknown, not zero: it is taken as `resolution`.

    Args:
        differences: of shape (…, seeds).
        resolution: the smallest step of what is measured.

    Returns:
        Three arrays of shape (…,); with one seed the half width is NaN and p is 1.
    """
    n = differences.shape[-1]
    mean = differences.mean(axis=-1)
    if n == 1:
        return mean, np.full_like(mean, np.nan), np.ones_like(mean)
    std = differences.std(axis=-1, ddof=1)
    # Differences that are equal as written differ in their last binary digits.
    equal = np.ptp(differences, axis=-1) <= 1e-9 * (1 + np.abs(differences).max(axis=-1))
    error = np.where(equal, resolution, std) / sqrt(n)
    t = np.full_like(mean, np.inf)
    np.divide(np.abs(mean), error, out=t, where=error > 0)
    t = np.where(mean == 0, 0.0, t)
    return mean, stdtrit(n - 1, 1 - LEVEL / 2) * error, 2 * stdtr(n - 1, -t)


def holm(p: Floats) -> Floats:
    """Adjusted p-values (Holm, 1979) of each family along the last axis."""
    m = p.shape[-1]
    order = np.argsort(p, axis=-1)
    stepped = np.take_along_axis(p, order, axis=-1) * np.arange(m, 0, -1)
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, np.minimum(1, np.maximum.accumulate(stepped, axis=-1)), axis=-1)
    return adjusted


def judge(
    mean: Floats, half_width: Floats, p_holm: Floats, n: int, scale: Scale = ACCURACY, least_seeds: int = LEAST_SEEDS
) -> NDArray[Any]:
    """The claim for each comparison: an array of the same shape."""
    if n < max(2, least_seeds):
        return np.full(mean.shape, "too few", dtype=object)
    better = mean > 0 if scale.higher_is_better else mean < 0
    margin = -1.0 if scale.margin is None else scale.margin
    claims: NDArray[Any] = np.full(mean.shape, "not distinguishable from", dtype=object)
    claims[np.abs(mean) + half_width <= margin] = "matches"
    claims[(p_holm < LEVEL) & better] = "beats"
    claims[(p_holm < LEVEL) & ~better] = "loses to"
    return claims


def _judged(each: Pair, mean: float, half_width: float, p: float, p_holm: float, least_seeds: int) -> Comparison:
    n = len(each.differences)
    claim: Claim = judge(np.array(mean), np.array(half_width), np.array(p_holm), n, each.scale, least_seeds).item()
    sentence = _claimed(each, claim, mean, half_width, p, p_holm)
    return Comparison(
        against=each.against,
        difference=mean,
        half_width=half_width if n > 1 else None,
        n=n,
        p=p if n > 1 else None,
        p_holm=p_holm if n > 1 else None,
        claim=claim,
        sentence=f"{sentence} (n = {n}, n_test = {each.n_test:,}) at {100 * each.sparsity:.1f} % sparse",
        sparsity=each.sparsity,
        gap=each.gap,
    )


def _resolution(each: Pair) -> float:
    """In the scale's units."""
    step = 1 / each.n_test if each.scale.resolution is None else each.scale.resolution
    return step * each.scale.factor


def _check_seeds(ticket: Contender, contender: Contender) -> None:
    if contender.test.keys() != ticket.test.keys():
        odd = min(contender.test.keys() ^ ticket.test.keys(), key=str)
        raise PlanError(f"{contender.name} and {ticket.name} cannot be paired: seed {odd} is in only one of them")
    for one in (ticket, contender):
        if one.kept is not None and one.kept.keys() != one.test.keys():
            odd = min(one.kept.keys() ^ one.test.keys(), key=str)
            raise PlanError(f"{one.name} has either no result or no kept weights for seed {odd}")


def _gap(ticket: Contender, contender: Contender, tolerance: int) -> int | None:
    """The largest difference in kept weights between the two of a pair."""
    if contender.kept is None:
        return None
    assert ticket.kept is not None
    widest = 0
    for seed in sorted(ticket.kept, key=str):
        for own in np.atleast_1d(ticket.kept[seed]).tolist():
            for other in np.atleast_1d(contender.kept[seed]).tolist():
                if abs(own - other) > tolerance:
                    counts = f"under seed {seed} {ticket.name} keeps {own} weights, {contender.name} {other}"
                    raise PlanError(f"not at the same sparsity: {counts}; legal: a difference of {tolerance} at most")
                widest = max(widest, abs(own - other))
    return widest


def _values(contender: Contender, seeds: Sequence[Seed]) -> Floats:
    values = np.array([np.mean(contender.test[seed]) for seed in seeds], dtype=np.float64)
    for seed, value in zip(seeds, values.tolist(), strict=True):
        if not isfinite(value):
            raise PlanError(f"{contender.name} has the test result {value} under seed {seed}; legal: finite numbers")
    return values


def _claimed(each: Pair, claim: Claim, mean: float, half_width: float, p: float, p_holm: float) -> str:
    name, scale = each.against, each.scale
    spread = f" ± {half_width:,.{scale.digits}f}" if isfinite(half_width) else ""
    signed = f"{mean:+,.{scale.digits}f}{spread} {scale.unit}"
    match claim:
        case "beats" | "loses to":
            return f"{claim} {name} by {abs(mean):,.{scale.digits}f}{spread} {scale.unit}"
        case "matches":
            return f"matches {name} to within ±{scale.margin:g} {scale.unit}: {signed}"
        case "too few":
            return f"too few seeds for a claim against {name}: {signed}"
    # The interval alone would say more than all comparisons together do.
    counted = f", p = {p_holm:.2f} among all comparisons" if p < LEVEL else ""
    return f"not distinguishable from {name}: {signed}{counted}"
