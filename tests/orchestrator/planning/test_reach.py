"""What the driver says can be reached is what the worker reaches: refused is what cannot be met, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from orchestrator.errors import PlanError, StageFailed
from orchestrator.measures.flops import count
from orchestrator.ops import Prune
from orchestrator.planning.reach import refuse_unreachable
from orchestrator.pruning.budget import Costs, goal
from orchestrator.pruning.finding import find
from orchestrator.pruning.parts import made_by, pieces
from orchestrator.pruning.prune import Network, prune
from orchestrator.tasks import models
from orchestrator.tasks.info import Layer, TaskInfo, UnitCounts
from tests.orchestrator.pruning.test_ranking import nothing

STRUCTURES = ("neuron", "filter", "channel", "head", "layer")


class Known:
    """A model as the worker knows it, and as the driver does."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        named = dict(model.named_parameters())
        self.shapes = {name: tuple(parameter.shape) for name, parameter in named.items()}
        self.weights = {name: parameter.detach() for name, parameter in named.items() if parameter.dim() > 1}
        self.units = {each: find(model, example, each, list(self.weights)).units for each in STRUCTURES}
        flops = count(model, example)
        sizes = {name: parameter.numel() for name, parameter in named.items()}
        self.costs = Costs(sizes=sizes, prunable=frozenset(self.weights), flops=flops)
        self.info = TaskInfo(
            digest="t",
            layers=tuple(Layer(name=name, shape=self.shapes[name]) for name in self.weights),
            train_examples=1,
            parameters=sum(sizes.values()),
            flops=flops.by_tensor,
            head_flops={name: heads.work for name, heads in flops.by_heads.items()},
            units={
                each: UnitCounts(
                    groups={group.name: made_by(group, self.weights) for group in units},
                    pieces={group.name: pieces(group, self.shapes) for group in units},
                )
                for each, units in self.units.items()
            },
        )

    def met(self, op: Prune) -> bool:
        """Whether the worker meets what `op` asks for."""
        units = self.units.get(op.structure, ())
        network = Network(weights=self.weights, shapes=self.shapes, units=units, costs=lambda: self.costs)
        try:
            found = prune(op, network, nothing)
        except StageFailed:
            return False
        aim = goal(op, self.costs)
        assert aim.left(found.masks) <= aim.room
        return True

    def allowed(self, op: Prune) -> bool:
        """Whether the driver lets it through."""
        try:
            refuse_unreachable(op, self.info)
        except PlanError:
            return False
        return True


BUILDERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: models.mlp(4, 6, 5, 3), (1, 4)),
    "resnet": (lambda: models.ResNet(classes=3, channels=4), (1, 1, 6, 6)),
    "depthwise": (lambda: models.depthwise_separable(classes=3, channels=4), (1, 1, 6, 6)),
    "transformer": (lambda: models.Transformer(4, 4, classes=3, features=8, heads=4), (1, 16)),
    "lstm": (lambda: models.LSTM(4, 4, classes=3), (1, 16)),
}
KNOWN: dict[str, Known] = {}


def known(name: str) -> Known:
    if name not in KNOWN:
        build, shape = BUILDERS[name]
        torch.manual_seed(0)
        KNOWN[name] = Known(build(), torch.rand(shape))
    return KNOWN[name]


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_refused_is_exactly_what_the_worker_cannot_meet(data: st.DataObject) -> None:
    here = known(data.draw(st.sampled_from(sorted(BUILDERS))))
    structures = ["weight", "2x3", *(each for each in STRUCTURES if here.units[each])]
    names = list(here.weights)
    said: dict[str, Any] = {
        "criterion": "magnitude",
        "structure": data.draw(st.sampled_from(structures)),
        "scope": data.draw(st.sampled_from(["layer", "global"])),
        "floor": data.draw(st.integers(0, 3)),
        "factors": tuple((name, 0.0) for name in data.draw(st.sets(st.sampled_from(names), max_size=2))),
    }
    if said["structure"] in STRUCTURES:
        said["round_to"] = data.draw(st.sampled_from([1, 1, 2, 4]))
    if said["scope"] == "layer" and data.draw(st.booleans()):
        free = [name for name in names if name not in dict(said["factors"])]
        said["factors"] += ((data.draw(st.sampled_from(free)), data.draw(st.sampled_from([0.5, 2.0]))),)
    how = data.draw(st.sampled_from(["flops_budget", "params_budget", "sparsity"]))
    if how == "sparsity" and said["structure"] == "weight":
        how = "params_budget"
    said[how] = data.draw(st.integers(1, 99)) / 100
    op = Prune(**said)
    kept_whole = {name for name, factor in op.factors if factor == 0}
    if op.structure in STRUCTURES:  # another guard sees to it that something may go
        groups = here.info.units[op.structure].groups.values()
        assume(any(kept_whole.isdisjoint(makers) for group in groups for makers in group))
    # Of units of unlike sizes, or blocks cut at an edge, the worker may have to keep the larger ones.
    uneven = said["structure"] in ("2x3", "layer")
    assert here.met(op) <= here.allowed(op)
    assert uneven or here.allowed(op) == here.met(op)


def test_what_it_calls_legal_is_met() -> None:
    here = known("transformer")
    with pytest.raises(PlanError) as caught:
        refuse_unreachable(asked(flops_budget=0.01), here.info)
    least = float(str(caught.value).split("legal: ")[1].split()[0])
    assert here.met(asked(flops_budget=least)) and not here.met(asked(flops_budget=round(least - 0.0002, 4)))


def asked(flops_budget: float) -> Prune:
    return Prune(criterion="magnitude", scope="layer", structure="head", floor=1, flops_budget=flops_budget)


def test_a_budget_over_heads_is_met_to_the_head() -> None:
    here = known("transformer")
    dense = here.costs.flops
    in_heads = sum(heads.work for heads in dense.by_heads.values()) + sum(
        work for name, work in dense.by_tensor.items() if "self_attn" in name
    )
    for kept in (1, 2, 3):
        left = Fraction(dense.total - in_heads) + Fraction(in_heads * kept, 4)
        op = asked(flops_budget=float(left / dense.total) + 1e-9)
        network = Network(weights=here.weights, shapes=here.shapes, units=here.units["head"], costs=lambda: here.costs)
        found = prune(op, network, nothing)
        assert goal(op, here.costs).left(found.masks) == left
