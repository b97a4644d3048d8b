"""How many weights stay where, as whole numbers."""

from __future__ import annotations

from fractions import Fraction
from math import prod
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from orchestrator.errors import PlanError, StageFailed
from orchestrator.ops import Prune
from orchestrator.pruning.allocation import (
    ALLOCATIONS,
    Tensors,
    after_rate,
    at_fraction,
    by_group,
    by_row,
    counts,
    exact,
)

LENET = {"fc1": (300, 784), "fc2": (100, 300), "out": (10, 100)}


def op(**given: Any) -> Prune:
    return Prune(**{"criterion": "magnitude", "scope": "layer", **given})


def dense(**shapes: tuple[int, ...]) -> Tensors:
    return Tensors(shapes=shapes, kept={name: prod(shape) for name, shape in shapes.items()})


def by_layer(asked: Prune, tensors: Tensors) -> dict[str, int]:
    return {group[0]: kept for group, kept in counts(asked, tensors).items()}


def test_rates_are_taken_as_they_are_written() -> None:
    # 0.1 · 5 = 0.5 is rounded up: one goes. In binary 0.1 is a little more, and 0.3 a little less.
    assert after_rate(5, exact(0.1)) == 4
    assert after_rate(5, exact(0.3)) == 3
    assert after_rate(4, exact(0.5)) == 2
    assert after_rate(1, exact(0.5)) == 0
    assert after_rate(0, exact(0.5)) == 0


def test_the_lottery_recipe_on_lenet() -> None:
    tensors = dense(**LENET)
    once = op(rate=0.2, factors=(("out", 0.5),))
    assert by_layer(once, tensors) == {"fc1": 188_160, "fc2": 24_000, "out": 900}
    twice = Tensors(shapes=LENET, kept=by_layer(once, tensors))
    assert by_layer(once, twice) == {"fc1": 150_528, "fc2": 19_200, "out": 810}


def test_global_scope_leaves_out_what_is_ignored_and_counts_it() -> None:
    tensors = dense(a=(2, 3), b=(4,))
    ignore = (("b", 0.0),)
    assert counts(op(scope="global", rate=0.5), tensors) == {("a", "b"): 5}
    assert counts(op(scope="global", rate=0.5, factors=ignore), tensors) == {("a",): 3}
    # Half of all ten weights have to come out of the six of `a`.
    assert counts(op(scope="global", sparsity=0.5, factors=ignore), tensors) == {("a",): 1}
    with pytest.raises(StageFailed, match=r"^a sparsity of 0.7 masks 7 weights, but only 6 are not protected$"):
        counts(op(scope="global", sparsity=0.7, factors=ignore), tensors)


def test_a_sparsity_that_is_there_already_asks_for_nothing() -> None:
    tensors = Tensors(shapes={"a": (10,)}, kept={"a": 4})
    assert counts(op(scope="global", sparsity=0.5), tensors) == {("a",): 4}
    assert counts(op(sparsity=0.5), tensors) == {("a",): 4}


def test_uniform_with_factors() -> None:
    tensors = dense(a=(100,), b=(100,))
    assert by_layer(op(sparsity=0.3), tensors) == {"a": 70, "b": 70}
    assert by_layer(op(sparsity=0.3, factors=(("b", 0.5),)), tensors) == {"a": 60, "b": 80}
    # `a` would have to give 106: it gives all it has, and `b` the rest.
    assert by_layer(op(sparsity=0.8, factors=(("b", 0.5),)), tensors) == {"a": 0, "b": 40}


def test_remainders_add_up() -> None:
    assert by_layer(op(sparsity=0.5), dense(a=(3,), b=(3,), c=(3,))) == {"a": 2, "b": 1, "c": 1}


def test_erk_by_hand() -> None:
    # Densities in proportion to 20/100 and 101/100: half of 200 is kept as 100·20/121 and 100·101/121.
    kept = by_layer(op(sparsity=0.5, allocation="erk"), dense(a=(10, 10), b=(100, 1)))
    assert kept == {"a": 17, "b": 83}
    # A layer that would be denser than dense stays whole, and the other takes the rest.
    assert by_layer(op(sparsity=0.3, allocation="erk"), dense(a=(10, 10), b=(100, 1))) == {"a": 40, "b": 100}


def test_given_targets() -> None:
    tensors = dense(a=(10,), b=(10,), c=(20,))
    asked = op(sparsity=0.5, allocation="given", targets=(("a", 0.2),))
    assert by_layer(asked, tensors) == {"a": 8, "b": 4, "c": 8}
    with pytest.raises(PlanError, match=r"cannot come to an overall sparsity of 0.1$"):
        by_layer(op(sparsity=0.1, allocation="given", targets=(("c", 0.9),)), tensors)
    everything = op(sparsity=0.5, allocation="given", targets=tuple((name, 0.5) for name in "abc"))
    assert by_layer(everything, tensors) == {"a": 5, "b": 5, "c": 10}
    empty = Tensors(shapes={"a": (10,), "b": (10,)}, kept={"a": 10, "b": 0})
    assert by_layer(op(sparsity=0.6, allocation="given", targets=(("a", 0.2),)), empty) == {"a": 8, "b": 0}


def test_a_rate_for_one_layer() -> None:
    assert by_layer(op(rate=0.5, targets=(("a", 0.1),)), dense(a=(10,), b=(10,))) == {"a": 9, "b": 5}
    with pytest.raises(PlanError, match=r"^the rate in 'a' comes to 1.2; legal: below 1$"):
        by_layer(op(rate=0.6, factors=(("a", 2.0),)), dense(a=(10,)))


