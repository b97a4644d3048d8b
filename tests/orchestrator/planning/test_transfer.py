"""Plans over several tasks: which stage runs where, from what, and under which key."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator import ops
from orchestrator.canonical import digest
from orchestrator.errors import PlanError
from orchestrator.graph import Facts, Graph
from orchestrator.mixes import resolve
from orchestrator.ops import Combine, Control, Given, Init, Prune, Train, Transfer
from orchestrator.plan import Plan, Transferred
from orchestrator.planning.trial import dense_plan, trial_plan
from orchestrator.settings import OtherTask, PruneSettings, TicketSettings, TrainSettings
from orchestrator.tasks.info import GivenTicket, Layer, TaskInfo

GOLDEN = Path(__file__).parents[2] / "golden" / "plan_keys.json"
BODY = Layer(name="body.weight", shape=(4, 5))
ALONE = TaskInfo(digest="t", layers=(BODY, Layer(name="out.weight", shape=(3, 4))), train_examples=95)
OTHER = TaskInfo(digest="o", layers=(BODY, Layer(name="out.weight", shape=(2, 4))), train_examples=41)
INFO = replace(ALONE, others={"other": OTHER})
"""10 steps an epoch at batch size 10, and 5 in the other task."""
TRAIN = TrainSettings(epochs=10, retrain_epochs=4, batch_size=10)
TASKS = (OtherTask(task="other"),)
CONSENSUS: dict[str, Any] = {"rate": 0.2, "retrain": "rewind", "searches": 2, "vary": "tasks"}


def trial(tickets: TicketSettings | None = None, info: TaskInfo = INFO, seed: int = 0, **params: Any) -> Plan:
    return trial_plan(resolve(TRAIN, PruneSettings(floor=0), params, None, tickets), seed, info)


def moved(controls: tuple[str, ...] = (), **params: Any) -> tuple[Plan, Transferred]:
    """A plan with one ticket of two rounds, tried on the other task."""
    tickets = TicketSettings(tasks=TASKS, transfer_to=("other",), transfer_controls=controls)
    chosen: dict[str, Any] = {"rate": 0.2, "rounds": 2, "retrain": "rewind"} | params
    plan = trial(tickets, **chosen)
    (found,) = plan.tickets[-1].transfers
    return plan, found


def test_keys_of_studies_of_one_task_are_what_they_were() -> None:
    cases: dict[str, dict[str, Any]] = {
        "finetune": {"rate": 0.2, "rounds": 2},
        "rewound": {"rate": 0.2, "rounds": 3, "retrain": "rewind", "rewind_epoch": 1},
        "during": {"sparsity": 0.5, "phase": "during", "rounds": 2},
        "global": {"sparsity": 0.5, "scope": "global", "retrain": "lr-rewind", "lr_schedule": "cosine"},
    }
    found = {name: trial(info=ALONE, **params) for name, params in cases.items()} | {
        "dense": dense_plan(TRAIN, 0, ALONE)
    }
    assert {name: digest([node.key for node in plan.nodes]) for name, plan in found.items()} == json.loads(
        GOLDEN.read_text()
    )


def test_other_tasks_change_no_key_of_the_study_s_own() -> None:
    alone = trial(info=ALONE, rate=0.2, rounds=2, retrain="rewind")
    plan, _ = moved(("dense",))
    assert {node.key for node in alone.nodes} == {node.key for node in plan.nodes if not node.task}


def test_every_key_has_the_digest_of_the_task_that_it_runs_in() -> None:
    plan, _ = moved(TicketSettings().transfer_controls)
    digests = {"": "t", "other": "o"}
    for node in plan.nodes:
        assert node.key == ops.key(node.op, node.parents, digests[node.task])
    assert {node.task for node in plan.nodes} == {"", "other"}


def test_training_elsewhere_has_the_other_task_s_steps() -> None:
    plan, found = moved()
    (trained,) = (node for node in plan.nodes if node.key == found.key)
    assert isinstance(trained.op, Train) and trained.op.to == 50 and trained.task == "other"
    assert plan.steps_by_task["other"] == 50 and plan.steps_per_epoch["other"] == 5
    assert plan.epochs == pytest.approx(30 + 10)
    assert all(key != found.key for _, key in plan.points)


def test_a_ticket_goes_with_its_weights_and_leaves_the_head() -> None:
    tickets = TicketSettings(tasks=(OtherTask(task="other", leave=("out",)),), transfer_to=("other",))
    plan = trial(tickets, rate=0.2, retrain="rewind")
    (ticket,) = plan.tickets
    (found,) = ticket.transfers
    by_key = {node.key: node for node in plan.nodes}
    init = ops.key(Init(seed=0), [], "o")
    assert by_key[found.start].op == Transfer(leave=("out",))
    assert by_key[found.start].parents == (ticket.start, init)
    assert by_key[found.ancestor].parents == (ticket.ancestor, init)


def test_controls_elsewhere_are_over_the_transferred_weights() -> None:
    plan, found = moved(("shuffled", "dense-transferred", "reinitialised"))
    by_key = {node.key: node for node in plan.nodes}
    shuffled, dense, fresh = (by_key[by_key[each.key].parents[0]] for each in found.controls)
    assert isinstance(shuffled.op, Control) and shuffled.parents == (found.start, found.ancestor)
    assert dense.key == found.ancestor
    assert by_key[fresh.parents[2]].op != by_key[by_key[found.start].parents[1]].op, "the same init once more"
    assert {each.key for each in found.controls} | {found.key} == plan.compared.keys()


def test_a_mask_of_the_task_s_own_goes_over_its_own_weights() -> None:
    plan, found = moved(("one-shot", "imp"), rewind_epoch=2)
    by_key = {node.key: node for node in plan.nodes}
    home = ops.key(Init(seed=0), [], "o")
    for each in found.controls:
        rewound = by_key[by_key[each.key].parents[0]]
        assert by_key[rewound.parents[1]].parents == (home,)  # trained for two epochs of its own
        op = by_key[rewound.parents[0]].op
        assert isinstance(op, Prune) and dict(op.factors) == {} and op.like == "layers"
    assert sum(isinstance(by_key[key].op, Prune) and by_key[key].task == "other" for key in by_key) == 3


def test_rounds_that_are_not_compared_go_nowhere() -> None:
    plan, _ = moved()
    assert [len(ticket.transfers) for ticket in plan.tickets] == [0, 1]


# --- Searches on several tasks -------------------------------------------------------------------------------------


def test_each_search_runs_on_its_task_from_the_same_shared_weights() -> None:
    plan = trial(TicketSettings(tasks=TASKS), **CONSENSUS)
    by_key = {node.key: node for node in plan.nodes}
    (ticket,) = plan.tickets
    own, other = (by_key[key] for key in ticket.searches)
    assert (own.task, other.task) == ("", "other")
    trained = by_key[other.parents[0]]
    start = by_key[trained.parents[0]]
    assert start.op == Transfer() and start.task == "other"
    assert start.parents == (ticket.ancestor, ops.key(Init(seed=0), [], "o"))
    for node in (own, other):  # the heads differ: neither is pruned
        assert isinstance(node.op, Prune) and node.op.factors == (("out.weight", 0.0),)
    combined = by_key[ticket.start]
    assert isinstance(combined.op, Combine) and combined.task == "" and combined.parents[-1] == ticket.ancestor
    assert (ticket.depth, ticket.trainings) == (1, 2)


def test_more_searches_than_tasks_are_refused() -> None:
    with pytest.raises(PlanError, match="a task for each of the 3 searches: .* 2 others; there are 1$"):
        trial(TicketSettings(tasks=TASKS), **CONSENSUS | {"searches": 3})


def test_tasks_that_share_nothing_are_refused_by_their_tensors() -> None:
    stranger = replace(OTHER, layers=(Layer(name="trunk.weight", shape=(4, 5)),))
    info = replace(INFO, others={"other": stranger})
    with pytest.raises(PlanError, match=r"body.weight 4x5, out.weight 3x4\) .* in 'other' \(trunk.weight 4x5\)$"):
        trial(TicketSettings(tasks=TASKS), info, **CONSENSUS)
    with pytest.raises(PlanError, match=r"in 'other' \(trunk.weight 4x5\)$"):
        trial(TicketSettings(tasks=TASKS, transfer_to=("other",)), info, rate=0.2, retrain="rewind")


def test_a_pattern_that_the_other_task_has_not_is_refused_with_its_name() -> None:
    other = replace(OTHER, layers=(BODY, Layer(name="head.weight", shape=(3, 4))))
    settings = resolve(TRAIN, PruneSettings(ignore=("out",)), CONSENSUS, None, TicketSettings(tasks=TASKS))
    with pytest.raises(PlanError, match=r"^on the task 'other': prune.ignore: no prunable layer matches 'out'"):
        trial_plan(settings, 0, replace(INFO, others={"other": other}))


def test_a_segment_says_where_each_of_its_steps_runs() -> None:
    plan, _ = moved()
    graph = Graph()
    graph.add(plan, lambda key: Facts())
    tasks = {node.key: node.task for node in plan.nodes}
    steps = [step for segment in graph.ready() for step in segment.steps]
    assert steps and all(step.task == tasks[step.key] for step in steps)


# --- A ticket from a file ------------------------------------------------------------------------------------------

GIVEN = replace(ALONE, ticket=GivenTicket(sha256="5" * 64, layers=(BODY,)))
FILE = TicketSettings(ticket="ticket.safetensors", controls=("dense", "shuffled", "one-shot"))


def test_a_ticket_file_is_tried_on_the_study_s_own_task() -> None:
    plan = trial(FILE, GIVEN, phase="ticket")
    by_key = {node.key: node for node in plan.nodes}
    (ticket,) = plan.tickets
    given, init = (by_key[key] for key in by_key[ticket.start].parents)
    assert given.op == Given(sha256="5" * 64) and init.op == Init(seed=0)
    assert plan.points == ((1, ticket.key),) and ticket.rule == "from a file"
    assert [each.kind for each in ticket.controls] == ["dense", "shuffled", "one-shot"]


@pytest.mark.parametrize(
    ("tickets", "params", "message"),
    [
        (TicketSettings(), {}, "starts from a ticket file"),
        (FILE, {"rate": 0.2}, "so that rate means nothing"),
        (FILE, {"epochs": 0}, "epochs = 0"),
        (FILE.model_copy(update={"tasks": TASKS, "transfer_to": ("other",)}), {}, "on the study's own task"),
    ],
)
def test_what_means_nothing_beside_a_ticket_file_is_refused(
    tickets: TicketSettings, params: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        trial(tickets, GIVEN, **params | {"phase": "ticket"})


def test_a_ticket_file_that_fits_nothing_is_refused_by_its_tensors() -> None:
    strange = replace(GIVEN, ticket=GivenTicket(sha256="5", layers=(Layer(name="trunk.weight", shape=(1, 2)),)))
    with pytest.raises(PlanError, match=r"^the ticket masks trunk.weight 1x2; .*: body.weight 4x5, out.weight 3x4$"):
        trial(FILE, strange, phase="ticket")
