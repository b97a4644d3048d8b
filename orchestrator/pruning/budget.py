"""How far to prune for a goal that only the masks themselves can tell: found by bisection on exact counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

from torch import Tensor

from orchestrator.errors import StageFailed
from orchestrator.measures import flops
from orchestrator.measures.flops import Flops
from orchestrator.ops import Prune
from orchestrator.pruning.allocation import exact, rounded_half_up
from orchestrator.pruning.masks import count


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What the dense model costs, by parameter.

    Args:
        sizes: the weights of each parameter, prunable or not.
        prunable: the names of those that count for sparsity.
        flops: operations of one forward pass.
    """

    sizes: Mapping[str, int]
    prunable: frozenset[str]
    flops: Flops


@dataclass(frozen=True, kw_only=True)
class Goal:
    """Something of the model that masks have to come down to.

    Args:
        what: the goal in words.
        left: how much of it is left under masks, of `whole`.
        room: how much may be left.
        whole: how much the dense model has.
    """

    what: str
    left: Callable[[Mapping[str, Tensor]], Fraction]
    room: Fraction
    whole: int


def goal(op: Prune, costs: Costs) -> Goal:
    """What masks have to come down to under the `flops_budget`, the `params_budget` or the `sparsity` of `op`."""
    if op.flops_budget is not None:
        return Goal(
            what=f"a flops_budget of {op.flops_budget:g}",
            left=partial(flops.left, costs.flops),
            room=exact(op.flops_budget) * costs.flops.total,
            whole=costs.flops.total,
        )
    counted = {name: size for name, size in costs.sizes.items() if op.sparsity is None or name in costs.prunable}
    whole = sum(counted.values())
    if op.params_budget is not None:
        what, room = f"a params_budget of {op.params_budget:g}", exact(op.params_budget) * whole
    else:
        assert op.sparsity is not None
        what, room = f"a sparsity of {op.sparsity:g}", Fraction(whole - rounded_half_up(exact(op.sparsity) * whole))
    return Goal(
        what=what,
        left=lambda masks: sum((_left(masks, name, size) for name, size in counted.items()), Fraction(0)),
        room=room,
        whole=whole,
    )


def least(left: Callable[[int], Fraction], most: int, goal: Goal) -> int:
    """The smallest step from 0 to `most` at which no more is left than the goal has room for.

    Args:
        left: how much is left at a step; never more than at the step before.
        most: the last step.
        goal: what is to be met.

    Raises:
        StageFailed: it is not met even at `most`; says how much is left there.
    """
    rest = left(most)
    if rest > goal.room:
        raise StageFailed(
            f"{goal.what} cannot be met: {float(rest / goal.whole):.4g} of the dense model is left where all goes that "
            "is neither protected, nor held by the floor, nor outside the structure"
        )
    low, high = -1, most  # it is not met at low, and met at high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if left(middle) <= goal.room else (middle, high)
    return high


def _left(masks: Mapping[str, Tensor], name: str, work: int) -> Fraction:
    return Fraction(work * count(masks[name]), masks[name].numel()) if name in masks else Fraction(work)
