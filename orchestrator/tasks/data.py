"""The user's data in one of three forms: tensors in memory, a map-style dataset, or a function that makes batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset, default_collate

from orchestrator.errors import TaskError
from orchestrator.tasks.metrics import IGNORED

Nested: TypeAlias = Any
"""A tensor, or a tuple or dict of such; examples lie along the first dimension."""


@dataclass(frozen=True)
class InMemory:
    """Inputs and targets as tensors, or tuples and dicts of tensors, of the same length."""

    inputs: Nested
    targets: Nested

    def __len__(self) -> int:
        return len(next(tensors(self.inputs))[1])

    def take(self, indices: Tensor) -> tuple[Nested, Nested]:
        """The rows at `indices` (k,) in that order, as fresh contiguous tensors on the data's device."""

        def rows(tensor: Tensor) -> Tensor:
            return tensor.index_select(0, indices.to(tensor.device))

        return transform(rows, self.inputs), transform(rows, self.targets)

    def batches(self, size: int) -> Iterator[tuple[Nested, Nested]]:
        """Every row once, in order, `size` at a time; the last batch may be smaller. Views, not copies."""
        for start in range(0, len(self), size):
            rows = slice(start, start + size)
            yield transform(itemgetter(rows), self.inputs), transform(itemgetter(rows), self.targets)

    def subset(self, indices: Tensor) -> InMemory:
        """Only the rows at `indices`."""
        return InMemory(*self.take(indices))

    def to(self, device: torch.device | str) -> InMemory:
        """The same rows on `device`; rows that are there already are shared, not copied."""
        return InMemory(move(self.inputs, device), move(self.targets, device))


@dataclass(frozen=True)
class Indexed:
    """A map-style dataset of (input, target) pairs, collated into batches on `device`."""

    dataset: Any
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __len__(self) -> int:
        return len(self.dataset)

    def take(self, indices: Tensor) -> tuple[Nested, Nested]:
        """The rows at `indices` (k,) in that order, collated.

        Raises:
            TaskError: an item is no (input, target) pair, or the items cannot be collated.
        """
        return self._collate([self.dataset[index] for index in indices.tolist()])

    def batches(self, size: int) -> Iterator[tuple[Nested, Nested]]:
        """Every row once, in order, `size` at a time; the last batch may be smaller."""
        for start in range(0, len(self), size):
            yield self.take(torch.arange(start, min(start + size, len(self))))

    def subset(self, indices: Tensor) -> Indexed:
        """Only the rows at `indices`."""
        return Indexed(Subset(self.dataset, indices.tolist()), self.device)

    def to(self, device: torch.device | str) -> Indexed:
        """The same rows, whose batches come out on `device`."""
        return Indexed(self.dataset, torch.device(device))

    def _collate(self, items: list[Any]) -> tuple[Nested, Nested]:
        for item in items:
            if not isinstance(item, (tuple, list)) or len(item) != 2:
                raise TaskError(f"the items of a dataset must be (input, target) pairs, not {_kind(item)}")
        try:
            inputs, targets = default_collate(items)
        except (TypeError, RuntimeError) as error:
            raise TaskError(f"the dataset's items cannot be put into one batch: {_first_line(error)}") from error
        return move(_tuples(inputs), self.device), move(_tuples(targets), self.device)


@dataclass(frozen=True)
class Batches:
    """A function `f(epoch, generator)` that returns the batches of one epoch, each an (inputs, targets) pair."""

    function: Callable[[int, torch.Generator], Iterable[Any]]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def epoch(self, number: int, generator: torch.Generator) -> Iterator[Any]:
        """The batches of epoch `number` (from 0) on `device`; `generator` is the only source of chance to use."""
        for batch in self.function(number, generator):
            yield move(batch, self.device)

    def count(self) -> int:
        """How many batches an epoch has: the `len` of what the function returns, else counted once on epoch 0."""
        batches = self.function(0, torch.Generator().manual_seed(0))
        try:
            return len(batches)  # type: ignore[arg-type]
        except TypeError:
            return sum(1 for _ in batches)

    def to(self, device: torch.device | str) -> Batches:
        """The same batches, moved to `device`."""
        return Batches(self.function, torch.device(device))


Split: TypeAlias = InMemory | Indexed
"""Rows that can be taken by index: every split, but for a `train` that brings its own batches."""


def normalise(given: Any, name: str, classes: int | None = None) -> Split | Batches:
    """The split called `name` in one of the three forms, checked.

    Args:
        given: what the task gave: `(inputs, targets)`, a map-style dataset, or a function of (epoch, generator).
        name: "train", "valid" or "test", for messages; only "train" may be a function.
        classes: how many classes the targets may name, where the task has classes.

    Raises:
        TaskError: unequal lengths, no rows, NaN or infinite values, targets that are no class, or another type.
    """
    if isinstance(given, (InMemory, Indexed, Batches)):
        return given
    if isinstance(given, TensorDataset) and len(given.tensors) == 2:
        given = given.tensors
    if isinstance(given, tuple) and len(given) == 2:
        split = InMemory(*(_as_tensors(part, f"{name} {what}") for part, what in zip(given, PARTS, strict=True)))
        _check_rows(split, name, classes)
        return split
    if isinstance(given, DataLoader):
        raise TaskError(f"{name} is a DataLoader: give its dataset, or a function f(epoch, generator) -> batches")
    if isinstance(given, IterableDataset):
        raise TaskError(f"{name} is an IterableDataset, which has no rows to order: {_legal(name)}")
    if (
        hasattr(given, "__getitem__")
        and hasattr(given, "__len__")
        and not isinstance(given, (Mapping, tuple, str, Tensor))
    ):
        if len(given) == 0:
            raise TaskError(f"{name} is empty")
        return Indexed(given)
    if name == "train" and callable(given):
        return Batches(given)
    raise TaskError(f"{name} must be {_legal(name)}, not {_kind(given)}")


