"""Bounds: how they read, when they hold, how far a row misses them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from search.query import OPERATORS, Bound, BoundError, constraint, nearest_miss, parse, satisfied


@pytest.mark.parametrize(
    ("text", "bound"),
    [
        ("accuracy >= 0.97", Bound(measure="accuracy", operator=">=", offset=0.97)),
        ("latency_ms<2", Bound(measure="latency_ms", operator="<", offset=2.0)),
        ("bytes <= 1.5e6", Bound(measure="bytes", operator="<=", offset=1.5e6)),
        ("accuracy > 98%", Bound(measure="accuracy", operator=">", offset=0.98)),
        ("sparsity == .5", Bound(measure="sparsity", operator="==", offset=0.5)),
        ("loss <= -1", Bound(measure="loss", operator="<=", offset=-1.0)),
        ("accuracy >= dense", Bound(measure="accuracy", operator=">=", factor=1.0)),
        ("accuracy >= dense - 0.01", Bound(measure="accuracy", operator=">=", factor=1.0, offset=-0.01)),
        ("accuracy >= dense-1%", Bound(measure="accuracy", operator=">=", factor=1.0, offset=-0.01)),
        ("loss <= dense + 0.1", Bound(measure="loss", operator="<=", factor=1.0, offset=0.1)),
        ("flops <= dense * 0.5", Bound(measure="flops", operator="<=", factor=0.5)),
        ("flops <= 50% * dense", Bound(measure="flops", operator="<=", factor=0.5)),
    ],
)
def test_bounds_read_as_written(text: str, bound: Bound) -> None:
    assert parse(text) == bound
    assert parse(str(bound)) == bound


def test_a_constraint_names_its_measure_apart() -> None:
    assert parse(">= 0.8", measure="accuracy") == parse("accuracy >= 0.8")
    with pytest.raises(BoundError, match="on accuracy must start with an operator"):
        parse("loss >= 0.8", measure="accuracy")


@pytest.mark.parametrize(
    "text",
    ["accuracy", "accuracy => 0.9", "accuracy >= ", ">= 0.9", "accuracy = 0.9", "a b >= 1", "a >= b", "a >= 1 >= 0",
     "a >= dense / 2", "a >= nan", "a >= 1e999", "a != 1", "a >= dense - -"],
)  # fmt: skip
def test_a_bound_that_cannot_be_read_is_quoted(text: str) -> None:
    with pytest.raises(BoundError, match=r"bound '"):
        parse(text)


def test_bounds_hold_row_by_row() -> None:
    def holds(text: str, column: NDArray[np.float64], dense: Mapping[str, float] | None = None) -> list[bool]:
        return list(satisfied([parse(text)], {"a": column}, dense).tolist())

    column = np.array([0.96, 0.97, 0.98, np.nan])
    assert holds("a >= 0.97", column) == [False, True, True, False]
    assert holds("a > 0.97", column) == [False, False, True, False]
    assert holds("a < 0.97", column) == [True, False, False, False]
    assert holds("a <= 0.97", column) == [True, True, False, False]
    assert holds("a == 0.97", column) == [False, True, False, False]
    assert holds("a >= dense - 0.01", column, {"a": 0.985}) == [False, False, True, False]


def test_a_missing_dense_value_is_an_error() -> None:
    with pytest.raises(BoundError, match="needs the dense model's accuracy"):
        satisfied([parse("accuracy >= dense")], {"accuracy": [0.9]})


def test_a_constraint_is_positive_when_violated() -> None:
    assert constraint(parse("accuracy >= 0.8"), 0.6) == pytest.approx(0.25)
    assert constraint(parse("accuracy >= 0.8"), 0.8) == 0
    assert constraint(parse("latency_ms < 2"), 2.0) > 0
    assert constraint(parse("latency_ms <= dense * 0.5"), 1.0, 4.0) == pytest.approx(-0.5)
    assert constraint(parse("accuracy >= 0.8"), math.nan) == math.inf


@given(st.sampled_from(OPERATORS), st.floats(-10, 10), st.floats(-10, 10) | st.sampled_from([math.inf, -math.inf]))
def test_positive_means_that_it_does_not_hold(operator: str, limit: float, value: float) -> None:
    bound = Bound(measure="a", operator=operator, offset=limit)
    truth = {">=": value >= limit, "<=": value <= limit, ">": value > limit, "<": value < limit}
    violated = constraint(bound, value) > 0
    assert violated != satisfied([bound], {"a": [value]})[0]
    if operator in truth:
        assert violated != truth[operator]


def test_the_nearest_miss_is_the_least_in_all() -> None:
    bounds = [parse("accuracy >= 0.9"), parse("latency_ms <= dense * 0.5")]
    columns = {"accuracy": [0.95, 0.89, 0.5, math.nan], "latency_ms": [4.0, 2.1, 1.0, 1.0]}
    assert nearest_miss(bounds, columns, {"latency_ms": 4.0}) == 1
    assert satisfied(bounds, columns, {"latency_ms": 8.0}).tolist() == [True, False, False, False]
    assert nearest_miss(bounds, columns, {"latency_ms": 8.0}) == 0
    assert nearest_miss(bounds, {"accuracy": [], "latency_ms": []}, {"latency_ms": 8.0}) is None
    with pytest.raises(BoundError, match="'bytes' in 'bytes <= 1.0' was not measured. Measured: accuracy, latency_ms"):
        satisfied([parse("bytes <= 1")], columns)
