"""Whatever ends a training in the middle: it goes on from its last checkpoint to the same bits, or fails for good."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from orchestrator import Study
from orchestrator.errors import StoreError, StoreFailed
from orchestrator.graph import Segment
from orchestrator.header import read_header
from orchestrator.pools.local import LocalPool
from orchestrator.pools.retries import MOST_TRIES
from orchestrator.state import from_bytes, to_bytes
from orchestrator.store import paths
from orchestrator.store.checkpoints import Checkpoints
from orchestrator.store.lease import acquire
from orchestrator.store.states import States
from tests.faulty import PASSING, Faulty, random_faults
from tests.orchestrator.pools import mortal, small
from tests.orchestrator.pools.mortal import DENSE_BATCHES, Mortal, Sharing, batches, ticking

MEASURED = ("accuracy", "loss", "test_accuracy", "sparsity", "curve", "position_steps")
EVERY = 3 / 60
"""Minutes from checkpoint to checkpoint, of a clock that goes a second on for every batch."""


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "orchardist")


@pytest.fixture
def url() -> str:
    return f"memory://{uuid4().hex}"


def study_in(folder: Path, url: str, **fields: Any) -> Study:
    return Study(mortal.spec(folder, **({"checkpoint_minutes": EVERY} | fields)), url, root=mortal.write_task(folder))


def outcomes(study: Study) -> dict[str, dict[str, Any]]:
    rows: list[dict[str, Any]] = study.table().select(["key", *MEASURED]).to_pylist()
    assert len({row["key"] for row in rows}) == len(rows), "nothing counts twice"
    return {row["key"]: row for row in rows}


def events(study: Study, name: str) -> list[dict[str, Any]]:
    rows = study.store.table("mortal", "events").to_pylist()
    return [json.loads(row["detail"]) | {"key": row["key"]} for row in rows if row["event"] == name]


def assert_same(study: Study, other: Study) -> None:
    """Outcomes, curves included, and weights agree to the bit; nothing is left over."""
    assert outcomes(study) == outcomes(other)
    one, two = (small.models(each.store, "mortal") for each in (study, other))
    assert one.keys() == two.keys() and one
    assert all(small.same_bits(one[key], two[key]) for key in one)
    assert not study.store.checkpoints.positions()


def undisturbed(folder: Path) -> tuple[Study, int]:
    """The study without troubles and without checkpoints, in a store of its own, and how many batches it took."""
    study = study_in(folder, f"memory://{uuid4().hex}", checkpoint_minutes=0)
    before = batches(folder)
    assert study.run(LocalPool(ticking())).done == 2
    return study, batches(folder) - before


@pytest.mark.parametrize("at", [6, 17, DENSE_BATCHES + 8])
def test_another_driver_goes_on_in_the_middle_of_an_epoch(at: int, url: str, tmp_path: Path) -> None:
    reference, needed = undisturbed(tmp_path)
    (tmp_path / "batches").unlink()
    (tmp_path / "trouble").write_text(f"interrupt {at}")
    with pytest.raises(KeyboardInterrupt):
        study_in(tmp_path, url).run(LocalPool(ticking()))
    study = study_in(tmp_path, url)
    ((key, position),) = study.store.checkpoints.positions().items()
    assert position % 4, "in the middle of an epoch"
    assert study.store.states.header(key) is None, "a checkpoint is no state"
    assert batches(tmp_path) == at
    assert study.run(LocalPool(ticking())).done == 2
    assert_same(study, reference)
    (went_on,) = [detail for detail in events(study, "work") if detail.get("checkpoint")]
    assert (went_on["key"], went_on["checkpoint"]) == (key, position)
    assert batches(tmp_path) - needed <= 3, "work is run again from the last checkpoint at most"


WAYS: dict[str, dict[str, Any]] = {
    "shrunk": {"structure": "neuron", "rate": [0.3, 0.5], "rounds": 2, "shrunk": True, "retrain": "finetune"},
    "movement": {"criterion": "movement", "rate": [0.3, 0.5], "rounds": 2},
    "during": {"sparsity": [0.5, 0.8], "phase": "during", "rounds": 2, "penalty": "l1", "penalty_strength": 0.001},
    "rewind": {"rate": [0.3, 0.5], "rounds": 2, "retrain": "rewind", "rewind_epoch": 1, "optimizer": "sgd"},
}


@pytest.mark.parametrize("way", WAYS)
def test_however_it_trains_deaths_change_nothing(way: str, url: str, tmp_path: Path) -> None:
    reference = study_in(tmp_path, f"memory://{uuid4().hex}", checkpoint_minutes=0, space=WAYS[way])
    assert reference.run(LocalPool(ticking())).done == 2

    def again() -> None:
        (tmp_path / "trouble").write_text(f"interrupt {batches(tmp_path) + 7}")

    again()
    study = study_in(tmp_path, url, space=WAYS[way])
    pool = Mortal(ticking(), again=again)
    assert study.run(pool).done == 2
    assert pool.deaths > MOST_TRIES
    assert_same(study, reference)


def test_the_canary_sees_a_training_that_begins_anew(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, needed = undisturbed(tmp_path)
    (tmp_path / "batches").unlink()
    (tmp_path / "trouble").write_text("interrupt 15")
    with pytest.raises(KeyboardInterrupt):
        study_in(tmp_path, url, checkpoint_minutes=0).run(LocalPool(ticking()))
    assert study_in(tmp_path, url).run(LocalPool(ticking())).done == 2
    assert batches(tmp_path) - needed == 15


@pytest.mark.parametrize("kind", ["worker died", "preempted"])
def test_another_worker_goes_on_however_often_if_it_gets_further(kind: str, url: str, tmp_path: Path) -> None:
    reference, needed = undisturbed(tmp_path)
    (tmp_path / "batches").unlink()

    def again() -> None:
        (tmp_path / "trouble").write_text(f"interrupt {batches(tmp_path) + 5}")

    again()
    study = study_in(tmp_path, url)
    pool = Mortal(ticking(), kind=kind, again=again)
    assert study.run(pool).done == 2
    assert pool.deaths > MOST_TRIES
    assert batches(tmp_path) - needed <= 3 * pool.deaths
    assert_same(study, reference)
    retries = {"preempted": 0, "worker died": 0, "out of GPU memory": 0} | {kind: pool.deaths}
    assert study.status()["retries"] == retries
    assert len(events(study, "tried again")) == pool.deaths


def test_a_poison_stage_is_given_up_and_the_study_ends(url: str, tmp_path: Path) -> None:
    study = study_in(tmp_path, url, checkpoint_minutes=0)
    (tmp_path / "trouble").write_text(f"interrupt {DENSE_BATCHES + 1}")

    def again() -> None:
        if pool.deaths < MOST_TRIES:
            (tmp_path / "trouble").write_text("interrupt 1")

    pool = Mortal(ticking(), again=again)
    standing = study.run(pool)
    assert (standing.done, standing.failed, pool.deaths) == (1, 1, MOST_TRIES)
    assert standing.retries == study.status()["retries"]["worker died"] == MOST_TRIES - 1
    (reason,) = study.status()["failures"].values()
    assert reason.startswith(f"worker died: {MOST_TRIES} workers died over this stage")


def test_the_worker_that_is_asked_to_leave_stores_where_it_is(url: str, tmp_path: Path) -> None:
    reference, needed = undisturbed(tmp_path)
    (tmp_path / "batches").unlink()
    clock = ticking()

    class Drained(LocalPool):
        """Asks its worker to leave at the 15th look at the clock, and has another one afterwards."""

        left = False

        def completed(self, timeout_seconds: float) -> Any:
            found = super().completed(timeout_seconds)
            if any(getattr(event, "kind", "") == "preempted" for event in found):
                assert self._worker is not None
                self._worker._leaving.clear()
            return found

    def looked_at() -> float:
        now = clock()
        if now == 15:
            assert pool._worker is not None
            pool._worker.leave()
        return now

    study = study_in(tmp_path, url, checkpoint_minutes=1000)
    pool = Drained(looked_at)
    assert study.run(pool).done == 2
    assert batches(tmp_path) == needed, "not one batch is trained on twice"
    assert_same(study, reference)
    assert study.status()["retries"]["preempted"] == 1


SLOW: dict[str, Any] = {
    "train": {"epochs": 2, "batch_size": 16, "lr": 0.05},
    "space": {"rate": 0.3, "rounds": 1, "retrain_epochs": [1, 6]},
}


def test_a_training_that_takes_too_long_is_ended_and_the_study_goes_on(url: str, tmp_path: Path) -> None:
    study = study_in(tmp_path, url, timeout_seconds=12, **SLOW)
    standing = study.run(LocalPool(ticking()))
    assert (standing.done, standing.failed, standing.retries) == (1, 1, 0)
    assert standing.last_failure == "timed out: the stage takes longer than timeout_seconds = 12"
    positions = study.store.checkpoints.positions()
    assert len(positions) == 1, "with more time it need not begin anew"
    study = study_in(tmp_path, url, timeout_seconds=60, **SLOW)
    before = batches(tmp_path)
    assert study.run(LocalPool(ticking())).done == 2
    assert 0 < batches(tmp_path) - before < 24
    assert not study.store.checkpoints.positions()


def test_how_long_and_how_often_are_no_part_of_the_study(tmp_path: Path) -> None:
    digests = {
        study_in(tmp_path, "memory://x", **fields).spec.digest()
        for fields in ({}, {"timeout_seconds": 9}, {"checkpoint_minutes": 0}, {"checkpoint_minutes": 2.5})
    }
    assert len(digests) == 1


@pytest.fixture
def hungry(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Batches of 16 need half a GPU."""
    monkeypatch.setenv("HUNGRY", "16")
    monkeypatch.setenv("NEED", "0.5")
    monkeypatch.setenv("SHARE", "0")
    return monkeypatch


