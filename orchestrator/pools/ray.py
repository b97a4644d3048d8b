"""Segments run by Ray actors: one long-lived worker process per slot, on this machine or on a cluster."""

from __future__ import annotations

import logging
import math
import os
import platform
import signal
import socket
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, Any

from orchestrator import errors
from orchestrator.errors import InputError, OrchardistError, WorkersUnusable
from orchestrator.graph import Segment
from orchestrator.metrics import METRICS
from orchestrator.pools.protocol import Began, Ended, Event, Failed, Job, Reported, note
from orchestrator.pools.share import Share
from orchestrator.store.store import Store
from orchestrator.tasks.info import TaskInfo

_LOG = logging.getLogger("orchardist.pool")

CHEAP_AT_ONCE = 32
"""Segments without training are sent to a worker this many at a time: their own time is about that of a call."""

MOST_STILLBORN = 3
"""So many workers in a row may die before they are ready."""

CONNECT_SECONDS = 10.0

PATIENCE_SECONDS = 30.0
"""How often it is said that there are no workers."""

LATE_SECONDS = 15.0
"""Workers that take so much longer to start than the first join when they come."""

LOOK_SECONDS = 2.0
"""How often nodes are looked at that come, are drained and go."""

IDLE_SECONDS = 60.0
"""Workers on a cluster that had nothing to do for so long are let go, and their nodes with them."""

COMING_AT_ONCE = 8
"""Workers beyond the room there is are asked for this many at a time, or as many as there are."""

GRACE_SECONDS = 5.0
"""A training that takes too long ends by itself within this time; whatever else does is ended with its worker then."""

_HELD = 64


class _Actor:
    """A worker process. Answers are plain values: an error is one too."""

    def __init__(self, number: int, gpus: float) -> None:
        import torch

        torch.set_num_threads(1)
        self.number = number
        self.device = "cuda" if gpus else "cpu"
        self.blind = bool(gpus) and not torch.cuda.is_available()
        if gpus and not self.blind:
            torch.cuda.set_per_process_memory_fraction(min(1.0, gpus))

    def prepare(self, job: Job) -> tuple[str, Any, tuple[str, str]]:
        """("ready", TaskInfo), or the name of an error and its message; and where this is: node and GPU."""
        from orchestrator.pools.worker import Worker, shake_hands

        try:
            if self.blind:
                raise WorkersUnusable(
                    f"Ray counts a GPU on {platform.node()}, and torch sees none: install a torch built for it there, "
                    "or --gpus-per-worker 0"
                )
            shake_hands(job, self.number)
            self.worker = Worker(job, device=self.device)
            return "ready", self.worker.info, _place()
        except OrchardistError as error:
            return type(error).__name__, str(error), _place()

    def leave(self) -> None:
        """The node is about to be taken away: what can be stored of the stage under way is stored, and it ends."""
        self.worker.leave()

    def run(self, segments: Sequence[Segment]) -> Iterator[list[Event | Began]]:
        """Run segments one after another. Reports of stages without training are gathered until the last one, or until
        a stage begins that has a time limit."""
        gathered: list[Event | Began] = []
        for segment in segments:
            for event in self.worker.run(segment):
                gathered.append(event)
                if segment.cost or isinstance(event, Began):
                    yield gathered
                    gathered = []
        if gathered:
            yield gathered


@dataclass
class _Slot:
    """One worker as the driver sees it: where it is, what it runs, and which states it lately held."""

    number: int
    actor: Any
    gpus: float
    coming: Any
    """What it will answer when it is ready; None once it is."""
    node: str = ""
    gpu: str = ""
    """Its number on the node."""
    leaving: bool = False
    """Its node is being drained: it gets no new stages."""
    idle_since: float = 0.0
    running: deque[Segment] = field(default_factory=deque)
    stream: Any = None
    held: OrderedDict[str, None] = field(default_factory=OrderedDict)
    began: tuple[str, float] | None = None
    """The stage that it is at and since when, where stages have a time limit."""

    @property
    def idle(self) -> bool:
        return self.coming is None and not self.running and not self.leaving


