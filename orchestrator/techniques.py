"""What a store's history says of techniques: which way of pruning did best at which sparsity, and whether that is sure.

Read from the ledger alone. A pruned model counts by its change against the dense model of its own study and seed; one
trial counts once in each band of sparsity, by its sparsest model there, as the mean over its seeds. Studies of one task
are put together, studies of different tasks, models or data never.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator.errors import QueryError
from orchestrator.objectives import OBJECTIVES, Objective
from orchestrator.outcome import DENSE_TRIAL, MEASURES
from orchestrator.settings import FINAL, Choices

if TYPE_CHECKING:
    from orchestrator.study import Study

BANDS = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)
"""Where bands of sparsity begin, and where the last one ends; a model at a border belongs to the band above it."""

AXES = ("criterion", "scope", "schedule", "structure", "retrain")
"""What techniques differ in; "technique" is all of them together."""

LEAST = 5
"""Trials, or seeds of a single trial, below which nothing is said."""

COSTS = ("sparsity", "params", "flops", "bytes", "latency_ms")
"""Objectives that pruning is for; a technique is judged by what it keeps of the first of the others."""

LEVEL = 0.05
UNSCHEDULED = "-"
"""The schedule of a single round, and of a rate, which has none."""

METHOD = (
    "mean change against the dense model of the same study and seed, on the validation split; 95 % Student-t over "
    "trials, over seeds where there is one trial, trials with the very same models counted once; the best one against "
    "each other by Welch's t, Holm over them"
)


@dataclass(frozen=True, kw_only=True)
class _Unit:
    """One trial of one study in one band: how its sparsest model there differs from the dense one, seed by seed."""

    trial: tuple[str, int]
    keys: frozenset[str]
    technique: Mapping[str, str]
    sparsity: float
    changes: tuple[float, ...]
    test_changes: tuple[float, ...]


def techniques(studies: Sequence[Study]) -> dict[str, Any]:
    """The document that `orchardist techniques --format json` prints.

    Args:
        studies: one or more opened studies of one store.

    Returns:
        "studies", "method", "notes" and "tasks": for each task its "studies", the "measure" with its "direction", and
        "bands" from "low" to "high" sparsity with the "trials" there and, by axis, the "best" value or None, what it
        "says", and all "values": value, trials, seeds, mean change, half the width of its interval, test change and
        mean sparsity, the best first.

    Raises:
        QueryError: none of the studies has a pruned model that was measured beside a dense one.
    """
    by_task: dict[tuple[str, Objective], list[Study]] = defaultdict(list)
    for study in studies:
        by_task[study.noted().get("task_digest", ""), _measure(study)].append(study)
    tasks = [_task(measure, group) for (_, measure), group in by_task.items()]
    if not any(task["bands"] for task in tasks):
        names = ", ".join(repr(study.spec.name) for study in studies)
        raise QueryError(f"no technique can be told of in {names}: no pruned model is measured beside a dense one yet")
    return {
        "studies": [study.spec.name for study in studies],
        "method": METHOD,
        "tasks": tasks,
        "notes": _notes(by_task),
    }


def rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The document as a table: one row for each value of each axis that has several in its band."""
    several = len(found["tasks"]) > 1
    return [
        ({"task": task["task"], "measure": task["measure"]} if several else {})
        | {
            "sparsity": f"{band['low']:g} to {band['high']:g}",
            "of": axis,
            "value": value["value"],
            "trials": value["trials"],
            "seeds": value["seeds"],
            f"{'change' if several else task['measure']} vs dense": f"{value['change']:+.4f}",
            "+-": "" if value["half_width"] is None else f"{value['half_width']:.4f}",
            "test": "" if value["test_change"] is None else f"{value['test_change']:+.4f}",
            "mean sparsity": f"{value['sparsity']:.3f}",
            "says": told["says"] if place == 0 else "",
        }
        for task in found["tasks"]
        for band in task["bands"]
        for axis, told in band["axes"].items()
        if axis == "technique" or len(told["values"]) > 1
        for place, value in enumerate(told["values"])
    ]


def _measure(study: Study) -> Objective:
    """What techniques are judged by: the first objective that is no cost; else the accuracy."""
    found = [objective for objective in study.objectives() if objective.name not in COSTS]
    return found[0] if found else OBJECTIVES["accuracy"]