MIXED: dict[str, Any] = {
    "trials": 4,
    "train": {"epochs": 2, "retrain_epochs": 1, "batch_size": 8, "lr": 0.05},
    "space": {"rate": [0.3, 0.5], "rounds": 1, "batch_size": [16, 8]},
}


def test_out_of_gpu_memory_is_tried_on_a_larger_share_which_is_learnt_for_its_like(
    url: str, tmp_path: Path, hungry: pytest.MonkeyPatch
) -> None:
    study = study_in(tmp_path, url, **MIXED)
    pool = Sharing()
    assert study.run(pool).done == 4
    (again,) = events(study, "tried again")
    assert (again["kind"], again["like"], again["gpus"]) == ("out of GPU memory", "batch_size=16", 0.5)
    assert study.status()["retries"]["out of GPU memory"] == 1
    first_try = True
    for segment, gpus in pool.wanted:
        large = any(getattr(step.op, "recipe", None) and step.op.recipe.batch_size == 16 for step in segment.steps)  # type: ignore[union-attr]
        assert gpus == (0.5 if large and not first_try else 0)
        first_try = first_try and not large
    assert not first_try
    more = study_in(tmp_path, url, **MIXED | {"space": MIXED["space"] | {"rate": [0.3, 0.5, 0.7]}}, name="more")
    assert more.run(Sharing()).done == 4, "another study learns by itself"


