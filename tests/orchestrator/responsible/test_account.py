"""The account of a small study agrees with what its ledger has recorded and with what its models answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator import Study
from orchestrator.canonical import finite
from orchestrator.errors import InputError, QueryError, TaskError
from orchestrator.responsible import record
from orchestrator.responsible.account import account
from orchestrator.stages import Stages
from orchestrator.state import from_bytes
from orchestrator.tasks.load import load
from orchestrator.tasks.source import collect
from tests.orchestrator.responsible import grouped

CONTRACT = ["key", "sparsity", "group", "support", "dense", "pruned", "change", "low", "high", "verdict"]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return grouped.finished(tmp_path_factory.mktemp("grouped"))


@pytest.fixture(scope="module")
def found(study: Study) -> dict[str, Any]:
    return account(study)


def outcomes(study: Study) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in study.table().to_pylist()}


def test_every_state_has_a_row_for_every_class_and_label(study: Study, found: dict[str, Any]) -> None:
    recorded = outcomes(study)
    pruned = {key for key, row in recorded.items() if row["round"] > 0}
    groups = ["a", "b", "c", "side=left", "side=right"]
    assert {(row["key"], row["group"]) for row in found["rows"]} == {(key, group) for key in pruned for group in groups}
    assert list(found["rows"][0])[: len(CONTRACT)] == CONTRACT
    for row in found["rows"]:
        before, after = recorded[row["dense_key"]], recorded[row["key"]]
        assert before["trial"] == -1 and before["seed"] == after["seed"] == row["seed"]
        for name, of in (("dense", before), ("pruned", after)):
            if row["of"] == "class":
                assert row[name] == of["test_class_accuracy"]["abc".index(row["group"])]
            else:
                assert row[name] == json.loads(of["metrics"])[f"test_accuracy[{row['group']}]"]
            assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
        assert row["change"] == row["pruned"] - row["dense"] and row["low"] <= row["change"] <= row["high"]


def test_the_knee_is_looked_at_under_every_seed(study: Study, found: dict[str, Any]) -> None:
    front = study.front()
    assert front.knee is not None
    knee = front.points[front.knee]
    chosen = found["chosen"]
    assert chosen["key"] == chosen["keys"][0] == knee["key"] and set(chosen["keys"]) == set(knee["keys"])
    tested = {row["key"] for row in found["rows"] if row["p"] is not None}
    assert tested == set(knee["keys"])
    assert {row["verdict"] for row in found["rows"] if row["key"] not in tested} <= {
        "not tested",
        "never learnt",
        "too few",
    }
    assert chosen["pruned"] == outcomes(study)[knee["key"]]["test_accuracy"]


def test_lost_and_won_are_counted_example_by_example(study: Study, found: dict[str, Any]) -> None:
    stages = Stages(load(collect("my_task.py", study.root), {}, study.root))
    assert stages.loaded.test is not None
    x, y = stages.loaded.test.take(torch.arange(60))

    def right(key: str) -> Any:
        data = study.store.states.read(key)
        assert data is not None
        with torch.no_grad():
            return stages.model_of(from_bytes(data)).eval()(x).argmax(1) == y

    for row in [row for row in found["rows"] if row["p"] is not None and row["of"] == "class"]:
        mine = y == "abc".index(row["group"])
        before, after = right(row["dense_key"])[mine], right(row["key"])[mine]
        assert row["lost"] == int((before & ~after).sum()) and row["won"] == int((~before & after).sum())
        assert row["support"] == int(mine.sum()) == 20
    first = found["chosen"]
    differ = {one["index"] for one in found["disagreements"] if one["dense"] != one["pruned"]}
    assert right(first["dense_key"]).ne(right(first["key"])).nonzero().flatten().tolist() == sorted(
        one["index"]
        for one in found["disagreements"]
        if one["index"] in differ and (one["dense"] == one["target"]) != (one["pruned"] == one["target"])
    )
    assert all(one["side"] in ("left", "right") for one in found["disagreements"])


def test_the_document_is_plain_json(found: dict[str, Any]) -> None:
    again = json.loads(json.dumps(finite(found), allow_nan=False))
    assert {"study", "rows", "model"} <= set(again)
    assert (again["study"], again["split"], again["examples"]) == ("grouped", "test", 60)
    assert [fact["rows"] for fact in again["classes"]] == [20, 20, 20]
    assert again["minority"] is None and again["notes"] == []
    assert again["model"]["rows"] == 4 * 3 and again["model"]["clusters"] == {"class": 3, "run": 2}
    assert {row["verdict"] for row in again["across_seeds"]} == {"too few seeds"}


def test_with_a_key_its_rows_alone(study: Study, found: dict[str, Any]) -> None:
    key = found["rows"][-1]["key"]
    one = account(study, key[:8])
    assert one["chosen"]["key"] == key and {row["key"] for row in one["rows"]} == set(one["chosen"]["keys"])
    same = account(study, where=[f"sparsity >= {one['chosen']['sparsity'] - 0.01}"], minimise="params")
    assert set(same["chosen"]["keys"]) == set(one["chosen"]["keys"])


def test_each_model_that_is_run_is_told(study: Study) -> None:
    told: list[str] = []
    account(study, told=told.append)
    assert len(told) == 4 and told[0].startswith("running model 1 of 4 on the test split: ")


def test_learnt_above_decides_what_was_never_learnt(study: Study) -> None:
    rows = [row for row in account(study, learnt_above=0.999)["rows"] if row["change"] <= 0]
    assert all((row["verdict"] == "never learnt") == (row["dense"] < 0.999) for row in rows)
    assert any(row["dense"] < 0.999 for row in rows)
    with pytest.raises(InputError, match=r"learnt_above = 1.5 must be a share from 0 to below 1"):
        account(study, learnt_above=1.5)


def test_without_a_test_split_the_validation_split_is_told_of(tmp_path: Path) -> None:
    study = grouped.finished(tmp_path, task_params={"test": False}, seeds=(0,), trials=1)
    found = account(study)
    assert found["split"] == "valid"
    recorded = outcomes(study)
    for row in found["rows"]:
        if row["of"] == "class":
            assert row["pruned"] == recorded[row["key"]]["class_accuracy"]["abc".index(row["group"])]
        else:
            assert row["pruned"] == json.loads(recorded[row["key"]]["metrics"])[f"accuracy[{row['group']}]"]


def test_a_model_is_compared_with_the_dense_one_that_it_comes_from(tmp_path: Path) -> None:
    space = {"sparsity": 0.5, "lr": [0.02, 0.002], "rounds": 1}
    study = grouped.finished(tmp_path, space=space, seeds=(0,))
    rows = account(study)["rows"]
    assert len({row["dense_key"] for row in rows}) == 2
    for row in rows:
        header = study.store.states.header(row["key"]) or {}
        assert row["dense_key"] in [entry["key"] for entry in json.loads(header["lineage"])]


def test_what_was_pruned_before_training_is_compared_with_the_study_s_dense_model(tmp_path: Path) -> None:
    study = grouped.finished(tmp_path, space={"sparsity": 0.5, "phase": "before"}, seeds=(0,), trials=1)
    (dense,) = [key for key, row in outcomes(study).items() if row["trial"] == -1]
    assert {row["dense_key"] for row in account(study)["rows"]} == {dense}


def test_refused(study: Study, tmp_path: Path) -> None:
    (dense, *_) = [key for key, row in outcomes(study).items() if row["trial"] == -1]
    for key, said in (
        ("ffffffff", "no pruned state 'ffffffff' in the study 'grouped'; `front` shows keys, 6 characters are enough"),
        ("", "no pruned state ''"),
        (dense[:9], f"'{dense[:9]}' is a dense model of 'grouped': a pruned one is compared with it"),
    ):
        with pytest.raises(QueryError) as caught:
            account(study, key)
        assert said in str(caught.value)
    without = grouped.finished(tmp_path / "one", task_params={"classes": False}, trials=1)
    with pytest.raises(TaskError, match=r"task 'my_task.py' names no classes: give Task\(classes="):
        account(without)


def test_a_changed_task_and_a_state_that_is_gone_are_refused(tmp_path: Path) -> None:
    study = grouped.finished(tmp_path, trials=1, seeds=(0,))
    key = account(study)["chosen"]["key"]
    study.store.states.delete(key)
    with pytest.raises(QueryError, match="is no longer in the store"):
        account(study)
    (tmp_path / "my_task.py").write_text(grouped.TASK.replace("manual_seed(0)", "manual_seed(1)"))
    with pytest.raises(TaskError, match="the task 'my_task.py' has changed since the study ran"):
        account(study)


def test_the_figures_of_a_group_are_measures_to_search_by(tmp_path: Path) -> None:
    study = grouped.finished(
        tmp_path,
        objectives=("worst_group_accuracy", "group_gap", "sparsity"),
        constraints={"group_gap": "<= 0.9"},
        seeds=(0,),
    )
    points = study.front(["worst_group_accuracy >= 0"]).points
    assert points
    for point in points:
        shares = [point[f"accuracy[side={side}]"] for side in ("left", "right")]
        assert point["worst_group_accuracy"] == min(shares)
        assert point["group_gap"] == pytest.approx(np.ptp(shares))


def test_from_python_it_is_one_call(study: Study, found: dict[str, Any]) -> None:
    assert study.responsible()["rows"] == found["rows"]
    key = found["rows"][-1]["key"]
    assert study.responsible(key, learnt_above=0.5)["chosen"]["key"] == key


def test_a_long_record_is_told_of_in_part_and_says_so(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "MOST_LISTED", 2)
    monkeypatch.setattr(record, "MOST_FITTED", 3)
    found = account(study)
    listed = {row["key"] for row in found["rows"]}
    assert set(found["chosen"]["keys"]) <= listed and len(listed) in (2, 3)
    assert found["notes"][0].startswith("rows has 2 of 4 pruned states, evenly spread over them")
    assert found["model"]["rows"] <= 3 * 3
    assert found["model"]["notes"][-1] == "fitted to 3 of 4 states, evenly spread over them"
