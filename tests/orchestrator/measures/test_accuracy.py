"""Measures over a whole split."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from orchestrator.errors import TaskError
from orchestrator.measures.accuracy import METRICS, class_accuracy, evaluate
from orchestrator.tasks import Metric
from orchestrator.tasks.data import Indexed, InMemory
from orchestrator.tasks.metrics import resolve

# As outputs they predict 0, 1, 1, 0.
X = torch.tensor([[2.0, 1.0], [0.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
Y = torch.tensor([0, 1, 0, 0])
ACCURACY = resolve({"accuracy": "accuracy"})


def test_four_rows() -> None:
    measured = evaluate(nn.Identity(), InMemory(X, Y), F.cross_entropy, ACCURACY, ["a", "b", "c"])
    assert measured.pop("loss") == pytest.approx(float(F.cross_entropy(X, Y)))
    assert measured == {"accuracy": 0.75, "class_accuracy": [2 / 3, 1.0, None], "worst_class_accuracy": 2 / 3}


def test_without_classes_there_are_no_class_measures() -> None:
    assert set(evaluate(nn.Identity(), InMemory(X, Y), F.cross_entropy, ACCURACY)) == {"accuracy", "loss"}


@given(size=st.integers(1, 9), seed=st.integers(0, 5))
def test_the_size_of_batches_changes_nothing(size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    split = InMemory(torch.randn(7, 3, generator=generator), torch.randint(3, (7,), generator=generator))
    whole = evaluate(nn.Identity(), split, F.cross_entropy, ACCURACY, "abc", batch_size=7)
    assert evaluate(nn.Identity(), split, F.cross_entropy, ACCURACY, "abc", batch_size=size) == whole


def test_metrics_see_the_whole_split_at_once() -> None:
    metrics = {"rows": Metric(lambda outputs, targets: len(outputs))}
    assert evaluate(nn.Identity(), InMemory(X, Y), F.cross_entropy, metrics, batch_size=1)["rows"] == 4


def test_evaluation_mode_without_gradients_and_the_modes_restored() -> None:
    class Watch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            assert not torch.is_grad_enabled()
            return x

    model = nn.Sequential(Watch(), nn.Dropout(), nn.BatchNorm1d(2))
    model[2].eval()
    before = [module.training for module in model.modules()]
    evaluate(model, InMemory(X, Y), F.cross_entropy, ACCURACY)
    assert [module.training for module in model.modules()] == before == [True, True, True, False]
    with pytest.raises(RuntimeError):
        evaluate(model, InMemory(X[:, :1], Y), F.cross_entropy, ACCURACY)
    assert [module.training for module in model.modules()] == before


class Named(nn.Module):
    """Takes two inputs by name and answers with an object, as Hugging Face models do."""

    def forward(self, a: Tensor, b: Tensor) -> Any:
        return SimpleNamespace(logits=a - b)


@pytest.mark.parametrize("inputs", [{"b": torch.zeros(4, 2), "a": X}, (X, torch.zeros(4, 2))])
def test_dicts_and_tuples_and_logits(inputs: Any) -> None:
    measured = evaluate(Named(), InMemory(inputs, Y), F.cross_entropy, ACCURACY, batch_size=3)
    assert measured["accuracy"] == 0.75


def test_outputs_that_are_a_tuple() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, -x

    metrics = {"difference": Metric(lambda outputs, targets: float((outputs[0] + outputs[1]).abs().max()))}
    measured = evaluate(Two(), InMemory(X, Y), lambda outputs, targets: outputs[1].sum(), metrics, batch_size=3)
    assert measured == {"difference": 0.0, "loss": -8.0}


def test_a_dataset_and_a_step_of_the_users_own() -> None:
    split = Indexed(list(zip(X, Y, strict=True)))
    measured = evaluate(
        nn.Identity(),
        split,
        F.cross_entropy,
        ACCURACY,
        batch_size=3,
        step=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
    )
    assert measured["loss"] == pytest.approx(float(F.cross_entropy(X, Y)))
    assert measured["accuracy"] == 0.75


def test_class_accuracy() -> None:
    assert class_accuracy(X, torch.tensor([1, 1, -100, 0]), 2) == [1.0, 0.5]
    assert class_accuracy(X[:, 1] - 2, Y, 2) == [2 / 3, 0.0]
    with pytest.raises(TaskError, match="targets hold 2, first at row 1: the 2 classes are 0 to 1"):
        class_accuracy(X, torch.tensor([1, 2, 0, 0]), 2)


def test_the_registry_is_shared() -> None:
    assert "accuracy" in METRICS
