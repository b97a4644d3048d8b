"""The front of a study, from its outcomes: points are (trial, round), means over seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev, stdev
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.errors import InputError, QueryError, UnknownName
from orchestrator.objectives import OBJECTIVES, Objective
from orchestrator.outcome import DENSE_TRIAL, MEASURES
from orchestrator.store.store import Store
from search import pareto
from search.query import Bound, BoundError, nearest_miss, parse, satisfied

if TYPE_CHECKING:
    from orchestrator.store.tables import Outcomes

Columns = dict[str, NDArray[np.float64]]

_CLASSES = ("class_accuracy", "test_class_accuracy")
_DESCRIBED = ("key", "trial", "round", "seed", "params", *MEASURES, *_CLASSES, "layers", "metrics")
"""The columns that a point is described by."""

_LARGEST_VOLUME = 1000
"""Numbers in a front of more than two objectives whose hypervolume is still a matter of a second."""


@dataclass(frozen=True, kw_only=True)
class Points:
    """Every (trial, round) that all seeds have measured: columns of means, row by row."""

    trials: NDArray[np.int64]
    rounds: NDArray[np.int64]
    columns: Columns
    dense_rows: list[int]
    rows: list[NDArray[np.int64]] | NDArray[np.int64]
    """The rows of the outcome table behind each point."""


@dataclass(frozen=True, kw_only=True)
class Front:
    """The points that no other point dominates, in order of the first objective, best first."""

    study: str
    objectives: tuple[Objective, ...]
    dense: dict[str, Any] | None
    points: tuple[dict[str, Any], ...]
    knee: int | None
    """The position in `points` where giving up any more of one objective for another stops paying."""
    hypervolume: dict[str, Any] | None = None
    """`value`, the volume that the points dominate, up to `reference`, by objective: 0 where more is better, the dense
    model's value where less is. None where one point was asked for, something is missing, or it would take long."""

    def to_pandas(self) -> Any:
        """The points as a `pandas.DataFrame`, best first: one column for each measure, and `params.NAME` for each
        parameter; `knee` marks one. Lists and the counts of layers are left out.

        Raises:
            InputError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise InputError("to_pandas wants pandas: pip install pandas") from error
        rows = []
        for place, point in enumerate(self.points):
            row = {name: value for name, value in point.items() if not isinstance(value, list | dict)}
            row |= {f"params.{name}": value for name, value in point["params"].items()}
            rows.append({**row, "knee": place == self.knee})
        return pandas.DataFrame(rows)

    def as_json(self) -> dict[str, Any]:
        """The document that `orchardist front --format json` prints."""
        names = [objective.name for objective in self.objectives]
        return {
            "study": self.study,
            "objectives": names,
            "dense": self.dense,
            "hypervolume": self.hypervolume,
            "front": list(self.points),
        }


def column_of(name: str) -> str:
    """The ledger's column for a measure; an objective's name means the objective's column."""
    return OBJECTIVES[name].column if name in OBJECTIVES else name


