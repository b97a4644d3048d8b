"""Whatever the user's code raises becomes a failed outcome: short, readable, and without secrets."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator import Study
from orchestrator.interrupts import STOPS, heard
from orchestrator.joblog import lines_to
from orchestrator.pools.failure import LONGEST_LINE, MOST_LETTERS, MOST_LINES, kind_of, message_of, traceback_of
from orchestrator.pools.local import LocalPool
from orchestrator.pools.protocol import Pool
from orchestrator.spec import StudySpec


class Panic(BaseException):
    pass


class Mute(Exception):
    def __str__(self) -> str:
        raise Panic

    __repr__ = __str__


class Picky(Exception):
    """Cannot be pickled: it wants two arguments and keeps one."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one)


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (Panic("a crash"), "Panic: a crash"),
        (KeyboardInterrupt("of the user"), "KeyboardInterrupt: of the user"),
        (Mute(), "Mute: what it says cannot be read: its __str__ raises Panic"),
        (Picky("one", "two"), "Picky: one"),
        (RuntimeError("a\0b\ud800\x1b[2J\n\n  c"), "RuntimeError: a\ufffdb\\ud800\ufffd[2J c"),
    ],
)
def test_every_error_has_a_message(error: BaseException, message: str) -> None:
    assert kind_of(error) == "raised" and message_of(error) == message
    assert type(error).__name__ in traceback_of(raised(error))


def test_a_long_message_is_cut() -> None:
    error = raised(RuntimeError("x" * 5_000_000))
    assert message_of(error) == f"RuntimeError: {'x' * MOST_LETTERS}"[:MOST_LETTERS] + "…"
    assert len(traceback_of(error)) < MOST_LINES * (LONGEST_LINE + 2)
    assert "in raised" in traceback_of(error), "where it was is not lost"


TASK = """
import os, signal
import torch
import torch.nn.functional as F
from torch import nn

from orchestrator.tasks import Task


class Panic(BaseException):
    pass


class Mute(Exception):
    def __init__(self, one, two):
        super().__init__(one)

    def __str__(self):
        raise ValueError("no words")


def come(trouble):
    if trouble == "panic":
        raise Panic("native code has panicked")
    if trouble == "interrupt":
        raise KeyboardInterrupt("not a key was pressed")
    if trouble == "generator":
        raise GeneratorExit
    if trouble == "mute":
        raise Mute(1, 2)
    if trouble == "long":
        raise RuntimeError("x" * 5_000_000 + chr(0) + chr(0xD800))
    if trouble in ("SIGINT", "SIGTERM"):
        os.kill(os.getpid(), getattr(signal, trouble))
        raise RuntimeError("what the user's code makes of it")
    if trouble == "secret":
        word = os.environ["AWS_SECRET_ACCESS_KEY"]
        raise RuntimeError("cannot log in with " + word + " at postgres://bob:DBPASS99@db/x")


def task(trouble: str = "") -> Task:
    def loss(outputs, targets):
        if not outputs.abs().max() < 1e4:
            come(trouble)
        return F.cross_entropy(outputs, targets)

    g = torch.Generator().manual_seed(0)
    y = torch.arange(48) % 3
    x = torch.randn(48, 4, generator=g) + 2 * torch.eye(3, 4)[y]
    model = lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    return Task(model=model, train=(x[:32], y[:32]), valid=(x[32:40], y[32:40]), test=(x[40:], y[40:]), loss=loss)
"""


def study(folder: Path, trouble: str) -> Study:
    (folder / "root").mkdir()
    (folder / "root" / "odd_task.py").write_text(TASK)
    table: dict[str, Any] = {
        "name": "odd",
        "task": "odd_task.py",
        "task_params": {"trouble": trouble},
        "trials": 4,
        "sampler": "grid",
        "train": {"epochs": 2, "retrain_epochs": 1, "batch_size": 16, "optimizer": "sgd"},
        "space": {"rate": [0.3, 0.5], "lr": [0.05, 1e12]},
    }
    return Study(StudySpec(**table), folder / "store", root=folder / "root")


