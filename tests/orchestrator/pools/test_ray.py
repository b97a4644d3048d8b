from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from orchestrator.errors import InputError
from orchestrator.pools.protocol import Ended, Failed, Pool, Reported
from tests.contracts.pool import POOL_CHECKS, job, reported_keys, segments, until_ended

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


def test_a_killed_workers_segment_is_done_by_its_replacement(pool: RayPool, tmp_path: Path) -> None:
    marker = tmp_path / "killed"
    info = pool.prepare(job(tmp_path, trouble="once", marker=str(marker)))
    (segment,) = segments(info, lr=1e3)
    pool.submit(segment)
    *reports, end = until_ended(pool)
    assert marker.exists(), "the worker was not killed"
    assert [report.key for report in reports if isinstance(report, Reported)] == reported_keys(segment)
    assert end == Ended(segment=segment.number)
    assert pool.free


def test_a_segment_that_kills_every_worker_fails(pool: RayPool, tmp_path: Path) -> None:
    info = pool.prepare(job(tmp_path, trouble="kills"))
    (poison,) = segments(info, lr=1e3)
    pool.submit(poison)
    failed, end = until_ended(pool)
    assert isinstance(failed, Failed) and isinstance(end, Ended)
    assert failed.kind == "worker died" and failed.key in reported_keys(poison)
    (good,) = segments(info)
    pool.submit(good)
    assert [type(event) for event in until_ended(pool)] == [Reported, Reported, Ended]


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
    with pytest.raises(InputError, match="no Ray cluster at '127.0.0.1:1'") as caught:
        RayPool(1, address="127.0.0.1:1")
    assert "\n" not in str(caught.value)
