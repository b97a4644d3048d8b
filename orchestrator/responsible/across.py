"""What holds across seeds: the mean change of each group, and whether rare classes lose more than the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr

from orchestrator.responsible.harm import LEVEL, Floats
from orchestrator.tickets.verdict import LEAST_SEEDS, holm, paired

Trend = Literal["lost by pruning", "gained", "no evidence", "too few seeds"]
Claim = Literal["the minority loses more", "the minority loses less", "no evidence", "too few seeds"]


@dataclass(frozen=True, kw_only=True)
class Mean:
    """Paired differences over seeds.

    Args:
        n: seeds.
        mean: of the differences.
        std: their standard deviation; None with one seed.
        half_width: of the 95 % Student-t interval; None with one seed.
        p: two-sided; None with one seed.
        p_holm: adjusted for all that is judged together.
    """

    n: int
    mean: float
    std: float | None
    half_width: float | None
    p: float | None
    p_holm: float | None


def across_seeds(changes: Floats, supports: Sequence[int]) -> list[tuple[Mean, Trend]]:
    """The change of every group over seeds, and what may be said of it, with Holm's adjustment (1979) over the groups.

    Args:
        changes: pruned - dense accuracy, of shape (groups, seeds).
        supports: examples by group, at least one each.
    """
    means = _means(changes, [1 / support for support in supports])
    return [(mean, _trend(mean)) for mean in means]


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """The mean change of the rare classes less that of the others.

    Args:
        over_seeds: of this difference; negative where the rare classes lose more.
        p_classes: two-sided, of the t-test that rare and other classes change alike, by their means over the seeds;
            None with fewer than two other classes.
        claim: what may be said.
    """

    over_seeds: Mean
    p_classes: float | None
    claim: Claim


def minority_contrast(changes: Floats, rare: NDArray[np.bool_], supports: Sequence[int]) -> Contrast:
    """How much more the rare classes change than the others do, and whether that is more than chance.

    Any two classes differ by more than seeds do: some are harder than others. So a claim needs both tests below 5 %,
    the one over seeds and the one among classes.

    Args:
        changes: pruned - dense accuracy, of shape (classes, seeds).
        rare: which classes are (classes,); some, but not all.
        supports: examples by class.
    """
    difference = changes[rare].mean(axis=0) - changes[~rare].mean(axis=0)
    rows = sum(support for support, is_rare in zip(supports, rare.tolist(), strict=True) if is_rare)
    (mean,) = _means(difference[None], [1 / rows])
    among = _among_classes(changes[rare].mean(axis=1), changes[~rare].mean(axis=1))
    claim: Claim = "no evidence"
    if mean.n < LEAST_SEEDS:
        claim = "too few seeds"
    elif mean.p is not None and among is not None and max(mean.p, among) < LEVEL:
        claim = "the minority loses more" if mean.mean < 0 else "the minority loses less"
    return Contrast(over_seeds=mean, p_classes=among, claim=claim)


def _among_classes(rare: Floats, others: Floats) -> float | None:
    """Student's t-test with a common variance, which one rare class is enough for."""
    if len(others) < 2:
        return None
    degrees = len(rare) + len(others) - 2
    squares = sum(float(np.square(values - values.mean()).sum()) for values in (rare, others))
    error = (squares / degrees * (1 / len(rare) + 1 / len(others))) ** 0.5
    difference = abs(float(rare.mean() - others.mean()))
    if error == 0:
        return 0.0 if difference else 1.0
    return 2 * float(stdtr(degrees, -difference / error))


def _means(differences: Floats, resolutions: Sequence[float]) -> list[Mean]:
    each = [paired(row, resolution) for row, resolution in zip(differences, resolutions, strict=True)]
    adjusted = holm(np.array([float(p) for _, _, p in each])).tolist()
    n = differences.shape[1]
    return [
        Mean(
            n=n,
            mean=float(mean),
            std=float(np.std(row, ddof=1)) if n > 1 else None,
            half_width=float(half_width) if n > 1 else None,
            p=float(p) if n > 1 else None,
            p_holm=p_holm if n > 1 else None,
        )
        for row, (mean, half_width, p), p_holm in zip(differences, each, adjusted, strict=True)
    ]


def _trend(mean: Mean) -> Trend:
    if mean.n < LEAST_SEEDS:
        return "too few seeds"
    if mean.p_holm is None or mean.p_holm >= LEVEL:
        return "no evidence"
    return "lost by pruning" if mean.mean < 0 else "gained"
