"""Ctrl-C and SIGTERM: heard once, held back, noticed, and in the end the end."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from orchestrator.interrupts import STOPS, heard, held, noticed

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def as_they_were() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOPS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_an_interrupt_waits_until_the_block_is_done() -> None:
    steps = []

    def work() -> None:
        with held():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            steps.append("done all the same")
        steps.append("never")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert steps == ["done all the same"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_third_interrupt_does_not_wait() -> None:
    with pytest.raises(KeyboardInterrupt), held():
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
        pytest.fail("it waits")


def test_sigterm_waits_too_and_means_afterwards_what_it_meant() -> None:
    came: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    with held():
        signal.raise_signal(signal.SIGTERM)
        assert not came
    assert came == [signal.SIGTERM]


def test_blocks_lie_within_each_other() -> None:
    steps = []
    with pytest.raises(KeyboardInterrupt), held():
        with held():
            signal.raise_signal(signal.SIGINT)
        steps.append("the outer one is not done yet")
    assert steps


@pytest.mark.parametrize("manager", [held, lambda: heard(str), lambda: noticed([])])
def test_another_thread_is_not_in_the_way_of_signals(manager) -> None:  # type: ignore[no-untyped-def]
    done = []

    def work() -> None:
        with manager():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done


@pytest.mark.parametrize("stop", STOPS)
def test_the_second_does_not_disturb_what_the_first_has_cleaned_up_after(
    stop: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    steps = []

    def work() -> None:
        try:
            signal.raise_signal(stop)
        finally:
            signal.raise_signal(stop)
            steps.append("cleaned up")

    with pytest.raises(KeyboardInterrupt), heard(str):
        work()
    assert steps == ["cleaned up"]
    assert capfd.readouterr().err == "stopping; once more ends it at once\n"
    assert [signal.getsignal(number) for number in STOPS] == [signal.SIG_IGN] * 2, "the process is about to end"


def test_where_nothing_came_signals_mean_what_they_meant() -> None:
    before = [signal.getsignal(number) for number in STOPS]
    with heard(str):
        pass
    assert [signal.getsignal(number) for number in STOPS] == before


def test_one_that_a_destructor_swallows_comes_again() -> None:
    class Interrupted:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), heard(str):
        Interrupted()
        time.sleep(10)


def test_the_third_ends_the_process_and_what_it_started_with_the_last_words() -> None:
    code = (
        "import os, signal, subprocess, sys, time\n"
        "from orchestrator.interrupts import heard\n"
        "with heard(lambda: 'the last words'):\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "    print(child.pid, flush=True)\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(10)\n"
        "    finally:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(10)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr == "stopping; once more ends it at once\nthe last words\n"
    deadline = time.monotonic() + 10
    child = Path(f"/proc/{int(done.stdout)}/stat")
    while child.exists() and child.read_text().rpartition(") ")[2][0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_ctrl_c_is_noticed_and_what_others_raise_is_not() -> None:
    asked: list[int] = []
    with pytest.raises(KeyboardInterrupt), noticed(asked):
        raise KeyboardInterrupt
    assert not asked
    with noticed(asked), suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert asked == [signal.SIGINT]


@pytest.mark.parametrize("stop", STOPS)
def test_a_process_that_is_done_ends_as_it_was_to_end(stop: signal.Signals) -> None:
    code = (
        "import atexit, os, signal\n"
        f"atexit.register(os.kill, os.getpid(), {int(stop)})\n"
        "from orchestrator.interrupts import heard\n"
        "with heard(str):\n"
        "    raise SystemExit(3)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (3, "")
