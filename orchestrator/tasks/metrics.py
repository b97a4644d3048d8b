"""The metrics that a task may name: figures over a whole split's outputs and targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from orchestrator.errors import TaskError
from orchestrator.outcome import OUTCOME_COLUMNS
from orchestrator.registry import Registry
from orchestrator.tasks.task import Metric

METRICS: Registry[Callable[[Tensor, Tensor], float]] = Registry("metric")
"""Each entry has the fact `direction`: "maximise" or "minimise"."""

IGNORED = -100
"""A target that counts nowhere, as in `torch.nn.functional.cross_entropy`."""


def resolve(metrics: Mapping[str, str | Callable[[Any, Any], float] | Metric]) -> dict[str, Metric]:
    """A task's metrics by name, each with its function and direction; a bare callable is maximised.

    Raises:
        TaskError: no metrics, a name that another measure has, or something that is no metric.
        UnknownName: no built-in metric of that name; the message lists them.
    """
    if not metrics:
        raise TaskError("the task has no metrics: give at least one, the first is the main one")
    return {name: _one(name, given) for name, given in metrics.items()}


def _one(name: str, given: str | Callable[[Any, Any], float] | Metric) -> Metric:
    if name != "accuracy" and (name in OUTCOME_COLUMNS or name.startswith("test_")):
        raise TaskError(f"a metric cannot be called {name!r}: that name is taken by a measure of Orchardist's own")
    if isinstance(given, Metric):
        if given.direction not in ("maximise", "minimise"):
            raise TaskError(f"metric {name!r}: direction {given.direction!r} is not one of 'maximise', 'minimise'")
        return given
    if isinstance(given, str):
        entry = METRICS[given]
        return Metric(entry.function, entry.facts.get("direction", "maximise"))
    if callable(given):
        return Metric(given)
    raise TaskError(f"metric {name!r} must be a built-in name, a function or a Metric, not {type(given).__name__}")


def predictions(outputs: Tensor) -> Tensor:
    """The predicted class per row: argmax over dimension 1; a single logit (n,) or (n, 1) predicts class 1 above 0."""
    if outputs.ndim == 1 or outputs.shape[1] == 1:
        return (outputs.flatten() > 0).long()
    return outputs.argmax(dim=1)


@METRICS.register("accuracy", direction="maximise")
def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Share of rows whose highest output is the target class. Outputs (n, classes, …), integer targets (n, …)."""
    counted = _counted(targets)
    hits = _alike(predictions(outputs), targets) == targets
    return _share(hits & counted, counted)


@METRICS.register("top5_accuracy", direction="maximise")
def top5_accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Share of rows whose target class is among the five highest outputs. Outputs (n, classes), targets (n,)."""
    counted = _counted(targets)
    best = outputs.topk(min(5, outputs.shape[1]), dim=1).indices
    return _share((best == targets.unsqueeze(1)).any(dim=1) & counted, counted)


@METRICS.register("balanced_accuracy", direction="maximise")
def balanced_accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Mean over the classes that occur of the share of their rows that are predicted right. Shapes as in accuracy."""
    hits = _alike(predictions(outputs), targets) == targets
    labels = sorted(set(targets[_counted(targets)].tolist()))
    return sum(_share(hits & (targets == label), targets == label) for label in labels) / max(1, len(labels))


@METRICS.register("mse", direction="minimise")
def mse(outputs: Tensor, targets: Tensor) -> float:
    """Mean squared error over all entries; outputs and targets hold the same number of values."""
    return float((outputs.double() - _matched(outputs, targets).double()).square().mean())


@METRICS.register("mae", direction="minimise")
def mae(outputs: Tensor, targets: Tensor) -> float:
    """Mean absolute error over all entries; outputs and targets hold the same number of values."""
    return float((outputs.double() - _matched(outputs, targets).double()).abs().mean())


def _counted(targets: Tensor) -> Tensor:
    return targets != IGNORED


def _share(hits: Tensor, counted: Tensor) -> float:
    return int(hits.sum()) / max(1, int(counted.sum()))


def _alike(predicted: Tensor, targets: Tensor) -> Tensor:
    if predicted.shape != targets.shape and predicted.numel() == targets.numel():
        predicted = predicted.reshape(targets.shape)
    if predicted.shape != targets.shape:
        raise TaskError(f"predictions {tuple(predicted.shape)} and targets {tuple(targets.shape)} differ in shape")
    return predicted


def _matched(outputs: Tensor, targets: Tensor) -> Tensor:
    # (n, 1) minus (n,) would broadcast to (n, n) and give a wrong figure without a word.
    if outputs.numel() != targets.numel():
        raise TaskError(f"outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)} differ in size")
    return targets.reshape(outputs.shape)
