from __future__ import annotations

import signal
import threading
import time
from uuid import uuid4

import pytest

import orchestrator.store.lease as leases
from orchestrator import driver
from orchestrator.errors import StoreError
from orchestrator.store.files import Files
from orchestrator.store.lease import Lease


def test_an_interrupt_waits_until_the_block_is_done() -> None:
    steps = []

    def work() -> None:
        with driver._uninterrupted():
            signal.raise_signal(signal.SIGINT)
            steps.append("done all the same")
        steps.append("never")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert steps == ["done all the same"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_another_thread_is_not_in_the_way_of_signals() -> None:
    done = []

    def work() -> None:
        with driver._uninterrupted():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done


def test_the_lease_beats_while_the_driver_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "_BEAT_CHECK_SECONDS", 0.001)
    beats = []

    class Troubled(Lease):
        """Counts, and cannot write the first time."""

        def beat(self) -> None:
            beats.append(None)
            if len(beats) == 1:
                raise StoreError("the disk is full for a moment")

    lease = Troubled(Files(f"memory://{uuid4().hex}"), "s", 1)
    with leases.beating(lease):
        patience = time.monotonic() + 10
        while len(beats) < 3 and time.monotonic() < patience:
            time.sleep(0.001)
    count = len(beats)
    assert count >= 3
    time.sleep(0.02)
    assert len(beats) == count, "it beats on after the end"
