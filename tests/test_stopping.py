"""Whole studies that stop poor trials early: the same ones whoever runs them, and never for good."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from orchestrator import Study
from orchestrator.pools.local import LocalPool
from orchestrator.progress import Standing
from tests.orchestrator.pools import small
from tests.test_study import Counting, assert_same_models

HALVING: Mapping[str, Any] = {"rule": "halving", "reduction_factor": 3, "bracket": 6}
SPACE = {**small.SPACE, "rounds": {"low": 2, "high": 3}}
FIELDS: Mapping[str, Any] = {"trials": 12, "space": SPACE, "stopping": HALVING}


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "orchardist")


def run(store: str | Path, root: Path, pool: LocalPool | None = None, **fields: Any) -> tuple[Study, Standing]:
    study = Study(small.spec(**{**FIELDS, **fields}), store, root=root)
    return study, study.run(pool or LocalPool())


def last_rounds(study: Study) -> dict[int, tuple[str, int]]:
    """How each trial ended and after which round."""
    rows = study.store.table(study.spec.name, "events").to_pylist()
    ended = [row for row in rows if row["event"] in ("done", "stopped")]
    return {row["trial"]: (row["event"], json.loads(row["detail"])["round"]) for row in ended}


@pytest.fixture(scope="module")
def reference(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    study, standing = run(tmp_path_factory.mktemp("reference"), root)
    assert (standing.done, standing.stopped, standing.failed, standing.ended) == (4, 8, 0, 12)
    return study


def test_a_third_of_each_bracket_goes_on(reference: Study) -> None:
    ends = last_rounds(reference)
    assert len(ends) == 12
    for bracket in (range(6), range(6, 12)):
        assert sorted(ends[number][0] for number in bracket) == ["done"] * 2 + ["stopped"] * 4
    assert {last for how, last in ends.values() if how == "stopped"} == {1}
    status = reference.status()
    assert status["state"] == "done"
    assert status["trials"] == {"asked": 12, "done": 4, "running": 0, "failed": 0, "stopped": 8}


def test_less_is_trained_and_what_was_is_measured(reference: Study, root: Path, memory: str) -> None:
    whole, _ = run(memory, root, stopping={})
    assert reference.status()["epochs"]["run"] < 0.8 * whole.status()["epochs"]["run"]
    every = {row["key"]: row for row in whole.table().to_pylist()}
    rows = reference.table().to_pylist()
    assert {row["key"] for row in rows} < every.keys()
    assert all(row["valid_accuracy"] == every[row["key"]]["valid_accuracy"] for row in rows if "valid_accuracy" in row)
    shown = {(point["trial"], point["round"]) for point in reference.front().points}
    assert shown, "points of stopped trials are points like others"


@pytest.mark.parametrize("after", [1, 5, 9, 13])
def test_interrupted_it_stops_the_same_trials(after: int, reference: Study, root: Path, memory: str) -> None:
    first, second = Counting(interrupt_after=after), Counting()
    with pytest.raises(KeyboardInterrupt):
        run(memory, root, first)
    study, _ = run(memory, root, second)
    assert last_rounds(study) == last_rounds(reference)
    assert_same_models(small.models(reference.store), small.models(study.store))
    keys = [report.key for report in first.reported + second.reported]
    assert len(keys) == len(set(keys)), "a stage was run twice"
    for name in ("trials", "epochs", "stages", "best"):
        assert study.status()[name] == reference.status()[name]


@pytest.mark.ray
def test_two_workers_stop_the_same_trials(reference: Study, root: Path, tmp_path: Path, ray_cluster: None) -> None:
    from orchestrator.pools.ray import RayPool

    study = Study(small.spec(**FIELDS), tmp_path, root=root)
    study.run(lambda: RayPool(2))
    assert last_rounds(study) == last_rounds(reference)


def test_a_study_that_is_over_runs_nothing(reference: Study, root: Path) -> None:
    pool = Counting()
    _, standing = run(reference.store.url, root, pool)
    assert not pool.reported
    assert (standing.done, standing.stopped) == (4, 8)


def test_more_trials_take_nothing_back(root: Path, memory: str) -> None:
    study, _ = run(memory, root, trials=3)
    before = last_rounds(study)
    assert sorted(how for how, _ in before.values()) == ["done", "stopped", "stopped"]
    study, standing = run(memory, root, trials=12)
    after = last_rounds(study)
    assert all(after[number] == ending for number, ending in before.items() if ending[0] == "done")
    assert standing.done + standing.stopped == len(after) == 12
    assert standing.epochs_asked == study.status()["epochs"]["asked"]
    assert study.status()["state"] == "done"


def test_without_the_rule_stopped_trials_go_on(root: Path, memory: str) -> None:
    run(memory, root)
    pool = Counting()
    study, standing = run(memory, root, pool, stopping={})
    assert (standing.done, standing.stopped) == (12, 0)
    whole, _ = run(f"memory://{uuid4().hex}", root, stopping={})
    assert_same_models(small.models(whole.store), small.models(study.store))
    assert study.status()["epochs"] == whole.status()["epochs"]
    assert standing.epochs_asked == study.status()["epochs"]["asked"]


@pytest.mark.parametrize("sampler", ["tpe", "grid"])
def test_other_samplers(sampler: str, root: Path, memory: str) -> None:
    space = SPACE | {"rate": [0.2, 0.4], "retrain": "finetune", "criterion": "magnitude"}
    del space["rewind_epoch"]
    _, standing = run(memory, root, sampler=sampler, space=space, trials=8)
    assert standing.failed == 0 and standing.stopped > 0
    assert standing.ended == (8 if sampler == "tpe" else 4), "the grid has four points"


def test_two_seeds_and_a_bound_relative_to_the_dense_model(root: Path, memory: str) -> None:
    study, standing = run(memory, root, seeds=[0, 1], constraints={"accuracy": ">= dense - 0.3"}, trials=6)
    assert (standing.done, standing.stopped) == (2, 4)
    assert all(point["n"] == 2 for point in study.front().points)


def test_a_trial_that_fails_is_not_waited_for(root: Path, memory: str) -> None:
    space = SPACE | {"lr": [0.05, 1e6]}
    _, standing = run(memory, root, space=space, task_params={"trouble": "raises"})
    assert standing.failed > 0 and standing.done > 0
    assert standing.ended == 12


def test_controls_wait_until_a_ticket_is_whole(root: Path, memory: str) -> None:
    space = {"criterion": "magnitude", "rate": [0.2, 0.3, 0.4], "rounds": 2, "retrain": "rewind", "rewind_epoch": 1}
    study, standing = run(memory, root, space=space, sampler="grid", trials=3, tickets={"controls": ["shuffled"]})
    assert (standing.done, standing.stopped) == (1, 2)
    assert [list(ticket["controls"]) for ticket in study.tickets(structure=False)["tickets"]] == [[], ["shuffled"]]


def test_the_optuna_export_knows_them(reference: Study) -> None:
    from orchestrator.trackers.trials import trials

    assert [trial.state for trial in trials(reference)].count("stopped") == 8


def test_where_nobody_has_rounds_to_go_on_with_it_is_said(root: Path, memory: str) -> None:
    study = Study(small.spec(**{**FIELDS, "space": {**small.SPACE, "rounds": 1}}), memory, root=root)
    assert any("stopping does nothing" in line for line in study.warnings())
    assert not any("stopping" in line for line in Study(small.spec(**FIELDS), memory, root=root).warnings())
