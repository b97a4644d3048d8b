"""Data in three forms, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from orchestrator.errors import TaskError
from orchestrator.tasks.data import Batches, Indexed, InMemory, call, normalise

X = torch.arange(8.0).reshape(4, 2)
Y = torch.tensor([0, 1, 1, 0])


class Pairs(Dataset[Any]):
    """Four (input, target) pairs; inputs are plain, tuples or dicts."""

    def __init__(self, form: str = "plain") -> None:
        self.form = form

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        x = X[index]
        inputs: Any = {"plain": x, "tuple": (x, x + 1), "dict": {"a": x}, "odd": torch.zeros(index)}[self.form]
        return (inputs, int(Y[index])) if self.form != "bare" else x


class Stream(IterableDataset[Any]):
    """Rows without an order."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())


def test_take_gives_fresh_contiguous_rows_in_order() -> None:
    split = normalise((X, Y), "train", 2)
    assert isinstance(split, InMemory)
    inputs, targets = split.take(torch.tensor([3, 0, 3]))
    assert inputs.tolist() == [[6, 7], [0, 1], [6, 7]]
    assert targets.tolist() == [0, 0, 0]
    inputs.zero_()
    assert X[3].tolist() == [6, 7]
    assert inputs.is_contiguous()


def test_batches_are_in_order_and_the_last_may_be_smaller() -> None:
    batches = list(InMemory(X, Y).batches(3))
    assert [len(targets) for _, targets in batches] == [3, 1]
    assert torch.equal(torch.cat([inputs for inputs, _ in batches]), X)


@given(size=st.integers(1, 6))
def test_a_dataset_gives_what_its_tensors_give(size: int) -> None:
    for ours, theirs in zip(Indexed(Pairs()).batches(size), InMemory(X, Y).batches(size), strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


def test_tuples_and_dicts() -> None:
    split = normalise(({"a": X, "b": (X, Y)}, Y), "train")
    assert isinstance(split, InMemory)
    inputs, _ = split.take(torch.tensor([1]))
    assert inputs["a"].tolist() == [[2, 3]]
    assert inputs["b"][1].tolist() == [1]
    assert len(split) == 4
    assert split.to("cpu").inputs["a"].data_ptr() == X.data_ptr()
    taken, _ = Indexed(Pairs("tuple")).take(torch.tensor([1, 2]))
    assert isinstance(taken, tuple)
    assert taken[1].tolist() == [[3, 4], [5, 6]]
    taken, _ = Indexed(Pairs("dict")).to("cpu").take(torch.tensor([1]))
    assert taken["a"].tolist() == [[2, 3]]


def test_every_form_is_recognised() -> None:
    assert isinstance(normalise(TensorDataset(X, Y), "valid"), InMemory)
    assert isinstance(normalise((X.numpy(), Y.numpy()), "valid"), InMemory)
    assert isinstance(normalise(Pairs(), "valid"), Indexed)
    assert isinstance(normalise([(X[0], 0)], "valid"), Indexed)
    split = normalise(lambda epoch, generator: [(X, Y)] * 3, "train")
    assert isinstance(split, Batches)
    assert split.count() == 3
    counted = Batches(lambda epoch, generator: iter([(X, Y)] * 2))
    assert counted.count() == 2
    assert len(list(counted.epoch(0, torch.Generator()))) == 2


def spoilt(value: float, *rows: int) -> Tensor:
    spoilt = X.clone()
    spoilt[list(rows), 1] = value
    return spoilt


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((spoilt(float("nan"), 1, 2, 3), Y), "train inputs hold 3 NaN values, first at row 1"),
        ((spoilt(float("-inf"), 2), Y), "train inputs hold 1 infinite value, first at row 2"),
        (({"a": X, "b": spoilt(float("nan"), 0)}, Y), "train inputs['b'] hold 1 NaN value, first at row 0"),
        ((X, X / 0), "train targets hold 1 NaN value, first at row 0"),
        ((X, Y[:3]), "train inputs have 4 rows and train targets have 3"),
        (((X, X[:2]), Y), "train inputs[0] have 4 rows and train inputs[1] have 2"),
        ((X[:0], Y[:0]), "train is empty"),
        ([], "train is empty"),
        ((X, torch.tensor([0, 1, 2, 2])), "train targets hold 2, first at row 2: the 2 classes are 0 to 1"),
        ((X, torch.tensor([0, -1, 1, 1])), "train targets hold -1, first at row 1: the 2 classes are 0 to 1"),
        ((X, torch.tensor(1)), "train targets is a single number: the first dimension must run over the examples"),
        ((X, [1, 2]), "train targets must be a tensor, or a tuple or dict of tensors, not list"),
        ((X, {}), "train must hold at least one tensor of inputs and one of targets"),
        (
            (X, np.array(["a"] * 4)),
            "train targets cannot be made a tensor: can't convert np.ndarray of type numpy.str_",
        ),
        (Stream(), "train is an IterableDataset, which has no rows to order: a pair (inputs, targets) of tensors"),
        (DataLoader(Pairs()), "train is a DataLoader: give its dataset, or a function f(epoch, generator) -> batches"),
        (X, "train must be a pair (inputs, targets) of tensors, a map-style Dataset or a function f(epoch, generator)"),
        ((X, Y, Y), "train must be a pair (inputs, targets) of tensors, "),
        (None, "train must be a pair (inputs, targets) of tensors, "),
    ],
)
def test_bad_data_is_refused_in_one_line(given: Any, said: str) -> None:
    with pytest.raises(TaskError) as caught:
        normalise(given, "train", 2)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_only_train_may_be_a_function() -> None:
    with pytest.raises(TaskError, match="^valid must be a pair .* or a map-style Dataset, not function$"):
        normalise(lambda epoch, generator: [], "valid")


def test_large_finite_values_are_legal() -> None:
    normalise((torch.full((4, 2), 3e38), Y), "train")
    normalise((X, torch.tensor([0, 1, -100, 1])), "train", 2)


def test_a_dataset_with_bad_items() -> None:
    with pytest.raises(TaskError, match=r"^the items of a dataset must be \(input, target\) pairs, not Tensor$"):
        Indexed([X[0]]).take(torch.tensor([0]))
    with pytest.raises(TaskError, match="^the dataset's items cannot be put into one batch: "):
        Indexed(Pairs("odd")).take(torch.tensor([0, 1]))


class Sum(nn.Module):
    """Adds up what it is called with."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a - b


class Logits(nn.Module):
    """Answers as a Hugging Face model does."""

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(logits=x + 1, loss=None)


def test_call() -> None:
    assert call(Sum(), (X, 2 * X)).tolist() == (-X).tolist()
    assert call(Sum(), {"b": X, "a": 2 * X}).tolist() == X.tolist()
    assert call(Logits(), X).tolist() == (X + 1).tolist()