def test_what_one_driver_learnt_the_next_one_knows(url: str, tmp_path: Path, hungry: pytest.MonkeyPatch) -> None:
    study_in(tmp_path, url, **MIXED | {"trials": 2}).run(Sharing())
    study = study_in(tmp_path, url, **MIXED)
    assert study.run(Sharing()).done == 4
    assert study.status()["retries"]["out of GPU memory"] == 1


def test_where_a_whole_gpu_is_too_small_the_trial_has_failed(
    url: str, tmp_path: Path, hungry: pytest.MonkeyPatch
) -> None:
    hungry.setenv("NEED", "2")
    study = study_in(tmp_path, url, **MIXED)
    pool = Sharing()
    standing = study.run(pool)
    assert (standing.done, standing.failed) == (2, 2)
    assert [gpus for _, gpus in pool.wanted if gpus][:2] == [0.5, 1.0]
    assert standing.last_failure.startswith(
        "out of GPU memory: OutOfMemoryError: CUDA out of memory. Tried to allocate"
    )


def test_on_a_cpu_it_has_failed_at_once(url: str, tmp_path: Path, hungry: pytest.MonkeyPatch) -> None:
    standing = study_in(tmp_path, url, **MIXED).run(LocalPool())
    assert (standing.done, standing.failed, standing.retries) == (2, 2, 0)


