"""What the driver must know of a task to plan with it: plain data, so that the driver needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One prunable tensor: its parameter name and shape."""

    name: str
    shape: tuple[int, ...]

    @property
    def label(self) -> str:
        """The name that patterns are matched against: the module's, for a tensor called `weight`."""
        return self.name.removesuffix(".weight")

    @property
    def size(self) -> int:
        """How many weights it has."""
        return prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class TaskInfo:
    """A task as the driver sees it."""

    digest: str
    layers: tuple[Layer, ...]
    train_examples: int
    """0 where `train` is a function of the epoch."""
    batches_per_epoch: int | None = None
    """Given where `train` is a function of the epoch, which brings its own batches."""
    metrics: tuple[tuple[str, str], ...] = (("accuracy", "maximise"),)
    """Names and directions; the first is the main one."""
    classes: tuple[str, ...] | None = None
    comes_trained: bool = False
    init_varies: bool = True
    """Whether untrained weights differ from seed to seed."""

    def steps_per_epoch(self, batch_size: int) -> int:
        """Optimizer steps in one epoch; the last, smaller batch is used too."""
        return self.batches_per_epoch or ceil(self.train_examples / batch_size)
