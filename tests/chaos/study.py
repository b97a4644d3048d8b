"""The study that is disturbed: a second long, and its task writes down every training step that any process takes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator import Study
from orchestrator.pools.local import LocalPool
from orchestrator.spec import StudySpec
from tests.orchestrator.pools import small

STEPS, PACE = "CHAOS_STEPS", "CHAOS_PACE"
"""Variables of the environment, so that neither is in a key: the file that gets a byte for each training step, and the
seconds that a step takes longer than it must."""

STEPS_PER_EPOCH = 4
LONGEST_STRETCH_EPOCHS = 3.0
"""No more training than this lies between two states that are stored: the dense model's."""

_TASK = """
import os
import time

import torch
import torch.nn.functional as F
from blobs import points
from torch import nn

from orchestrator.tasks import Task


def task() -> Task:
    def loss(outputs, targets):
        if torch.is_grad_enabled() and len(targets) > 2:  # two are for the check that comes before a study
            if "CHAOS_STEPS" in os.environ:
                with open(os.environ["CHAOS_STEPS"], "ab", buffering=0) as file:
                    file.write(b".")
            time.sleep(float(os.environ.get("CHAOS_PACE", "0")))
        return F.cross_entropy(outputs, targets)

    x, y = points(1.0)
    return Task(
        model=lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)),
        train=(x[:64], y[:64]),
        valid=(x[64:80], y[64:80]),
        test=(x[80:], y[80:]),
        loss=loss,
    )
"""

_TRAIN: Mapping[str, Any] = {"epochs": 3, "retrain_epochs": 1, "batch_size": 16, "lr": 0.05}


def spec(name: str = "small", **fields: Any) -> StudySpec:
    """Eight trials of a random sampler, which share their beginnings; `fields` go over it."""
    train, space = dict(_TRAIN), dict(small.SPACE)
    return StudySpec(name=name, task="chaos_task.py", trials=8, sampler="random", train=train, space=space, **fields)


def write(folder: Path) -> Path:
    """The task, what it imports and the study file, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {"chaos_task.py": _TASK, "blobs.py": small.BLOBS, "study.toml": spec().to_toml()}.items():
        (folder / name).write_text(text)
    return folder


def undisturbed(store: Path, root: Path) -> Study:
    """The study as it comes out when nothing happens."""
    study = Study(spec(), store, root=root)
    standing = study.run(LocalPool())
    assert (standing.done, standing.failed) == (spec().trials, 0)
    return study


def steps(file: Path) -> int:
    """How many training steps were taken."""
    return os.path.getsize(file) if file.exists() else 0
