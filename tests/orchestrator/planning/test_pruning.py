"""What the driver counts beforehand is what the worker does: refused is what would leave nothing, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import PlanError, StageFailed
from orchestrator.mixes import resolve
from orchestrator.ops import Prune
from orchestrator.planning.pruning import prune_ops, refuse_empty
from orchestrator.pruning.parts import made_by, pieces
from orchestrator.pruning.prune import Network, prune
from orchestrator.pruning.structure import kept_units
from orchestrator.settings import PruneSettings, Settings, TrainSettings
from orchestrator.tasks.info import Layer, TaskInfo, UnitCounts
from tests.orchestrator.pruning.test_ranking import UNITS, network, nothing

WEIGHTS = network().weights
SHAPES = {name: tuple(shape) for name, shape in network().shapes.items()}
INFO = TaskInfo(
    digest="t",
    layers=tuple(Layer(name=name, shape=tuple(weight.shape)) for name, weight in WEIGHTS.items()),
    train_examples=100,
    units={
        "neuron": UnitCounts(
            groups={group.name: made_by(group, WEIGHTS) for group in UNITS},
            pieces={group.name: pieces(group, SHAPES) for group in UNITS},
        ),
        "filter": UnitCounts(refused=(("a.weight", "it is no convolution"),)),
    },
    flops={"a.weight": 36, "b.weight": 60, "c.weight": 20, "": 4},
    parameters=71,
)


def chosen(prune_: dict[str, Any], **params: Any) -> Settings:
    return resolve(TrainSettings(lr_schedule="cosine"), PruneSettings(**prune_), params)


def worked(where: Network, op: Prune) -> tuple[Network, bool]:
    """The network after one pruning, and whether the floor was needed."""
    found = prune(op, where, nothing)
    weights = {name: weight.where(found.masks[name], 0) for name, weight in where.weights.items()}
    after = Network(weights=weights, masks=found.masks, shapes=where.shapes, units=where.units, costs=where.costs)
    return after, "floored" in found.remarks


def things(where: Network, structure: str) -> dict[str, int]:
    """How many are kept, by tensor or group."""
    if structure == "neuron":
        return {group.name: int(kept_units(group, where.masks).sum()) for group in UNITS}
    return {name: int(where.masks[name].sum()) if name in where.masks else w.numel() for name, w in WEIGHTS.items()}


@settings(max_examples=200, deadline=None)
@given(
    structure=st.sampled_from(["weight", "neuron", "2x1"]),
    scope=st.sampled_from(["layer", "global"]),
    how=st.sampled_from(["rate", "unit_sparsity", "sparsity"]),
    amount=st.sampled_from([0.2, 0.5, 0.7, 0.9, 0.97]),
    rounds=st.integers(1, 6),
    floor=st.integers(0, 3),
    ignore=st.sampled_from([(), ("a",), ("c",), ("a", "c"), ("b", "c")]),
    seed=st.integers(0, 3),
)
def test_the_driver_refuses_exactly_what_would_leave_nothing(
    structure: str, scope: str, how: str, amount: float, rounds: int, floor: int, ignore: tuple[str, ...], seed: int
) -> None:
    if (structure == "weight") == (how == "unit_sparsity") or (how == "sparsity" and structure != "weight"):
        how = "rate"
    asked = chosen(
        {"floor": floor, "ignore": ignore},
        structure=structure,
        scope=scope,
        rounds=rounds,
        retrain="none",
        **{how: amount},
    )
    prunes = prune_ops(asked, INFO, seed=0, count=rounds)
    try:
        refuse_empty(asked, prunes, INFO)
        refused = 0
    except PlanError as error:
        refused = int(str(error).split()[1])
    where = network(seed)
    for number, op in enumerate(prunes, start=1):
        free = {name: kept for name, kept in things(where, structure).items() if name.split(".")[0] not in ignore}
        if number == refused:
            try:
                after, floored = worked(where, op)
            except StageFailed:
                return
            left = things(after, structure)
            assert floored or not any(left.values()) or (floor and 0 in left.values()), (left, free)
            return
        where, _ = worked(where, op)
        left = things(where, structure)
        assert any(left.values())
        if structure != "2x1" and floor:
            assert all(left[name] >= min(floor, kept) for name, kept in free.items())


def test_opened_masks_start_anew() -> None:
    params = {"phase": "during", "regrow": "all", "rate": 0.9, "rounds": 4}
    asked = chosen({}, **params)
    refuse_empty(asked, prune_ops(asked, INFO, seed=0, count=4), INFO)
    shut = chosen({}, **params | {"regrow": "none"})
    with pytest.raises(PlanError, match=r"^round 2 of 4 leaves no weight in layer 'a'"):
        refuse_empty(shut, prune_ops(shut, INFO, seed=0, count=4), INFO)


@pytest.mark.parametrize(
    ("prune_", "params", "message"),
    [
        ({}, {"structure": "filter", "rate": 0.5}, "the model has no filter that can be removed: a.weight: it is no"),
        (
            {"ignore": ["a", "b"]},
            {"structure": "neuron", "rate": 0.5},
            "every neuron that can be removed lies in a layer",
        ),
        ({}, {"structure": "4:8"}, "structure '4:8' fits no layer: 8 divides none of their inputs (a 3, b 6, c 5)"),
        ({"ignore": ["b"]}, {"structure": "2:3"}, ""),
        ({"ignore": ["a", "b"]}, {"structure": "2:3"}, "structure '2:3' fits no layer: 3 divides none"),
        ({"layer_factors": {"a": 0.5}}, {"structure": "2:3"}, "keeps as much everywhere"),
        # Of 120 FLOPs, 60 are of b and 4 of nothing that can be pruned; a keeps one weight of 18, c one of 10.
        (
            {"ignore": ["b"]},
            {"flops_budget": 0.566},
            "leaves at least 0.5667 of the FLOPs (with prune.floor = 1, layers",
        ),
        ({"ignore": ["b"]}, {"flops_budget": 0.5667}, ""),
        ({"ignore": ["b"], "floor": 0}, {"flops_budget": 0.534}, ""),
        ({"ignore": ["b"], "floor": 0}, {"flops_budget": 0.53}, "legal: 0.5334 or more"),
        # Thirteen biases and b's thirty weights.
        ({"ignore": ["b"], "floor": 0}, {"params_budget": 0.6}, "params_budget 0.6 cannot be met"),
        # One of six and of five neurons is left: of a a sixth, of b a thirtieth, of c a fifth.
        ({}, {"flops_budget": 0.13, "structure": "neuron"}, "legal: 0.1334 or more"),
        ({}, {"flops_budget": 0.14, "structure": "neuron"}, ""),
        ({"round_to": 4}, {"flops_budget": 0.5, "structure": "neuron"}, "prune.round_to = 4); legal: 0.6334 or more"),
        ({"ignore": ["a", "b"]}, {"flops_budget": 0.5, "structure": "2x1"}, "legal: 0.8667 or more"),
        (
            {},
            {"sparsity": 0.99, "structure": "neuron"},
            "sparsity 0.99 cannot be met: structure 'neuron' leaves at least",
        ),
        ({}, {"structure": "neuron", "rate": 0.5, "rounds": 4}, ""),
        ({}, {"structure": "neuron", "unit_sparsity": 0.95}, ""),
        ({"floor": 0}, {"structure": "neuron", "unit_sparsity": 0.99}, "leaves nothing in the network"),
        (
            {"ignore": ["a"]},
            {"structure": "neuron", "unit_sparsity": 0.5},
            "masks 6 units, but only 5 are not protected",
        ),
        ({"floor": 0}, {"rate": 0.5, "rounds": 8, "retrain": "none"}, "round 5 of 8 leaves nothing in the network"),
    ],
)
def test_what_does_not_fit_the_model(prune_: dict[str, Any], params: dict[str, Any], message: str) -> None:
    asked = chosen(prune_, **params)
    try:
        prunes = prune_ops(asked, INFO, seed=0, count=asked.choices.rounds)
        refuse_empty(asked, prunes, INFO)
        said = ""
    except PlanError as error:
        said = str(error)
    assert message in said and bool(message) == bool(said)
