"""A stage that wants more of a GPU than workers have gets it from its neighbours, against a Ray of plain Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.pools import ray as pools
from orchestrator.pools import staff
from orchestrator.pools.protocol import Began, Ended, Failed
from orchestrator.pools.share import Share
from tests.cluster import ROOT
from tests.orchestrator.pools import mortal
from tests.orchestrator.pools.test_staffing import Actor, Clock, FakeRay, Ref, Stream, clock, job, segment  # noqa: F401

WHOLE = 1 + 1e-9


class OneGpu(FakeRay):
    """One node with one GPU, of which actors take shares in the order of the asking."""

    def nodes(self) -> list[dict[str, Any]]:
        return [node | {"Resources": {"CPU": 16.0, "GPU": 1.0}} for node in super().nodes()]

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 16.0, "GPU": 1.0}

    def place(self) -> None:
        for actor in self.living():
            taken = sum(other.taken["num_gpus"] for other in self.living() if other.node)
            if not actor.node and taken + actor.taken["num_gpus"] < WHOLE:
                actor.node = "n"
                actor._prepare(None)

    def shares(self) -> list[float]:
        return sorted(actor.taken["num_gpus"] for actor in self.living() if actor.node)

    def end(self, share: float | None = None) -> None:
        """Every batch of workers with this share, or of all, comes to its end."""
        for actor in self.living():
            if share in (None, actor.taken["num_gpus"]):
                actor.stream.ends = True


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> OneGpu:  # noqa: F811
    fake = OneGpu(cores={"n": 16})
    monkeypatch.setitem(sys.modules, "ray", fake)
    return fake


@pytest.fixture(params=[None, "auto"], ids=["one machine", "cluster"])
def pool(request: pytest.FixtureRequest, ray: OneGpu, monkeypatch: pytest.MonkeyPatch) -> pools.RayPool:
    monkeypatch.setattr(pools, "refuse_silence", lambda address: None)
    pool = pools.RayPool(4, address=request.param, share=Share(gpus=0.25))
    pool.prepare(job())
    assert ray.shares() == [0.25] * 4
    return pool


def submit(pool: pools.RayPool, count: int, gpus: float = 0.0, begin: int = 0) -> None:
    for number in range(begin, begin + count):
        pool.submit(replace(segment(number), gpus=gpus))


def ended(pool: pools.RayPool) -> list[int]:
    events = [event for _ in range(6) for event in pool.completed(0)]
    return sorted(event.segment for event in events if isinstance(event, Ended))


def test_idle_neighbours_give_way(pool: pools.RayPool, ray: OneGpu) -> None:
    submit(pool, 2)
    pool.completed(0)
    submit(pool, 1, gpus=0.5, begin=10)
    assert ended(pool) == []
    assert ray.shares() == [0.25, 0.25, 0.5] and ray.pending() == 0
    ray.end()
    assert ended(pool) == [0, 1, 10]


def test_it_waits_for_busy_ones_and_nothing_goes_before_it(pool: pools.RayPool, ray: OneGpu) -> None:
    submit(pool, 4)
    pool.completed(0)
    submit(pool, 1, gpus=1.0, begin=10)
    submit(pool, 4, begin=20)
    assert ended(pool) == [] and ray.shares() == [0.25] * 4
    ray.end(0.25)
    assert ended(pool) == [0, 1, 2, 3]
    assert ray.shares() == [1.0]
    for actor in ray.living():
        assert [step.number for step in actor.stream.batch] == [10]


def test_others_run_on_a_large_worker_too(pool: pools.RayPool, ray: OneGpu) -> None:
    submit(pool, 1, gpus=1.0)
    ended(pool)
    submit(pool, 1, begin=1)
    ray.end()
    assert ended(pool)[0] == 0
    ray.end()
    assert ended(pool) in ([1], [])
    assert ray.shares() == [1.0] and ray.pending() == 0


def test_a_large_worker_that_dies_is_replaced(pool: pools.RayPool, ray: OneGpu) -> None:
    submit(pool, 1, gpus=0.5)
    ended(pool)
    (large,) = [actor for actor in ray.living() if actor.taken["num_gpus"] == 0.5]
    large.stream.raises = ray.exceptions.RayActorError("killed")
    said = [event for _ in range(3) for event in pool.completed(0)]
    assert [getattr(event, "kind", "") for event in said] == ["worker died", ""]
    submit(pool, 1, gpus=0.5)
    ended(pool)
    assert ray.shares()[-1] == 0.5
    ray.end()
    assert ended(pool) == [0]


def run_all(pool: pools.RayPool, ray: OneGpu) -> None:
    for _ in range(3):
        ray.end()
        ended(pool)


def test_what_nothing_needs_any_more_is_given_back_and_work_is_done_side_by_side_again(
    pool: pools.RayPool,
    ray: OneGpu,
    clock: Clock,  # noqa: F811
) -> None:
    submit(pool, 1, gpus=1.0)
    run_all(pool, ray)
    assert ray.shares() == [1.0]
    clock.now += staff.LARGE_SECONDS - 30
    submit(pool, 1, begin=1)
    ended(pool)
    assert ray.shares() == [1.0], "its like may still come"
    submit(pool, 8, begin=10)
    clock.now += 40
    run_all(pool, ray)
    assert ray.shares() == [0.25] * 4 and ray.pending() == 0
    submit(pool, 4, begin=30)
    ended(pool)
    assert sum(bool(actor.stream.batch) for actor in ray.living()) == 4


def test_it_is_kept_as_long_as_there_are_stages_that_need_it(
    pool: pools.RayPool,
    ray: OneGpu,
    clock: Clock,  # noqa: F811
) -> None:
    submit(pool, 1, gpus=1.0)
    ended(pool)
    (large,) = ray.living()
    for number in range(1, 4):
        clock.now += 3 * staff.LARGE_SECONDS  # it runs
        submit(pool, 1, begin=100 * number)
        submit(pool, 1, gpus=1.0, begin=number)
        ray.end()
        ended(pool)
        ray.end()
        ended(pool)
    assert ray.living() == [large]


def test_fewer_workers_than_there_is_room_for_go_on_beside_a_large_one(ray: OneGpu, clock: Clock) -> None:  # noqa: F811
    pool = pools.RayPool(2, share=Share(gpus=0.25))
    pool.prepare(job())
    submit(pool, 1, gpus=0.5)
    ended(pool)
    assert ray.shares() == [0.25, 0.5]
    submit(pool, 1, gpus=1.0, begin=1)
    run_all(pool, ray)
    ended(pool)
    assert ray.shares() == [1.0] and ray.pending() == 0


def test_another_study_begins_with_the_usual_share(pool: pools.RayPool, ray: OneGpu) -> None:
    submit(pool, 1, gpus=1.0)
    run_all(pool, ray)
    assert ray.shares() == [1.0]
    pool.prepare(job())
    ended(pool)
    assert set(ray.shares()) == {0.25} and ray.pending() == 0


class Talking(Stream):
    """Says that it begins a stage, and no more."""

    told = False

    def __next__(self) -> Ref:
        self.told, self.ends = True, False
        return Ref(self.actor, [Began(segment=self.batch[0].number, key=self.batch[0].steps[0].key)])


def test_a_worker_that_hangs_is_ended_and_not_before_its_time(
    ray: OneGpu,
    clock: Clock,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = pools.RayPool(1, share=Share(gpus=0.25))
    pool.prepare(replace(job(), timeout_seconds=60))

    def run(self: Actor, batch: Any) -> Stream:
        self.stream = Talking(self, batch=tuple(batch), ends=True)
        return self.stream

    monkeypatch.setattr(Actor, "_run", run)
    (actor,) = ray.living()
    actor.run.remote = lambda batch: run(actor, batch)
    submit(pool, 1)
    assert pool.completed(0) == [], "it is queued, given out and begins"
    assert pool.completed(0) == []
    clock.now += 60
    assert pool.completed(0) == [], "a training would end by itself now"
    clock.now += pools.GRACE_SECONDS
    failed, end = pool.completed(0)
    assert isinstance(failed, Failed) and end == Ended(segment=0)
    assert (failed.kind, failed.key) == ("timed out", segment(0).steps[0].key)
    assert not actor.alive
    pool.completed(0)
    assert ray.shares() == [0.25], "another has taken its place"


def test_whoever_has_spoken_meanwhile_is_heard_first(
    ray: OneGpu,
    clock: Clock,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = pools.RayPool(1, share=Share(gpus=0.25))
    pool.prepare(replace(job(), timeout_seconds=60))
    (actor,) = ray.living()
    submit(pool, 1)
    pool.completed(0)
    (slot,) = pool._staff.slots
    slot.began = "a" * 64, clock.now - 1000
    actor.stream.ends = True
    pool._end_overdue()
    assert actor.alive
    assert ended(pool) == [0]


STUDY = """
import json, os, sys, time
from pathlib import Path
import ray
from orchestrator import Study
from orchestrator.pools import actor, ray as pools, staff
from orchestrator.pools.share import Share
from tests.orchestrator.pools import mortal

