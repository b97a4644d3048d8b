"""What a pool on Ray publishes stands where Prometheus scrapes Ray's own metrics."""

from __future__ import annotations

import re
import time
import urllib.request

import pytest

from orchestrator.metrics import METRICS, metrics
from orchestrator.pools.ray import RayPool
from orchestrator.progress import Standing

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def scraped(until: str) -> str:
    """The page of metrics of this node, once `until` is on it."""
    import ray

    port = ray.nodes()[0]["MetricsExportPort"]  # type: ignore[no-untyped-call]
    deadline = time.monotonic() + 60
    page = ""
    while until not in page and time.monotonic() < deadline:
        time.sleep(0.2)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            page = answer.read().decode()
    return page


def test_every_count_of_a_study_can_be_scraped() -> None:
    standing = Standing(asked=9, done=4, failed=1, running=2, epochs_asked=40, epochs_run=25, stages_run=7, retries=3)
    pool = RayPool(1)
    try:
        pool.publish("a-study", metrics(standing, 5))
        page = scraped("ray_orchardist_retries{")
    finally:
        pool.close()
    found = {
        name: float(value)
        for name, labels, value in re.findall(r"^ray_orchardist_(\w+)\{(.*)\} (\S+)$", page, re.MULTILINE)
        if 'study="a-study"' in labels
    }
    assert found == metrics(standing, 5) and found.keys() == METRICS.keys()