def test_a_checkpoint_that_cannot_be_written_ends_no_training(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: Checkpoints, place: Any, data: bytes) -> None:
        raise StoreError("cannot write: No space left on device")

    monkeypatch.setattr(Checkpoints, "write", full)
    caplog.set_level(logging.WARNING, "orchardist")
    study = study_in(tmp_path, url)
    assert study.run(LocalPool(ticking())).done == 2
    assert "no checkpoint at step 3: cannot write: No space left on device" in caplog.text


def test_a_state_that_cannot_be_stored_ends_the_run_clearly_and_it_goes_on_from_there(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, _ = undisturbed(tmp_path)
    commit, count = States.commit, iter(range(99))

    def full(self: States, key: str, data: bytes) -> bool:
        if next(count) == 3:
            raise StoreError("cannot write: No space left on device")
        return commit(self, key, data)

    monkeypatch.setattr(States, "commit", full)
    study = study_in(tmp_path, url)
    with pytest.raises(StoreFailed, match="No space left on device"):
        study.run(LocalPool(ticking()))
    assert not study.status()["failures"], "no trial is to blame"
    assert study.run(LocalPool(ticking())).done == 2
    assert_same(study, reference)


def test_a_training_does_not_go_on_from_a_state_that_lost_its_optimizer(url: str, tmp_path: Path) -> None:
    longer = {"train": {"epochs": 6, "retrain_epochs": 3, "batch_size": 16, "lr": 0.05, "momentum": 0.9}}
    longer["space"] = {"rate": [0.3], "rounds": 1, "retrain": ["rewind"], "rewind_epoch": [2]}  # type: ignore[dict-item]
    reference = study_in(tmp_path, f"memory://{uuid4().hex}", **longer | {"trials": 1})
    reference.run(LocalPool())
    study = study_in(tmp_path, url, **longer | {"trials": 1, "checkpoint_minutes": 0})
    (tmp_path / "trouble").write_text(f"interrupt {batches(tmp_path) + 17}")
    with pytest.raises(KeyboardInterrupt):
        study.run(LocalPool())

    class Replaced(LocalPool):
        """Somebody removes the cut that the training goes on from, and makes it again without the optimizer."""

        cuts = 0

        def submit(self, segment: Segment) -> None:
            for step in segment.steps:
                data = study.store.states.read(step.inputs[0]) if step.goes_on and step.inputs else None
                if data is not None and not self.cuts:
                    self.cuts += 1
                    header = read_header(data) | {"resumable": "0"}
                    study.store.states.replace(
                        step.inputs[0], to_bytes(replace(from_bytes(data), optimizer={}), header)
                    )
                    assert self._worker is not None
                    self._worker._cache.clear()
            super().submit(segment)

    pool = Replaced()
    assert study.run(pool).done == 1
    assert_same(study, reference)
    assert pool.cuts


@pytest.mark.parametrize("seeds", [range(2), pytest.param(range(2, 20), marks=pytest.mark.slow)])
def test_deaths_on_a_store_with_faults_change_nothing(seeds: range, tmp_path: Path) -> None:
    reference, _ = undisturbed(tmp_path)
    for seed in seeds:
        server = Faulty(uuid4().hex, random_faults(seed, PASSING, calls=150, count=12))

        def again() -> None:
            (tmp_path / "trouble").write_text(f"interrupt {batches(tmp_path) + 9}")

        (tmp_path / "batches").unlink()
        again()
        study = study_in(tmp_path, server.url)
        for _ in range(20):
            with suppress(StoreError):  # the probe may find that its own file comes late
                if study.run(Mortal(ticking(), again=again)).done == 2:
                    break
        (tmp_path / "trouble").unlink()
        server.faults.clear()
        for key in list(study.store.checkpoints.positions()):  # a lost delete
            assert study.store.states.header(key) is not None
            study.store.checkpoints.delete_all(key)
        assert_same(study, reference)


def test_what_a_killed_study_leaves_is_swept_once_nobody_goes_on_from_it(url: str, tmp_path: Path) -> None:
    (tmp_path / "trouble").write_text("interrupt 15")
    study = study_in(tmp_path, url)
    with pytest.raises(KeyboardInterrupt):
        study.run(LocalPool(ticking()))
    left = study.store.checkpoints.positions()
    assert len(left) == 1
    assert study.sweep().checkpoints == 0, "the study may still be run to its end"
    assert study.store.checkpoints.positions() == left
    (place,) = study.store.checkpoints.places()
    data = study.store.checkpoints.latest(place.key)
    assert data is not None
    assert study.run(LocalPool(ticking())).done == 2
    study.store.files.create(paths.checkpoint(place.key, place.position), data)  # a late answer
    elsewhere = acquire(study.store.files, "another", host="elsewhere", pid=1, boot="b")
    swept = study.sweep(dry_run=True)
    assert (swept.checkpoints, len(study.store.checkpoints.positions())) == (1, 1)
    swept = study.sweep()
    assert swept.checkpoints == 1 and swept.bytes >= len(data)
    assert not study.store.checkpoints.positions()
    elsewhere.release()


def test_another_studys_checkpoints_are_not_swept(url: str, tmp_path: Path) -> None:
    (tmp_path / "trouble").write_text("interrupt 15")
    with pytest.raises(KeyboardInterrupt):
        study_in(tmp_path, url).run(LocalPool(ticking()))
    other = study_in(tmp_path, url, name="other", train={"epochs": 1, "batch_size": 16})
    assert other.run(LocalPool()).done == 2
    assert other.sweep().checkpoints == 0
    assert len(other.store.checkpoints.positions()) == 1


def test_a_training_that_was_interrupted_makes_checkpoints_soon(url: str, tmp_path: Path) -> None:
    """Every fifteenth batch kills: with the study's own minutes between them no checkpoint would ever come about."""
    reference, _ = undisturbed(tmp_path)

    def again() -> None:
        (tmp_path / "trouble").write_text(f"interrupt {batches(tmp_path) + 15}")

    again()
    study = study_in(tmp_path, url, checkpoint_minutes=5)
    pool = Mortal(ticking(), again=again)
    assert study.run(pool).done == 2
    assert pool.deaths > 2
    assert_same(study, reference)
    assert any(detail.get("checkpoint") for detail in events(study, "work"))


def test_with_none_asked_for_there_are_none_however_often_it_is_interrupted(url: str, tmp_path: Path) -> None:
    (tmp_path / "trouble").write_text("interrupt 15")
    study = study_in(tmp_path, url, checkpoint_minutes=0)
    pool = Mortal(ticking())
    assert study.run(pool).done == 2 and pool.deaths == 1
    assert not any(detail.get("checkpoint") for detail in events(study, "work"))
