"""Who works: which workers are asked for, made ready, kept, let go, and given up with their nodes."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

from orchestrator import errors
from orchestrator.errors import InputError, OrchardistError, WorkersDied, WorkersUnusable
from orchestrator.graph import Segment
from orchestrator.pools.actor import Actor
from orchestrator.pools.nodes import Nodes
from orchestrator.pools.protocol import Job, note
from orchestrator.pools.share import Share
from orchestrator.pools.slots import Slot, give_way
from orchestrator.store.store import Store
from orchestrator.tasks.info import TaskInfo

_LOG = logging.getLogger("orchardist.pool")

CHEAP_AT_ONCE = 32
"""Segments without training are sent to a worker this many at a time: their own time is about that of a call."""

IN_VAIN_SECONDS = 600.0
"""For so long workers may die before they are ready, one after the other: somebody may be killing them, for a while."""

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 15.0
"""After workers that died before they were ready nobody is asked for; the pause doubles each time."""

PATIENCE_SECONDS = 30.0
"""How often it is said that there are no workers."""

LOOK_SECONDS = 2.0
"""How often nodes are looked at that come, are drained and go."""

IDLE_SECONDS = 60.0
"""Workers on a cluster that had nothing to do for so long are let go, and their nodes with them; so are those that were
asked for, did not come, and are not needed any more."""

LARGE_SECONDS = 60.0
"""A worker with more of a GPU than usual, which nothing has needed for so long, makes room for usual ones again."""

COMING_AT_ONCE = 8
"""Workers beyond the room there is are asked for this many at a time, or as many as there are."""


class Staff:
    """The workers of a pool.

    Args:
        ray: the module, connected to a cluster.
        share: what each worker takes, and on which nodes it may be.
        most: how many at most; None: as many as there is room for.
        elastic: on a cluster they come and go; on one machine they are there throughout.
        cache: bytes of recent states that each holds in memory; None: what is usual.
    """

    def __init__(self, ray: Any, share: Share, *, most: int | None, elastic: bool, cache: int | None) -> None:
        self._ray = ray
        gone = ray.exceptions
        self.deaths: tuple[type[Exception], ...] = (
            gone.RayActorError,
            gone.OutOfMemoryError,
            gone.NodeDiedError,
            gone.WorkerCrashedError,
            gone.ObjectLostError,
        )
        """What is raised instead of the answer of a worker that is no more."""
        self.slots: list[Slot] = []
        self._numbers = count()
        self._elastic = elastic
        self._hint = ""
        if share.gpus is None:
            share = replace(share, gpus=1.0 if ray.cluster_resources().get("GPU") else 0.0)
            self._hint = "" if share.gpus else "; where GPUs are to come, --gpus-per-worker asks for them"
        self.share = share
        self.gpus: float = share.gpus or 0.0
        self._cache = cache
        self.nodes = Nodes(ray, share)
        self.look()
        self._most = most if elastic else most or self.nodes.room
        self._silent_until, self._said_so = time.monotonic() + PATIENCE_SECONDS, False
        self._job: Job | None = None
        self._sent: Any = None
        self.info: TaskInfo | None = None
        self.bystanders = 0
        """How many workers have died before they were ready."""
        self._in_vain_since = math.inf
        """When the first worker died before it was ready, since when none was ready and no stage was reported."""
        self._pause = FIRST_PAUSE_SECONDS
        self._paused_until = -math.inf

    @property
    def workers(self) -> int:
        """The most that are wanted; without a bound, as many as the nodes there are have room for."""
        return self._most or max(1, self.nodes.room)

    @property
    def able(self) -> int:
        """Workers that are idle, or that could still be asked for."""
        return sum(slot.idle for slot in self.slots) + max(0, self._bound() - self._ready())

    def engage(self, job: Job) -> None:
        """Have every worker prepare for a job: those there are, and new ones as far as there is room."""
        self._job, self.info = job, None
        self.thrives()
        for slot in [slot for slot in self.slots if slot.running or slot.gpus > self.gpus]:
            self.drop(slot)  # what an earlier study left here when it was interrupted, or alone had needed
        self._sent = self._ray.put(job)  # once for all workers: it may hold a checkpoint
        for slot in self.slots:
            slot.coming, slot.idle_since = slot.actor.prepare.remote(self._sent), time.monotonic()
        while len(self.slots) < max(1, min(self._most or self.nodes.room, self.nodes.room)):
            self._hire(self.gpus)

    def welcome(self, slot: Slot) -> None:
        """What a new worker answers, and whether its note came through, decides if it may work.

        Raises:
            WorkersUnusable: it cannot start here, or has another store, other code or other data.
            WorkersDied: nothing but deaths for a long time.
            TaskError: the task is wrong.
        """
        assert self._job is not None
        try:
            what, answer, place = self._ray.get(slot.coming)
        except self.deaths as error:
            self.drop(slot)
            if self._elastic:
                self.look()
            if getattr(error, "actor_init_failed", False):
                raise WorkersUnusable(f"a worker cannot start: {last_words(error)}") from error
            if not self._is_of_its_node(error):
                self._mourn(error)
            return
        if what != "ready":
            raise _error(what, answer)
        if self._job.nonce and not Store(self._job.store_url).files.exists(note(self._job, slot.number)):
            raise WorkersUnusable(
                f"what worker {slot.number} writes to {Store(self._job.store_url).name} does not arrive here: "
                "the store must be shared storage"
            )
        self.info = self.info or answer
        if answer.digests != self.info.digests:
            raise WorkersUnusable("the workers see different data for the same task; data_version can name them")
        self.thrives()
        slot.coming, slot.idle_since = None, time.monotonic()
        slot.node, slot.gpu = place
        slot.leaving = slot.node in self.nodes.draining

    @property
    def pause(self) -> float:
        """How many seconds nobody is asked for."""
        return max(0.0, self._paused_until - time.monotonic())

    def thrives(self) -> None:
        """A worker is ready, or has done a stage."""
        self._in_vain_since, self._pause = math.inf, FIRST_PAUSE_SECONDS

    def idle(self, queue: Sequence[Segment]) -> list[Slot]:
        """Workers that can be given the first segment of the queue."""
        self._give_back(queue)
        gone = self.nodes.gone
        return [slot for slot in self.slots if slot.idle and slot.node not in gone and slot.gpus >= queue[0].gpus]

    def adjust(self, queue: Sequence[Segment], at_least: int = 0) -> None:
        """As many workers as there is work for, within bounds, and none on a node that is being drained."""
        now = time.monotonic()
        if self._elastic and now >= self.nodes.looked_at + LOOK_SECONDS:
            self.look()
        for slot in list(self.slots):
            slot.leaving = slot.leaving or slot.node in self.nodes.draining
            if (slot.leaving or slot.node in self.nodes.gone) and not slot.running:
                self.drop(slot)
        self._give_back(queue)
        if now < self._paused_until:
            return
        self._make_room(queue)
        staying = [slot for slot in self.slots if not slot.leaving]
        if self._elastic:
            wanted = min(self._bound(), max(at_least, self._work(queue)))
            self._let_go(staying, wanted, now)
            lacking = wanted - self._count(staying)
        else:
            lacking = min(self.workers - len(staying), int(min(self.workers, self.nodes.shares - self._count(staying))))
        for _ in range(lacking):
            self._hire(self.gpus)
        self._say_if_waiting(now)

    def look(self) -> None:
        """Look at the nodes that come, are drained and go."""
        self.nodes.look(time.monotonic(), {slot.node for slot in self.slots})

    def lose(self) -> None:
        """A worker died. With a node go all its workers, those too that have nothing to do."""
        if self._elastic:
            self.look()

    def drop(self, slot: Slot) -> None:
        """End a worker, or take back that it was asked for."""
        self.slots.remove(slot)
        self._ray.kill(slot.actor)

    def _mourn(self, error: Exception) -> None:
        """A worker died before it was ready, and did not say why: that may be its own fault, or somebody killed it."""
        self.bystanders += 1
        now = time.monotonic()
        self._in_vain_since = min(self._in_vain_since, now)
        if now > self._in_vain_since + IN_VAIN_SECONDS:
            raise WorkersDied(
                f"for {IN_VAIN_SECONDS / 60:g} minutes every worker has died before it was ready; the last: "
                f"{last_words(error)}. What is finished is not lost: run the study again once that is put right"
            ) from error
        if now >= self._paused_until:  # several that die at once are one misfortune
            _LOG.warning("a worker died before it was ready, another is asked for: %s", last_words(error))
            self._paused_until = now + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)

    def _is_of_its_node(self, error: Exception) -> bool:
        """Whether a worker that died before it was ready went with a node, as all do that were to start there."""
        unavailable = isinstance(error, self._ray.exceptions.ActorUnavailableError)
        lately = time.monotonic() < self.nodes.lost_at + PATIENCE_SECONDS
        return unavailable or lately or bool(getattr(error, "preempted", False))

    def _ready(self) -> int:
        return self._count(slot for slot in self.slots if slot.coming is None and not slot.leaving)

    def _count(self, slots: Iterable[Slot]) -> int:
        """How many workers of the usual share the slots stand for."""
        return sum(max(1, math.ceil(slot.gpus / self.gpus - 1e-9)) if self.gpus else 1 for slot in slots)

    def _bound(self) -> int:
        """How many workers there may be: without a number from the user a little more than there is room for, since
        that is how an autoscaler learns that more is wanted."""
        return self._most or self.nodes.room + max(COMING_AT_ONCE, self._ready())

    def _work(self, queue: Sequence[Segment]) -> int:
        """How many workers the work at hand would keep busy."""
        busy = sum(bool(slot.running) for slot in self.slots if not slot.leaving)
        costly = sum(1 for segment in queue if segment.cost)
        return busy + costly + math.ceil((len(queue) - costly) / CHEAP_AT_ONCE)

    def _let_go(self, staying: list[Slot], wanted: int, now: float) -> None:
        """Take back what was asked for when there was more to do, and let those go that were idle for long."""
        for slot in reversed(staying[:]):
            beyond_work, beyond_room = len(staying) > wanted, len(staying) > max(wanted, self.nodes.room)
            long = now > slot.idle_since + IDLE_SECONDS
            coming = slot.coming is not None
            if (coming and (beyond_room or (beyond_work and long))) or (slot.idle and long):
                staying.remove(slot)
                self.drop(slot)

    def _give_back(self, queue: Sequence[Segment]) -> None:
        """Let those go that have more of a GPU than usual and are idle, once nothing has needed it for a while."""
        large = [slot for slot in self.slots if slot.gpus > self.gpus]
        if not large:
            return
        now = time.monotonic()
        awaited = any(segment.gpus > self.gpus for segment in queue)
        for slot in large:
            if awaited or any(segment.gpus > self.gpus for segment in slot.running):
                slot.needed_at = now
            elif slot.idle and now > slot.needed_at + LARGE_SECONDS:
                _LOG.info("a worker gives %g of a GPU back: nothing needs more than %g any more", slot.gpus, self.gpus)
                self.drop(slot)

    def _make_room(self, queue: Sequence[Segment]) -> None:
        """A stage that wants more of a GPU than any worker has gets a larger one, in the room of idle ones beside each
        other; until they are idle nothing else is handed out."""
        wanted = queue[0].gpus if queue else 0.0
        if not wanted or any(slot.gpus >= wanted and (slot.idle or slot.coming is not None) for slot in self.slots):
            return
        in_its_room = give_way(self.slots, wanted)
        if in_its_room:
            _LOG.warning("a worker gets %g of a GPU: the memory of %g was not enough", wanted, self.gpus)
            for slot in in_its_room:
                self.drop(slot)
            self._hire(wanted)

    def _hire(self, gpus: float) -> None:
        """Ask for one more worker; where there is no room it pends, which is what an autoscaler goes by."""
        options: dict[str, Any] = {"num_cpus": 1, "max_restarts": 0, "max_task_retries": 0}
        if gpus:
            options["num_gpus"] = gpus
        if self.share.resources:
            options["resources"] = dict(self.share.resources)
        if self.share.labels:
            options["label_selector"] = dict(self.share.labels)
        number, now = next(self._numbers), time.monotonic()
        actor = self._ray.remote(**options)(Actor).remote(number, gpus, self._most, self._cache)
        coming = actor.prepare.remote(self._sent)
        self.slots.append(Slot(number, actor, gpus, coming, idle_since=now, needed_at=now))

    def _say_if_waiting(self, now: float) -> None:
        """Nothing goes on without workers: say what is waited for, at once where there is no room."""
        coming = sum(slot.coming is not None for slot in self.slots)
        if self._ready() or not coming:
            self._silent_until, self._said_so = now + PATIENCE_SECONDS, False
        elif now >= self._silent_until or not (self.nodes.room or self._said_so):
            self._silent_until, self._said_so = now + PATIENCE_SECONDS, True
            free: dict[str, float] = self._ray.available_resources()
            _LOG.warning(
                "waiting for workers: asked %s for %d x %s; free in the cluster: %s%s",
                "the autoscaler" if self._elastic else "Ray",
                coming,
                self.share.says(),
                ", ".join(f"{free.get(name, 0):g} {name}" for name in ("CPU", "GPU", *self.share.resources)),
                self._hint if self._elastic else "",
            )


def last_words(error: Exception) -> str:
    """The line of Ray's account that says why a worker died, without its advice."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    said = next((line for line in reversed(lines) if line.startswith("The actor")), lines[0] if lines else "")
    return said.partition(" Some common causes")[0]


def _error(kind: str, message: str) -> OrchardistError:
    if kind == "UnknownName":
        return InputError(message)
    found = getattr(errors, kind, OrchardistError)
    assert issubclass(found, OrchardistError)
    return found(message)
