"""Who is hired and who is let go on a cluster, against a Ray of plain Python whose nodes the test moves."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.errors import InputError, WorkersDied, WorkersUnusable
from orchestrator.graph import Segment, Step
from orchestrator.ops import Init
from orchestrator.pools import ray as pools
from orchestrator.pools import staff
from orchestrator.pools.protocol import Ended, Failed, Job, Reported
from orchestrator.pools.share import Share
from orchestrator.tasks.source import Source


class Died(Exception):
    preempted = False
    actor_init_failed = False


class Preempted(Died):
    preempted = True


@dataclass(eq=False)
class Ref:
    """What an actor will answer: nothing before it has been placed."""

    actor: Any
    value: Any = None
    raises: Exception | None = None
    far: bool = False
    """It lies on the actor's node: whoever wants it waits for as long as that does not answer."""


@dataclass(eq=False)
class Stream:
    """Events of a batch that never ends by itself."""

    actor: Any
    ends: bool = False
    raises: Exception | None = None
    batch: Sequence[Segment] = ()
    says: list[Any] = field(default_factory=list)
    """What it says before anything else."""

    def __next__(self) -> Ref:
        if self.says:
            return Ref(self.actor, self.says.pop(0))
        if self.raises is not None:
            return Ref(self.actor, raises=self.raises)
        if not self.batch:
            raise StopIteration
        segment, self.batch = self.batch[0], self.batch[1:]
        return Ref(self.actor, [Ended(segment=segment.number)])


class Method:
    def __init__(self, call: Any) -> None:
        self.remote = call

    def options(self, **_: Any) -> Method:
        return self


class Actor:
    def __init__(self, ray: FakeRay, options: dict[str, Any], told: tuple[Any, ...] = ()) -> None:
        self.ray, self.taken, self.node, self.alive, self.told = ray, options, "", True, told
        self.answer, self.stream = Ref(self), Stream(self)
        self.prepare, self.run = Method(self._prepare), Method(self._run)

    def _prepare(self, job: Any) -> Ref:
        self.answer.value = ("ready", SimpleNamespace(digests={}), (self.node, ""))
        return self.answer

    def _run(self, batch: Sequence[Segment]) -> Stream:
        self.stream = Stream(self, batch=tuple(batch))
        return self.stream


@dataclass
class FakeRay:
    """Nodes with cores, given out in the order of the asking."""

    cores: dict[str, int] = field(default_factory=dict)
    labels: dict[str, dict[str, str]] = field(default_factory=dict)
    draining: dict[str, int] = field(default_factory=dict)
    actors: list[Actor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.exceptions = SimpleNamespace(
            RayActorError=Died,
            OutOfMemoryError=Died,
            NodeDiedError=Died,
            WorkerCrashedError=Died,
            ObjectLostError=Died,
            ActorUnavailableError=type("ActorUnavailableError", (Died,), {}),
        )
        state = SimpleNamespace(get_draining_nodes=lambda: self.draining)
        self._private = SimpleNamespace(state=SimpleNamespace(state=state))

    def is_initialized(self) -> bool:
        return True

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": float(sum(self.cores.values()))}

    def available_resources(self) -> dict[str, float]:
        return self.cluster_resources()

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {
                "NodeID": name,
                "Alive": True,
                "NodeManagerHostname": f"host of {name}",
                "Labels": self.labels.get(name, {}),
            }
            | {"Resources": {"CPU": float(cores)}}
            for name, cores in self.cores.items()
        ]

    def put(self, value: Any) -> Any:
        return value

    def get(self, ref: Ref) -> Any:
        assert not ref.far, "nobody knows how long this takes"
        if ref.raises is not None:
            raise ref.raises
        return ref.value

    def kill(self, actor: Actor) -> None:
        actor.alive = False

    def remote(self, **options: Any) -> Any:
        def make(*told: Any) -> Actor:
            self.actors.append(Actor(self, options, told))
            return self.actors[-1]

        return lambda cls: SimpleNamespace(remote=make)

    def wait(self, refs: Sequence[Any], *, fetch_local: bool = True, **_: Any) -> tuple[list[Any], list[Any]]:
        self.place()
        ready = [ref for ref in refs if self._has_news(ref) and not (fetch_local and getattr(ref, "far", False))]
        return ready, []

    def place(self) -> None:
        """Actors come to nodes that have room and are not drained."""
        for actor in self.living():
            for name, cores in self.cores.items():
                placed = sum(other.node == name for other in self.living())
                if not actor.node and placed < cores and name not in self.draining:
                    actor.node = name
                    actor._prepare(None)

    def living(self) -> list[Actor]:
        return [actor for actor in self.actors if actor.alive]

    def pending(self) -> int:
        return sum(not actor.node for actor in self.living())

    def lose(self, name: str, error: Exception) -> None:
        """A node goes, with everything on it."""
        del self.cores[name]
        self.draining.pop(name, None)
        for actor in self.living():
            if actor.node == name:
                actor.stream.raises = actor.answer.raises = error

    def _has_news(self, ref: Any) -> bool:
        if isinstance(ref, Stream):
            return bool(ref.says) or ref.ends or ref.raises is not None
        return bool(ref.actor.node) or ref.raises is not None


