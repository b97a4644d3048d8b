"""Merging plans: what is given out, what is waited for, what failure takes with it, and that nothing is run twice."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.errors import PlanError
from orchestrator.graph import Facts, Graph, Segment, Step
from orchestrator.mixes import resolve
from orchestrator.ops import Init, Prune, Rewind, Train
from orchestrator.plan import Plan
from orchestrator.planning.trial import dense_plan, trial_plan
from orchestrator.settings import PruneSettings, TrainSettings
from orchestrator.tasks.info import Layer, TaskInfo

INFO = TaskInfo(
    digest="t", layers=(Layer(name="a.weight", shape=(20, 10)), Layer(name="b.weight", shape=(40,))), train_examples=10
)
"""10 steps an epoch at batch size 1."""
TRAIN = TrainSettings(epochs=10, retrain_epochs=4, batch_size=1)
NOTHING = Facts()


def nothing(key: str) -> Facts:
    """A new store."""
    return NOTHING


def trial(seed: int = 0, **params: Any) -> Plan:
    """The plan of a trial; by default one round at rate 0.2, fine-tuned."""
    return trial_plan(resolve(TRAIN, PruneSettings(), {"rate": 0.2} | params), seed, INFO)


def dense(epochs: float = 10, cuts: tuple[float, ...] = ()) -> Plan:
    """Dense training under a constant learning rate, so that all lengths are cuts of one run."""
    return dense_plan(TrainSettings(epochs=epochs, batch_size=1), 0, INFO, cuts=cuts)


def names(segment: Segment) -> list[str]:
    """The segment's steps as text: the verb, where training is cut, and where it goes on."""

    def name(step: Step) -> str:
        return f"train {step.op.to - step.steps}-{step.op.to}" if isinstance(step.op, Train) else type(step.op).__name__

    return [name(step) for step in segment.steps]


def finish(graph: Graph, segment: Segment) -> None:
    """Report every stage of the segment as run."""
    for step in segment.steps:
        if step.evaluated or step.stored:
            graph.done(step.key, Facts(known=True, present=step.stored, resumable=step.resumable))
    graph.give_back(segment)


def run_all(graph: Graph) -> list[Segment]:
    """Run whatever becomes ready, one segment at a time."""
    ran = []
    while (segment := next(graph.ready(), None)) is not None:
        finish(graph, segment)
        ran.append(segment)
    return ran


# What is given out, by example.


def test_the_drawing_of_the_design() -> None:
    plan = trial(rounds=2, retrain="rewind", rewind_epoch=1)
    graph = Graph()
    graph.add(plan, nothing)
    (segment,) = graph.ready()
    assert names(segment) == [
        *["Init", "train 0-10", "train 10-100"],
        *["Prune", "Rewind", "train 10-100", "Prune", "Rewind", "train 10-100"],
    ]
    assert [step.evaluated for step in segment.steps if step.stored] == [False, True, True, True]
    assert [step.resumable for step in segment.steps if step.stored] == [True, False, False, False]
    assert segment.cost == plan.steps_by_task[""] == 280
    assert segment.base == frozenset()


def test_a_branch_ends_a_segment_and_the_longer_way_goes_first() -> None:
    graph = Graph()
    graph.add(trial(rounds=1), nothing)
    graph.add(trial(rounds=2, rate=0.3), nothing)
    first = next(graph.ready())
    assert names(first) == ["Init", "train 0-100"]
    assert list(graph.ready()) == []
    finish(graph, first)
    assert [names(segment) for segment in graph.ready()] == [
        ["Prune", "train 100-140", "Prune", "train 140-180"],
        ["Prune", "train 100-140"],
    ]


def test_a_fork_of_which_one_branch_still_waits_is_none() -> None:
    graph = Graph()
    for epoch in (1, 2):
        graph.add(trial(retrain="rewind", rewind_epoch=epoch), nothing)
    assert [names(segment) for segment in graph.ready()] == [["Init", "train 0-10", "train 10-20", "train 20-100"]]


