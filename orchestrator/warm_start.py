"""What earlier studies of a store found, as a beginning for a new one: their best configurations, and all they saw.

It is worked out once, when the study is first run, and kept with it: a restart proposes the same, whatever the earlier
studies have become.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator import history
from orchestrator.canonical import digest
from orchestrator.errors import InputError, SpecError, UnknownName
from orchestrator.objectives import Objective
from orchestrator.planning.trial import trial_plan
from orchestrator.settings import IN_SPACE, Choices, TrainSettings
from orchestrator.spec import StudySpec
from orchestrator.store.store import Store
from search.pareto import Direction, best_first
from search.proposer import LEARNS
from search.space import Choice, Range, SpaceError

if TYPE_CHECKING:
    from orchestrator.driver import Setting

MOST_PROPOSED = 10
"""Configurations that are proposed before all others, at most."""

MOST_TOLD = 500
"""Earlier trials that a sampler is told of, at most: the best."""

Point = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """What a study begins with.

    Args:
        points: flat parameters to propose first, the best one first.
        told: other trials for a sampler that learns: parameters, values and violations of the bounds.
        says: a line for each earlier study.
    """

    points: tuple[Point, ...] = ()
    told: tuple[tuple[Point, tuple[float, ...], Mapping[str, float]], ...] = ()
    says: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain data, to be kept with the study."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> WarmStart:
        """The inverse of `as_json`, also after a way through JSON."""
        told = tuple((dict(params), tuple(values), dict(bounds)) for params, values, bounds in found["told"])
        return cls(points=tuple(found["points"]), told=told, says=tuple(found["says"]))


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """A finished trial of an earlier study, as it would be here."""

    point: Point
    values: tuple[float, ...]
    """In the earlier study's objectives."""
    constraints: Mapping[str, float]
    same: bool
    """Whether all that the new study holds constant was so there."""


@dataclass(frozen=True, kw_only=True)
class _Earlier:
    """An earlier study: its trials that are legal here, the best first."""

    name: str
    trials: list[_Trial]
    finished: int
    places: Sequence[int]
    """Where the new study's objectives stand among its own."""
    not_told: str
    """Why its trials teach the sampler nothing; empty where they do."""


def resolve(store: Store, aim: Setting) -> WarmStart:
    """What the studies named in `warm_start` have for a new one.

    Their best configurations that are legal in its space come first, those of several studies in turn. A sampler that
    learns is told of the others, where task, objectives, bounds and all constants are the same.

    Args:
        store: where they are.
        aim: the new study, its task and objectives.

    Raises:
        SpecError: there is no such study, it has no finished trial, or none of them is legal in the new space.
    """
    earlier = [_earlier(store, name, aim) for name in aim.spec.warm_start]
    points = _first(earlier, [digest(point) for point in aim.spec.points()])
    known = {digest(point) for point in points}
    told: dict[str, tuple[Point, tuple[float, ...], Mapping[str, float]]] = {}
    counts = []
    for study in earlier:
        before = len(told)
        for trial in study.trials if not study.not_told else ():
            name = digest(trial.point)
            if trial.same and name not in known and name not in told and len(told) < MOST_TOLD:
                told[name] = trial.point, tuple(trial.values[place] for place in study.places), trial.constraints
        counts.append(len(told) - before)
    says = [_said(study, count, len(points)) for study, count in zip(earlier, counts, strict=True)]
    return WarmStart(points=tuple(points), told=tuple(told.values()), says=tuple(says))


def _first(earlier: Sequence[_Earlier], enqueued: Sequence[str]) -> list[Point]:
    """The configurations to propose first: the best of each study in turn, none twice."""
    seen = set(enqueued)
    points: list[Point] = []
    for place in range(max(len(study.trials) for study in earlier)):
        for study in earlier:
            if place < len(study.trials) and len(points) < MOST_PROPOSED:
                point = study.trials[place].point
                if digest(point) not in seen:
                    seen.add(digest(point))
                    points.append(point)
    return points


def _said(study: _Earlier, told: int, proposed: int) -> str:
    fit = f"{len(study.trials)} configurations of the {study.finished} finished trials of {study.name!r} are legal here"
    learnt = f"not told to the sampler: {study.not_told}" if study.not_told else f"{told} told to the sampler"
    return f"warm start: {fit}; the best {proposed} in all come first, as far as the trials go; {learnt}"