@dataclass
class Clock:
    now: float = 1000.0

    def monotonic(self) -> float:
        self.now += 0.1
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pools, "time", clock)
    monkeypatch.setattr(staff, "time", clock)
    return clock


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    return fake


SOURCE = Source(name="mnist", module="mnist", files={}, digest="")


def job() -> Job:
    return Job(store_url="memory://none", study="small", task=SOURCE, task_params={}, root="/")


def segment(number: int, steps: int = 10) -> Segment:
    step = Step(key=f"{number:064x}", op=Init(seed=0), inputs=(), steps=steps, stored=True)
    return Segment(number=number, steps=(step,))


def prepared(ray: FakeRay, workers: int | None = None, share: Share | None = None) -> pools.RayPool:
    """A pool on the cluster; where that is empty, a node of one core comes while it waits."""
    pool = pools.RayPool(workers, address="auto", share=share)
    if not ray.cores:
        ray.cores["first"] = 1
    pool.prepare(job())
    return pool


def look(pool: pools.RayPool, clock: Clock, seconds: float = staff.LOOK_SECONDS) -> Sequence[Any]:
    """A while passes."""
    clock.now += seconds
    pool.completed(0)
    return pool.completed(0)


def test_one_worker_is_asked_for_where_there_is_no_room_and_no_work_yet(
    ray: FakeRay, caplog: pytest.LogCaptureFixture
) -> None:
    pool = pools.RayPool(8, address="auto")
    seen: list[int] = []

    def come() -> None:
        seen.append(ray.pending())
        if len(seen) == 3:
            ray.cores["late"] = 4
        FakeRay.place(ray)

    ray.place = come  # type: ignore[method-assign]
    pool.prepare(job())
    assert seen[:3] == [1, 1, 1], "one, not eight: nobody knows of any work yet"
    (line,) = caplog.messages
    assert line.startswith("waiting for workers: asked the autoscaler for 1 x {CPU: 1}; free in the cluster")


