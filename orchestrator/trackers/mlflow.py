"""A study as an MLflow experiment: one run for each trial and round, with its parameters, its measures and its card."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator.errors import InputError, QueryError
from orchestrator.export.card import card_of
from orchestrator.front import describe, read_points

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from orchestrator.study import Study

TAG = "orchardist.point"
"""The tag that tells which point a run is, so that no point is logged twice."""

_UNCERTIFIED = ("certificate", "latency", "exports", "refused", "says")
"""What a card has only once its model was fetched."""


def export_mlflow(study: Study, uri: str) -> int:
    """Log every measured (trial, round) and the dense model as runs of an experiment that has the study's name.

    Means over the seeds; the artefact `card.json` is of the seed nearest them, as `fetch` writes it before it has
    certified anything. Runs that are there from an earlier call stay, and only what is new is added.

    Args:
        study: an opened study.
        uri: MLflow's tracking URI, such as "sqlite:///mlflow.db" or "http://host:5000".

    Returns:
        How many runs were added.

    Raises:
        InputError: MLflow is not installed, or does not take the URI.
        QueryError: nothing was measured yet.
    """
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    except ImportError as error:
        raise InputError('export-mlflow wants MLflow: pip install "orchardist[mlflow]"') from error
    found = study.front()
    outcomes = study.store.outcomes(study.spec.name)
    points = read_points(outcomes, [], len(study.spec.seeds))
    described = describe(outcomes, points, np.arange(len(points.trials)), found.objectives)
    if found.dense is not None:
        described.insert(0, found.dense)
    if not described:
        raise QueryError(f"nothing of the study {study.spec.name!r} is measured yet")
    best = {point["key"] for point in found.points}
    knee = None if found.knee is None else found.points[found.knee]["key"]
    rows = {row["key"]: row for row in study.table().to_pylist()}
    try:
        client = MlflowClient(tracking_uri=uri)
        experiment = _experiment(client, study.spec.name)
        there = _logged(client, experiment)
        added = [point for point in described if _name(point) + point["key"] not in there]
        for point in added:
            tags = {
                TAG: _name(point) + point["key"],
                "orchardist.key": point["key"],
                "orchardist.digest": study.spec.digest(),
                "orchardist.front": str(point["key"] in best).lower(),
                "orchardist.knee": str(point["key"] == knee).lower(),
            }
            _log(client, experiment, point, tags, _card(study, rows[point["key"]]))
    except MlflowException as error:
        raise InputError(f"--to: MLflow says: {str(error).strip().partition(chr(10))[0]}") from error
    return len(added)


def _experiment(client: MlflowClient, name: str) -> str:
    found = client.get_experiment_by_name(name)
    return str(client.create_experiment(name) if found is None else found.experiment_id)


def _logged(client: MlflowClient, experiment: str) -> set[str]:
    """The points that have a finished run; one that was interrupted is logged again."""
    there: set[str] = set()
    token: str | None = None
    while True:
        page = client.search_runs([experiment], "attributes.status = 'FINISHED'", max_results=1000, page_token=token)
        there.update(run.data.tags.get(TAG, "") for run in page)
        token = page.token
        if not token:
            return there


def _log(
    client: MlflowClient, experiment: str, point: Mapping[str, Any], tags: Mapping[str, str], card: Mapping[str, Any]
) -> None:
    from mlflow.entities import Metric, Param

    run = client.create_run(experiment, run_name=_name(point), tags=dict(tags)).info.run_id
    said = {"trial": point["trial"], "round": point["round"], "seeds": point["n"], **point["params"]}
    now = round(1000 * time.time())
    client.log_batch(
        run,
        params=[Param(name, value if isinstance(value, str) else json.dumps(value)) for name, value in said.items()],
        metrics=[
            Metric(name, value, now, point["round"])
            for name, value in point.items()
            if isinstance(value, int | float) and name not in ("trial", "round", "n")
        ],
    )
    client.log_dict(run, dict(card), "card.json")
    client.set_terminated(run)


def _card(study: Study, row: Mapping[str, Any]) -> dict[str, Any]:
    header = study.store.states.header(row["key"]) or {}
    card = card_of(study, row, json.loads(header.get("lineage", "[]")))
    return {name: value for name, value in card.items() if name not in _UNCERTIFIED}


def _name(point: Mapping[str, Any]) -> str:
    return "dense" if point["trial"] < 0 else f"trial-{point['trial']}-round-{point['round']}"
