"""What pruning did to one group of examples: intervals, an exact test on the same examples, and a verdict.

Nothing is called lost on a point estimate. The test is McNemar's exact one (1947) on the examples that only one of the
two models has right, adjusted for every group that is judged of one model (Holm, 1979); the interval is Newcombe's
method 10 for paired proportions (1998, Statistics in Medicine 17, 2635-2650), which is built of Wilson's (1927).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest

from orchestrator.tickets.verdict import holm

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Verdict = Literal["lost by pruning", "gained", "never learnt", "no evidence", "too few", "not tested"]

LEVEL = 0.05


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """How many examples of a group both models have right, only one of them, or neither."""

    both: int
    lost: int
    """Right by the dense model only."""
    won: int
    """Right by the pruned model only."""
    neither: int

    @property
    def support(self) -> int:
        """The examples of the group."""
        return self.both + self.lost + self.won + self.neither


@dataclass(frozen=True, kw_only=True)
class Harm:
    """A judged group. All shares are fractions of its support; NaN where it has no examples.

    Args:
        support: examples.
        dense: the dense model's accuracy.
        pruned: the pruned model's.
        change: pruned - dense.
        low: of the 95 % interval of the change.
        high: likewise.
        p: of the exact McNemar test, two-sided; None where nothing was tested.
        p_holm: adjusted for all groups that were judged together.
        verdict: what may be said.
    """

    support: int
    dense: float
    pruned: float
    change: float
    low: float
    high: float
    p: float | None
    p_holm: float | None
    verdict: Verdict


def judge(groups: Sequence[Pairs], learnt_above: float) -> list[Harm]:
    """What may be said of each group of one model: hand over every group that will be printed of it.

    "lost by pruning" and "gained" need an adjusted p below 5 % and an interval without zero. "never learnt" is a group
    of which the dense model had no more than `learnt_above` right. "too few" is one so small that it could not be found
    lost if every single example went wrong.

    Args:
        groups: one family; those without examples are not counted in it.
        learnt_above: a share, such as that of guessing.
    """
    tested = [mcnemar(each.lost, each.won) for each in groups if each.support]
    values = iter(zip(tested, holm(np.array(tested)).tolist() if tested else [], strict=True))
    found = []
    for each in groups:
        n = each.support
        p, p_holm = next(values) if n else (None, None)
        dense, pruned = _share(each.both + each.lost, n), _share(each.both + each.won, n)
        low, high = paired_interval(each)
        verdict: Verdict = "no evidence"
        if p_holm is None or too_few(n, len(tested)):
            verdict = "too few"
        elif p_holm < LEVEL and low > 0:
            verdict = "gained"
        elif dense <= learnt_above:
            verdict = "never learnt"
        elif p_holm < LEVEL and high < 0:
            verdict = "lost by pruning"
        found.append(
            Harm(
                support=n,
                dense=dense,
                pruned=pruned,
                change=pruned - dense,
                low=low,
                high=high,
                p=p,
                p_holm=p_holm,
                verdict=verdict,
            )
        )
    return found


def untested(support: Ints, dense: Floats, pruned: Floats, learnt_above: float, *, models: int = 1) -> list[Harm]:
    """What may be said of each group of a model by two accuracies alone, without the answers behind them.

    The interval is Newcombe's for independent proportions, which is wider than that of the same examples where the two
    models tend to be right together.

    Args:
        support: examples by group (g,).
        dense: the dense model's accuracy (g,); NaN where there are no examples.
        pruned: the pruned model's (g,).
        learnt_above: as in `judge`.
        models: how many models the groups are of, one after the other.
    """
    counted = int((support > 0).sum()) // models
    lows, highs = independent_interval(support, dense, pruned)
    found = []
    for n, before, after, low, high in zip(
        support.tolist(), dense.tolist(), pruned.tolist(), lows.tolist(), highs.tolist(), strict=True
    ):
        verdict: Verdict = "not tested"
        if too_few(n, counted):
            verdict = "too few"
        elif before <= learnt_above:
            verdict = "never learnt"
        found.append(
            Harm(
                support=n,
                dense=before,
                pruned=after,
                change=after - before,
                low=low,
                high=high,
                p=None,
                p_holm=None,
                verdict=verdict,
            )
        )
    return found


def too_few(support: int, groups: int) -> bool:
    """Whether not even the loss of all examples could be told from chance among so many groups (Tarone, 1990)."""
    return support == 0 or bool(groups * 2.0 ** (1 - support) >= LEVEL)


def mcnemar(lost: int, won: int) -> float:
    """The two-sided p of the exact test that as many are lost as won (McNemar, 1947); 1 without any."""
    return float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0


def wilson(hits: ArrayLike, rows: ArrayLike) -> tuple[Floats, Floats]:
    """The 95 % score interval of a share (Wilson, 1927); 0 to 1 without rows."""
    from statsmodels.stats.proportion import proportion_confint  # takes a second to import

    hits, rows = np.broadcast_arrays(np.asarray(hits, dtype=np.float64), np.asarray(rows, dtype=np.float64))
    low, high = np.zeros(hits.shape), np.ones(hits.shape)
    some = rows > 0
    low[some], high[some] = proportion_confint(hits[some], rows[some], alpha=LEVEL, method="wilson")
    shares = np.divide(hits, rows, out=low.copy(), where=some)
    return np.minimum(low, shares), np.maximum(high, shares)  # rounding may leave a share of 1 outside


def paired_interval(pairs: Pairs) -> tuple[float, float]:
    """The 95 % interval of pruned - dense on the same examples (Newcombe, 1998, method 10); NaN without examples."""
    n = pairs.support
    margins = (pairs.both + pairs.lost, pairs.won + pairs.neither, pairs.both + pairs.won, pairs.lost + pairs.neither)
    together = float(pairs.both * pairs.neither - pairs.lost * pairs.won)
    if together > 0:
        together = max(together - n / 2, 0.0)
    product = float(np.prod(np.array(margins, dtype=np.float64)))
    correlation = together / product**0.5 if product else 0.0
    dense, pruned = (np.array([_share(margin, n)]) for margin in (margins[0], margins[2]))
    low, high = _squared_and_added(np.array([n]), dense, pruned, correlation)
    return float(low[0]), float(high[0])


def independent_interval(support: Ints, dense: Floats, pruned: Floats) -> tuple[Floats, Floats]:
    """The 95 % interval of pruned - dense by two shares alone, of shape (g,) as they are; NaN without examples.

    Newcombe's for independent proportions (1998, Statistics in Medicine 17, 873-890, method 10).
    """
    return _squared_and_added(support, dense, pruned, 0.0)


def _squared_and_added(n: Ints, dense: Floats, pruned: Floats, correlation: float) -> tuple[Floats, Floats]:
    (dense_low, dense_high), (pruned_low, pruned_high) = (wilson(share * n, n) for share in (dense, pruned))

    def width(mine: Floats, other: Floats) -> Floats:
        return np.asarray(np.sqrt(np.maximum(mine**2 - 2 * correlation * mine * other + other**2, 0.0)))

    change = pruned - dense
    low = change - width(pruned - pruned_low, dense_high - dense)
    high = change + width(pruned_high - pruned, dense - dense_low)
    return np.maximum(low, -1.0), np.minimum(high, 1.0)


def _share(hits: int, rows: int) -> float:
    return hits / rows if rows else float("nan")
