"""A worker's process on Ray: it runs the stages that the driver sends it, and looks after its own node."""

from __future__ import annotations

import logging
import platform
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.errors import OrchardistError, WorkersUnusable
from orchestrator.graph import Segment
from orchestrator.interrupts import STOPS
from orchestrator.pools.cache import cache_bytes, machine
from orchestrator.pools.protocol import Began, Event, Job

if TYPE_CHECKING:
    from orchestrator.pools.worker import Worker

_LOG = logging.getLogger("orchardist.worker")

NOTICE_SECONDS = 2.0
"""How often a worker looks whether its node is being drained."""


class Actor:
    """A worker process. Answers are plain values: an error is one too.

    Its calls run one after another on the main thread, the only one on which the user's code may handle signals. So
    nothing can be told to it in the middle of a stage, and it finds out by itself that its node is to go. (Ray runs
    the calls of an actor that takes several at a time, or that has concurrency groups, on other threads; `ray.cancel`
    closes the caller's stream at once, or leaves a gap in the order of calls that is noticed 30 s later.)

    Args:
        number: the worker's.
        gpus: the share of a GPU that it has, which is enforced.
        workers: how many there are at most; None: as many as there is room for.
        cache: bytes that the user wants held of recent states; None: what is usual.
    """

    def __init__(self, number: int, gpus: float, workers: int | None = None, cache: int | None = None) -> None:
        import torch

        torch.set_num_threads(1)
        self.number = number
        self.device = "cuda" if gpus else "cpu"
        self.blind = bool(gpus) and not torch.cuda.is_available()
        if gpus and not self.blind:
            torch.cuda.set_per_process_memory_fraction(min(1.0, gpus))
        self.workers, self.cache = workers, cache
        self.worker: Worker | None = None
        self.drained = False
        self.watch: threading.Thread | None = None

    def prepare(self, job: Job) -> tuple[str, Any, tuple[str, str]]:
        """("ready", TaskInfo), or the name of an error and its message; and where this is: node and GPU."""
        from orchestrator.pools.failure import message_of, readable
        from orchestrator.pools.worker import Worker, shake_hands

        try:
            if self.blind:
                raise WorkersUnusable(
                    f"Ray counts a GPU on {platform.node()}, and torch sees none: install a torch built for it there, "
                    "or --gpus-per-worker 0"
                )
            held = cache_bytes(self.cache, self.workers, *machine())
            shake_hands(job, self.number)
            self.worker = Worker(job, device=self.device, cache=held)
            self._begin_watch()
            return "ready", self.worker.info, _place()
        except OrchardistError as error:
            return type(error).__name__, readable(str(error)), _place()
        except BaseException as error:  # no process that starts as this one did comes further
            return "WorkersUnusable", f"a worker on {platform.node()} cannot start: {message_of(error)}", _place()

    def run(self, segments: Sequence[Segment]) -> Iterator[list[Event | Began]]:
        """Run segments one after another. Reports of stages without training are gathered until the last one, or until
        a stage begins that has a time limit."""
        assert self.worker is not None, "prepare() comes first"
        gathered: list[Event | Began] = []
        for segment in segments:
            for event in self.worker.run(segment):
                gathered.append(event)
                if segment.cost or isinstance(event, Began):
                    yield gathered
                    gathered = []
        if gathered:
            yield gathered

    def _begin_watch(self) -> None:
        if self.drained:  # which the worker of an earlier study was told
            self._leave()
        if self.watch is None:
            # What is raised for a signal, wherever the user's code is, would be a failure of the trial.
            for number in STOPS:
                signal.signal(number, self._leave)
            self.watch = threading.Thread(target=self._watch_node, args=[_place()[0]], name="notice", daemon=True)
            self.watch.start()

    def _leave(self, *_: object) -> None:
        """What can be stored of the stage under way is stored, and no other is begun."""
        self.drained = True
        if self.worker is not None:
            self.worker.leave()

    def _watch_node(self, node: str) -> None:
        """Leave when this node is about to be taken away."""
        from ray._private.state import state

        while not self.drained:
            time.sleep(NOTICE_SECONDS)
            try:
                drained = node in state.get_draining_nodes()
            except Exception as error:  # the head may be out of reach for a while
                _LOG.debug("cannot see whether %s is being drained: %s", node, error)
            else:
                if drained:
                    self._leave()


def _place() -> tuple[str, str]:
    """The id of the node that this worker is on, and the number of its GPU there."""
    import ray

    return str(ray.get_runtime_context().get_node_id()), ",".join(map(str, ray.get_gpu_ids()))
