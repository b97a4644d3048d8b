"""Studies over two tiny tasks with one body and different heads: searches on both, tickets tried on both, or elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from typer.testing import CliRunner

from orchestrator import Study, StudySpec
from orchestrator.cli import app
from orchestrator.errors import InputError, QueryError, SpecError
from orchestrator.ops import Init
from orchestrator.outcome import CONTROL_TRIAL
from orchestrator.plan import Plan
from orchestrator.planning.trial import trial_plan
from orchestrator.pools.local import LocalPool
from orchestrator.pools.worker import Worker
from orchestrator.stages import Stages
from orchestrator.state import State
from orchestrator.tickets.study.table import rows
from orchestrator.tickets.ticket_file import from_file_bytes
from tests.orchestrator.pools import small
from tests.test_study import Counting

OTHER = '''
from blobs import points
from torch import nn

from orchestrator.tasks import Task


def task(classes: int = 2, first: str = "0", spread: float = 1.5) -> Task:
    """Three blobs, of which `classes` are told apart."""
    x, y = points(spread)
    y = y % classes
    layers = {first: nn.Linear, "1": nn.ReLU, "2": nn.Linear}

    def model():
        found = nn.Sequential()
        found.add_module(first, nn.Linear(4, 8))
        found.add_module("1", nn.ReLU())
        found.add_module("2", nn.Linear(8, classes))
        return found

    return Task(
        model=model,
        train=(x[:40], y[:40]),
        valid=(x[40:60], y[40:60]),
        test=(x[60:], y[60:]),
        classes=[str(number) for number in range(classes)],
    )
'''
TASKS: list[dict[str, Any]] = [{"task": "other_task.py", "name": "other"}]
REWOUND: dict[str, Any] = {"rate": 0.4, "rounds": 2, "retrain": "rewind"}
TOGETHER: dict[str, Any] = REWOUND | {"rounds": 1, "searches": 2, "vary": "tasks"}
BODY, HEAD = "0.weight", "2.weight"
TRANSFER: dict[str, Any] = {
    "tasks": TASKS,
    "transfer_to": ["other"],
    "transfer_controls": ["dense-transferred", "shuffled", "one-shot"],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("root"))


def write(folder: Path) -> Path:
    small.write_task(folder)
    (folder / "other_task.py").write_text(OTHER)
    return folder


def study(root: Path, store: str | Path = "", **fields: Any) -> Study:
    """One trial of the small study with tickets that are tried on the other task; `fields` go over it."""
    fields = {"trials": 1, "sampler": "grid", "space": REWOUND, "tickets": TRANSFER} | fields
    return Study(small.spec(**fields), store or f"memory://{uuid4().hex}", root=root)


@pytest.fixture(scope="module")
def tried(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A finished study whose ticket was tried on the other task."""
    found = study(root, tmp_path_factory.mktemp("tried"))
    standing = found.run(LocalPool())
    assert (standing.done, standing.failed) == (1, 0)
    return found


def states_of(found: Study) -> tuple[Plan, dict[str, State]]:
    """The plan of the study's one proposal, and every state of it, made here without a pool."""
    job = found._job({}, nonce="")
    worker = Worker(job)
    (params,) = found.spec.mixes()
    plan = trial_plan(found.spec.settings(params), 0, worker.info)
    states: dict[str, State] = {}
    for node in plan.nodes:
        states[node.key] = worker._stages[node.task].run(node.op, [states[key] for key in node.parents])
    return plan, states


# --- A ticket on another task --------------------------------------------------------------------------------------


def test_states_of_another_task_are_no_points_of_the_front(tried: Study) -> None:
    by_trial: dict[int, set[str]] = {}
    for row in tried.table().to_pylist():
        by_trial.setdefault(row["trial"], set()).add(row["task_digest"])
    other = tried.noted()["others"]["other"]["task_digest"]
    assert by_trial == {-1: {tried.noted()["task_digest"]}, 0: {tried.noted()["task_digest"]}, CONTROL_TRIAL: {other}}
    assert all(point["trial"] == 0 and point["round"] > 0 for point in tried.front().points)


