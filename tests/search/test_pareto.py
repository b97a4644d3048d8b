"""Fronts, ranks, hypervolume, knee and crowding: four points by eye, then laws."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.pareto import Direction, crowding, front, hypervolume, knee, ranks

UP: Direction = "maximise"
DOWN: Direction = "minimise"
# Accuracy up, latency down: the second is worse than the first in both.
FOUR = [[0.9, 3.0], [0.8, 4.0], [0.7, 1.0], [0.95, 9.0]]


def dominates(one: Any, other: Any) -> bool:
    """Both to be minimised."""
    return bool(np.all(one <= other) and np.any(one < other))


@st.composite
def clouds(draw: st.DrawFn, objectives: int | None = None) -> Any:
    """Points on a coarse lattice, so that ties and duplicates abound; now and then infinite."""
    columns = objectives or draw(st.integers(1, 4))
    number = st.integers(0, 6).map(float) | st.sampled_from([math.inf, -math.inf])
    rows = draw(st.lists(st.lists(number, min_size=columns, max_size=columns), max_size=30))
    return np.array(rows, dtype=float).reshape(len(rows), columns)


def test_the_front_of_four() -> None:
    assert front(FOUR, [UP, DOWN]).tolist() == [0, 2, 3]
    assert ranks(FOUR, [UP, DOWN]).tolist() == [0, 1, 0, 0]


def test_equal_points_of_the_front_all_stay() -> None:
    assert front([[1, 1], [0, 2], [1, 1], [1, 2]], [DOWN, DOWN]).tolist() == [0, 1, 2]
    assert front([[1, 1, 1], [0, 2, 1], [1, 1, 1], [1, 2, 1]], [DOWN] * 3).tolist() == [0, 1, 2]


def test_a_row_with_nan_is_never_on_the_front() -> None:
    values = [[math.nan, 0.0], [1.0, 1.0], [0.0, math.nan]]
    assert front(values, [DOWN, DOWN]).tolist() == [1]
    assert ranks(values, [DOWN, DOWN]).tolist() == [1, 0, 1]
    assert front([[math.nan, 0.0]], [DOWN, DOWN]).tolist() == []


def test_no_points_have_no_front() -> None:
    assert front([], [UP, DOWN]).tolist() == []
    assert ranks(np.empty((0, 3)), [UP] * 3).tolist() == []
    assert hypervolume([], [UP, DOWN], [0, 1]) == 0


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 2\) do not fit 3 objectives"):
        front([[1, 2]], [UP] * 3)
    with pytest.raises(ValueError, match="unknown direction 'up'. Known: maximise, minimise"):
        front([[1, 2]], ["up", "down"])  # type: ignore[list-item]


@given(clouds())
def test_the_front_is_what_nothing_dominates(values: Any) -> None:
    found = set(front(values, [DOWN] * values.shape[1]).tolist())
    expected = {i for i, row in enumerate(values) if not any(dominates(other, row) for other in values)}
    assert found == expected


@given(clouds())
def test_the_front_of_a_front_is_itself(values: Any) -> None:
    directions = [DOWN] * values.shape[1]
    best = values[front(values, directions)]
    assert front(best, directions).tolist() == list(range(len(best)))


@given(clouds())
def test_a_maximised_objective_is_a_minimised_one_negated(values: Any) -> None:
    directions = [UP] + [DOWN] * (values.shape[1] - 1)
    flipped = values * np.array([-1.0] + [1.0] * (values.shape[1] - 1))
    assert front(values, directions).tolist() == front(flipped, [DOWN] * values.shape[1]).tolist()


@given(clouds())
def test_ranks_peel_front_after_front(values: Any) -> None:
    directions = [DOWN] * values.shape[1]
    found, left, rank = ranks(values, directions), np.arange(len(values)), 0
    while len(left):
        best = left[front(values[left], directions)]
        assert sorted(np.flatnonzero(found == rank)) == sorted(best)
        left, rank = np.setdiff1d(left, best), rank + 1


@pytest.mark.parametrize(("objectives", "least"), [(2, 0), (2, 12), (3, 18), (4, 30)])
def test_many_points_agree_with_a_plain_search(objectives: int, least: int) -> None:
    draw = np.random.default_rng(objectives)
    values = draw.integers(0, 25, (10_000, objectives)).astype(float)
    values[values.sum(axis=1) < least] = 25.0  # a front of more than the one best corner
    values[draw.random(values.shape) < 0.01] = np.inf
    values[draw.random(values.shape) < 0.0002] = -np.inf
    unique = np.unique(values, axis=0)
    plain = {tuple(row) for row in unique if not (np.all(unique <= row, 1) & np.any(unique < row, 1)).any()}
    found = front(values, [DOWN] * objectives)
    assert {tuple(row) for row in values[found]} == plain
    assert len(found) == sum(tuple(row) in plain for row in values)


def test_a_front_of_more_than_one_block() -> None:
    points = np.random.default_rng(0).normal(size=(2000, 3))
    sphere = np.abs(points / np.linalg.norm(points, axis=1)[:, None])
    inside = sphere * 0.999
    assert front(np.concatenate([inside, sphere]), [UP] * 3).tolist() == list(range(2000, 4000))


def test_the_hypervolume_of_three_by_eye() -> None:
    # Unit squares of a staircase below (3, 3): 3 + 2 + 1.
    assert hypervolume([[0, 2], [1, 1], [2, 0]], [DOWN, DOWN], [3, 3]) == 6
    assert hypervolume([[0, 2], [1, 1], [2, 0], [1, 2], [5, 5]], [DOWN, DOWN], [3, 3]) == 6
    assert hypervolume([[0.5, 2.0]], [UP, DOWN], [0.0, 4.0]) == 1
    assert hypervolume([[2.0], [1.0]], [DOWN], [4.0]) == 3
    # Two boxes 1 x 2 x 2 and 2 x 2 x 1 share 1 x 2 x 1.
    assert hypervolume([[1, 0, 0], [0, 0, 1]], [DOWN] * 3, [2, 2, 2]) == 4 + 4 - 2


@given(clouds(objectives=3))
def test_hypervolume_counts_unit_cells(values: Any) -> None:
    finite = values[np.isfinite(values).all(axis=1)]
    cells = sum(any(all(row <= cell) for row in finite) for cell in product(range(5), repeat=3))
    assert hypervolume(finite, [DOWN] * 3, [5, 5, 5]) == pytest.approx(cells)


@given(clouds(objectives=2), st.integers(0, 6), st.integers(0, 6))
def test_hypervolume_never_falls_with_another_point(values: Any, x: int, y: int) -> None:
    finite = values[np.isfinite(values).all(axis=1)]
    more = np.concatenate([finite, [[x, y]]])
    assert hypervolume(more, [DOWN] * 2, [7, 7]) >= hypervolume(finite, [DOWN] * 2, [7, 7])


def test_the_knee_is_where_the_front_bends() -> None:
    assert knee([[0, 10], [1, 2], [5, 1], [10, 0], [6, 6]], [DOWN, DOWN]) == 1
    # The scale of an objective does not move it.
    assert knee([[0, 1e7], [1e-3, 2e6], [5e-3, 1e6], [1e-2, 0]], [DOWN, DOWN]) == 1
    assert knee([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.1, 0.1, 0.1]], [DOWN] * 3) == 3


def test_without_a_knee_the_point_nearest_to_the_ideal() -> None:
    assert knee([[3.0, 4.0]], [UP, DOWN]) == 0
    # Two points are each best in one objective: the first objective decides.
    assert knee([[0.9, 3.0], [0.7, 1.0]], [UP, DOWN]) == 0
    # A front bent outwards: its middle is farther from the ideal than either end.
    assert knee([[0.0, 1.0], [0.9, 0.9], [1.0, 0.0]], [DOWN, DOWN]) == 0
    with pytest.raises(ValueError, match="no point is measured"):
        knee([[math.nan, 1.0]], [UP, DOWN])


@given(clouds(objectives=2))
def test_the_knee_is_on_the_front(values: Any) -> None:
    finite = values[np.isfinite(values).all(axis=1)]
    if len(finite):
        assert knee(finite, [UP, DOWN]) in front(finite, [UP, DOWN])


def test_crowding_is_infinite_at_the_ends() -> None:
    alone = crowding([[0, 4], [1, 3], [2, 2], [4, 0]], [DOWN, DOWN])
    assert alone.tolist() == [math.inf, 1.0, 1.5, math.inf]
    assert crowding([[1, 1]], [DOWN, DOWN]).tolist() == [0.0]