class RayPool:
    """One actor per slot on an embedded Ray, or on the cluster at `address`.

    On a cluster workers come and go with its nodes and with the work: what is queued asks for workers, which pend in
    Ray until there is room, and so ask its autoscaler for nodes; a worker without work is let go after a minute. Nodes
    that are drained get no new stages.

    Args:
        workers: how many at most; by default as many as there is room for.
        address: a running cluster to join from one of its nodes; None starts Ray inside this process.
        share: what each worker takes, and on which nodes it may be.
    """

    def __init__(self, workers: int | None = None, *, address: str | None = None, share: Share | None = None) -> None:
        import ray

        if address is not None:
            refuse_silence(address)
        self._started = not ray.is_initialized()
        if self._started:
            with _own_sigterm():
                _start(ray, workers, address)
        self._ray = ray
        gone = ray.exceptions
        self._deaths = (
            gone.RayActorError,
            gone.OutOfMemoryError,
            gone.NodeDiedError,
            gone.WorkerCrashedError,
            gone.ObjectLostError,
        )
        self._slots: list[_Slot] = []
        self._numbers = count()
        self._elastic = address is not None
        self._share = share or Share()
        self._hint = ""
        if self._share.gpus is None:
            resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
            self._share = replace(self._share, gpus=1.0 if resources.get("GPU") else 0.0)
            self._hint = "" if self._share.gpus else "; where GPUs are to come, --gpus-per-worker asks for them"
        self.device = "cuda" if self._share.gpus else "cpu"
        self._most = workers
        self._there: frozenset[str] = frozenset()
        self._node_lost_at = -math.inf
        self._draining: frozenset[str] = frozenset()
        self._gone: frozenset[str] = frozenset()
        """Nodes that are there no more; Ray says nothing of their idle workers until one is asked to work."""
        self._look()
        self._silent_until, self._said_so = time.monotonic() + PATIENCE_SECONDS, False
        if not self._elastic:
            self._most = workers or self._room
            try:
                _refuse_no_room(self._most, self._room, self._share, ray.cluster_resources())  # type: ignore[no-untyped-call]
            except InputError:
                self.close()
                raise
        self._job: Job | None = None
        self._sent: Any = None
        self._info: TaskInfo | None = None
        self._stillborn = 0
        self._queue: deque[Segment] = deque()
        self._said: deque[Event] = deque()
        self._suspects: set[str] = set()
        """Stages of batches that a worker died over: each is run alone, so that only the guilty one is blamed again."""
        self._gauges: dict[str, Any] = {}

    @property
    def gpus(self) -> float:
        """The share of a GPU that each worker begins with; 0 on a CPU."""
        return self._share.gpus or 0.0

    @property
    def workers(self) -> int:
        """The most that are wanted; without a bound, as many as the nodes there are have room for."""
        return self._most or max(1, self._room)

    @property
    def free(self) -> int:
        """Workers that are idle, or that could still be asked for, take one segment with training each, and many
        without."""
        able = sum(slot.idle for slot in self._slots) + max(0, self._bound() - self._ready())
        if sum(1 for segment in self._queue if segment.cost) >= able:
            return 0
        return max(0, CHEAP_AT_ONCE * able - len(self._queue))

    def prepare(self, job: Job) -> TaskInfo:
        """Make workers ready, all that there is room for; wait for the first as long as it takes. The first that is
        wrong ends the run."""
        self._job, self._info = job, None
        self._forget()
        self._sent = self._ray.put(job)  # once for all workers: it may hold a checkpoint
        for slot in self._slots:
            slot.coming = slot.actor.prepare.remote(self._sent)
        while len(self._slots) < max(1, min(self._most or self._room, self._room)):
            self._hire(self.gpus)
        first_at = math.inf
        while any(slot.coming is not None for slot in self._slots) and time.monotonic() < first_at + LATE_SECONDS:
            self._await(1.0)
            self._staff(at_least=1)
            if self._info is not None:
                first_at = min(first_at, time.monotonic())
        assert self._info is not None
        return self._info

    def submit(self, segment: Segment) -> None:
        """Queue a segment; the next call of `completed` hands it to an idle worker, with others if they are cheap."""
        self._queue.append(segment)

    def completed(self, timeout_seconds: float) -> Sequence[Event]:
        """Wait for news of any worker, then take all that there is."""
        self._dispatch()
        self._staff()
        self._await(0 if self._said else timeout_seconds)
        self._end_overdue()
        self._dispatch()
        events = list(self._said)
        self._said.clear()
        return events

    def publish(self, study: str, counts: Mapping[str, float]) -> None:
        """Set one gauge for each count, `ray_orchardist_NAME` with the study's name as a tag, where Ray's dashboard and
        Prometheus find its own."""
        from ray.util.metrics import Gauge

        for name, value in counts.items():
            if name not in self._gauges:
                self._gauges[name] = Gauge(f"orchardist_{name}", description=METRICS[name], tag_keys=("study",))
            self._gauges[name].set(value, tags={"study": study})

    def close(self) -> None:
        """End this pool's actors, those that were only asked for too, and Ray if this pool started it."""
        for slot in list(self._slots):
            self._drop(slot)
        if self._started:
            _hasten(self._ray)
            self._ray.shutdown()

    def _await(self, timeout_seconds: float) -> None:
        """Wait for news of any worker, then take in all that there is."""
        news = [(slot.stream if slot.coming is None else slot.coming, slot) for slot in self._slots]
        awaited = {about: slot for about, slot in news if about is not None}
        if not awaited:
            return
        ready, _ = self._ray.wait(list(awaited), num_returns=1, timeout=timeout_seconds, fetch_local=False)
        more, _ = self._ray.wait(list(awaited), num_returns=len(awaited), timeout=0, fetch_local=False)
        for about in dict.fromkeys([*ready, *more]):
            slot = awaited[about]
            if slot.coming is None:
                self._take(slot)
            else:
                self._welcome(slot)

    def _forget(self) -> None:
        """What an earlier study left here when it was interrupted: its driver is gone."""
        self._queue.clear()
        self._said.clear()
        self._suspects.clear()
        for slot in [slot for slot in self._slots if slot.running]:
            self._drop(slot)

    def _ready(self) -> int:
        return self._count(slot for slot in self._slots if slot.coming is None and not slot.leaving)

    def _count(self, slots: Iterable[_Slot]) -> int:
        """How many workers of the usual share the slots stand for."""
        return sum(max(1, math.ceil(slot.gpus / self.gpus)) if self.gpus else 1 for slot in slots)

    def _bound(self) -> int:
        """How many workers there may be: without a number from the user a little more than there is room for, since
        that is how an autoscaler learns that more is wanted."""
        return self._most or self._room + max(COMING_AT_ONCE, self._ready())

    def _look(self) -> None:
        """Look at the nodes: which are there and are not drained, and how many workers they have room for."""
        self._looked_at = time.monotonic()
        listed: list[dict[str, Any]] = self._ray.nodes()  # type: ignore[no-untyped-call]
        nodes = {node["NodeID"]: node for node in listed if node["Alive"]}
        draining = frozenset(self._ray._private.state.state.get_draining_nodes()) & nodes.keys()
        for name in draining - self._draining:
            host = nodes[name]["NodeManagerHostname"]
            _LOG.warning("the node %s is being drained: it gets no new stages", host)
        lost = self._there - nodes.keys()
        if lost:
            self._node_lost_at = self._looked_at
        dead = {node["NodeID"] for node in listed} - nodes.keys()
        self._gone = (self._gone | lost | dead) & {slot.node for slot in self._slots}
        self._draining, self._there = draining, frozenset(nodes)
        self._room = sum(
            self._share.room(node["Resources"], node["Labels"]) for name, node in nodes.items() if name not in draining
        )

    def _staff(self, at_least: int = 0) -> None:
        """As many workers as there is work for, within bounds, and none on a node that is being drained."""
        now = time.monotonic()
        if self._elastic and now >= self._looked_at + LOOK_SECONDS:
            self._look()
        for slot in list(self._slots):
            if slot.node in self._draining and not slot.leaving:
                slot.leaving = True
                slot.actor.leave.remote()
            if (slot.leaving or slot.node in self._gone) and not slot.running:
                self._drop(slot)
        self._make_room()
        staying = [slot for slot in self._slots if not slot.leaving]
        wanted = min(self._bound(), max(at_least, self._work())) if self._elastic else self.workers
        for _ in range(wanted - self._count(staying)):
            self._hire(self.gpus)
        if self._elastic:
            for slot in reversed(staying[max(wanted, self._room) :]):
                if slot.coming is not None:  # asked for when there was more to do
                    self._drop(slot)
            for slot in staying:
                if slot.idle and now > slot.idle_since + IDLE_SECONDS:
                    self._drop(slot)
        self._say_if_waiting(now)

    def _work(self) -> int:
        """How many workers the work at hand would keep busy."""
        busy = sum(bool(slot.running) for slot in self._slots if not slot.leaving)
        costly = sum(1 for segment in self._queue if segment.cost)
        return busy + costly + math.ceil((len(self._queue) - costly) / CHEAP_AT_ONCE)

    def _say_if_waiting(self, now: float) -> None:
        """Nothing goes on without workers: say what is waited for, at once where there is no room."""
        coming = sum(slot.coming is not None for slot in self._slots)
        if self._ready() or not coming:
            self._silent_until, self._said_so = now + PATIENCE_SECONDS, False
        elif now >= self._silent_until or not (self._room or self._said_so):
            self._silent_until, self._said_so = now + PATIENCE_SECONDS, True
            free: dict[str, float] = self._ray.available_resources()  # type: ignore[no-untyped-call]
            _LOG.warning(
                "waiting for workers: asked %s for %d x %s; free in the cluster: %s%s",
                "the autoscaler" if self._elastic else "Ray",
                coming,
                self._share.says(),
                ", ".join(f"{free.get(name, 0):g} {name}" for name in ("CPU", "GPU", *self._share.resources)),
                self._hint if self._elastic else "",
            )

    def _hire(self, gpus: float) -> None:
        """Ask for one more worker; where there is no room it pends, which is what an autoscaler goes by."""
        number = next(self._numbers)
        actor = self._actor(number, gpus)
        self._slots.append(_Slot(number, actor, gpus, actor.prepare.remote(self._sent)))

    def _make_room(self) -> None:
        """A stage that wants more of a GPU than any worker has gets a larger one, in the room of idle ones beside each
        other; until they are idle nothing else is handed out."""
        wanted = self._queue[0].gpus if self._queue else 0.0
        if not wanted or any(slot.gpus >= wanted and (slot.idle or slot.coming is not None) for slot in self._slots):
            return
        in_its_room = give_way(self._slots, wanted)
        if in_its_room:
            _LOG.warning("a worker gets %g of a GPU: the memory of %g was not enough", wanted, self.gpus)
            for slot in in_its_room:
                self._drop(slot)
            self._hire(wanted)

    def _actor(self, number: int, gpus: float) -> Any:
        # A notice reaches a worker in the middle of a stage on a thread of its own.
        options: dict[str, Any] = {"num_cpus": 1, "max_restarts": 0, "max_task_retries": 0, "max_concurrency": 2}
        if gpus:
            options["num_gpus"] = gpus
        if self._share.resources:
            options["resources"] = dict(self._share.resources)
        if self._share.labels:
            options["label_selector"] = dict(self._share.labels)
        return self._ray.remote(**options)(_Actor).remote(number, gpus)

    def _drop(self, slot: _Slot) -> None:
        self._slots.remove(slot)
        self._ray.kill(slot.actor)

    def _welcome(self, slot: _Slot) -> None:
        """What a new worker answers, and whether its note came through, decides if it may work."""
        assert self._job is not None
        try:
            what, answer, place = self._ray.get(slot.coming)
        except self._deaths as error:
            self._drop(slot)
            if self._elastic:
                self._look()
            unavailable = isinstance(error, self._ray.exceptions.ActorUnavailableError)
            if unavailable or time.monotonic() < self._node_lost_at + PATIENCE_SECONDS:
                return  # with a node go all that were to start there
            self._stillborn += 1
            if self._stillborn == MOST_STILLBORN or getattr(error, "actor_init_failed", False):
                raise WorkersUnusable(f"a worker died before it was ready: {_last_words(error)}") from error
            return
        if what != "ready":
            raise _error(what, answer)
        if self._job.nonce and not Store(self._job.store_url).files.exists(note(self._job, slot.number)):
            raise WorkersUnusable(
                f"what worker {slot.number} writes to {Store(self._job.store_url).name} does not arrive here: "
                "the store must be shared storage"
            )
        self._info = self._info or answer
        if answer.digests != self._info.digests:
            raise WorkersUnusable("the workers see different data for the same task; data_version can name them")
        self._stillborn = 0
        slot.coming, slot.idle_since = None, time.monotonic()
        slot.node, slot.gpu = place

    def _dispatch(self) -> None:
        """Hand queued segments to idle workers, each where its first states are held, if that is idle."""
        while self._queue:
            there = [slot for slot in self._slots if slot.idle and slot.node not in self._gone]
            idle = [slot for slot in there if slot.gpus >= self._queue[0].gpus]
            if not idle:
                return
            first = self._queue.popleft()
            slot = max(idle, key=lambda slot: sum(key in slot.held for key in first.base))
            batch = [first]
            share = 1 if self._is_suspect(first) else len(self._queue) // len(idle) + 1
            while not batch[-1].cost and self._queue and len(batch) < min(CHEAP_AT_ONCE, share):
                if self._queue[0].gpus > slot.gpus or self._is_suspect(self._queue[0]):
                    break
                batch.append(self._queue.popleft())
            slot.running.extend(batch)
            slot.stream = slot.actor.run.options(num_returns="streaming").remote(batch)

    def _take(self, slot: _Slot) -> None:
        """Everything that a worker's stream has to say now."""
        try:
            events = self._ray.get(next(slot.stream))
        except StopIteration:
            slot.stream, slot.idle_since = None, time.monotonic()
            assert not slot.running, "a worker fell silent in the middle of a segment"
            return
        except self._deaths as error:
            self._lost(slot, error)
            return
        for event in events:
            slot.began = (event.key, time.monotonic()) if isinstance(event, Began) else None
            if isinstance(event, Began):
                continue
            if isinstance(event, Ended):
                slot.running.popleft()
            elif isinstance(event, Reported):
                slot.running[0] = slot.running[0].after(event.key)
                self._suspects.discard(event.key)
                slot.held[event.key] = None
                while len(slot.held) > _HELD:
                    slot.held.popitem(last=False)
            self._said.append(event)

    def _end_overdue(self) -> None:
        """End the workers that hang: those that should have ended their stage by themselves some time ago."""
        longest = self._job.timeout_seconds if self._job is not None else 0.0
        if not longest:
            return
        for slot in list(self._slots):
            if slot.began is None or time.monotonic() < slot.began[1] + longest + GRACE_SECONDS:
                continue
            if self._ray.wait([slot.stream], num_returns=1, timeout=0, fetch_local=False)[0]:
                continue  # it has spoken: this process was late to listen
            self._drop(slot)
            message = f"the stage takes longer than timeout_seconds = {longest:g}, and its worker had to be ended"
            key, _ = slot.began
            self._said.append(Failed(segment=slot.running[0].number, key=key, kind="timed out", message=message))
            self._said.extend(Ended(segment=segment.number) for segment in slot.running)

    def _lost(self, slot: _Slot, error: Exception) -> None:
        """A worker died: the stage that it was at has failed, and what it had not begun was not run."""
        self._drop(slot)  # one that is merely out of reach must not go on beside its successor
        blameless = self._is_blameless(slot, error)
        said = "its node was taken away" if blameless else _last_words(error)
        _LOG.warning("worker %d died: %s", slot.number, said)
        under_way = [segment for segment in slot.running if segment.steps]  # nothing is left of one that was all told
        if under_way:
            kind = "preempted" if blameless else "worker died"
            self._said.append(Failed(segment=under_way[0].number, key=_next(under_way[0]), kind=kind, message=said))
        if len(under_way) > 1 and not blameless:
            self._suspects.update(map(_next, under_way))
        if self._elastic:
            self._look()  # with a node go all its workers, those too that have nothing to do
        self._said.extend(Ended(segment=segment.number) for segment in slot.running)

    def _is_suspect(self, segment: Segment) -> bool:
        return bool(self._suspects) and _next(segment) in self._suspects

    def _is_blameless(self, slot: _Slot, error: Exception) -> bool:
        """Whether a worker died since its node was taken away, which is nobody's fault."""
        return slot.leaving or slot.node in self._draining or bool(getattr(error, "preempted", False))


