"""The simulation of a large cluster is a whole study, and the driver never leaves its workers alone for long."""

from __future__ import annotations

import time

import pytest

from tests.benchmarks.scale import Clock, simulate


def test_a_simulated_study_comes_to_its_end() -> None:
    found = simulate(workers=4, trials=20, rounds=2, store_ms=0.0, report_ms=1.0)
    assert found["states"] > 20 and found["stages"] > found["states"]
    assert found["minutes"] > 20 * 30 / 60 / 4, "a retraining takes half a minute"
    assert 0 < found["busy"] < 1


def test_a_driver_looks_at_its_workers_between_the_beginnings_of_trials() -> None:
    """Each asks a store some questions, and a store that is far away takes its time to answer."""
    found = simulate(workers=4, trials=20, rounds=2, store_ms=100.0, report_ms=1.0)
    assert found["turns_before"] > 3


def test_the_clock_goes_on_by_what_is_charged_and_jumps_over_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, clock = [5.0], Clock()
    monkeypatch.setattr(time, "thread_time", lambda: taken[0])
    clock.resume()
    taken[0] = 7.0
    assert clock.now() == 2.0
    clock.stop()
    clock.charge(1.0)
    clock.jump(10.0)
    clock.jump(4.0)
    assert (clock.now(), clock.busy) == (10.0, 3.0)
