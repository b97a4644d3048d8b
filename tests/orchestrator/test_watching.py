"""Following a study by its store alone, and what is published of it."""

from __future__ import annotations

from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from orchestrator import Study, StudySpec
from orchestrator.metrics import METRICS, metrics
from orchestrator.pools.local import LocalPool
from orchestrator.progress import Lines, Standing
from orchestrator.watching import EVERY_SECONDS, PATIENCE_SECONDS, standing_of, watch


class Clock:
    """Time that passes by sleeping."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def status(state: str, done: int) -> dict[str, Any]:
    return {
        "state": state,
        "trials": {"asked": 4, "done": done, "running": 1, "failed": 0, "stopped": 0},
        "epochs": {"asked": 10.0 * done, "run": 5.0 * done},
        "stages": {"asked": 2 * done, "run": done},
        "retries": {"preempted": 1, "worker died": 2},
        "best": {"accuracy": 0.9},
    }


def followed(*said: dict[str, Any]) -> tuple[str, list[str], float]:
    """The state in the end, the lines and the time: the last status stays."""
    coming, clock, stream = list(said), Clock(), StringIO()

    def next_status() -> Mapping[str, Any]:
        return coming.pop(0) if len(coming) > 1 else coming[0]

    shown = Lines(stream, clock, at_once=True)
    state = watch(next_status, shown, clock=clock, sleep=clock.sleep)
    return state, stream.getvalue().splitlines(), clock.now


def test_it_ends_with_the_study() -> None:
    running = [status("running", min(4, n // 5)) for n in range(20)]
    state, lines, seconds = followed(*running, status("done", 4))
    assert state == "done" and seconds == 20 * EVERY_SECONDS
    assert lines[0].startswith("0/4 trials") and lines[-1].startswith("4/4 trials")
    assert "20 of 40 epochs" in lines[-1] and "best of each: accuracy 0.9" in lines[-1] and "3 tried again" in lines[-1]
    assert len(lines) == 5, "one at once, one every ten seconds, and the last at the end"


def test_a_driver_that_is_away_for_a_moment_is_waited_for() -> None:
    away = [status("stopped", 1)] * int(PATIENCE_SECONDS / EVERY_SECONDS - 1)
    state, _, _ = followed(*away, status("running", 2), *away, status("done", 4))
    assert state == "done"


def test_a_study_that_nobody_runs_is_left_after_a_minute() -> None:
    state, lines, seconds = followed(status("stopped", 1))
    assert state == "stopped" and seconds == PATIENCE_SECONDS and lines[-1].startswith("1/4 trials")


def test_a_study_that_is_done_is_told_of_once() -> None:
    state, lines, seconds = followed(status("done", 4))
    assert state == "done" and len(lines) == 1 and seconds == 0


def test_an_interrupt_leaves_a_last_line() -> None:
    stream = StringIO()

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watch(lambda: status("running", 1), Lines(stream, Clock()), clock=Clock(), sleep=interrupted)
    assert stream.getvalue().startswith("1/4 trials")


class Watched(LocalPool):
    """Keeps what was published."""

    def __init__(self) -> None:
        super().__init__()
        self.published: list[tuple[str, dict[str, float]]] = []

    def publish(self, study: str, counts: Mapping[str, float]) -> None:
        self.published.append((study, dict(counts)))


def test_a_run_publishes_every_count_and_its_status_says_the_same(tmp_path: Path) -> None:
    spec = StudySpec(
        name="watched",
        task="digits",
        trials=3,
        task_params={"hidden": 8},
        train={"epochs": 1, "retrain_epochs": 0.5},
        space={"criterion": "magnitude", "rate": [0.3, 0.5, 0.7], "rounds": 1, "retrain": "finetune"},
        sampler="grid",
    )
    study, pool = Study(spec, tmp_path), Watched()
    standing = study.run(pool)
    assert pool.published and all(
        name == "watched" and counts.keys() == METRICS.keys() for name, counts in pool.published
    )
    read = standing_of(study.status())
    assert (read.asked, read.done, read.epochs_run, read.best) == (3, 3, standing.epochs_run, standing.best)


def test_the_counts_are_those_of_the_standing() -> None:
    standing = Standing(asked=9, done=4, failed=1, running=2, epochs_asked=40, epochs_run=25, stages_run=7, retries=3)
    found = metrics(standing, 5)
    assert found["epochs_saved"] == 15 and found["queue_length"] == 5 and found["retries"] == 3
    assert found.keys() == METRICS.keys()
