"""Intervals and tests against published figures; verdicts that can be checked by eye."""

from __future__ import annotations

from math import isnan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.responsible.harm import (
    Pairs,
    independent_interval,
    judge,
    mcnemar,
    paired_interval,
    too_few,
    untested,
    wilson,
)


def pairs(both: int, lost: int, won: int, neither: int) -> Pairs:
    return Pairs(both=both, lost=lost, won=won, neither=neither)


SURE = pairs(100, 0, 0, 0)
"""A class that nothing happens to."""


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        ((36, 12, 2, 0), -0.3404, -0.0569),  # Newcombe (1998), with the signs turned round
        ((14, 5, 0, 22), -0.226, -0.011),  # Altman et al. (2000), table 6.2
        ((1, 1, 7, 12), 0.026, 0.507),  # Bentur et al. (2009), in Fagerland et al. (2014)
        ((59, 16, 6, 80), -0.1186, -0.0046),  # Cavo et al. (2012), likewise
    ],
)
def test_paired_intervals_are_the_published_ones(table: tuple[int, int, int, int], low: float, high: float) -> None:
    assert paired_interval(pairs(*table)) == pytest.approx((low, high), abs=5e-4)


def test_an_independent_interval_is_the_published_one() -> None:
    # Newcombe (1998, pp. 873-890), table II: 56/70 against 48/80.
    low, high = _newcombe_independent(56 / 70, 48 / 80, 70, 80)
    assert (low, high) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    ours = independent_interval(np.array([70]), np.array([0.6]), np.array([0.8]))
    assert [float(bound[0]) for bound in ours] == pytest.approx(_newcombe_independent(0.8, 0.6, 70, 70))


def _newcombe_independent(one: float, other: float, n: int, m: int) -> tuple[float, float]:
    """Written out once more, for two sizes."""
    (low, low_), (high, high_) = ([float(wilson(p * k, k)[side]) for p, k in ((one, n), (other, m))] for side in (0, 1))
    down = ((one - low) ** 2 + (high_ - other) ** 2) ** 0.5
    up = ((high - one) ** 2 + (other - low_) ** 2) ** 0.5
    return one - other - down, one - other + up


def test_wilson_by_hand() -> None:
    low, high = wilson([0, 5, 3, 0], [10, 10, 3, 0])
    z = 1.959964**2
    assert low.tolist() == pytest.approx([0, 0.2366, 3 / (3 + z), 0], abs=1e-4)
    assert high.tolist() == pytest.approx([z / (10 + z), 0.7634, 1, 1], abs=1e-4)


def test_mcnemar_counts_only_what_differs() -> None:
    assert mcnemar(0, 0) == 1
    assert mcnemar(5, 0) == mcnemar(0, 5) == pytest.approx(2 / 2**5)
    assert mcnemar(1, 1) == 1


@given(st.tuples(*[st.integers(0, 40)] * 4).filter(lambda table: sum(table) > 0))
def test_an_interval_holds_its_change_and_turns_round_with_its_models(table: tuple[int, int, int, int]) -> None:
    both, lost, won, neither = table
    change = (won - lost) / sum(table)
    low, high = paired_interval(pairs(*table))
    assert -1 <= low <= change + 1e-12 and change - 1e-12 <= high <= 1
    assert paired_interval(pairs(both, won, lost, neither)) == pytest.approx((-high, -low), abs=1e-12)
    if both * neither >= lost * won:
        wide = independent_interval(
            np.array([sum(table)]), np.array([(both + lost) / sum(table)]), np.array([(both + won) / sum(table)])
        )
        assert wide[0][0] <= low + 1e-12 and high <= wide[1][0] + 1e-12


def test_a_class_of_three_rows_raises_no_alarm() -> None:
    found = judge([pairs(0, 3, 0, 0), SURE], learnt_above=0.5)
    assert found[0].change == -1 and found[0].verdict == "too few"
    assert too_few(3, 1) and too_few(9, 15) and not too_few(10, 10)


def test_every_verdict() -> None:
    found = judge(
        [pairs(60, 40, 0, 0), pairs(40, 0, 40, 0), pairs(1, 8, 0, 91), pairs(95, 3, 2, 0), pairs(2, 0, 0, 1)],
        learnt_above=0.1,
    )
    assert [each.verdict for each in found] == ["lost by pruning", "gained", "never learnt", "no evidence", "too few"]
    assert [each.support for each in found] == [100, 80, 100, 100, 3]
    assert (found[0].dense, found[0].pruned) == (1.0, 0.6)


def test_what_was_never_learnt_may_still_be_gained() -> None:
    assert judge([pairs(0, 0, 50, 50)], learnt_above=0.1)[0].verdict == "gained"


def test_with_more_groups_more_is_needed() -> None:
    lost = pairs(50, 7, 0, 0)
    assert mcnemar(7, 0) == pytest.approx(0.015625)
    assert judge([lost, SURE], 0.1)[0].verdict == "lost by pruning"
    many = judge([lost, *[SURE] * 9], 0.1)[0]
    assert many.p_holm == pytest.approx(0.15625) and many.verdict == "no evidence"
    assert many.high < 0, "the interval alone would have cried wolf"


def test_pruning_that_changes_nothing_alarms_in_one_study_of_twenty_at_most() -> None:
    draw = np.random.default_rng(0)
    alarms = 0
    for _ in range(300):
        lost, won = draw.binomial(12, 0.5, size=(2, 10))
        found = judge([pairs(80, int(a), int(b), 5) for a, b in zip(lost, won, strict=True)], 0.1)
        alarms += any(each.verdict != "no evidence" for each in found)
    assert alarms / 300 <= 0.05


def test_no_groups_and_a_group_without_examples() -> None:
    assert judge([], 0.1) == []
    (empty,) = judge([pairs(0, 0, 0, 0)], 0.1)
    assert (empty.support, empty.verdict, empty.p) == (0, "too few", None) and isnan(empty.change) and isnan(empty.low)


def test_a_group_without_examples_takes_nothing_from_the_others() -> None:
    lost, empty = pairs(50, 7, 0, 0), pairs(0, 0, 0, 0)
    assert judge([lost, *[empty] * 9], 0.1)[0] == judge([lost], 0.1)[0]


def test_two_accuracies_alone_are_not_tested() -> None:
    found = untested(
        np.array([100, 100, 3, 0]), np.array([1.0, 0.05, 1.0, np.nan]), np.array([0.2, 0.0, 0.0, np.nan]), 0.1
    )
    assert [each.verdict for each in found] == ["not tested", "never learnt", "too few", "too few"]
    assert found[0].high < 0 and found[0].p is None and found[0].p_holm is None
    assert isnan(found[3].low)