def _task(measure: Objective, studies: Sequence[Study]) -> dict[str, Any]:
    units: dict[int, list[_Unit]] = defaultdict(list)
    seen: set[tuple[int, frozenset[str]]] = set()
    for study in studies:
        for band, unit in _units(study, measure):
            # Trials that share their models, within a study or across several, are one observation and not two.
            if (band, unit.keys) not in seen:
                seen.add((band, unit.keys))
                units[band].append(unit)
    sign = 1 if measure.direction == "maximise" else -1
    return {
        "task": studies[0].spec.task,
        "task_digest": studies[0].noted().get("task_digest", ""),
        "studies": [study.spec.name for study in studies],
        "measure": measure.name,
        "direction": measure.direction,
        "bands": [
            {
                "low": BANDS[band],
                "high": BANDS[band + 1],
                "trials": len(units[band]),
                "axes": {axis: _axis(axis, units[band], sign) for axis in ("technique", *AXES)},
            }
            for band in sorted(units)
        ],
    }


def _units(study: Study, measure: Objective) -> Iterator[tuple[int, _Unit]]:
    """Every trial of a study in every band that it has a model in."""
    own = [name for name in (measure.column, f"test_{measure.column}") if name in MEASURES]
    names = ["key", "trial", "round", "seed", "sparsity", "params", "task_digest", *own]
    names += [] if measure.column in MEASURES else ["metrics"]
    digest = study.noted().get("task_digest")
    table = study.store.outcomes(study.spec.name).table(names).to_pydict()
    measured = _columns(table, measure)
    dense: dict[int, tuple[float, float]] = {}
    models: dict[tuple[int, int], dict[int, int]] = defaultdict(dict)
    for row, (trial, seed, task) in enumerate(zip(table["trial"], table["seed"], table["task_digest"], strict=True)):
        if task != digest:
            continue
        if trial == DENSE_TRIAL:
            dense[seed] = measured[0][row], measured[1][row]
        elif trial >= 0 and table["round"][row] > 0 and table["sparsity"][row] is not None:
            of_band = models[trial, _band(table["sparsity"][row])]
            before = of_band.get(seed)
            if before is None or table["sparsity"][row] > table["sparsity"][before]:
                of_band[seed] = row
    techniques_of = cache(lambda text: _technique(study, json.loads(text or "{}")))
    for (trial, band), seeds in models.items():
        some = {seed: row for seed, row in seeds.items() if seed in dense and np.isfinite(measured[0][row])}
        if some:
            yield (
                band,
                _Unit(
                    trial=(study.spec.name, trial),
                    keys=frozenset(table["key"][row] for row in some.values()),
                    technique=techniques_of(table["params"][next(iter(some.values()))]),
                    sparsity=fmean(table["sparsity"][row] for row in some.values()),
                    changes=tuple(measured[0][row] - dense[seed][0] for seed, row in some.items()),
                    test_changes=tuple(measured[1][row] - dense[seed][1] for seed, row in some.items()),
                ),
            )


def _columns(table: Mapping[str, Sequence[Any]], measure: Objective) -> tuple[Sequence[float], Sequence[float]]:
    """The measure on the validation and the test split by row; NaN where there is none."""
    names = (measure.column, f"test_{measure.column}")
    if "metrics" in table:
        metrics = [json.loads(text or "{}") for text in table["metrics"]]
        valid, test = (_numbers([row.get(name) for row in metrics]) for name in names)
    else:
        nothing = [None] * len(table["trial"])
        valid, test = (_numbers(table.get(name, nothing)) for name in names)
    return valid, test


def _numbers(values: Sequence[Any]) -> Sequence[float]:
    return [float("nan") if value is None else float(value) for value in values]


def _band(sparsity: float) -> int:
    return min(int(np.searchsorted(BANDS, sparsity, side="right")) - 1, len(BANDS) - 2)


def _technique(study: Study, params: Mapping[str, Any]) -> dict[str, str]:
    """What a proposal says of each axis, defaults included."""
    found = {name: str(params.get(name, Choices.model_fields[name].default)) for name in AXES}
    phase = params.get("phase", "after")
    if phase != "after":
        found["retrain"] = f"{phase} training"
    # Without rounds to spread a target over, plans of different schedules are one and the same.
    if params.get("rounds", 1) == 1 or not any(name in params for name in FINAL):
        found["schedule"] = UNSCHEDULED
    return found | {"technique": ", ".join(found[name] for name in AXES if found[name] != UNSCHEDULED)}


