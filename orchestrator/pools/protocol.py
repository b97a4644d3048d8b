"""What runs segments: the pool's protocol, and the messages between a driver and its workers. Plain data, no ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from orchestrator.graph import Segment
from orchestrator.tasks.info import TaskInfo
from orchestrator.tasks.source import Sent, Source


@dataclass(frozen=True, kw_only=True)
class OtherTask:
    """A task beside the study's own."""

    source: Source
    params: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that a worker must know before its first segment."""

    store_url: str
    study: str
    task: Source
    task_params: Mapping[str, Any]
    root: str
    """The folder of the study file, where the task's own files are looked for first."""
    others: Mapping[str, OtherTask] = field(default_factory=dict)
    """The study's other tasks, by the names that it calls them."""
    ticket: Sent | None = None
    """The ticket file that the study starts from."""
    functions: Mapping[str, Source] = field(default_factory=dict)
    """Sources of the user's own functions, by the name that the study calls them."""
    nonce: str = ""
    """The name of an object that the driver wrote to the store; a worker that cannot read it has another store."""
    code: str = ""
    """The digest of the driver's own packages; a worker with another one is a stale image or another package."""
    evaluate_every: float = 0
    latency: bool = False
    structures: tuple[str, ...] = ()
    """Structures of units that the study names: their units are part of the task's description."""
    budgets: bool = False
    """The study has a FLOPs budget: the model's FLOPs are part of the task's description."""
    needs: tuple[str, ...] = ()
    """What the study's criteria need of the model and the data: whether it can be had is part of the description."""
    checkpoint_minutes: float = 0
    """How often a training in a worker's hands is made durable in the middle; 0: never."""
    timeout_seconds: float = 0
    """How long one stage may take; 0: as long as it likes."""


RETRIED = ("preempted", "worker died", "out of GPU memory")
"""The kinds of failure after which a stage may be tried again; see `retries`."""


def note(job: Job, worker: int | str) -> str:
    """Where a worker writes the nonce back to."""
    return f"{job.nonce}.{worker}"


@dataclass(frozen=True, kw_only=True)
class Reported:
    """A stage of a segment was run, and its state is stored where that was asked for."""

    segment: int
    key: str
    measures: Mapping[str, Any] | None
    resumable: bool
    stored: bool
    steps: int
    """Optimizer steps run since the last report, for this stage and the unreported ones before it."""
    seconds: float
    adopted: bool = False
    """Somebody else had committed the same state first, and theirs counts."""
    found: bool = False
    """The state was in the store already: it was read and measured, not made again."""
    checkpoint: int = 0
    """The position of the checkpoint that a training went on from; 0: from where it starts."""
    worker: str = ""
    """HOST:PID of the process that ran it."""


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A stage could not be done; the segment ends here, and so does everything that waits for the stage."""

    segment: int
    key: str
    kind: str
    """diverged, out of memory, raised or timed out; one of `RETRIED`, which may be tried again; or it is no fault of
    the stage: gone, where `key` is a state that the segment needed and that was removed meanwhile, or store, which
    does not answer or has no room."""
    message: str
    traceback: str = ""
    worker: str = ""
    """HOST:PID of the process that says so; empty where none is left to."""
    bystanders: int = 0
    """How many workers the pool has lost so far that were at no stage: no stage is to blame for those."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A segment's worker is free again. What was not reported of the segment was not run."""

    segment: int


@dataclass(frozen=True, kw_only=True)
class Began:
    """A worker begins a stage: said from worker to pool, and only where stages have a time limit."""

    segment: int
    key: str


Event = Reported | Failed | Ended


class Pool(Protocol):
    """Runs segments somewhere, and says what became of each of their stages.

    Events of one segment come in order and end with `Ended`; nothing is said of a segment twice. A pool tries nothing
    again: of a worker that is gone it says `Failed` for the stage that it was at, and `Ended` for each of its segments.
    """

    @property
    def device(self) -> str:
        """The device type of every worker: part of what a plan's numbers depend on."""
        ...

    @property
    def workers(self) -> int:
        """How many segments run at the same time."""
        ...

    @property
    def gpus(self) -> float:
        """The share of a GPU that each worker begins with; 0 on a CPU."""
        ...

    @property
    def free(self) -> int:
        """How many more segments may be submitted now."""
        ...

    def prepare(self, job: Job) -> TaskInfo:
        """Make every worker ready for a study, and describe its task.

        A stage that takes longer than the job's `timeout_seconds` is ended, and with it its worker where nothing else
        helps; a pool in one process can only end a training, between two batches.

        Raises:
            TaskError: the task is wrong.
            WorkersUnusable: a worker sees another store, or runs other code.
            WorkersDied: for a long time none came that lived until it was ready.
        """
        ...

    def submit(self, segment: Segment) -> None:
        """Queue a segment; never blocks for long. One that wants a larger share of a GPU than a worker has gets it."""
        ...

    def completed(self, timeout_seconds: float) -> Sequence[Event]:
        """What happened since the last call; waits until something has, or for the timeout."""
        ...

    def publish(self, study: str, counts: Mapping[str, float]) -> None:
        """Show how a study stands, a number for each of `metrics.METRICS`, to whoever watches the pool's cluster."""
        ...

    def close(self) -> None:
        """End the workers that this pool started, and nothing else."""
        ...
