"""From a proposal to stages: what each retraining mode and phase means, to the step, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import PlanError
from orchestrator.mixes import resolve
from orchestrator.ops import SHRUNK, Gather, Init, Prune, Recalibrate, Regrow, Rewind, Train
from orchestrator.plan import Node, Plan
from orchestrator.planning.pruning import by_pattern
from orchestrator.planning.trial import dense_plan, trial_plan
from orchestrator.pruning import schedules
from orchestrator.pruning.criteria import CRITERIA
from orchestrator.seeds import derive
from orchestrator.settings import PruneSettings, Settings, TrainSettings
from orchestrator.tasks.info import Layer, TaskInfo, UnitCounts

INFO = TaskInfo(
    digest="t",
    layers=(
        Layer(name="conv.0.weight", shape=(4, 5)),
        Layer(name="conv.1.weight", shape=(8, 5)),
        Layer(name="out.weight", shape=(10, 4)),
    ),
    train_examples=95,
)
"""100 weights; 10 steps an epoch at batch size 10, the last batch smaller."""
TRAIN = TrainSettings(epochs=10, retrain_epochs=4, batch_size=10)
COSINE = {"lr_schedule": "cosine"}


def chosen(prune: dict[str, Any] | None = None, **params: Any) -> Settings:
    """The settings of a trial; by default one round at rate 0.2, fine-tuned."""
    much = {"rate", "sparsity", "threshold", "flops_budget", "params_budget"} & params.keys()
    return resolve(TRAIN, PruneSettings(**prune or {}), ({} if much else {"rate": 0.2}) | params)


def trial(prune: dict[str, Any] | None = None, seed: int = 0, info: TaskInfo = INFO, **params: Any) -> Plan:
    return trial_plan(chosen(prune, **params), seed, info)


def prunes(plan: Plan) -> list[Prune]:
    return [node.op for node in plan.nodes if isinstance(node.op, Prune)]


def told(plan: Plan) -> list[str]:
    """A plan as text: each stage with its parents by their place, `*` where it is a point, `+` where it is stored."""
    places = {node.key: place for place, node in enumerate(plan.nodes)}

    def line(node: Node) -> str:
        match node.op:
            case Init(seed=seed):
                name = "init" if seed == 0 else "init'"
            case Train(to=to, fresh_optimizer=fresh):
                name = f"train {node.start}-{to}{' fresh' if fresh else ''}{' resumable' if node.resumable else ''}"
            case Prune():
                name = "prune"
            case Gather(what=(what,)):
                name = f"gather {what}"
            case Regrow(by=by):
                name = f"regrow {by}"
            case Recalibrate():
                name = "recalibrate"
            case Rewind(what=what, to=to):
                name = f"rewind {what}" + ("" if to is None else f" {to}")
        mark = "*" if node.evaluated else "+" if node.stored else ""
        return f"{name}({', '.join(str(places[parent]) for parent in node.parents)}){mark}"

    return [line(node) for node in plan.nodes]


# Every mode of retraining, to the step.


@pytest.mark.parametrize(
    ("params", "lines", "steps"),
    [
        ({"retrain": "none"}, ["init()", "train 0-100(0)*", "prune(1)*", "prune(2)*"], 100),
        (
            {"retrain": "finetune"},
            [
                *["init()", "train 0-100(0)*", "prune(1)", "train 100-140 fresh(2)*"],
                *["prune(3)", "train 140-180 fresh(4)*"],
            ],
            180,
        ),
        (
            {"retrain": "rewind", "rewind_epoch": 1},
            [
                *["init()", "train 0-10 resumable(0)+", "train 0-100(0)*"],
                *["prune(2)", "rewind weights(3, 1)", "train 10-100(4)*"],
                *["prune(5)", "rewind weights(6, 1)", "train 10-100(7)*"],
            ],
            280,
        ),
        (
            {"retrain": "rewind", "rewind_epoch": 0},
            [
                *["init()", "train 0-100(0)*", "prune(1)", "rewind weights(2, 0)", "train 0-100(3)*"],
                *["prune(4)", "rewind weights(5, 0)", "train 0-100(6)*"],
            ],
            300,
        ),
        (
            {"retrain": "lr-rewind", **COSINE},
            [
                *["init()", "train 0-100(0)*", "prune(1)", "rewind lr 60(2)", "train 60-100(3)*"],
                *["prune(4)", "rewind lr 60(5)", "train 60-100(6)*"],
            ],
            180,
        ),
        (
            {"retrain": "reinit"},
            [
                *["init'()", "init()", "train 0-100(1)*", "prune(2)", "rewind weights(3, 0)", "train 0-100(4)*"],
                *["prune(5)", "rewind weights(6, 0)", "train 0-100(7)*"],
            ],
            300,
        ),
    ],
)
def test_retraining(params: dict[str, Any], lines: list[str], steps: int) -> None:
    plan = trial(rounds=2, **params)
    assert told(plan) == lines
    assert plan.steps_by_task[""] == steps
    assert [number for number, _ in plan.points] == [1, 2]
    evaluated = [node.key for node in plan.nodes if node.evaluated]
    assert [key for _, key in plan.points] == evaluated[1:]


def test_pruning_before_training() -> None:
    plan = trial(phase="before", rounds=2)
    assert told(plan) == ["init()", "prune(0)", "prune(1)", "train 0-100(2)*"]
    assert plan.steps_by_task[""] == 100 and [number for number, _ in plan.points] == [2]


def test_pruning_during_training_keeps_the_optimizer() -> None:
    plan = trial(phase="during", rounds=3, prune_begin=2, prune_end=8)
    assert told(plan) == [
        *["init()", "train 0-20 resumable(0)+", "prune(1)", "train 20-50 resumable(2)", "prune(3)"],
        *["train 50-80 resumable(4)", "prune(5)", "train 80-100(6)*"],
    ]
    assert plan.steps_by_task[""] == 100 and [number for number, _ in plan.points] == [3]


def test_pruning_during_training_goes_from_a_quarter_to_three_quarters() -> None:
    assert told(trial(phase="during", rounds=2))[1::2] == [
        "train 0-25 resumable(0)+",
        "train 25-75 resumable(2)",
        "train 75-100(4)*",
    ]


def test_a_model_that_comes_trained() -> None:
    info = TaskInfo(digest="t", layers=INFO.layers, train_examples=95, comes_trained=True)
    assert told(trial(info=info, epochs=0)) == ["init()*", "prune(0)", "train 0-40 fresh(1)*"]
    inits = [node.op for node in trial(info=info, retrain="reinit").nodes if isinstance(node.op, Init)]
    assert inits == [Init(seed=derive(0, "reinit"), fresh=True), Init(seed=0)]


def test_dense_training_with_cuts() -> None:
    plan = dense_plan(TRAIN, 3, INFO, cuts=(2, 0, 1, 10, 12))
    assert told(plan) == ["init'()", "train 0-10 resumable(0)+", "train 0-20 resumable(0)+", "train 0-100(0)*"]
    assert plan.steps_by_task[""] == 100 and [number for number, _ in plan.points] == [0]


def test_a_rewind_point_in_steps_is_the_same_as_in_epochs() -> None:
    assert trial(retrain="rewind", rewind_epoch=0.5) == trial(retrain="rewind", rewind_step=5)
    assert trial(retrain="rewind", rewind_step=0) == trial(retrain="rewind")


def test_the_seed_of_a_run_builds_orders_and_draws() -> None:
    plan = trial(seed=5, criterion="random", rounds=2)
    assert isinstance(plan.nodes[0].op, Init) and plan.nodes[0].op.seed == 5
    assert all(node.op.order_seed == 5 for node in plan.nodes if isinstance(node.op, Train))
    assert [(op.seed, op.round) for op in prunes(plan)] == [(5, 1), (5, 2)]
    assert [(op.seed, op.round) for op in prunes(trial(seed=5, rounds=2))] == [(None, None)] * 2


# The recipe: nothing that makes no difference.


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"momentum": 0.9}),
        ({}, {"lr_final_fraction": 0.5}),
        ({}, {"lr_step_factor": 0.5}),
        ({}, {"lr_step_epochs": (1, 2)}),
        ({}, {"schedule": "cubic"}),
        ({}, {"rewind_epoch": 2}),
        ({}, {"threshold_unit": "std"}),
        ({"threshold": 0.1}, {"threshold": 0.1, "scope": "global"}),
        ({"sparsity": 0.9, "schedule": "linear"}, {"sparsity": 0.9, "schedule": "cubic"}),
        ({"sparsity": 0.9, "schedule": "linear"}, {"sparsity": 0.9, "schedule": "one-shot"}),
        ({"phase": "before"}, {"phase": "before", "retrain": "none", "retrain_epochs": 7}),
    ],
)
def test_equal_plans_have_equal_keys(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert trial(**one) == trial(**other)


@pytest.mark.parametrize(
    "params",
    [
        *[{"rate": 0.3}, {"scope": "global"}, {"criterion": "random"}, {"criterion": "taylor"}, {"sparsity": 0.2}],
        *[{"lr": 0.1}, {"optimizer": "adamw"}, {"batch_size": 20}, {"weight_decay": 0.1}, {"warmup_epochs": 1}],
        *[{"lr_schedule": "step"}, {"lr_schedule": "linear"}, COSINE, {"retrain_epochs": 3}, {"threshold": 0.2}],
        *[{"optimizer": "sgd"}, {"optimizer": "sgd", "momentum": 0.9}, {"allocation": "erk", "sparsity": 0.2}],
        *[{"criterion": "taylor", "criteria.taylor.examples": 64}, {"threshold": 0.2, "threshold_unit": "std"}],
    ],
)
def test_what_makes_a_difference_is_in_the_key(params: dict[str, Any]) -> None:
    differing = [trial(), trial(**params)]
    assert differing[0].points[-1] != differing[1].points[-1]


def test_dense_training_is_shared_under_any_length_but_only_without_a_horizon() -> None:
    def dense(**train: Any) -> Node:
        return dense_plan(TrainSettings(batch_size=10, **train), 0, INFO).nodes[-1]

    cut = dense_plan(TRAIN, 0, INFO, cuts=(3,)).nodes[1]
    assert dense(epochs=3).key == cut.key
    cosine = dense_plan(TrainSettings(epochs=10, batch_size=10, lr_schedule="cosine"), 0, INFO, cuts=(3,)).nodes[1]
    assert dense(epochs=3, lr_schedule="cosine").key != cosine.key


@given(rounds=st.integers(1, 5), rate=st.sampled_from([0.1, 0.2]), retrain=st.sampled_from(["finetune", "rewind"]))
def test_the_first_rounds_of_a_trial_are_the_shorter_trial(rounds: int, rate: float, retrain: str) -> None:
    longer = trial(rounds=rounds + 1, rate=rate, retrain=retrain)
    shorter = trial(rounds=rounds, rate=rate, retrain=retrain)
    assert longer.points[:rounds] == shorter.points
    assert {node.key for node in shorter.nodes} < {node.key for node in longer.nodes}


@given(
    rounds=st.integers(1, 8),
    phase=st.sampled_from(["before", "after"]),
    criterion=st.sampled_from(["magnitude", "random"]),
)
def test_each_stage_comes_after_its_parents_once(rounds: int, phase: str, criterion: str) -> None:
    plan = trial(rounds=rounds, phase=phase, criterion=criterion)
    keys = [node.key for node in plan.nodes]
    assert len(set(keys)) == len(keys)
    assert all(parent in keys[:place] for place, node in enumerate(plan.nodes) for parent in node.parents)
    assert all(node.stored for node in plan.nodes if node.evaluated)


# How much.


@pytest.mark.parametrize("schedule", ["linear", "exponential", "cubic"])
def test_a_final_sparsity_is_resolved_to_targets(schedule: str) -> None:
    plan = trial(sparsity=0.9, rounds=4, schedule=schedule)
    assert [op.sparsity for op in prunes(plan)] == schedules.targets(schedule, 0.9, 4)
    assert prunes(plan)[-1].sparsity == 0.9


def test_factors_and_ignored_layers_by_pattern() -> None:
    (op,) = prunes(trial({"layer_factors": {"*.out": 0.5, "conv.0": 1.0}, "ignore": ["conv.1"]}))
    assert op.factors == (("conv.1.weight", 0.0), ("out.weight", 0.5))


def test_a_later_pattern_wins() -> None:
    assert by_pattern({"conv*": 0.5, "conv.1": 2.0}, INFO, "here") == {"conv.0.weight": 0.5, "conv.1.weight": 2.0}
    assert by_pattern({"conv.0.weight": 0.5}, INFO, "here") == {"conv.0.weight": 0.5}


def test_targets_of_layers() -> None:
    (op,) = prunes(trial(**{"layers.conv*.rate": 0.4}))
    assert op.rate == 0.2 and op.targets == (("conv.0.weight", 0.4), ("conv.1.weight", 0.4))
    given_ = {"sparsity": 0.5, "allocation": "given", "layers.out.sparsity": 0.75}
    ops = prunes(trial(rounds=2, schedule="linear", **given_))
    assert [op.targets for op in ops] == [(("out.weight", 0.375),), (("out.weight", 0.75),)]


# What is gathered, and what grows back.


def gathers(plan: Plan) -> list[Node]:
    return [node for node in plan.nodes if isinstance(node.op, Gather)]


def test_what_a_criterion_needs_of_the_data_is_gathered_before_each_pruning() -> None:
    assert told(trial(criterion="taylor", rounds=2)) == [
        *["init()", "train 0-100(0)*", "gather gradient(1)+", "prune(1, 2)", "train 100-140 fresh(3)*"],
        *["gather gradient(4)", "prune(4, 5)", "train 140-180 fresh(6)*"],
    ]


def test_criteria_with_the_same_needs_share_what_is_gathered() -> None:
    def key(**params: Any) -> str:
        return gathers(trial(**params))[0].key

    assert key(criterion="taylor") == key(criterion="snip") == key(criterion="gradient", rate=0.5)
    assert key(criterion="taylor") != key(criterion="taylor", **{"criteria.taylor.examples": 64})
    assert key(criterion="taylor") != key(criterion="wanda")
    assert key(criterion="obs") == key(criterion="obs", **{"criteria.obs.damping": 0.1})
    assert key(criterion="obs") != key(criterion="obs", **{"criteria.obs.block": 8})


def test_parameters_go_where_they_are_used() -> None:
    plan = trial(criterion="obs", **{"criteria.obs.damping": 0.1, "criteria.obs.block": 8})
    (op,), (node,) = prunes(plan), gathers(plan)
    assert op.parameters == (("damping", 0.1),) and (op.seed, op.round) == (None, None)
    assert isinstance(node.op, Gather) and dict(node.op.parameters)["block"] == 8
    assert not node.stored, "a Hessian is many times the size of the weights"


def test_a_criterion_may_draw_and_take_data() -> None:
    CRITERIA.bind("mine:criterion", lambda weight, gradient, generator: weight)
    try:
        plan = trial(criterion="mine:criterion", rounds=2)
    finally:
        CRITERIA._of_users.pop("mine:criterion")
    assert [(op.seed, op.round) for op in prunes(plan)] == [(0, 1), (0, 2)] and len(gathers(plan)) == 2


def test_norms_are_set_after_each_pruning() -> None:
    assert told(trial({"recalibrate": 64}, retrain="none", rounds=2))[2:] == [
        *["prune(1)", "recalibrate(2)*", "prune(3)", "recalibrate(4)*"],
    ]


def test_movement_is_gathered_at_every_step_and_nothing_is_stored_for_it() -> None:
    plan = trial(criterion="movement", phase="during", rounds=3)
    assert [node.stored for node in plan.nodes if isinstance(node.op, Train)] == [True, False, False, True]
    assert all(node.op.recipe.gather == ("movement",) for node in plan.nodes if isinstance(node.op, Train))


def test_weights_that_are_replaced_while_training() -> None:
    plan = trial(phase="before", criterion="random", sparsity=0.5, regrow="rigl", regrow_every=3, regrow_end=7)
    assert told(plan) == [
        *["init()", "prune(0)", "train 0-30 resumable(1)", "gather gradient(2)", "regrow rigl(2, 3)"],
        *["train 30-60 resumable(4)", "gather gradient(5)", "regrow rigl(5, 6)", "train 60-100(7)*"],
    ]
    fractions = [node.op.fraction for node in plan.nodes if isinstance(node.op, Regrow)]
    assert fractions[0] < 0.3 and fractions == sorted(fractions, reverse=True) and fractions[-1] > 0
    draws = trial(phase="before", sparsity=0.5, regrow="set")
    assert [node.op.round for node in draws.nodes if isinstance(node.op, Regrow)] == [1, 2, 3, 4, 5, 6, 7]


def test_masks_that_open_between_prunings() -> None:
    assert told(trial(phase="during", rate=0.9, rounds=2, regrow="all", prune_begin=2, prune_end=6)) == [
        *["init()", "train 0-20 resumable(0)+", "prune(1)", "train 20-40 resumable(2)", "regrow all(3)"],
        *["train 40-60 resumable(4)", "prune(5)", "train 60-100(6)*"],
    ]


def test_prunings_every_so_often() -> None:
    said = {"phase": "during", "sparsity": 0.9, "prune_begin": 2, "prune_end": 5.9}
    assert trial(**said, prune_every=1) == trial(**said, prune_every_steps=10)
    ends = [node.op.to for node in trial(**said, prune_every=1.5).nodes if isinstance(node.op, Train)]
    assert ends == [20, 35, 50, 100]
    with pytest.raises(PlanError, match="every 0.5 steps, 10 to an epoch; legal: every step at most"):
        trial(**said, prune_every=0.05)


def test_only_what_follows_a_pruning_is_trained_shrunk() -> None:
    units = {"neuron": UnitCounts(groups={"conv.0.weight": {("conv.0.weight",): 4}})}
    info = replace(INFO, units=units)
    plan = trial(info=info, structure="neuron", rate=0.5, shrunk=True, retrain="rewind", rewind_epoch=1)
    shrunk = [node.op.recipe.arithmetic.endswith(SHRUNK) for node in plan.nodes if isinstance(node.op, Train)]
    assert shrunk == [False, False, True]
    assert trial(shrunk=True) == trial(), "single weights cannot be cut away"


@pytest.mark.parametrize("amount", [{"flops_budget": 0.4}, {"params_budget": 0.4}])
def test_budgets_fall_to_the_end(amount: dict[str, float]) -> None:
    (name,) = amount
    left = [getattr(op, name) for op in prunes(trial(**amount, rounds=3, schedule="linear"))]
    assert left == [0.8, 0.6, 0.4]


def test_only_one_layer() -> None:
    (op,) = prunes(trial(only="conv.0"))
    assert op.factors == (("conv.1.weight", 0.0), ("out.weight", 0.0))


# What is refused, with the reason.


@pytest.mark.parametrize(
    ("prune", "params", "message"),
    [
        ({"ignore": ["fc*"]}, {}, "prune.ignore: no prunable layer matches 'fc*'; there are: conv.0, conv.1, out"),
        ({"layer_factors": {"fc": 0.5}}, {}, "prune.layer_factors: no prunable layer matches 'fc'"),
        ({}, {"layers.fc.rate": 0.5}, "space.layers: no prunable layer matches 'fc'"),
        ({"ignore": ["*"]}, {}, "every prunable layer is ignored"),
        ({"layer_factors": {"out": 0.5}}, {"scope": "global"}, "legal with them: scope = 'layer'"),
        ({}, {"scope": "global", "layers.out.rate": 0.5}, "legal with them: scope = 'layer'"),
        ({"layer_factors": {"out": 0.5}}, {"threshold": 0.1}, "not a threshold"),
        ({"layer_factors": {"out": 0.5}}, {"sparsity": 0.5, "allocation": "erk"}, "legal: 'uniform'"),
        ({"ignore": ["out"]}, {"layers.out.rate": 0.5}, "'out.weight' has a target of its own"),
        ({"layer_factors": {"out": 6.0}}, {}, "the rate in 'out.weight' comes to 1.2; legal: below 1"),
        (
            {},
            {"rate": 0.9, "rounds": 2},
            "round 2 of 2 leaves no weight in layer 'conv.0': prune less, or fewer rounds",
        ),
        ({}, {"rate": 0.99, "rounds": 2, "scope": "global"}, "round 2 of 2 leaves no weight in the network"),
        ({"ignore": ["conv*"]}, {"sparsity": 0.9}, "only 40 are not protected"),
        ({}, {"retrain": "rewind", "rewind_step": 100}, "not at all"),
        ({}, {"phase": "during", "rounds": 60}, "60 prunings from step 25 to step 75 of 100 need steps of their own"),
        ({}, {"phase": "during", "rounds": 2, "prune_begin": 2, "prune_end": 2}, "legal: fewer rounds"),
        ({}, {"phase": "during", "prune_begin": 0.01, "prune_end": 2}, "with training before and after"),
        ({}, {"retrain_epochs": 0.01}, "not at all"),
    ],
)
def test_refused(prune: dict[str, Any], params: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        trial(prune, **params)
    assert message in str(caught.value)
    assert str(caught.value).count("\n") == 0


def test_reinit_wants_weights_that_vary() -> None:
    fixed = replace(INFO, init_varies=False)
    with pytest.raises(PlanError, match="the same ones under every seed; legal with it: a Task with fresh"):
        trial_plan(chosen(rate=0.5, retrain="reinit"), 0, fixed)


def test_a_budget_below_what_is_never_pruned_is_refused() -> None:
    info = replace(INFO, parameters=200)  # of which 100 are prunable
    assert trial(info=info, params_budget=0.6)
    with pytest.raises(PlanError, match=r"^params_budget 0.4 cannot be met: .* leaves at least 0.515 of the param"):
        trial(info=info, params_budget=0.4)  # each of three layers keeps a weight
    with pytest.raises(PlanError, match=r"at least 0.61 of the parameters .*; legal: 0.61 or more$"):
        trial({"ignore": ["conv.0"]}, info=info, params_budget=0.55)


def test_a_block_as_large_as_every_layer_is_refused() -> None:
    with pytest.raises(PlanError, match=r"^structure '50x50' fits no layer: every layer is a single block"):
        trial(structure="50x50", rate=0.5)
