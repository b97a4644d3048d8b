"""What a stage makes of its parents does not depend on whether they were just made, kept in memory, or read back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator import Study
from orchestrator.plan import Node, Plan
from orchestrator.planning.trial import trial_plan
from orchestrator.pools.worker import Worker
from orchestrator.settings import CONTROLS, TRANSFER_CONTROLS
from orchestrator.state import State, from_bytes, to_bytes
from tests.orchestrator.pools import small

TASK = '''
from blobs import points
from torch import nn

from orchestrator.tasks import Task


def task(classes: int = 3) -> Task:
    """Layers whose names sort otherwise than they follow each other, with norms and a head of `classes`."""
    x, y = points(1.5)

    def model():
        found = nn.Sequential()
        for name, layer in (
            ("zeta", nn.Linear(4, 8)),
            ("norm", nn.BatchNorm1d(8)),
            ("relu", nn.ReLU()),
            ("beta", nn.Linear(8, 6)),
            ("tanh", nn.Tanh()),
            ("alpha", nn.Linear(6, classes)),
        ):
            found.add_module(name, layer)
        return found

    return Task(
        model=model,
        train=(x[:64], y[:64] % classes),
        valid=(x[64:80], y[64:80] % classes),
        test=(x[80:], y[80:] % classes),
        classes=[str(number) for number in range(classes)],
    )
'''
TASKS = [{"name": "other", "task": "named.py", "task_params": {"classes": 2}}]
EVERYTHING = {
    "controls": list(CONTROLS),
    "draws": 1,
    "tasks": TASKS,
    "transfer_to": ["other"],
    "transfer_controls": list(TRANSFER_CONTROLS),
    "criteria": ["taylor", "random", "magnitude", "snip"],
    "weights": [1, 2.5, 0.5, 1],
}
SPACE = {"rate": 0.4, "rounds": 2, "retrain": "rewind", "rewind_step": 3, "scope": "global"}
BY_CRITERION = SPACE | {"searches": 4, "vary": "criterion"}

Way = Callable[[State, Node], State]


def kept(state: State, node: Node) -> State:
    """As it was made, on one worker that forgets nothing."""
    return state


def read(state: State, node: Node) -> State:
    """As another worker reads it; what is stored has its optimizer only where training goes on from it."""
    stored = node.stored or node.evaluated
    return from_bytes(to_bytes(replace(state, optimizer={}) if stored and not node.resumable else state))


def unaligned(state: State, node: Node) -> State:
    """As it would be in memory that begins anywhere."""

    def moved(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = {}
        for name, tensor in tensors.items():
            room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
            room[1:] = tensor.reshape(-1)
            found[name] = room[1:].view(tensor.shape)
        return found

    return replace(
        state,
        weights=moved(state.weights),
        masks=moved(state.masks),
        optimizer=moved(state.optimizer),
        gathered=moved(state.gathered),
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = small.write_task(tmp_path_factory.mktemp("root"))
    (folder / "named.py").write_text(TASK)
    return folder


def states(root: Path, space: Mapping[str, Any], way: Way, **tickets: Any) -> tuple[Plan, dict[str, State]]:
    """The plan of a study's one proposal and all its states, each handed on in this way."""
    spec = small.spec(task="named.py", trials=1, sampler="grid", space=dict(space), tickets=EVERYTHING | tickets)
    worker = Worker(Study(spec, "memory://same-states", root=root)._job({}, nonce=""))
    (params,) = spec.mixes()
    plan = trial_plan(spec.settings(params), 0, worker.info)
    made: dict[str, State] = {}
    handed: dict[str, State] = {}
    for node in plan.nodes:
        made[node.key] = worker._stages[node.task].run(node.op, [handed[key] for key in node.parents])
        handed[node.key] = way(made[node.key], node)
    return plan, made


def differing(plan: Plan, one: Mapping[str, State], other: Mapping[str, State]) -> list[str]:
    """The stages whose states differ in a bit, a name or a remark."""

    def told(state: State) -> list[Any]:
        every = [state.weights, state.masks, state.gathered]
        bits = [(n, t.dtype, t.shape, t.contiguous().numpy().tobytes()) for kind in every for n, t in kind.items()]
        return [bits, state.position, dict(state.remarks)]

    return [repr(node.op) for node in plan.nodes if told(one[node.key]) != told(other[node.key])]


@pytest.mark.parametrize(
    "space",
    [
        SPACE,
        BY_CRITERION | {"rule": "most-voted", "ticket_sparsity": 0.7},
        SPACE | {"searches": 2, "vary": "tasks", "rule": "union"},
        pytest.param(BY_CRITERION | {"rule": "weighted", "scope": "layer", "rate": 0.7}, marks=pytest.mark.slow),
        pytest.param(
            SPACE | {"searches": 3, "vary": "data", "rule": "at-least", "at_least": 2}, marks=pytest.mark.slow
        ),
        pytest.param({"phase": "before", "criterion": "synflow", "sparsity": 0.8}, marks=pytest.mark.slow),
    ],
    ids=["rounds", "most-voted criteria", "tasks", "weighted criteria", "data", "before"],
)
def test_every_state_of_a_rich_study_is_the_same(space: dict[str, Any], root: Path) -> None:
    plan, wanted = states(root, space, kept)
    for way in (read, unaligned):
        _, found = states(root, space, way)
        assert differing(plan, wanted, found) == [], way.__name__
    kinds = {each.kind for ticket in plan.tickets for each in ticket.controls}
    assert {kind for kind in CONTROLS if kind not in ("imp", "sibling")} <= kinds
    assert len(plan.tickets[-1].transfers) == 1 and len(plan.nodes) > 40


def test_canary_a_control_that_draws_in_the_order_of_its_names_is_seen(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state with its names in the order in which they were made draws another random mask than one that was read."""
    monkeypatch.setattr(State, "__post_init__", lambda state: None)
    plan, wanted = states(root, SPACE, kept)
    _, found = states(root, SPACE, read)
    assert any(each.startswith("Control(kind='random'") for each in differing(plan, wanted, found))
