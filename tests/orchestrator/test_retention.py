from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from orchestrator import Study, retention
from orchestrator.cli import main
from orchestrator.errors import QueryError, StoreError
from orchestrator.pools.local import LocalPool
from orchestrator.pools.protocol import Event, Failed
from orchestrator.stages import Stages
from orchestrator.state import from_bytes
from orchestrator.store import Lease, Ledger, acquire
from orchestrator.store.files import NoRoom
from orchestrator.store.lease import beating, this_process
from tests.contracts.store import safetensors
from tests.faulty import Faulty
from tests.orchestrator.pools import small
from tests.orchestrator.store.conftest import hurry

ELSEWHERE: dict[str, Any] = {"host": "elsewhere", "pid": 1, "boot": "b"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_task(tmp_path_factory.mktemp("root"))


@pytest.fixture
def url() -> str:
    return f"memory://{uuid4().hex}"


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "orchardist")


def run(url: str, root: Path, **fields: Any) -> Study:
    study = Study(small.spec(**fields), url, root=root)
    assert not study.run(LocalPool()).failed
    return study


def front_keys(study: Study) -> set[str]:
    return {key for point in study.front().points for key in point["keys"]}


def there(study: Study) -> set[str]:
    return set(study.store.states.keys())


def test_what_no_front_needs_goes_and_the_rest_stays(url: str, root: Path) -> None:
    study = run(url, root)
    before, rows = there(study), study.table().num_rows
    counted = study.sweep(dry_run=True)
    assert there(study) == before and 0 < counted.states < len(before) and counted.bytes > 0
    sizes = {key: study.store.states.size(key) for key in before}
    swept = study.sweep()
    gone = before - there(study)
    assert swept == counted and len(gone) == swept.states and swept.bytes == sum(sizes[key] for key in gone)
    assert front_keys(study) <= there(study)
    assert study.table().num_rows == rows, "outcomes stay"
    tickets = [row["detail"] for row in study.store.table("small", "events").to_pylist() if row["event"] == "tickets"]
    for key in there(study):
        header = study.store.states.header(key)
        assert header is not None
        lineage = json.loads(header["lineage"])
        unpruned = {entry["op"] for entry in lineage} <= {"Init", "Train"}
        assert key in front_keys(study) or unpruned or any(key in detail for detail in tickets), lineage
    assert study.sweep().states == 0


def test_a_full_disk_is_swept_without_writing_anything(root: Path) -> None:
    """Neither a lease nor a merged ledger finds room there."""
    server = Faulty(uuid4().hex)
    study = run(server.url, root)
    front, states = study.front(), there(study)
    server.down = "finds the disk full"
    with pytest.raises(StoreError, match="No space left on device"):
        study.store.files.write("x", b"1")
    swept = study.sweep()
    assert swept.states > 0 and len(states - there(study)) == swept.states
    assert front_keys(study) <= there(study) and study.front() == front
    with pytest.raises(StoreError, match="free some room"):
        study.sweep()
    server.down = ""
    assert study.sweep().states == 0
    assert study.run(LocalPool()).done == 6 and study.front() == front


def test_a_full_disk_is_not_swept_while_somebody_runs_the_study(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)
    server = Faulty(uuid4().hex)
    study = run(server.url, root)
    states = there(study)
    with beating(acquire(study.store.files, "small", **ELSEWHERE)):
        with monkeypatch.context() as patch:
            patch.setattr("orchestrator.study.acquire", _no_room)
            with pytest.raises(StoreError, match="is being run by process 1 on elsewhere"):
                study.sweep()
        assert there(study) == states


def _no_room(*_: object, **__: object) -> None:
    raise NoRoom("No space left on device")