def test_stages_are_given_out_once_and_again_when_given_back() -> None:
    graph = Graph()
    graph.add(trial(), nothing)
    (segment,) = graph.ready()
    assert list(graph.ready()) == []
    graph.give_back(segment)
    (again,) = graph.ready()
    assert again.steps == segment.steps and again.number != segment.number


def test_what_is_left_after_a_report() -> None:
    graph = Graph()
    graph.add(trial(rounds=2), nothing)
    (segment,) = graph.ready()
    trained = [step.key for step in segment.steps if step.stored]
    left = segment.after(trained[0])
    assert names(left) == ["Prune", "train 100-140", "Prune", "train 140-180"]
    assert left.base == {trained[0]}
    assert left.after(trained[1]).after(trained[2]).steps == ()


def test_an_unstored_stage_that_is_needed_again_stays_in_what_is_left() -> None:
    def step(key: str, *inputs: str, stored: bool) -> Step:
        return Step(key=key, op=Init(seed=0), inputs=inputs, stored=stored)

    steps = step("p", "d", stored=False), step("q", "p", stored=True), step("r", "p", "q", stored=True)
    segment = Segment(number=1, steps=steps)
    assert [s.key for s in segment.after("q").steps] == ["p", "r"]
    assert segment.after("q").base == {"d", "q"}


# Facts: known and present are two things.


def test_what_is_known_is_not_run_and_what_is_present_is_gone_on_from() -> None:
    plan = trial(rounds=2)
    first, second = plan.points[0][1], plan.points[1][1]
    there = {first: Facts(known=True, present=True)}
    graph = Graph()
    graph.add(plan, lambda key: there.get(key, Facts(known=key != second)))
    (segment,) = graph.ready()
    assert names(segment) == ["Prune", "train 140-180"]
    assert segment.base == {first}
    assert graph.known(first) and not graph.known(second)


def test_a_known_state_that_is_gone_is_made_again_but_not_measured() -> None:
    plan = trial(rounds=2)
    graph = Graph()
    graph.add(plan, lambda key: Facts(known=key != plan.points[-1][1]))
    (segment,) = graph.ready()
    assert [s.evaluated for s in segment.steps if s.stored] == [False, False, True]


@pytest.mark.parametrize("plan", [dense(10), trial(retrain="none")])
def test_a_present_state_without_an_outcome_is_measured_and_not_made_again(plan: Plan) -> None:
    point = plan.points[-1][1]
    graph = Graph()
    graph.add(plan, lambda key: Facts(known=key != point, present=key == point))
    (segment,) = graph.ready()
    (step,) = segment.steps
    assert step.evaluated and step.inputs == (step.key,) and step.steps == 0
    assert segment.base == {point}


def test_a_rewind_point_without_its_optimizer_is_trained_again_on_the_way() -> None:
    plan = trial(retrain="rewind", rewind_epoch=1)
    graph = Graph()
    graph.add(plan, lambda key: Facts(known=True, present=True) if key != plan.points[-1][1] else NOTHING)
    assert [names(segment) for segment in graph.ready()] == [["Init", "train 0-10", "Prune", "Rewind", "train 10-100"]]


def test_stages_that_nobody_needs_are_not_run() -> None:
    graph = Graph()
    graph.add(dense(10, cuts=(1, 2)), lambda key: Facts(known=True, present=False))
    assert list(graph.ready()) == []


# Runs of training and their cuts.


def test_a_cut_is_gone_on_from_when_its_optimizer_is_there() -> None:
    plan = dense(10, cuts=(3,))
    for resumable, way in ((True, ["train 30-100"]), (False, ["Init", "train 0-30", "train 30-100"])):
        graph = Graph()
        cut = next(n.key for n in plan.nodes if isinstance(n.op, Train) and n.op.to == 30)
        graph.add(plan, lambda key, cut=cut, r=resumable: Facts(present=True, resumable=r) if key == cut else NOTHING)
        (segment,) = graph.ready()
        assert names(segment) == way


