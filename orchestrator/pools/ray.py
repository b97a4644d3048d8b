"""Segments run by Ray actors: one long-lived worker process per slot, on this machine or on a cluster."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from orchestrator import errors
from orchestrator.errors import InputError, OrchardistError, WorkersUnusable
from orchestrator.graph import Segment
from orchestrator.pools.protocol import Ended, Event, Failed, Job, Reported, note
from orchestrator.store.store import Store
from orchestrator.tasks.info import TaskInfo

_LOG = logging.getLogger("orchardist.pool")

CHEAP_AT_ONCE = 32
"""Segments without training are sent to a worker this many at a time: their own time is about that of a call."""

MOST_TRIES = 2
"""How often a segment may lose its worker before its stage counts as failed."""

CONNECT_SECONDS = 10.0

PATIENCE_SECONDS = 30
"""Workers that take longer than this to start are worth a word: the cluster may have no room for them."""

_HELD = 64


class _Actor:
    """A worker process. Answers are plain values: an error is one too."""

    def __init__(self, number: int, gpus: float) -> None:
        import torch

        torch.set_num_threads(1)
        self.number = number
        self.device = "cuda" if gpus else "cpu"
        if gpus and torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(min(1.0, gpus))

    def prepare(self, job: Job) -> tuple[str, Any]:
        """("ready", TaskInfo), or the name of an error and its message."""
        from orchestrator.pools.worker import Worker, shake_hands

        try:
            shake_hands(job, self.number)
            self.worker = Worker(job, device=self.device)
            return "ready", self.worker.info
        except OrchardistError as error:
            return type(error).__name__, str(error)

    def run(self, segments: Sequence[Segment]) -> Iterator[list[Event]]:
        """Run segments one after another. Reports of stages without training are gathered until the last one."""
        gathered: list[Event] = []
        for segment in segments:
            for event in self.worker.run(segment):
                gathered.append(event)
                if segment.cost:
                    yield gathered
                    gathered = []
        if gathered:
            yield gathered


@dataclass
class _Slot:
    """One worker as the driver sees it: what it runs, and which states it lately held."""

    number: int
    actor: Any
    running: deque[Segment] = field(default_factory=deque)
    stream: Any = None
    held: OrderedDict[str, None] = field(default_factory=OrderedDict)


class RayPool:
    """One actor per slot on an embedded Ray, or on the cluster at `address`.

    Args:
        workers: how many slots; by default as many as the cluster has room for.
        address: a running cluster to join from one of its nodes; None starts Ray inside this process.
        gpus_per_worker: the share of a GPU for each worker; by default 1 where there are GPUs. 0 forces the CPU.
    """

    def __init__(
        self, workers: int | None = None, *, address: str | None = None, gpus_per_worker: float | None = None
    ) -> None:
        import ray

        if address is not None:
            refuse_silence(address)
        self._started = not ray.is_initialized()
        if self._started:
            with _own_sigterm():
                _start(ray, workers, address)
        self._ray = ray
        gone = ray.exceptions
        self._deaths = gone.RayActorError, gone.OutOfMemoryError, gone.NodeDiedError, gone.WorkerCrashedError
        self._slots: list[_Slot] = []
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        gpus = resources.get("GPU", 0.0)
        self._gpus = float((1 if gpus else 0) if gpus_per_worker is None else gpus_per_worker)
        self.device = "cuda" if self._gpus else "cpu"
        room = int(min(resources.get("CPU", 0), gpus / self._gpus if self._gpus else math.inf))
        self.workers = workers or room
        try:
            _refuse_no_room(self.workers, room, self._gpus, resources)
        except InputError:
            self.close()
            raise
        self._job: Job | None = None
        self._slots = [_Slot(number, self._actor(number)) for number in range(self.workers)]
        self._queue: deque[Segment] = deque()
        self._tries: dict[int, int] = {}
        self._said: deque[Event] = deque()

    @property
    def free(self) -> int:
        """Idle workers take one segment with training each, and many without."""
        idle = sum(1 for slot in self._slots if not slot.running)
        if sum(1 for segment in self._queue if segment.cost) >= idle:
            return 0
        return max(0, CHEAP_AT_ONCE * idle - len(self._queue))

    def prepare(self, job: Job) -> TaskInfo:
        """Make every worker ready; the first that is wrong ends the run."""
        self._job = job
        infos = self._made_ready(self._slots)
        if any(info.digests != infos[0].digests for info in infos):
            raise WorkersUnusable("the workers see different data for the same task; data_version can name them")
        return infos[0]

    def submit(self, segment: Segment) -> None:
        """Queue a segment; the next call of `completed` hands it to an idle worker, with others if they are cheap."""
        self._queue.append(segment)

    def completed(self, timeout_seconds: float) -> Sequence[Event]:
        """Wait for news of any worker, then take all that there is."""
        self._dispatch()
        busy = {slot.stream: slot for slot in self._slots if slot.stream is not None}
        if busy and not self._said:
            ready, _ = self._ray.wait(list(busy), num_returns=1, timeout=timeout_seconds, fetch_local=False)
            more, _ = self._ray.wait(list(busy), num_returns=len(busy), timeout=0, fetch_local=False)
            for stream in dict.fromkeys([*ready, *more]):
                self._take(busy[stream])
        self._dispatch()
        events = list(self._said)
        self._said.clear()
        return events

    def close(self) -> None:
        """End this pool's actors, and Ray if this pool started it."""
        for slot in self._slots:
            self._ray.kill(slot.actor)
        self._slots = []
        if self._started:
            _hasten(self._ray)
            self._ray.shutdown()

    def _made_ready(self, slots: Sequence[_Slot]) -> list[TaskInfo]:
        """Hand the job to workers; what they answer, and whether their notes came through, decides if they may work."""
        assert self._job is not None
        infos = []
        job = self._ray.put(self._job)  # once for all workers: it may hold a checkpoint
        coming = [slot.actor.prepare.remote(job) for slot in slots]
        try:
            while len(self._ray.wait(coming, num_returns=len(coming), timeout=PATIENCE_SECONDS)[0]) < len(coming):
                free: dict[str, float] = self._ray.available_resources()  # type: ignore[no-untyped-call]
                room = ", ".join(f"{free.get(name, 0):g} {name}" for name in ("CPU", "GPU"))
                _LOG.warning("waiting for %d workers to start; free in the cluster: %s", len(coming), room)
            answers = self._ray.get(coming)
        except self._deaths as error:
            said = str(error).strip().partition("\n")[0]
            raise WorkersUnusable(f"a worker died before it was ready: {said}") from error
        for slot, (what, answer) in zip(slots, answers, strict=True):
            if what != "ready":
                raise _error(what, answer)
            if self._job.nonce and not Store(self._job.store_url).files.exists(note(self._job, slot.number)):
                raise WorkersUnusable(
                    f"what worker {slot.number} writes to {Store(self._job.store_url).name} does not arrive here: "
                    "the store must be shared storage"
                )
            infos.append(answer)
        return infos

    def _actor(self, number: int) -> Any:
        options: dict[str, Any] = {"num_cpus": 1, "max_restarts": 0, "max_task_retries": 0}
        if self._gpus:
            options["num_gpus"] = self._gpus
        return self._ray.remote(**options)(_Actor).remote(number, self._gpus)

    def _dispatch(self) -> None:
        """Hand queued segments to idle workers, each where its first states are held, if that is idle."""
        while self._queue:
            idle = [slot for slot in self._slots if not slot.running]
            if not idle:
                return
            first = self._queue.popleft()
            slot = max(idle, key=lambda slot: sum(key in slot.held for key in first.base))
            batch = [first]
            share = len(self._queue) // len(idle) + 1
            while not batch[-1].cost and self._queue and len(batch) < min(CHEAP_AT_ONCE, share):
                batch.append(self._queue.popleft())
            slot.running.extend(batch)
            slot.stream = slot.actor.run.options(num_returns="streaming").remote(batch)

    def _take(self, slot: _Slot) -> None:
        """Everything that a worker's stream has to say now."""
        try:
            events = self._ray.get(next(slot.stream))
        except StopIteration:
            slot.stream = None
            assert not slot.running, "a worker fell silent in the middle of a segment"
            return
        except self._deaths as error:
            self._lost(slot, error)
            return
        for event in events:
            if isinstance(event, Ended):
                slot.running.popleft()
            elif isinstance(event, Reported):
                slot.running[0] = slot.running[0].after(event.key)
                slot.held[event.key] = None
                while len(slot.held) > _HELD:
                    slot.held.popitem(last=False)
            self._said.append(event)

    def _lost(self, slot: _Slot, error: Exception) -> None:
        """A worker died: a new one takes its place, and what it had not reported is tried again, or fails."""
        _LOG.warning("worker %d died: %s", slot.number, str(error).partition("\n")[0])
        slot.actor = self._actor(slot.number)
        self._made_ready([slot])
        again = list(slot.running)
        slot.running.clear()
        slot.held.clear()
        slot.stream = None
        if again:
            guilty = again[0]
            self._tries[guilty.number] = self._tries.get(guilty.number, 0) + 1
            if self._tries[guilty.number] >= MOST_TRIES:
                again.pop(0)
                message = (
                    f"the worker died {MOST_TRIES} times over this segment (out of memory, or a crash in native code)"
                )
                key = next(step.key for step in guilty.steps if step.stored or step.evaluated)
                self._said.append(Failed(segment=guilty.number, key=key, kind="worker died", message=message))
                self._said.append(Ended(segment=guilty.number))
        self._queue.extendleft(reversed(again))


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


def _refuse_no_room(workers: int, room: int, gpus_per_worker: float, resources: Mapping[str, float]) -> None:
    """Ray lets actors without room wait for ever, in case that nodes join."""
    if gpus_per_worker > 1 and not gpus_per_worker.is_integer():
        raise InputError(f"--gpus-per-worker {gpus_per_worker:g}: legal: a fraction of one GPU, or a whole number")
    if not 0 < workers <= room:
        there = f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"
        wanted = (
            f"{max(1, workers)} workers with {gpus_per_worker:g} GPUs each" if gpus_per_worker else f"{workers} workers"
        )
        raise InputError(f"no room for {wanted}: there are {there}; legal: up to {room} workers")


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
