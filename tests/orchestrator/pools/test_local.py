from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from orchestrator.pools.local import LocalPool
from orchestrator.pools.protocol import Pool, Reported
from tests.contracts.pool import POOL_CHECKS, job, segments, until_ended


@pytest.mark.parametrize("check", POOL_CHECKS)
def test_contract(check: Callable[[Pool, Path], None], tmp_path: Path) -> None:
    check(LocalPool(), tmp_path)


def test_one_segment_at_a_time(tmp_path: Path) -> None:
    pool = LocalPool()
    (segment,) = segments(pool.prepare(job(tmp_path)))
    assert pool.free == 1
    pool.submit(segment)
    assert pool.free == 0
    assert isinstance(pool.completed(0)[0], Reported)
    assert pool.free == 0
    until_ended(pool)
    assert pool.free == 1


def test_what_an_interrupted_study_left_is_forgotten(tmp_path: Path) -> None:
    pool = LocalPool()
    (segment,) = segments(pool.prepare(job(tmp_path)))
    pool.submit(segment)
    pool.completed(0)
    pool.prepare(job(tmp_path))
    assert pool.free == 1 and pool.completed(0) == []


def test_this_process_keeps_its_threads_and_its_generators(tmp_path: Path) -> None:
    pool = LocalPool()
    (segment,) = segments(pool.prepare(job(tmp_path)), criterion="random")
    threads = torch.get_num_threads()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    pool.submit(segment)
    until_ended(pool)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads
