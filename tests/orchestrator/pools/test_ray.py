from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from orchestrator.errors import InputError
from orchestrator.pools.local import LocalPool
from orchestrator.pools.protocol import Ended, Failed, Pool, Reported
from orchestrator.study import Study
from tests.contracts.pool import POOL_CHECKS, job, reported_keys, segments, until_ended
from tests.orchestrator.pools import mortal, small

if TYPE_CHECKING:
    from orchestrator.pools.ray import RayPool

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def pool(ray_cluster: None) -> Iterator[RayPool]:
    from orchestrator.pools.ray import RayPool

    pool = RayPool(1)
    yield pool
    pool.close()


@pytest.mark.parametrize("check", POOL_CHECKS)
def test_contract(check: Callable[[Pool, Path], None], pool: RayPool, tmp_path: Path) -> None:
    check(pool, tmp_path)


def test_a_killed_worker_is_told_and_its_replacement_does_the_segment(pool: RayPool, tmp_path: Path) -> None:
    marker = tmp_path / "killed"
    info = pool.prepare(job(tmp_path, trouble="once", marker=str(marker)))
    (segment,) = segments(info, lr=1e3)
    pool.submit(segment)
    failed, end = until_ended(pool)
    assert marker.exists(), "the worker was not killed"
    assert isinstance(failed, Failed) and failed.kind == "worker died" and failed.key in reported_keys(segment)
    assert failed.message.startswith("The actor is dead because its worker process has died")
    assert end == Ended(segment=segment.number)
    pool.submit(segment)
    *reports, end = until_ended(pool)
    assert [report.key for report in reports if isinstance(report, Reported)] == reported_keys(segment)
    assert pool.free


def study_of(folder: Path, store: Path, **fields: Any) -> Study:
    return Study(mortal.spec(folder, **fields), store, root=mortal.write_task(folder))


def test_after_sigkill_in_the_middle_of_an_epoch_another_worker_goes_on_to_the_same_bits(
    pool: RayPool, tmp_path: Path
) -> None:
    reference = study_of(tmp_path, tmp_path / "reference", checkpoint_minutes=0)
    reference.run(LocalPool())
    needed = mortal.batches(tmp_path)
    (tmp_path / "trouble").write_text(f"kill {needed + mortal.DENSE_BATCHES + 7}")
    study = study_of(tmp_path, tmp_path / "store", checkpoint_minutes=1e-9)
    assert study.run(pool).done == 2
    assert not (tmp_path / "trouble").exists(), "nothing was killed"
    assert mortal.batches(tmp_path) == 2 * needed + 1, "only the batch that killed its worker is trained on again"
    assert study.status()["retries"]["worker died"] == 1
    assert not study.store.checkpoints.positions()
    one, other = (small.models(each.store, "mortal") for each in (study, reference))
    assert one.keys() == other.keys()
    assert all(small.same_bits(one[key], other[key]) for key in one)
    assert study.table().select(["key", "curve"]).sort_by("key") == reference.table().select(["key", "curve"]).sort_by(
        "key"
    )


def test_after_sigterm_a_worker_stores_where_it_is_and_no_trial_has_failed(pool: RayPool, tmp_path: Path) -> None:
    reference = study_of(tmp_path, tmp_path / "reference")
    reference.run(LocalPool())
    needed = mortal.batches(tmp_path)
    (tmp_path / "trouble").write_text(f"terminate {needed + mortal.DENSE_BATCHES + 7}")
    study = study_of(tmp_path, tmp_path / "store")
    standing = study.run(pool)
    assert (standing.done, standing.failed) == (2, 0), standing.last_failure
    assert not (tmp_path / "trouble").exists(), "nobody was told to end"
    assert mortal.batches(tmp_path) == 2 * needed, "not one batch is trained on twice"
    assert study.status()["retries"] == {"preempted": 1, "worker died": 0, "out of GPU memory": 0}
    one, other = (small.models(each.store, "mortal") for each in (study, reference))
    assert one.keys() == other.keys()
    assert all(small.same_bits(one[key], other[key]) for key in one)


def test_a_worker_that_hangs_is_ended_and_the_study_goes_on(
    pool: RayPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.pools import ray as rays

    monkeypatch.setattr(rays, "GRACE_SECONDS", 0.2)
    (tmp_path / "trouble").write_text(f"hang {mortal.DENSE_BATCHES + 20}")
    study = study_of(tmp_path, tmp_path / "store", timeout_seconds=1.5)
    standing = study.run(pool)
    assert (standing.done, standing.failed, standing.retries) == (1, 1, 0)
    assert standing.last_failure == (
        "timed out: the stage takes longer than timeout_seconds = 1.5, and its worker had to be ended"
    )


IMPATIENT_TASK = """
import dataclasses
import signal
import time

from my_task import task as patient


class TooSlow(Exception):
    pass


def task():
    found = patient()

    def ring(number, frame):
        raise TooSlow

    def loss(outputs, targets):
        signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        try:
            while True:
                time.sleep(1)
        except TooSlow:
            return found.loss(outputs, targets)

    return dataclasses.replace(found, loss=loss)
"""


def test_the_users_code_may_set_itself_an_alarm(pool: RayPool, tmp_path: Path) -> None:
    small.write_task(tmp_path)
    (tmp_path / "impatient.py").write_text(IMPATIENT_TASK)
    study = Study(small.spec(trials=1, task="impatient.py"), tmp_path / "store", root=tmp_path)
    standing = study.run(pool)
    assert (standing.done, standing.failed, standing.retries) == (1, 0, 0), standing.last_failure


def test_close_leaves_a_ray_that_was_there_before(ray_cluster: None) -> None:
    import ray

    from orchestrator.pools.ray import RayPool

    RayPool(1).close()
    assert ray.is_initialized()


def test_no_cluster_at_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from orchestrator.pools.ray import RayPool

    def refuse(**options: object) -> None:
        raise ConnectionError(f"could not connect to {options['address']}\nand much more")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with pytest.raises(InputError, match="no Ray cluster at 'auto'") as caught:
        RayPool(1, address="auto")
    assert "\n" not in str(caught.value)


def test_a_silent_address_is_refused_at_once() -> None:
    from orchestrator.pools.ray import RayPool

    with pytest.raises(InputError, match="no Ray cluster answers at 127.0.0.1:9: .*; legal: auto, HOST:PORT"):
        RayPool(1, address="127.0.0.1:9")
    with pytest.raises(InputError, match="joined from one of its nodes"):
        RayPool(1, address="ray://127.0.0.1:10001")
