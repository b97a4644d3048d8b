"""Every file in examples/ does what it says, with fewer trials where the file itself would take long."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator import Study, StudySpec, load
from orchestrator.front import Front
from orchestrator.pools.local import LocalPool

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

# What is run of each study: fewer trials, and for the large one shorter ones.
SHORT: dict[str, dict[str, Any]] = {
    "before_training.toml": {"trials": 7, "epochs": 1},
    "bert.toml": {"trials": 4, "epochs": 1, "retrain_epochs": 0.2},
    "checkpoint.toml": {"trials": 2},
    "digits.toml": {"trials": 2},
    "gradual.toml": {"trials": 3, "epochs": 10},
    "halving.toml": {"trials": 3, "epochs": 1, "retrain_epochs": 0.2},
    "mnist.toml": {"trials": 2, "epochs": 3, "retrain_epochs": 1},
    "my_task.toml": {"trials": 3},
    "pretrained.toml": {"trials": 3},
    "pretrained_mnist.toml": {"trials": 1},
    "responsible.toml": {"trials": 1, "epochs": 4, "retrain_epochs": 2},
    "sensitivity.toml": {"trials": 21, "epochs": 6},
    "structured.toml": {"trials": 2, "epochs": 1, "retrain_epochs": 1},
    "tickets.toml": {"trials": 2, "epochs": 0.2, "seeds": [0]},
    "transfer.toml": {"trials": 1, "epochs": 0.2, "seeds": [0]},
}


def shortened(path: Path) -> StudySpec:
    """The study with the changes of `SHORT`, validated again."""
    spec = StudySpec.load(path)
    change = dict(SHORT[path.name])
    plain = spec.model_dump(exclude_defaults=True)
    plain |= {name: change.pop(name) for name in ("trials", "seeds") if name in change}
    plain["train"] = plain.get("train", {}) | change
    return StudySpec(**plain)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Study]:
    """The short form of every study, run in one store."""
    store = tmp_path_factory.mktemp("store")
    found = {}
    for name in SHORT:
        study = Study(shortened(EXAMPLES / name), store, root=EXAMPLES)
        standing = study.run(LocalPool())
        assert standing.ended == SHORT[name]["trials"] and not standing.failed
        found[name] = study
    return found


def front_of(study: Study) -> Front:
    found = study.front()
    assert found.points and found.dense is not None
    return found


def test_every_example_is_tested() -> None:
    studies = {path.name for path in EXAMPLES.glob("*.toml")}
    assert studies == SHORT.keys()
    tasks = {StudySpec.load(EXAMPLES / name).task for name in studies}
    scripts = {path.name for path in EXAMPLES.glob("*.py")} - tasks
    assert scripts == {"python_api.py", "save_pretrained.py"}


@pytest.mark.parametrize("name", SHORT)
def test_the_study_as_it_stands_is_good(name: str) -> None:
    spec = StudySpec.load(EXAMPLES / name)
    info = Study(spec, "memory://check", root=EXAMPLES).check()
    assert info.layers


def test_the_demo_is_the_study_that_the_readme_speaks_of() -> None:
    spec = StudySpec.load(EXAMPLES / "mnist.toml")
    assert (spec.name, spec.task, spec.trials) == ("mnist-lenet", "mnist", 40)
    assert spec.objectives == ("accuracy", "sparsity")


@pytest.mark.parametrize("name", SHORT)
def test_the_study_runs_to_a_front(name: str, finished: dict[str, Study]) -> None:
    study = finished[name]
    found = front_of(study)
    main = study.spec.objectives[0]
    assert found.dense is not None and main in found.dense
    assert all(0 < point["sparsity"] < 1 for point in found.points)
    assert all(point["n"] == len(study.spec.seeds) for point in found.points)


def test_digits_begins_with_what_is_enqueued(finished: dict[str, Study]) -> None:
    first = [row for row in finished["digits.toml"].table().to_pylist() if row["trial"] == 0]
    assert {(row["round"], row["seed"]) for row in first} == {(r, s) for r in (1, 2, 3) for s in (0, 1)}
    assert sorted({round(row["sparsity"], 4) for row in first})[-1] == 0.9


def test_a_task_of_one_s_own_comes_home_as_its_class(finished: dict[str, Study], tmp_path: Path) -> None:
    study = finished["my_task.toml"]
    point = front_of(study).points[0]
    assert {"missed", "test_missed", "test_accuracy", "worst_class_accuracy"} <= point.keys()
    model = load(study.fetch(point["key"], tmp_path / "model"), task=str(EXAMPLES / "my_task.py"))
    assert type(model).__name__ == "Screen"
    zeros = sum(int((layer.weight == 0).sum()) for layer in model.children() if isinstance(layer, torch.nn.Linear))
    assert zeros == round(point["sparsity"] * sum(total for _, total in point["layers"].values()))


def test_a_trained_model_is_not_trained_again(finished: dict[str, Study]) -> None:
    found = front_of(finished["pretrained.toml"])
    assert found.dense is not None and found.dense["accuracy"] > 0.9
    epochs = finished["pretrained.toml"].status()["epochs"]
    fine_tuned = sum(point["params"]["retrain"] == "finetune" for point in finished["pretrained.toml"].front().points)
    assert epochs["run"] <= 2 * SHORT["pretrained.toml"]["trials"] and fine_tuned


def test_a_checkpoint_is_pruned_as_it_comes(finished: dict[str, Study]) -> None:
    dense = front_of(finished["checkpoint.toml"]).dense
    assert dense is not None and dense["accuracy"] == pytest.approx(258 / 270)
    assert finished["checkpoint.toml"].check().comes_trained


def test_somebody_else_s_network_is_pruned_as_it_comes(finished: dict[str, Study]) -> None:
    dense = front_of(finished["pretrained_mnist.toml"]).dense
    assert dense is not None and dense["test_accuracy"] == pytest.approx(497 / 500)
    assert finished["pretrained_mnist.toml"].status()["epochs"]["run"] == 0


def test_a_sensitivity_scan_prunes_each_layer_alone(finished: dict[str, Study], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from orchestrator.report.plot import plot_sensitivity

    rows = [row for row in finished["sensitivity.toml"].table().to_pylist() if row["trial"] >= 0]
    assert len(rows) == 21 and finished["sensitivity.toml"].status()["epochs"]["run"] == 6
    for row in rows:
        params, layers = json.loads(row["params"]), json.loads(row["layers"])
        kept, total = layers.pop(f"{params['only']}.weight")
        assert kept == total - math.floor(params["rate"] * total + 0.5)
        assert all(kept == total for kept, total in layers.values())
    plot_sensitivity(finished["sensitivity.toml"], tmp_path / "sensitivity.png")
    assert (tmp_path / "sensitivity.png").exists()


def test_a_budget_of_flops_is_kept(finished: dict[str, Study]) -> None:
    found = front_of(finished["structured.toml"])
    assert found.dense is not None
    for point in found.points:
        assert point["flops_effective"] <= point["params"]["flops_budget"] * found.dense["flops_effective"]


def test_heads_go_as_the_example_says(tmp_path: Path) -> None:
    plain = StudySpec.load(EXAMPLES / "structured.toml").model_dump(exclude_defaults=True)
    plain |= {"name": "heads", "trials": 2, "task_params": {"model": "transformer"}}
    plain["train"] |= {"epochs": 1, "retrain_epochs": 1}
    plain["space"] |= {"structure": "head", "flops_budget": 0.75, "criterion": ["magnitude", "taylor"]}
    study = Study(StudySpec(**plain), tmp_path)
    assert study.run(LocalPool()).done == 2
    found = front_of(study)
    assert found.dense is not None
    assert all(point["flops_effective"] <= 0.75 * found.dense["flops_effective"] for point in found.points)


def test_a_gradual_trial_is_sparse_at_the_end_of_one_training(finished: dict[str, Study]) -> None:
    rows = [row for row in finished["gradual.toml"].table().to_pylist() if row["trial"] >= 0]
    assert [row["sparsity"] for row in rows] == pytest.approx([0.8] * 3, abs=1e-4)
    assert {json.loads(row["params"]).get("regrow") for row in rows} == {None, "set", "rigl"}
    # Pruning little by little begins with two epochs of the dense model's; SET and RigL begin with the same epoch.
    assert finished["gradual.toml"].status()["epochs"]["run"] == 10 + 8 + 10 + 9


def test_what_is_pruned_before_training_is_trained_once(finished: dict[str, Study]) -> None:
    rows = [row for row in finished["before_training.toml"].table().to_pylist() if row["trial"] >= 0]
    found = {(json.loads(row["params"])["criterion"], row["round"]) for row in rows}
    assert found == {("snip", 1), ("grasp", 1), ("synflow", 100)}
    assert finished["before_training.toml"].status()["epochs"]["run"] == 1 * 2 + len(rows)


def test_both_tickets_are_held_against_their_controls(finished: dict[str, Study]) -> None:
    whole = StudySpec.load(EXAMPLES / "tickets.toml")
    assert len(whole.seeds) == 5 and whole.trials == len(whole.enqueue) == 2
    tickets = {ticket["rule"]: ticket for ticket in finished["tickets.toml"].tickets()["tickets"]}
    imp, consensus = tickets["single search"], tickets["intersection"]
    assert set(consensus["controls"]) == set(whole.tickets.controls) == {"imp", *imp["controls"]}
    assert (imp["depth"], imp["trainings"]) == (7, 7) and (consensus["depth"], consensus["trainings"]) == (2, 10)
    assert consensus["overlap"]["jaccard"] > consensus["overlap"]["chance"]


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_pruned_transformer_is_loaded_back_by_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script("save_pretrained").main(str(tmp_path / "store"), trials=2, epochs=0.5)
    said = capsys.readouterr().out
    assert ": intermediate_size 128 before pruning and 32 after; " in said
    assert said.endswith("the outputs differ by 0.0e+00\n")


def test_the_way_in_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script("python_api").main(str(tmp_path / "store"))
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("dense: accuracy 0.9")
    measured, recorded = said[-1].rpartition("accuracy on test ")[2].split(", recorded ")
    assert measured == recorded
