"""A task whose training goes wrong at a batch that the test names, and pools in this process that live through it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from orchestrator.graph import Segment
from orchestrator.pools.local import LocalPool
from orchestrator.pools.protocol import Ended, Event, Failed
from orchestrator.spec import StudySpec

TASK = '''
import os
import signal
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from orchestrator.tasks import Task


def task(folder: str = "") -> Task:
    """Every batch of a training appends a letter to the file `batches` in the folder; the file `trouble` says what comes
    at which batch of them all, and goes when it comes."""

    def loss(outputs, targets):
        if outputs.requires_grad and folder and len(targets) > 2:  # two examples only show how the model works
            with open(Path(folder, "batches"), "a") as batches:
                batches.write(".")
            come(len(targets))
        return F.cross_entropy(outputs, targets)

    def come(batch_size):
        trouble = Path(folder, "trouble")
        if batch_size == int(os.environ.get("HUNGRY", "0")) and float(os.environ["SHARE"]) < float(os.environ["NEED"]):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        if not trouble.exists():
            return
        what, at = trouble.read_text().split()
        if Path(folder, "batches").stat().st_size < int(at):
            return
        trouble.unlink()
        if what == "interrupt":
            signal.raise_signal(signal.SIGINT)
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        if what == "hang":
            time.sleep(600)

    generator = torch.Generator().manual_seed(0)
    y = torch.arange(96) % 3
    x = torch.randn(96, 4, generator=generator) + 2 * torch.eye(3, 4)[y]
    return Task(
        model=lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3)),
        train=(x[:64], y[:64]),
        valid=(x[64:80], y[64:80]),
        test=(x[80:], y[80:]),
        loss=loss,
    )
'''

DENSE_BATCHES = 6 * 4
"""Batches of the unpruned model's training, which comes first."""


def write_task(folder: Path) -> Path:
    """The task file, in `folder`; what it is to do there goes into `folder / "trouble"`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mortal_task.py").write_text(TASK)
    return folder


def spec(folder: Path, **fields: Any) -> StudySpec:
    """Two trials of two rounds after a training of six epochs of four batches; `fields` go over it."""
    table: dict[str, Any] = {
        "name": "mortal",
        "task": "mortal_task.py",
        "task_params": {"folder": str(folder)},
        "trials": 2,
        "sampler": "grid",
        "train": {"epochs": 6, "retrain_epochs": 3, "batch_size": 16, "lr": 0.05, "evaluate_every": 1},
        "space": {"rate": [0.3, 0.5], "rounds": 2},
    }
    return StudySpec(**(table | fields))


def batches(folder: Path) -> int:
    """How many batches were trained on in all."""
    path = folder / "batches"
    return path.stat().st_size if path.exists() else 0


def ticking() -> Callable[[], float]:
    """A clock that is a second further every time that it is looked at."""
    seconds = count(1)
    return lambda: float(next(seconds))


class Mortal(LocalPool):
    """Its worker dies where the task interrupts, and another takes its place."""

    def __init__(
        self, clock: Callable[[], float], *, kind: str = "worker died", again: Callable[[], None] | None = None
    ):
        super().__init__(clock)
        self.kind = kind
        self.again = again
        self.deaths = 0

    def submit(self, segment: Segment) -> None:
        self.at = segment
        super().submit(segment)

    def completed(self, timeout_seconds: float) -> Sequence[Event]:
        try:
            return super().completed(timeout_seconds)
        except KeyboardInterrupt:
            self.deaths += 1
            self._running = None
            if self.again is not None:
                self.again()
            key = next(step.key for step in self.at.steps if step.stored or step.evaluated)
            failed = Failed(segment=self.at.number, key=key, kind=self.kind, message="it was told to")
            return [failed, Ended(segment=self.at.number)]


class Sharing(LocalPool):
    """Says that its worker has a quarter of a GPU, or as much as a segment wants, and remembers who wanted what."""

    gpus = 0.25

    def __init__(self) -> None:
        super().__init__()
        self.wanted: list[tuple[Segment, float]] = []

    def submit(self, segment: Segment) -> None:
        self.wanted.append((segment, segment.gpus))
        os.environ["SHARE"] = str(max(self.gpus, segment.gpus))
        super().submit(segment)