class OnACpu(actor.Actor):
    \"\"\"Has its share of a GPU by name only: batches of 8 run out of memory on less than a whole one.\"\"\"

    def __init__(self, number, gpus, workers, cache):
        os.environ.update(HUNGRY="8", NEED="1", SHARE=str(gpus))
        super().__init__(number, 0.0, workers, cache)

    def run(self, segments):
        time.sleep(0.3)
        yield from super().run(segments)

staff.Actor, staff.LARGE_SECONDS = OnACpu, 0.5
ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
folder = Path(sys.argv[1])
fields = json.loads(sys.argv[2])
shares = []

class Noting(pools.RayPool):
    def completed(self, timeout_seconds):
        found = super().completed(timeout_seconds)
        now = sorted(slot.gpus for slot in self._staff.slots)
        if now != (shares or [None])[-1]:
            shares.append(now)
        return found

pool = Noting(2, share=Share(gpus=0.5))
study = Study(mortal.spec(folder, **fields), folder / "store", root=folder)
standing = study.run(pool)
print(json.dumps([standing.done, standing.failed, study.status()["retries"], shares]))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_on_a_real_ray_a_study_whose_large_trainings_are_done_goes_on_side_by_side(tmp_path: Path) -> None:
    mortal.write_task(tmp_path)
    fields = {
        "trials": 16,
        "train": {"epochs": 2, "retrain_epochs": 1, "batch_size": 16, "lr": 0.05},
        "space": {"rate": [0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45], "rounds": 1, "batch_size": [16, 8]},
    }
    done = subprocess.run(
        [sys.executable, "-c", STUDY, str(tmp_path), json.dumps(fields)],
        env=os.environ | {"PYTHONPATH": ROOT},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    finished, failed, retries, shares = json.loads(done.stdout.splitlines()[-1])
    assert (finished, failed) == (16, 0) and retries["out of GPU memory"] in (1, 2)
    assert [1.0] in shares and shares[0] == shares[-1] == [0.5, 0.5], shares
