"""Tickets as stages: what is searched, combined and compared, from which states, under which seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.errors import PlanError
from orchestrator.mixes import resolve
from orchestrator.ops import Combine, Control, Gather, Init, Prune, Rewind, Train
from orchestrator.plan import Node, Plan, Ticket
from orchestrator.planning.builder import Builder
from orchestrator.planning.trial import trial_plan
from orchestrator.seeds import derive
from orchestrator.settings import CONTROLS, MISSING_THE_MARK, PruneSettings, TicketSettings, TrainSettings
from orchestrator.tasks.info import Layer, TaskInfo

INFO = TaskInfo(
    digest="t",
    layers=(Layer(name="fc.weight", shape=(8, 5)), Layer(name="out.weight", shape=(10, 6))),
    train_examples=95,
)
"""100 weights; 10 steps an epoch at batch size 10."""
TRAIN = TrainSettings(epochs=10, batch_size=10)
SEARCH = {"rate": 0.2, "retrain": "rewind"}
RIVALS = [kind for kind in CONTROLS if kind != "sibling"]


def trial(tickets: dict[str, Any] | None = None, *, seed: int = 0, info: TaskInfo = INFO, **params: Any) -> Plan:
    settings = resolve(TRAIN, PruneSettings(), SEARCH | params, tickets=TicketSettings(**tickets or {}))
    return trial_plan(settings, seed, info)


def told(plan: Plan) -> list[str]:
    """A plan as text: each stage with its parents by their place, `*` where it is a point, `+` where it is stored."""
    places = {node.key: place for place, node in enumerate(plan.nodes)}
    orders = {node.op.order_seed: None for node in plan.nodes if isinstance(node.op, Train)}
    names = {seed: "'" * place for place, seed in enumerate([0, *(order for order in orders if order)])}

    def line(node: Node) -> str:
        match node.op:
            case Init(seed=seed):
                name = "init" if seed == 0 else "init'"
            case Train(to=to, order_seed=order, share=share):
                name = f"train{names[order]} {node.start}-{to}" + (" share" if share < 1 else "")
            case Prune(like=like, part=part, criterion=criterion):
                name = f"prune like {like}{'' if part == 1 else f' {part:g}'}" if like else f"prune {criterion}"
            case Rewind():
                name = "rewind"
            case Combine(rule=rule):
                name = rule
            case Control(kind=kind):
                name = kind
            case _:
                name = type(node.op).__name__.lower()
        mark = "*" if node.evaluated else "+" if node.stored else ""
        return f"{name}({', '.join(str(places[parent]) for parent in node.parents)}){mark}"

    return [line(node) for node in plan.nodes]


def only(plan: Plan) -> Ticket:
    (ticket,) = plan.tickets
    return ticket


def op_of(plan: Plan, key: str) -> Any:
    return next(node.op for node in plan.nodes if node.key == key)


def node_of(plan: Plan, key: str) -> Node:
    return next(node for node in plan.nodes if node.key == key)


def before(plan: Plan, key: str) -> list[Node]:
    """Every stage behind a state, itself included."""
    wanted, found = {key}, []
    for node in reversed(plan.nodes):
        if node.key in wanted:
            wanted.update(node.parents)
            found.append(node)
    return found


# --- Searches side by side -----------------------------------------------------------------------------------------


def test_searches_from_one_init() -> None:
    plan = trial(searches=3, rounds=1)
    assert sorted(told(plan)[:8]) == sorted(
        [
            *["init()", "train 0-100(0)", "prune magnitude(1)+"],
            *["train' 0-100(0)", "prune magnitude(3)+", "train'' 0-100(0)", "prune magnitude(5)+"],
            told(plan)[7],
        ]
    )
    combine = node_of(plan, only(plan).start)
    assert combine.parents == (*sorted(only(plan).searches), plan.nodes[0].key) and combine.stored
    assert told(plan)[8:] == ["train 0-100(7)*"]
    assert plan.points == ((1, only(plan).key),)


def test_each_round_of_a_search_rewinds_to_the_ancestor_and_keeps_the_search_s_own_order() -> None:
    plan = trial(searches=2, rounds=2)
    assert told(plan)[:11] == [
        *["init()", "train 0-100(0)", "prune magnitude(1)", "rewind(2, 0)", "train 0-100(3)", "prune magnitude(4)+"],
        *["train' 0-100(0)", "prune magnitude(6)", "rewind(7, 0)", "train' 0-100(8)", "prune magnitude(9)+"],
    ]
    assert len(plan.nodes) == 13


@pytest.mark.parametrize(("searches", "rounds"), [(2, 1), (2, 3), (5, 1), (5, 2)])
def test_depth_counts_what_no_worker_shortens_and_trainings_what_all_cost(searches: int, rounds: int) -> None:
    ticket = only(trial(searches=searches, rounds=rounds, rewind_step=3))
    assert (ticket.depth, ticket.trainings) == (rounds, searches * rounds)
    assert len(set(ticket.searches)) == searches


def test_one_search_is_as_deep_as_it_has_rounds() -> None:
    tickets = trial(rounds=3, rewind_epoch=1).tickets
    assert [(t.round, t.depth, t.trainings, t.rule, t.searches) for t in tickets] == [
        (1, 1, 1, "", ()),
        (2, 2, 2, "", ()),
        (3, 3, 3, "", ()),
    ]


def test_the_steps_of_a_trial_count_every_search() -> None:
    assert trial(searches=3, rounds=2).steps_by_task[""] == (3 * 2 + 1) * 100
    assert trial(rounds=2).steps_by_task[""] == 300


def test_rewinding_late_all_start_from_the_ancestor_with_its_optimizer() -> None:
    plan = trial({"controls": RIVALS}, searches=3, rounds=2, rewind_step=5)
    ancestor = node_of(plan, only(plan).ancestor)
    assert isinstance(ancestor.op, Train) and ancestor.op.to == 5 and ancestor.resumable and ancestor.stored
    assert node_of(plan, only(plan).start).resumable  # what is stored of the ticket keeps the optimizer
    varied = [n for n in plan.nodes if isinstance(n.op, Train) and n.op.order_seed != 0 and n.op.to == 100]
    assert {n.parents for n in varied if not isinstance(op_of(plan, n.parents[0]), Rewind)} == {(ancestor.key,)}
    for node in plan.nodes:
        if isinstance(node.op, (Rewind, Combine)):
            assert node.parents[-1] == ancestor.key
        if isinstance(node.op, Control):
            assert node.parents[1] == ancestor.key
        if isinstance(node.op, Train) and node.op.to >= 100:
            over_other = (
                isinstance(op_of(plan, node.parents[0]), Control) and len(node_of(plan, node.parents[0]).parents) == 3
            )
            from_init = isinstance(op_of(plan, node.parents[0]), Init)
            assert node.start == (0 if from_init or over_other else 5)


def test_varied_orders_differ_and_the_first_is_the_run_s_own() -> None:
    plan = trial(seed=3, searches=3)
    first = [
        n.op.order_seed for n in plan.nodes if isinstance(n.op, Train) and isinstance(op_of(plan, n.parents[0]), Init)
    ]
    assert first == [3, derive(3, "search", 1), derive(3, "search", 2)]
    assert op_of(plan, only(plan).key).order_seed == 3


def test_varied_data_are_shares_in_the_run_s_own_order() -> None:
    plan = trial(searches=2, rounds=2, vary="data", data_share=0.25)
    searching = [node.op for node in plan.nodes if isinstance(node.op, Train) and node.op.share < 1]
    assert len(searching) == 4 and {op.share for op in searching} == {0.25}
    assert {op.share_seed for op in searching} == {derive(0, "share", number) for number in range(2)}
    assert {op.order_seed for op in searching} == {0}
    assert op_of(plan, only(plan).key).share == 1


def test_varied_criteria_share_the_dense_training() -> None:
    plan = trial({"criteria": ["magnitude", "random", "taylor"]}, searches=3, vary="criterion")
    assert only(plan).trainings == 1
    pruned = [node.op for node in plan.nodes if isinstance(node.op, Prune)]
    assert [op.criterion for op in pruned] == ["magnitude", "random", "taylor"]
    assert [op.seed for op in pruned] == [None, 0, None]


def test_a_criterion_s_own_parameters_stay_with_the_trial_s_criterion() -> None:
    params = {"criterion": "taylor", "criteria.taylor.examples": 32}
    plan = trial({"criteria": ["magnitude", "snip"]}, searches=2, vary="criterion", **params)
    (gathered,) = [node.op for node in plan.nodes if isinstance(node.op, Gather)]
    assert gathered.examples != 32
    assert [node.op.parameters for node in plan.nodes if isinstance(node.op, Prune)] == [(), ()]


@pytest.mark.parametrize(
    ("params", "fields"),
    [
        ({"rule": "union"}, {"rule": "union"}),
        ({"rule": "at-least", "at_least": 2}, {"rule": "at-least", "least": 2}),
        ({"rule": "most-voted", "ticket_sparsity": 0.4}, {"rule": "most-voted", "sparsity": 0.4, "seed": 7}),
    ],
)
def test_the_rule_is_the_op_s(params: dict[str, Any], fields: dict[str, Any]) -> None:
    plan = trial(seed=7, searches=3, **params)
    assert op_of(plan, only(plan).start) == Combine(**fields)
    assert only(plan).rule == params["rule"]


def test_votes_travel_with_their_searches() -> None:
    votes = {"weights": [3, 1, 2]}
    plan = trial(votes, searches=3, rule="weighted")
    combine = node_of(plan, only(plan).start)
    assert isinstance(combine.op, Combine)
    assert combine.parents[:-1] == tuple(sorted(only(plan).searches))
    assert dict(zip(combine.parents, combine.op.weights, strict=False)) == dict(
        zip(only(plan).searches, (3.0, 1.0, 2.0), strict=True)
    )
    assert trial(votes, searches=3, rule="union") == trial(searches=3, rule="union")


# --- Controls ------------------------------------------------------------------------------------------------------


def controls(plan: Plan) -> dict[str, list[str]]:
    """The trained controls of the last ticket by kind."""
    found: dict[str, list[str]] = {}
    for each in plan.tickets[-1].controls:
        found.setdefault(each.kind, []).append(each.key)
    return found


def test_every_control_of_a_consensus_ticket() -> None:
    plan = trial({"controls": RIVALS}, searches=2, rounds=2)
    found = controls(plan)
    assert found.keys() == set(RIVALS)
    places = {node.key: place for place, node in enumerate(plan.nodes)}
    lines = told(plan)
    start = places[only(plan).start]
    by_kind = {kind: [lines[places[n.key]] for n in reversed(before(plan, keys[0]))] for kind, keys in found.items()}
    assert by_kind["dense"] == ["init()", "train 0-100(0)*"]
    assert by_kind["dense-long"] == ["init()", "train 0-300(0)*"]
    assert by_kind["shuffled"][-2:] == [f"shuffled({start}, 0)", f"train 0-100({places[found['shuffled'][0]] - 1})*"]
    assert by_kind["one-shot"][-3].startswith("prune like layers(1, ")
    assert [line.partition("(")[0] for line in by_kind["one-shot"][-2:]] == ["rewind", "train 0-100"]
    parts = [line.partition("(")[0] for line in by_kind["imp"] if line.startswith("prune like")]
    assert parts == [f"prune like layers {part}" for part in ("0.25", "0.5", "0.75")] + ["prune like layers"]


def assert_trained_alike(plan: Plan) -> None:
    """Every rival trains on the ticket's batches and to its end, but for the dense model that is trained as long."""
    ticket = op_of(plan, only(plan).key)
    for each in only(plan).controls:
        node = node_of(plan, each.key)
        assert node.evaluated and node.stored
        to = 200 if each.kind == "dense-long" else ticket.to
        assert node.op == replace(ticket, to=to), each.kind


def assert_over_dense_weights(plan: Plan) -> None:
    """No control starts from a trained state: its weights are the ancestor's, or another init's."""
    found = [node for node in plan.nodes if isinstance(node.op, Control)]
    for node in found:
        ticket, ancestor, *other = node.parents
        assert (ticket, ancestor) == (plan.tickets[-1].start, plan.tickets[-1].ancestor)
        assert isinstance(op_of(plan, ancestor), Init)
        assert all(isinstance(op_of(plan, key), Init) and key != ancestor for key in other)
    assert len(found) == 7


@pytest.mark.parametrize("vary", ["order", "data"])
def test_every_control_trains_in_the_ticket_s_order_on_all_data_and_to_its_end(vary: str) -> None:
    assert_trained_alike(trial({"controls": RIVALS, "draws": 2}, seed=5, searches=3, vary=vary))


def test_a_control_starts_from_the_dense_ancestor_and_never_from_a_trained_state() -> None:
    assert_over_dense_weights(trial({"controls": RIVALS}, rounds=2))


def test_a_control_in_an_order_of_its_own_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = Builder.train_on

    def in_another_order(self: Builder, start: str, **how: Any) -> str:
        if isinstance(self.nodes[start].op, Control):
            how["order_seed"] = 99
        return trained(self, start, **how)

    monkeypatch.setattr(Builder, "train_on", in_another_order)
    with pytest.raises(AssertionError, match="shuffled"):
        assert_trained_alike(trial({"controls": RIVALS}, seed=5, searches=3))


def test_a_control_over_trained_weights_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    added = Builder.add

    def over_the_dense_model(self: Builder, op: Any, parents: Sequence[str], **marks: Any) -> str:
        if isinstance(op, Control):
            parents = [parents[0], self.dense(), *parents[2:]]
        return added(self, op, parents, **marks)

    monkeypatch.setattr(Builder, "add", over_the_dense_model)
    with pytest.raises(PlanError, match="from step 100 to step 100, that is not at all"):
        trial({"controls": RIVALS}, rounds=2)


def test_a_control_over_the_ticket_itself_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    added = Builder.add

    def over_the_ticket(self: Builder, op: Any, parents: Sequence[str], **marks: Any) -> str:
        if isinstance(op, Control):
            parents = [parents[0], parents[0], *parents[2:]]
        return added(self, op, parents, **marks)

    monkeypatch.setattr(Builder, "add", over_the_ticket)
    with pytest.raises(AssertionError):
        assert_over_dense_weights(trial({"controls": RIVALS}, rounds=2))


def test_draws_differ_in_seed_and_kinds_draw_apart() -> None:
    plan = trial({"controls": RIVALS, "draws": 3}, seed=4)
    made = [node.op for node in plan.nodes if isinstance(node.op, Control)]
    drawn = [op for op in made if op.kind in ("shuffled", "random", "random-layer", "inverted")]
    assert len({op.seed for op in drawn}) == len(drawn) == 12
    assert {op.seed for op in made if op.kind == "reinitialised"} == {derive(4, "reinit", d) for d in range(3)}
    assert [len(keys) for keys in controls(plan).values()] == [1, 1, 1, *[3] * 7]
    assert "imp" not in controls(plan)  # one search is that itself