def front(
    store: Store,
    study: str,
    objectives: Sequence[Objective],
    *,
    seeds: int,
    where: Sequence[str] = (),
    minimise: str | None = None,
    constraints: Mapping[str, str] | None = None,
) -> Front:
    """The non-dominated points of a study.

    Args:
        store: where the study is.
        study: its name.
        objectives: what is good.
        seeds: how many seeds a point must have been measured under.
        where: bounds such as "accuracy >= dense - 0.01", all of which a point must keep.
        minimise: then give only the point with the least of this measure.
        constraints: the study's own bounds.

    Raises:
        QueryError: a measure that is unknown, was not measured or is of the test split; or bounds that nothing meets
            (with the nearest).
    """
    bounds = [_bound(text) for text in where]
    for name in [bound.measure for bound in bounds] + ([minimise] if minimise else []):
        if name.startswith("test_"):
            raise QueryError(
                f"{name!r} cannot choose a model: the test split is only ever reported; legal: {name[5:]!r}"
            )
    bounds += [parse(text, measure=name) for name, text in (constraints or {}).items()]
    wanted = [o.column for o in objectives] + [column_of(b.measure) for b in bounds]
    wanted += [column_of(minimise)] if minimise else []
    outcomes = store.outcomes(study)
    points = read_points(outcomes, list(dict.fromkeys(wanted)), seeds)
    _refuse_unmeasured(outcomes, points, study, [*(b.measure for b in bounds), *([minimise] if minimise else [])])
    dense = _describe_dense(outcomes, points)
    kept = _kept(points, bounds, dense or {}, where)
    if minimise is not None:
        values = points.columns[column_of(minimise)][kept]
        if len(kept) and np.isnan(values).all():
            raise QueryError(f"{minimise!r} was not measured of the points that keep the bounds")
        chosen = kept[[int(np.nanargmin(values))]] if len(kept) else kept
    else:
        values = np.array([points.columns[o.column][kept] for o in objectives]).T
        chosen = kept[pareto.front(values, [o.direction for o in objectives])]
    chosen = _in_order(chosen, points, objectives)
    table = np.column_stack([points.columns[o.column][chosen] for o in objectives])
    knee = int(pareto.knee(table, [o.direction for o in objectives])) if len(chosen) else None
    return Front(
        study=study,
        objectives=tuple(objectives),
        dense=dense,
        points=tuple(describe(outcomes, points, chosen, objectives)),
        knee=knee,
        hypervolume=None if minimise else _hypervolume(table, objectives, dense),
    )


class NothingMeets(QueryError):
    """Bounds that no point of a study keeps; the message has the nearest."""


def joined(fronts: Sequence[Front], minimise: str | None = None) -> Front:
    """One front over those of several studies of one task, each point with its `study`; the dense model is the first's.

    Args:
        fronts: one or more; with `minimise` each has one point, of which the least is taken.
        minimise: as for `front`.

    Raises:
        QueryError: their objectives differ.
    """
    first = fronts[0]
    for other in fronts[1:]:
        if other.objectives != first.objectives:
            named = [", ".join(objective.name for objective in found.objectives) for found in (first, other)]
            raise QueryError(
                f"the studies {first.study!r} and {other.study!r} do not compare: their objectives are {named[0]}; "
                f"and {named[1]}"
            )
    points = [{"study": found.study, **point} for found in fronts for point in found.points]
    columns = [column_of(minimise)] if minimise else [o.column for o in first.objectives]
    directions: list[pareto.Direction] = ["minimise"] if minimise else [o.direction for o in first.objectives]
    values = np.array([[point[name] for name in columns] for point in points]).reshape(len(points), len(columns))
    chosen = pareto.front(values, directions)[: 1 if minimise else None].tolist()
    best = first.objectives[0]
    chosen.sort(key=lambda i: -points[i][best.column] if best.direction == "maximise" else points[i][best.column])
    table = values[chosen]
    return Front(
        study=", ".join(found.study for found in fronts),
        objectives=first.objectives,
        dense=first.dense,
        points=tuple(points[i] for i in chosen),
        knee=int(pareto.knee(table, directions)) if chosen else None,
        hypervolume=None if minimise else _hypervolume(table, first.objectives, first.dense),
    )


