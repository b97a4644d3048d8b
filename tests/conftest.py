"""What every test may ask for: a quiet environment, a small Ray cluster, a folder whose name breaks careless code."""

from __future__ import annotations

import os

# Read when ray and torch are imported, here and in every process that a test starts.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_metrics_report_interval_ms"] = "500"  # noqa: SIM112 Ray spells it so
os.environ["OMP_NUM_THREADS"] = "1"  # torch takes its number of threads from it, in workers too
os.environ.pop("ORCHARDIST_STORE", None)

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray with two CPUs; a Ray that was there before is used and left alone."""
    import ray

    if ray.is_initialized():
        yield
        return
    ray.init(address="local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the small task."""
    from tests.orchestrator.pools import small

    return small.write_task(tmp_path_factory.mktemp("root"))


@pytest.fixture
def memory() -> str:
    """The URL of a store of its own."""
    return f"memory://{uuid4().hex}"


@pytest.fixture
def weird_tmp_path(tmp_path: Path) -> Path:
    """A folder whose name holds what shells, URLs and globs trip over."""
    path = tmp_path / "two words, 'one' \"quote\" & ünïcode 木 #1 [x] 100%"
    path.mkdir()
    return path