def test_the_wait_is_told_again_and_again(ray: FakeRay, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    pool = pools.RayPool(1, address="auto")
    places = 0

    def come() -> None:
        nonlocal places
        places += 1
        clock.now += 1
        if places == 200:
            ray.cores["late"] = 1
        FakeRay.place(ray)

    ray.place = come  # type: ignore[method-assign]
    pool.prepare(job())
    assert 5 <= len(caplog.messages) <= 9


def test_the_backlog_is_what_is_asked_for_and_no_more_than_workers(ray: FakeRay, clock: Clock) -> None:
    pool = prepared(ray, workers=4)
    assert len(ray.living()) == 1
    for number in range(2):
        pool.submit(segment(number))
    look(pool, clock)
    assert (len(ray.living()), ray.pending()) == (2, 1)
    for number in range(2, 9):
        pool.submit(segment(number))
    look(pool, clock)
    assert (len(ray.living()), ray.pending()) == (4, 3)
    assert pool.workers == 4 and pool.free == 0


def test_nodes_that_join_get_workers(ray: FakeRay, clock: Clock) -> None:
    pool = prepared(ray, workers=4)
    for number in range(4):
        pool.submit(segment(number))
    look(pool, clock)
    ray.cores["second"] = 2
    look(pool, clock)
    assert [actor.node for actor in ray.living()] == ["first", "second", "second", ""]


def test_without_a_number_the_cluster_is_filled_and_a_little_more_is_asked_for(ray: FakeRay, clock: Clock) -> None:
    ray.cores["first"] = 2
    pool = prepared(ray)
    assert (len(ray.living()), pool.workers) == (2, 2)
    for number in range(100):
        pool.submit(segment(number))
    look(pool, clock)
    assert ray.pending() == staff.COMING_AT_ONCE
    ray.cores["second"] = 20
    look(pool, clock)
    look(pool, clock)
    assert pool.workers == 22
    assert len(ray.living()) == 22 + 22 and ray.pending() == 22, "as many again as there are"


def test_cheap_segments_ask_for_few_workers(ray: FakeRay, clock: Clock) -> None:
    pool = prepared(ray, workers=50)
    for number in range(3 * staff.CHEAP_AT_ONCE):
        pool.submit(segment(number, steps=0))
    look(pool, clock)
    assert len(ray.living()) == 3


def test_a_request_that_is_not_needed_any_more_is_taken_back(ray: FakeRay, clock: Clock) -> None:
    pool = prepared(ray, workers=4)
    for number in range(2):
        pool.submit(segment(number))
    look(pool, clock)
    assert ray.pending() == 1
    (worker,) = [actor for actor in ray.living() if actor.node]
    for _ in range(2):
        worker.stream.ends = True
        look(pool, clock)
    worker.stream.ends = True
    look(pool, clock)
    assert ray.pending() == 0


def test_idle_workers_are_let_go_after_a_minute_and_come_back_with_work(ray: FakeRay, clock: Clock) -> None:
    ray.cores["first"] = 3
    pool = prepared(ray)
    assert len(ray.living()) == 3
    look(pool, clock, staff.IDLE_SECONDS - 5)
    assert len(ray.living()) == 3
    look(pool, clock, 10)
    assert not ray.living()
    assert pool.free
    pool.submit(segment(1))
    look(pool, clock)
    assert len(ray.living()) == 1


def test_a_draining_node_gets_no_new_stages(ray: FakeRay, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    ray.cores |= {"first": 1, "second": 1}
    pool = prepared(ray, workers=2)
    first, second = ray.living()
    pool.submit(segment(1))
    pool.completed(0)
    busy, idle = (first, second) if first.stream.batch else (second, first)
    ray.draining[busy.node] = ray.draining[idle.node] = 0
    look(pool, clock)
    assert (busy.alive, idle.alive) == (True, False)
    assert sum("is being drained: it gets no new stages" in line for line in caplog.messages) == 2
    busy.stream.ends = True
    pool.submit(segment(2))
    look(pool, clock)
    look(pool, clock)
    assert not busy.alive and not busy.stream.batch, "what it ran has ended, and nothing came after it"
    assert ray.pending() == 1
    ray.cores["third"] = 1
    look(pool, clock)
    assert ray.living()[-1].stream.batch[0].number == 2


def test_the_kind_of_a_loss_is_told(ray: FakeRay, clock: Clock) -> None:
    for error, drained, kind in (
        (Died("gone"), False, "worker died"),
        (Died("gone"), True, "preempted"),
        (Preempted("gone"), False, "preempted"),
    ):
        ray.cores["first"] = 1
        pool = prepared(ray, workers=1)
        pool.submit(segment(1))
        pool.completed(0)
        if drained:
            ray.draining["first"] = 0
            clock.now += staff.LOOK_SECONDS
            pool.completed(0)
        ray.lose("first", error)
        failed, ended = pool.completed(0)
        assert isinstance(failed, Failed) and failed.kind == kind
        assert ended == Ended(segment=1)
        pool.close()
        assert not ray.living()


def stillborn(self: Actor, job: Any) -> Ref:
    Actor.born(self, job)  # type: ignore[attr-defined]
    self.answer.raises = Died("The actor died because of this and that.\nThe actor is dead. Some common causes: x")
    return self.answer


def test_workers_that_are_killed_while_they_start_are_asked_for_again_with_growing_pauses(
    ray: FakeRay, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pool = prepared(ray, workers=3)
    ray.cores["second"] = 5
    for number in range(9):
        pool.submit(segment(number))
    with monkeypatch.context() as killing:
        killing.setattr(Actor, "born", Actor._prepare, raising=False)
        killing.setattr(Actor, "_prepare", stillborn)
        asked: list[int] = []
        for _ in range(300):
            look(pool, clock, 1.0)
            asked.append(len(ray.actors))
    waited = [later - sooner for sooner, later in pairwise(n for n in range(1, 300) if asked[n] > asked[n - 1])]
    assert waited == sorted(waited) and len(waited) > 15 and waited[-1] >= staff.LONGEST_PAUSE_SECONDS / 2
    assert "a worker died before it was ready, another is asked for: The actor is dead." in caplog.messages
    for _ in range(20):
        look(pool, clock, 1.0)
    assert len(ray.living()) == 3, "once nobody kills them they are there"
    assert pool._staff._pause == staff.FIRST_PAUSE_SECONDS


def test_where_they_die_for_ever_the_run_ends_and_the_input_is_not_blamed(
    ray: FakeRay, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = prepared(ray, workers=3)
    ray.cores["second"] = 5
    for number in range(9):
        pool.submit(segment(number))
    monkeypatch.setattr(Actor, "born", Actor._prepare, raising=False)
    monkeypatch.setattr(Actor, "_prepare", stillborn)
    began = clock.now
    with pytest.raises(WorkersDied, match=r"^for 10 minutes every worker has died before it was ready; the last: The "):
        for _ in range(1000):
            look(pool, clock, 1.0)
    assert clock.now > began + staff.IN_VAIN_SECONDS


def test_a_worker_that_cannot_even_begin_ends_the_run_at_once(
    ray: FakeRay, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unbegun(Died):
        actor_init_failed = True

    def unbegun(self: Actor, job: Any) -> Ref:
        self.answer.raises = Unbegun("The actor died because of an error raised in its creation task.")
        return self.answer

    monkeypatch.setattr(Actor, "_prepare", unbegun)
    ray.cores["first"] = 3
    pool = pools.RayPool(3, address="auto")
    with pytest.raises(WorkersUnusable, match="^a worker cannot start: The actor died because of an error raised"):
        pool.prepare(job())


def test_workers_that_were_to_start_on_a_node_that_dies_end_nothing(ray: FakeRay, clock: Clock) -> None:
    pool = prepared(ray, workers=9)
    for number in range(9):
        pool.submit(segment(number))
    look(pool, clock)
    assert ray.pending() == 8
    for actor in ray.living()[1:]:
        actor.node = "second"
    ray.cores["second"] = 8
    pool._staff.look()
    ray.lose("second", Died("The actor died because its node has died."))
    for actor in ray.actors[1:]:
        actor.answer.raises = Died("The actor died because its node has died.")
    look(pool, clock)
    assert len(ray.living()) == 9


def test_a_late_worker_that_cannot_be_used_ends_the_run_as_an_early_one_does(ray: FakeRay, clock: Clock) -> None:
    pool = prepared(ray, workers=2)
    for number in range(2):
        pool.submit(segment(number))
    look(pool, clock)
    said = "the worker on second runs other code than the driver"
    ray.actors[-1].answer.raises = None
    ray.actors[-1].node = "second"
    ray.actors[-1].answer.value = ("WorkersUnusable", said, ("second", ""))
    with pytest.raises(WorkersUnusable, match=said):
        pool.completed(0)


def test_what_was_only_asked_for_is_taken_back_in_the_end(ray: FakeRay, clock: Clock) -> None:
    pool = prepared(ray, workers=3)
    for number in range(3):
        pool.submit(segment(number))
    look(pool, clock)
    assert ray.pending() == 2
    pool.close()
    assert not ray.living()


def test_labels_and_resources_are_asked_of_ray(ray: FakeRay) -> None:
    ray.cores["first"] = 2
    ray.labels["first"] = {"kind": "spot"}
    share = Share(gpus=0, labels={"kind": "spot"})
    prepared(ray, share=share)
    assert [actor.taken["label_selector"] for actor in ray.living()] == [{"kind": "spot"}] * 2
    assert all(actor.taken["num_cpus"] == 1 and actor.taken["max_restarts"] == 0 for actor in ray.living())


def test_on_one_machine_no_room_is_refused_for_none_comes_later(ray: FakeRay) -> None:
    ray.cores["here"] = 2
    with pytest.raises(InputError, match="no room for 3 workers: there are 2 CPUs and 0 GPUs; legal: up to 2 workers"):
        pools.RayPool(3)
    with pytest.raises(InputError, match=r"no room for 1 workers with \{CPU: 1, trials: 1\} each: .* legal: --address"):
        pools.RayPool(share=Share(gpus=0, resources={"trials": 1}))


def test_a_worker_that_dies_when_all_is_told_has_failed_at_nothing(ray: FakeRay, clock: Clock) -> None:
    ray.cores["first"] = 1
    pool = prepared(ray, workers=1)
    pool.submit(segment(1))
    pool.completed(0)
    told = Reported(
        segment=1, key=f"{1:064x}", measures=None, resumable=False, stored=True, steps=10, seconds=0.0, worker="w:1"
    )
    (worker,) = ray.living()
    worker.stream.says = [[told]]
    assert pool.completed(0) == [told]
    ray.lose("first", Died("gone"))
    assert pool.completed(0) == [Ended(segment=1)]


def test_of_a_batch_that_a_worker_died_over_each_stage_is_run_alone(ray: FakeRay, clock: Clock) -> None:
    ray.cores["first"] = 1
    pool = prepared(ray, workers=1)
    for number in range(3):
        pool.submit(segment(number, steps=0))
    pool.completed(0)
    (worker,) = ray.living()
    assert [each.number for each in worker.stream.batch] == [0, 1, 2]
    worker.stream.raises = Died("gone")
    failed, *ended = pool.completed(0)
    assert isinstance(failed, Failed) and failed.key == f"{0:064x}"
    assert ended == [Ended(segment=number) for number in range(3)]
    for number in range(10, 15):
        again = segment(number - 10, steps=0)
        pool.submit(Segment(number=number, steps=again.steps))
    ran = []
    for _ in range(4):
        look(pool, clock)
        (worker,) = ray.living()
        ran.append([each.number for each in worker.stream.batch])
        says = [[Ended(segment=each.number)] for each in worker.stream.batch]
        worker.stream.says, worker.stream.batch = says, ()
        worker.stream.ends = True
        for _ in range(4):
            pool.completed(0)
    assert ran == [[10], [11], [12], [13, 14]]


def test_idle_workers_go_with_their_node_and_no_stage_is_lost_on_them(ray: FakeRay, clock: Clock) -> None:
    ray.cores["first"] = 4
    pool = prepared(ray, workers=4)
    pool.submit(segment(1))
    pool.completed(0)
    ray.cores["second"] = 4
    ray.lose("first", Died("gone"))
    assert [type(event) for event in pool.completed(0)] == [Failed, Ended]
    pool.submit(segment(2))
    look(pool, clock)
    assert [actor.node for actor in ray.living()] == ["second"]
    assert not any(isinstance(event, Failed) for event in look(pool, clock))


def test_what_an_interrupted_study_left_is_forgotten(ray: FakeRay, clock: Clock) -> None:
    ray.cores["first"] = 2
    pool = prepared(ray, workers=2)
    for number in range(5):
        pool.submit(segment(number))
    pool.completed(0)
    pool.prepare(job())
    assert not any(actor.stream.batch for actor in ray.living()) and pool.free
    assert pool.completed(0) == []


def test_an_answer_that_lies_on_a_node_that_falls_silent_is_not_waited_for(ray: FakeRay, clock: Clock) -> None:
    ray.cores |= {"first": 1, "second": 1}
    pool = prepared(ray, workers=2)
    pool.submit(segment(1))
    pool.completed(0)
    pool._staff._hire(0.0)
    ray.cores["third"] = 1
    coming = ray.living()[-1]
    coming.answer.far = True
    look(pool, clock)
    assert coming.node == "third" and pool._staff.slots[-1].coming is not None
    (busy,) = [actor for actor in ray.living() if actor.stream.batch]
    busy.stream.ends = True
    assert pool.completed(0) == [Ended(segment=1)], "the others are heard all the while"
    coming.answer.far = False
    pool.completed(0)
    assert pool._staff.slots[-1].coming is None


def test_a_worker_that_comes_to_a_draining_node_gets_no_stage(ray: FakeRay, clock: Clock) -> None:
    ray.cores["first"] = 1
    pool = prepared(ray, workers=2)
    for number in range(2):
        pool.submit(segment(number))
    look(pool, clock)
    ray.cores["second"] = 1
    late = ray.living()[-1]
    late.node = "second"
    late._prepare(None)
    ray.draining["second"] = 0
    clock.now += staff.LOOK_SECONDS
    pool.completed(0)
    assert not late.stream.batch
    pool.completed(0)
    assert not late.alive


def test_a_worker_that_knows_first_that_its_node_is_to_go_gets_no_new_stage(ray: FakeRay, clock: Clock) -> None:
    ray.cores["first"] = 1
    pool = prepared(ray, workers=1)
    pool.submit(segment(1))
    pool.completed(0)
    (worker,) = ray.living()
    left = Failed(segment=1, key=f"{1:064x}", kind="preempted", message="its worker was asked to leave")
    worker.stream.says = [[left]]
    worker.stream.ends = True
    pool.submit(segment(2))
    assert [event for _ in range(3) for event in pool.completed(0)] == [left, Ended(segment=1)]
    assert not worker.stream.batch, "it would only say the same again, and again"
    pool.completed(0)
    assert not worker.alive and ray.living()[-1].stream.batch[0].number == 2


def test_workers_that_are_taken_away_before_they_are_ready_end_nothing(
    ray: FakeRay, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = prepared(ray, workers=9)
    ray.cores["second"] = 9
    for number in range(9):
        pool.submit(segment(number))

    def taken_away(self: Actor, job: Any) -> Ref:
        self.answer.raises = Preempted("The actor died because its node was preempted.")
        return self.answer

    with monkeypatch.context() as patch:
        patch.setattr(Actor, "_prepare", taken_away)
        for _ in range(6):
            look(pool, clock)
    look(pool, clock)
    look(pool, clock)
    assert len([actor for actor in ray.living() if actor.stream.batch]) == 9


def test_a_pool_that_gave_up_on_its_workers_can_be_used_for_another_study(
    ray: FakeRay, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray.cores["first"] = 3
    pool = pools.RayPool(3, address="auto")
    with monkeypatch.context() as patch:
        patch.setattr(Actor, "born", Actor._prepare, raising=False)
        patch.setattr(Actor, "_prepare", stillborn)
        for _ in range(2):
            with pytest.raises(WorkersDied, match="every worker has died before it was ready"):
                pool.prepare(job())
    pool.prepare(job())
    assert len(ray.living()) == 3


def test_what_others_leave_no_room_for_is_asked_for_no_longer_than_there_is_work(ray: FakeRay, clock: Clock) -> None:
    ray.cores["first"] = 4

    def crowded() -> None:
        """Somebody else has three of the four cores."""
        ray.cores["first"] = 1
        FakeRay.place(ray)
        ray.cores["first"] = 4

    ray.place = crowded  # type: ignore[method-assign]
    pool = pools.RayPool(address="auto")
    pool.prepare(job())
    assert ray.pending() == 3
    look(pool, clock, staff.IDLE_SECONDS - 10)
    pool.submit(segment(1))
    look(pool, clock, 20)
    assert ray.pending() == 0, "nothing is queued: an autoscaler is not to bring a node for it"
    assert sum(bool(actor.stream.batch) for actor in ray.living()) == 1


def test_a_worker_is_told_how_much_memory_is_asked_for_and_how_many_share_it(ray: FakeRay) -> None:
    ray.cores["first"] = 2
    pool = pools.RayPool(2, address="auto", cache=12345)
    pool.prepare(job())
    assert [actor.told for actor in ray.living()] == [(0, 0.0, 2, 12345), (1, 0.0, 2, 12345)]


def test_a_call_of_a_worker_runs_alone(ray: FakeRay) -> None:
    ray.cores["first"] = 1
    prepared(ray)
    assert not {"max_concurrency", "concurrency_groups"} & ray.actors[0].taken.keys(), "off the main thread otherwise"
