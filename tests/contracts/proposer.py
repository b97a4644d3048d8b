"""What every proposer keeps to, whatever draws its proposals: one check a promise, each given a factory.

@pytest.mark.parametrize("check", PROPOSER_CHECKS)
def test_contract(check):
    check(factory)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import pytest

from search.proposer import Added, Proposal, Proposer, State, Told
from search.space import Space, parse

SPACE: Space = parse(
    {
        "scope": "layer",
        "criterion": ["magnitude", "taylor"],
        "rate": {"low": 0.1, "high": 0.2, "step": 0.05},
        "retrain": ["finetune", "rewind"],
        "rewind_epoch": {"choices": [0, 1], "when": {"retrain": ["rewind"]}},
    }
)
"""Eighteen points, small enough for a grid, with a parameter that applies only sometimes."""

ENQUEUED: tuple[Mapping[str, Any], ...] = ({"criterion": "taylor", "rate": 0.15}, {"rewind_epoch": 1})


class Factory(Protocol):
    """Makes a proposer over `SPACE` that maximises the first objective and minimises the second."""

    def __call__(
        self,
        *,
        enqueued: Sequence[Mapping[str, Any]] = (),
        history: Sequence[Told] = (),
        added: Sequence[Added] = (),
    ) -> Proposer: ...


def asked(proposer: Proposer) -> Proposal:
    """The next proposal, which must exist."""
    proposal = proposer.ask()
    assert proposal is not None
    return proposal


def result(proposal: Proposal) -> tuple[float, float]:
    """A made-up outcome that depends on the parameters alone."""
    return proposal.params["rate"] * (2 if proposal.params["criterion"] == "taylor" else 1), proposal.params["rate"]


def told(proposal: Proposal, state: State = "done") -> Told:
    """The record of the proposal, its notes having been through JSON as they are in a ledger."""
    attrs = json.loads(json.dumps(proposal.attrs))
    values = result(proposal) if state == "done" else None
    return Told(number=proposal.number, params=proposal.params, attrs=attrs, values=values, state=state)


def numbers_go_up_without_gaps(factory: Factory) -> None:
    proposer = factory()
    assert [asked(proposer).number for _ in range(4)] == [0, 1, 2, 3]


def proposals_are_complete_points_of_plain_values(factory: Factory) -> None:
    proposer = factory()
    for _ in range(6):
        proposal = asked(proposer)
        assert SPACE.complete(proposal.params)
        assert SPACE.validate(proposal.params, "proposal") == proposal.params
        assert {type(value) for value in proposal.params.values()} <= {int, float, str, bool}
        assert json.loads(json.dumps(proposal.attrs)) == proposal.attrs


def trials_end_in_any_order_and_state(factory: Factory) -> None:
    proposer = factory()
    first, second, third, fourth = (asked(proposer) for _ in range(4))
    proposer.tell(third.number, result(third), constraints={"accuracy": -0.1})
    proposer.tell(second.number, None, state="failed")
    proposer.tell(fourth.number, None, state="stopped")
    proposer.tell(first.number, (float("nan"), 0.5), constraints={"accuracy": 0.1})
    assert asked(proposer).number == 4


def a_second_word_on_a_trial_changes_nothing(factory: Factory) -> None:
    proposer, once = factory(), factory()
    for one in (proposer, once):
        first = asked(one)
        one.tell(first.number, result(first))
    proposer.tell(0, (9.0, 9.0))
    assert asked(proposer) == asked(once)


def a_stopped_trial_may_go_on(factory: Factory) -> None:
    proposer = factory()
    first = asked(proposer)
    proposer.tell(first.number, None, state="stopped")
    proposer.tell(first.number, result(first))
    assert asked(proposer).number == 1


def a_trial_that_was_never_asked_cannot_end(factory: Factory) -> None:
    proposer = factory()
    with pytest.raises(ValueError, match="never asked"):
        proposer.tell(0, (0.5, 0.5))
    asked(proposer)
    with pytest.raises(ValueError, match="done, failed or stopped"):
        proposer.tell(0, None, state="running")


def an_added_trial_takes_no_number(factory: Factory) -> None:
    proposer = factory()
    first = asked(proposer)
    proposer.add(first.params, (0.3, 0.1), {"accuracy": -0.1})
    proposer.add(first.params, (0.3, 0.1), {"accuracy": -0.1})
    assert asked(proposer).number == 1


def enqueued_points_come_first_and_once(factory: Factory) -> None:
    proposer = factory(enqueued=ENQUEUED)
    first = asked(proposer)
    assert first.attrs["enqueued"] == ENQUEUED[0]
    assert (first.params["criterion"], first.params["rate"]) == ("taylor", 0.15)
    again = factory(enqueued=[*ENQUEUED, {"rate": 0.2}], history=[told(first, "running")])
    second, third, fourth = asked(again), asked(again), asked(again)
    assert (second.number, second.attrs["enqueued"]) == (1, ENQUEUED[1])
    assert second.params["rewind_epoch"] == 1
    assert second.params["retrain"] == "rewind", "a value brings the condition under which it applies"
    assert (third.attrs["enqueued"], third.params["rate"]) == ({"rate": 0.2}, 0.2)
    assert "enqueued" not in fourth.attrs


def enqueued_points_are_known_by_what_they_say(factory: Factory) -> None:
    def run(enqueued: Sequence[Mapping[str, Any]], history: Sequence[Told] = ()) -> list[Told]:
        """The enqueued points as they are run, one after the other."""
        proposer, records = factory(enqueued=enqueued, history=history), []
        while "enqueued" in (proposal := asked(proposer)).attrs:
            proposer.tell(proposal.number, result(proposal))
            records.append(told(proposal))
        return records

    def rates(records: Sequence[Told]) -> list[float]:
        return [record.params["rate"] for record in records]

    low, middle, high = ({"rate": rate} for rate in (0.1, 0.15, 0.2))
    ran = run([low, middle])
    assert rates(ran) == [0.1, 0.15]
    assert rates(run([high, low, middle], ran)) == [0.2], "prepended"
    assert rates(run([middle, low], ran)) == [], "in another order"
    others = [{"rate": 0.2}, {"criterion": "taylor", "rate": 0.1}]
    assert rates(run(others, ran)) == [0.2, 0.1], "replaced"
    assert rates(run([low, middle, low], ran)) == [0.1], "once more"
    twice = run([low, low, middle])
    assert rates(twice) == [0.1, 0.1, 0.15]
    assert [rates(run([low, low, middle], twice[:cut])) for cut in (1, 2, 3)] == [[0.1, 0.15], [0.15], []]
    other = {"rate": 0.1 + 0.05, "criterion": "magnitude"}
    assert run([{"criterion": "magnitude", "rate": 0.15}], run([other])) == [], "spelled otherwise"
    by_index = [Told(number=0, params=ran[0].params, attrs={"enqueued": 0}, values=ran[0].values, state="done")]
    assert rates(run([low, low, middle], by_index)) == [0.1, 0.15], "as an earlier version noted it"


def a_rebuild_at_any_point_goes_on_the_same(factory: Factory) -> None:
    total, uncut = 16, []
    proposer = factory(enqueued=ENQUEUED)
    for _ in range(total):
        uncut.append(asked(proposer))
        proposer.tell(uncut[-1].number, result(uncut[-1]))
    for cut in (1, 2, 3, 11, 14):
        rebuilt = factory(enqueued=ENQUEUED, history=[told(proposal) for proposal in uncut[:cut]])
        for expected in uncut[cut : cut + 2]:
            proposal = asked(rebuilt)
            assert proposal == expected
            rebuilt.tell(proposal.number, result(proposal))


def a_rebuild_knows_running_stopped_and_failed_trials(factory: Factory) -> None:
    proposer = factory()
    proposals = [asked(proposer) for _ in range(4)]
    proposer.tell(1, None, state="stopped")
    proposer.tell(2, None, state="failed")
    proposer.tell(3, result(proposals[3]))
    states: list[State] = ["running", "stopped", "failed", "done"]
    history = [told(proposal, state) for proposal, state in zip(proposals, states, strict=True)]
    rebuilt = factory(history=history)
    assert asked(rebuilt) == asked(proposer)
    for one in (rebuilt, proposer):
        one.tell(0, result(proposals[0]))
    assert asked(rebuilt) == asked(proposer)


PROPOSER_CHECKS: tuple[Callable[[Factory], None], ...] = (
    numbers_go_up_without_gaps,
    proposals_are_complete_points_of_plain_values,
    trials_end_in_any_order_and_state,
    a_second_word_on_a_trial_changes_nothing,
    a_stopped_trial_may_go_on,
    a_trial_that_was_never_asked_cannot_end,
    an_added_trial_takes_no_number,
    enqueued_points_come_first_and_once,
    enqueued_points_are_known_by_what_they_say,
    a_rebuild_at_any_point_goes_on_the_same,
    a_rebuild_knows_running_stopped_and_failed_trials,
)
