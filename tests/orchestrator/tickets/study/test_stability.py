"""Siblings of tickets, and the barrier between them: measured once, by the same rule for all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator import Study
from orchestrator.errors import QueryError, TaskError
from orchestrator.mixes import resolve
from orchestrator.ops import Control, Train
from orchestrator.plan import Compared, Node, Plan
from orchestrator.planning.trial import trial_plan
from orchestrator.pools.local import LocalPool
from orchestrator.settings import PruneSettings, TicketSettings, TrainSettings
from orchestrator.stages import Stages
from orchestrator.state import State
from orchestrator.store import paths
from orchestrator.tasks.info import Layer, TaskInfo
from orchestrator.tasks.load import load
from orchestrator.tasks.source import collect
from orchestrator.tickets.stability import POINTS
from orchestrator.tickets.study.stability import KINDS, between, measure, recorded, rows
from orchestrator.tickets.study.table import read
from tests.orchestrator.pools import small

INFO = TaskInfo(digest="t", layers=(Layer(name="fc.weight", shape=(8, 5)),), train_examples=100)
TRAIN = TrainSettings(epochs=10, batch_size=10)

CONVEX = """
import torch
from torch import nn

from orchestrator.tasks import Task


def task(model: str = "linear") -> Task:
    y = torch.arange(40) % 2
    x = torch.stack([(y * 2 - 1) * (1 + torch.arange(40) / 40), torch.arange(40) / 40], dim=1)
    layers = {
        "linear": [nn.Linear(2, 2)],
        "hidden": [nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)],
        "norm": [nn.Linear(2, 2), nn.BatchNorm1d(2), nn.ReLU(), nn.Linear(2, 2)],
    }
    return Task(
        model=lambda: nn.Sequential(*layers[model]), train=(x, y), valid=(x, y), test=(x, y),
        loss=nn.functional.cross_entropy, classes=["left", "right"],
    )
