"""What two tasks have in common: the prunable tensors of the same name and shape, wherever their heads differ."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from orchestrator.errors import PlanError
from orchestrator.settings import OtherTask, Settings
from orchestrator.tasks.info import Layer, TaskInfo, leaves


def shared(one: Iterable[Layer], other: Iterable[Layer], leave: Sequence[str] = ()) -> list[str]:
    """The names of the tensors that both have in the same shape, but for those that a pattern of `leave` names."""
    shapes = {layer.name: layer.shape for layer in other}
    return [
        layer.name
        for layer in one
        if shapes.get(layer.name) == layer.shape and not any(leaves(pattern, layer.name) for pattern in leave)
    ]


def body(info: TaskInfo, tasks: Sequence[OtherTask]) -> list[str]:
    """The prunable tensors of the study's own task that each of the other tasks has too.

    Raises:
        PlanError: there is none; the message names the tensors.
    """
    names = [layer.name for layer in info.layers]
    for task in tasks:
        others = info.others[task.label].layers
        _refuse_idle(task, others)
        common = shared(info.layers, others, task.leave)
        names = [name for name in names if name in common]
        if not names:
            raise PlanError(
                f"no prunable tensor of the study's task ({described(info.layers)}) has the same name and shape in "
                f"{task.label!r} ({described(others)})" + (f" without {', '.join(task.leave)}" if task.leave else "")
            )
    return names


def described(layers: Iterable[Layer]) -> str:
    """Tensors with their shapes, in a line."""
    return ", ".join(f"{layer.name} {'x'.join(map(str, layer.shape))}" for layer in layers)


def protecting(settings: Settings, info: TaskInfo, names: Sequence[str]) -> Settings:
    """The settings that prune the tensors `names` of a task and no others."""
    others = [glob.escape(layer.name) for layer in info.layers if layer.name not in names]
    return replace(settings, prune=settings.prune.model_copy(update={"ignore": (*settings.prune.ignore, *others)}))


@contextmanager
def naming(task: str) -> Iterator[None]:
    """What is refused in the block says in which of the study's tasks."""
    try:
        yield
    except PlanError as error:
        raise PlanError(f"on the task {task!r}: {error}") from error


def _refuse_idle(task: OtherTask, layers: Sequence[Layer]) -> None:
    for pattern in task.leave:
        if not any(leaves(pattern, layer.name) for layer in layers):
            known = ", ".join(layer.label for layer in layers)
            raise PlanError(f"leave: no prunable layer of {task.label!r} matches {pattern!r}; there are: {known}")
