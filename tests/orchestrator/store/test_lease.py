from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from orchestrator.errors import StoreError
from orchestrator.store import Files, Lease, acquire
from orchestrator.store.lease import Pulse, decided, process_alive, this_process

LEASES = "studies/s/lease"


@pytest.fixture(params=["folder", "memory"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Files:
    return Files(tmp_path if request.param == "folder" else f"memory://{uuid4().hex}")


class Time:
    """A clock that goes on by sleeping; `then` is done at each sleep."""

    def __init__(self, then: Callable[[], object] = lambda: None) -> None:
        self.now = 0.0
        self.then = then

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.then()


def take(files: Files, *, host: str = "here", pid: int = 1, boot: str = "b", living: set[int] | None = None) -> Lease:
    time_ = Time()
    return acquire(
        files, "s", host=host, pid=pid, boot=boot, clock=time_, sleep=time_.sleep, alive=(living or set()).__contains__
    )


def test_epochs_count_up(files: Files) -> None:
    for epoch in (1, 2, 3):
        lease = take(files, pid=epoch, living={1, 2, 3})
        assert lease.epoch == epoch
        lease.release()
        lease.release()
    holder = json.loads(files.read(f"{LEASES}/000002.json"))
    assert {"host", "pid", "boot_id", "started_at"} <= holder.keys() and holder["pid"] == 2
    assert files.exists(f"{LEASES}/000003.released")


def test_a_living_holder_is_named(files: Files) -> None:
    take(files, pid=7)
    with pytest.raises(StoreError, match=r"study s is being run by process 7 on here since 2\d{3}-.*; stop it first"):
        take(files, pid=8, living={7})
    assert files.list(LEASES) == ["000001.json"]


def test_a_dead_holder_here_is_taken_over_at_once(files: Files) -> None:
    take(files, pid=7)
    assert take(files, pid=8).epoch == 2


def test_our_own_earlier_lease_is_taken_over(files: Files) -> None:
    take(files, pid=7)
    assert take(files, pid=7, living={7}).epoch == 2


@pytest.mark.parametrize("other", [{"host": "there"}, {"boot": "earlier"}])
def test_a_holder_elsewhere_whose_counter_moves_is_named(files: Files, other: dict[str, Any]) -> None:
    holder = take(files, **other)
    holders_time = Time()
    holder = Lease(files, "s", holder.epoch, holders_time)
    holder.beat()

    def go_on() -> None:
        holders_time.now += 1.0
        holder.beat()

    mine = Time(go_on)
    with pytest.raises(StoreError, match="stop it first"):
        acquire(files, "s", host="here", pid=2, boot="b", clock=mine, sleep=mine.sleep)
    assert mine.now <= 5.0


@pytest.mark.parametrize("beaten", [False, True])
def test_a_holder_elsewhere_whose_counter_stands_still_is_dead(files: Files, beaten: bool) -> None:
    holder = take(files, host="there")
    if beaten:
        holder.beat()
    mine = Time()
    assert acquire(files, "s", host="here", pid=2, boot="b", clock=mine, sleep=mine.sleep).epoch == 2
    assert mine.now == 15.0


@pytest.mark.parametrize("ahead", [3600.0, -3600.0])
def test_clocks_an_hour_apart_do_not_matter(files: Files, ahead: float) -> None:
    """Neither the holder's wall clock nor its monotonic one is compared with ours."""
    started = datetime.now(UTC) + timedelta(seconds=ahead)
    holder = {"host": "there", "boot_id": "b", "pid": 1, "started_at": started.isoformat()}
    assert files.create(f"{LEASES}/000001.json", json.dumps(holder).encode())
    theirs, mine = Time(), Time()
    theirs.now, mine.now = 1e6 + ahead, 1e6
    lease = Lease(files, "s", 1, theirs)

    def both_go_on() -> None:
        theirs.now += 1.0
        lease.beat()

    mine.then = both_go_on
    with pytest.raises(StoreError, match="process 1 on there"):
        acquire(files, "s", host="here", pid=2, boot="b", clock=mine, sleep=mine.sleep)
    mine.then = lambda: None
    began = mine.now
    assert acquire(files, "s", host="here", pid=2, boot="b", clock=mine, sleep=mine.sleep).epoch == 2
    assert mine.now == began + 15.0


def test_while_the_store_is_away_no_holder_counts_as_dead(tmp_path: Path) -> None:
    """It could not beat then. Once the store answers again, it is watched for as long as ever."""
    mine = Time()

    class Away(Files):
        def list(self, folder: str) -> list[str]:
            mine.now += 60.0
            return super().list(folder)

    take(Files(tmp_path), host="there")
    files = Away(tmp_path)
    assert acquire(files, "s", host="here", pid=2, boot="b", clock=mine, sleep=mine.sleep).epoch == 2
    assert mine.now >= 15 * 60.0


def test_a_holder_here_that_is_stopped_is_watched_like_one_elsewhere(files: Files) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        here = this_process()
        holder = acquire(files, "s", **(here | {"pid": process.pid}))
        holder.beat()
        time_ = Time()
        watched = Pulse(files, "s", clock=time_)
        assert watched.look().alive is True
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        assert watched.look().alive is None
        assert decided(watched, time_.sleep).alive is False and 15 <= time_.now < 20
        process.send_signal(signal.SIGCONT)
        os.waitpid(process.pid, os.WCONTINUED)
        assert watched.look().alive is True
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        assert acquire(files, "s", **here, clock=time_, sleep=time_.sleep).epoch == 2
    finally:
        process.kill()
        process.wait()


def test_a_holder_elsewhere_that_lets_go_is_not_waited_for(files: Files) -> None:
    holder = take(files, host="there")
    mine = Time(holder.release)
    assert acquire(files, "s", host="here", pid=2, boot="b", clock=mine, sleep=mine.sleep).epoch == 2
    assert mine.now == 1.0


def test_who_takes_over_first_is_looked_at_again(files: Files) -> None:
    """While we watch a dead holder, another driver of this host takes over: it is refused by name, not overrun."""
    take(files, host="there")
    mine = Time(lambda: files.create(f"{LEASES}/000002.json", b'{"host": "here", "boot_id": "b", "pid": 9}'))
    with pytest.raises(StoreError, match="process 9 on here"):
        acquire(files, "s", host="here", pid=2, boot="b", clock=mine, sleep=mine.sleep, alive={9}.__contains__)


@pytest.mark.parametrize("content", [b"", b"torn {", b"[]", b'{"pid": "x"}'])
def test_a_foreign_lease_file_is_watched(files: Files, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    files.write(f"{LEASES}/000004.json", content)
    files.write(f"{LEASES}/notes.txt", b"")
    with caplog.at_level(logging.WARNING, "orchardist.store"):
        assert take(files).epoch == 5
    assert "000004.json" in caplog.text


# --- Who looks without wanting the study --------------------------------------------------------------------------


def elsewhere(files: Files) -> tuple[Lease, Time]:
    """A holder on another machine, which beats whenever it is asked to, and its clock."""
    theirs = Time()
    return Lease(files, "s", take(files, host="there", pid=9).epoch, theirs), theirs


def beat(lease: Lease, theirs: Time) -> None:
    theirs.now += 5.0
    lease.beat()


def test_nobody_is_known_at_once(files: Files) -> None:
    assert (Pulse(files, "s").look().alive, Pulse(files, "s").look().as_json()) == (False, None)
    lease, _ = elsewhere(files)
    lease.release()
    sign = Pulse(files, "s").look()
    assert (sign.alive, sign.epoch, sign.as_json()) == (False, 1, None)


def test_a_holder_elsewhere_is_not_known_until_its_counter_moves(files: Files) -> None:
    lease, theirs = elsewhere(files)
    lease.beat()
    mine = Time()
    pulse = Pulse(files, "s", clock=mine)
    for _ in range(3):
        assert pulse.look().alive is None, "one number says nothing: it may have been written last year"
    mine.now += 2.0
    beat(lease, theirs)
    sign = pulse.look()
    assert (sign.alive, sign.silent_seconds) == (True, 0.0) and sign.driver.startswith("process 9 on there since")


def test_one_that_falls_silent_is_alive_for_15_seconds_more_and_dead_then(files: Files) -> None:
    lease, theirs = elsewhere(files)
    mine = Time()
    pulse = Pulse(files, "s", clock=mine)
    pulse.look()
    beat(lease, theirs)
    pulse.look()
    seen = []
    for _ in range(20):
        mine.now += 2.0
        sign = pulse.look()
        seen.append((sign.silent_seconds, sign.alive))
    assert seen == [(2.0 * turn, 2.0 * turn < 15) for turn in range(1, 21)]
    beat(lease, theirs)
    assert pulse.look().alive is True, "it only stood still"


def test_a_newer_holder_is_a_sign_of_life(files: Files) -> None:
    elsewhere(files)
    mine = Time()
    pulse = Pulse(files, "s", clock=mine)
    pulse.look()
    mine.now += 40.0
    Files(files.url).create(f"{LEASES}/000002.json", b'{"host": "third", "boot_id": "b", "pid": 3}')
    sign = pulse.look()
    assert (sign.alive, sign.epoch, sign.driver[:18]) == (True, 2, "process 3 on third")


def test_a_reader_that_slept_has_seen_nothing(files: Files) -> None:
    """A laptop that was shut for an hour between two looks: the driver may have had no network either."""
    elsewhere(files)
    mine = Time()
    pulse = Pulse(files, "s", clock=mine)
    pulse.look()
    mine.now += 3600.0
    sign = pulse.look()
    assert sign.alive is None and sign.silent_seconds == 3600.0
    assert decided(pulse, mine.sleep).alive is False
    assert mine.now == 3600.0 + 10.0, "five of the fifteen seconds were seen"


def test_while_the_store_is_away_nobody_is_taken_for_dead(tmp_path: Path) -> None:
    mine = Time()

    class Slow(Files):
        def read(self, path: str) -> bytes:
            mine.now += 60.0
            return super().read(path)

    lease, theirs = elsewhere(Files(tmp_path))
    beat(lease, theirs)
    pulse = Pulse(Slow(tmp_path), "s", clock=mine)
    assert [pulse.look().alive for _ in range(5)] == [None] * 5 and mine.now >= 300


def test_looking_decides_in_15_seconds_and_writes_nothing(files: Files) -> None:
    elsewhere(files)
    before = files.list(LEASES)
    mine = Time()
    sign = decided(Pulse(files, "s", clock=mine), mine.sleep)
    assert (sign.alive, mine.now, sign.silent_seconds) == (False, 15.0, 15.0)
    assert files.list(LEASES) == before


def test_a_number_that_was_given_to_another_process_is_no_holder(files: Files) -> None:
    """A machine that runs for months gives out a process id twice."""
    here = this_process()
    acquire(files, "s", **here)
    assert Pulse(files, "s").look().alive is True
    path = f"{LEASES}/000001.json"
    holder = json.loads(files.read(path))
    assert holder["born"] > 0
    files.write(path, json.dumps(holder | {"born": holder["born"] - 1}).encode())
    assert Pulse(files, "s").look().alive is False
    files.write(path, json.dumps({name: value for name, value in holder.items() if name != "born"}).encode())
    assert Pulse(files, "s").look().alive is True, "one of a version that did not note it"


def test_two_containers_of_one_host_name_do_not_take_each_other_for_themselves(files: Files) -> None:
    """Each has a process 1; the boot is the machine's."""
    boot, space = str(this_process()["boot"]).split(" ", 1)
    assert space.startswith("pid:[")
    holder = Lease(files, "s", take(files, pid=1, boot=f"{boot} pid:[1]").epoch, Time())
    mine = Time(lambda: (setattr(holder, "_beaten_at", -9.0), holder.beat()))
    with pytest.raises(StoreError, match="process 1 on here"):
        acquire(files, "s", host="here", pid=1, boot=f"{boot} pid:[2]", clock=mine, sleep=mine.sleep)


@pytest.mark.parametrize("pid", [0, -1, 2**70, "x", None])
def test_a_number_that_no_process_has_is_watched(files: Files, pid: object) -> None:
    here = this_process()
    text = json.dumps({"host": here["host"], "boot_id": here["boot"], "pid": pid})
    files.write(f"{LEASES}/000001.json", text.encode())
    mine = Time()
    assert decided(Pulse(files, "s", clock=mine), mine.sleep).alive is False and mine.now == 15.0


# --- The holder's side ---------------------------------------------------------------------------------------------


def test_beats_are_rare(files: Files) -> None:
    clock = Time()
    lease = Lease(files, "s", 1, clock)
    counts = []
    for clock.now in (0.0, 1.0, 4.9, 5.0, 9.9, 10.5):
        lease.beat()
        counts.append(int(files.read(f"{LEASES}/000001.beat")))
    assert counts == [1, 1, 1, 2, 2, 3]


def test_a_holder_that_was_taken_over_from_sees_it_at_its_next_beat(files: Files) -> None:
    clock = Time()
    holder = Lease(files, "s", take(files, pid=7).epoch, clock)
    holder.beat()
    holder.check()
    assert take(files, pid=8).epoch == 2
    clock.now = 4.0
    holder.beat()
    holder.check()
    clock.now = 5.0
    holder.beat()
    for _ in range(2):
        with pytest.raises(
            StoreError, match=r"^study s was taken over by process 8 on here since 2\d{3}-.* stops here$"
        ):
            holder.check()
    clock.now = 50.0
    holder.beat()
    assert files.read(f"{LEASES}/000001.beat") == b"1", "it beats on"


def test_of_many_threads_one_gets_the_study(files: Files) -> None:
    def ask(pid: int) -> int | None:
        try:
            return take(files, pid=pid, living=set(range(100))).epoch
        except StoreError:
            return None

    with ThreadPoolExecutor(16) as threads:
        epochs = [epoch for epoch in threads.map(ask, range(1, 17)) if epoch]
    assert epochs == [1]


def test_of_two_processes_one_gets_the_study(tmp_path: Path) -> None:
    code = (
        "import os, sys, time\n"
        "from orchestrator.errors import StoreError\n"
        "from orchestrator.store import Files, acquire\n"
        "files = Files(sys.argv[1])\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "for turn in range(20):\n"
        "    try:\n"
        "        print(acquire(files, f's{turn}', host='h', pid=os.getpid(), boot='b').epoch, flush=True)\n"
        "    except StoreError as error:\n"
        "        assert 'stop it first' in str(error)\n"
        "        print('refused', flush=True)\n"
        "sys.stdin.readline()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipe = subprocess.PIPE
    with (
        subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as one,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as other,
    ):
        assert [process.stdout.readline() for process in (one, other) if process.stdout] == ["ready\n"] * 2
        for process in (one, other):
            assert process.stdin
            process.stdin.write("go\n")
            process.stdin.flush()
        answers = [[process.stdout.readline() for _ in range(20)] for process in (one, other) if process.stdout]
        for process in (one, other):
            process.communicate("\n")
    assert [sorted(pair) for pair in zip(*answers, strict=True)] == [["1\n", "refused\n"]] * 20


def test_who_is_alive() -> None:
    assert process_alive(os.getpid())
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    assert process_alive(process.pid)
    process.kill()
    deadline = time.monotonic() + 10
    while process_alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not process_alive(process.pid), "ended, not yet waited for"
    process.communicate()
    assert not process_alive(process.pid)
