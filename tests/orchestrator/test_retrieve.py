from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from orchestrator import Study, StudySpec, load
from orchestrator.errors import InputError, QueryError
from orchestrator.export import pt2
from orchestrator.measures.accuracy import evaluate
from orchestrator.pools.local import LocalPool
from orchestrator.store.tables import Outcomes
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


def accuracy_of(model: torch.nn.Module, task: str, root: Path, /, **params: Any) -> float:
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
    pruned = sum(of - left for left, of in kept.values()) / sum(of for _, of in kept.values())
    assert card["measures"]["sparsity"] == pytest.approx(pruned, abs=0)
    for name in ("packed", "weights"):
        assert card["bytes"][name] == (folder / f"{name}.safetensors").stat().st_size
    assert point["bytes"] == min(card["bytes"]["packed"], card["bytes"]["weights"])
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
    read = Outcomes.rows

    def spoilt(outcomes: Outcomes, indices: Sequence[int], columns: Sequence[str] | None = None) -> list[Any]:
        return [row | {"loss": float("nan"), "compression_ratio": float("inf")} for row in read(outcomes, indices)]

    monkeypatch.setattr(Outcomes, "rows", spoilt)
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


def test_a_state_that_was_deleted_is_made_again(root: Path, tmp_path: Path) -> None:
    study = Study(small.spec(trials=1), tmp_path / "store", root=root)
    study.run(LocalPool())
    key = study.front().points[0]["key"]
    before = study.fetch(key, tmp_path / "before")
    study.store.states.delete(key)
    after = study.fetch(key, tmp_path / "after")
    for name in ("weights.safetensors", "masks.safetensors"):
        assert (before / name).read_bytes() == (after / name).read_bytes()


# In other formats.


@pytest.fixture(scope="module")
def everything(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's model in every format."""
    return study.fetch(None, tmp_path_factory.mktemp("everything"), formats=["safetensors", "pt2", "onnx"])


def card_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "card.json").read_text())
    return found


def test_every_format_computes_the_same(everything: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    card = card_in(everything)
    assert card["refused"].keys() <= {"csr"} and card["exports"]["onnx"] == {"rows": None, "reason": "", "opset": 20}
    assert all(card["certificate"][name] <= 1e-5 for name in ("pt2", "onnx"))
    inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = load(everything, task="my_task.py")(inputs)
        for format in ("safetensors", "packed"):
            assert torch.equal(load(everything, "my_task.py", format=format)(inputs), expected)
        for format in ("pt2", "onnx", None):
            assert torch.allclose(load(everything, format=format)(inputs), expected, atol=1e-5)
    assert {entry["format"] for entry in card["latency"]} >= {"torch", "pt2", "onnx"}
    assert card["compressed"]["bytes"].keys() == card["bytes"].keys() >= {"weights", "packed", "pt2", "onnx"}


@pytest.mark.parametrize(
    ("format", "name"), [("pt2", "model.pt2"), ("onnx", "model.onnx"), (None, "masks.safetensors")]
)
def test_a_tampered_file_of_any_format_is_refused(
    format: str | None, name: str, everything: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(everything, tmp_path / "out"))
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match=f"{name} is not the file that was fetched"):
        load(folder, format=format)


@pytest.mark.parametrize(
    ("format", "name"),
    [
        ("pt2", "model.pt2"),
        ("onnx", "model.onnx"),
        ("packed", "packed.safetensors"),
        ("safetensors", "weights.safetensors"),
    ],
)
def test_a_pickle_in_the_place_of_a_file_is_refused_though_the_card_agrees(
    format: str, name: str, everything: Path, root: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(everything, tmp_path / "out"))
    content = pickle.dumps({"0.weight": [1.0]})
    (folder / name).write_bytes(content)
    card = json.loads((folder / "card.json").read_text())
    card["files"][name]["sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "card.json").write_text(json.dumps(card))
    with pytest.raises(InputError):
        load(folder, None if format in ("pt2", "onnx") else str(root / "my_task.py"), format=format)


def test_a_graph_needs_no_other_file(everything: Path, tmp_path: Path) -> None:
    for name in ("card.json", "model.pt2"):
        shutil.copy(everything / name, tmp_path)
    assert load(tmp_path)(torch.zeros(2, 4)).shape == (2, 3)


def test_a_format_that_is_not_there_is_refused(study: Study, everything: Path, tmp_path: Path) -> None:
    folder = study.fetch(None, tmp_path / "out")
    with pytest.raises(InputError, match="was not fetched as onnx; legal: safetensors, packed"):
        load(folder, format="onnx")
    with pytest.raises(InputError, match="unknown format 'onyx'; did you mean 'onnx'"):
        load(everything, format="onyx")
    with pytest.raises(InputError, match="unknown format 'jax'"):
        study.fetch(None, tmp_path / "out", formats=["jax"])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": [], "task": "digits"}'])
def test_what_is_no_card_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "card.json").write_text(text)
    with pytest.raises(InputError, match="holds no fetched model"):
        load(tmp_path)