def test_a_reinit_s_seed_is_that_of_its_init() -> None:
    plan = trial({"controls": ["reinitialised", "sign-kept"]})
    for node in plan.nodes:
        if isinstance(node.op, Control):
            init = op_of(plan, node.parents[2])
            assert init == Init(seed=node.op.seed) and init.seed != 0


def test_dense_trained_as_long_is_as_long_as_the_search_is_deep() -> None:
    def long(**params: Any) -> int:
        plan = trial({"controls": ["dense-long"]}, **params)
        return int(op_of(plan, controls(plan)["dense-long"][0]).to)

    assert long(rounds=4) == 500
    assert long(searches=5, rounds=2) == 300  # not eleven trainings: they are side by side
    assert long(phase="before", retrain="none") == 100


def test_a_search_over_all_layers_is_compared_over_all_layers() -> None:
    plan = trial({"controls": ["one-shot"]}, scope="global")
    (like,) = [node.op for node in plan.nodes if isinstance(node.op, Prune) and node.op.like]
    assert (like.scope, like.like, like.floor) == ("global", "overall", 1)


def test_only_the_asked_for_rounds_are_compared() -> None:
    assert [len(t.controls) for t in trial({"controls": ["dense"]}, rounds=3).tickets] == [0, 0, 1]
    assert [len(t.controls) for t in trial({"controls": ["dense"], "rounds": [1, 3]}, rounds=3).tickets] == [1, 0, 1]


