"""What is said of tickets, from ledgers that are written by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from orchestrator.errors import PlanError, QueryError
from orchestrator.state import State, to_bytes
from orchestrator.study import Study
from orchestrator.tickets.study.table import read, rows, says, steps_to_best, ticket_table

SEEDS = (0, 1, 2, 3, 4)
NOISE = (0.000, 0.001, -0.001, 0.002, -0.002)


class Ledger:
    """A study as it is read: outcomes, events and states that a test sets."""

    def __init__(self, *, test_examples: int = 1000, evaluate_every: float = 0) -> None:
        self.outcomes: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.states: dict[str, bytes] = {}
        self.headers: dict[str, dict[str, str]] = {}
        self.noted = {"test_examples": test_examples, "valid_examples": 500}
        self.evaluate_every = evaluate_every

    def measured(self, key: str, accuracy: float, *, kept: int = 10, curve: Any = None) -> str:
        self.outcomes.append(
            {
                "key": key,
                "accuracy": accuracy - 0.01,
                "test_accuracy": accuracy if self.noted["test_examples"] else None,
                "layers": json.dumps({"fc.weight": [kept, 100]}),
                "curve": None if curve is None else json.dumps(curve),
            }
        )
        return key

    def failed(self, key: str, reason: str) -> None:
        """Take away the outcome of a control, and say why there is none."""
        self.outcomes = [row for row in self.outcomes if row["key"] != key]
        if reason:
            self.events.append({"event": "control failed", "key": key, "detail": json.dumps({"reason": reason})})

    def ticket(
        self,
        name: str = "ticket",
        accuracy: float = 0.9,
        controls: Mapping[str, Any] = {},
        *,
        trial: int = 0,
        round: int = 1,
        seeds: Sequence[int] = SEEDS,
        curves: Any = None,
        **fields: Any,
    ) -> None:
        """A ticket over all seeds; `controls` gives the accuracy of each kind, or of each of its draws."""
        told = []
        for seed in seeds:
            key = f"{name}/{seed}"
            if not any(row["key"] == key for row in self.outcomes):
                self.measured(key, accuracy + NOISE[seed], curve=curves and curves["ticket"])
            compared = []
            for kind, accuracies in controls.items():
                drawn = accuracies if isinstance(accuracies, (list, tuple)) else [accuracies]
                for draw, value in enumerate(drawn):
                    other = f"{name}/{kind}/{seed}/{draw}"
                    kept = 100 if kind.startswith("dense") else 10
                    self.measured(other, value + NOISE[(seed + 1) % 5] / 4, kept=kept, curve=curves and curves[kind])
                    compared.append({"kind": kind, "key": other, "draw": draw})
            told.append(
                {
                    **{"seed": seed, "round": round, "key": key, "start": f"start/{name}/{seed}", "ancestor": "init"},
                    **{"rule": "", "searches": [], "depth": 2, "trainings": 3, "controls": compared, **fields},
                }
            )
        detail = {"params": {"rate": 0.2}, "tickets": told}
        self.events.append({"event": "tickets", "trial": trial, "detail": json.dumps(detail)})

    @property
    def study(self) -> Study:
        def table(values: Any) -> Any:
            return SimpleNamespace(to_pylist=lambda: values)

        states = SimpleNamespace(read=self.states.get, header=self.headers.get)
        faked = SimpleNamespace(
            spec=SimpleNamespace(
                name="small", task="my_task.py", train=SimpleNamespace(evaluate_every=self.evaluate_every)
            ),
            table=lambda: table(self.outcomes),
            store=SimpleNamespace(
                table=lambda name, kind: table(self.events if kind == "events" else []), states=states
            ),
            noted=lambda: self.noted,
        )
        return cast(Study, faked)

    def document(self) -> dict[str, Any]:
        return ticket_table(self.study, structure=False)

    def only(self) -> dict[str, Any]:
        (ticket,) = self.document()["tickets"]
        return cast(dict[str, Any], ticket)


CONTROLS = {"dense": 0.9, "shuffled": 0.8, "reinitialised": [0.89, 0.91], "random": 0.95}


def test_the_document_has_what_is_promised() -> None:
    ledger = Ledger()
    ledger.ticket(controls=CONTROLS)
    document = ledger.document()
    assert document["study"] == "small"
    (ticket,) = document["tickets"]
    promised = {"key", "rule", "sparsity", "accuracy", "test_accuracy", "depth", "controls", "overlap"}
    assert promised <= ticket.keys()
    assert list(ticket["controls"]) == list(CONTROLS)
    for control in ticket["controls"].values():
        assert {"test_accuracy", "difference", "half_width", "n", "claim"} <= control.keys()
    assert json.loads(json.dumps(document)) == document
    assert ticket["overlap"] is None and ticket["rule"] == "single search" and ticket["depth"] == 2


def test_means_are_over_seeds_and_draws_and_the_key_is_the_run_nearest_the_mean() -> None:
    ledger = Ledger()
    ledger.ticket(controls=CONTROLS)
    ticket = ledger.only()
    assert ticket["key"] == "ticket/0" and ticket["keys"] == [f"ticket/{seed}" for seed in SEEDS]
    assert ticket["n"] == 5 and ticket["sparsity"] == pytest.approx(0.9)
    assert (ticket["accuracy"], ticket["test_accuracy"]) == (pytest.approx(0.89), pytest.approx(0.9))
    reinit = ticket["controls"]["reinitialised"]
    assert (reinit["test_accuracy"], reinit["difference"], reinit["n"]) == (pytest.approx(0.9), pytest.approx(0), 5)


def test_claims_come_from_the_differences() -> None:
    ledger = Ledger()
    ledger.ticket(controls=CONTROLS)
    assert {kind: control["claim"] for kind, control in ledger.only()["controls"].items()} == {
        "dense": "matches",
        "shuffled": "beats",
        "reinitialised": "matches",
        "random": "loses to",
    }


def test_what_it_beats_is_said_first() -> None:
    ledger = Ledger()
    ledger.ticket(controls=CONTROLS)
    says = ledger.only()["says"]
    assert says.startswith("At 90.0% sparse: beats the shuffled mask (+10.0 ± ")
    assert says.index("beats") < says.index("loses to a random mask") < says.index("matches the dense model")


def test_four_seeds_are_too_few() -> None:
    ledger = Ledger()
    ledger.ticket(controls=CONTROLS, seeds=SEEDS[:4])
    assert {control["claim"] for control in ledger.only()["controls"].values()} == {"too few"}


def test_without_a_test_split_the_validation_split_is_compared_and_said() -> None:
    ledger = Ledger(test_examples=0)
    ledger.ticket(controls={"shuffled": 0.8})
    document = ledger.document()
    assert (document["compared_on"], document["examples"]) == ("accuracy", 500)
    (ticket,) = document["tickets"]
    assert ticket["test_accuracy"] is None and ticket["controls"]["shuffled"]["test_accuracy"] is None
    assert ticket["controls"]["shuffled"]["accuracy"] == pytest.approx(0.79)
    assert "accuracy" in rows(document)[1]


# --- What is no fair comparison ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["one-shot", "imp", "random", "sign-kept"])
def test_a_control_at_another_count_is_noticed(kind: str) -> None:
    ledger = Ledger()
    ledger.ticket(controls={kind: 0.8})
    ledger.outcomes[-1]["layers"] = json.dumps({"fc.weight": [11, 100]})
    with pytest.raises(PlanError, match="not at the same sparsity: under seed 4 the ticket keeps 10 weights, .* 11"):
        ledger.document()


def test_a_control_that_failed_under_a_seed_is_told_and_not_compared() -> None:
    ledger = Ledger()
    ledger.ticket(controls={"shuffled": 0.8, "random": 0.8})
    for seed in (3, 4):
        ledger.failed(f"ticket/shuffled/{seed}/0", "worker died: twice")
    ticket = ledger.only()
    assert list(ticket["controls"]) == ["random"]
    assert ticket["failed"] == {"shuffled": {"3": "worker died: twice", "4": "worker died: twice"}}
    told = rows(ledger.document())
    assert [row["against"] for row in told] == ["(single search)", "random", "shuffled"]
    assert told[2]["claim"] == "failed under seeds 3, 4: worker died: twice" and told[2].keys() == told[1].keys()
    assert "What failed is tried again when the study is run again." in says(ledger.document())


def test_a_draw_that_failed_leaves_the_others_and_is_told() -> None:
    ledger = Ledger()
    ledger.ticket(controls={"reinitialised": [0.8, 0.7]})
    ledger.failed("ticket/reinitialised/3/1", "")
    ticket = ledger.only()
    assert ticket["controls"]["reinitialised"]["n"] == 5
    assert ticket["failed"] == {"reinitialised": {"3": "nothing is recorded of it"}}


def test_a_control_that_came_through_the_second_time_has_not_failed() -> None:
    ledger = Ledger()
    ledger.ticket(controls={"shuffled": 0.8})
    ledger.events.append(
        {"event": "control failed", "key": "ticket/shuffled/3/0", "detail": '{"reason": "raised: no"}'}
    )
    assert ledger.only()["failed"] == {} and list(ledger.only()["controls"]) == ["shuffled"]


def test_no_ticket_is_said() -> None:
    with pytest.raises(QueryError, match="the study 'small' has no ticket yet: a ticket is a finished trial with"):
        Ledger().document()


def test_a_task_without_accuracy_is_said() -> None:
    ledger = Ledger()
    ledger.ticket(controls={"shuffled": 0.8})
    for row in ledger.outcomes:
        row |= {"accuracy": None, "test_accuracy": None}
    with pytest.raises(QueryError, match="compared by accuracy, which the task 'my_task.py' does not measure"):
        ledger.document()


# --- Which tickets there are ---------------------------------------------------------------------------------------


def test_equal_tickets_of_two_trials_are_one_with_the_controls_of_both() -> None:
    ledger = Ledger()
    ledger.ticket(controls={}, trial=3)
    ledger.ticket(controls={"shuffled": 0.8}, trial=5)
    ledger.ticket(controls={"random": 0.8}, trial=4)
    (found,) = read(ledger.study)
    assert found.trial == 3 and list(found.controls) == ["random", "shuffled"]


def moved(*kinds: str) -> list[dict[str, Any]]:
    controls = [{"kind": kind, "key": f"there/{kind}", "draw": 0} for kind in kinds]
    return [{"task": "other", "key": "there", "controls": controls}]


def test_equal_tickets_of_two_trials_are_one_on_the_other_tasks_of_both() -> None:
    ledger = Ledger()
    for trial, transfers in ((3, []), (4, moved("shuffled")), (5, moved("shuffled", "random"))):
        ledger.ticket(trial=trial, seeds=[0], transfers=transfers)
    for key in ("there", "there/shuffled", "there/random"):
        ledger.measured(key, 0.7)
    (found,) = read(ledger.study)
    assert found.trial == 3 and list(found.transfers) == ["other"]
    assert list(found.transfers["other"].controls) == ["shuffled", "random"] and not found.failed


def test_a_ticket_that_failed_on_another_task_is_told() -> None:
    ledger = Ledger()
    ledger.ticket(seeds=[0], transfers=moved("shuffled"))
    ledger.failed("there", "diverged: the loss is nan")
    (found,) = read(ledger.study)
    assert not found.transfers and found.failed == {"(on other)": {0: "diverged: the loss is nan"}}
    assert rows(ledger.document())[1]["claim"] == "failed under seed 0: diverged: the loss is nan"


def test_tickets_come_by_trial_and_round() -> None:
    ledger = Ledger()
    for trial, number in ((1, 1), (0, 1)):
        ledger.ticket(f"{trial}/{number}", trial=trial, round=number)
    assert [(found.trial, found.round) for found in read(ledger.study)] == [(0, 1), (1, 1)]


def test_a_ticket_without_an_outcome_is_left_out() -> None:
    ledger = Ledger()
    ledger.ticket("whole")
    ledger.ticket("torn", trial=1)
    ledger.outcomes = [row for row in ledger.outcomes if row["key"] != "torn/2"]
    assert [found.trial for found in read(ledger.study)] == [0]


# --- Learning speed ------------------------------------------------------------------------------------------------

FAST = [[100, 0.5, 0.8], [200, 0.4, 0.8], [300, 0.4, 0.8]]
SLOW = [[100, 0.9, 0.8], [200, 0.8, 0.8], [300, 0.7, 0.8]]


def test_the_best_step_is_the_first_of_the_lowest_validation_loss() -> None:
    assert steps_to_best({"curve": json.dumps(FAST)}) == 200
    assert steps_to_best({"curve": json.dumps(SLOW)}) == 300


def test_learning_speed_is_compared_where_there_are_curves() -> None:
    ledger = Ledger(evaluate_every=1)
    ledger.ticket(controls={"reinitialised": 0.8}, curves={"ticket": FAST, "reinitialised": SLOW})
    ticket = ledger.only()
    reinit = ticket["controls"]["reinitialised"]
    assert (ticket["steps_to_best"], reinit["steps_to_best"]) == (200, 300)
    assert reinit["steps"]["difference"] == -100 and reinit["steps"]["n"] == 5
    told = rows(ledger.document())
    assert told[0]["steps to best"] == "200" and told[1]["sooner by"].startswith("+100 ± ")
    assert list(told[0]) == list(told[1])


def test_a_state_of_an_earlier_study_without_a_curve_leaves_speed_out() -> None:
    ledger = Ledger(evaluate_every=1)
    ledger.ticket(controls={"reinitialised": 0.8}, curves={"ticket": FAST, "reinitialised": SLOW})
    ledger.outcomes[-1]["curve"] = None
    assert "steps" not in ledger.only()["controls"]["reinitialised"]


def test_every_comparison_that_is_printed_is_counted() -> None:
    """Learning speed beside accuracy doubles the family, and so does another ticket."""
    plain, fast, two = Ledger(), Ledger(evaluate_every=1), Ledger()
    for ledger, curves in ((plain, None), (fast, {"ticket": FAST, "random": FAST})):
        ledger.ticket(controls={"random": 0.899}, curves=curves)
    two.ticket(controls={"random": 0.899})
    two.ticket("other", controls={"random": 0.899}, trial=1)
    p = plain.only()["controls"]["random"]["p_holm"]
    assert 0 < p < 0.5
    assert fast.only()["controls"]["random"]["p_holm"] == pytest.approx(2 * p)
    assert two.document()["tickets"][0]["controls"]["random"]["p_holm"] == pytest.approx(2 * p)


# --- The searches behind a ticket ----------------------------------------------------------------------------------


def test_agreement_stands_beside_chance() -> None:
    ledger = Ledger()
    ledger.ticket(rule="intersection", searches=["one", "two"])
    kept = {"one": torch.arange(100) < 50, "two": torch.arange(100) < 50}
    for key, mask in kept.items():
        ledger.states[key] = to_bytes(State(weights={"fc.weight": torch.ones(100)}, masks={"fc.weight": mask}).masked())
    overlap = ledger.only()["overlap"]
    assert overlap["jaccard"] == 1 and overlap["chance"] == pytest.approx(1 / 3, abs=0.01)
    assert overlap["excess"] == pytest.approx(1)
    assert "searches agree 1.00 (chance 0.33)" in rows(ledger.document())[0]["claim"]
    ledger.states.pop("two")
    assert ledger.only()["overlap"] is None


def test_what_was_put_back_into_a_layer_is_reported() -> None:
    ledger = Ledger()
    ledger.ticket(rule="intersection", searches=["one", "two"])
    lineage = [
        {"op": "Prune", "remarks": {"floored": []}},
        {"op": "Combine", "remarks": {"repaired": {"fc.weight": 3}}},
    ]
    ledger.headers["start/ticket/2"] = {"lineage": json.dumps(lineage)}
    ledger.headers["start/ticket/1"] = {"lineage": json.dumps([{"op": "Combine"}])}
    assert ledger.only()["repaired"] == {"fc.weight": 3}
    assert "3 weights put back where a layer was cut off" in rows(ledger.document())[0]["claim"]


# --- The table -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "trainings", "depth", "claim"),
    [
        ("", 0, 0, "found without training"),
        ("", 1, 1, "found in 1 training"),
        ("", 3, 3, "found in 3 trainings, one after another"),
        ("union", 10, 2, "found in 10 trainings, 2 of them in a row"),
        ("union", 4, 1, "found in 4 trainings, side by side"),
        ("from a file", 0, 0, "found elsewhere"),
    ],
)
def test_what_a_ticket_took_is_said(rule: str, trainings: int, depth: int, claim: str) -> None:
    ledger = Ledger()
    ledger.ticket(rule=rule, trainings=trainings, depth=depth)
    assert rows(ledger.document())[0]["claim"] == claim


def test_that_nothing_was_compared_is_said_once() -> None:
    ledger = Ledger()
    for trial in range(3):
        ledger.ticket(f"{trial}", trial=trial)
    assert all(ticket["says"] == "" for ticket in ledger.document()["tickets"])
    assert says(ledger.document()) == ["The tickets were compared with nothing: [tickets] controls says with what."]


def test_one_seed_has_no_interval_to_explain() -> None:
    ledger = Ledger()
    ledger.ticket(controls={"shuffled": 0.8}, seeds=[0])
    assert [line[:9] for line in says(ledger.document())] == ["ticket/0:"]


def test_tickets_of_rounds_that_are_not_compared_are_said_once() -> None:
    ledger = Ledger()
    for number in (1, 2, 3):
        controls = {"shuffled": 0.8, "random": 0.9} if number == 3 else {}
        ledger.ticket(f"{number}", 0.9, controls, trial=number, round=number)
    claims, how, other = says(ledger.document())
    assert claims.startswith("3/0: At 90.0% sparse: beats the shuffled mask (+10.0")
    assert how == (
        "± is half the width of a 95 % interval over 5 seeds. Claims hold for all 2 comparisons together, for which an "
        "interval without zero may not be enough."
    )
    assert other == "Tickets of other rounds were compared with nothing: [tickets] rounds says which are."


def test_an_interval_without_zero_that_is_no_claim_says_why() -> None:
    ledger = Ledger()
    ledger.ticket(controls=dict.fromkeys(("shuffled", "random", "dense", "inverted", "one-shot"), 0.9))
    by_key = {row["key"]: row for row in ledger.outcomes}
    for seed, lead in enumerate((0.030, 0.012, 0.002, 0.020, 0.026)):
        by_key[f"ticket/shuffled/{seed}/0"]["test_accuracy"] = by_key[f"ticket/{seed}"]["test_accuracy"] - lead
    (ticket,) = ledger.document()["tickets"]
    found = ticket["controls"]["shuffled"]
    assert abs(found["difference"]) > found["half_width"] and found["claim"] == "not distinguishable from"
    assert f" points, p = {found['p_holm']:.2f} among all)" in ticket["says"]
    assert ticket["says"].count("among all") == 1


def test_the_table_has_a_row_for_each_ticket_and_each_control() -> None:
    ledger = Ledger()
    ledger.ticket(controls=CONTROLS, rule="union", searches=["a"], trainings=10)
    told = rows(ledger.document())
    assert [row["against"] for row in told] == ["(union)", *CONTROLS]
    assert told[0]["claim"] == "found in 10 trainings, 2 of them in a row"
    assert told[2] == {
        **dict.fromkeys(("ticket", "trial", "round", "sparsity"), ""),
        "against": "shuffled",
        "test_accuracy": "0.8000",
        "ticket leads by": told[2]["ticket leads by"],
        "claim": "beats",
    }
    assert told[2]["ticket leads by"].startswith("+10.0 ± ")
