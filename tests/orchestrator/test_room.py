"""A store that may not grow beyond a limit while a study runs."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from orchestrator import Study, retention, room
from orchestrator.driver import Driver
from orchestrator.errors import SpecError, StoreError
from orchestrator.graph import Segment
from orchestrator.pools.local import LocalPool
from orchestrator.pools.protocol import Event, Failed
from orchestrator.retention import Swept
from orchestrator.room import GB
from orchestrator.state import from_bytes
from orchestrator.store import Store
from search.proposer import Proposal
from tests.orchestrator.pools import small

TRIALS = 14


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_task(tmp_path_factory.mktemp("root"))


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The store is measured after every report."""
    for name in ("EVERY_SECONDS", "_SOON_SECONDS", "_INTERVAL_PER_DURATION"):
        monkeypatch.setattr(room, name, 0.0)
    monkeypatch.setattr("orchestrator.driver.AHEAD", 2)
    monkeypatch.setattr("orchestrator.driver.FLUSH_SECONDS", 0.0)
    caplog.set_level(logging.WARNING, "orchardist.room")


@pytest.fixture(scope="module")
def whole(root: Path) -> Study:
    """The study with all the room that it wants."""
    study = study_of(f"memory://{uuid4().hex}", root)
    study.run(LocalPool())
    return study


def study_of(url: str, root: Path, **fields: Any) -> Study:
    return Study(small.spec(trials=TRIALS, **fields), url, root=root)


class Measured(LocalPool):
    """Keeps how large the store was before each report."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._store = store
        self.used: list[int] = []
        self.gone = 0

    def submit(self, segment: Segment) -> None:
        self.gone += sum(not self._store.states.has(key) for key in segment.base)
        super().submit(segment)

    def completed(self, timeout_seconds: float) -> Sequence[Event]:
        self.used.append(self._store.used())
        events = super().completed(timeout_seconds)
        self.gone += sum(isinstance(event, Failed) and event.kind == "gone" for event in events)
        return events


def test_states_that_nothing_needs_go_while_the_study_runs(
    root: Path, whole: Study, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"memory://{uuid4().hex}"
    probing = study_of(url, root)
    probing.run(LocalPool())
    probing.sweep()
    least, most = probing.store.used(), whole.store.used()
    limit = (3 * least + most) // 4
    study = study_of(f"memory://{uuid4().hex}", root, max_store_gb=limit / GB)
    pool = Measured(study.store)
    swept: list[int] = []

    def sweep(*args: Any, under_way: Collection[str], **kwargs: Any) -> Swept:
        swept.append(len(under_way))
        return retention.sweep(*args, under_way=under_way, **kwargs)

    monkeypatch.setattr(room, "sweep", sweep)
    assert study.run(pool).done == TRIALS
    assert max(swept) > 0, "it was tight while trials were under way"
    assert not pool.gone, "no trial under way misses anything"
    assert max(pool.used) <= limit + most // 10, "the trials under way pass it by a little"
    assert study.front() == whole.front() and study.spec.digest() == whole.spec.digest()
    assert study.store.used() < most
    assert "that nothing needs are gone" in caplog.text
    mine, theirs = set(study.store.states.keys()), set(whole.store.states.keys())
    assert mine < theirs
    for key in mine:
        one, other = study.store.states.read(key), whole.store.states.read(key)
        assert one is not None and other is not None and small.same_bits(from_bytes(one), from_bytes(other))
    gone = next(iter(sorted({*whole.table()["key"].to_pylist()} - mine)))
    assert study.fetch(gone, root / "fetched").exists(), "it is made again"


def test_a_limit_that_is_too_low_ends_the_run_clearly_and_it_goes_on_with_a_higher_one(
    root: Path, whole: Study, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Driver._begin

    def begin(self: Driver, proposal: Proposal) -> None:
        assert not self._room.full
        right(self, proposal)

    monkeypatch.setattr(Driver, "_begin", begin)
    url = f"memory://{uuid4().hex}"
    tight = study_of(url, root, max_store_gb=whole.store.used() / 4 / GB)
    with pytest.raises(
        StoreError, match=r"^the store memory.* holds .* GB, and all of it is needed: more than max_sto"
    ):
        tight.run(LocalPool())
    assert "no further trial begins until those under way have ended" in caplog.text
    status = tight.status()
    assert status["state"] == "stopped" and status["driver"] is None and not status["trials"]["failed"]
    with pytest.raises(StoreError, match="raise it, or remove"):
        tight.run(LocalPool())
    assert tight.status()["epochs"]["run"] == status["epochs"]["run"], "refused before anything was run"
    study = study_of(url, root)
    assert study.run(LocalPool()).done == TRIALS
    assert study.front() == whole.front()


class Interrupted(LocalPool):
    """Ends the run before the first report."""

    def completed(self, timeout_seconds: float) -> Sequence[Event]:
        raise KeyboardInterrupt


def test_trials_of_an_earlier_run_do_not_begin_either_while_there_is_no_room(
    root: Path, whole: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are all proposed when it goes on, so that nothing but this holds them back."""
    right, begun = Driver._begin, []

    def begin(self: Driver, proposal: Proposal) -> None:
        assert not self._room.full
        begun.append(proposal.number)
        right(self, proposal)

    study = study_of(f"memory://{uuid4().hex}", root, max_store_gb=whole.store.used() / 4 / GB)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("orchestrator.driver.AHEAD", 128)
        study.run(Interrupted())
    assert study.store.table("small", "proposals").num_rows == TRIALS
    monkeypatch.setattr(Driver, "_begin", begin)
    with pytest.raises(StoreError, match="all of it is needed"):
        study.run(LocalPool())
    assert 0 < len(begun) < TRIALS


def test_what_other_studies_need_counts_and_stays(root: Path, whole: Study) -> None:
    url = f"memory://{uuid4().hex}"
    other = Study(small.spec(name="other", trials=3), url, root=root)
    other.run(LocalPool())
    kept = {key for point in other.front().points for key in point["keys"]}
    study = study_of(url, root, max_store_gb=(other.store.used() + 1000) / GB)
    with pytest.raises(StoreError, match="all of it is needed"):
        study.run(LocalPool())
    assert kept <= set(study.store.states.keys())


def test_without_a_limit_nothing_is_measured(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: Store) -> int:
        raise AssertionError("measured")

    monkeypatch.setattr(Store, "used", never)
    assert Study(small.spec(trials=1), f"memory://{uuid4().hex}", root=root).run(LocalPool()).done == 1


@pytest.mark.parametrize("value", [-1, "10", float("inf"), True])
def test_a_wrong_limit_is_refused(value: Any) -> None:
    with pytest.raises(SpecError, match="max_store_gb"):
        small.spec(max_store_gb=value)


def test_it_may_change_from_run_to_run() -> None:
    assert small.spec(max_store_gb=1).digest() == small.spec().digest()


@pytest.mark.parametrize("kind", ["folder", "memory"])
def test_states_and_checkpoints_count(kind: str, tmp_path: Path) -> None:
    store = Store(tmp_path / "store" if kind == "folder" else f"memory://{uuid4().hex}")
    assert store.used() == 0
    store.files.write("states/ab/x", bytes(1000))
    store.files.write("checkpoints/y", bytes(24))
    store.files.write("studies/s/ledger/z", bytes(9))
    assert store.used() == 1024
