"""Successive halving: nine trials by eye, then laws."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.pareto import Direction, best_first
from search.stopping import Brackets, Halving

UP: Sequence[Direction] = ("maximise",)
BOTH: Sequence[Direction] = ("maximise", "maximise")
THIRD = Halving(reduction_factor=3, min_rounds=1, bracket=9)
Script = list[tuple[int, float]]
"""Of how many rounds each trial is, and how good."""


def climb(rule: Halving, script: Script, order: random.Random, *, breaks: int = 0) -> dict[int, int]:
    """The last round of each trial, whose results come in any order; so many times everything begins anew."""
    last: dict[int, int] = {}
    brackets = Brackets(rule, UP)
    to_begin = list(enumerate(script))
    order.shuffle(to_begin)
    running: dict[int, int] = {}  # the round that it goes to
    while to_begin or running:
        if breaks and order.random() < 0.1:
            breaks -= 1
            return climb(rule, script, order, breaks=breaks)
        if to_begin and (not running or order.random() < 0.5):
            number, (rounds, _) = to_begin.pop()
            brackets.begin(number, rounds)
            running[number] = rule.next_rung(0, rounds) or rounds
            if not to_begin:
                brackets.close()
        else:
            number = order.choice(sorted(running))
            reached = last[number] = running.pop(number)
            rounds, quality = script[number]
            if rule.is_rung(reached):
                brackets.reached(number, reached, (quality,), {})
            if reached == rounds:
                brackets.over(number)
        for number, goes_on in brackets.decide():
            assert number not in running
            if goes_on:
                running[number] = rule.next_rung(last[number], script[number][0]) or script[number][0]
    return last


def test_of_nine_trials_three_go_on_and_then_one() -> None:
    script: Script = [(9, quality) for quality in (0.1, 0.9, 0.5, 0.8, 0.2, 0.3, 0.7, 0.4, 0.6)]
    assert climb(THIRD, script, random.Random(0)) == {0: 1, 1: 9, 2: 1, 3: 3, 4: 1, 5: 1, 6: 3, 7: 1, 8: 1}


def test_nobody_stops_before_the_last_of_the_bracket_has_come() -> None:
    brackets = Brackets(THIRD, UP)
    for number in range(8):
        brackets.begin(number, 3)
        brackets.reached(number, 1, (number,), {})
        assert not list(brackets.decide())
    brackets.begin(8, 3)
    assert not list(brackets.decide())
    brackets.reached(8, 1, (8,), {})
    assert list(brackets.decide()) == [(number, number >= 6) for number in range(9)]
    assert not list(brackets.decide()), "each once"


def test_those_that_failed_or_never_begin_are_not_waited_for() -> None:
    brackets = Brackets(THIRD, UP)
    for number in range(3):
        brackets.begin(number, 2)
        brackets.reached(number, 1, (number,), {})
    brackets.begin(3, 2)
    brackets.close()
    assert not list(brackets.decide())
    brackets.over(3)
    assert list(brackets.decide()) == [(0, False), (1, False), (2, True)]


def test_a_trial_that_ends_at_the_rung_takes_its_place_among_the_best() -> None:
    brackets = Brackets(THIRD, UP)
    for number, rounds in enumerate([1, 3, 3]):
        brackets.begin(number, rounds)
        brackets.reached(number, 1, (-number,), {})
    brackets.over(0)
    brackets.close()
    assert list(brackets.decide()) == [(1, False), (2, False)]


def test_a_bound_that_is_broken_comes_before_every_objective() -> None:
    brackets = Brackets(THIRD, UP)
    for number, violation in enumerate([1.0, 0.0, -1.0]):
        brackets.begin(number, 3)
        brackets.reached(number, 1, (-number,), {"accuracy >= 0.9": violation})
    brackets.close()
    assert list(brackets.decide()) == [(0, False), (1, True), (2, False)]


def test_a_bracket_that_grows_lets_a_stopped_trial_go_on_and_takes_nothing_back() -> None:
    brackets = Brackets(THIRD, UP)
    for number in range(3):  # of an earlier run that ended with three trials: the first went on and is done
        brackets.begin(number, 3)
        brackets.reached(number, 1, (10 - number,), {})
    brackets.reached(0, 3, (0,), {})
    brackets.over(0)
    for number in range(3, 9):
        brackets.begin(number, 3)
        brackets.reached(number, 1, (8.5 if number == 8 else 0,), {})
    assert dict(brackets.decide()) == {1: True, 2: False, 3: False, 4: False, 5: False, 6: False, 7: False, 8: True}


SCRIPTS = st.lists(st.tuples(st.integers(1, 12), st.floats(0, 1)), min_size=1, max_size=40)
RULES = st.builds(Halving, reduction_factor=st.integers(2, 4), min_rounds=st.integers(1, 3), bracket=st.integers(2, 12))


@given(rule=RULES, script=SCRIPTS, one=st.integers(), other=st.integers())
def test_the_order_of_results_and_restarts_change_nothing(rule: Halving, script: Script, one: int, other: int) -> None:
    last = climb(rule, script, random.Random(one))
    assert last == climb(rule, script, random.Random(other), breaks=2)
    assert last.keys() == set(range(len(script))), "nobody is left waiting"


@given(rule=RULES, script=SCRIPTS)
def test_at_each_rung_the_best_go_on_and_no_more(rule: Halving, script: Script) -> None:
    last = climb(rule, script, random.Random(0))
    for start in range(0, len(script), rule.bracket):
        bracket = range(start, min(start + rule.bracket, len(script)))
        for rung in rule.rungs(12):
            there = [number for number in bracket if last[number] >= rung]
            if not there:
                continue
            on = [number for number in there if last[number] > rung]
            assert len(on) <= max(1, len(there) // rule.reduction_factor)
            stopped = [number for number in there if last[number] == rung < script[number][0]]
            assert all(script[number][1] <= script[better][1] for number in stopped for better in on)


@pytest.mark.parametrize(("after", "rounds", "rung"), [(0, 1, None), (0, 2, 1), (1, 3, None), (1, 4, 3), (3, 9, None)])
def test_where_a_trial_pauses(after: int, rounds: int, rung: int | None) -> None:
    assert THIRD.next_rung(after, rounds) == rung


def test_the_loneliest_of_a_rank_come_first() -> None:
    """Rank 0 is (0, 1), (.5, .9), (.6, .8), (1, 0); the middle ones are the less alone the nearer their neighbours."""
    values = [[0.55, 0.5], [0.6, 0.8], [0.5, 0.9], [0.0, 1.0], [1.0, 0.0]]
    assert best_first(values, [{}] * 5, BOTH).tolist() == [3, 4, 1, 2, 0]
    assert best_first(values, [{}, {}, {}, {"bound": 0.1}, {}], BOTH).tolist()[-1] == 3
