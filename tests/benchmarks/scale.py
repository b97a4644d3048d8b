"""What a large cluster asks of the driver: the real driver with simulated workers, as one Markdown table.

    python -m tests.benchmarks.scale [--workers N --trials N [--rounds N] [--store-ms MS] [--profile]]

The driver, its graph, its proposer and its ledger are the real ones; the workers are not: a stage of so many training
steps is a moment on a virtual clock, 30 s for a retraining, spread log-normally. The clock goes on by the processor
time that the driver's thread takes, by what each call of the store and each report of a worker is said to cost it, and
jumps over the time in which the driver only waits. No torch, no Ray; states are headers without tensors. Columns:

    driver busy     share of the study's time in which the driver's thread was at work
    all threads     processor time of the whole process, with the proposer and the merging of the ledger beside it
    workers idle    share of the workers' time without a stage, from when all of them have had one until the last trial
                    has begun: before and after that there is not work for all
    ms a stage      of the driver's thread
"""

from __future__ import annotations

import argparse
import cProfile
import heapq
import json
import pstats
import random
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import orchestrator.driver
from orchestrator import Study, StudySpec
from orchestrator.graph import Segment, Step
from orchestrator.pools.protocol import Ended, Event, Job, Reported
from orchestrator.progress import Silent, Standing
from orchestrator.store.files import Files
from orchestrator.store.states import States
from orchestrator.tasks.info import Layer, TaskInfo
from tests.contracts.store import safetensors

RETRAINING_SECONDS = 30.0
SPREAD = 0.3
"""Standard deviation of the logarithm of a stage's time."""
PRUNING_SECONDS = 0.3
REPORT_MS = 0.5
"""What a report costs the driver in Ray: handing over a segment and taking its three reports took 0.6 ms in all."""
WAIT_MS = 0.0024
"""What each worker adds to each time that the driver looks for news in Ray: 2.4 ms for the streams of 1,000."""

INFO = TaskInfo(
    digest="simulated",
    layers=tuple(Layer(name=f"layers.{n}.weight", shape=(256, 256)) for n in range(6)),
    train_examples=6000,
    valid_examples=1000,
    test_examples=1000,
    classes=tuple("0123456789"),
)
TRAIN = {"epochs": 10, "retrain_epochs": 4, "batch_size": 60}
STEPS = 400
"""Optimizer steps of a retraining."""

ROWS: Sequence[tuple[int, int, int, float]] = (
    (10, 500, 3, 0.0),
    (100, 1000, 3, 0.0),
    (1000, 4000, 3, 0.0),
    (1000, 8000, 3, 0.0),
    (1000, 4000, 6, 0.0),
    (2000, 8000, 3, 0.0),
    (1000, 4000, 3, 20.0),
)
"""Workers, trials, most rounds of a trial, milliseconds of a call of the store."""


class Clock:
    """Virtual seconds. They pass as the driver's thread takes processor time, and by `jump`."""

    def __init__(self) -> None:
        self._now = 0.0
        self.busy = 0.0
        self._resumed: float | None = None

    def now(self) -> float:
        """For the driver's thread alone."""
        return self._now + (0.0 if self._resumed is None else time.thread_time() - self._resumed)

    def stop(self) -> None:
        """The driver hands over."""
        if self._resumed is not None:
            self.charge(time.thread_time() - self._resumed)
            self._resumed = None

    def resume(self) -> None:
        """The driver is at work again."""
        self._resumed = time.thread_time()

    def charge(self, seconds: float) -> None:
        """So much more of the driver's time."""
        self._now += seconds
        self.busy += seconds

    def jump(self, to: float) -> None:
        """Nothing happens until then."""
        self._now = max(self._now, to)


@dataclass
class Worker:
    """One simulated worker: since when it has nothing to do."""

    idle_since: float = 0.0
    started: bool = False


