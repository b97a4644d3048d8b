"""What a store's history says of techniques: planted winners are found, ties are not broken, tasks are kept apart."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator import Study, StudySpec
from orchestrator.errors import QueryError
from orchestrator.pools.local import LocalPool
from orchestrator.store.store import Store
from orchestrator.techniques import LEAST, rows, techniques
from tests.orchestrator.pools import small
from tests.orchestrator.test_cli import Shell

ACCURACY = {"name": "accuracy", "column": "accuracy", "direction": "maximise"}
SPARSITY = {"name": "sparsity", "column": "sparsity", "direction": "maximise"}


def recorded(
    store: Path,
    outcomes: Sequence[Mapping[str, Any]],
    name: str = "told",
    *,
    task: str = "a" * 64,
    objectives: Sequence[Mapping[str, str]] = (ACCURACY, SPARSITY),
    seeds: Sequence[int] = (0,),
    dense: float = 0.9,
    **fields: Any,
) -> Study:
    """A study that has these outcomes, and a dense model of accuracy 0.9 under each seed."""
    spec = StudySpec(name=name, task="mnist", space={"sparsity": 0.5}, **fields)
    opened = Store(store)
    opened.write_study(name, spec.to_toml(), {"task_digest": task, "objectives": list(objectives)})
    base = {"round": 1, "seed": 0, "task_digest": task, "sparsity": 0.85}
    models = [
        {"trial": -1, "round": 0, "seed": seed, "sparsity": 0.0, "accuracy": dense, "test_accuracy": dense, "loss": 0.1}
        for seed in seeds
    ]
    table = [base | dict(row) for row in (*models, *outcomes)]
    ledger = opened.ledger(name, 1)
    mark = name.encode().hex()
    ledger.append(
        "outcomes", [{"key": f"{number:04x}{mark}".ljust(64, "0"), **row} for number, row in enumerate(table)]
    )
    ledger.flush()
    return Study.open(store, name)


def trials(criterion: str, accuracies: Sequence[float], first: int = 0, **row: Any) -> list[dict[str, Any]]:
    """A trial for each accuracy."""
    return [
        {"trial": first + number, "accuracy": accuracy, "params": {"criterion": criterion}, **row}
        for number, accuracy in enumerate(accuracies)
    ]


def band(found: Mapping[str, Any], low: float = 0.8) -> dict[str, Any]:
    (one,) = [one for task in found["tasks"] for one in task["bands"] if one["low"] == low]
    axes: dict[str, Any] = one["axes"]
    return axes


def test_a_sure_winner_is_named_with_counts_and_interval(tmp_path: Path) -> None:
    good, bad = [0.88, 0.885, 0.89, 0.88, 0.885], [0.80, 0.81, 0.80, 0.79, 0.80]
    study = recorded(tmp_path, trials("random", bad) + trials("magnitude", good, 10))
    told = band(techniques([study]))["criterion"]
    assert told["best"] == "magnitude" and told["says"] == "magnitude did best"
    first, second = told["values"]
    assert (first["value"], first["trials"], first["seeds"]) == ("magnitude", 5, 5)
    assert first["change"] == pytest.approx(-0.016) and second["change"] == pytest.approx(-0.1)
    spread = np.std(np.array(good) - 0.9, ddof=1)
    assert first["half_width"] == pytest.approx(2.7764451 * spread / 5**0.5)
    assert first["sparsity"] == 0.85 and first["test_change"] is None


def test_what_chance_may_have_done_names_nobody(tmp_path: Path) -> None:
    study = recorded(
        tmp_path, trials("random", [0.8, 0.9, 0.7, 0.85, 0.8]) + trials("taylor", [0.85, 0.8, 0.9, 0.7, 0.82], 10)
    )
    told = band(techniques([study]))["criterion"]
    assert told["best"] is None and told["says"] == "not distinguishable: taylor from random"


def test_too_few_are_said_to_be_too_few(tmp_path: Path) -> None:
    few = trials("random", [0.5] * (LEAST - 1)) + trials("taylor", [0.9 - 0.001 * n for n in range(LEAST)], 10)
    told = band(techniques([recorded(tmp_path, few)]))["criterion"]
    assert told["best"] is None and told["says"].startswith("too few to say: two of these need 5 trials")
    assert told["values"][-1]["half_width"] is None
    third = few + trials("snip", [0.4, 0.41, 0.4, 0.42, 0.4], 20)
    told = band(techniques([recorded(tmp_path, third, "three")]))["criterion"]
    assert told["says"] == "taylor did best (1 more with too few to say)"


def test_the_same_model_counts_once_in_one_study_and_in_several(tmp_path: Path) -> None:
    again = trials("taylor", [0.8] * LEAST, key="b" * 64) + trials("random", [0.7], 10, key="c" * 64)
    studies = [recorded(tmp_path, again, name) for name in ("first", "second")]
    told = band(techniques(studies))["criterion"]
    assert [value["trials"] for value in told["values"]] == [1, 1]
    assert told["values"][0]["half_width"] is None and told["best"] is None


def test_one_trial_is_told_over_its_seeds_and_several_over_their_means(tmp_path: Path) -> None:
    seeds = range(5)
    one = [
        {"trial": 0, "seed": seed, "accuracy": 0.85 + 0.001 * seed, "params": {"criterion": "taylor"}} for seed in seeds
    ]
    more = [
        {"trial": trial, "seed": seed, "accuracy": 0.8 + 0.01 * trial + 0.001 * seed, "params": {"criterion": "snip"}}
        for trial in (1, 2)
        for seed in seeds
    ]
    study = recorded(tmp_path, [*one, *more], seeds=seeds)
    taylor, snip = band(techniques([study]))["criterion"]["values"]
    assert (taylor["trials"], taylor["seeds"], taylor["over"]) == (1, 5, "seeds") and taylor["half_width"] is not None
    assert (snip["trials"], snip["seeds"], snip["over"]) == (2, 10, "trials") and snip["half_width"] is None


def test_a_trial_counts_once_in_a_band_by_its_sparsest_model(tmp_path: Path) -> None:
    rounds = [
        {"trial": 0, "round": number, "sparsity": sparsity, "accuracy": accuracy, "params": {"rate": 0.5, "rounds": 4}}
        for number, (sparsity, accuracy) in enumerate([(0.6, 0.9), (0.82, 0.88), (0.89, 0.8), (0.8, 0.1)], start=1)
    ]
    found = techniques([recorded(tmp_path, rounds)])
    (value,) = band(found)["criterion"]["values"]
    assert value["trials"] == 1 and value["change"] == pytest.approx(-0.1)
    assert band(found, 0.5)["criterion"]["values"][0]["change"] == 0
    assert {one["low"] for one in found["tasks"][0]["bands"]} == {0.5, 0.8}


def test_schedules_that_make_no_difference_are_none(tmp_path: Path) -> None:
    def row(trial: int, **params: Any) -> dict[str, Any]:
        return {"trial": trial, "accuracy": 0.8, "params": params}

    study = recorded(
        tmp_path,
        [
            row(0, schedule="cubic", rounds=1, sparsity=0.85),
            row(1, schedule="linear", rate=0.5, rounds=3),
            row(2, schedule="linear", rounds=3, sparsity=0.85),
            row(3, phase="before", sparsity=0.85),
        ],
    )
    axes = band(techniques([study]))
    assert {value["value"]: value["trials"] for value in axes["schedule"]["values"]} == {"-": 3, "linear": 1}
    assert {value["value"] for value in axes["retrain"]["values"]} == {"finetune", "before training"}


def test_a_measure_to_be_minimised_and_one_of_the_tasks_own(tmp_path: Path) -> None:
    low, high = [0.2, 0.21, 0.2, 0.22, 0.2], [0.5, 0.51, 0.52, 0.5, 0.5]
    loss = {"name": "loss", "column": "loss", "direction": "minimise"}
    table = [row | {"loss": row.pop("accuracy")} for row in trials("taylor", high) + trials("snip", low, 10)]
    found = techniques([recorded(tmp_path, table, objectives=(SPARSITY, loss))])
    assert band(found)["criterion"]["best"] == "snip" and found["tasks"][0]["measure"] == "loss"
    error = {"name": "error", "column": "error", "direction": "minimise"}
    table = [row | {"metrics": {"error": row.pop("accuracy"), "test_error": 1}} for row in trials("snip", low)]
    dense = {"trial": -1, "round": 0, "sparsity": 0.0, "metrics": {"error": 0.1, "test_error": 0.5}}
    found = techniques([recorded(tmp_path, [dense, *table], "own", objectives=(error,))])
    (value,) = band(found)["criterion"]["values"]
    assert value["change"] == pytest.approx(0.106) and value["test_change"] == pytest.approx(0.5)


def test_studies_of_one_task_are_one_and_those_of_others_stay_apart(tmp_path: Path) -> None:
    one = recorded(tmp_path, trials("taylor", [0.8, 0.81, 0.82]), "one")
    two = recorded(tmp_path, trials("taylor", [0.8, 0.81, 0.82]), "two", train={"epochs": 3})
    other = recorded(tmp_path, trials("taylor", [0.5, 0.5]), "other", task="b" * 64)
    found = techniques([one, two, other])
    assert [task["studies"] for task in found["tasks"]] == [["one", "two"], ["other"]]
    assert [task["bands"][0]["trials"] for task in found["tasks"]] == [6, 2]
    assert any("nothing is compared between different tasks, models or data" in note for note in found["notes"])
    assert any(
        "the studies one, two are put together although their [train] differs" in note for note in found["notes"]
    )
    assert len(techniques([one])["notes"]) == 1
    assert [row["task"] for row in rows(found)] == ["mnist", "mnist"]


def test_controls_changed_tasks_and_unmeasured_models_do_not_count(tmp_path: Path) -> None:
    table = trials("taylor", [0.8])
    table += [{"trial": -2, "accuracy": 0.1, "params": {}}, {"trial": 5, "accuracy": None, "params": {}}]
    table += [{"trial": 6, "accuracy": 0.1, "params": {}, "task_digest": "b" * 64}]
    table += [{"trial": 7, "accuracy": 0.1, "params": {}, "seed": 9}]  # without a dense model of its seed
    found = techniques([recorded(tmp_path, table)])
    (value,) = band(found)["criterion"]["values"]
    assert (value["trials"], value["change"]) == (1, pytest.approx(-0.1))
    with pytest.raises(QueryError, match="no technique can be told of in 'none'"):
        techniques([recorded(tmp_path, [], "none")])


def test_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = small.write_task(tmp_path)
    Study(small.spec(), root / "orchard", root=root).run(LocalPool())
    Study(small.spec(name="empty", trials=0), root / "orchard", root=root).run(LocalPool())
    monkeypatch.chdir(root)
    (root / "my_task.py").write_text("raise SystemExit('imported')\n")
    shell = Shell(monkeypatch, capsys)
    done = shell("techniques", "small")
    assert done.code == 0 and done.out.startswith("sparsity") and "too few to say" in done.out
    assert "Read as: mean change against the dense model" in done.out and "Note: " in done.out
    found = shell.json("techniques", "small", "small")
    assert found["studies"] == ["small"] and {"tasks", "method", "notes"} <= set(found)
    assert json.loads(json.dumps(found)) == found
    table = list(csv.DictReader(io.StringIO(shell("techniques", "small", "--format", "csv").out)))
    assert {"sparsity", "of", "value", "trials", "says"} <= set(table[0])
    for arguments, complaint in (
        (["techniques", "smell"], "unknown study 'smell'; did you mean 'small'?"),
        (["techniques", "empty"], "no technique can be told of in 'empty'"),
        (["techniques"], "Missing argument"),
    ):
        done = shell(*arguments)
        assert done.code == 2 and done.out == "" and complaint in done.err and len(done.err.splitlines()) <= 2