def test_lengths_of_one_run_are_trained_once() -> None:
    graph = Graph()
    for epochs in (10, 3, 5):
        graph.add(dense(epochs), nothing)
    (segment,) = graph.ready()
    assert names(segment) == ["Init", "train 0-30", "train 30-50", "train 50-100"]
    assert [s.resumable for s in segment.steps if s.stored] == [True, True, False]
    assert all(s.evaluated for s in segment.steps if s.stored)


def test_a_longer_run_does_not_wait_for_a_cut_that_will_leave_no_optimizer() -> None:
    graph = Graph()
    graph.add(dense(3), nothing)
    (running,) = graph.ready()
    assert not running.steps[-1].resumable
    graph.add(dense(10), nothing)
    (longer,) = graph.ready()
    assert names(longer) == ["Init", "train 0-100"]


def test_a_cut_that_is_given_back_learns_that_it_is_to_be_gone_on_from() -> None:
    graph = Graph()
    graph.add(dense(3), nothing)
    (running,) = graph.ready()
    graph.add(dense(10), nothing)
    graph.give_back(running)
    (segment,) = graph.ready()
    assert names(segment) == ["Init", "train 0-30", "train 30-100"]
    assert [s.resumable for s in segment.steps] == [False, True, False]


def test_a_longer_run_waits_for_a_cut_that_is_being_made() -> None:
    graph = Graph()
    graph.add(dense(3), nothing)
    graph.add(dense(5), nothing)
    running = next(graph.ready())
    assert names(running) == ["Init", "train 0-30", "train 30-50"]
    graph.add(dense(4), nothing)  # goes on from 3, whose optimizer is to be stored
    assert list(graph.ready()) == []
    cut = running.steps[1]
    graph.done(cut.key, Facts(known=True, present=True, resumable=True))
    assert [names(segment) for segment in graph.ready()] == [["train 30-40"]]


def test_training_that_two_plans_share_is_stored_between_them() -> None:
    def during(rounds: int, **params: Any) -> Plan:
        return trial(phase="during", prune_begin=2, prune_end=8, rounds=rounds, retrain="none", **params)

    graph = Graph()
    graph.add(during(3), nothing)
    graph.add(during(3, rate=0.4), nothing)
    graph.add(during(2), nothing)
    ran = run_all(graph)
    assert names(ran[0]) == ["Init", "train 0-20"]
    # 20-50, 50-80 and 80-100 of each; the first and the last share 20-50 too, after the same first pruning.
    assert sum(s.cost for s in ran) == 20 + 80 + 80 + 80 - 30


def test_training_that_no_plan_stores_is_stored_where_two_plans_part() -> None:
    params: dict[str, Any] = {"phase": "during", "prune_begin": 2, "prune_end": 4, "rounds": 2, "rate": None}
    graph = Graph()
    graph.add(trial(sparsity=0.5, schedule="linear", **params), nothing)  # a quarter, then a half
    graph.add(
        trial(sparsity=0.4375, schedule="exponential", **params), nothing
    )  # a quarter, then a quarter of the rest
    ran = run_all(graph)
    assert names(ran[0]) == ["Init", "train 0-20", "Prune", "train 20-40"]
    assert [names(segment) for segment in ran[1:]] == [["Prune", "train 40-100"]] * 2


# What several plans want of one stage, while it is run and after.


def test_an_outcome_wanted_of_a_stage_that_is_being_run_is_measured_afterwards() -> None:
    graph = Graph()
    graph.add(dense(10, cuts=(3,)), nothing)
    (running,) = graph.ready()
    cut = running.steps[1]
    assert not cut.evaluated
    graph.add(dense(3), nothing)
    graph.done(cut.key, Facts(present=True, resumable=True))
    (measuring,) = graph.ready()
    assert [(s.key, s.steps, s.evaluated) for s in measuring.steps] == [(cut.key, 0, True)]