def _hypervolume(
    values: NDArray[np.float64], objectives: Sequence[Objective], dense: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    costly = len(objectives) > 2 and len(values) * len(objectives) > _LARGEST_VOLUME
    if costly:
        return None
    reference: dict[str, float] = {}
    for objective in objectives:
        worst = 0.0 if objective.direction == "maximise" else (dense or {}).get(objective.column)
        if worst is None:
            return None
        reference[objective.name] = worst
    directions = [objective.direction for objective in objectives]
    volume = pareto.hypervolume(values, directions, list(reference.values()))
    return {"value": volume, "reference": reference}


def read_points(outcomes: Outcomes, columns: Sequence[str], seeds: int) -> Points:
    """The points of a study with the means of `columns`; reads nothing else of the ledger."""
    own = [name for name in columns if name in MEASURES]
    other = [name for name in columns if name not in MEASURES]
    table = outcomes.table(["trial", "round", *own, *(["metrics"] if other else [])])
    trials, rounds = (np.asarray(table[name], dtype=np.int64) for name in ("trial", "round"))
    values: Columns = {name: np.asarray(table[name].to_numpy(), dtype=np.float64) for name in own}
    if other:
        metrics = [json.loads(text or "{}") for text in table["metrics"].to_pylist()]
        for name in other:
            values[name] = np.array([_float(row.get(name)) for row in metrics])
            if metrics and not any(name in row for row in metrics):
                raise QueryError(str(UnknownName("measure", name, known_measures(metrics[0]))))
    is_dense = trials == DENSE_TRIAL
    rows = np.flatnonzero(trials >= 0)
    if seeds == 1:
        return Points(
            trials=trials[rows],
            rounds=rounds[rows],
            columns={name: column[rows] for name, column in values.items()},
            dense_rows=np.flatnonzero(is_dense).tolist(),
            rows=rows,
        )
    place = trials[rows] * (int(rounds.max(initial=0)) + 1) + rounds[rows]
    order = np.argsort(place, kind="stable")
    _, starts, counts = np.unique(place[order], return_index=True, return_counts=True)
    whole = counts == seeds
    groups = [rows[order[start : start + seeds]] for start in starts[whole]]
    table_of = np.array(groups, dtype=np.int64).reshape(-1, seeds)
    return Points(
        trials=trials[table_of[:, 0]],
        rounds=rounds[table_of[:, 0]],
        columns={name: column[table_of].mean(axis=1) for name, column in values.items()},
        dense_rows=np.flatnonzero(is_dense).tolist(),
        rows=groups,
    )


def _refuse_unmeasured(outcomes: Outcomes, points: Points, study: str, asked: Sequence[str]) -> None:
    """Refuse to choose by what nobody measured, and by times on several devices, which do not compare."""
    for name in asked:
        column = points.columns[column_of(name)]
        if len(column) and np.isnan(column).all():
            how = "; a study with it among its objectives or constraints does" if name == "latency_ms" else ""
            raise QueryError(f"{name!r} was not measured in the study {study!r}{how}")
    if "latency_ms" in asked:
        devices = {device for device in outcomes.table(["device"])["device"].to_pylist() if device}
        if len(devices) > 1:
            several = ", ".join(sorted(devices))
            raise QueryError(f"'latency_ms' was measured on several devices ({several}), whose times do not compare")


def known_measures(metrics: Mapping[str, Any] = {}) -> list[str]:
    """The names that a bound may use: never the test split's."""
    return sorted(name for name in {*MEASURES, *OBJECTIVES, *metrics} if not name.startswith("test_"))


def _bound(text: str) -> Bound:
    try:
        bound = parse(text)
    except BoundError as error:
        raise QueryError(str(error)) from error
    return bound


def _kept(
    points: Points, bounds: Sequence[Bound], dense_model: Mapping[str, Any], where: Sequence[str]
) -> NDArray[np.int64]:
    everything = np.arange(len(points.trials))
    if not bounds or not len(everything):
        return everything
    columns = {b.measure: points.columns[column_of(b.measure)] for b in bounds}
    dense = {b.measure: dense_model[column_of(b.measure)] for b in bounds if column_of(b.measure) in dense_model}
    try:
        kept = np.flatnonzero(satisfied(bounds, columns, dense))
        if not len(kept) and where:
            nearest = nearest_miss(bounds, columns, dense)
            assert nearest is not None
            has = ", ".join(f"{name} = {_short(values[nearest])}" for name, values in columns.items())
            place = f"trial {points.trials[nearest]}, round {points.rounds[nearest]}"
            raise NothingMeets(f"no point keeps {' and '.join(map(str, bounds))}; the nearest ({place}) has {has}")
    except BoundError as error:
        raise QueryError(str(error)) from error
    return kept


def _short(value: float) -> str:
    """Sizes are whole numbers that an exponent would hide."""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _in_order(chosen: NDArray[np.int64], points: Points, objectives: Sequence[Objective]) -> NDArray[np.int64]:
    keys: list[NDArray[Any]] = [points.rounds[chosen], points.trials[chosen]]
    for objective in reversed(objectives):
        column = points.columns[objective.column][chosen]
        keys.append(-column if objective.direction == "maximise" else column)
    return chosen[np.lexsort(keys)]


def describe(
    outcomes: Outcomes, points: Points, chosen: NDArray[np.int64], objectives: Sequence[Objective]
) -> list[dict[str, Any]]:
    """Everything that is recorded of the chosen points, with means over their seeds.

    Args:
        outcomes: of the study.
        points: from `read_points`.
        chosen: positions in them.
        objectives: by which the seed nearest the mean is found, whose key stands for the point.
    """
    groups = [np.atleast_1d(points.rows[int(index)]).tolist() for index in chosen]
    if not groups:
        return []
    rows = iter(outcomes.rows([row for group in groups for row in group], _DESCRIBED))
    return [_point([next(rows) for _ in group], objectives) for group in groups]


def _describe_dense(outcomes: Outcomes, points: Points) -> dict[str, Any] | None:
    """The dense model of the task as it is now: a change of task that was accepted leaves those of before behind."""
    also = ("task_digest", "finished_at")
    rows = outcomes.rows(points.dense_rows, (*_DESCRIBED, *also)) if points.dense_rows else []
    if not rows:
        return None
    latest = max(rows, key=lambda row: row["finished_at"] or 0.0)["task_digest"]
    return _point([row for row in rows if row["task_digest"] == latest], ())


def _point(rows: Sequence[Mapping[str, Any]], objectives: Sequence[Objective]) -> dict[str, Any]:
    metrics = [json.loads(row["metrics"] or "{}") for row in rows]
    names = [*(name for name in MEASURES), *metrics[0]]
    by_name = {
        n: [_float(row[n] if n in MEASURES else m.get(n)) for row, m in zip(rows, metrics, strict=True)] for n in names
    }
    means = {name: _mean(values) for name, values in by_name.items()}
    nearest = min(range(len(rows)), key=lambda i: (_distance(by_name, means, i, objectives), rows[i]["seed"]))
    point: dict[str, Any] = {
        "key": rows[nearest]["key"],
        "keys": [row["key"] for row in rows],
        "trial": rows[0]["trial"],
        "round": rows[0]["round"],
        "n": len(rows),
        "params": json.loads(rows[0]["params"] or "{}"),
        **{name: value for name, value in means.items() if value is not None},
    }
    point["std"] = {
        name: stdev(values) for name, values in by_name.items() if len(rows) > 1 and means[name] is not None
    }
    point["half_width"] = _half_widths(point["std"], len(rows))
    for name in _CLASSES:
        lists = [row[name] for row in rows if row[name]]
        if lists:
            columns = zip(*lists, strict=True)
            point[name] = [_mean([_float(value) for value in column]) for column in columns]
    point["layers"] = json.loads(rows[nearest]["layers"] or "{}")
    for name, kind in MEASURES.items():
        if kind == "integer" and name in point and float(point[name]).is_integer():
            point[name] = int(point[name])
    return point


def _half_widths(deviations: Mapping[str, float], seeds: int) -> dict[str, float]:
    """Half of the 95 % interval of each mean over seeds (Student's t)."""
    if not deviations:
        return {}
    from scipy.special import stdtrit

    factor = float(stdtrit(seeds - 1, 0.975)) / math.sqrt(seeds)
    return {name: factor * deviation for name, deviation in deviations.items()}


def _distance(
    by_name: Mapping[str, list[float]], means: Mapping[str, float | None], row: int, objectives: Sequence[Objective]
) -> float:
    """How far one seed is from the mean, in standard deviations, over the objectives."""
    total = 0.0
    for objective in objectives:
        values, mean = by_name[objective.column], means[objective.column]
        if mean is not None and (spread := pstdev(values)) > 0:
            total += ((values[row] - mean) / spread) ** 2
    return total


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values and all(map(math.isfinite, values)) else None


def _float(value: Any) -> float:
    return float("nan") if value is None else float(value)
