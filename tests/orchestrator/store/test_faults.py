"""Everything that a store's n-th call can do to a study: nothing finished is lost, nothing counts twice."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import pytest

from orchestrator import Study
from orchestrator.errors import StoreError, StoreFailed
from orchestrator.pools.local import LocalPool
from orchestrator.pools.protocol import Event
from orchestrator.store import Files, Ledger, States, paths
from orchestrator.store.tables import read as read_ledger
from tests.contracts.store import CHECKS, safetensors
from tests.faulty import FAULTS, PASSING, Faulty, Killed, random_faults
from tests.orchestrator.pools import small
from tests.orchestrator.store.test_s3 import assert_same, root, undisturbed  # noqa: F401 fixtures

TRIALS = 5


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "orchardist")


def no_sleep(_: float) -> None:
    """A store in memory needs no time to come back."""


def key(trial: int) -> str:
    return f"{trial:064x}"


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Callable[[str], None]) -> None:
    """Without a fault it is a good store; where it is not, the tests below prove nothing."""
    check(Faulty(uuid4().hex).url)


def drive(url: str, epoch: int, draw: random.Random) -> None:
    """A driver in small, to the end of its trials: what it finds done stays as it is.

    As the real one does, it takes an outcome that the ledger does not have from the state's header.
    """
    files = Files(url, sleep=no_sleep)
    states, ledger = States(files), Ledger(files, "s", epoch)
    ledger.compact(draw.choice([0.0, 1000.0]))
    proposed = set(read_ledger(files, "s", "proposals")["trial"].to_pylist())
    ended = set(read_ledger(files, "s", "events")["trial"].to_pylist())
    measured = set(read_ledger(files, "s", "outcomes")["trial"].to_pylist())
    for trial in range(TRIALS):
        if trial in ended and trial in measured:
            continue
        if trial not in proposed:
            ledger.append("proposals", [{"trial": trial, "params": {}}])
            ledger.flush()
        if states.header(key(trial)) is None:
            states.commit(key(trial), safetensors({"outcome": str(trial)}))
        ledger.append("outcomes", [{"key": key(trial), "trial": trial, "round": 0, "seed": 0, "accuracy": 0.5}])
        if trial not in ended:
            ledger.append("events", [{"event": "done", "trial": trial}])
        if draw.random() < 0.7:
            ledger.flush()
        if draw.random() < 0.3:
            ledger.compact(draw.choice([0.0, 1000.0]))
    ledger.flush()
    ledger.compact()


def check_a_faulty_ledger(seed: int, among: tuple[str, ...], count: int) -> list[str]:
    """Drives through random faults, one driver after the other; gives back what went wrong, in words."""
    draw = random.Random(seed)
    server = Faulty(uuid4().hex, random_faults(seed, among, calls=150, count=count), late_by=draw.randrange(1, 12))
    for epoch in range(1, 50):
        try:
            drive(server.url, epoch, draw)
            break
        except (StoreError, Killed):
            server.down = ""
    else:
        return ["it never came to an end"]
    server.faults.clear()
    drive(server.url, 51, draw)
    files = Files(server.url, sleep=no_sleep)
    wrong = []
    for kind in ("proposals", "outcomes", "events"):
        trials = read_ledger(files, "s", kind)["trial"].to_pylist()
        if sorted(trials) != list(range(TRIALS)):
            wrong.append(f"{kind}: {trials}")
    for trial in range(TRIALS):
        if States(files).header(key(trial)) != {"outcome": str(trial)}:
            wrong.append(f"state {trial}")
    return wrong


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("fault", FAULTS)
def test_one_fault_at_any_call(fault: str, every: int) -> None:
    calls = Faulty(uuid4().hex)
    drive(calls.url, 1, random.Random(0))
    for number in range(1 + FAULTS.index(fault), calls.calls, every):
        server = Faulty(uuid4().hex, {number: fault})
        for epoch in (1, 2):
            try:
                drive(server.url, epoch, random.Random(0))
                break
            except (StoreError, Killed):
                assert fault not in PASSING, f"call {number} {fault} and ended the run"
                server.down = ""
        server.faults.clear()
        files = Files(server.url, sleep=no_sleep)
        for kind in ("proposals", "outcomes", "events"):
            trials = read_ledger(files, "s", kind)["trial"].to_pylist()
            assert sorted(trials) == list(range(TRIALS)), (number, kind)


def late_at(number: int, late_by: int, torn: str) -> tuple[Faulty, Files]:
    """A store with a torn file, of which one call is carried out late."""
    server = Faulty(uuid4().hex, late_by=late_by)
    server.objects[f"root/{torn}"] = b"torn"
    server.calls, server.faults = 0, {number: "comes late"}
    return server, Files(server.url, sleep=no_sleep)


@pytest.mark.parametrize("late_by", [1, 2, 5, 9])
def test_nothing_that_comes_late_hits_the_state_in_a_torn_ones_place(late_by: int) -> None:
    for number in range(1, 12):
        _, files = late_at(number, late_by, paths.state(key(1)))
        states = States(files)
        states.header(key(1))
        states.commit(key(1), safetensors({"by": "x"}))
        for _ in range(15):
            states.has(key(2))
        assert states.header(key(1)) == {"by": "x"}, number


@pytest.mark.parametrize("late_by", [1, 4, 8, 16])
@pytest.mark.parametrize("kind", ["events", "outcomes"])
def test_nothing_that_comes_late_hits_what_was_merged_in_a_torn_ones_place(kind: str, late_by: int) -> None:
    torn = paths.outcomes("s") if kind == "outcomes" else paths.part("s", paths.Part(1, 6, "events", merged=True))
    for number in range(1, 40):
        _, files = late_at(number + 30, late_by, torn)
        ledger = Ledger(files, "s", 1)
        for trial in range(3):
            ledger.append("outcomes", [{"key": key(trial), "trial": trial, "round": 0, "seed": 0, "accuracy": 0.5}])
            ledger.append("events", [{"event": "done", "trial": trial}])
            ledger.flush()
        ledger.compact()
        for _ in range(30):
            files.exists("nothing")
        assert sorted(read_ledger(files, "s", kind)["trial"].to_pylist()) == [0, 1, 2], number


@pytest.mark.parametrize("seeds", [range(60), pytest.param(range(60, 1000), marks=pytest.mark.slow)])
def test_many_faults(seeds: range) -> None:
    for seed in seeds:
        assert check_a_faulty_ledger(seed, FAULTS, count=1 + seed % 12) == [], f"seed {seed}"


@pytest.mark.parametrize("seeds", [range(6), pytest.param(range(6, 100), marks=pytest.mark.slow)])
def test_a_whole_study_through_many_faults(seeds: range, root: Path, undisturbed: Study) -> None:  # noqa: F811
    for seed in seeds:
        faults = random_faults(seed, FAULTS, calls=110, count=1 + seed % 8)
        server = Faulty(uuid4().hex, faults)
        for _ in range(20):
            study = Study(small.spec(), server.url, root=root)
            try:
                standing = study.run(LocalPool())
            except (StoreError, StoreFailed, Killed):
                server.down = ""
                continue
            if standing.done == 6:
                break
        server.faults.clear()
        assert_same(study, undisturbed)


def test_a_full_disk_ends_the_run_clearly_and_it_goes_on_from_there(root: Path, undisturbed: Study) -> None:  # noqa: F811
    server = Faulty(uuid4().hex)
    study = Study(small.spec(), server.url, root=root)

    class Filling(LocalPool):
        def completed(self, timeout_seconds: float) -> Sequence[Event]:
            if server.calls > 60:
                server.down = "finds the disk full"
            return super().completed(timeout_seconds)

    with pytest.raises(StoreFailed, match="No space left on device; free some room and run it again"):
        study.run(Filling())
    server.down = ""
    assert study.run(LocalPool()).done == 6
    assert_same(study, undisturbed)


def test_the_canary_sees_a_store_that_takes_a_failed_write_for_done(monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.store.objects import Objects

    def create(self: Objects, path: str, data: bytes) -> bool:
        with suppress(OSError):
            return right(self, path, data)
        return True

    right = Objects.create
    monkeypatch.setattr(Objects, "create", create)
    assert any(check_a_faulty_ledger(seed, FAULTS, count=10) for seed in range(20))