TROUBLES = [
    ("panic", "Panic: native code has panicked"),
    ("interrupt", "KeyboardInterrupt: not a key was pressed"),
    ("generator", "GeneratorExit: "),
    ("mute", "Mute: what it says cannot be read: its __str__ raises ValueError"),
    ("long", "RuntimeError: xxx"),
]


def assert_it_fails_and_the_study_goes_on(folder: Path, trouble: str, said: str, pool: Callable[[], Pool]) -> None:
    opened = study(folder, trouble)
    standing = opened.run(pool)
    assert (standing.done, standing.failed) == (2, 2)
    failures = opened.status()["failures"].values()
    assert all(why.startswith(f"raised: {said}") and len(why) < MOST_LETTERS + 20 for why in failures)
    assert sum(path.stat().st_size for path in (folder / "store" / "studies").rglob("*") if path.is_file()) < 500_000


@pytest.mark.parametrize(("trouble", "said"), TROUBLES)
def test_it_fails_and_the_study_goes_on(trouble: str, said: str, tmp_path: Path) -> None:
    assert_it_fails_and_the_study_goes_on(tmp_path, trouble, said, LocalPool)


@pytest.mark.ray
def test_on_ray_too(tmp_path: Path, ray_cluster: None) -> None:
    from orchestrator.pools.ray import RayPool

    for trouble, said in TROUBLES:
        (tmp_path / trouble).mkdir()
        assert_it_fails_and_the_study_goes_on(tmp_path / trouble, trouble, said, lambda: RayPool(1))


@pytest.mark.parametrize("stop", STOPS)
def test_it_stops_the_run_whatever_the_users_code_makes_of_it(stop: signal.Signals, tmp_path: Path) -> None:
    before = {number: signal.getsignal(number) for number in STOPS}
    opened = study(tmp_path, stop.name)
    try:
        with heard(str):
            heard_by = [signal.getsignal(number) for number in STOPS]
            with pytest.raises(KeyboardInterrupt):
                opened.run(LocalPool())
            assert [signal.getsignal(number) for number in STOPS] == heard_by
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert opened.status()["trials"]["failed"] == 0


class Untraceable(Exception):
    @property
    def __traceback__(self) -> None:  # type: ignore[override]
        raise ValueError("not told")


def test_an_error_that_tells_nothing_of_itself_has_a_traceback_all_the_same() -> None:
    nameless = type("Nameless", (Exception,), {"__module__": 5})
    assert traceback_of(Untraceable("x")) == "it cannot be told: ValueError"
    for error in (Untraceable("x"), nameless("x")):
        assert message_of(error).endswith(": x") and traceback_of(error)


def test_no_secret_of_the_environment_is_written_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalr/Hemlock+42")
    opened = study(tmp_path, "secret")
    with lines_to(str(tmp_path / "log.jsonl")), caplog.at_level(logging.DEBUG):
        standing = opened.run(LocalPool())
    assert standing.failed == 2 and "cannot log in with *** at postgres://db/x" in standing.last_failure
    rows = opened.store.table("odd", "events").to_pylist()
    places = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "odd_task.py"]
    shown = [json.dumps(opened.status()), json.dumps(rows, default=str), caplog.text]
    for secret in ("wJalr/Hemlock+42", "DBPASS99"):
        assert not any(secret.encode() in place for place in places)
        assert not any(secret in text for text in shown)


def test_the_driver_leaves_out_its_own_secrets_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalr/Hemlock+42")
    monkeypatch.setattr("orchestrator.pools.failure.without_secrets", lambda text, environ: text)  # another machine's
    opened = study(tmp_path, "secret")
    assert "cannot log in with ***" in opened.run(LocalPool()).last_failure
    (row, *_) = [row for row in opened.store.table("odd", "events").to_pylist() if row["event"] == "stage failed"]
    assert "Hemlock" not in row["detail"] and "odd_task.py" in row["detail"]
