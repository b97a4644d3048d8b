"""Forms of a fetched model are compared and timed, here and again elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator import Study
from orchestrator.errors import InputError, TaskError
from orchestrator.export import certificate
from orchestrator.export.certificate import Form, certify, measure
from orchestrator.ops import Init
from orchestrator.pools.local import LocalPool
from orchestrator.stages import build
from orchestrator.tasks.load import LoadedTask
from orchestrator.tasks.load import load as load_task
from orchestrator.tasks.source import collect
from tests.orchestrator.pools import small


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_task(tmp_path_factory.mktemp("root"))


@pytest.fixture(scope="module")
def loaded(root: Path) -> LoadedTask:
    return load_task(collect("my_task.py", root), {}, root)


@pytest.fixture(scope="module")
def fetched(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    study = Study(small.spec(trials=1), tmp_path_factory.mktemp("store"), root=root)
    study.run(LocalPool())
    return study.fetch(None, tmp_path_factory.mktemp("out"))


@pytest.fixture
def folder(fetched: Path, tmp_path: Path) -> Path:
    """A copy of a fetched model."""
    return Path(shutil.copytree(fetched, tmp_path / "model"))


def card_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "card.json").read_text())
    return found


def test_equal_models_are_certified_equal(loaded: LoadedTask) -> None:
    model = build(loaded, Init(seed=0)).eval()
    form = Form(pruned=model, dense=model)
    found, timed = certify(loaded, model, {"torch": form, "shrunk": form, "pt2": Form(pruned=model, rows=1)}, seconds=0)
    assert found["shrunk"] == found["pt2"] == 0
    assert found["accuracy"]["masked"] == found["accuracy"]["pt2"] and found["accuracy"]["split"] == "test"
    assert found["peak_memory"] == {"batch": 64, "dense": 2 * 64 * 8 * 4, "pruned": 2 * 64 * 8 * 4}
    assert [(entry["format"], entry["batch"], entry["threads"]) for entry in timed] == [
        (name, batch, 1) for name in ("torch", "shrunk") for batch in (1, 64)
    ]
    assert all(entry["low"] <= entry["speedup"] <= entry["high"] for entry in timed)
    assert torch.get_num_threads() == 1


def test_canary_another_model_is_seen(loaded: LoadedTask) -> None:
    model, other = (build(loaded, Init(seed=seed)).eval() for seed in (0, 1))
    form = Form(pruned=model, dense=model)
    found, _ = certify(loaded, model, {"torch": form, "onnx": Form(pruned=other)}, seconds=0)
    assert found["onnx"] > 0.1
    assert found["accuracy"]["onnx"] != found["accuracy"]["masked"]


def test_measuring_again_adds_to_the_card(folder: Path, root: Path) -> None:
    before = card_in(folder)
    elsewhere = [entry | {"device": "cuda: Y"} for entry in before["latency"]]
    (folder / "card.json").write_text(json.dumps(before | {"latency": before["latency"] + elsewhere}))
    task = str(root / "my_task.py")
    again = measure(folder, task, device="cpu")
    after = card_in(folder)
    assert [entry for entry in after["latency"] if entry["device"] == "cuda: Y"] == elsewhere
    assert len(after["latency"]) == len(before["latency"]) + len(elsewhere)
    assert after["certificate"]["reloaded"] == 0 and "elsewhere" not in after
    assert again["measured"]["latency"] == after["latency"][len(elsewhere) :]
    two = measure(folder, task, device="cpu", threads=2)
    after = card_in(folder)
    assert len(after["latency"]) == 2 * len(before["latency"]) + len(elsewhere)
    (other,) = after["elsewhere"]
    assert other["certificate"]["threads"] == 2 and "2 threads" in other["says"]
    assert other["says"] == two["measured"]["says"]
    assert after["certificate"]["threads"] == 1


def test_another_machine_s_certificate_stays(folder: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = card_in(folder)
    monkeypatch.setattr(certificate, "device_name", lambda device: f"{device}: Z")
    for _ in range(2):
        measure(folder, str(root / "my_task.py"), device="cpu")
    after = card_in(folder)
    assert after["certificate"] == before["certificate"] and after["says"] == before["says"]
    assert after["latency"][: len(before["latency"])] == before["latency"]
    assert [other["certificate"]["device"] for other in after["elsewhere"]] == ["cpu: Z"]
    assert "cpu: Z" in after["elsewhere"][0]["says"]


def test_what_was_tampered_with_is_not_measured(folder: Path, root: Path) -> None:
    content = (folder / "packed.safetensors").read_bytes()
    (folder / "packed.safetensors").write_bytes(content[:-1] + b"?")
    with pytest.raises(InputError, match=r"packed.safetensors is not the file that was fetched"):
        measure(folder, str(root / "my_task.py"), device="cpu")


def test_a_device_that_is_not_there_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="this machine has no GPU"):
        measure(folder, device="cuda")
    with pytest.raises(InputError, match="legal: cpu, cuda"):
        measure(folder, device="tpu")
    with pytest.raises(InputError, match="threads must be 1 or more"):
        measure(folder, device="cpu", threads=0)


def test_the_task_must_be_named_and_be_the_same(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a model of your own task"):
        measure(folder, device="cpu")
    own = small.write_task(tmp_path / "own")
    (own / "my_task.py").write_text(small.TASK.replace("nn.ReLU()", "nn.Tanh()"))
    with pytest.raises(TaskError, match="it has changed"):
        measure(folder, str(own / "my_task.py"), device="cpu")
