"""How well a model does on a whole split: its task's metrics, its loss, and each class and group by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.tasks.data import Nested, Split, call, check_classes, move, transform
from orchestrator.tasks.groups import Labels
from orchestrator.tasks.metrics import METRICS, predictions
from orchestrator.tasks.task import Metric

__all__ = ["METRICS", "class_accuracy", "concatenate", "evaluate", "group_accuracy", "group_measure", "predict"]

Measured = float | list[float | None] | None

BATCH_SIZE = 1024
"""Rows per forward pass."""


def evaluate(
    model: nn.Module,
    split: Split,
    loss: Callable[[Any, Any], Tensor],
    metrics: Mapping[str, Metric],
    classes: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
    *,
    batch_size: int = BATCH_SIZE,
    groups: Mapping[str, Labels] | None = None,
    step: Callable[[nn.Module, Any], Tensor] | None = None,
) -> dict[str, Measured]:
    """Measures of `model` over all rows of `split`, in evaluation mode and without gradients.

    Args:
        model: on `device` already; the training mode of each of its modules is restored.
        split: rows on any device; moved batch by batch.
        loss: f(outputs, targets) -> scalar, called once on the whole split's outputs.
        metrics: name -> Metric, from `orchestrator.tasks.metrics.resolve`; called likewise.
        classes: the classes' names; adds the two per-class measures.
        batch_size: rows per forward pass; changes no result but for rounding.
        groups: by name, the group that each row of the split is in; adds the group measures.
        step: f(model, batch) -> loss, instead of `loss`: called per batch and averaged over the rows.

    Returns:
        Every metric by its name; "loss", the mean over examples; with `classes` "class_accuracy", the share of each
        class's rows that are predicted right (None for a class without rows), and "worst_class_accuracy", their least.
        With `groups` the same by label, as "accuracy[sex=f]"; "worst_group_accuracy", the least of all labels; and
        "group_gap", the largest difference between two labels of one group.

    Raises:
        TaskError: targets that name none of the classes.
    """
    gathered: list[tuple[Any, Nested]] = []
    stepped = 0.0
    with _evaluating(model):
        for batch in split.batches(batch_size):
            inputs, targets = move(batch, device)
            gathered.append((call(model, inputs), targets))
            if step is not None:
                stepped += float(step(model, (inputs, targets))) * _rows(inputs)
        outputs = concatenate([outputs for outputs, _ in gathered])
        targets = concatenate([targets for _, targets in gathered])
        measured: dict[str, Measured] = {
            name: float(metric.function(outputs, targets)) for name, metric in metrics.items()
        }
        measured["loss"] = float(loss(outputs, targets)) if step is None else stepped / len(split)
        if classes is not None:
            each = class_accuracy(outputs, targets, len(classes))
            measured["class_accuracy"] = each
            measured["worst_class_accuracy"] = min((share for share in each if share is not None), default=None)
        if groups:
            measured |= _by_group(outputs, targets, groups)
    return measured


def predict(
    model: nn.Module, split: Split, device: torch.device | str = "cpu", *, batch_size: int = BATCH_SIZE
) -> tuple[Tensor, Tensor]:
    """The class that `model` predicts for each row of `split`, and the rows' targets, both on the CPU.

    In evaluation mode and without gradients, in the batches of `evaluate`, so that the same rows come out right.
    """
    predicted, wanted = [], []
    with _evaluating(model):
        for batch in split.batches(batch_size):
            inputs, targets = move(batch, device)
            predicted.append(predictions(call(model, inputs)).reshape(targets.shape).to("cpu"))
            wanted.append(targets.to("cpu"))
    return torch.cat(predicted), torch.cat(wanted)


def class_accuracy(outputs: Tensor, targets: Tensor, classes: int) -> list[float | None]:
    """The share of each class's rows that are predicted right; None for a class without rows.

    Args:
        outputs: (n, classes, …), or single logits (n,) or (n, 1) for two classes.
        targets: integers (n, …); -100 counts nowhere.

    Raises:
        TaskError: a target that is not one of 0 … classes - 1.
    """
    check_classes("targets", targets, classes)
    counted = targets >= 0
    right = (predictions(outputs).reshape(targets.shape) == targets) & counted
    rows = torch.bincount(targets[counted].long(), minlength=classes).tolist()
    hits = torch.bincount(targets[right].long(), minlength=classes).tolist()
    return [hit / total if total else None for hit, total in zip(hits, rows, strict=True)]


def group_accuracy(outputs: Tensor, targets: Tensor, labels: Labels) -> list[float | None]:
    """The share of each label's rows that are predicted right, in the order of its names; None for one without rows.

    Args:
        outputs: as for `class_accuracy`.
        targets: integers (n, …); -100 counts nowhere.
        labels: of the n examples; all positions of an example are in its group.
    """
    counted = targets >= 0
    right = (predictions(outputs).reshape(targets.shape) == targets) & counted
    codes, many = labels.codes.to(targets.device), len(labels.names)
    each = [values.reshape(len(targets), -1).sum(dim=1) for values in (right, counted)]
    hits, rows = (
        torch.zeros(many, dtype=values.dtype, device=codes.device).index_add(0, codes, values) for values in each
    )
    return [hit / total if total else None for hit, total in zip(hits.tolist(), rows.tolist(), strict=True)]


def group_measure(group: str, label: str) -> str:
    """What the accuracy of one label of a group is called among the measures."""
    return f"accuracy[{group}={label}]"


def _by_group(outputs: Tensor, targets: Tensor, groups: Mapping[str, Labels]) -> dict[str, Measured]:
    found: dict[str, float] = {}
    gaps: list[float] = []
    for group, labels in groups.items():
        each = zip(labels.names, group_accuracy(outputs, targets, labels), strict=True)
        shares = {group_measure(group, label): share for label, share in each if share is not None}
        found |= shares
        if shares:
            gaps.append(max(shares.values()) - min(shares.values()))
    if not found:
        return {}
    return {**found, "worst_group_accuracy": min(found.values()), "group_gap": max(gaps)}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the training mode of each module is restored."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def concatenate(parts: Sequence[Nested]) -> Nested:
    """Nested values of the same form joined along the first dimension of their tensors."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    if isinstance(first, Mapping):
        return {key: concatenate([part[key] for part in parts]) for key in first}
    if isinstance(first, (tuple, list)):
        return tuple(concatenate(members) for members in zip(*parts, strict=True))
    return first


def _rows(inputs: Nested) -> int:
    lengths: list[int] = []
    transform(lambda tensor: lengths.append(len(tensor)), inputs)
    return lengths[0]
