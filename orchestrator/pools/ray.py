"""Segments run by Ray actors: one long-lived worker process per slot, on this machine or on a cluster."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.graph import Segment
from orchestrator.interrupts import held
from orchestrator.metrics import METRICS
from orchestrator.pools.connection import connect, disconnect, refuse_no_room, refuse_silence
from orchestrator.pools.protocol import Began, Ended, Event, Failed, Job, Reported
from orchestrator.pools.share import Share
from orchestrator.pools.slots import Slot
from orchestrator.pools.staff import CHEAP_AT_ONCE, Staff, last_words
from orchestrator.tasks.info import TaskInfo

_LOG = logging.getLogger("orchardist.pool")

LATE_SECONDS = 15.0
"""Workers that take so much longer to start than the first join when they come."""

GRACE_SECONDS = 5.0
"""A training that takes too long ends by itself within this time; whatever else does is ended with its worker then."""


class RayPool:
    """One actor per slot on an embedded Ray, or on the cluster at `address`.

    On a cluster workers come and go with its nodes and with the work: what is queued asks for workers, which pend in
    Ray until there is room, and so ask its autoscaler for nodes; a worker without work is let go after a minute. Nodes
    that are drained get no new stages.

    Args:
        workers: how many at most; by default as many as there is room for.
        address: a running cluster to join from one of its nodes; None starts Ray inside this process.
        share: what each worker takes, and on which nodes it may be.
        cache: bytes of recent states that each worker holds in memory; None: an eighth of its part of the machine's.
    """

    def __init__(
        self,
        workers: int | None = None,
        *,
        address: str | None = None,
        share: Share | None = None,
        cache: int | None = None,
    ) -> None:
        import ray

        if address is not None:
            refuse_silence(address)
        self._ray = ray
        self._started = not ray.is_initialized()
        self._queue: deque[Segment] = deque()
        self._said: deque[Event] = deque()
        self._suspects: set[str] = set()
        """Stages of batches that a worker died over: each is run alone, so that only the guilty one is blamed again."""
        self._gauges: dict[str, Any] = {}
        self._longest = math.inf
        """How many seconds a stage may take."""
        try:
            if self._started:
                connect(ray, workers, address)
            self._staff = Staff(ray, share or Share(), most=workers, elastic=address is not None, cache=cache)
            if address is None:
                there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
                refuse_no_room(self._staff.workers, self._staff.nodes.room, self._staff.share, there)
        except BaseException:  # Ctrl-C too: nobody else could end a Ray that was started here
            if self._started:
                disconnect(ray)
            raise

    @property
    def device(self) -> str:
        """The device type of every worker."""
        return "cuda" if self._staff.gpus else "cpu"

    @property
    def gpus(self) -> float:
        """The share of a GPU that each worker begins with; 0 on a CPU."""
        return self._staff.gpus

    @property
    def workers(self) -> int:
        """The most that are wanted; without a bound, as many as the nodes there are have room for."""
        return self._staff.workers

    @property
    def free(self) -> int:
        """Workers that are idle, or that could still be asked for, take one segment with training each, and many
        without."""
        able = self._staff.able
        if sum(1 for segment in self._queue if segment.cost) >= able:
            return 0
        return max(0, CHEAP_AT_ONCE * able - len(self._queue))

    def prepare(self, job: Job) -> TaskInfo:
        """Make workers ready, all that there is room for; wait for the first as long as it takes. The first that is
        wrong ends the run."""
        # What an earlier study left here when it was interrupted: its driver is gone.
        for left in (self._queue, self._said, self._suspects):
            left.clear()
        self._longest = job.timeout_seconds or math.inf
        staff = self._staff
        staff.engage(job)
        first_at = math.inf
        while staff.info is None or (
            any(slot.coming is not None for slot in staff.slots) and time.monotonic() < first_at + LATE_SECONDS
        ):
            self._await(1.0)
            staff.adjust(self._queue, at_least=1)
            if staff.info is not None:
                first_at = min(first_at, time.monotonic())
        return staff.info

    def submit(self, segment: Segment) -> None:
        """Queue a segment; the next call of `completed` hands it to an idle worker, with others if they are cheap."""
        self._queue.append(segment)

    def completed(self, timeout_seconds: float) -> Sequence[Event]:
        """Wait for news of any worker, then take all that there is."""
        self._dispatch()
        self._staff.adjust(self._queue)
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
        with held():
            try:
                for slot in list(self._staff.slots):
                    self._staff.drop(slot)
            finally:
                if self._started:
                    disconnect(self._ray)

    def _await(self, timeout_seconds: float) -> None:
        """Wait for news of any worker, then take in all that there is. News counts once it has arrived here: nothing
        is fetched afterwards from a node that may be gone by then."""
        news = [(slot.stream if slot.coming is None else slot.coming, slot) for slot in self._staff.slots]
        awaited = {about: slot for about, slot in news if about is not None}
        if not awaited:
            time.sleep(min(timeout_seconds, self._staff.pause))
            return
        ready, _ = self._ray.wait(list(awaited), num_returns=1, timeout=timeout_seconds)
        more, _ = self._ray.wait(list(awaited), num_returns=len(awaited), timeout=0)
        for about in dict.fromkeys([*ready, *more]):
            slot = awaited[about]
            if slot.coming is None:
                self._take(slot)
            else:
                self._staff.welcome(slot)

    def _dispatch(self) -> None:
        """Hand queued segments to idle workers, each where its first states are held, if that is idle."""
        while self._queue:
            idle = self._staff.idle(self._queue)
            if not idle:
                return
            first = self._queue.popleft()
            slot = max(idle, key=lambda slot: (sum(key in slot.held for key in first.base), -slot.gpus))
            batch = [first]
            share = 1 if self._is_suspect(first) else len(self._queue) // len(idle) + 1
            while not batch[-1].cost and self._queue and len(batch) < min(CHEAP_AT_ONCE, share):
                if self._queue[0].gpus > slot.gpus or self._is_suspect(self._queue[0]):
                    break
                batch.append(self._queue.popleft())
            slot.running.extend(batch)
            slot.stream = slot.actor.run.options(num_returns="streaming").remote(batch)

    def _take(self, slot: Slot) -> None:
        """Everything that a worker's stream has to say now."""
        try:
            events = self._ray.get(next(slot.stream))
        except StopIteration:
            slot.stream, slot.idle_since = None, time.monotonic()
            assert not slot.running, "a worker fell silent in the middle of a segment"
            return
        except self._staff.deaths as error:
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
                self._staff.thrives()
                slot.hold(event.key)
            elif event.kind == "preempted":  # it knows of its node what this process has yet to see
                slot.leaving = True
            self._said.append(event)

    def _end_overdue(self) -> None:
        """End the workers that hang: those that should have ended their stage by themselves some time ago."""
        for slot in list(self._staff.slots):
            if slot.began is None or time.monotonic() < slot.began[1] + self._longest + GRACE_SECONDS:
                continue
            if self._ray.wait([slot.stream], num_returns=1, timeout=0, fetch_local=False)[0]:
                continue  # it has spoken: this process was late to listen
            self._staff.drop(slot)
            message = f"the stage takes longer than timeout_seconds = {self._longest:g}, and its worker had to be ended"
            key, _ = slot.began
            self._said.append(Failed(segment=slot.running[0].number, key=key, kind="timed out", message=message))
            self._said.extend(Ended(segment=segment.number) for segment in slot.running)

    def _lost(self, slot: Slot, error: Exception) -> None:
        """A worker died: the stage that it was at has failed, and what it had not begun was not run."""
        self._staff.drop(slot)  # one that is merely out of reach must not go on beside its successor
        blameless = self._is_blameless(slot, error)
        said = "its node was taken away" if blameless else last_words(error)
        _LOG.warning("worker %d died: %s", slot.number, said)
        under_way = [segment for segment in slot.running if segment.steps]  # nothing is left of one that was all told
        if under_way:
            kind = "preempted" if blameless else "worker died"
            key, bystanders = _next(under_way[0]), self._staff.bystanders
            self._said.append(
                Failed(segment=under_way[0].number, key=key, kind=kind, message=said, bystanders=bystanders)
            )
        if len(under_way) > 1 and not blameless:
            self._suspects.update(map(_next, under_way))
        self._staff.lose()
        self._said.extend(Ended(segment=segment.number) for segment in slot.running)

    def _is_suspect(self, segment: Segment) -> bool:
        return bool(self._suspects) and _next(segment) in self._suspects

    def _is_blameless(self, slot: Slot, error: Exception) -> bool:
        """Whether a worker died since its node was taken away, which is nobody's fault."""
        return slot.leaving or slot.node in self._staff.nodes.draining or bool(getattr(error, "preempted", False))


def _next(segment: Segment) -> str:
    """The stage that a segment will report first."""
    return next(step.key for step in segment.steps if step.stored or step.evaluated)


if TYPE_CHECKING:
    from orchestrator.pools.protocol import Pool

    _: Pool = RayPool()