def test_a_ticket_starts_elsewhere_as_it_does_at_home(root: Path) -> None:
    plan, states = states_of(study(root))
    ticket = plan.tickets[-1]
    (moved,) = ticket.transfers
    start, home = states[moved.start], states[ticket.start]
    assert torch.equal(start.masks[BODY], home.masks[BODY]) and HEAD not in start.masks
    assert torch.equal(start.weights[BODY], home.weights[BODY])
    init = next(states[n.key] for n in plan.nodes if n.task and n.op == Init(seed=0))
    assert torch.equal(start.weights[HEAD], init.weights[HEAD])
    assert start.position == 0


def test_controls_elsewhere_have_the_ticket_s_counts(tried: Study) -> None:
    (moved,) = tried.tickets(structure=False)["tickets"][-1]["transfers"]
    assert moved["controls"].keys() == set(TRANSFER["transfer_controls"])
    by_key = {row["key"]: json.loads(row["layers"]) for row in tried.table().to_pylist()}
    event = next(row for row in tried.store.table("small", "events").to_pylist() if row["event"] == "tickets")
    record = json.loads(event["detail"])["tickets"][-1]["transfers"][0]
    for each in record["controls"]:
        if each["kind"] != "dense-transferred":
            assert by_key[each["key"]] == by_key[record["key"]]
    assert by_key[record["key"]][HEAD] == [16, 16]


def test_the_table_shows_it_beside_its_controls(tried: Study) -> None:
    found = tried.tickets(structure=False)
    against = [row["against"] for row in rows(found)]
    assert against == ["(single search)", "(single search)", "(on other)", *TRANSFER["transfer_controls"]]
    (moved,) = found["tickets"][-1]["transfers"]
    assert (moved["task"], moved["examples"], moved["n"]) == ("other", 36, 1)
    assert moved["says"].startswith("On other, at 43.8% sparse: too few seeds")
    shown = CliRunner().invoke(app, ["tickets", "small", "--store", str(tried.store.url)])
    assert "(on other)" in shown.output and "On other, at 43.8% sparse" in shown.output


def test_a_model_of_another_task_comes_home_as_such(tried: Study, tmp_path: Path) -> None:
    (moved,) = tried.tickets(structure=False)["tickets"][-1]["transfers"]
    card = json.loads((tried.fetch(moved["key"], tmp_path) / "card.json").read_text())
    assert card["task"] == "other_task.py" and card["certificate"]["reloaded"] == 0


@pytest.mark.parametrize("after", [2, 6])
def test_stopped_and_continued(after: int, root: Path, tried: Study) -> None:
    memory = f"memory://{uuid4().hex}"
    first, second = Counting(interrupt_after=after), Counting()
    with pytest.raises(KeyboardInterrupt):
        study(root, memory).run(first)
    again = study(root, memory)
    again.run(second)
    keys = [report.key for report in first.reported + second.reported]
    assert len(keys) == len(set(keys)), "a stage was run twice"
    assert_same(small.models(tried.store), small.models(again.store))
    assert again.status()["epochs"] == tried.status()["epochs"]


@pytest.mark.ray
def test_ray_workers_make_the_same_models(root: Path, tried: Study, tmp_path: Path, ray_cluster: None) -> None:
    from orchestrator.pools.ray import RayPool

    pool = RayPool(2)
    try:
        again = study(root, tmp_path)
        again.run(pool)
    finally:
        pool.close()
    assert_same(small.models(tried.store), small.models(again.store))


def assert_same(one: Mapping[str, State], other: Mapping[str, State]) -> None:
    assert one.keys() == other.keys() and one
    for key in one:
        assert small.same_bits(one[key], other[key]), key


# --- Searches on several tasks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [0, 1])
def test_searches_start_from_bit_equal_shared_tensors(root: Path, epoch: int) -> None:
    plan, states = states_of(study(root, space=TOGETHER | {"rewind_epoch": epoch}, tickets={"tasks": TASKS}))
    (ticket,) = plan.tickets
    by_key = {node.key: node for node in plan.nodes}
    trained = by_key[by_key[ticket.searches[1]].parents[0]]
    start, ancestor = states[trained.parents[0]], states[ticket.ancestor]
    shared = [name for name, weight in start.weights.items() if weight.shape == ancestor.weights[name].shape]
    assert shared == ["0.bias", "0.weight"]
    assert all(torch.equal(start.weights[name], ancestor.weights[name]) for name in shared)
    assert not torch.equal(states[trained.key].weights[BODY], states[plan.points[0][1]].weights[BODY])


