"""Criteria against answers that can be checked by eye, and the contract that all of them keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from orchestrator.errors import InputError
from orchestrator.pruning import criteria
from orchestrator.pruning.criteria import CRITERIA, check_parameters, magnitude, needs, parameters, random, taylor
from orchestrator.registry import Entry
from tests.contracts.criteria import CHECKS, SHAPES, deterministic, leaves_its_inputs_alone, same_shape_and_finite

WEIGHT = torch.tensor([[1.0, -2.0], [0.5, -0.0]])


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CRITERIA.names)
def test_contract(name: str, shape: tuple[int, ...], dtype: torch.dtype, check: Any) -> None:
    check(CRITERIA[name], shape, dtype)


def returns_a_row(weight: Tensor) -> Tensor:
    return weight[0]


def returns_nan(weight: Tensor) -> Tensor:
    return weight / weight


def draws_unseeded(weight: Tensor) -> Tensor:
    return torch.rand_like(weight)


def writes_on_its_weight(weight: Tensor) -> Tensor:
    return weight.add_(1)


@pytest.mark.parametrize(
    ("function", "check"),
    [
        (returns_a_row, same_shape_and_finite),
        (returns_nan, same_shape_and_finite),
        (draws_unseeded, deterministic),
        (writes_on_its_weight, leaves_its_inputs_alone),
    ],
)
def test_the_contract_catches(function: Callable[..., Tensor], check: Any) -> None:
    with pytest.raises(AssertionError):
        check(Entry(name="bad", function=function), (3, 2), torch.float32)


def test_magnitude() -> None:
    assert magnitude(WEIGHT).tolist() == [[1.0, 2.0], [0.5, 0.0]]


def test_taylor_is_weight_times_gradient() -> None:
    assert taylor(WEIGHT, torch.tensor([[-3.0, 0.5], [4.0, 9.0]])).tolist() == [[3.0, 1.0], [2.0, 0.0]]


def test_random_is_uniform_and_ignores_the_weights() -> None:
    def draw(weight: Tensor) -> Tensor:
        return random(weight, torch.Generator().manual_seed(0))

    scores = draw(torch.zeros(100, 100, dtype=torch.bfloat16))
    assert torch.equal(scores, draw(torch.full((100, 100), 7.0)))
    tenths = torch.bincount((scores.flatten() * 10).long(), minlength=10)
    assert len(tenths) == 10
    # 1,000 each are expected, give or take 30 (one standard deviation).
    assert tenths.min() > 850
    assert tenths.max() < 1150
    assert scores.unique().numel() == scores.numel()


def test_needs_and_parameters() -> None:
    assert [needs(CRITERIA[name]) for name in ("magnitude", "random", "taylor")] == [(), ("generator",), ("gradient",)]
    assert parameters(CRITERIA["magnitude"]) == {}
    assert parameters(CRITERIA["taylor"]) == {"examples": criteria.EXAMPLES}

    def mine(weight: Tensor, gradient: Tensor, power: float = 2.0) -> Tensor:
        return (weight.abs() ** power) * gradient

    entry: Entry[Callable[..., Tensor]] = Entry(name="m:mine", function=mine)
    assert needs(entry) == ("gradient",)
    assert parameters(entry) == {"power": 2.0, "examples": criteria.EXAMPLES}


def test_an_unknown_parameter_is_refused() -> None:
    check_parameters("taylor", {"examples": 5})
    with pytest.raises(InputError, match=r"^criterion 'taylor' has no parameter 'power'; legal: examples$"):
        check_parameters("taylor", {"power": 2})
    with pytest.raises(InputError, match=r"; legal: none$"):
        check_parameters("magnitude", {"examples": 2})
