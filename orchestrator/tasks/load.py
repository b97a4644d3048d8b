"""A task, loaded once per process: its user's function called, its data checked and put into one of three forms."""

from __future__ import annotations

import inspect
import json
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from orchestrator.errors import InputError, TaskError
from orchestrator.tasks.checkpoint import lay_over, read_checkpoint
from orchestrator.tasks.data import Batches, Split, normalise
from orchestrator.tasks.groups import Labels, labels_by_split
from orchestrator.tasks.info import TaskInfo
from orchestrator.tasks.metrics import resolve
from orchestrator.tasks.source import Source, install
from orchestrator.tasks.source import blamed as blamed
from orchestrator.tasks.task import Metric, Task

BUILD_SEED = 0
"""The seed under which task functions run, so that data drawn without a seed are the same on every worker."""


class LoadedTask:
    """A task with its data in hand. `train`, `valid` and `test` are checked; `test` is None where there is none.

    With `weights`, those of the source's checkpoint, the model comes trained; what the task builds is the fresh one.
    """

    def __init__(
        self, task: Task, source: Source, params: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None
    ) -> None:
        self.task = task if weights is None else replace(task, fresh=task.fresh or task.model)
        self.source = source
        self.weights = weights
        self.params = dict(params)
        """Those that differ from the task function's defaults."""
        self.classes = None if task.classes is None else tuple(str(name) for name in task.classes)
        if self.classes is not None and len(self.classes) < 2:
            raise TaskError(f"classes must name at least two classes, not {len(self.classes)}")
        self.metrics: dict[str, Metric] = resolve(task.metrics)
        count = None if self.classes is None else len(self.classes)
        self.train: Split | Batches = normalise(task.train, "train", count)
        self.valid: Split = _rows(normalise(task.valid, "valid", count))
        self.test: Split | None = None if task.test is None else _rows(normalise(task.test, "test", count))
        rows = {"valid": len(self.valid)} | ({} if self.test is None else {"test": len(self.test)})
        self.groups: dict[str, dict[str, Labels]] = labels_by_split(task, rows)
        """By split, then by name."""

    @cached_property
    def info(self) -> TaskInfo:
        """The task as the driver sees it; builds the model once and proves that model, data and loss fit together."""
        from orchestrator.tasks.describe import describe

        return describe(self)

    def model(self, fresh: bool = False) -> nn.Module:
        """Builds the model, under whatever seed the caller has set; `fresh` asks for the untrained one.

        Raises:
            TaskError: the user's builder raised, or returned no module or one with layers of unknown size.
        """
        builder, what = self.task.model, "model"
        if fresh and self.task.fresh not in (None, builder):
            builder, what = self.task.fresh, "fresh"
        with blamed(f"task {self.source.name!r}: {what}() failed", self.source):
            model = builder()
        if not isinstance(model, nn.Module):
            raise TaskError(f"task {self.source.name!r}: {what}() returned {_kind(model)}, not a torch.nn.Module")
        lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
        if lazy:
            raise TaskError(f"task {self.source.name!r}: the size of {lazy[0]} is unknown: use no lazy layers")
        if self.weights is not None and self.source.checkpoint is not None and not fresh:
            try:
                lay_over(self.weights, model)
            except TaskError as error:
                what = f"task {self.source.name!r}: checkpoint {self.source.checkpoint.name!r} does not fit the model"
                raise TaskError(f"{what}: {error}") from error
        return model


_loaded: dict[tuple[str, str, str, str], LoadedTask] = {}


def load(source: Source, params: Mapping[str, Any], root: Path | None = None) -> LoadedTask:
    """The task of `source` called with `params`; the same object for the same arguments in one process.

    Args:
        source: from `orchestrator.tasks.source.collect`.
        params: keyword arguments of the task function; plain JSON values.
        root: the folder of the study file, for files that the task reads beside itself.

    Raises:
        TaskError: the file has no function `task`, it raised, its parameters are wrong, or what it gave is; or the
            checkpoint cannot be read.
    """
    with isolated(BUILD_SEED):
        with blamed(f"task {source.name!r} failed", source):
            module = install(source, root)
        function = _function(module, source)
        arguments = _arguments(function, params, source)
        folder, checkpoint = "" if root is None else str(root.resolve()), source.checkpoint
        key = (source.digest, canonical(arguments, source), folder, "" if checkpoint is None else checkpoint.sha256)
        if key not in _loaded:
            with blamed(f"task {source.name!r} failed", source):
                task = function(**params)
            if not isinstance(task, Task):
                raise TaskError(f"task {source.name!r}: task() returned {_kind(task)}, not an orchestrator.tasks.Task")
            weights = None if checkpoint is None else read_checkpoint(checkpoint, root)
            with blamed(f"task {source.name!r} failed", source):
                try:
                    _loaded[key] = LoadedTask(task, source, arguments, weights)
                except InputError as error:
                    raise TaskError(f"task {source.name!r}: {error}") from error
    return _loaded[key]


def canonical(params: Mapping[str, Any], source: Source) -> str:
    """The parameters as JSON with sorted keys.

    Raises:
        TaskError: a value that JSON does not know.
    """
    try:
        return json.dumps(dict(params), sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TaskError(f"task {source.name!r}: parameters must be plain values: {error}") from error


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Runs its block under `seed` and leaves the global generators of torch, numpy and random as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _function(module: ModuleType, source: Source) -> Callable[..., Any]:
    function = getattr(module, "task", None)
    if not callable(function):
        raise TaskError(f"task {source.name!r} has no function `task`: def task() -> orchestrator.tasks.Task")
    return function  # type: ignore[no-any-return]


def _arguments(function: Callable[..., Any], params: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """`params` less those that are the function's defaults, so that saying a default changes no digest."""
    signature = inspect.signature(function).parameters
    named = {
        name: parameter
        for name, parameter in signature.items()
        if parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    }
    legal = f"its parameters are: {', '.join(named)}" if named else "it has no parameters"
    open_ended = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in signature.values())
    for name in params:
        if name not in named and not open_ended:
            close = get_close_matches(name, named, n=1)
            hint = f", did you mean {close[0]!r}?" if close else ";"
            raise TaskError(f"task {source.name!r} has no parameter {name!r}{hint} {legal}")
    for name, parameter in named.items():
        if parameter.default is inspect.Parameter.empty and name not in params:
            raise TaskError(f"task {source.name!r} needs the parameter {name!r}; {legal}")
    return {
        name: value
        for name, value in params.items()
        if name not in named or type(value) is not type(named[name].default) or value != named[name].default
    }


def _rows(split: Split | Batches) -> Split:
    assert not isinstance(split, Batches)
    return split


def _kind(value: object) -> str:
    return "nothing" if value is None else type(value).__name__