PARTS = ("inputs", "targets")


def call(model: nn.Module, inputs: Nested) -> Any:
    """The model's outputs: a tuple of inputs is passed by position, a dict by keyword; of `.logits` only those.

    Losses and metrics see what this returns, so models that return an object with `.logits` work with either.
    """
    if isinstance(inputs, Mapping):
        outputs = model(**inputs)
    elif isinstance(inputs, tuple):
        outputs = model(*inputs)
    else:
        outputs = model(inputs)
    return getattr(outputs, "logits", outputs)


def transform(function: Callable[[Tensor], Any], value: Nested) -> Nested:
    """`function` applied to every tensor of a tensor, tuple, list or dict; anything else is passed through."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: transform(function, part) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(transform(function, part) for part in value)
    if isinstance(value, list):
        return [transform(function, part) for part in value]
    return value


def tensors(value: Nested, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a nested value with its place: `""`, `"[0]"`, `"['mask']"`."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from tensors(part, f"{path}[{key!r}]")
    elif isinstance(value, (tuple, list)):
        for index, part in enumerate(value):
            yield from tensors(part, f"{path}[{index}]")


def move(value: Nested, device: torch.device | str) -> Nested:
    """Every tensor of `value` on `device`."""
    return transform(lambda tensor: tensor.to(device), value)


def shape_of(value: Nested) -> str:
    """The shapes of a nested value for messages: `(2, 10)`, or `{mask: (2, 5), tokens: (2, 5)}`."""
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {shape_of(part)}" for key, part in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(shape_of(part) for part in value) + ")"
    return type(value).__name__


def _as_tensors(value: Any, where: str) -> Nested:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        return {key: _as_tensors(part, f"{where}[{key!r}]") for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_as_tensors(part, f"{where}[{index}]") for index, part in enumerate(value))
    if isinstance(value, np.ndarray):
        try:
            return torch.from_numpy(np.ascontiguousarray(value))
        except TypeError as error:
            raise TaskError(f"{where} cannot be made a tensor: {_first_line(error)}") from error
    raise TaskError(f"{where} must be a tensor, or a tuple or dict of tensors, not {_kind(value)}")


def _check_rows(split: InMemory, name: str, classes: int | None) -> None:
    found = [(f"{name} {what}{place}", t) for what in PARTS for place, t in tensors(getattr(split, what))]
    if {where.split("[")[0] for where, _ in found} != {f"{name} {what}" for what in PARTS}:
        raise TaskError(f"{name} must hold at least one tensor of inputs and one of targets")
    for where, tensor in found:
        if tensor.ndim == 0:
            raise TaskError(f"{where} is a single number: the first dimension must run over the examples")
    first, length = found[0][0], len(found[0][1])
    for where, tensor in found:
        if len(tensor) != length:
            raise TaskError(f"{first} have {length} rows and {where} have {len(tensor)}")
    if length == 0:
        raise TaskError(f"{name} is empty")
    for where, tensor in found:
        _check_finite(where, tensor)
    if classes is not None:
        for where, tensor in found:
            if where.startswith(f"{name} targets"):
                check_classes(where, tensor, classes)


def _check_finite(where: str, tensor: Tensor) -> None:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return
    # A sum is finite far more often than not, and reading it needs no mask as large as the data.
    if torch.isfinite(tensor.sum()):
        return
    for kind, wrong in (("NaN", torch.isnan(tensor)), ("infinite", torch.isinf(tensor))):
        count = int(wrong.sum())
        if count:
            row = int(wrong.reshape(len(tensor), -1).any(dim=1).nonzero()[0])
            values = "value" if count == 1 else "values"
            raise TaskError(f"{where} hold {count} {kind} {values}, first at row {row}")


def check_classes(where: str, targets: Tensor, classes: int) -> None:
    """Raises TaskError where integer `targets` name no class of 0 … classes - 1 (or -100, which counts nowhere)."""
    if targets.is_floating_point() or targets.dtype == torch.bool:
        return
    wrong = ((targets < 0) | (targets >= classes)) & (targets != IGNORED)
    if wrong.any():
        rows = wrong.reshape(len(targets), -1)
        row = int(rows.any(dim=1).nonzero()[0])
        value = int(targets.reshape(len(targets), -1)[row][rows[row]][0])
        raise TaskError(f"{where} hold {value}, first at row {row}: the {classes} classes are 0 to {classes - 1}")


def _tuples(value: Nested) -> Nested:
    # default_collate turns tuples into lists; a tuple of inputs must stay one to be passed by position.
    if isinstance(value, (list, tuple)):
        return tuple(_tuples(part) for part in value)
    if isinstance(value, Mapping):
        return {key: _tuples(part) for key, part in value.items()}
    return value


def _legal(name: str) -> str:
    forms = "a pair (inputs, targets) of tensors"
    if name == "train":
        return f"{forms}, a map-style Dataset or a function f(epoch, generator) -> batches"
    return f"{forms} or a map-style Dataset"


def _kind(value: object) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return type(value).__name__


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
