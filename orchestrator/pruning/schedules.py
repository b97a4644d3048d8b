"""How a final sparsity spreads over rounds: rising, and ending exactly on target."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.errors import PlanError
from orchestrator.registry import Registry

SCHEDULES: Registry[Callable[[float, int], list[float]]] = Registry("schedule")
schedule = SCHEDULES.register


@schedule("one-shot")
def one_shot(sparsity: float, rounds: int) -> list[float]:
    """Everything in a single round."""
    if rounds != 1:
        raise PlanError(f"schedule 'one-shot' is a single round, but rounds = {rounds}; legal: rounds = 1")
    return [sparsity]


@schedule("linear")
def linear(sparsity: float, rounds: int) -> list[float]:
    """The same number of weights in each round."""
    return [sparsity * r / rounds for r in range(1, rounds)] + [sparsity]


@schedule("exponential")
def exponential(sparsity: float, rounds: int) -> list[float]:
    """The same fraction of what is left in each round (Han et al., 2015; Frankle & Carbin, 2019)."""
    return [1 - (1 - sparsity) ** (r / rounds) for r in range(1, rounds)] + [sparsity]


@schedule("cubic")
def cubic(sparsity: float, rounds: int) -> list[float]:
    """Much at first and little at the end (Zhu & Gupta, 2017)."""
    return [sparsity * (1 - (1 - r / rounds) ** 3) for r in range(1, rounds)] + [sparsity]


def targets(name: str, sparsity: float, rounds: int) -> list[float]:
    """The sparsity after each of the rounds, rounded to 12 digits so that equal plans have equal keys."""
    return [round(target, 12) for target in SCHEDULES[name].function(sparsity, rounds)]