def _earlier(store: Store, name: str, aim: Setting) -> _Earlier:
    found = store.read_study(name)
    if found is None:
        raise SpecError(f"warm_start: {UnknownName('study', name, store.studies())} (in the store {store.name})")
    spec, meta = StudySpec.parse(found[0], name), found[1]
    past = history.read(store, name)
    seen = [
        (past.proposals[number][0], ending.values, ending.constraints)
        for number, ending in sorted(past.endings.items())
        if ending.state == "done" and ending.values is not None and number in past.proposals
    ]
    seen += past.added
    if not seen:
        raise SpecError(f"warm_start: the study {name!r} has no finished trial; legal: one that has")
    trials, reason = [], ""
    for params, values, constraints in seen:
        try:
            trials.append(_translated(params, tuple(values), constraints, spec, aim))
        except InputError as error:
            reason = reason or str(error).splitlines()[0]
    if not trials:
        raise SpecError(f"warm_start: none of {len(seen)} finished trials of {name!r} is legal in this space: {reason}")
    objectives = [Objective(**noted) for noted in meta["objectives"]]
    names = [objective.name for objective in objectives]
    return _Earlier(
        name=name,
        trials=_best_first(trials, [objective.direction for objective in objectives]),
        finished=len(seen),
        places=[names.index(o.name) for o in aim.objectives if o.name in names],
        not_told=_not_told(spec, meta, objectives, trials, aim),
    )


def _not_told(
    spec: StudySpec, meta: Mapping[str, Any], objectives: Sequence[Objective], trials: Sequence[_Trial], aim: Setting
) -> str:
    """Why what an earlier study measured is no observation of the new one; empty where it is."""
    mine = {(o.name, o.column, o.direction) for o in aim.objectives}
    if aim.spec.sampler not in LEARNS:
        return f"the sampler {aim.spec.sampler!r} looks at no result"
    if meta.get("task_digest") != aim.info.digest:
        return "its task, model or data are others, so that its figures do not compare"
    if not mine <= {(o.name, o.column, o.direction) for o in objectives}:
        return "it has other objectives"
    if spec.constraints != aim.spec.constraints:
        return "it has other constraints"
    if any(meta.get("functions", {}).get(name, source) != source for name, source in aim.code.items()):
        return "a function of yours has changed since"
    if (spec.prune, spec.tickets) != (aim.spec.prune, aim.spec.tickets) or not any(trial.same for trial in trials):
        return "what this study holds constant was otherwise there"
    return ""


def _translated(
    params: Mapping[str, Any],
    values: tuple[float, ...],
    constraints: Mapping[str, float],
    spec: StudySpec,
    aim: Setting,
) -> _Trial:
    """An earlier trial in the terms of the new space.

    Raises:
        InputError: it cannot be said there, with the reason.
    """
    then, now = _meaning(spec, params), _meaning(aim.spec, {})
    space = aim.spec.search_space()
    for name, value in params.items():
        if name not in space.names and now.get(name) != value:
            raise InputError(f"{name} = {value!r} is not in it")
    try:
        point = space.validate(space.resolve(partial(_value, then)), "it")
    except SpaceError as error:
        raise InputError(str(error)) from error
    for name, value in point.items():
        if name in then and then[name] != value and not isinstance(space.parameter(name), Range):
            raise InputError(f"{name} = {then[name]!r} is not in it")
    trial_plan(aim.spec.settings(point, aim.code), aim.spec.seeds[0], aim.info)
    meant = now | point
    same = all(_equal(meant.get(name), value) for name, value in then.items())
    return _Trial(point=point, values=values, constraints=constraints, same=same)


def _value(then: Mapping[str, Any], parameter: Choice | Range) -> Any:
    value = then.get(parameter.name)
    if value is None:
        raise InputError(f"it does not say {parameter.name!r}, which is searched here")
    return value


def _meaning(spec: StudySpec, params: Mapping[str, Any]) -> dict[str, Any]:
    """Every value that a proposal stands for, those that it leaves to the study's constants included."""
    constants = {
        name: getattr(spec.train, name) if section is TrainSettings else Choices.model_fields[name].default
        for name, section in IN_SPACE.items()
    }
    return constants | dict(params)


def _equal(one: Any, other: Any) -> bool:
    """Values on a grid may have been moved by a rounding error."""
    if isinstance(one, float) and isinstance(other, int | float) and not isinstance(other, bool):
        return bool(np.isclose(one, other, rtol=1e-9, atol=0.0))
    return bool(one == other)


def _best_first(trials: Sequence[_Trial], directions: Sequence[Direction]) -> list[_Trial]:
    """The least violation first, then the lowest rank, then the loneliest; of equal ones the earliest."""
    order = best_first([trial.values for trial in trials], [trial.constraints for trial in trials], directions)
    return list(_once(trials[index] for index in order))


def _once(trials: Iterator[_Trial]) -> Iterator[_Trial]:
    """Each configuration once, as it comes first."""
    seen: set[str] = set()
    for trial in trials:
        name = digest(trial.point)
        if name not in seen:
            seen.add(name)
            yield trial
