"""How much each parameter of a search goes with the outcome, by ranks, from the trials that were run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEAST_TRIALS = 10
"""Of fewer trials nothing is said."""

GROUPS = 4
"""A number with more values than these is looked at in as many groups of equal size."""

METHOD = (
    "eta squared of Kruskal and Wallis's H, (H − k + 1) / (n − k), of n trials in k groups: the share of the ranks' "
    "variance that goes with the parameter alone, 0 where it is chance. Numbers of more than four values are cut into "
    "four groups of equal size. It sees no interplay of two parameters, and a sampler that looks where it is good "
    "already does not draw them evenly. p: chi-squared, Holm (1979) over the parameters of one objective."
)


@dataclass(frozen=True, kw_only=True)
class Importance:
    """What one parameter has to do with one objective.

    Args:
        parameter: its name.
        eta_squared: 0 to 1; None where too few trials have it.
        p: adjusted; None with it.
        best: the group of trials with the best mean rank, in words.
        trials: how many have the parameter.
    """

    parameter: str
    eta_squared: float | None
    p: float | None
    best: str
    trials: int


def importances(params: Sequence[Mapping[str, Any]], values: Sequence[float], *, maximise: bool) -> list[Importance]:
    """The importance of every parameter that varies, the greatest first.

    Args:
        params: of each trial.
        values: its objective; a trial with NaN is left out.
        maximise: more is better.
    """
    kept = [(mix, value) for mix, value in zip(params, values, strict=True) if not np.isnan(value)]
    found = []
    for name in dict.fromkeys(name for mix, _ in kept for name in mix):
        has = [(mix[name], value) for mix, value in kept if name in mix]
        labels = grouped([value for value, _ in has])
        if len(set(labels)) < 2:
            continue
        found.append(_importance(name, labels, np.array([value for _, value in has]), maximise))
    return sorted(_holm(found), key=lambda one: -1.0 if one.eta_squared is None else one.eta_squared, reverse=True)


def grouped(values: Sequence[Any]) -> list[str]:
    """The group of each value: the value itself, or its range where there are many numbers."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if not numbers or len(set(values)) <= GROUPS:
        return [f"{value:.4g}" if isinstance(value, float) else str(value) for value in values]
    array = np.asarray(values, dtype=np.float64)
    cuts = np.unique(np.quantile(array, np.linspace(0, 1, GROUPS + 1)[1:-1], method="inverted_cdf"))
    place = np.searchsorted(cuts, array, side="left")
    names = {}
    for group in np.unique(place):
        inside = array[place == group]
        names[int(group)] = f"{inside.min():.4g} to {inside.max():.4g}"
    return [names[int(group)] for group in place]


def _importance(name: str, labels: Sequence[str], values: np.ndarray[Any, Any], maximise: bool) -> Importance:
    from scipy.special import chdtrc
    from scipy.stats import rankdata

    ranks = rankdata(values if maximise else -values)
    groups = {label: ranks[[other == label for other in labels]] for label in dict.fromkeys(labels)}
    best = max(groups, key=lambda label: groups[label].mean())
    total = float(((ranks - ranks.mean()) ** 2).sum())
    size, count = len(ranks), len(groups)
    if size < LEAST_TRIALS or size <= count:
        return Importance(parameter=name, eta_squared=None, p=None, best=best, trials=size)
    if total == 0:  # every trial came out alike
        return Importance(parameter=name, eta_squared=0.0, p=1.0, best=best, trials=size)
    between = sum(len(group) * (float(group.mean()) - float(ranks.mean())) ** 2 for group in groups.values())
    h = (size - 1) * between / total
    eta = min(1.0, max(0.0, (h - count + 1) / (size - count)))
    return Importance(parameter=name, eta_squared=eta, p=float(chdtrc(count - 1, h)), best=best, trials=size)


def _holm(found: Sequence[Importance]) -> list[Importance]:
    tested = sorted((one for one in found if one.p is not None), key=lambda one: one.p or 0.0)
    adjusted, least = {}, 0.0
    for place, one in enumerate(tested):
        least = min(1.0, max(least, (len(tested) - place) * (one.p or 0.0)))
        adjusted[one.parameter] = least
    return [
        Importance(
            parameter=one.parameter,
            eta_squared=one.eta_squared,
            p=adjusted.get(one.parameter),
            best=one.best,
            trials=one.trials,
        )
        for one in found
    ]