class SimulatedPool:
    """Workers for which a stage is an entry in a queue of events."""

    device = "cpu"
    gpus = 0.0

    def __init__(self, workers: int, clock: Clock, states: States, report_ms: float) -> None:
        self.workers = workers
        self.clock = clock
        self.idle: list[tuple[float, float]] = []
        """From when to when some worker had nothing to do."""
        self.stages = 0
        self.all_started: float | None = None
        self._states = states
        self._report_seconds = report_ms / 1000
        self._free: deque[Worker] = deque(Worker() for _ in range(workers))
        self._to_start = workers
        self._queue: deque[Segment] = deque()
        self._events: list[tuple[float, int, Worker, Event, Step | None]] = []
        self._count = 0

    @property
    def free(self) -> int:
        """Idle workers for which nothing is queued."""
        return len(self._free) - len(self._queue)

    def prepare(self, job: Job) -> TaskInfo:
        """From here on the clock goes."""
        self.clock.resume()
        return INFO

    def submit(self, segment: Segment) -> None:
        """For the next idle worker."""
        self._queue.append(segment)

    def completed(self, timeout_seconds: float) -> Sequence[Event]:
        """What has happened by now, or next."""
        self.clock.stop()
        self.clock.charge(self.workers * WAIT_MS / 1000)
        self._dispatch()
        if not (self._events and self._events[0][0] <= self.clock.now()):
            timeout = self.clock.now() + timeout_seconds
            self.clock.jump(min(self._events[0][0], timeout) if self._events else timeout)
        said: list[Event] = []
        while self._events and self._events[0][0] <= self.clock.now():
            at, _, worker, event, step = heapq.heappop(self._events)
            if isinstance(event, Ended):
                worker.idle_since = at
                self._free.append(worker)
            elif isinstance(event, Reported) and step is not None:
                self._store(step, event)
                self.clock.charge(self._report_seconds)
            said.append(event)
        self.clock.resume()
        return said

    def publish(self, study: str, counts: Mapping[str, float]) -> None:
        """Nobody looks."""

    def close(self) -> None:
        """Nothing is left behind."""

    def _dispatch(self) -> None:
        now = self.clock.now()
        while self._queue and self._free:
            worker = self._free.popleft()
            self.idle.append((worker.idle_since, now))
            if not worker.started:
                worker.started = True
                self._to_start -= 1
                if not self._to_start:
                    self.all_started = now
            self._schedule(worker, self._queue.popleft(), now)

    def _schedule(self, worker: Worker, segment: Segment, at: float) -> None:
        began = at
        for step in segment.steps:
            at += _seconds(step)
            self.stages += 1
            if step.evaluated or step.stored:
                event = Reported(
                    segment=segment.number,
                    key=step.key,
                    measures=_measures(step) if step.evaluated else None,
                    resumable=step.stored and step.resumable,
                    stored=step.stored,
                    steps=step.steps,
                    seconds=at - began,
                )
                self._push(at, worker, event, step)
                began = at
        self._push(at, worker, Ended(segment=segment.number), None)

    def _push(self, at: float, worker: Worker, event: Event, step: Step | None) -> None:
        self._count += 1
        heapq.heappush(self._events, (at, self._count, worker, event, step))

    def _store(self, step: Step, event: Reported) -> None:
        if step.stored:
            header = {"resumable": "1" if event.resumable else "0", "outcome": json.dumps(event.measures)}
            self._states.commit(step.key, safetensors({**header, "lineage": "[]", "key": step.key}))


