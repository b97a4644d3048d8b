"""A finished search as an Optuna study in a database, for optuna-dashboard and everything else that reads those.

Choices keep their values here, where the sampler sees them by index: a choice that no database column can hold (a list,
a table) stands as its JSON text. Fixed parameters are user attributes of the study, since nothing was drawn for them.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from search.pareto import Direction
from search.proposer import State
from search.space import Choice, Fixed, Range, Space

if TYPE_CHECKING:
    import optuna
    from sqlalchemy.engine import Engine

MARK = "orchardist"
"""The user attribute that tells a study which was written here, and may be replaced, from anybody else's."""


class ExportError(ValueError):
    """The database cannot be written; the message names it, without its password."""


@dataclass(frozen=True, kw_only=True)
class Past:
    """One trial as it is told. `values` are there when done; times are in seconds since 1970 UTC, None if unknown."""

    number: int
    params: Mapping[str, Any]
    state: State
    values: Sequence[float] | None = None
    constraints: Mapping[str, float] = field(default_factory=dict)
    """How far each bound is violated: above 0 it is."""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """Plain JSON."""
    began: float | None = None
    ended: float | None = None


def write(
    url: str,
    name: str,
    space: Space,
    objectives: Mapping[str, Direction],
    trials: Sequence[Past],
    attributes: Mapping[str, Any],
) -> int:
    """Write a study into a database; one that was written here before is replaced. Returns the number of trials.

    Args:
        url: as SQLAlchemy takes it, such as "sqlite:///study.db".
        name: of the Optuna study.
        space: which parameters there are.
        objectives: name -> direction.
        trials: in order of their numbers.
        attributes: of the study; plain JSON.

    Raises:
        ExportError: the database cannot be opened or written, or has a study of this name that somebody else made.
    """
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    place = _without_password(url)
    try:
        storage = optuna.storages.RDBStorage(url)
        try:
            _hasten(storage.engine)
            _make_room(storage, name, place)
            study = optuna.create_study(
                storage=storage,
                study_name=name,
                directions=["maximize" if direction == "maximise" else "minimize" for direction in objectives.values()],
            )
            study.set_user_attr(MARK, True)
            fixed = {p.name: p.value for p in space.parameters if isinstance(p, Fixed)}
            for key, value in {**attributes, "fixed": fixed}.items():
                study.set_user_attr(key, value)
            # Called without the decorator that warns of an experiment: muting a warning is not safe between threads.
            inspect.unwrap(optuna.Study.set_metric_names)(study, list(objectives))
            study.add_trials([_frozen(past, space) for past in trials])
        finally:
            storage.remove_session()
            storage.engine.dispose()
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError, ImportError, RuntimeError) as error:
        raise ExportError(f"{place} cannot be written: {_first_line(error)}") from error
    return len(trials)


def _hasten(engine: Engine) -> None:
    """SQLite waits for the disk after each trial, which what can be exported again is not worth."""
    from sqlalchemy.event import listen

    if engine.dialect.name == "sqlite":
        listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous = OFF"))
        engine.dispose()


def _make_room(storage: optuna.storages.RDBStorage, name: str, place: str) -> None:
    """Remove an earlier copy of the study."""
    found = next((study for study in storage.get_all_studies() if study.study_name == name), None)
    if found is None:
        return
    if MARK not in storage.get_study_user_attrs(found._study_id):
        raise ExportError(f"{place} has an Optuna study {name!r} that Orchardist did not write; legal: another file")
    storage.delete_study(found._study_id)


def _frozen(past: Past, space: Space) -> optuna.trial.FrozenTrial:
    from optuna.trial import TrialState, create_trial

    states = {
        "done": TrialState.COMPLETE,
        "failed": TrialState.FAIL,
        "stopped": TrialState.PRUNED,
        "running": TrialState.RUNNING,
    }
    drawn = {name: space.parameter(name) for name in past.params}
    varied = {name: p for name, p in drawn.items() if isinstance(p, Choice | Range)}
    trial = create_trial(
        state=states[past.state],
        values=None if past.values is None else list(past.values),
        params={name: _plain(past.params[name]) for name in varied},
        distributions={name: _distribution(parameter) for name, parameter in varied.items()},
        user_attrs=dict(past.attributes),
        constraints=dict(past.constraints),
    )
    # Optuna keeps local times without their zone, and has no trial without them: where none is known it is now.
    if past.began is not None:
        trial.datetime_start = datetime.fromtimestamp(past.began)
    if past.ended is not None and past.state != "running":
        trial.datetime_complete = datetime.fromtimestamp(past.ended)
    return trial


def _distribution(parameter: Choice | Range) -> optuna.distributions.BaseDistribution:
    from optuna import distributions

    if isinstance(parameter, Choice):
        return distributions.CategoricalDistribution([_plain(value) for value in parameter.values])
    if parameter.integer:
        step = 1 if parameter.step is None else int(parameter.step)
        assert parameter.count is not None, "whole numbers can be counted"
        high = int(parameter.high) if parameter.log else int(parameter.at(parameter.count - 1))
        return distributions.IntDistribution(int(parameter.low), high, log=parameter.log, step=step)
    if parameter.step is not None:
        assert parameter.count is not None, "a stepped range can be counted"
        return distributions.FloatDistribution(parameter.low, parameter.at(parameter.count - 1), step=parameter.step)
    return distributions.FloatDistribution(parameter.low, parameter.high, log=parameter.log)


def _plain(value: Any) -> Any:
    """What a categorical parameter may be in a database: lists and tables as JSON text."""
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)


def _without_password(url: str) -> str:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError as error:
        shown = url.rpartition("@")[2]
        raise ExportError(f"{shown!r} is no database URL; legal: one such as sqlite:///study.db") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
