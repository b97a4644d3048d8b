"""A study as an Optuna study in a database, which optuna-dashboard opens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from orchestrator.errors import InputError, QueryError
from orchestrator.trackers.trials import Trial, trials
from search.optuna_study import ExportError, Past, write

if TYPE_CHECKING:
    from orchestrator.study import Study


def export_optuna(study: Study, url: str) -> int:
    """Write every trial of a study into the database at `url`; one that was exported there before is replaced.

    Parameters keep their ranges and values, a bound that is violated stands above 0, and the measures of the last
    round and the keys of its states are user attributes. The Optuna study has the study's name.

    Args:
        study: an opened study.
        url: as SQLAlchemy takes it, such as "sqlite:///study.db".

    Returns:
        How many trials there are.

    Raises:
        InputError: the database cannot be written, or has another study of that name.
        QueryError: the study has no trial yet.
    """
    found = trials(study)
    if not found:
        raise QueryError(f"the study {study.spec.name!r} has no trial yet")
    attributes = {"task": study.spec.task, "seeds": list(study.spec.seeds), "digest": study.spec.digest()}
    try:
        return write(
            url,
            study.spec.name,
            study.spec.search_space(),
            {objective.name: objective.direction for objective in study.objectives()},
            [_past(trial) for trial in found],
            attributes | {"constraints": dict(study.spec.constraints)},
        )
    except ExportError as error:
        raise InputError(f"--to {error}") from error


def _past(trial: Trial) -> Past:
    attributes: dict[str, Any] = dict(trial.measures)
    if trial.keys:
        attributes["keys"] = list(trial.keys)
    if trial.reason:
        attributes["reason"] = trial.reason
    return Past(
        number=trial.number,
        params=trial.params,
        state=trial.state,
        values=trial.values,
        constraints=trial.constraints,
        attributes=attributes,
        began=trial.began,
        ended=trial.ended,
    )