class Watch(Silent):
    """Notes when the last trial has begun."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.all_begun: float | None = None
        self.turns_before = 0
        """How often the driver looked at its workers before that."""

    def show(self, standing: Standing) -> None:
        """Called by the driver in each turn."""
        self.turns_before += self.all_begun is None
        if self.all_begun is None and standing.ended + standing.running >= standing.asked:
            self.all_begun = self._clock.now()


class Distant:
    """A store's backend whose calls take the driver's thread so much longer."""

    def __init__(self, backend: Any, clock: Clock, seconds: float) -> None:
        self._backend = backend
        self._clock = clock
        self._seconds = seconds
        self._thread = threading.get_ident()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._backend, name)
        return self._longer(found) if callable(found) and not name.startswith("_") else found

    def _longer(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def longer(*given: Any) -> Any:
            if threading.get_ident() == self._thread:
                self._clock.charge(self._seconds)
            return call(*given)

        return longer


def simulate(workers: int, trials: int, rounds: int, store_ms: float, report_ms: float) -> dict[str, float]:
    """Run one study with simulated workers; its figures by name."""
    spec = StudySpec(
        name="scale",
        task="nothing_task.py",
        trials=trials,
        sampler="random",
        train=TRAIN,
        space={
            "criterion": ["magnitude", "taylor", "random"],
            "scope": ["global", "layer"],
            "rate": {"low": 0.05, "high": 0.5},
            "rounds": {"low": 1, "high": rounds},
            "retrain": ["finetune", "rewind"],
            "rewind_epoch": {"choices": [0, 1, 2], "when": {"retrain": ["rewind"]}},
        },
    )
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        study = Study(spec, folder, root=Path(__file__).parent)
        clock = Clock()
        pool = SimulatedPool(workers, clock, States(Study(spec, folder).store.files), report_ms)
        watch = Watch(clock)
        if store_ms:
            study.store.files._backend = Distant(study.store.files._backend, clock, store_ms / 1000)
        began, process = time.perf_counter(), time.process_time()
        with _on(clock):
            standing = study.run(pool, progress=watch)
        clock.stop()
        assert standing.done == trials, standing
        keys = Study(spec, folder).store.states.keys()
        states = sum(1 for _ in keys)
    assert pool.all_started is not None and watch.all_begun is not None, "too few trials for so many workers"
    first, last = pool.all_started, watch.all_begun
    idle = sum(max(0.0, min(end, last) - max(start, first)) for start, end in pool.idle)
    return {
        "minutes": clock.now() / 60,
        "stages": pool.stages,
        "states": states,
        "busy": clock.busy / clock.now(),
        "process": (time.process_time() - process) / clock.now(),
        "idle": idle / (workers * (last - first)) if last > first else float("nan"),
        "ms": 1000 * clock.busy / pool.stages,
        "turns_before": watch.turns_before,
        "seconds": time.perf_counter() - began,
    }


@contextmanager
def _on(clock: Clock) -> Iterator[None]:
    """The driver looks at the virtual clock in the block."""
    with patch.object(orchestrator.driver, "time", SimpleNamespace(monotonic=clock.now, time=clock.now)):
        yield


def _seconds(step: Step) -> float:
    """How long a stage takes: always the same for the same key."""
    factor = random.Random(step.key).lognormvariate(0.0, SPREAD)
    return factor * (PRUNING_SECONDS + RETRAINING_SECONDS * step.steps / STEPS)


def _measures(step: Step) -> dict[str, Any]:
    """Every column filled, as a worker's report has them."""
    draw = random.Random(step.key)
    accuracy, sparsity = 0.9 + 0.1 * draw.random(), draw.random()
    classes = [accuracy] * 10
    shares = {layer.name: [int(layer.size * (1 - sparsity)), layer.size] for layer in INFO.layers}
    return {
        **dict.fromkeys(("accuracy", "test_accuracy", "worst_class_accuracy", "test_worst_class_accuracy"), accuracy),
        **{"loss": 0.3, "test_loss": 0.3, "sparsity": sparsity, "nonzero_params": 1000, "total_params": 400_000},
        **{"flops": 800_000, "flops_effective": 1e5, "flops_shrunk": 800_000, "bytes": 100_000},
        **{"class_accuracy": classes, "test_class_accuracy": classes, "layers": shares, "metrics": {}},
        **{"position_steps": step.steps, "task_digest": INFO.digest, "device": "cpu", "seconds": 30.0},
        **{"finished_at": 0.0, "versions": {"torch": "2", "python": "3", "cpu": "simulated"}},
    }


def row(workers: int, trials: int, rounds: int, store_ms: float, found: dict[str, float]) -> str:
    """One line of the table."""
    cells = [
        f"{workers:,}",
        f"{trials:,}",
        f"{found['states']:,.0f}",
        f"{found['stages']:,.0f}",
        f"{store_ms:g} ms",
        f"{found['minutes']:.0f}",
        f"{found['busy']:.1%}",
        f"{found['process']:.1%}",
        f"{found['idle']:.2%}",
        f"{found['ms']:.2f}",
        f"{found['seconds']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, help="one row alone, with --trials")
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3, help="at most, of a trial")
    parser.add_argument("--store-ms", type=float, default=0.0, help="what a call of the store costs beyond a folder's")
    parser.add_argument("--report-ms", type=float, default=REPORT_MS, help="what a report costs beyond the simulation")
    parser.add_argument("--profile", action="store_true", help="where the driver's time goes, to stderr")
    options = parser.parse_args()
    rows = [(options.workers, options.trials, options.rounds, options.store_ms)] if options.workers else ROWS
    names = ("workers", "trials", "states", "stages", "store call", "minutes", "driver busy", "all threads")
    header = [*names, "workers idle", "ms a stage", "seconds to simulate"]
    print(f"| {' | '.join(header)} |\n| {' | '.join(['---:'] * len(header))} |", flush=True)
    for workers, trials, rounds, store_ms in rows:
        profile = cProfile.Profile()
        if options.profile:
            profile.enable()
        found = simulate(workers, trials, rounds, store_ms, options.report_ms)
        if options.profile:
            profile.disable()
            pstats.Stats(profile, stream=sys.stderr).sort_stats("cumulative").print_stats(45)
        print(row(workers, trials, rounds, store_ms, found), flush=True)


if TYPE_CHECKING:
    from orchestrator.pools.protocol import Pool

    _: Pool = SimulatedPool(1, Clock(), States(Files("memory://")), 0.0)


if __name__ == "__main__":
    main()