def test_masks_of_several_tasks_are_combined_and_heads_stay_dense(root: Path) -> None:
    plan, states = states_of(study(root, space=TOGETHER, tickets={"tasks": TASKS}))
    (ticket,) = plan.tickets
    own, other = (states[key].masks for key in ticket.searches)
    combined = states[ticket.start]
    assert torch.equal(combined.masks[BODY], own[BODY] & other[BODY])
    assert not torch.equal(own[BODY], other[BODY])
    assert HEAD not in combined.masks and own[HEAD].all() and other[HEAD].all()


def test_a_study_of_searches_on_two_tasks_runs_to_its_table(root: Path) -> None:
    found = study(root, space=TOGETHER, tickets={"tasks": TASKS, "controls": ["one-shot", "imp"]})
    assert found.run(LocalPool()).done == 1
    (ticket,) = found.tickets(structure=False)["tickets"]
    assert (ticket["depth"], ticket["trainings"]) == (1, 2)
    assert ticket["overlap"]["jaccard"] > 0 and set(ticket["controls"]) == {"one-shot", "imp"}


@pytest.mark.parametrize(
    "space",
    [
        {"sparsity": 0.5, "phase": "before", "criterion": "snip"},
        TOGETHER | {"criterion": "taylor", "scope": "global"},
        TOGETHER | {"rule": "most-voted", "ticket_sparsity": 0.3, "rewind_epoch": 1},
    ],
)
def test_other_ways_to_a_ticket_go_elsewhere_too(root: Path, space: dict[str, Any]) -> None:
    found = study(root, space=space)
    assert found.run(LocalPool()).done == 1
    (ticket,) = found.tickets(structure=False)["tickets"]
    (moved,) = ticket["transfers"]
    assert moved["controls"].keys() == set(TRANSFER["transfer_controls"])


def test_a_failed_other_task_fails_the_search_and_not_the_comparison(root: Path) -> None:
    broken = [{"task": "my_task.py", "name": "other", "task_params": {"trouble": "raises"}}]
    train = {**small.TRAIN, "lr": 1e6}
    fine = study(root, train=train, tickets=TRANSFER | {"tasks": broken})
    assert fine.run(LocalPool()).done == 1
    assert fine.tickets(structure=False)["tickets"][-1]["transfers"] == []
    standing = study(root, train=train, space=TOGETHER, tickets={"tasks": broken}).run(LocalPool())
    assert standing.failed == 1 and "the loss is wrong" in standing.last_failure


# --- What is refused -----------------------------------------------------------------------------------------------