"""


def plan(info: TaskInfo = INFO, draws: int = 1, **params: Any) -> Plan:
    wanted = TicketSettings(controls=("sibling",), draws=draws)
    params = {"rate": 0.2, "retrain": "rewind", **params}
    return trial_plan(resolve(TRAIN, PruneSettings(), params, tickets=wanted), 0, info)


def siblings(found: Plan) -> dict[str, tuple[Compared, Node, Node]]:
    """By network: the sibling, its stage, and the stage that it stands beside."""
    nodes = {node.key: node for node in found.nodes}
    told = {}
    for each in found.tickets[-1].controls:
        if each.beside:
            told[each.kind.removeprefix("sibling/")] = each, nodes[each.key], nodes[each.beside]
    return told


# --- What is trained -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rewound", [0, 3])
def test_siblings_differ_in_the_order_of_the_data_alone(rewound: int) -> None:
    found = siblings(plan(rewind_epoch=rewound))
    assert tuple(found) == KINDS
    for kind, (_, sibling, beside) in found.items():
        assert isinstance(sibling.op, Train) and isinstance(beside.op, Train)
        assert sibling.op.recipe == beside.op.recipe and sibling.op.to == beside.op.to == 100
        assert sibling.op.order_seed != beside.op.order_seed == 0
        if (
            kind == "dense" and rewound
        ):  # the dense run is one from init on; its sibling leaves it where the ticket does
            assert sibling.start == 30 and beside.start == 0
        else:
            assert sibling.parents == beside.parents


def test_the_dense_sibling_starts_where_the_ticket_does() -> None:
    ticket = plan(rewind_step=7).tickets[-1]
    assert siblings(plan(rewind_step=7))["dense"][1].parents == (ticket.ancestor,)


def test_the_reinitialised_pair_is_the_control_of_that_draw() -> None:
    found = plan()
    _, sibling, beside = siblings(found)["reinitialised"]
    (start,) = beside.parents
    op = next(node.op for node in found.nodes if node.key == start)
    assert isinstance(op, Control) and op.kind == "reinitialised" and sibling.parents == (start,)


def test_each_draw_is_another_order() -> None:
    found = plan(draws=3)
    orders = {node.op.order_seed for node in found.nodes if isinstance(node.op, Train)}
    assert len(orders) == 4
    assert sum(each.kind == "sibling/ticket" for each in found.tickets[-1].controls) == 3


def test_a_model_with_one_init_has_no_reinitialised_pair() -> None:
    info = TaskInfo(digest="t", layers=INFO.layers, train_examples=100, init_varies=False)
    assert tuple(siblings(plan(info))) == ("ticket", "dense")


def test_whatever_is_measured_is_waited_for() -> None:
    found = plan()
    waited = {each.key for each in found.tickets[-1].controls} | {key for _, key in found.points}
    dense = {node.key for node in found.nodes if node.evaluated} - waited
    assert all(each.beside in waited for each in found.tickets[-1].controls if each.beside)
    assert dense == set()


# --- The barrier ---------------------------------------------------------------------------------------------------


@pytest.fixture
def convex(tmp_path: Path) -> Path:
    (tmp_path / "convex.py").write_text(CONVEX)
    return tmp_path


def stages(root: Path, **params: Any) -> Stages:
    return Stages(load(collect("convex.py", root), params, root))


def linear(weight: list[list[float]]) -> State:
    return State(weights={"0.weight": torch.tensor(weight), "0.bias": torch.zeros(2)})


def test_a_convex_problem_has_no_barrier(convex: Path) -> None:
    found = between(stages(convex), linear([[-1.0, 0.0], [1.0, 0.0]]), linear([[-3.0, 0.2], [2.0, 0.1]]))
    assert found.barrier == 0 and found.stable
    assert len(found.errors) == POINTS and set(found.errors) == {0.0}


def test_canary_a_valley_that_is_no_valley_is_seen(convex: Path) -> None:
    """The same network with its hidden units swapped: halfway, what passes two layers is half of what it was."""
    bias = torch.tensor([0.7, 0.0])
    first = {"0.weight": torch.tensor([[1.0, 0.0], [0.0, 0.0]]), "2.weight": torch.tensor([[0.0, 0.0], [1.0, 0.0]])}
    second = {"0.weight": first["0.weight"].flip(0), "2.weight": first["2.weight"].flip(1)}
    ends = [State(weights=each | {"0.bias": torch.zeros(2), "2.bias": bias}) for each in (first, second)]
    found = between(stages(convex, model="hidden"), *ends)
    assert found.errors[0] == found.errors[-1] == 0.0
    # The 40 points lie at ±1, ±1.025, …: to the right of it, those below 1.4 are lost.
    assert found.barrier == pytest.approx(8 / 40) and not found.stable


def test_norms_are_recalibrated_at_the_ends_too(convex: Path) -> None:
    weights = {
        "0.weight": torch.tensor([[1.0, 0.0], [-1.0, 0.0]]),
        "0.bias": torch.zeros(2),
        "1.weight": torch.ones(2),
        "1.bias": torch.zeros(2),
        "1.running_mean": torch.full((2,), 100.0),
        "1.running_var": torch.ones(2),
        "1.num_batches_tracked": torch.tensor(1),
        "3.weight": torch.tensor([[-1.0, 1.0], [1.0, -1.0]]),
        "3.bias": torch.zeros(2),
    }
    found = between(stages(convex, model="norm"), State(weights=weights), State(weights=weights))
    assert set(found.errors) == {0.0}


# --- A study's -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study of one trial under two seeds, with siblings."""
    root = small.write_task(tmp_path_factory.mktemp("root"))
    study = Study(spec("sibling"), root / "store", root=root)
    assert study.run(LocalPool()).done == 1
    return study