def _axis(axis: str, units: Sequence[_Unit], sign: int) -> dict[str, Any]:
    """What is said of one axis within a band; `sign` is -1 for a measure that should be small."""
    groups: dict[str, list[_Unit]] = defaultdict(list)
    for unit in units:
        groups[unit.technique[axis]].append(unit)
    observed = {value: _observations(of_value) for value, of_value in groups.items()}
    order = sorted(groups, key=lambda value: (-sign * fmean(observed[value]), value))
    best, says = _verdict(order, observed, sign)
    return {"best": best, "says": says, "values": [_told(value, groups[value], observed[value]) for value in order]}


def _observations(units: Sequence[_Unit]) -> list[float]:
    """What the interval is over: trials, each by its mean; the seeds where there is one trial."""
    return list(units[0].changes) if len(units) == 1 else [fmean(unit.changes) for unit in units]


def _told(value: str, units: Sequence[_Unit], observed: Sequence[float]) -> dict[str, Any]:
    test = [change for unit in units for change in unit.test_changes]
    return {
        "value": value,
        "trials": len(units),
        "seeds": sum(len(unit.changes) for unit in units),
        "change": fmean(observed),
        "half_width": _half_width(observed),
        "test_change": fmean(test) if np.isfinite(test).all() else None,
        "sparsity": fmean(unit.sparsity for unit in units),
        "over": "trials" if len(units) > 1 else "seeds",
    }


def _half_width(observed: Sequence[float]) -> float | None:
    from scipy.special import stdtrit

    if len(observed) < LEAST:
        return None
    return float(stdtrit(len(observed) - 1, 1 - LEVEL / 2) * stdev(observed) / len(observed) ** 0.5)


def _verdict(order: Sequence[str], observed: Mapping[str, Sequence[float]], sign: int) -> tuple[str | None, str]:
    """The value that did best, if that is sure, and the words for it."""
    if len(order) == 1:
        return None, "the only one tried"
    enough = [value for value in order if len(observed[value]) >= LEAST]
    if len(enough) < 2:
        return None, f"too few to say: two of these need {LEAST} trials each, or one trial with {LEAST} seeds"
    first, *others = enough
    unsure = _unsure(first, others, observed, sign)
    left = len(order) - len(enough)
    beside = f" ({left} more with too few to say)" if left else ""
    if unsure:
        return None, f"not distinguishable: {first} from {', '.join(unsure)}{beside}"
    return first, f"{first} did best{beside}"


def _unsure(first: str, others: Sequence[str], observed: Mapping[str, Sequence[float]], sign: int) -> list[str]:
    """Those of the others that the first is not surely better than (Welch's t, 1947; Holm, 1979)."""
    by_p = sorted((_welch(observed[first], observed[other], sign), other) for other in others)
    for place, (p, _) in enumerate(by_p):
        if p > LEVEL / (len(by_p) - place):
            return [other for _, other in by_p[place:]]
    return []


def _welch(one: Sequence[float], other: Sequence[float], sign: int) -> float:
    """The two-sided p of a difference in means; 1 where the first one's is not the better."""
    from scipy.special import stdtr

    gap = sign * (fmean(one) - fmean(other))
    parts = [stdev(values) ** 2 / len(values) for values in (one, other)]
    if gap <= 0:
        return 1.0
    if sum(parts) == 0:
        return 0.0
    degrees = sum(parts) ** 2 / sum(p**2 / (len(v) - 1) for p, v in zip(parts, (one, other), strict=True))
    return 2 * float(stdtr(degrees, -gap / sum(parts) ** 0.5))


def _notes(by_task: Mapping[tuple[str, Objective], Sequence[Study]]) -> list[str]:
    """What the reader must know before anything is believed."""
    notes = [
        "each axis is told over whatever else the trials varied, and within a band sparsities differ: a search "
        "that learns tries what does well more often, and at other sparsities"
    ]
    if len(by_task) > 1:
        notes.append(
            f"{len(by_task)} tasks or measures, told apart: nothing is compared between different tasks, models or data"
        )
    for (_, _), studies in by_task.items():
        trains = {json.dumps(study.spec.train.model_dump(mode="json"), sort_keys=True) for study in studies}
        if len(trains) > 1:
            names = ", ".join(study.spec.name for study in studies)
            notes.append(f"the studies {names} are put together although their [train] differs")
    return notes
