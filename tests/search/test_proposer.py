"""Proposers: the contract for every sampler, restarts, Optuna's traps, the cap, and working ahead."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from search import proposer as proposer_module
from search.proposer import LEARNS, SAMPLERS, Ahead, Proposal, Proposer, State, Told, make
from search.space import SpaceError, parse
from tests.contracts.proposer import PROPOSER_CHECKS, SPACE, Factory, asked, result, told

CONTINUOUS = parse(
    {
        "x": {"low": 0.0, "high": 1.0},
        "y": {"low": 1e-4, "high": 1.0, "log": True},
        "n": {"low": 1, "high": 64, "log": True},
        "kind": [True, 1, "1"],
    }
)


def factory(sampler: str) -> Factory:
    return partial(make, sampler, SPACE, ("maximise", "minimise"), seed=7)


def outcome(params: Mapping[str, Any]) -> tuple[float, float]:
    return params["x"], (params["x"] - 0.5) ** 2 + params["y"]


def run(proposer: Proposer, count: int, judge: Callable[[Mapping[str, Any]], Sequence[float]] = outcome) -> list[Told]:
    """Asks and tells one after the other; the records as a ledger gives them back."""
    records = []
    for _ in range(count):
        proposal = asked(proposer)
        values = tuple(judge(proposal.params))
        proposer.tell(proposal.number, values)
        attrs = json.loads(json.dumps(proposal.attrs))
        params = json.loads(json.dumps(proposal.params))
        records.append(Told(number=proposal.number, params=params, attrs=attrs, values=values, state="done"))
    return records


@pytest.mark.parametrize("check", PROPOSER_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "gp"])
def test_contract(sampler: str, check: Callable[[Factory], None]) -> None:
    check(factory(sampler))


def cheap(check: Callable[[Factory], None]) -> bool:
    return check.__name__ != "a_rebuild_at_any_point_goes_on_the_same"


@pytest.mark.parametrize(
    "check", [check for check in PROPOSER_CHECKS if cheap(check)], ids=lambda check: check.__name__
)
def test_contract_of_gp(check: Callable[[Factory], None]) -> None:
    # Its first ten trials are drawn at random: the fit itself, seconds of work, has one test of its own.
    check(factory("gp"))


def test_gp_fits_and_rebuilds_the_same() -> None:
    space = parse({"x": {"low": 0.0, "high": 1.0}})
    build = partial(make, "gp", space, ("maximise",), seed=3)
    proposer = build()
    records = run(proposer, 10, lambda params: (-((params["x"] - 0.3) ** 2),))
    fitted = asked(proposer)
    assert asked(build(history=records)) == fitted


def test_importing_costs_no_optuna() -> None:
    code = "import sys, search.proposer; sys.exit('optuna' in sys.modules)"
    root = Path(proposer_module.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(ValueError, match="unknown sampler 'cma'. Known: tpe, nsga2"):
        make("cma", SPACE, ("maximise",), seed=0)
    with pytest.raises(ValueError, match="unknown direction 'up'. Known: maximise, minimise"):
        make("tpe", SPACE, ("up",), seed=0)  # type: ignore[arg-type]
    assert set(SAMPLERS) > LEARNS


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_wrong_enqueued_point_is_refused_with_its_place(sampler: str) -> None:
    with pytest.raises(SpaceError, match=r"enqueue\[1\]: rate = 0\.17 is not legal"):
        factory(sampler)(enqueued=[{"rate": 0.1}, {"rate": 0.17}])
    with pytest.raises(SpaceError, match=r"enqueue\[0\]: rewind_epoch = 1 does not apply"):
        factory(sampler)(enqueued=[{"retrain": "finetune", "rewind_epoch": 1}])


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_study_whose_enqueued_points_are_edited_runs_only_the_new_ones(sampler: str) -> None:
    build = partial(make, sampler, CONTINUOUS, ("maximise", "minimise"), seed=5)
    ran = run(build(enqueued=[{"x": 0.11}, {"x": 0.12}]), 2)

    def begun(enqueued: Sequence[float], history: Sequence[Told]) -> list[float]:
        proposer = build(enqueued=[{"x": x} for x in enqueued], history=history)
        proposals = [asked(proposer) for _ in range(4)]
        return [proposal.params["x"] for proposal in proposals if "enqueued" in proposal.attrs]

    assert begun([0.33, 0.11, 0.12], ran) == [0.33]
    assert begun([0.33, 0.44], ran) == [0.33, 0.44]
    assert begun([0.11, 0.11, 0.12], ran) == [0.11]
    assert begun([0.33, 0.11, 0.12], ran[1:]) == [0.33, 0.11]
    uncut = run(build(enqueued=[{"x": 0.11}, {"x": 0.11}, {"x": 0.12}]), 5)
    for cut in range(1, 5):
        assert run(build(enqueued=[{"x": 0.11}, {"x": 0.11}, {"x": 0.12}], history=uncut[:cut]), 5 - cut) == uncut[cut:]


@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2"])
def test_values_are_plain_and_keep_their_types(sampler: str) -> None:
    proposer = make(sampler, CONTINUOUS, ("maximise", "minimise"), seed=1)
    kinds = set()
    for record in run(proposer, 30):
        assert [type(record.params[name]) for name in ("x", "y", "n")] == [float, float, int]
        kinds.add(repr(record.params["kind"]))
    assert kinds == {"True", "1", "'1'"}


def test_random_spreads_over_the_whole_range() -> None:
    records = run(make("random", CONTINUOUS, ("maximise", "minimise"), seed=1), 400)
    assert {record.params["n"] for record in records} >= {1, 2, 3, 64}
    assert sum(record.params["y"] < 1e-2 for record in records) == pytest.approx(200, abs=40)
    assert sum(record.params["x"] < 0.5 for record in records) == pytest.approx(200, abs=40)


def test_a_grid_is_walked_once_and_ends() -> None:
    proposer = factory("grid")(enqueued=[{"criterion": "taylor"}])
    first = asked(proposer)
    points = [asked(proposer) for _ in range(SPACE.size() or 0)]
    assert [point.params for point in points] == list(SPACE.grid())
    assert (proposer.ask(), proposer.ask()) == (None, None)
    rebuilt = factory("grid")(enqueued=[{"criterion": "taylor"}], history=[told(one) for one in [first, *points[:5]]])
    assert asked(rebuilt) == points[5]
    with pytest.raises(SpaceError, match="is continuous"):
        make("grid", CONTINUOUS, ("maximise",), seed=0)


@pytest.mark.parametrize("sampler", ["random", "grid"])
def test_what_looks_at_no_result_depends_on_none(sampler: str) -> None:
    told_all, told_none = factory(sampler)(), factory(sampler)()
    for _ in range(10):
        one, other = asked(told_all), asked(told_none)
        assert one == other
        told_all.tell(one.number, result(one))
        told_all.add(one.params, (0.1, 0.1))


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "nsga3"])
def test_a_learner_goes_on_the_same_after_a_restart(sampler: str) -> None:
    build = partial(make, sampler, CONTINUOUS, ("maximise", "minimise"), seed=5)
    uncut = run(build(), 70)
    for cut in (9, 40, 55, 64):
        rebuilt = run(build(history=uncut[:cut]), 5)
        assert rebuilt == uncut[cut : cut + 5]


def test_a_restart_with_added_and_running_trials_goes_on_the_same() -> None:
    build = partial(make, "tpe", CONTINUOUS, ("maximise", "minimise"), seed=5)
    proposer = build()
    # Enough of them that the sampler weighs the old less than the new: the order in the study counts.
    records = run(proposer, 50)
    extra = [dict(record.params, n=1) for record in records[:30]]
    for params in reversed(extra):
        proposer.add(params, outcome(params))
    running = asked(proposer)
    expected = asked(proposer)
    history = [*records, Told(number=running.number, params=running.params, attrs=running.attrs, state="running")]
    rebuilt = build(history=history, added=[(params, outcome(params), {}) for params in extra])
    assert asked(rebuilt) == expected


def test_single_objective_tpe_rebuilds_its_running_trials() -> None:
    build = partial(make, "tpe", CONTINUOUS, ("minimise",), seed=5)
    proposer = build()
    records = run(proposer, 12, lambda params: (params["x"],))
    running = [asked(proposer) for _ in range(3)]
    expected = asked(proposer)
    history = records + [
        Told(number=one.number, params=one.params, attrs=json.loads(json.dumps(one.attrs)), state="running")
        for one in running
    ]
    assert asked(build(history=history)) == expected


def test_tpe_keeps_away_from_what_is_running() -> None:
    build = partial(make, "tpe", parse({"x": {"low": 0.0, "high": 1.0}}), ("minimise", "minimise"), seed=5)
    proposer = build()
    run(proposer, 40, lambda params: (abs(params["x"] - 0.3), abs(params["x"] - 0.31)))
    batch = sorted(asked(proposer).params["x"] for _ in range(12))
    assert batch[-1] - batch[0] > 0.1


def test_nsga_generations_continue_with_their_notes() -> None:
    build = partial(make, "nsga2", CONTINUOUS, ("maximise", "minimise"), seed=5)
    records = run(build(), 105)
    key = "NSGAIISampler:generation"
    assert [records[number].attrs[key] for number in (0, 49, 50, 99, 100)] == [0, 0, 1, 1, 2]
    assert asked(build(history=records)).attrs[key] == 2
    forgetful = [Told(number=r.number, params=r.params, values=r.values, state="done") for r in records]
    assert asked(build(history=forgetful)).attrs[key] == 0, "the canary: without notes it starts again"


def test_late_results_do_not_change_the_parents_after_a_restart() -> None:
    build = partial(make, "nsga2", CONTINUOUS, ("maximise", "minimise"), seed=5)
    proposer = build()
    late = [asked(proposer) for _ in range(3)]
    records = run(proposer, 52)
    assert any("study" in record.attrs for record in records)
    for one in late:
        proposer.tell(one.number, (2.0, -1.0))
        attrs = json.loads(json.dumps(one.attrs))
        records.append(Told(number=one.number, params=one.params, attrs=attrs, values=(2.0, -1.0), state="done"))
    rebuilt = build(history=records)
    assert [asked(rebuilt) for _ in range(4)] == [asked(proposer) for _ in range(4)]


def test_enqueued_points_join_a_generation() -> None:
    point = {"x": 0.5, "y": 0.1, "n": 3, "kind": "1"}
    proposer = make("nsga2", CONTINUOUS, ("maximise", "minimise"), seed=5, enqueued=[point])
    first = asked(proposer)
    assert first.params == point
    assert first.attrs["NSGAIISampler:generation"] == 0


@pytest.mark.parametrize("sampler", sorted(LEARNS - {"gp"}))
@pytest.mark.parametrize("state", ["stopped", "failed"])
def test_no_sampler_stumbles_over_trials_without_values(sampler: str, state: State) -> None:
    build = partial(make, sampler, CONTINUOUS, ("maximise", "minimise"), seed=5)
    proposer = build()
    records = run(proposer, 12)
    for _ in range(12):
        proposal = asked(proposer)
        proposer.tell(proposal.number, None, state=state, constraints={"accuracy": 0.5})
        records.append(Told(number=proposal.number, params=proposal.params, attrs=proposal.attrs, state=state))
    assert asked(proposer).number == 24
    assert asked(build(history=records)).number == 24


def test_the_trap_of_intermediate_values_is_still_there() -> None:
    # The canary: once Optuna takes this, stopped trials may be told with what they had reached.
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=optuna.samplers.TPESampler(seed=0))
    space: Any = {"x": optuna.distributions.FloatDistribution(0, 1)}
    pruned = optuna.trial.TrialState.PRUNED
    for place in range(12):
        study.add_trial(
            optuna.create_trial(
                params={"x": place / 12}, distributions=space, state=pruned, intermediate_values={1: 0.5}
            )
        )
    with pytest.raises(RuntimeError, match="A single direction cannot be retrieved"):
        study.ask(space)


def test_a_violated_constraint_steers_away() -> None:
    space = parse({"x": {"low": 0.0, "high": 1.0}})
    proposer = make("tpe", space, ("maximise", "maximise"), seed=5)
    late = []
    for number in range(60):
        x = asked(proposer).params["x"]
        proposer.tell(number, (x, x), constraints={"latency_ms": x - 0.4})
        if number >= 40:
            late.append(x)
    assert sorted(late)[10] < 0.5, "the best by value lie at 1, the best that are allowed at 0.4"


def test_constraints_named_late_count_as_kept_before() -> None:
    space = parse({"x": {"low": 0.0, "high": 1.0}})
    proposer = make("nsga2", space, ("maximise", "maximise"), seed=5)
    for number, constraints in enumerate([{}, {"a": 0.1}, {"b": -0.2}, {"a": -0.1, "b": 0.3}]):
        asked(proposer)
        proposer.tell(number, (0.5, 0.5), constraints=constraints)
    asked(proposer)
    study = proposer._study  # type: ignore[attr-defined]
    assert [trial.constraints for trial in study.get_trials()[:4]] == [
        {"a": 0.0, "b": 0.0},
        {"a": 0.1, "b": 0.0},
        {"a": 0.0, "b": -0.2},
        {"a": -0.1, "b": 0.3},
    ]


def test_a_done_trial_needs_a_value_for_each_objective() -> None:
    proposer = factory("tpe")()
    asked(proposer)
    with pytest.raises(ValueError, match=r"trial 0 is done with values \(0.5,\)"):
        proposer.tell(0, (0.5,))


def test_the_sampler_sees_the_latest_and_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proposer_module, "MOST_SEEN", 20)
    space = parse({"x": {"low": 0, "high": 1000}})
    proposer = make("nsga2", space, ("maximise", "minimise"), seed=5)
    for number in range(21):
        asked(proposer)
        assert len(proposer._records) == number + 1  # type: ignore[attr-defined]
        # Three trials are better than all that follow; all others are equally poor.
        best = number in (2, 3, 5)
        proposer.tell(number, (1.0, 0.0) if best else (0.0, 1.0))
    kept = sorted(proposer._records)  # type: ignore[attr-defined]
    assert len(kept) == 16, "one too many, and a fifth is forgotten"
    assert {2, 3, 5} <= set(kept)
    assert kept[-8:] == list(range(13, 21))
    assert asked(proposer).number == 21


def test_the_sampler_never_sees_more_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proposer_module, "MOST_SEEN", 20)
    build = partial(make, "tpe", CONTINUOUS, ("maximise", "minimise"), seed=5)
    proposer = build()
    seen = []
    for number in range(60):
        params = asked(proposer).params
        seen.append(sum(trial.state.is_finished() for trial in proposer._study.get_trials()))  # type: ignore[attr-defined]
        proposer.tell(number, outcome(params))
    assert seen[:21] == list(range(21))
    assert (seen[21], max(seen), min(seen[21:])) == (16, 20, 16)
    assert sum(later < earlier for earlier, later in pairwise(seen)) == 8, "thinned rarely"


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random"])
def test_memory_stays_bounded_over_many_trials(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proposer_module, "MOST_SEEN", 20)
    proposer = make(sampler, CONTINUOUS, ("maximise", "minimise"), seed=5)
    records = []
    for number in range(150):
        params = asked(proposer).params
        state: State = ("done", "done", "stopped", "failed")[number % 4]
        values = outcome(params) if state == "done" else None
        proposer.tell(number, values, state=state)
        proposer.add(dict(params, n=1), outcome(params))
        records.append(Told(number=number, params=params, values=values, state=state))
    if sampler in LEARNS:
        held = len(proposer._records) + len(proposer._added)  # type: ignore[attr-defined]
        # Parents of the last generations stay besides.
        assert held <= 20 + 3 * 50
        assert proposer._finished <= 20 + 3 * 50  # type: ignore[attr-defined]
    assert asked(make(sampler, CONTINUOUS, ("maximise", "minimise"), seed=5, history=records)).number == 150


class Slow:
    """A proposer that counts, blocks until let go, and fails on request."""

    def __init__(self, count: int = 1000) -> None:
        self.go, self.left, self.number = threading.Event(), count, 0
        self.heard: list[Any] = []
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None

    def ask(self) -> Proposal | None:
        self.thread = threading.current_thread()
        self.go.wait(10)
        if self.error:
            raise self.error
        if self.number == self.left:
            return None
        self.number += 1
        return Proposal(number=self.number - 1, params={"heard": len(self.heard)}, attrs={})

    def tell(self, number: int, values: Any, *, constraints: Mapping[str, float] = {}, state: State = "done") -> None:
        self.heard.append((number, values, dict(constraints), state))

    def add(self, params: Mapping[str, Any], values: Sequence[float], constraints: Mapping[str, float] = {}) -> None:
        self.heard.append((dict(params), values, dict(constraints)))


def test_ahead_prepares_in_a_thread_and_keeps_the_order() -> None:
    slow = Slow(5)
    with Ahead(slow, depth=2) as ahead:
        assert ahead.take(3) == [], "nothing is ready, and nobody waits"
        slow.go.set()
        numbers: list[int] = []
        while not ahead.exhausted:
            taken = ahead.take(3, wait=True)
            assert len(taken) <= 2
            numbers += [proposal.number for proposal in taken]
        assert numbers == [0, 1, 2, 3, 4]
        assert ahead.take(1, wait=True) == []
        assert slow.thread is not threading.current_thread()


def test_ahead_heeds_what_it_hears_before_the_next_proposal() -> None:
    slow = Slow()
    slow.go.set()
    with Ahead(slow, depth=1) as ahead:
        assert ahead.take(1, wait=True)[0].number == 0
        ahead.take(1, wait=True)
        ahead.tell(0, (1.0,), constraints={"a": 0.1})
        ahead.add({"x": 1}, (2.0,))
        ahead.take(2, wait=True)
        assert ahead.take(1, wait=True)[0].params["heard"] == 2
    assert slow.heard == [(0, (1.0,), {"a": 0.1}, "done"), ({"x": 1}, (2.0,), {})]


def test_ahead_raises_where_proposals_are_taken() -> None:
    slow = Slow()
    slow.error = RuntimeError("no luck")
    slow.go.set()
    with Ahead(slow, depth=1) as ahead:
        with pytest.raises(RuntimeError, match="no luck"):
            ahead.take(1, wait=True)
        with pytest.raises(RuntimeError, match="no luck"):
            ahead.take(1)


def test_ahead_raises_a_wrong_tell_too() -> None:
    with Ahead(factory("random")(), depth=1) as ahead:
        ahead.take(1, wait=True)
        ahead.tell(99, (1.0, 1.0))
        with pytest.raises(ValueError, match="trial 99 was never asked"):
            for _ in range(1000):
                ahead.take(1, wait=True)


def test_ahead_closes_while_someone_waits() -> None:
    slow = Slow(0)
    ahead = Ahead(slow, depth=1)
    waiting = threading.Thread(target=ahead.take, args=(1,), kwargs={"wait": True})
    waiting.start()
    slow.go.set()
    ahead.close()
    waiting.join(10)
    assert not waiting.is_alive()
    with pytest.raises(ValueError, match="depth must be at least 1"):
        Ahead(slow, depth=0)


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_ahead_changes_no_proposal(sampler: str) -> None:
    plain = [asked(proposer) for proposer in [factory(sampler)()] for _ in range(8)]
    with Ahead(factory(sampler)(), depth=3) as ahead:
        taken: list[Proposal] = []
        while len(taken) < 8:
            taken += ahead.take(8 - len(taken), wait=True)
    assert taken == plain
