"""A mean with its interval, against a table of Student's t."""

from __future__ import annotations

import pytest

from orchestrator.tickets.interval import interval


def test_an_interval_is_the_textbook_s() -> None:
    mean, half_width = interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half_width == pytest.approx(4.302653 / 3**0.5)  # t(0.975, 2), standard deviation 1


def test_one_value_has_no_interval() -> None:
    assert interval([0.3]) == (0.3, None)


def test_equal_values_have_none_to_speak_of() -> None:
    assert interval([0.5, 0.5]) == (0.5, 0.0)
