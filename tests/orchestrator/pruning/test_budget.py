"""Goals by hand, and the first step that meets one."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import StageFailed
from orchestrator.measures.flops import Flops
from orchestrator.ops import Prune
from orchestrator.pruning.budget import Costs, Goal, goal, least


def work(by_tensor: Mapping[str, int]) -> Flops:
    """Operations by tensor, and none of heads."""
    return Flops(total=sum(by_tensor.values()), by_tensor=by_tensor)


COSTS = Costs(sizes={"a": 10, "b": 5, "bias": 2}, prunable=frozenset("ab"), flops=work({"a": 200, "b": 10, "": 40}))
MASKS = {"a": torch.tensor([True] * 4 + [False] * 6), "bias": torch.tensor([True, False])}


def of(**said: float) -> Goal:
    return goal(Prune(criterion="magnitude", scope="layer", **said), COSTS)  # type: ignore[arg-type]


def test_goals_by_hand() -> None:
    flops = of(flops_budget=0.3)
    assert (flops.left(MASKS), flops.left({}), flops.room, flops.whole) == (130, 250, 75, 250)
    params = of(params_budget=0.5)
    assert (params.left(MASKS), params.left({}), params.room, params.whole) == (10, 17, Fraction(17, 2), 17)
    sparsity = of(sparsity=0.5)  # a mask of a bias is no sparsity; 7.5 weights are 8
    assert (sparsity.left(MASKS), sparsity.left({}), sparsity.room, sparsity.whole) == (9, 15, 7, 15)


def test_a_part_of_a_layer_does_a_part_of_its_work_exactly() -> None:
    third = {"a": torch.tensor([True, False, False])}
    costs = Costs(sizes={"a": 3}, prunable=frozenset("a"), flops=work({"a": 100}))
    assert goal(Prune(criterion="magnitude", scope="layer", flops_budget=0.5), costs).left(third) == Fraction(100, 3)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=30), st.integers(0, 20))
def test_the_first_step_that_meets_it(values: list[int], room: int) -> None:
    falling = sorted(values, reverse=True)
    aim = Goal(what="a budget of 1", left=lambda masks: Fraction(0), room=Fraction(room), whole=20)
    meets = [step for step, value in enumerate(falling) if value <= room]
    if meets:
        assert least(lambda step: Fraction(falling[step]), len(falling) - 1, aim) == meets[0]
    else:
        with pytest.raises(
            StageFailed, match=rf"^a budget of 1 cannot be met: {falling[-1] / 20:.4g} of the dense model"
        ):
            least(lambda step: Fraction(falling[step]), len(falling) - 1, aim)
