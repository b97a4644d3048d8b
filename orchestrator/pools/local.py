"""Segments run in this process, one stage at a time: for tests, debuggers and stores that live in memory."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from orchestrator.graph import Segment
from orchestrator.interrupts import noticed
from orchestrator.pools.protocol import Began, Ended, Event, Job
from orchestrator.tasks.info import TaskInfo

if TYPE_CHECKING:
    from orchestrator.pools.worker import Worker

_LOG = logging.getLogger("orchardist.pool")


class LocalPool:
    """One worker in this process. Work is done inside `completed`, up to the next report.

    Nobody can end what hangs in this very process: a study's `timeout_seconds` ends trainings, between two batches, and
    nothing else.

    Args:
        clock: gives the worker's monotonic seconds.
        cache: bytes of recent states that are held in memory; None: what is usual on this machine.
    """

    device = "cpu"
    workers = 1
    gpus = 0.0

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, cache: int | None = None) -> None:
        self._clock = clock
        self._cache = cache
        self._worker: Worker | None = None
        self._waiting: deque[Segment] = deque()
        self._running: Iterator[Event | Began] | None = None
        self._interrupts: list[int] = []
        """Ctrl-C that the user's code may have caught."""

    @property
    def free(self) -> int:
        """1 when idle: what is submitted later can still be chosen with more knowledge."""
        return int(self._running is None and not self._waiting)

    def prepare(self, job: Job) -> TaskInfo:
        """Load the task here; the store is trivially shared."""
        from orchestrator.pools.worker import Worker, shake_hands

        if job.timeout_seconds:
            _LOG.warning(
                "without workers timeout_seconds ends trainings between two batches, and nothing else that hangs"
            )
        shake_hands(job, "local")
        self._running = None  # what an interrupted study left
        self._interrupts.clear()
        self._waiting.clear()
        self._worker = Worker(job, cache=self._cache, clock=self._clock, interrupted=lambda: bool(self._interrupts))
        return self._worker.info

    def submit(self, segment: Segment) -> None:
        """Queue a segment for the next call of `completed`."""
        self._waiting.append(segment)

    def completed(self, timeout_seconds: float) -> Sequence[Event]:
        """Run on until something is to be reported; with nothing to run, returns at once.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed, now or in the last call; never one that the user's code raises.
        """
        del timeout_seconds  # there is nobody to wait for
        assert self._worker is not None, "prepare() comes first"
        if self._interrupts:
            self._interrupts.clear()
            raise KeyboardInterrupt
        if self._running is None:
            if not self._waiting:
                return []
            self._running = self._worker.run(self._waiting.popleft())
        try:
            with noticed(self._interrupts):
                event = next(event for event in self._running if not isinstance(event, Began))
        except KeyboardInterrupt:
            self._interrupts.clear()
            raise
        if isinstance(event, Ended):
            self._running = None
        return [event]

    def publish(self, study: str, counts: Mapping[str, float]) -> None:
        """Nothing: there is no cluster to be watched."""

    def close(self) -> None:
        """Forget the worker with its data and states, and what was left of its segment."""
        self._worker = self._running = None
        self._waiting.clear()


if TYPE_CHECKING:
    from orchestrator.pools.protocol import Pool

    _: Pool = LocalPool()
