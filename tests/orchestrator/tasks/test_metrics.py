"""Built-in metrics on numbers that can be checked by eye."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from orchestrator.errors import TaskError, UnknownName
from orchestrator.tasks import Metric
from orchestrator.tasks.metrics import METRICS, accuracy, balanced_accuracy, mae, mse, resolve, top5_accuracy

# Predicts 0, 1, 1, 0.
OUTPUTS = torch.tensor([[2.0, 1.0], [0.0, 1.0], [0.0, 3.0], [1.0, 0.0]])


def test_accuracy() -> None:
    assert accuracy(OUTPUTS, torch.tensor([0, 1, 0, 0])) == 0.75
    assert accuracy(OUTPUTS, torch.tensor([0, 1, -100, -100])) == 1.0
    assert accuracy(OUTPUTS[:, 1:] - 0.5, torch.tensor([1, 1, 1, 1])) == 0.75
    assert accuracy(OUTPUTS[:, 1] - 0.5, torch.tensor([1, 1, 1, 0])) == 1.0
    assert accuracy(OUTPUTS.T.unsqueeze(0), torch.tensor([[0, 1, 0, 0]])) == 0.75


def test_accuracy_refuses_to_broadcast() -> None:
    with pytest.raises(TaskError, match=r"predictions \(4,\) and targets \(2,\) differ in shape"):
        accuracy(OUTPUTS, torch.tensor([0, 1]))


def test_balanced_accuracy_weighs_classes_alike() -> None:
    assert balanced_accuracy(OUTPUTS, torch.tensor([0, 0, 0, 1])) == pytest.approx(1 / 6)


def test_top5_accuracy() -> None:
    outputs = torch.arange(7.0).repeat(4, 1)
    assert top5_accuracy(outputs, torch.tensor([6, 2, 1, 0])) == 0.5
    assert top5_accuracy(OUTPUTS, torch.tensor([1, 1, 1, 1])) == 1.0


def test_errors_do_not_broadcast() -> None:
    column, row = torch.tensor([[1.0], [2.0], [3.0], [4.0]]), torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert mse(column, row) == 1.0
    assert mae(column, row) == 0.5
    with pytest.raises(TaskError, match="differ in size"):
        mse(OUTPUTS, row)


def test_every_metric_has_a_direction_and_a_summary() -> None:
    for entry in METRICS:
        assert entry.facts["direction"] in ("maximise", "minimise")
        assert entry.summary


def test_resolve() -> None:
    given = Metric(lambda outputs, targets: 0.0, "minimise")
    found = resolve({"accuracy": "accuracy", "error": "mse", "own": given, "f": max})
    assert [metric.direction for metric in found.values()] == ["maximise", "minimise", "minimise", "maximise"]
    assert found["own"] is given


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({}, "the task has no metrics"),
        ({"loss": "accuracy"}, "a metric cannot be called 'loss'"),
        ({"test_f1": "accuracy"}, "a metric cannot be called 'test_f1'"),
        ({"f1": 3}, "metric 'f1' must be a built-in name, a function or a Metric, not int"),
        ({"f1": Metric(max, "up")}, "metric 'f1': direction 'up' is not one of"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_metric(metrics: Any, said: str) -> None:
    with pytest.raises(TaskError, match=said):
        resolve(metrics)
    with pytest.raises(UnknownName, match="Known: accuracy"):
        resolve({"f1": "f1"})