def spec(*controls: str) -> Any:
    space = {"criterion": "magnitude", "rate": 0.5, "rounds": 2, "retrain": "rewind"}
    return small.spec(trials=1, seeds=(0, 1), space=space, tickets={"controls": controls, "rounds": [2]})


def test_it_is_measured_once_and_stands_beside_the_ticket(ran: Study) -> None:
    for name in ran.store.files.list(paths.BARRIERS):
        for file in ran.store.files.list(f"{paths.BARRIERS}/{name}"):
            ran.store.files.delete(f"{paths.BARRIERS}/{name}/{file}")
    (first, last) = read(ran)
    assert recorded(ran, last) is None
    lines: list[str] = []
    measure(ran, lines.append)
    assert len(lines) == 6  # three pairs under two seeds
    measure(ran, lines.append)
    assert len(lines) == 6
    found = recorded(ran, last)
    assert found is not None and tuple(found) == KINDS
    assert recorded(ran, first) is None  # the study compares the last round alone
    for each in found.values():
        assert each["n"] == 2 and list(each["by_seed"]) == ["0", "1"] and len(each["errors"]) == POINTS
        assert each["barrier"] == pytest.approx(sum(each["by_seed"].values()) / 2)
        assert each["stable"] == (each["barrier"] < 0.02)
    document = ran.tickets(structure=False)
    assert [ticket["stability"] for ticket in document["tickets"]] == [None, found]
    assert [row["network"] for row in rows(document)] == list(KINDS)


def test_siblings_are_no_rivals_and_no_points_of_the_front(ran: Study) -> None:
    assert [ticket["controls"] for ticket in ran.tickets(structure=False)["tickets"]] == [{}, {}]
    assert {point["round"] for point in ran.front().points} <= {1, 2}


def test_the_ends_are_the_recorded_errors(ran: Study) -> None:
    measure(ran)
    (_, last) = read(ran)
    found = recorded(ran, last)
    assert found is not None
    accuracies = [row["test_accuracy"] for row in last.rows.values()]
    assert found["ticket"]["errors"][0] == pytest.approx(1 - sum(accuracies) / 2)


def test_a_torn_file_is_measured_again(ran: Study) -> None:
    measure(ran)
    folder = ran.store.files.list(paths.BARRIERS)[0]
    (name, *_) = ran.store.files.list(f"{paths.BARRIERS}/{folder}")
    path = f"{paths.BARRIERS}/{folder}/{name}"
    whole = json.loads(ran.store.files.read(path))
    ran.store.files.write(path, b'{"pair": [')
    lines: list[str] = []
    measure(ran, lines.append)
    assert len(lines) == 1
    assert json.loads(ran.store.files.read(path)) == whole


def test_what_was_measured_stays_when_the_siblings_are_swept_away(ran: Study) -> None:
    measure(ran)
    (_, last) = read(ran)
    found = recorded(ran, last)
    data = {each["key"]: ran.store.states.read(each["key"]) for each in last.tickets[0]["controls"]}
    for key in data:
        ran.store.states.delete(key)
    lines: list[str] = []
    measure(ran, lines.append)
    assert lines == [] and found is not None and recorded(ran, last) == found
    for key, content in data.items():
        assert content is not None and ran.store.states.commit(key, content)


def test_a_study_without_siblings_says_what_it_needs(tmp_path: Path) -> None:
    root = small.write_task(tmp_path)
    study = Study(spec("dense"), tmp_path / "store", root=root)
    study.run(LocalPool())
    with pytest.raises(QueryError, match="legal: 'sibling' among the controls"):
        measure(study)


def test_a_task_that_changed_is_refused(tmp_path: Path) -> None:
    root = small.write_task(tmp_path)
    study = Study(spec("sibling"), tmp_path / "store", root=root)
    study.run(LocalPool())
    (root / "blobs.py").write_text(small.BLOBS.replace("manual_seed(0)", "manual_seed(1)"))
    with pytest.raises(TaskError, match="has changed since the study ran"):
        measure(study)
