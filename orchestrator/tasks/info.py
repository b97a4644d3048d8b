"""What the driver must know of a task to plan with it: plain data, so that the driver needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import ceil, prod


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One prunable tensor: its parameter name and shape."""

    name: str
    shape: tuple[int, ...]
    transposed: int = 0
    """The groups of a transposed convolution, whose weight lies inputs first; 0 for all others."""

    @property
    def rows_first(self) -> tuple[int, ...]:
        """The shape with the outputs first, as all but transposed convolutions have it: (out, in / groups, …)."""
        if not self.transposed:
            return self.shape
        inputs, outputs, *kernel = self.shape
        return (outputs * self.transposed, inputs // self.transposed, *kernel)

    @property
    def label(self) -> str:
        """The name that patterns are matched against: the module's, for a tensor called `weight`."""
        return self.name.removesuffix(".weight")

    @property
    def size(self) -> int:
        """How many weights it has."""
        return prod(self.shape)


def matches(pattern: str, label: str) -> bool:
    """Shell-style match on a layer's dotted name; `*.out` also means a top-level layer called `out`."""
    return fnmatchcase(label, pattern) or fnmatchcase("." + label, pattern)


def leaves(pattern: str, name: str) -> bool:
    """Whether a pattern names a tensor, or the layer that it belongs to: a layer is left with its bias."""
    return matches(pattern, name) or matches(pattern, name.rpartition(".")[0])


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Where the units of a group lie in a parameter.

    Args:
        tensor: its name.
        dim: the dimension along which they lie, of `size` places.
        role: what it is to the units, as in `structure.Slice`.
        widths: how many of these places each unit has.
        numel: all weights of the parameter.
    """

    tensor: str
    dim: int
    size: int
    role: str
    widths: tuple[int, ...]
    numel: int


@dataclass(frozen=True, kw_only=True)
class UnitCounts:
    """The units of one structure that can be removed.

    Args:
        groups: by group, how many of its units are made by which prunable tensors together.
        refused: (layer, reason) for layers that have none.
        pieces: by group, where its units lie.
    """

    groups: Mapping[str, Mapping[tuple[str, ...], int]] = field(default_factory=dict)
    refused: tuple[tuple[str, str], ...] = ()
    pieces: Mapping[str, tuple[Piece, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class GivenTicket:
    """The ticket that a study starts from: the hash of all that its file holds, and the tensors that it masks."""

    sha256: str
    layers: tuple[Layer, ...]


@dataclass(frozen=True, kw_only=True)
class TaskInfo:
    """A task as the driver sees it."""

    digest: str
    layers: tuple[Layer, ...]
    train_examples: int
    """0 where `train` is a function of the epoch."""
    valid_examples: int = 0
    test_examples: int = 0
    """0 where there is no test split."""
    batches_per_epoch: int | None = None
    """Given where `train` is a function of the epoch, which brings its own batches."""
    metrics: tuple[tuple[str, str], ...] = (("accuracy", "maximise"),)
    """Names and directions; the first is the main one."""
    classes: tuple[str, ...] | None = None
    groups: tuple[str, ...] = ()
    """Names of the groups that examples are in."""
    comes_trained: bool = False
    init_varies: bool = True
    """Whether untrained weights differ from seed to seed."""
    parameters: int = 0
    """All of the model's, prunable or not; 0 where that is not known."""
    units: Mapping[str, UnitCounts] = field(default_factory=dict)
    """By structure, for those that the study names."""
    flops: Mapping[str, int] = field(default_factory=dict)
    """Operations of one forward pass by parameter, "" for those without one; only where the study has a budget."""
    head_flops: Mapping[str, int] = field(default_factory=dict)
    """Those of all heads of an attention, by the first parameter that makes them; likewise."""
    norms: int | None = None
    """How many batch normalisations keep running statistics; None where that is not known."""
    lacks: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """By what criteria need, of which tensors it cannot be had and why; "" where of none. Only what the study needs."""
    others: Mapping[str, TaskInfo] = field(default_factory=dict)
    """The study's other tasks, by the names that it calls them."""
    ticket: GivenTicket | None = None

    @property
    def digests(self) -> dict[str, str]:
        """The digest of every task of the study by its name; the study's own has none."""
        return {"": self.digest} | {name: other.digest for name, other in self.others.items()}

    def steps_per_epoch(self, batch_size: int) -> int:
        """Optimizer steps in one epoch; the last, smaller batch is used too."""
        return self.batches_per_epoch or ceil(self.train_examples / batch_size)
