"""Tickets from search to verdict, in studies of a second: at the ticket's own counts, over dense weights, in its order."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from orchestrator import Study
from orchestrator.cli import main
from orchestrator.errors import PlanError, SpecError, StageFailed
from orchestrator.ops import Control, Init, Train
from orchestrator.plan import Plan
from orchestrator.planning.trial import trial_plan
from orchestrator.pools.local import LocalPool
from orchestrator.settings import CONTROLS, MISSING_THE_MARK
from orchestrator.stages import Stages
from orchestrator.state import State, from_bytes
from orchestrator.tasks.load import load
from orchestrator.tasks.source import collect
from orchestrator.tickets import algebra
from orchestrator.tickets.study.table import read, rows, says
from tests.orchestrator.pools import small
from tests.test_study import Counting

RIVALS = [kind for kind in CONTROLS if kind != "sibling"]
LAYER_BY_LAYER = [kind for kind in RIVALS if not kind.startswith("dense") and kind != "random"]
IMP = {"criterion": "magnitude", "scope": "layer", "rate": 0.3, "rounds": 2, "retrain": "rewind"}
CONSENSUS = IMP | {"searches": 3, "rule": "union"}


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "orchardist")


def study_of(store: str | Path, root: Path, space: Mapping[str, Any], **fields: Any) -> Study:
    tickets = {"controls": fields.pop("controls", RIVALS)} | fields.pop("tickets", {})
    return Study(small.spec(**{"trials": 1, "space": dict(space), "tickets": tickets} | fields), store, root=root)


def run(store: str | Path, root: Path, space: Mapping[str, Any], pool: Any = None, **fields: Any) -> Study:
    """One proposal, run in this process."""
    study = study_of(store, root, space, **fields)
    standing = study.run(pool or LocalPool())
    assert (standing.done, standing.failed) == (1, 0), standing.last_failure
    return study


def state(study: Study, key: str) -> State:
    data = study.store.states.read(key)
    assert data is not None, key
    return from_bytes(data)


def last(study: Study) -> dict[str, Any]:
    """The last ticket of the document."""
    found: dict[str, Any] = study.tickets()["tickets"][-1]
    return found


def counts(study: Study, row: Mapping[str, Any]) -> dict[str, int]:
    """What a trained state's masks keep, layer by layer, counted in the state itself."""
    masks = state(study, row["key"]).masks
    found = {name: int(mask.sum()) for name, mask in masks.items()}
    assert found == {name: kept for name, (kept, _) in json.loads(row["layers"]).items()} or not masks
    return found


# --- At the same counts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [IMP, CONSENSUS], ids=["rounds", "consensus"])
def test_every_control_keeps_exactly_as_many_weights(space: dict[str, Any], root: Path, memory: str) -> None:
    study = run(memory, root, space, seeds=[0, 1], tickets={"draws": 2})
    found = list(read(study))[-1]
    wanted = RIVALS if "searches" in space else [kind for kind in RIVALS if kind != "imp"]
    assert set(found.controls) == set(wanted)
    for kind, by_seed in found.controls.items():
        for seed, drawn in by_seed.items():
            assert len(drawn) == (1 if kind in ("dense", "dense-long", "one-shot", "imp") else 2)
            ticket = counts(study, found.rows[seed])
            for row in drawn:
                kept = counts(study, row)
                if kind.startswith("dense"):
                    assert not kept
                elif kind == "random":
                    assert sum(kept.values()) == sum(ticket.values())
                else:
                    assert kept == ticket, kind


def test_ranked_over_all_layers_one_shot_and_iterative_agree_overall(root: Path, memory: str) -> None:
    study = run(memory, root, CONSENSUS | {"scope": "global"}, controls=["one-shot", "imp"])
    (found,) = read(study)
    ticket = sum(counts(study, found.rows[0]).values())
    assert {sum(counts(study, found.controls[kind][0][0]).values()) for kind in found.controls} == {ticket}


