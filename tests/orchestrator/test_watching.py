"""Following a study by its store alone, and what is published of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from orchestrator import Study, StudySpec
from orchestrator.cli import main
from orchestrator.errors import StoreError
from orchestrator.metrics import METRICS, metrics
from orchestrator.pools.local import LocalPool
from orchestrator.progress import Lines, Standing
from orchestrator.store import lease
from orchestrator.watching import EVERY_SECONDS, PATIENCE_SECONDS, standing_of, watch
from tests.orchestrator.store.conftest import hurry


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
        "driver": None,
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


def silent(seconds: float, *, alive: bool | None) -> dict[str, Any]:
    """A status while the driver elsewhere has been silent for so long."""
    said = {"held_by": "process 7 on there since 2026", "alive": alive, "silent_seconds": seconds}
    return status("stopped" if alive is False else "running", 1) | {"driver": said}


def test_a_driver_elsewhere_that_falls_silent_is_said_to_be_silent() -> None:
    beating = [silent(seconds % 6, alive=True) for seconds in range(10)]
    dying = [silent(2.0 * turn, alive=None if 2 * turn < 15 else False) for turn in range(60)]
    state, lines, seconds = followed(*beating, *dying)
    assert state == "stopped"
    assert "no sign of life" not in lines[0] and "no sign of life" not in lines[1]
    assert any(line.endswith("no sign of life from process 7 on there since 2026 for 40 s") for line in lines)
    assert seconds == 10 * EVERY_SECONDS + 16 + PATIENCE_SECONDS, "the minute begins when it counts as dead"


def test_a_driver_here_that_is_gone_is_said_to_be_gone() -> None:
    state, lines, _ = followed(silent(0.0, alive=False))
    assert state == "stopped" and lines[-1].endswith("process 7 on there since 2026 is gone")


def test_a_store_that_is_away_for_a_while_ends_no_watch() -> None:
    clock, stream = Clock(), StringIO()

    def next_status() -> Mapping[str, Any]:
        if 10 <= clock.now < away_until:
            raise StoreError("cannot read")
        return status("running" if clock.now < 400 else "done", 1)

    away_until = 200.0
    assert watch(next_status, Lines(stream, clock, at_once=True), clock=clock, sleep=clock.sleep) == "done"
    assert "no answer of the store for 1" in stream.getvalue()
    clock.now, away_until = 0.0, 1e9
    with pytest.raises(StoreError, match="cannot read"):
        watch(next_status, Lines(stream, clock), clock=clock, sleep=clock.sleep)
    assert 300 <= clock.now < 320
    with pytest.raises(StoreError, match="cannot read"):
        watch(next_status, Lines(stream, clock), clock=clock, sleep=clock.sleep)
    assert clock.now < 320, "one that never answered is not waited for"


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


# --- A driver on another machine -----------------------------------------------------------------------------------


def test_a_study_whose_driver_died_elsewhere_is_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch)
    study = Study(StudySpec(name="lost", task="digits", space={"rate": [0.5]}), tmp_path)
    study.store.write_study("lost", study.spec.to_toml(), {"digest": study.spec.digest()})
    dead = lease.acquire(study.store.files, "lost", host="elsewhere", pid=1, boot="b")
    dead.beat()
    found = study.status()
    assert (
        found["state"] == "stopped" and found["driver"]["alive"] is False and found["driver"]["silent_seconds"] >= 0.5
    )
    pulse = study.pulse()
    assert (study.status(pulse)["state"], study.status(pulse)["driver"]["alive"]) == ("running", None), "not known yet"
    with lease.beating(lease.Lease(study.store.files, "lost", dead.epoch)):
        assert study.status()["state"] == "running"
    assert call(["status", "lost", "--store", str(tmp_path), "--format", "json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["state"] == "stopped" and said["driver"]["held_by"].startswith("process 1 on elsewhere since 2")
    assert call(["status", "lost", "--store", str(tmp_path)]) == 0
    assert "process 1 on elsewhere since" in capsys.readouterr().out
    dead.release()
    assert study.status()["driver"] is None


def call(arguments: list[str]) -> int:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["orchardist", *arguments])
        main()
    return int(ended.value.code or 0)
