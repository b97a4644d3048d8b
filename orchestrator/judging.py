"""What trials have reached: means over seeds in each objective and bound, and whether these can be searched by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from orchestrator.front import column_of
from orchestrator.objectives import Objective
from orchestrator.plan import Plan
from search.query import Bound, constraint, parse

Values = tuple[float | None, ...]
Rounds = dict[int, tuple[list[float], dict[str, float]]]
"""By round: the objectives' values, and how far each bound is violated; NaN for what has no number."""


class Judge:
    """Knows what was measured of each state, as far as a study's objectives and bounds look at it.

    Args:
        objectives: of the study.
        constraints: measure -> bound, as the study has them.
    """

    def __init__(self, objectives: Sequence[Objective], constraints: Mapping[str, str]) -> None:
        self.objectives = objectives
        self.bounds: list[Bound] = [parse(text, measure=name) for name, text in constraints.items()]
        names = [*(each.column for each in objectives), *(column_of(bound.measure) for bound in self.bounds)]
        self.columns = list(dict.fromkeys(names))
        self.values: dict[str, Values] = {}
        """By key, in the order of the columns."""

    @property
    def compares_with_dense(self) -> bool:
        """Whether a bound is relative to the dense model."""
        return any(bound.factor for bound in self.bounds)

    def asked_of(self, measures: Mapping[str, Any]) -> Values:
        """The measures that the study looks at."""
        metrics = measures.get("metrics") or {}
        return tuple(measures.get(name, metrics.get(name)) for name in self.columns)

    def rounds(self, plans: Iterable[Plan], dense: Iterable[Plan]) -> Rounds:
        """What plans, one for each seed, reached after each of their rounds: means over the seeds.

        Every point of `plans` is measured; where one of `dense` is not, no bound relative to it can be judged.
        """
        by_round: dict[int, list[Values]] = {}
        for plan in plans:
            for number, key in plan.points:
                by_round.setdefault(number, []).append(self.values[key])
        reference = self._of_all([key for plan in dense for _, key in plan.points])
        found: Rounds = {}
        for number, rows in by_round.items():
            means = self._means(rows)
            violations = {str(bound): _violation(bound, means, reference) for bound in self.bounds}
            found[number] = [means[objective.column] for objective in self.objectives], violations
        return found

    def without_a_number(self, rounds: Rounds) -> str:
        """Why what was reached in the last round cannot be searched by; empty when it can."""
        values, violations = rounds[max(rounds)]
        for objective, value in zip(self.objectives, values, strict=True):
            if not math.isfinite(value):
                return f"the objective {objective.name} came out as {value}, which is no number to search by"
        for bound, violation in violations.items():
            if not math.isfinite(violation):
                return f"the constraint {bound} cannot be judged: its measure or the dense model's is missing"
        return ""

    def best(self, rounds: Rounds) -> list[float]:
        """The best value of each objective that was reached after any round; the last has a number for each."""
        columns = zip(*(values for values, _ in rounds.values()), strict=True)
        best_of = {"maximise": max, "minimise": min}
        return [
            best_of[objective.direction](value for value in column if math.isfinite(value))
            for objective, column in zip(self.objectives, columns, strict=True)
        ]

    def _of_all(self, keys: Sequence[str]) -> dict[str, float]:
        """Means by column; nothing where one of the states is not measured."""
        return self._means([self.values[key] for key in keys]) if self.values.keys() >= {*keys} else {}

    def _means(self, rows: Sequence[Values]) -> dict[str, float]:
        """Means over seeds by column; NaN where a seed has no number."""
        return {
            name: fmean(math.nan if value is None else value for value in values)
            for name, values in zip(self.columns, zip(*rows, strict=True), strict=True)
        }


def _violation(bound: Bound, means: Mapping[str, float], dense: Mapping[str, float]) -> float:
    """How far means are beyond a bound; NaN where there is no telling."""
    name = column_of(bound.measure)
    reference = dense.get(name, math.nan) if bound.factor else None
    if math.isnan(means[name]) or (reference is not None and math.isnan(reference)):
        return math.nan
    return constraint(bound, means[name], reference)