def test_one_shot_at_another_count_is_noticed(root: Path, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator import stages

    right = stages.like_reference

    def one_more(op: Any, *rest: Any) -> Any:
        resolved = right(op, *rest)
        name, rate = resolved.targets[0]
        return replace(resolved, targets=((name, rate * 0.9), *resolved.targets[1:]))

    monkeypatch.setattr(stages, "like_reference", one_more)
    study = run(memory, root, IMP, controls=["one-shot"])
    with pytest.raises(PlanError, match="not at the same sparsity: under seed 0 the ticket keeps .* one-shot"):
        study.tickets()


# --- Over the ancestor's unmasked weights, in the ticket's order ---------------------------------------------------


class Room:
    """Runs the stages of a plan one after the other and keeps every state, and the batches of each training."""

    def __init__(self, root: Path, space: Mapping[str, Any], **fields: Any) -> None:
        loaded = load(collect("my_task.py", root), {}, root)
        loss = loaded.task.loss
        self.seen: list[list[int]] = []

        def recording(outputs: Tensor, targets: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                self.seen.append(targets.tolist())
            return loss(outputs, targets)

        self.study = study_of("memory://room", root, space, **fields)
        settings = self.study.spec.settings(space)
        loaded.task = replace(loaded.task, loss=recording)
        stages = Stages(loaded)
        self.plan: Plan = trial_plan(settings, 0, stages.info())
        self.ticket = self.plan.tickets[-1]
        self.states: dict[str, State] = {}
        self.batches: dict[str, list[list[int]]] = {}
        assert stages.narrowable is not None  # found out beforehand, with batches of its own
        for node in self.plan.nodes:
            self.seen.clear()
            self.states[node.key] = stages.run(node.op, [self.states[key] for key in node.parents])
            self.batches[node.key] = list(self.seen)


@pytest.fixture(scope="module")
def room(root: Path) -> Room:
    return Room(root, CONSENSUS | {"rewind_step": 3})


def test_controls_stand_over_dense_weights(room: Room) -> None:
    ancestor, kinds = room.states[room.ticket.ancestor], set()
    assert not ancestor.masks and ancestor.position == 3
    for node in room.plan.nodes:
        if not isinstance(node.op, Control):
            continue
        kinds.add(node.op.kind)
        made = room.states[node.key]
        other = room.states[node.parents[2]] if len(node.parents) == 3 else None
        source = other or ancestor
        assert made.position == source.position and not source.masks
        for name, weight in made.weights.items():
            whole, mask = source.weights[name], made.masks.get(name)
            if mask is None:
                assert torch.equal(weight, whole)
                continue
            assert not weight[~mask].any() and weight[mask].all()  # no zeros where weights should be
            if node.op.kind == "sign-kept":
                assert torch.equal(weight[mask].abs(), whole[mask].abs())
                assert torch.equal(weight[mask].sign(), ancestor.weights[name][mask].sign())
            elif node.op.kind != "sign-constant":
                assert torch.equal(weight[mask], whole[mask])
    assert kinds == set(RIVALS) - {"dense", "dense-long", "one-shot", "imp"}


def test_ticket_and_controls_see_the_same_batches(room: Room) -> None:
    ticket = room.batches[room.ticket.key]
    assert len(ticket) == 5 and len(set(map(str, ticket))) == 5  # steps 3 to 8
    for each in room.ticket.controls:
        mine = room.batches[each.key]
        if each.kind == "dense-long":
            assert len(mine) == 24 and mine[3:8] == ticket
        else:
            assert mine[-5:] == ticket, each.kind


def test_searches_in_other_orders_see_other_batches(room: Room) -> None:
    first = [node for node in room.plan.nodes if isinstance(node.op, Train) and node.op.order_seed != 0]
    assert {len(room.batches[node.key]) for node in first} == {5}
    orders = {node.op.order_seed: str(room.batches[node.key]) for node in first if isinstance(node.op, Train)}
    assert len(set(orders.values())) == 2 and str(room.batches[room.ticket.key]) not in orders.values()


def test_what_is_run_alone_is_what_the_study_stores(room: Room, root: Path, memory: str) -> None:
    study = run(memory, root, CONSENSUS | {"rewind_step": 3})
    for node in room.plan.nodes:
        if node.evaluated or node.stored:
            assert small.same_bits(state(study, node.key), room.states[node.key]), node.op


# --- Nothing is run twice ------------------------------------------------------------------------------------------


def test_a_finished_study_runs_nothing(root: Path, memory: str) -> None:
    study = run(memory, root, CONSENSUS)
    told = study.tickets()
    pool = Counting()
    assert run(memory, root, CONSENSUS, pool).tickets() == told
    assert pool.reported == []


@pytest.mark.parametrize("space", [IMP, IMP | {"searches": 2}], ids=["rounds", "consensus"])
def test_more_rounds_run_nothing_of_the_earlier_ones(space: dict[str, Any], root: Path, memory: str) -> None:
    first, second = Counting(), Counting()
    controls = {"controls": ["shuffled", "reinitialised"], "tickets": {"rounds": [2]}}
    short = run(memory, root, space, first, **controls)
    long = run(memory, root, space | {"rounds": 4}, second, name="longer", **controls)
    before, after = ({report.key for report in pool.reported} for pool in (first, second))
    assert not before & after and after
    if "searches" not in space:
        told = [ticket["key"] for ticket in long.tickets()["tickets"]]
        assert told[:2] == [ticket["key"] for ticket in short.tickets()["tickets"]] and len(told) == 4
        assert list(long.tickets()["tickets"][1]["controls"]) == ["shuffled", "reinitialised"]


@pytest.mark.ray
@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_tickets(
    workers: int, root: Path, tmp_path: Path, memory: str, ray_cluster: None
) -> None:
    from orchestrator.pools.ray import RayPool

    local = run(memory, root, CONSENSUS)
    pool = RayPool(workers)
    try:
        spread = run(tmp_path, root, CONSENSUS, pool)
    finally:
        pool.close()
    ours, theirs = small.models(local.store), small.models(spread.store)
    assert ours.keys() == theirs.keys() and len(ours) > 10
    assert all(small.same_bits(ours[key], theirs[key]) for key in ours)
    assert local.tickets() == spread.tickets()


# --- Learning curves ------------------------------------------------------------------------------------------------


def curves(study: Study) -> dict[str, list[int]]:
    """The steps at which the curves of the last ticket and its controls have a point."""
    found = list(read(study))[-1]
    everyone = {
        "ticket": found.rows,
        **{kind: {seed: row for seed, (row,) in each.items()} for kind, each in found.controls.items()},
    }
    return {kind: [step for step, *_ in json.loads(each[0]["curve"] or "[]")] for kind, each in everyone.items()}


TAKEN: dict[str, Any] = {
    "train": {**small.TRAIN, "evaluate_every": 0.5},
    "controls": ["dense", "dense-long", "shuffled"],
}


def test_a_curve_has_every_point_wherever_its_training_was_cut(root: Path, memory: str) -> None:
    whole = {"ticket": [2, 4, 6, 8], "dense": [2, 4, 6, 8], "dense-long": [*range(2, 25, 2)], "shuffled": [2, 4, 6, 8]}
    assert curves(run(memory, root, IMP, **TAKEN)) == whole
    late = run(f"{memory}-late", root, IMP | {"rewind_step": 3}, **TAKEN)
    assert curves(late) == whole | {"ticket": [4, 6, 8], "shuffled": [4, 6, 8]}


def test_a_curve_whose_beginning_an_earlier_study_did_not_take_is_none(root: Path, memory: str) -> None:
    rewound, train = IMP | {"rewind_step": 3}, dict(small.TRAIN)
    run(memory, root, rewound, name="without", controls=[], train=train)
    found = curves(run(memory, root, rewound, **TAKEN))
    assert found["dense-long"] == [] and found["shuffled"] == [4, 6, 8]


# --- Rules and what varies -----------------------------------------------------------------------------------------


def kept_by(masks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: sum(mask[name].to(torch.int64) for mask in masks) for name in masks[0]}  # type: ignore[misc]


@pytest.mark.parametrize(
    ("params", "wanted"),
    [
        ({"rule": "intersection"}, lambda votes, _: votes == 3),
        ({"rule": "union"}, lambda votes, _: votes >= 1),
        ({"rule": "at-least", "at_least": 2}, lambda votes, _: votes >= 2),
        ({"rule": "weighted"}, lambda votes, heavy: heavy | (votes == 3)),
    ],
    ids=["intersection", "union", "at-least", "weighted"],
)
def test_a_ticket_is_its_searches_masks_combined(params: Any, wanted: Any, root: Path, memory: str) -> None:
    study = run(memory, root, CONSENSUS | params, controls=[], tickets={"weights": [1, 3, 1]})
    (found,) = read(study)
    ticket = found.tickets[0]
    masks = [dict(state(study, key).masks) for key in ticket["searches"]]
    start, ancestor = state(study, ticket["start"]), Room(root, IMP, controls=[]).states[ticket["ancestor"]]
    for name, votes in kept_by(masks).items():
        assert torch.equal(start.masks[name], wanted(votes, masks[1][name]))
        assert torch.equal(start.weights[name], ancestor.weights[name] * start.masks[name])
    assert any(not torch.equal(one[name], other[name]) for one, other in combinations(masks, 2) for name in one)


def test_most_voted_reaches_the_wanted_sparsity_and_drops_no_weight_with_more_votes(root: Path, memory: str) -> None:
    study = run(memory, root, CONSENSUS | {"rule": "most-voted", "ticket_sparsity": 0.6}, controls=[])
    (found,) = read(study)
    ticket = found.tickets[0]
    votes = kept_by([dict(state(study, key).masks) for key in ticket["searches"]])
    masks = state(study, ticket["start"]).masks
    kept = torch.cat([votes[name][mask] for name, mask in masks.items()])
    dropped = torch.cat([votes[name][~mask] for name, mask in masks.items()])
    assert len(kept) == 56 - round(0.6 * 56) and kept.min() >= dropped.max()


def test_searches_vary_in_their_data(root: Path, memory: str) -> None:
    study = run(memory, root, CONSENSUS | {"vary": "data", "data_share": 0.5}, controls=["dense"])
    ticket = last(study)
    assert ticket["trainings"] == 6 and ticket["depth"] == 2 and 0 < ticket["overlap"]["jaccard"] < 1


def test_searches_vary_in_their_criterion(root: Path, memory: str) -> None:
    criteria = {"criteria": ["magnitude", "taylor", "random"]}
    study = run(memory, root, CONSENSUS | {"vary": "criterion", "rounds": 1}, controls=["dense"], tickets=criteria)
    ticket = last(study)
    assert ticket["trainings"] == 1 and ticket["overlap"].keys() >= {"jaccard", "chance"}
    (found,) = read(study)
    masks = [state(study, key).masks for key in found.tickets[0]["searches"]]
    assert all(not algebra.cut_off(mask) for mask in masks)
    assert any(not torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


def test_a_layer_that_the_intersection_cuts_off_is_repaired_and_reported(root: Path, memory: str) -> None:
    space = CONSENSUS | {
        "rate": 0.95,
        "rounds": 1,
        "rule": "intersection",
        "searches": 5,
        "vary": "data",
        "data_share": 0.1,
    }
    study = run(memory, root, space, controls=["random-layer", "imp"])
    ticket = last(study)
    assert ticket["repaired"] and sum(ticket["repaired"].values()) > 0
    kept = counts(study, next(read(study)).rows[0])
    assert all(kept[name] == count for name, count in ticket["repaired"].items())
    assert ticket["controls"].keys() == {"random-layer", "imp"}  # at the count achieved


# --- Before training: missing the mark -----------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["snip", "grasp", "synflow", "random", "magnitude"])
def test_the_sanity_suite_runs_for_every_criterion_before_training(criterion: str, root: Path, memory: str) -> None:
    space = {"criterion": criterion, "scope": "layer", "sparsity": 0.5, "phase": "before", "rounds": 1}
    study = run(memory, root, space, controls=["missing-the-mark"], seeds=[0, 1])
    ticket = last(study)
    assert tuple(ticket["controls"]) == MISSING_THE_MARK and ticket["n"] == 2
    assert {control["claim"] for control in ticket["controls"].values()} == {"too few"}
    (found,) = read(study)
    for kind in ("shuffled", "inverted"):
        for seed, (row,) in found.controls[kind].items():
            ours, theirs = (state(study, key).masks for key in (found.rows[seed]["key"], row["key"]))
            assert all(not torch.equal(ours[name], theirs[name]) for name in ours)
            assert counts(study, row) == counts(study, found.rows[seed])
            if kind == "inverted":
                assert not any((ours[name] & theirs[name]).any() for name in ours)


# --- What is no rival's fault --------------------------------------------------------------------------------------


@pytest.fixture
def no_inverse(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """While it holds no control of the kind "inverted" can be made."""
    from orchestrator import stages

    right = stages.controlled

    def failing(op: Control, parents: Any) -> State:
        if op.kind == "inverted":
            raise StageFailed("there is no such mask")
        return right(op, parents)

    monkeypatch.setattr(stages, "controlled", failing)
    return monkeypatch


THREE = ["shuffled", "inverted", "random"]


def test_a_control_that_fails_is_told_with_its_reason(
    root: Path, memory: str, no_inverse: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "orchardist")
    study = run(memory, root, CONSENSUS, controls=THREE, seeds=[0, 1])
    ticket = last(study)
    assert list(ticket["controls"]) == ["shuffled", "random"]
    reason = "raised: there is no such mask"
    assert ticket["failed"] == {"inverted": {"0": reason, "1": reason}}
    assert f"failed under seeds 0, 1: {reason}" in [row["claim"] for row in rows(study.tickets())]
    assert "What failed is tried again when the study is run again." in says(study.tickets())
    assert caplog.messages == ["2 controls of trial 0 failed: `tickets` says why"]
    assert study.status()["trials"]["failed"] == 0
    assert [point["key"] for point in study.front().points if point["trial"] == 0]


def test_a_control_that_failed_is_tried_again_by_the_next_run(
    root: Path, memory: str, no_inverse: pytest.MonkeyPatch
) -> None:
    run(memory, root, CONSENSUS, controls=THREE)
    again = Counting()
    study = run(memory, root, CONSENSUS, again, controls=THREE)
    assert again.reported == [] and list(last(study)["failed"]) == ["inverted"]  # it fails once more, and alone
    no_inverse.undo()
    study = run(memory, root, CONSENSUS, again, controls=THREE)
    ticket, straight = last(study), last(run(f"{memory}-straight", root, CONSENSUS, controls=THREE))
    assert ticket == straight and list(ticket["controls"]) == THREE and not ticket["failed"]
    assert len(again.reported) == 1  # what was there is not run again
    events = [row["event"] for row in study.store.table("small", "events").to_pylist()]
    assert (events.count("done"), events.count("tickets")) == (1, 1)
    assert study.status()["trials"] == {"asked": 1, "done": 1, "running": 0, "failed": 0, "stopped": 0}
    run(memory, root, CONSENSUS, again, controls=THREE)
    assert len(again.reported) == 1


def test_a_trial_that_begins_after_its_control_has_failed_says_why(
    root: Path, memory: str, no_inverse: pytest.MonkeyPatch
) -> None:
    space = IMP | {"rounds": [1, 2, 3]}
    fields: dict[str, Any] = {"trials": 3, "sampler": "tpe", "enqueue": [{"rounds": rounds} for rounds in (1, 2, 3)]}
    study = study_of(memory, root, space, controls=["inverted"], tickets={"rounds": [1]}, **fields)
    assert study.run(LocalPool()).done == 3
    told = [row for row in study.store.table("small", "events").to_pylist() if row["event"] == "control failed"]
    assert {row["trial"] for row in told} == {0, 1, 2} and len({row["key"] for row in told}) == 1
    assert {json.loads(row["detail"])["reason"] for row in told} == {"raised: there is no such mask"}


def test_controls_of_another_task_than_the_trial_s_are_not_tried_again(
    root: Path, tmp_path: Path, memory: str, no_inverse: pytest.MonkeyPatch
) -> None:
    own = small.write_task(tmp_path / "own")
    run(memory, own, IMP, controls=THREE)
    no_inverse.undo()
    (own / "blobs.py").write_text((own / "blobs.py").read_text() + "\n# changed\n")
    again = Counting()
    study = study_of(memory, own, IMP, controls=THREE)
    study.run(again, accept_task_change=True)
    assert len(again.reported) == 1  # the dense model of the changed task, and no control


def assert_no_control_is_a_point(study: Study) -> None:
    (found,) = read(study)
    own = {row["key"] for row in found.rows.values()}
    controls = {row["key"] for by_seed in found.controls.values() for drawn in by_seed.values() for row in drawn}
    trials = {row["key"]: row["trial"] for row in study.table().to_pylist()}
    assert len(controls) >= 10 and not controls & own
    assert {trials[key] for key in controls} == {-1, -2} and {trials[key] for key in own} == {0}
    assert {key for point in study.front().points for key in point["keys"]} <= own


def test_controls_are_no_points_of_the_front(root: Path, memory: str) -> None:
    assert_no_control_is_a_point(run(memory, root, CONSENSUS))


def test_a_control_counted_as_a_point_is_noticed(root: Path, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator import driver

    monkeypatch.setattr(driver, "CONTROL_TRIAL", 0)
    study = run(memory, root, CONSENSUS)
    with pytest.raises(AssertionError):
        assert_no_control_is_a_point(study)


@pytest.mark.parametrize(
    ("space", "tickets", "says"),
    [
        (CONSENSUS | {"retrain": "finetune"}, {}, "retrain 'rewind'"),
        (CONSENSUS | {"rule": "at-least"}, {}, "at_least"),
        (CONSENSUS | {"rule": "most-voted"}, {}, "ticket_sparsity"),
        (CONSENSUS | {"rule": "weighted"}, {"weights": [1]}, "one vote for each of the 3 searches"),
        (CONSENSUS | {"vary": "criterion"}, {"criteria": ["snip"]}, "one criterion for each of the 3 searches"),
    ],
)
def test_a_study_whose_mix_makes_no_ticket_does_not_begin(
    space: dict[str, Any], tickets: dict[str, Any], says: str, root: Path, memory: str
) -> None:
    study = study_of(memory, root, space, tickets=tickets)
    with pytest.raises(SpecError, match=says):
        study.run(LocalPool())


def test_new_weights_come_from_another_init(room: Room) -> None:
    inits = [node for node in room.plan.nodes if isinstance(node.op, Init)]
    assert len(inits) == 2
    one, other = (room.states[node.key].weights for node in inits)
    assert not any(torch.equal(one[name], other[name]) for name in one)


# --- In a search, and from the command line ------------------------------------------------------------------------


def test_searches_and_rules_are_parameters_that_a_sampler_chooses(root: Path, memory: str) -> None:
    space = IMP | {
        "rounds": {"low": 1, "high": 2},
        "searches": [1, 2, 3],
        "rule": {"choices": ["intersection", "union", "at-least"], "when": {"searches": [2, 3]}},
        "at_least": {"choices": [1, 2], "when": {"rule": ["at-least"]}},
        "vary": ["order", "data"],
    }
    study = study_of(memory, root, space, controls=["shuffled"], trials=8, sampler="tpe")
    standing = study.run(LocalPool())
    assert (standing.done, standing.failed) == (8, 0)
    tickets = study.tickets()["tickets"]
    assert len({ticket["rule"] for ticket in tickets}) >= 3
    assert all(0 < ticket["sparsity"] < 1 for ticket in tickets)


def test_the_command_prints_a_table_and_the_document(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = run(tmp_path, root, CONSENSUS, controls=["shuffled", "imp"])

    def said(*arguments: str, study: str = "small") -> str:
        monkeypatch.setattr(sys, "argv", ["orchardist", "tickets", study, "--store", str(tmp_path), *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code
        return capsys.readouterr().out

    assert json.loads(said("--format", "json")) == json.loads(json.dumps(study.tickets()))
    table = said()
    assert "(union)" in table and "shuffled" in table and "found in 6 trainings, 2 of them in a row" in table
    assert "too few seeds to say against the shuffled mask" in table
    run(tmp_path, root, CONSENSUS, name="alone", controls=[])
    assert "compared with nothing: [tickets] controls says with what" in said(study="alone")
