"""Schedules rise, and end on target."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import PlanError, UnknownName
from orchestrator.pruning.schedules import SCHEDULES, targets


@given(
    st.sampled_from([name for name in SCHEDULES.names if name != "one-shot"]),
    st.floats(0.001, 0.999),
    st.integers(1, 50),
)
def test_laws(name: str, sparsity: float, rounds: int) -> None:
    found = targets(name, sparsity, rounds)
    assert len(found) == rounds
    assert found[-1] == round(sparsity, 12)
    assert all(0 < before <= after for before, after in pairwise(found))


def test_by_hand() -> None:
    assert targets("one-shot", 0.9, 1) == [0.9]
    assert targets("linear", 0.8, 4) == [0.2, 0.4, 0.6, 0.8]
    assert targets("exponential", 0.75, 2) == [0.5, 0.75]
    assert targets("exponential", 0.488, 3) == [0.2, 0.36, 0.488]
    # Zhu & Gupta: s_f (1 - (1 - t)^3) at a half is 7/8 of the way.
    assert targets("cubic", 0.8, 2) == [0.7, 0.8]


def test_one_shot_is_a_single_round() -> None:
    with pytest.raises(PlanError, match=r"legal: rounds = 1$"):
        targets("one-shot", 0.5, 2)
    with pytest.raises(UnknownName, match=r"^unknown schedule 'cubik'; did you mean 'cubic'\?"):
        targets("cubik", 0.5, 2)
