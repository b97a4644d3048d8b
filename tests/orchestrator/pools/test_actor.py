from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from orchestrator.interrupts import STOPS
from orchestrator.pools import actor
from orchestrator.pools.actor import Actor


def test_a_share_of_a_gpu_is_enforced_in_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    shares: list[float] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    assert [Actor(0, gpus).device for gpus in (0.25, 1, 2, 0)] == ["cuda", "cuda", "cuda", "cpu"]
    assert shares == [0.25, 1.0, 1.0]


def test_a_gpu_that_torch_does_not_see_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(actor, "_place", lambda: ("ab", ""))
    what, said, place = Actor(0, 0.5).prepare(object())  # type: ignore[arg-type]
    assert (what, place) == ("WorkersUnusable", ("ab", "")) and "torch sees none" in said


class Leaving:
    """A worker that notes when it is asked to leave."""

    def __init__(self) -> None:
        self.asked = threading.Event()

    def leave(self) -> None:
        self.asked.set()


@pytest.fixture
def drained(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What looks at the cluster find, one after the other: nodes that are being drained, or an error."""
    found: list[Any] = []

    def look() -> Any:
        answer = found.pop(0) if len(found) > 1 else found[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    from ray._private.state import state

    monkeypatch.setattr(state, "get_draining_nodes", look)
    monkeypatch.setattr(actor, "_place", lambda: ("here", ""))
    monkeypatch.setattr(actor, "NOTICE_SECONDS", 0.005)
    before = {number: signal.getsignal(number) for number in STOPS}
    yield found
    found[:] = [{"here": 0}]  # which ends every watch
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_worker_sees_by_itself_that_its_node_is_to_go(drained: list[Any]) -> None:
    drained += [{}, {"elsewhere": 0}, RuntimeError("the head is out of reach"), {"elsewhere": 0, "here": 0}]
    ours, first, second = Actor(0, 0), Leaving(), Leaving()
    ours.worker = first  # type: ignore[assignment]
    ours._begin_watch()
    assert first.asked.wait(10)
    assert len(drained) == 1, "neither other nodes nor an error count"
    ours.worker = second  # type: ignore[assignment]
    ours._begin_watch()
    assert second.asked.is_set(), "the worker of a later study is told at once"


def test_the_worker_at_hand_is_told_not_the_one_that_was_there_first(drained: list[Any]) -> None:
    drained += [{}]
    ours, first, second = Actor(0, 0), Leaving(), Leaving()
    ours.worker = first  # type: ignore[assignment]
    ours._begin_watch()
    ours.worker = second  # type: ignore[assignment]
    ours._begin_watch()
    drained[0] = {"here": 0}
    assert second.asked.wait(10) and not first.asked.is_set()


@pytest.mark.parametrize("stop", STOPS)
def test_who_is_told_to_end_leaves_and_raises_nothing(stop: signal.Signals, drained: list[Any]) -> None:
    drained += [{}]
    ours, worker = Actor(0, 0), Leaving()
    ours.worker = worker  # type: ignore[assignment]
    ours._begin_watch()
    signal.raise_signal(stop)
    assert worker.asked.is_set() and ours.drained
