"""How long a forward pass takes, measured; and how two models compare, with what chance leaves open."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from statistics import median, quantiles
from typing import TYPE_CHECKING

import torch
from torch import nn

from orchestrator.tasks.data import call, tensors

if TYPE_CHECKING:
    from orchestrator.tasks.data import Nested

WARM_UP = 10
RUNS = 50

PAIRS = 101
"""Most samples of each of two models that are compared."""

FEWEST_PAIRS = 7
"""With these the interval is from the least to the greatest ratio; with fewer there is none of 95 %."""

SHORTEST_SECONDS = 2e-4
"""Passes that take less are timed several at once."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Milliseconds a pass: the median and the quartiles."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two models timed in turns: `speedup` is the median of before / after over the pairs, `low` and `high` its 95 %
    interval, which makes no assumption about how times are distributed."""

    before: Spread
    after: Spread
    speedup: float
    low: float
    high: float
    pairs: int


def median_ms(model: nn.Module, example: Nested) -> float:
    """The median of 50 forward passes on `example` after 10 to warm up, in milliseconds, on the model's device.

    The model is left in evaluation mode.
    """
    device = next(iter(model.parameters())).device
    model.eval()
    times = []
    with torch.inference_mode():
        for _ in range(WARM_UP + RUNS):
            began = time.perf_counter()
            call(model, example)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - began)
    return 1000 * median(times[WARM_UP:])


def compare(before: nn.Module, after: nn.Module, inputs: Nested, *, seconds: float = 1.0) -> Comparison:
    """Times two models in evaluation mode in turns on the same inputs, warm, on the inputs' device.

    Each pair of samples is taken one right after the other, and who comes first alternates, so that what else the
    machine does falls on both.

    Args:
        before: the model that `after` is compared with.
        after: takes the same inputs.
        inputs: as for the models; on their device.
        seconds: about how long to go on; at least 7 pairs and at most 101 are timed whatever it says.
    """
    passes = (_pass(before, inputs), _pass(after, inputs))
    with torch.inference_mode():
        shortest = min(_warmed(run) for run in passes)
        times = max(1, ceil(SHORTEST_SECONDS / max(shortest, 1e-9)))
        samples: tuple[list[float], list[float]] = ([], [])
        began = time.perf_counter()
        while len(samples[0]) < FEWEST_PAIRS or (len(samples[0]) < PAIRS and time.perf_counter() - began < seconds):
            for which in (0, 1) if len(samples[0]) % 2 else (1, 0):
                samples[which].append(_seconds(passes[which], times))
    ratios = [one / other for one, other in zip(*samples, strict=True)]
    low, high = median_interval(ratios)
    return Comparison(
        before=_spread(samples[0]),
        after=_spread(samples[1]),
        speedup=median(ratios),
        low=low,
        high=high,
        pairs=len(ratios),
    )


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the median by its order statistics, for six values or more.

    Of n values the number below the true median is binomial (n, ½), however they are distributed.
    """
    from scipy.stats import binom

    ordered = sorted(values)
    cut = max(1, int(binom.ppf(0.025, len(ordered), 0.5)))
    return ordered[cut - 1], ordered[-cut]


def _pass(model: nn.Module, inputs: Nested) -> Callable[[], None]:
    device = next((tensor.device for _, tensor in tensors(inputs)), torch.device("cpu"))

    def run() -> None:
        call(model, inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def _warmed(run: Callable[[], None]) -> float:
    """The shortest of some passes to warm up: ten, or as many as a quarter of a second has room for."""
    times = [_seconds(run, 1)]
    while len(times) < 3 or (len(times) < WARM_UP and sum(times) < 0.25):
        times.append(_seconds(run, 1))
    return min(times)


def _seconds(run: Callable[[], None], times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - began) / times


def _spread(seconds: Sequence[float]) -> Spread:
    low, _, high = quantiles(seconds, n=4, method="inclusive")
    return Spread(median=1000 * median(seconds), low=1000 * low, high=1000 * high)