def _next(segment: Segment) -> str:
    """The stage that a segment will report first."""
    return next(step.key for step in segment.steps if step.stored or step.evaluated)


def _last_words(error: Exception) -> str:
    """The line of Ray's account that says why a worker died, without its advice."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    said = next((line for line in reversed(lines) if line.startswith("The actor")), lines[0] if lines else "")
    return said.partition(" Some common causes")[0]


def give_way(slots: Iterable[_Slot], wanted: float) -> list[_Slot]:
    """Idle workers of one GPU in whose room one with the share `wanted` fits; none as long as there are too few."""
    beside: dict[tuple[str, str], list[_Slot]] = {}
    for slot in slots:
        beside.setdefault((slot.node, slot.gpu), []).append(slot)
    for neighbours in beside.values():
        idle = [slot for slot in neighbours if slot.idle]
        if sum(slot.gpus for slot in idle) >= wanted:
            enough = next(n for n in range(1, len(idle) + 1) if sum(slot.gpus for slot in idle[:n]) >= wanted)
            return idle[:enough]
        if len(idle) == len(neighbours):
            return idle  # what is left over of the GPU is free then
    return []


def _place() -> tuple[str, str]:
    """The id of the node that this worker is on, and the number of its GPU there."""
    import ray

    return str(ray.get_runtime_context().get_node_id()), ",".join(map(str, ray.get_gpu_ids()))


def _hasten(ray: Any) -> None:
    """Ray's own monitor lets a shutdown wait for more than a second: end it first, where this Ray shows it to us."""
    node = getattr(ray._private.worker, "_global_node", None)
    for info in getattr(node, "all_processes", {}).get("monitor", []):
        info.process.kill()


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray takes over SIGTERM in the block; afterwards it means again what the caller had it mean."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _start(ray: Any, workers: int | None, address: str | None) -> None:
    """Start Ray inside this process, or join a cluster."""
    # A uv environment would be shipped to the workers, which run in this very environment.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is not None:
        try:
            ray.init(address=address, **quiet)
        except ray.exceptions.AuthenticationError as error:
            raise InputError(
                f"the Ray cluster at {address!r} wants a token: set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the head's"
            ) from error
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise InputError(f"no Ray cluster at {address!r}: {str(error).strip().partition(chr(10))[0]}") from error
        return
    # The first connection to a raylet that is still coming up is otherwise given up for a whole second.
    os.environ.setdefault("RAY_raylet_client_connect_timeout_milliseconds", "50")
    ray.init(address="local", num_cpus=workers, include_dashboard=False, **quiet)


def _refuse_no_room(workers: int, room: int, share: Share, resources: Mapping[str, float]) -> None:
    """On one machine no room comes up later: Ray would let workers wait for ever."""
    if not 0 < workers <= room:
        there = f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"
        each = f" with {share.says()} each" if share.gpus or share.resources or share.labels else ""
        legal = f"up to {room} workers" if room else "--address of a cluster that has them"
        raise InputError(f"no room for {max(1, workers)} workers{each}: there are {there}; legal: {legal}")


def refuse_silence(address: str) -> None:
    """Ray tries an address at which nothing answers for minutes; here a connection is tried for seconds, first."""
    if "://" in address:
        raise InputError(f"--address {address}: a cluster is joined from one of its nodes; legal: auto, HOST:PORT")
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        return  # "auto", or for Ray to refuse
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"no Ray cluster answers at {address}: {error}; legal: auto, HOST:PORT") from error


def _error(kind: str, message: str) -> OrchardistError:
    if kind == "UnknownName":
        return InputError(message)
    found = getattr(errors, kind, OrchardistError)
    assert issubclass(found, OrchardistError)
    return found(message)


if TYPE_CHECKING:
    from orchestrator.pools.protocol import Pool

    _: Pool = RayPool()