@pytest.mark.parametrize("allocation", ["erk", "given"])
def test_a_factor_that_would_do_nothing_is_refused(allocation: str) -> None:
    asked = op(sparsity=0.5, allocation=allocation, factors=(("a", 0.5),), targets=(("a", 0.5),))
    with pytest.raises(PlanError, match=rf"^the factor 0.5 of 'a' goes with allocation 'uniform', not '{allocation}'$"):
        by_layer(asked, dense(a=(10,), b=(10,)))


SIZES = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=5)


@given(
    SIZES, st.sampled_from(["global", "layer"]), st.sampled_from(ALLOCATIONS.names), st.floats(0.01, 0.99), st.data()
)
def test_sparsity_to_the_single_weight(
    sizes: list[tuple[int, int]], scope: str, allocation: str, sparsity: float, data: st.DataObject
) -> None:
    assume(allocation != "given" and (scope == "layer" or allocation == "uniform"))
    shapes = {f"w{index}": shape for index, shape in enumerate(sizes)}
    total = sum(map(prod, sizes))
    kept = {name: data.draw(st.integers(0, prod(shape))) for name, shape in shapes.items()}
    protected = data.draw(st.sets(st.sampled_from(sorted(shapes)), max_size=len(shapes) - 1))
    factors = tuple((name, 0.0) for name in sorted(protected))
    wanted = int(exact(sparsity) * total + Fraction(1, 2))
    masked = total - sum(kept.values())
    free = {name for name in shapes if name not in protected}
    asked = op(scope=scope, allocation=allocation, sparsity=sparsity, factors=factors)
    tensors = Tensors(shapes=shapes, kept=kept)
    if wanted - masked > sum(kept[name] for name in free):
        with pytest.raises(StageFailed):
            counts(asked, tensors)
        return
    found = counts(asked, tensors)
    after = sum(found.values()) + sum(kept[name] for name in protected)
    assert total - after == max(wanted, masked)
    assert all(0 <= left <= sum(kept[name] for name in group) for group, left in found.items())


@given(SIZES, st.integers(1, 99), st.sampled_from(["global", "layer"]))
def test_rate_to_the_single_weight(sizes: list[tuple[int, int]], percent: int, scope: str) -> None:
    shapes = {f"w{index}": shape for index, shape in enumerate(sizes)}
    for group, left in counts(op(scope=scope, rate=percent / 100), dense(**shapes)).items():
        before = sum(prod(shapes[name]) for name in group)
        assert left == before - (percent * before + 50) // 100


def test_groups_take_the_place_of_tensors() -> None:
    groups = {"a": {("a",): 6}, "b": {("b", "c"): 4, ("d",): 2}, "e": {("e",): 3}}
    asked = op(rate=0.5, factors=(("c", 0.5), ("d", 0.0), ("e", 0.0)), targets=(("a", 0.4),))
    found, shapes = by_group(asked, groups)
    assert shapes == {"a": (6,), "b": (4,), "b (protected)": (2,), "e (protected)": (3,)}
    assert dict(found.factors) == {"a": 1.0, "b": 0.5, "b (protected)": 0.0, "e (protected)": 0.0}
    assert found.targets == (("a", 0.4),)
    tensors = dense(**shapes)
    assert by_layer(found, tensors) == {"a": 4, "b": 3}
    # What is protected counts: half of fifteen units have to come out of ten.
    assert counts(op(scope="global", sparsity=0.5, factors=found.factors), tensors) == {("a", "b"): 2}


def test_of_two_makers_the_smaller_target_holds() -> None:
    found, _ = by_group(op(rate=0.5, targets=(("a", 0.4), ("b", 0.2))), {"a": {("a", "b"): 5}})
    assert found.targets == (("a", 0.2),)


def test_rows_share_what_is_left_and_the_floor() -> None:
    assert by_row(op(scope="row", rate=0.5), "w", [4, 1, 0], 99) == [2, 0, 0]
    assert sorted(by_row(op(scope="row", rate=0.9, floor=2), "w", [2, 2], 99)) == [1, 1]
    assert by_row(op(scope="row", sparsity=0.5), "w", [4, 2], 3) == [2, 1]
    assert sum(by_row(op(scope="row", sparsity=0.5, floor=5), "w", [4, 2], 3)) == 5
    assert by_row(op(scope="row", sparsity=0.5, floor=9), "w", [4, 2], 3) == [4, 2]
    assert by_row(op(scope="row", sparsity=0.5), "w", [0, 0], 0) == [0, 0]


@given(SIZES, st.integers(0, 50), st.integers(1, 50), st.sampled_from(["global", "layer"]), st.data())
def test_a_higher_fraction_never_leaves_more(
    sizes: list[tuple[int, int]], step: int, more: int, scope: str, data: st.DataObject
) -> None:
    shapes = {f"w{index}": shape for index, shape in enumerate(sizes)}
    factors = tuple((name, data.draw(st.sampled_from([0.0, 0.5, 1.0, 3.0]))) for name in shapes)
    asked = op(scope=scope, factors=factors)
    low, high = (at_fraction(asked, dense(**shapes), Fraction(s, 100)) for s in (step, step + more))
    assert low.keys() == high.keys() and all(low[group] >= high[group] >= 0 for group in low)
