"""Work begins in this process while the real workers are still being started: no core waits for Ray to come up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from orchestrator.errors import WorkersUnusable
from orchestrator.graph import Segment
from orchestrator.pools.local import LocalPool
from orchestrator.pools.protocol import Ended, Event, Job, Pool, Reported
from orchestrator.tasks.info import TaskInfo


class StartingPool:
    """A pool on this machine that is started in a thread; until it is ready, this process is the one worker.

    The arithmetic is the same on either side, so what was run where shows in no number.

    Args:
        start: makes the real pool; runs in the thread.
        workers: how many workers that pool will have.
    """

    device = "cpu"

    def __init__(self, start: Callable[[], Pool], workers: int) -> None:
        self.workers = workers
        self._local = LocalPool()
        self._here: Segment | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="starting")
        self._started: Future[Pool] = self._thread.submit(start)
        self._ready: Future[tuple[Pool, TaskInfo]] | None = None
        self._info: TaskInfo | None = None

    @property
    def free(self) -> int:
        """That of the real pool once it is ready."""
        pool = self._pool()
        return self._local.free if pool is None else pool.free

    def prepare(self, job: Job) -> TaskInfo:
        """Describe the task here; the real workers are made ready as soon as they have come up."""

        def make_ready() -> tuple[Pool, TaskInfo]:
            pool = self._started.result()
            return pool, pool.prepare(job)

        self._ready = self._thread.submit(make_ready)
        self._info = self._local.prepare(job)
        return self._info

    def submit(self, segment: Segment) -> None:
        """Queue a segment with whoever works now."""
        pool = self._pool()
        if pool is None:
            self._here = segment
            self._local.submit(segment)
        else:
            pool.submit(segment)

    def completed(self, timeout_seconds: float) -> Sequence[Event]:
        """Run on here until something is to be reported, or wait for news of the real workers."""
        pool = self._pool()
        if self._here is not None:
            return self._step(pool)
        if pool is None:
            assert self._ready is not None, "prepare() comes first"
            wait([self._ready], timeout_seconds)
            return []
        self._local.close()
        return pool.completed(timeout_seconds)

    def close(self) -> None:
        """End the real pool once it has come up, in the thread that started it: its processes end with that thread."""

        def end() -> None:
            if not self._started.cancelled() and self._started.exception() is None:
                self._started.result().close()

        if self._ready is not None:
            self._ready.cancel()
        self._thread.submit(end).result()
        self._thread.shutdown()
        self._local.close()

    def _pool(self) -> Pool | None:
        """The real pool once it is ready; raises what kept it from that."""
        if self._ready is None or not self._ready.done():
            return None
        pool, info = self._ready.result()
        if info != self._info:
            raise WorkersUnusable("the workers see another task than the driver: is its data drawn without a seed?")
        return pool

    def _step(self, pool: Pool | None) -> Sequence[Event]:
        """One report of the segment that runs here; what is left of it goes to a real worker once there is one."""
        left = self._here
        assert left is not None
        events = self._local.completed(0)
        for event in events:
            if isinstance(event, Ended):
                left = None
            elif isinstance(event, Reported) and event.stored and left is not None:
                left = left.after(event.key)
                if pool is not None and left.steps:
                    pool.submit(left)
                    left = None
        self._here = left
        return events


if TYPE_CHECKING:
    _: Pool = StartingPool(LocalPool, 1)