def test_a_file_outside_the_folder_is_not_read(everything: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(everything, tmp_path / "out"))
    card = card_in(folder)
    (tmp_path / "secret").write_text("")
    card["files"]["../secret"] = {"bytes": 0, "sha256": "0"}
    (folder / "card.json").write_text(json.dumps(card))
    with pytest.raises(InputError, match=r"card.json lists '../secret', which no fetch writes"):
        load(folder)


def test_a_second_fetch_leaves_nothing_of_the_first(study: Study, everything: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(everything, tmp_path / "out"))
    (folder / "mine.txt").write_text("stays")
    study.fetch(None, folder)
    assert {path.name for path in folder.iterdir()} == {*card_in(folder)["files"], "card.json", "mine.txt"}
    assert "model.pt2" not in card_in(folder)["files"]


def test_an_operation_that_does_not_export_leaves_the_other_formats(tmp_path: Path) -> None:
    root = small.write_task(tmp_path / "root")
    odd = small.TASK.replace("return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))", "return Odd()") + ODD
    (root / "my_task.py").write_text(odd)
    study = Study(small.spec(trials=1), tmp_path / "store", root=root)
    study.run(LocalPool())
    card = card_in(study.fetch(None, tmp_path / "out", formats=["pt2", "onnx"]))
    assert "model.pt2" in card["files"] and "model.onnx" not in card["files"]
    assert "linalg_eig" in card["refused"]["onnx"] and "No onnx: " in card["says"]
    assert card["certificate"]["pt2"] == 0 and card["certificate"]["onnx"] is None


ODD = """

class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(x) + torch.linalg.eigvals(x[:, None] * x[:, :, None]).abs()[:, :3]
"""


def test_canary_a_graph_that_computes_something_else_is_withdrawn(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pt2, "to_bytes", _of_another_model(pt2.to_bytes))
    card = card_in(study.fetch(None, tmp_path / "out", formats=["pt2"]))
    assert "its outputs differ from the masked model's by" in card["refused"]["pt2"]
    assert "model.pt2" not in card["files"] and not (tmp_path / "out" / "model.pt2").exists()


def _of_another_model(function: Any) -> Any:
    def to_bytes(exported: pt2.Exported) -> bytes:
        for tensor in exported.program.state_dict.values():
            tensor.data.add_(1)
        return bytes(function(exported))

    return to_bytes


# The whole zoo is in tests/benchmarks/round_trips.py.


@pytest.mark.parametrize(
    ("model", "structure"), [("lenet-300-100", "weight"), ("depthwise", "channel"), ("transformer", "head")]
)
def test_round_trips(model: str, structure: str, tmp_path: Path) -> None:
    study = pruned(model, structure, tmp_path / "store")
    point = study.front().points[-1]
    folder = study.fetch(point["key"], tmp_path / "out", formats=["pt2"])
    card = card_in(folder)
    cut_out = structure != "weight"
    assert ("shrunk.safetensors" in card["files"]) == cut_out
    assert all(card["certificate"][name] <= 1e-5 for name in (["shrunk"] if cut_out else []) + ["pt2"])
    shares = {name: value for name, value in card["certificate"]["accuracy"].items() if isinstance(value, float)}
    assert set(shares.values()) == {card["measures"]["test_accuracy"]}
    found = load(folder)
    assert accuracy_of(found, "digits", Path(), model=model) == card["measures"]["accuracy"]
    params = sum(parameter.numel() for parameter in found.parameters())
    whole = card["measures"]["total_params"]
    assert params < whole if cut_out else params == whole
    if cut_out:
        assert card["bytes"]["shrunk"] / card["bytes"]["weights"] == pytest.approx(params / whole, abs=0.15)
    else:
        assert card["bytes"]["packed"] <= 0.1 * card["bytes"]["weights"]


def pruned(model: str, structure: str, store: Path) -> Study:
    """A study of one trial: a model of the zoo on small digits, half of its units gone, or 95 % of its weights."""
    amount = {"sparsity": 0.95} if structure == "weight" else {"unit_sparsity": 0.5}
    spec = StudySpec(
        name="zoo",
        task="digits",
        task_params={"model": model},
        trials=1,
        sampler="random",
        train={"epochs": 1},
        space={"structure": structure, "retrain": "none"} | amount,
    )
    study = Study(spec, store)
    study.run(LocalPool())
    return study
