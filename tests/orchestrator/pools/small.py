"""A study that takes a second: 96 points in three blobs, a network of 67 parameters, and ways to go wrong."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from orchestrator.spec import StudySpec
from orchestrator.state import State, from_bytes
from orchestrator.store.store import Store

TASK = '''
import os
import signal
from pathlib import Path

import torch
import torch.nn.functional as F
from blobs import points
from torch import nn

from orchestrator.tasks import Task


def task(trouble: str = "", marker: str = "", trained: bool = False, spread: float = 1.0) -> Task:
    """`trouble` comes up in the loss as soon as a learning rate has blown the outputs up."""

    def loss(outputs, targets):
        if trouble and not outputs.abs().max() < 1e4:
            if trouble == "raises":
                raise RuntimeError("the loss is wrong")
            if trouble == "exits":
                raise SystemExit("that is all")
            if trouble == "memory":
                raise MemoryError("no more")
            if trouble == "once" and not Path(marker).exists():
                Path(marker).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if trouble == "kills":
                os.kill(os.getpid(), signal.SIGKILL)
            outputs = outputs * 0
        return F.cross_entropy(outputs, targets)

    def network():
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

    def pretrained():
        model = network()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape))
        return model

    x, y = points(spread)
    return Task(
        model=pretrained if trained else network,
        fresh=network if trained else None,
        train=(x[:64], y[:64]),
        valid=(x[64:80], y[64:80]),
        test=(x[80:], y[80:]),
        loss=loss,
        classes=["a", "b", "c"],
    )
'''

BLOBS = """
import torch


def points(spread):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(96) % 3
    return spread * torch.randn(96, 4, generator=generator) + 3 * torch.eye(3, 4)[y], y
"""

CRITERIA = """
def broken(weight):
    raise RuntimeError("this criterion is broken")


def halves(weight):
    return weight.abs() / 2
"""

SPACE: Mapping[str, Any] = {
    "criterion": ["magnitude", "random"],
    "rate": {"low": 0.2, "high": 0.5, "step": 0.1},
    "rounds": {"low": 1, "high": 3},
    "retrain": ["finetune", "rewind"],
    "rewind_epoch": {"choices": [0, 1], "when": {"retrain": ["rewind"]}},
}

TRAIN: Mapping[str, Any] = {"epochs": 2, "retrain_epochs": 1, "batch_size": 16, "lr": 0.05}


def write_task(folder: Path) -> Path:
    """The task file and what it imports, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {"my_task.py": TASK, "blobs.py": BLOBS, "my_criteria.py": CRITERIA}.items():
        (folder / name).write_text(text)
    return folder


def spec(**fields: Any) -> StudySpec:
    """A random-sampler study of six trials; `fields` go over it."""
    table = {"name": "small", "task": "my_task.py", "trials": 6, "sampler": "random", "train": TRAIN, "space": SPACE}
    return StudySpec(**(table | fields))


def models(store: Store, study: str = "small") -> dict[str, State]:
    """The state behind each outcome of a study, by its key."""
    found = {}
    for key in store.table(study, "outcomes", ["key"])["key"].to_pylist():
        data = store.states.read(key)
        assert data is not None, key
        found[key] = from_bytes(data)
    return found


def same_bits(one: State, other: State) -> bool:
    """Whether weights and masks agree to the bit; the optimizer is kept only where a plan goes on with it."""
    return _same(one.weights, other.weights) and _same(one.masks, other.masks)


def _same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
