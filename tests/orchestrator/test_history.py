from __future__ import annotations

from uuid import uuid4

from orchestrator import history
from orchestrator.store.store import Store
from search.proposer import Told

DONE = {"values": [0.5, 0.5], "constraints": {"b": -0.1}, "epochs": 4, "stages": 3, "outcomes": 2}


def test_the_past_is_read_from_proposals_and_events() -> None:
    store = Store(f"memory://{uuid4().hex}")
    ledger = store.ledger("s", 1)
    ledger.append("proposals", [{"trial": n, "params": {"rate": n}, "attrs": {"note": n}} for n in range(3)])
    shorter = {"params": {"rate": 9}, "values": [1.0, 2.0], "constraints": {}}
    for event, trial, detail in (
        ("started", None, {}),
        ("work", None, {"epochs": 2.5, "stages": 2}),
        ("failed", 0, {"reason": "why"}),
        ("failed", 1, {"reason": "then done"}),
        ("ended", None, {"finished": True}),
        ("started", None, {}),
        ("work", None, {"epochs": 1.5, "stages": 1}),
        ("done", 1, DONE),
        ("shorter", 1, shorter),
    ):
        ledger.append("events", [{"event": event, "trial": trial, "detail": detail}])
    ledger.flush()
    past = history.read(store, "s")
    assert (past.epochs_run, past.stages_run, past.outcomes, past.finished) == (4.0, 3, 2, False)
    assert {number: ending.state for number, ending in past.endings.items()} == {0: "failed", 1: "done"}
    assert past.endings[0].reason == "why" and past.unfinished() == [0, 2]
    assert past.added == [({"rate": 9}, (1.0, 2.0), {})]
    assert [told.state for told in past.told()] == ["running", "done", "running"], "a failed trial runs again"
    assert past.told()[1] == Told(
        number=1, params={"rate": 1}, attrs={"note": 1}, values=(0.5, 0.5), constraints={"b": -0.1}, state="done"
    )


def test_what_tickets_are_compared_with_is_known_by_trial() -> None:
    store = Store(f"memory://{uuid4().hex}")
    moved = [{"key": "moved", "controls": [{"key": "there"}]}]
    tickets = [{"controls": [{"key": "a"}, {"key": "b"}], "transfers": moved}, {"controls": [{"key": "a"}]}]
    ledger = store.ledger("s", 1)
    ledger.append("events", [{"event": "tickets", "trial": 2, "detail": {"params": {}, "tickets": tickets}}])
    ledger.flush()
    assert history.read(store, "s").compared == {2: {"a", "b", "moved", "there"}}


def test_measures_come_in_the_order_that_was_asked_for() -> None:
    store = Store(f"memory://{uuid4().hex}")
    ledger = store.ledger("s", 1)
    ledger.append("outcomes", [{"key": "k", "trial": 0, "round": 1, "sparsity": 0.5, "metrics": {"f1": 0.25}}])
    ledger.flush()
    ((key, values),) = history.measured(store, "s", ["f1", "sparsity", "loss", "f2"])
    assert key == "k"
    assert list(values.items()) == [("f1", 0.25), ("sparsity", 0.5), ("loss", None), ("f2", None)]
