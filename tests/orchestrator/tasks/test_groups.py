"""Groups of examples: what a task may say of them, and what is measured by them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from orchestrator.errors import TaskError
from orchestrator.measures.accuracy import evaluate, group_accuracy
from orchestrator.measures.measure import measure
from orchestrator.stages import Stages
from orchestrator.state import State
from orchestrator.tasks import Task
from orchestrator.tasks.data import InMemory
from orchestrator.tasks.groups import Labels
from orchestrator.tasks.load import LoadedTask
from orchestrator.tasks.metrics import resolve
from orchestrator.tasks.source import Source

# As outputs they predict 0, 1, 1, 0.
X = torch.tensor([[2.0, 1.0], [0.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
Y = torch.tensor([0, 1, 0, 0])
SEX = ["f", "f", "m", "m"]
BOTH = {"sex": {"valid": SEX, "test": SEX[:3]}}


def loaded(**given: Any) -> LoadedTask:
    fields: dict[str, Any] = {
        "model": lambda: nn.Linear(2, 2),
        "train": (X, Y),
        "valid": (X, Y),
        "test": (X[:3], Y[:3]),
        "classes": ["a", "b"],
        "groups": BOTH,
        **given,
    }
    return LoadedTask(Task(**fields), Source(name="fake.py", module="fake", files={}, digest="0"), {})


def test_labels_are_sorted_and_the_same_for_every_split() -> None:
    found = loaded(groups={"sex": {"valid": ["m", "f", "m", "x"], "test": ["f"] * 3}}).groups
    assert found["valid"]["sex"].names == found["test"]["sex"].names == ("f", "m", "x")
    assert found["valid"]["sex"].codes.tolist() == [1, 0, 1, 2]
    assert found["test"]["sex"].codes.tolist() == [0, 0, 0]


@pytest.mark.parametrize("labels", [[0, 1, 1, 0], torch.tensor([0, 1, 1, 0]), np.array([0, 1, 1, 0]), (0, 1, 1, 0)])
def test_whole_numbers_and_tensors_are_labels_too(labels: Any) -> None:
    found = loaded(test=None, groups={"age": {"valid": labels}}).groups
    assert (found["valid"]["age"].names, found["valid"]["age"].codes.tolist()) == (("0", "1"), [0, 1, 1, 0])


def test_a_task_without_groups_has_none_and_keeps_its_digest() -> None:
    bare = loaded(groups={})
    assert bare.groups == {} and bare.info.groups == ()
    assert bare.info.digest == "1bf4ffd53cd83b1748caf6ce6d7853f8aa0b05f966e6185485fc1a2c28e14ed8"


def test_other_labels_are_other_data() -> None:
    swapped = {"sex": {"valid": SEX[::-1], "test": SEX[:3]}}
    digests = {loaded(groups=groups).info.digest for groups in ({}, BOTH, swapped, {"side": BOTH["sex"]})}
    assert len(digests) == 4
    assert loaded().info.groups == ("sex",)


def test_four_rows() -> None:
    labels = Labels(names=("f", "m", "x"), codes=torch.tensor([0, 0, 1, 1]))
    assert group_accuracy(X, Y, labels) == [1.0, 0.5, None]
    other = Labels(names=("l", "r"), codes=torch.tensor([0, 1, 1, 1]))
    measured = evaluate(
        nn.Identity(),
        InMemory(X, Y),
        F.cross_entropy,
        resolve({"accuracy": "accuracy"}),
        ["a", "b"],
        groups={"sex": labels, "side": other},
    )
    assert {name: value for name, value in measured.items() if "[" in name} == {
        "accuracy[sex=f]": 1.0,
        "accuracy[sex=m]": 0.5,
        "accuracy[side=l]": 1.0,
        "accuracy[side=r]": pytest.approx(2 / 3),
    }
    assert (measured["worst_group_accuracy"], measured["group_gap"]) == (0.5, 0.5)


def test_all_positions_of_an_example_are_in_its_group() -> None:
    outputs = torch.tensor([[[2.0, 0.0, 9.0], [1.0, 1.0, 0.0]], [[2.0, 0.0, 9.0], [1.0, 1.0, 0.0]]])  # predict 0 1 0
    targets = torch.tensor([[0, 1, 1], [0, -100, -100]])
    assert group_accuracy(outputs, targets, Labels(names=("f", "m"), codes=torch.tensor([0, 1]))) == [2 / 3, 1.0]


def test_they_are_measured_on_both_splits_and_go_with_the_metrics() -> None:
    state = State(weights={"weight": torch.eye(2), "bias": torch.zeros(2)}, masks={})
    metrics = measure(Stages(loaded()), state)["metrics"]
    assert (metrics["worst_group_accuracy"], metrics["group_gap"]) == (0.5, 0.5)
    assert (metrics["test_worst_group_accuracy"], metrics["test_group_gap"]) == (0.0, 1.0)
    assert metrics["test_accuracy[sex=m]"] == 0.0
    assert measure(Stages(loaded(groups={})), state)["metrics"] == {}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"groups": ["f", "m"]}, 'groups must be a dict such as {"sex": {"valid": [...]}}, not list'),
        ({"classes": None}, "groups need classes: their measures count the examples that are predicted right"),
        (
            {"groups": {"sex": SEX}},
            "groups['sex'] must hold the labels of 'valid' and 'test', one for each example; it holds list",
        ),
        (
            {"groups": {"sex": {"valid": SEX}}},
            "groups['sex'] must hold the labels of 'valid' and 'test', one for each example; it holds 'valid'",
        ),
        (
            {"test": None},
            "groups['sex'] must hold the labels of 'valid', one for each example; it holds 'valid', 'test'",
        ),
        (
            {"groups": {"sex": {"valid": SEX[:3], "test": SEX[:3]}}},
            "groups['sex']['valid'] has 3 labels and valid has 4 rows",
        ),
        (
            {"groups": {"sex": {"valid": "ffmm", "test": SEX[:3]}}},
            "groups['sex']['valid'] must be a sequence of labels or a tensor (n,), not str",
        ),
        (
            {"groups": {"sex": {"valid": torch.eye(4), "test": SEX[:3]}}},
            "groups['sex']['valid'] holds [1.0, 0.0, 0.0, 0.0] at row 0: legal are words and whole numbers",
        ),
        (
            {"groups": {"sex": {"valid": ["f", "m", None, "f"], "test": SEX[:3]}}},
            "groups['sex']['valid'] holds None at row 2: legal are words and whole numbers",
        ),
        (
            {"groups": {"sex": {"valid": ["f"] * 4, "test": ["f"] * 3}}},
            "groups['sex'] has one label only, 'f': a group needs two to compare",
        ),
        (
            {"metrics": {"accuracy": "accuracy", "group_gap": "mse"}},
            "a metric cannot be called 'group_gap': that name is taken by a measure of the groups",
        ),
    ],
)
def test_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(TaskError) as caught:
        loaded(**given)
    assert str(caught.value) == said
