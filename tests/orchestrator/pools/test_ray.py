from __future__ import annotations

import subprocess
import sys
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
    with pytest.raises(InputError, match="no Ray cluster at 'auto'") as caught:
        RayPool(1, address="auto")
    assert "\n" not in str(caught.value)


def test_a_silent_address_is_refused_at_once() -> None:
    from orchestrator.pools.ray import RayPool

    with pytest.raises(InputError, match="no Ray cluster answers at 127.0.0.1:9: .*; legal: auto, HOST:PORT"):
        RayPool(1, address="127.0.0.1:9")
    with pytest.raises(InputError, match="joined from one of its nodes"):
        RayPool(1, address="ray://127.0.0.1:10001")


def test_a_cluster_is_joined_and_the_driver_needs_no_torch(tmp_path: Path) -> None:
    """Two worker nodes beside a head without trials; the command runs in a process of its own."""
    from ray.cluster_utils import Cluster

    study = tmp_path / "study.toml"
    study.write_text(
        'name = "joined"\ntask = "digits"\ntrials = 2\nsampler = "random"\n'
        "[train]\nepochs = 1\nretrain_epochs = 1\n[space]\nrate = [0.2, 0.5]\nrounds = 2\n"
    )
    script = (
        "import sys; from orchestrator import cli; sys.argv[0] = 'orchardist'\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        words = ["run", str(study), "--address", cluster.address, "--store", str(tmp_path / "store")]
        done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=180)
    finally:
        cluster.shutdown()
    assert done.returncode == 0, done.stderr
    assert "The knee of the front is" in done.stdout
