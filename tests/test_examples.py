"""Every file in examples/ does what it says, with fewer trials where the file itself would take long."""

from __future__ import annotations

import importlib.util
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
    "checkpoint.toml": {"trials": 2},
    "digits.toml": {"trials": 2},
    "mnist.toml": {"trials": 2, "epochs": 3, "retrain_epochs": 1},
    "my_task.toml": {"trials": 3},
    "pretrained.toml": {"trials": 3},
    "pretrained_mnist.toml": {"trials": 1},
}


def shortened(path: Path) -> StudySpec:
    """The study with the changes of `SHORT`, validated again."""
    spec = StudySpec.load(path)
    change = dict(SHORT[path.name])
    plain = spec.model_dump(exclude_defaults=True)
    plain["trials"] = change.pop("trials")
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
        assert standing.done == SHORT[name]["trials"] and not standing.failed
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
    assert scripts == {"python_api.py"}


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


def test_the_way_in_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("python_api", EXAMPLES / "python_api.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(str(tmp_path / "store"))
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("dense: accuracy 0.9")
    measured, recorded = said[-1].rpartition("accuracy on test ")[2].split(", recorded ")
    assert measured == recorded