def test_a_stage_in_a_workers_hands_outlives_the_plan_that_wanted_it() -> None:
    graph = Graph()
    plan = dense(10)
    graph.add(plan, nothing)
    (running,) = graph.ready()
    graph.release(plan)
    assert len(graph) == 0
    graph.add(plan, nothing)
    assert list(graph.ready()) == []
    finish(graph, running)
    assert graph.known(plan.points[0][1])


def test_releasing_forgets_what_no_other_plan_wants() -> None:
    graph = Graph()
    one, other = trial(), trial(rounds=2)
    graph.add(one, nothing)
    graph.add(other, nothing)
    graph.release(other)
    assert len(graph) == len(one.nodes)
    assert names(next(graph.ready()))[-1] == "train 100-140"
    graph.release(one)
    assert len(graph) == 0


# Failure.


def test_a_failure_takes_what_waits_for_it_and_nothing_else() -> None:
    graph = Graph()
    one, other = trial(), trial(rate=0.3, rounds=2)
    graph.add(one, nothing)
    graph.add(other, nothing)
    finish(graph, next(graph.ready()))
    longer, shorter = graph.ready()
    failed = graph.fail(longer.steps[1].key)
    graph.give_back(longer)
    assert failed == {step.key for step in longer.steps[1:]}
    assert all(graph.failed(key) for _, key in other.points)
    assert not any(graph.failed(key) for _, key in one.points)
    finish(graph, shorter)
    assert list(graph.ready()) == []


def test_later_cuts_of_a_run_fail_with_an_earlier_one() -> None:
    graph = Graph()
    graph.add(dense(10, cuts=(3,)), nothing)
    (segment,) = graph.ready()
    failed = graph.fail(segment.steps[1].key)
    graph.give_back(segment)
    assert failed == {step.key for step in segment.steps[1:]}
    assert list(graph.ready()) == []


def test_a_cut_beyond_a_failed_one_can_be_gone_on_from() -> None:
    plan = dense(10, cuts=(3, 5))
    cuts = {n.op.to: n.key for n in plan.nodes if isinstance(n.op, Train)}
    graph = Graph()
    graph.add(plan, lambda key: Facts(present=True, resumable=True) if key == cuts[50] else NOTHING)
    assert graph.fail(cuts[30]) == {cuts[30]}
    assert [names(segment) for segment in graph.ready()] == [["train 50-100"]]


def test_what_failed_stays_failed_for_plans_that_come_later() -> None:
    graph = Graph()
    plan = trial()
    graph.add(plan, nothing)
    (segment,) = graph.ready()
    graph.fail(segment.steps[1].key)
    graph.release(plan)
    graph.add(trial(rounds=2), nothing)
    assert graph.failed(trial(rounds=2).points[-1][1])
    assert list(graph.ready()) == []


def test_a_stage_that_another_worker_is_at_answers_for_itself() -> None:
    graph = Graph()
    graph.add(dense(10), nothing)
    (longer,) = graph.ready()
    graph.add(dense(3), nothing)
    (shorter,) = graph.ready()
    assert graph.fail(shorter.steps[-1].key) == {shorter.steps[-1].key}
    finish(graph, longer)
    assert graph.known(longer.steps[-1].key) and not graph.failed(longer.steps[-1].key)


def test_a_known_outcome_is_never_called_failed() -> None:
    graph = Graph()
    plan = trial(rounds=2)
    graph.add(plan, lambda key: Facts(known=key == plan.points[0][1]))
    graph.fail(plan.nodes[0].key)
    assert graph.known(plan.points[0][1]) and not graph.failed(plan.points[0][1])
    assert graph.failed(plan.points[1][1])


