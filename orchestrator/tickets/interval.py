"""A mean over seeds, and how far it may be off."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import fmean, stdev

from scipy.special import stdtrit

CONFIDENCE = 0.95


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean of one or more values and half the width of its 95 % Student-t interval, None for a single value."""
    if len(values) == 1:
        return values[0], None
    quantile = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2))
    return fmean(values), quantile * stdev(values) / sqrt(len(values))
