from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]
import pytest
import torch
from safetensors.torch import load_file

from orchestrator import Study, StudySpec, load
from orchestrator.errors import InputError, QueryError
from orchestrator.measures.accuracy import evaluate
from orchestrator.pools.local import LocalPool
from orchestrator.tasks.load import load as load_task
from orchestrator.tasks.source import collect
from tests.orchestrator.pools import small


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_task(tmp_path_factory.mktemp("root"))


@pytest.fixture(scope="module")
def study(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    found = Study(small.spec(), tmp_path_factory.mktemp("store"), root=root)
    found.run(LocalPool())
    return found


def accuracy_of(model: torch.nn.Module, task: str, root: Path, **params: Any) -> float:
    """The loaded model's validation accuracy."""
    loaded = load_task(collect(task, root), params, root)
    found = evaluate(model, loaded.valid, loaded.task.loss, loaded.metrics)["accuracy"]
    assert isinstance(found, float)
    return found


def test_a_users_model_comes_back_with_its_accuracy(study: Study, root: Path, tmp_path: Path) -> None:
    for point in study.front().points:
        folder = study.fetch(point["key"][:10], tmp_path / point["key"])
        card = json.loads((folder / "card.json").read_text())
        assert (card["key"], card["study"], card["params"]) == (point["key"], "small", point["params"])
        assert card["certificate"]["reloaded"] == 0
        model = load(folder, task=str(root / "my_task.py"))
        assert not model.training
        assert accuracy_of(model, "my_task.py", root) == card["measures"]["accuracy"] == point["accuracy"]


def test_the_files_agree_with_each_other_and_with_the_card(study: Study, tmp_path: Path) -> None:
    point = study.front(minimise="bytes").points[0]
    folder = study.fetch(point["key"], tmp_path / "out")
    card = json.loads((folder / "card.json").read_text())
    assert set(card["files"]) == {path.name for path in folder.iterdir()} - {"card.json"}
    weights, masks = load_file(folder / "weights.safetensors"), load_file(folder / "masks.safetensors")
    assert all(not weights[name][mask == 0].any() for name, mask in masks.items())
    kept = {name: [int(mask.sum()), mask.numel()] for name, mask in masks.items()}
    assert kept == card["layers"] == point["layers"]
    pruned = 1 - sum(left for left, _ in kept.values()) / sum(of for _, of in kept.values())
    assert card["measures"]["sparsity"] == pytest.approx(pruned, abs=0)
    assert card["bytes"]["packed"] == (folder / "packed.safetensors").stat().st_size == point["bytes"]
    lineage = {entry["key"]: entry for entry in card["lineage"]}
    assert card["lineage"][0]["op"] == "Init" and card["lineage"][-1]["key"] == point["key"]
    assert all(parent in lineage for entry in card["lineage"] for parent in entry["from"])
    assert sum(entry["op"] == "Prune" for entry in card["lineage"]) == point["round"]


def test_without_a_key_it_is_the_knee_or_the_least(study: Study, tmp_path: Path) -> None:
    found = study.front()
    assert found.knee is not None
    card = json.loads((study.fetch(None, tmp_path / "knee") / "card.json").read_text())
    assert card["key"] == found.points[found.knee]["key"]
    bounds = ["sparsity >= 0.3"]
    card = json.loads((study.fetch(None, tmp_path / "x", where=bounds, minimise="loss") / "card.json").read_text())
    table = [row for row in study.table().to_pylist() if row["sparsity"] >= 0.3]
    assert card["measures"]["loss"] == min(row["loss"] for row in table)


def test_the_dense_model_can_be_fetched_too(study: Study, root: Path, tmp_path: Path) -> None:
    dense = study.front().dense
    assert dense is not None
    folder = study.fetch(dense["key"], tmp_path / "dense")
    assert accuracy_of(load(folder, task=str(root / "my_task.py")), "my_task.py", root) == dense["accuracy"]


@pytest.mark.parametrize("retrain", ["finetune", "none"])
def test_a_model_that_comes_trained(retrain: str, root: Path, tmp_path: Path) -> None:
    spec = small.spec(
        trials=3,
        task_params={"trained": True},
        train={**small.TRAIN, "epochs": 0},
        space={"rate": {"low": 0.1, "high": 0.4}, "rounds": [1, 2], "retrain": retrain},
    )
    study = Study(spec, tmp_path / "store", root=root)
    assert study.run(LocalPool()).done == 3
    point = study.front().points[0]
    folder = study.fetch(point["key"], tmp_path / "out")
    model = load(folder, task=str(root / "my_task.py"))
    assert accuracy_of(model, "my_task.py", root, trained=True) == point["accuracy"]


def test_a_built_in_task_needs_no_file(tmp_path: Path) -> None:
    spec = StudySpec(
        name="digits",
        task="digits",
        trials=1,
        sampler="random",
        train={"epochs": 1},
        space={"rate": 0.5, "retrain": "none"},
    )
    study = Study(spec, tmp_path / "store")
    study.run(LocalPool())
    point = study.front().points[0]
    assert accuracy_of(load(study.fetch(None, tmp_path / "out")), "digits", Path()) == point["accuracy"]


def test_a_fetch_works_without_the_users_task(root: Path, tmp_path: Path) -> None:
    own = small.write_task(tmp_path / "own")
    study = Study(small.spec(trials=1), tmp_path / "store", root=own)
    study.run(LocalPool())
    (own / "my_task.py").unlink()
    card = json.loads((study.fetch(None, tmp_path / "out") / "card.json").read_text())
    assert card["certificate"]["reloaded"] is None and "was not rebuilt" in card["says"]
    assert load(tmp_path / "out", task=str(root / "my_task.py"))


def test_no_code_is_imported_that_nobody_passed(
    study: Study, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = study.fetch(None, tmp_path / "out")
    monkeypatch.chdir(root)
    with pytest.raises(InputError, match=r"orchestrator.load\(.*task='my_task.py'\)"):
        load(folder)
    assert load(folder, task="my_task.py")


def test_what_was_tampered_with_is_refused(study: Study, root: Path, tmp_path: Path) -> None:
    folder = study.fetch(None, tmp_path / "out")
    task = str(root / "my_task.py")
    data = (folder / "weights.safetensors").read_bytes()
    (folder / "weights.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(InputError, match="is not the file that was fetched"):
        load(folder, task=task)
    (folder / "weights.safetensors").unlink()
    with pytest.raises(InputError, match="cannot read"):
        load(folder, task=task)
    with pytest.raises(InputError, match="holds no fetched model"):
        load(tmp_path / "nowhere", task=task)


def test_keys_that_name_no_state_or_several(study: Study, tmp_path: Path) -> None:
    for key in ("", "abc", "z" * 64):
        with pytest.raises(QueryError, match="no state"):
            study.fetch(key, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_written(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(study.store.states, "read", lambda key: pytest.fail("something was read"))
        for folder, bad in ((Path("file"), "file"), (tmp_path / "file" / "a" / "b", "file"), (Path("link"), "link")):
            with pytest.raises(InputError, match=f"cannot write a model into .*{bad} is no folder"):
                study.fetch(None, folder)
        patch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
        with pytest.raises(InputError, match=f"cannot write a model into a/b: {tmp_path} is not writable"):
            study.fetch(None, "a/b")
    (tmp_path / "out" / "card.json").mkdir(parents=True)
    with pytest.raises(InputError, match="cannot write .*card.json: Is a directory"):
        study.fetch(None, tmp_path / "out")


def test_a_card_is_json_whatever_was_measured(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = study.front().points[0]
    rows = study.table().to_pylist()
    for row in rows:
        row |= {"loss": float("nan"), "compression_ratio": float("inf")}
    monkeypatch.setattr(study, "table", lambda: pa.Table.from_pylist(rows))
    text = (study.fetch(point["key"], tmp_path / "out") / "card.json").read_text()
    measures = json.loads(text, parse_constant=lambda name: pytest.fail(name))["measures"]
    assert measures["loss"] is None and measures["compression_ratio"] is None
    assert measures["accuracy"] == point["accuracy"]


def test_no_point_that_keeps_the_constraints(root: Path, tmp_path: Path) -> None:
    spec = small.spec(trials=1, constraints={"accuracy": "> 2", "loss": "< 9"})
    study = Study(spec, tmp_path / "store", root=root)
    assert study.run(LocalPool()).done == 1
    with pytest.raises(QueryError, match="^no point of the study 'small' keeps its constraints: accuracy > 2 and loss"):
        study.fetch(None, tmp_path / "out")


def test_a_state_that_was_deleted(root: Path, tmp_path: Path) -> None:
    study = Study(small.spec(trials=1), tmp_path / "store", root=root)
    study.run(LocalPool())
    key = study.front().points[0]["key"]
    study.store.states.delete(key)
    with pytest.raises(QueryError, match="no longer in the store"):
        study.fetch(key, tmp_path / "out")