def test_a_plan_that_wants_more_of_a_state_than_can_be_had_says_what_fails() -> None:
    graph = Graph()
    plan = dense(10, cuts=(3,))
    cut = next(n.key for n in plan.nodes if isinstance(n.op, Train) and n.op.to == 30)
    graph.add(dense(3), lambda key: Facts(present=True))
    graph.fail(plan.nodes[0].key)
    assert not graph.failed(cut)
    assert graph.add(plan, nothing) == {cut, plan.points[0][1]}
    assert graph.failed(cut)
    assert list(graph.ready()) == []


# Anything, in any order.

TRIALS = st.fixed_dictionaries(
    {
        "epochs": st.sampled_from([4, 6]),
        "retrain_epochs": st.sampled_from([1, 2, 3]),
        "retrain": st.sampled_from(["none", "finetune", "rewind", "lr-rewind", "reinit"]),
        "rounds": st.integers(1, 3),
        "rate": st.sampled_from([0.2, 0.3]),
        "criterion": st.sampled_from(["magnitude", "random"]),
        "phase": st.sampled_from(["after", "after", "before", "during"]),
        "rewind_epoch": st.sampled_from([0, 1, 2]),
        "lr_schedule": st.sampled_from(["constant", "constant", "cosine"]),
    }
)


class World:
    """Workers, a store and a ledger around a graph, with the driver's part played as the real one plays it."""

    def __init__(self, plans: list[Plan], draw: random.Random, *, failing: float, lost: float) -> None:
        self.draw = draw
        self.failing = failing
        self.waiting = plans
        self.graph = Graph()
        self.facts: dict[str, Facts] = {}
        self.running: list[tuple[Segment, Iterator[None]]] = []
        self.under_way: list[tuple[Plan, set[str]]] = []
        self.failed: set[str] = set()
        self.measured: list[str] = []
        self.trained = 0
        self.asked = sum(plan.steps_by_task[""] for plan in plans)
        for node in {node.key: node for plan in plans for node in plan.nodes if node.stored}.values():
            if draw.random() < lost:
                there = draw.random() < 0.5
                self.facts[node.key] = Facts(
                    known=node.evaluated and draw.random() < 0.7,
                    present=there,
                    resumable=there and draw.random() < 0.5,
                )

    def look(self, key: str) -> Facts:
        """What the store and the ledger say."""
        return self.facts.get(key, NOTHING)

    def begin(self) -> None:
        """Add a plan."""
        plan = self.waiting.pop()
        self.failed |= self.graph.add(plan, self.look)
        points = {key for _, key in plan.points if not self.graph.known(key)}
        if any(self.graph.failed(key) for key in points):
            self.graph.release(plan)
        else:
            self.under_way.append((plan, points))

    def hand_out(self) -> None:
        """Give segments to some workers."""
        for segment in self.graph.ready():
            self.running.append((segment, self.work(segment)))
            if self.draw.random() < 0.5:
                break

    def work(self, segment: Segment) -> Iterator[None]:
        """Run a segment, one report at a time."""
        made: dict[str, bool] = {}  # whether the optimizer is in memory
        left = segment
        for step in segment.steps:
            resumable = self.check(step, made)
            if self.draw.random() < self.failing:
                self.failed |= self.graph.fail(step.key)
                break
            self.trained += step.steps
            made[step.key] = resumable
            if step.evaluated or step.stored:
                assert step.stored
                self.report(step)
                left = left.after(step.key)
                yield
        self.graph.give_back(left)

    def check(self, step: Step, made: dict[str, bool]) -> bool:
        """Every input must be there, in memory or in the store; whether an optimizer state comes out."""
        for key in step.inputs:
            assert key in made or self.look(key).present, "an input is missing"
        optimizer = [made[key] if key in made else self.look(key).resumable for key in step.inputs]
        if step.inputs == (step.key,):
            assert step.evaluated and not step.steps and (optimizer == [True] or not step.resumable)
            return optimizer[0]
        match step.op:
            case Train():
                assert optimizer == [True] or not step.goes_on, "training would go on without its optimizer"
                return step.resumable or not step.stored  # as the store would give it back
            case Prune():
                return optimizer[0]
            case Rewind(what="weights"):
                return optimizer[1]
            case _:
                return False

    def report(self, step: Step) -> None:
        """Store and measure, and tell the graph and the trials."""
        before = self.look(step.key)
        if step.evaluated:
            assert not before.known, "measured twice"
            self.measured.append(step.key)
        self.facts[step.key] = Facts(
            known=before.known or step.evaluated, present=True, resumable=before.resumable or step.resumable
        )
        self.graph.done(step.key, Facts(known=self.facts[step.key].known, present=True, resumable=step.resumable))

    def settle(self) -> None:
        """Release the trials that ended."""
        for plan, points in [*self.under_way]:
            points -= {key for key in points if self.look(key).known}
            if not points or points & self.failed:
                self.under_way.remove((plan, points))
                self.graph.release(plan)

    def play(self) -> None:
        """Do anything in any order until all is done."""
        while self.waiting or self.under_way or self.running:
            moves: list[Callable[[], None]] = [self.hand_out]
            moves += [self.begin] if self.waiting else []
            moves += [self.proceed] * 2 if self.running else []
            if moves == [self.hand_out]:
                self.hand_out()
                self.settle()
                assert self.running or not self.under_way, "a trial waits for ever"
                continue
            self.draw.choice(moves)()
            self.settle()

    def proceed(self) -> None:
        """Let some worker go on to its next report, or lose it."""
        at = self.draw.randrange(len(self.running))
        _, work = self.running[at]
        if next(work, "ended") == "ended":
            del self.running[at]


