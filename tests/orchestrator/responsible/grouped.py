"""A study of a second whose examples are of two sides: 180 points in three blobs, a network of 67 parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orchestrator import Study, StudySpec
from orchestrator.pools.local import LocalPool

TASK = """
import torch
from torch import nn

from orchestrator.tasks import Task


def task(test: bool = True, classes: bool = True, trained: bool = False) -> Task:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(180) % 3
    x = torch.randn(180, 4, generator=generator) + 3 * torch.eye(3, 4)[y]
    side = ["left" if left else "right" for left in (x[:, 3] < 0).tolist()]
    return Task(
        model=lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)),
        train=(x[:60], y[:60]),
        valid=(x[60:120], y[60:120]),
        test=(x[120:], y[120:]) if test else None,
        classes=["a", "b", "c"] if classes else None,
        groups={"side": {"valid": side[60:120], **({"test": side[120:]} if test else {})}} if classes else {},
    )
"""


def finished(folder: Path, **fields: Any) -> Study:
    """The study, run in this process, with its task and its store in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "my_task.py").write_text(TASK)
    table: dict[str, Any] = {
        "name": "grouped",
        "task": "my_task.py",
        "trials": 2,
        "seeds": (0, 1),
        "sampler": "grid",
        "train": {"epochs": 3, "retrain_epochs": 1, "batch_size": 16, "lr": 0.02},
        "space": {"sparsity": [0.5, 0.9], "scope": "global", "rounds": 1},
    }
    study = Study(StudySpec(**(table | fields)), folder / "store", root=folder)
    standing = study.run(LocalPool())
    assert standing.done == study.spec.trials and not standing.failed
    return study