def test_a_changed_other_task_is_noticed(tmp_path: Path) -> None:
    root, memory = write(tmp_path), f"memory://{uuid4().hex}"
    study(root, memory).run(LocalPool())
    (root / "other_task.py").write_text(OTHER + "\n# another day\n")
    with pytest.raises(SpecError, match=r"^the task 'other' is not what the study 'small' began with .*\n.*accept"):
        study(root, memory).run(LocalPool())
    assert study(root, memory).run(LocalPool(), accept_task_change=True).done == 1


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (
            [*TASKS, {"task": "my_task.py", "name": "twin"}],
            "'twin' has the code, data and parameters of the study's own task",
        ),
        (TASKS * 2, "two tasks are called 'other'"),
        ([*TASKS, {"task": "my_task.py"}], "the study's own task is called 'my_task.py'"),
        ([*TASKS, {"task": "other_task.py", "name": "twin"}], "'twin' has .* of the task 'other'"),
        ([{"task": "other_task.py", "nam": "x"}], r"unknown key in \[tickets.tasks\]: 'nam'; did you mean 'name'"),
        ([{"task": "gone.py", "name": "other"}], "there is no file"),
        ([{"task": "other_task.py", "name": "other", "task_params": {"first": "first"}}], r"in 'other' \(first.weight"),
    ],
)
def test_wrong_tasks_are_refused(root: Path, tasks: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        study(root, tickets=TRANSFER | {"tasks": tasks}).check()


def test_a_task_that_does_not_fit_the_ticket_names_the_tensors(root: Path) -> None:
    tasks = [{"task": "other_task.py", "name": "other", "task_params": {"first": "first"}}]
    with pytest.raises(SpecError) as caught:
        study(root, space=TOGETHER, tickets={"tasks": tasks}).check()
    assert str(caught.value).splitlines()[0] == (
        "space: no prunable tensor of the study's task (0.weight 8x4, 2.weight 3x8) has the same name and shape in "
        "'other' (first.weight 8x4, 2.weight 2x8)"
    )


def test_an_unknown_task_to_transfer_to_is_refused() -> None:
    with pytest.raises(
        SpecError, match=r"transfer_to: unknown task in \[\[tickets.tasks\]\] 'othr'; did you mean 'other'"
    ):
        small.spec(tickets=TRANSFER | {"transfer_to": ["othr"]})


def test_tasks_survive_being_written_as_toml() -> None:
    spec = small.spec(tickets=TRANSFER | {"tasks": [TASKS[0] | {"task_params": {"classes": 2}, "leave": ["2"]}]})
    assert StudySpec.parse(spec.to_toml()) == spec
    assert StudySpec.parse(
        'name = "n"\ntask = "my_task.py"\n[[tickets.tasks]]\ntask = "other_task.py"\ntask_params = { classes = 2 }\n'
    ).tickets.tasks[0].task_params == {"classes": 2}


# --- A ticket as a file --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tried: Study, root: Path) -> Path:
    key = tried.tickets(structure=False)["tickets"][-1]["key"]
    shown = CliRunner().invoke(
        app, ["fetch", "small", key[:12], "-o", str(root), "--ticket", "--store", tried.store.url]
    )
    assert shown.exit_code == 0, shown.output
    return root / "ticket.safetensors"


def given(root: Path, store: str = "", path: str = "ticket.safetensors") -> Study:
    tickets = {"ticket": path, "controls": ["dense", "shuffled", "one-shot"]}
    return study(root, store, name="given", task="other_task.py", space={"phase": "ticket"}, tickets=tickets)


def test_the_file_has_the_ticket_with_its_weights_and_their_recipe(file: Path, tried: Study, root: Path) -> None:
    ticket = from_file_bytes(file.read_bytes())
    plan, states = states_of(study(root))
    home = states[plan.tickets[-1].start]
    assert ticket.weights is not None
    assert small.same_bits(State(weights=ticket.weights, masks=ticket.masks), home)
    assert ticket.recipe["task_digest"] == tried.noted()["task_digest"]
    assert ticket.recipe["init"] == {"seed": 0, "fresh": False} and ticket.recipe["steps"] == 0
    assert [step["op"] for step in ticket.lineage] == ["Init", "Train", "Prune", "Rewind", "Train", "Prune", "Rewind"]


def test_a_study_of_another_store_starts_from_the_file(file: Path, root: Path) -> None:
    found = given(root)
    assert found.run(LocalPool()).done == 1
    (ticket,) = found.tickets(structure=False)["tickets"]
    assert ticket["rule"] == "from a file" and ticket["controls"].keys() == {"dense", "shuffled", "one-shot"}
    plan, states = states_of(found)
    carried = from_file_bytes(file.read_bytes())
    assert carried.weights is not None
    start = states[plan.tickets[0].start]
    assert torch.equal(start.masks[BODY], carried.masks[BODY]) and HEAD not in start.masks
    assert torch.equal(start.weights[BODY], carried.weights[BODY])
    assert found.front().points[0]["key"] == ticket["key"]
    with pytest.raises(QueryError, match="came from a file"):
        found.fetch_ticket(ticket["key"], root)


def test_the_same_ticket_in_one_study_or_over_a_file_is_the_same_model(file: Path, root: Path, tried: Study) -> None:
    found = given(root)
    found.run(LocalPool())
    (moved,) = tried.tickets(structure=False)["tickets"][-1]["transfers"]
    (there,) = found.tickets(structure=False)["tickets"]
    models = small.models(tried.store), small.models(found.store, "given")
    assert small.same_bits(models[0][moved["key"]], models[1][there["key"]])


def test_a_ticket_with_a_recipe_for_its_weights_is_the_same_ticket(tried: Study, root: Path, tmp_path: Path) -> None:
    write(tmp_path)
    key = tried.tickets(structure=False)["tickets"][-1]["key"]
    fields: dict[str, Any] = {"space": {"phase": "ticket"}, "seeds": [5]}
    models = []
    for name in ("with weights", "with a recipe"):
        file = tried.fetch_ticket(key, tmp_path / name, recipe=name == "with a recipe")
        assert (from_file_bytes(file.read_bytes()).weights is None) == (name == "with a recipe")
        tickets = {"ticket": f"{name}/ticket.safetensors", "controls": ["shuffled"]}
        found = study(tmp_path, name="again", task="my_task.py", tickets=tickets, **fields)
        assert found.run(LocalPool()).done == 1
        (ticket,) = found.tickets(structure=False)["tickets"]
        models.append(small.models(found.store, "again")[ticket["key"]])
    assert small.same_bits(*models)


def test_a_recipe_is_refused_where_the_model_starts_from_other_weights(
    tried: Study, root: Path, tmp_path: Path
) -> None:
    write(tmp_path)
    tried.fetch_ticket(tried.tickets(structure=False)["tickets"][-1]["key"], tmp_path, recipe=True)
    for refused in (given(tmp_path).check, lambda: given(tmp_path).run(LocalPool())):
        with pytest.raises(
            InputError, match=r"does not start from them under init seed 0: it was found on the task 'my"
        ):
            refused()


def test_a_tampered_file_is_refused_before_anything_runs(file: Path, root: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    (root / "tampered.safetensors").write_bytes(bytes(data))
    found = given(root, path="tampered.safetensors")
    for refused in (found.check, lambda: found.run(LocalPool())):
        with pytest.raises(InputError, match=r"^ticket 'tampered.safetensors': the ticket file is damaged"):
            refused()
    with pytest.raises(InputError, match="ticket 'gone.safetensors': cannot read"):
        given(root, path="gone.safetensors").run(LocalPool())


def test_another_file_of_the_same_name_is_noticed(file: Path, tried: Study, root: Path, tmp_path: Path) -> None:
    memory = f"memory://{uuid4().hex}"
    write(tmp_path)
    place = tmp_path / "ticket.safetensors"
    place.write_bytes(file.read_bytes())
    given(tmp_path, memory).run(LocalPool())
    tried.fetch_ticket(tried.tickets(structure=False)["tickets"][0]["key"], tmp_path)
    assert place.read_bytes() != file.read_bytes()
    with pytest.raises(SpecError, match=r"^the ticket 'ticket.safetensors' is not what the study 'given' began with"):
        given(tmp_path, memory).run(LocalPool())


def test_what_is_no_ticket_is_not_fetched_as_one(tried: Study, tmp_path: Path) -> None:
    dense = next(row["key"] for row in tried.table().to_pylist() if row["trial"] == -1)
    with pytest.raises(QueryError, match="is no ticket of the study 'small'; `tickets` shows their keys"):
        tried.fetch_ticket(dense, tmp_path)


def test_a_ticket_file_without_its_phase_is_refused() -> None:
    with pytest.raises(SpecError, match=r"a ticket file is for phase 'ticket'"):
        small.spec(tickets={"ticket": "ticket.safetensors"})
    with pytest.raises(SpecError, match=r"tickets.ticket: 'ticket.pt' must end in .safetensors"):
        small.spec(tickets={"ticket": "ticket.pt"})


def test_a_rewound_ticket_takes_its_trained_weights_along(root: Path, tmp_path: Path) -> None:
    found = study(root, tmp_path / "store", space=REWOUND | {"rewind_epoch": 1}, tickets={})
    found.run(LocalPool())
    key = found.tickets(structure=False)["tickets"][-1]["key"]
    ticket = from_file_bytes(found.fetch_ticket(key, tmp_path).read_bytes())
    init = Stages(Worker(found._job({}, nonce=""))._stages[""].loaded).run(Init(seed=0), [])
    mask = ticket.masks[BODY]
    assert ticket.position == ticket.recipe["steps"] == 4 and ticket.weights is not None
    assert not torch.equal(ticket.weights[BODY][mask], init.weights[BODY][mask])
    with pytest.raises(QueryError, match="trained for 4 steps, which a recipe does not make again; legal: without"):
        found.fetch_ticket(key, tmp_path, recipe=True)
