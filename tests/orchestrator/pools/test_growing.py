"""A stage that wants more of a GPU than workers have gets it from its neighbours, against a Ray of plain Python."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.pools import ray as pools
from orchestrator.pools.protocol import Began, Ended, Failed
from orchestrator.pools.share import Share
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
    (slot,) = pool._slots
    slot.began = "a" * 64, clock.now - 1000
    actor.stream.ends = True
    pool._end_overdue()
    assert actor.alive
    assert ended(pool) == [0]