def plans_of(trials: list[dict[str, Any]], seeds: list[int]) -> list[Plan]:
    """The plans of those trials that make sense."""
    plans = []
    for params in trials:
        for seed in seeds:
            try:
                chosen = resolve(TrainSettings(batch_size=1), PruneSettings(), params)
                plans.append(trial_plan(chosen, seed, INFO))
                plans.append(dense_plan(chosen.train, seed, INFO, cuts=(1, 2)))
            except PlanError:
                continue
    return plans


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    trials=st.lists(TRIALS, min_size=1, max_size=8), seeds=st.sampled_from([[0], [0, 1]]), salt=st.integers(0, 10**6)
)
@pytest.mark.parametrize(("failing", "lost"), [(0.0, 0.0), (0.0, 0.5), (0.1, 0.0), (0.1, 0.5)])
def test_anything_in_any_order(
    failing: float, lost: float, trials: list[dict[str, Any]], seeds: list[int], salt: int
) -> None:
    plans = plans_of(trials, seeds)
    world = World(plans, random.Random(salt), failing=failing, lost=lost)
    recorded = {key for key, facts in world.facts.items() if facts.known}
    world.play()
    assert len(world.graph) == 0
    assert list(world.graph.ready()) == []
    assert not world.graph._running and not world.graph._unknown and not world.graph._runs
    if not failing:
        assert world.trained <= world.asked
        assert sorted([*world.measured, *recorded]) == sorted(
            {key for plan in plans_of(trials, seeds) for _, key in plan.points} | recorded
        )


@settings(max_examples=60, deadline=None)
@given(trials=st.lists(TRIALS, min_size=1, max_size=8), salt=st.integers(0, 10**6))
def test_plans_that_are_known_together_train_nothing_twice(trials: list[dict[str, Any]], salt: int) -> None:
    plans = [plan for plan in plans_of(trials, [0]) if plan.steps_by_task[""]]
    graph = Graph()
    for plan in plans:
        graph.add(plan, nothing)
    ends: dict[tuple[str, str], tuple[int, int]] = {}
    for node in (node for plan in plans for node in plan.nodes):
        if isinstance(node.op, Train):
            run = node.parents[0], repr(node.op.recipe) + str(node.op.fresh_optimizer)
            ends[run] = node.start, max(node.op.to, ends.get(run, (0, 0))[1])
    assert sum(segment.cost for segment in run_all(graph)) == sum(to - start for start, to in ends.values())