def test_controls_are_no_points() -> None:
    plan = trial({"controls": RIVALS}, searches=2, rounds=2)
    assert plan.points == ((2, only(plan).key),)
    assert not {key for _, key in plan.points} & {each.key for each in only(plan).controls}


def test_more_rounds_repeat_nothing() -> None:
    short, long = (trial({"controls": ["dense", "shuffled"], "rounds": [2]}, rounds=rounds) for rounds in (2, 4))
    assert {node.key for node in short.nodes} < {node.key for node in long.nodes}
    assert short.tickets == long.tickets[:2]


def test_pruning_before_training_is_compared_too() -> None:
    plan = trial({"controls": ["missing-the-mark"]}, phase="before", retrain="none", criterion="snip")
    ticket = only(plan)
    assert (ticket.depth, ticket.trainings) == (0, 0) and tuple(controls(plan)) == MISSING_THE_MARK
    assert ticket.ancestor == plan.nodes[0].key


@pytest.mark.parametrize(
    "params",
    [
        {"retrain": "finetune"},
        {"retrain": "none"},
        {"retrain": "reinit"},
        {"phase": "during", "retrain": "none"},
        {"phase": "before", "retrain": "none", "regrow": "rigl", "regrow_every": 1},
    ],
)
def test_what_is_no_ticket_is_compared_with_nothing(params: dict[str, Any]) -> None:
    assert trial({"controls": ["dense"]}, **params).tickets == ()


# --- What is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tickets", "params", "says"),
    [
        ({}, {"retrain": "finetune", "searches": 2}, "legal with them: phase 'after' with retrain 'rewind'"),
        ({}, {"phase": "before", "retrain": "none", "searches": 2}, "legal with them: phase 'after'"),
        ({}, {"structure": "neuron", "searches": 2}, "masks of single weights are combined, not of structure 'neuron'"),
        ({}, {"rule": "at-least", "searches": 3}, "rule 'at-least' and at_least = 1 to 3 "),
        ({}, {"rule": "at-least", "at_least": 4, "searches": 3}, "at_least = 1 to 3 "),
        ({}, {"rule": "union", "at_least": 2, "searches": 3}, "rule 'at-least' and at_least = 1 to 3 "),
        ({}, {"rule": "most-voted", "searches": 3}, "rule 'most-voted' and ticket_sparsity go together"),
        ({}, {"ticket_sparsity": 0.5, "searches": 3}, "rule 'most-voted' and ticket_sparsity go together"),
        ({}, {"rule": "weighted", "searches": 3}, r"one vote for each of the 3 searches; \[tickets\] weights gives 0"),
        ({"weights": [1, 2]}, {"rule": "weighted", "searches": 3}, "weights gives 2"),
        ({}, {"vary": "criterion", "searches": 3}, r"one criterion for each of the 3 searches; .* names 0"),
        ({"criteria": ["magnitude", "snip"]}, {"vary": "criterion", "searches": 3}, "names 2"),
        (
            {"criteria": ["magnitude", "movement"]},
            {"vary": "criterion", "searches": 2},
            "'movement' is gathered while training",
        ),
        ({"controls": ["dense"]}, {"structure": "neuron"}, "controls are drawn weight by weight; structure 'neuron'"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(
    tickets: dict[str, Any], params: dict[str, Any], says: str
) -> None:
    with pytest.raises(PlanError, match=says) as refused:
        trial(tickets, **params)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("tickets", "says"),
    [
        ({"controls": ["shufled"]}, "no control is called 'shufled'|shuffled"),
        ({"criteria": ["magnitud"]}, "magnitude"),
        ({"criteria": ["magnitude", "magnitude"]}, "named twice"),
        ({"weights": [1, 0]}, "a search's vote weighs 0; legal: above 0"),
        ({"draws": 0}, "draws"),
    ],
)
def test_a_wrong_tickets_table_is_refused(tickets: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        TicketSettings(**tickets)


def test_new_weights_that_cannot_be_had_are_refused() -> None:
    info = replace(INFO, comes_trained=True, init_varies=False)
    with pytest.raises(PlanError, match="control 'reinitialised' needs new weights"):
        trial({"controls": ["reinitialised"]}, info=info)