def test_with_room_for_a_lease_only_states_go_and_then_the_ledger_is_merged(
    url: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, tries = Ledger.compact, []

    def compact(self: Ledger, grace_seconds: float = 0.0) -> None:
        tries.append(len(there(study)))
        if len(tries) == 1:
            raise NoRoom("No space left on device")
        right(self, grace_seconds)

    study = run(url, root)
    front, states = study.front(), there(study)
    monkeypatch.setattr(Ledger, "compact", compact)
    swept = study.sweep()
    assert tries == [len(states), len(states) - swept.states] and swept.states > 0
    assert study.front() == front


def test_after_it_the_study_is_as_finished_as_before(url: str, root: Path) -> None:
    study = run(url, root)
    front, status = study.front(), study.status()
    study.sweep()
    assert study.run(LocalPool()).done == 6
    assert study.front() == front
    assert study.status() | {"epochs": 0} == status | {"epochs": 0}, "nothing was run again"


def test_more_trials_are_run_from_what_is_left(url: str, root: Path) -> None:
    whole = run(f"memory://{uuid4().hex}", root, trials=12)
    run(url, root).sweep()
    study = run(url, root, trials=12)
    assert front_keys(study) == front_keys(whole)
    row = {key: value.weights for key, value in small.models(whole.store).items()}
    for key in front_keys(study):
        data = study.store.states.read(key)
        assert data is not None
        assert all((from_bytes(data).weights[name] == tensor).all() for name, tensor in row[key].items())


def test_what_is_gone_is_made_again_to_the_bit(url: str, root: Path, tmp_path: Path) -> None:
    study = run(url, root)
    before = small.models(study.store)
    study.sweep()
    gone = sorted(before.keys() - there(study))
    for key in (gone[0], gone[-1]):
        folder = Study.open(url, "small").fetch(key, tmp_path / key)
        assert json.loads((folder / "card.json").read_text())["certificate"]["reloaded"] == 0
        data = study.store.states.read(key)
        assert data is not None and small.same_bits(from_bytes(data), before[key])


def test_ctrl_c_ends_the_making_again(url: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = run(url, root)
    keys = there(study)
    study.sweep()
    row = next(row for row in study.table().to_pylist() if row["key"] in keys - there(study))
    monkeypatch.setattr(Stages, "run", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        study.state(row)


def test_what_cannot_be_made_again_says_why(url: str, root: Path, tmp_path: Path) -> None:
    study = run(url, root)
    keys = there(study)
    study.sweep()
    gone = min(keys - there(study))
    changed = small.write_task(tmp_path / "changed")
    (changed / "blobs.py").write_text((changed / "blobs.py").read_text().replace("manual_seed(0)", "manual_seed(1)"))
    study.root = changed
    with pytest.raises(QueryError, match="cannot be made again: the task, its data or the code"):
        study.fetch(gone, tmp_path / "out")


def test_other_studies_keep_what_they_need(url: str, root: Path) -> None:
    first = run(url, root)
    needed = front_keys(first)
    # The same proposals under other objectives: the same states, another front.
    other = run(url, root, name="other", objectives=["sparsity"], constraints={"sparsity": "<= 0.5"})
    assert front_keys(other) - needed, "the other front has states of its own"
    first.sweep()
    assert front_keys(other) | needed <= there(first)


def test_of_a_study_that_runs_elsewhere_every_state_stays(
    url: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch)
    first = run(url, root)
    other = run(url, root, name="other", objectives=["sparsity"])
    shared = set(other.table()["key"].to_pylist())
    before = there(first)
    driver = acquire(other.store.files, "other", **ELSEWHERE)
    with beating(driver):
        first.sweep()
    assert shared <= there(first) == before


def test_a_driver_that_died_elsewhere_keeps_nothing_for_ever(
    url: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its study counts as stopped: front, dense models and tickets stay, and it goes on from there."""
    hurry(monkeypatch)
    first = run(url, root)
    other = run(url, root, name="other", objectives=["sparsity"])
    acquire(other.store.files, "other", **ELSEWHERE).beat()
    shared = set(other.table()["key"].to_pylist())
    counted = first.sweep(dry_run=True)
    assert first.sweep() == counted
    assert shared - there(first), "its states without use are gone"
    assert front_keys(other) <= there(first)
    assert other.run(LocalPool()).done == 6


def test_who_begins_while_states_are_looked_at_is_seen(url: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)
    first = run(url, root)
    other = run(url, root, name="other", objectives=["sparsity"])
    shared = set(other.table()["key"].to_pylist())
    looked = retention._unneeded
    begun: list[Lease] = []

    def look(*args: Any) -> Any:
        found = looked(*args)
        if not begun:
            begun.append(acquire(other.store.files, "other", **ELSEWHERE))
        return found

    monkeypatch.setattr(retention, "_unneeded", look)
    first.sweep()
    assert begun and shared <= there(first)


def test_a_study_that_is_being_run_is_refused(url: str, root: Path) -> None:
    study = run(url, root)
    lease = acquire(study.store.files, "small", **ELSEWHERE)
    lease.beat()
    before = there(study)
    read = study.store.files.read

    def moving(path: str) -> bytes:
        """The other driver's counter moves whenever it is looked at."""
        lease._beaten_at = float("-inf")
        lease.beat()
        return read(path)

    study.store.files.read = moving  # type: ignore[method-assign]
    with pytest.raises(StoreError, match="study small is being run by process 1 on elsewhere"):
        study.sweep()
    assert there(study) == before


def test_keep_front_removes_the_rest_when_the_study_ends(url: str, root: Path) -> None:
    study = run(url, root, keep="front")
    assert front_keys(study) <= there(study)
    assert study.sweep().states == 0
    whole = run(f"memory://{uuid4().hex}", root)
    assert study.spec.digest() == whole.spec.digest()
    assert front_keys(study) == front_keys(whole) and len(there(study)) < len(there(whole))


def test_a_driver_that_was_taken_over_from_removes_nothing(
    url: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It knows nothing of what the newer one has under way."""
    hurry(monkeypatch)
    study = run(url, root)
    before = there(study)
    older = acquire(study.store.files, "small", **ELSEWHERE)
    newer = acquire(study.store.files, "small", **ELSEWHERE | {"host": "third"})
    with pytest.raises(StoreError, match="taken over by process 1 on third since .*: nothing is removed"):
        retention.sweep(study.store, "small", study.store.ledger("small", older.epoch))
    assert there(study) == before
    newer.release()
    with pytest.raises(StoreError, match="taken over by another process"):
        retention.sweep(study.store, "small", study.store.ledger("small", older.epoch))


def test_what_trials_under_way_need_stays(url: str, root: Path) -> None:
    study = run(url, root)
    lease = acquire(study.store.files, "small", **ELSEWHERE)
    ledger = study.store.ledger("small", lease.epoch)
    gone = [each.key for each in retention._unneeded(study.store, "small", [], (), ())[0]]
    assert retention.sweep(study.store, "small", ledger, under_way=gone).states == 0
    assert retention.sweep(study.store, "small", ledger, under_way=gone[:1]).states == len(gone) - 1 > 0
    assert gone[0] in there(study) and not there(study) & set(gone[1:])


def test_whom_nothing_is_known_of_is_taken_to_run_by_who_cannot_wait(
    url: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = run(url, root)
    for name in ("dead", "left", "mine"):
        study.store.write_study(name, "", {})
    dead, left = (acquire(study.store.files, name, **ELSEWHERE) for name in ("dead", "left"))
    left.release()
    with beating(acquire(study.store.files, "mine", **this_process())):
        others = retention.Others(study.store, "small")
        assert others.running(at_once=True) == {"dead", "mine"}
        hurry(monkeypatch)
        assert others.running(at_once=False) == others.running(at_once=True) == {"mine"}
        dead.beat()
        assert others.running(at_once=True) == {"dead", "mine"}


# --- What killed writers leave -------------------------------------------------------------------------------------

HOURS = 3600
KEY = "c" * 64


def old(path: Path, hours: float = 7) -> Path:
    """The file, as if it had been written so many hours ago by the disk's own clock."""
    at = path.stat().st_mtime - hours * HOURS
    os.utime(path, (at, at))
    return path


def left_behind(folder: Path) -> dict[str, Path]:
    """A file of each kind that a killed writer may leave."""
    names = {
        "temporary": f"states/ab/.{'0' * 24}.tmp",
        "in the ledger": f"studies/small/ledger/.{'1' * 24}.tmp",
        "probe": f".probe-{'2' * 16}",
        "handshake": f"handshake/{'3' * 16}.node-1",
    }
    for name in names.values():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"left")
    return {what: folder / name for what, name in names.items()}


@pytest.mark.parametrize("hours_off", [0, 10, -10])
def test_what_killed_writers_left_goes_when_it_is_old_by_the_stores_own_clock(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours_off: int
) -> None:
    study = run(str(tmp_path), root)
    study.sweep()
    fresh = left_behind(tmp_path)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + HOURS * hours_off)  # this machine's clock decides nothing
    assert study.sweep().leftovers == 0, "their writers may be at work"
    for path in fresh.values():
        old(path, 5.9)
    assert study.sweep().leftovers == 0
    for path in fresh.values():
        old(path, 0.2)
    foreign = [tmp_path / "states" / "ab" / name for name in (".notes.tmp", f".{'0' * 23}.tmp", f".{'0' * 24}.tmpx")]
    for path in foreign:
        path.write_bytes(b"somebody's own")
        old(path)
    counted = study.sweep(dry_run=True)
    assert (counted.leftovers, counted.bytes) == (4, 16) and all(path.exists() for path in fresh.values())
    assert study.sweep() == counted
    assert not any(path.exists() for path in fresh.values()) and all(path.exists() for path in foreign)
    assert not list(tmp_path.glob(".probe-*"))


def test_the_handshake_of_a_driver_stays_for_as_long_as_it_runs(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers that come after days read it, too."""
    hurry(monkeypatch)
    study, other = run(str(tmp_path), root), run(str(tmp_path), root, name="other", trials=1)
    left = {what: old(path) for what, path in left_behind(tmp_path).items()}
    driver = acquire(other.store.files, "other", **ELSEWHERE)
    with beating(driver):
        assert study.sweep().leftovers == 3
        assert left["handshake"].exists()
    assert study.sweep().leftovers == 1 and not left["handshake"].exists()


def test_torn_checkpoints_and_those_of_studies_that_are_no_more_go_when_they_are_old(
    root: Path, tmp_path: Path
) -> None:
    study = run(str(tmp_path), root)
    study.sweep()
    folder = tmp_path / "checkpoints"
    folder.mkdir(exist_ok=True)
    whole = safetensors({"key": KEY, "position": "5", "study": "no-more"})
    others = safetensors({"key": KEY, "position": "6", "study": "other"})
    run(str(tmp_path), root, name="other", trials=1)
    contents = {1: b"", 2: whole[:50], 3: whole[:-1], 4: b"foreign", 5: whole, 6: others}
    files = [folder / f"{KEY}.{position:012d}.safetensors" for position in contents]
    for file, data in zip(files, contents.values(), strict=True):
        file.write_bytes(data)
    assert study.sweep().checkpoints == 0, "a store may show a file before it is whole"
    for file in files:
        old(file)
    counted = study.sweep(dry_run=True)
    assert counted.checkpoints == 5 and counted.bytes == sum(map(len, list(contents.values())[:5]))
    assert study.sweep() == counted
    assert [file.name for file in folder.iterdir()] == [files[5].name], "another study may go on from its own"


def test_a_store_that_says_nothing_of_times_is_swept_all_the_same(root: Path) -> None:
    server = Faulty(uuid4().hex)
    study = run(server.url, root)
    server.objects[f"root/checkpoints/{KEY}.000000000007.safetensors"] = b"torn"
    swept = study.sweep()
    assert swept.states > 0 and (swept.checkpoints, swept.leftovers) == (0, 0)
    assert not [name for name in server.objects if ".probe-" in name]


class Losing(LocalPool):
    """States vanish while the study is under way: a few times all that are there."""

    def __init__(self, study: Study) -> None:
        super().__init__()
        self._study = study
        self._turn = 0
        self.lost = 0

    def completed(self, timeout_seconds: float) -> Sequence[Event]:
        self._turn += 1
        if self._turn in (4, 9, 15, 20):
            for key in list(self._study.store.states.keys()):
                self._study.store.states.delete(key)
            assert self._worker is not None
            self._worker._cache.clear()
        events = super().completed(timeout_seconds)
        self.lost += sum(isinstance(event, Failed) and event.kind == "gone" for event in events)
        return events


def test_states_that_vanish_under_a_running_study_are_made_again(url: str, root: Path) -> None:
    whole = run(f"memory://{uuid4().hex}", root)
    study = Study(small.spec(), url, root=root)
    pool = Losing(study)
    standing = study.run(pool)
    assert (standing.done, standing.failed) == (6, 0)
    assert pool.lost > 0
    assert study.front() == whole.front()


def test_the_command(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = run(str(tmp_path), root)
    counted, before = study.sweep(dry_run=True), there(study)
    assert call(["gc", "small", "--store", str(tmp_path), "--dry-run"]) == 0
    said = f"{counted.states:,} states, {counted.bytes:,} bytes; {counted.kept:,} states are kept\n"
    assert capsys.readouterr().out == f"would remove {said}" and there(study) == before
    assert call(["gc", "small", "--store", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"removed {said}" and len(there(study)) == counted.kept
    assert call(["gc", "small", "--store", str(tmp_path), "--format", "json"]) == 0
    found = {
        "study": "small",
        "removed": True,
        "states": 0,
        "bytes": 0,
        "kept": counted.kept,
        "checkpoints": 0,
        "leftovers": 0,
    }
    assert json.loads(capsys.readouterr().out) == [found]
    assert call(["gc", "smal", "--store", str(tmp_path)]) == 2
    assert "did you mean 'small'?" in capsys.readouterr().err


def call(arguments: list[str]) -> int:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["orchardist", *arguments])
        main()
    return int(ended.value.code or 0)
