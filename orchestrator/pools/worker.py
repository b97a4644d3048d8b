"""The worker's side: run the stages of a segment, store what is to be stored, say what was measured."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from orchestrator import ops
from orchestrator.code import code_digest
from orchestrator.errors import StoreError, TimedOut, WorkersUnusable
from orchestrator.graph import Segment, Step
from orchestrator.header import read_header, sealed
from orchestrator.measures.measure import curve_point, measure
from orchestrator.pools.cache import Recent, cache_bytes, machine
from orchestrator.pools.failure import kind_of, message_of, traceback_of
from orchestrator.pools.protocol import Began, Ended, Event, Failed, Job, Reported, note
from orchestrator.pruning.criteria import CRITERIA
from orchestrator.stages import Stages
from orchestrator.state import State, from_bytes, to_bytes
from orchestrator.store.checkpoints import Place
from orchestrator.store.store import Store
from orchestrator.tasks.info import GivenTicket, TaskInfo
from orchestrator.tasks.load import load
from orchestrator.tasks.source import install_function
from orchestrator.tickets.given import read_given, start_of
from orchestrator.training.loop import Probe, Watch, arithmetic

_LOG = logging.getLogger("orchardist.worker")

SOON_SECONDS = 10.0
"""A training that was interrupted before makes checkpoints at least so often, if it makes any."""


@dataclass(frozen=True)
class _Held:
    """A state with the record of how it came about."""

    state: State
    lineage: tuple[Mapping[str, Any], ...]
    curve: Sequence[list[float]] = ()
    """Of the training that ended in it, from where that began; empty where it was not taken throughout."""
    resumable: bool = True
    """Whether the optimizer's state is in it."""


@dataclass
class _Trained:
    """What is known of the training that a stage does."""

    curve: list[list[float]]
    steps: int
    checkpoint: int = 0
    """The position of the checkpoint that it went on from."""


class _Left(Exception):
    """The worker was asked to leave in the middle of a training."""


class _Gone(Exception):
    """A state that was in the store is there no more, or without the optimizer's state that it had."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


class Worker:
    """Runs segments of one study, one after another, on one device.

    Args:
        job: the study's.
        device: "cpu" or "cuda".
        cache: bytes of recent states that are held in memory, so that a child of one needs not read it back; by default
            what is usual for the only worker of this machine.
        clock: gives monotonic seconds.
        interrupted: whether Ctrl-C was pressed, to tell it from a KeyboardInterrupt of the user's own code.
    """

    def __init__(
        self,
        job: Job,
        *,
        device: str = "cpu",
        cache: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        self.job = job
        self.device = device
        self._clock = clock
        self._interrupted = interrupted
        self._leaving = threading.Event()
        self._checkpointed: set[str] = set()  # keys of the segment at hand
        self.store = Store(job.store_url)
        for name, function in job.functions.items():
            CRITERIA.bind(name, install_function(function, Path(job.root)))
        root = Path(job.root)
        self._stages = {"": Stages(load(job.task, job.task_params, root), device)}
        self._ticket: GivenTicket | None = None
        if job.ticket is not None:
            ticket, self._ticket = read_given(job.ticket, root)
            self._stages[""].given = start_of(ticket, self._stages[""], job.ticket.name)
        for name, other in job.others.items():
            self._stages[name] = Stages(load(other.source, other.params, root), device)
        self._cache: Recent[_Held] = Recent(cache_bytes(cache, 1, *machine()))

    @cached_property
    def info(self) -> TaskInfo:
        """The task as the driver sees it, with what it must know of the model, other tasks and ticket of this study."""
        budgets, needs = self.job.budgets, self.job.needs
        own = self._stages[""].info(self.job.structures, budgets=budgets, needs=needs)
        others = {name: self._stages[name].info(budgets=budgets, needs=needs) for name in self.job.others}
        return replace(own, others=others, ticket=self._ticket)

    def leave(self) -> None:
        """Ask for an end, from any thread: the training under way is made durable after the batch that it is at."""
        self._leaving.set()

    def run(self, segment: Segment) -> Iterator[Event | Began]:
        """Run the segment's stages in order; the events end with `Ended`, whatever happens."""
        made: dict[str, _Held] = {}
        self._checkpointed.clear()
        began, steps = time.perf_counter(), 0
        for place, step in enumerate(segment.steps):
            _forget_what_is_of_no_use(made, segment.steps[place:])
            adopted = found = False
            checkpoint = 0
            if self.job.timeout_seconds:
                yield Began(segment=segment.number, key=step.key)
            try:
                if self._leaving.is_set():
                    raise _Left
                with arithmetic(torch.device(self.device)):
                    there = self._stored(step)
                    if there is not None:
                        made[step.key], curve, found = there, None, True
                    else:
                        made[step.key], trained = self._run(step, made)
                        curve, checkpoint = trained.curve, trained.checkpoint
                        steps += trained.steps
                        if not (step.evaluated or step.stored):
                            continue
                    measures = self._measure(step, made[step.key], curve, time.perf_counter() - began)
                    if step.stored and not found:
                        adopted = self._commit(step, made, measures)
                        self._forget_checkpoints()
            except _Left:
                message = "its worker was asked to leave"
                yield Failed(segment=segment.number, key=step.key, kind="preempted", message=message)
                break
            except _Gone as gone:  # removed by another process: the driver has it made again
                yield Failed(segment=segment.number, key=gone.key, kind="gone", message=f"the state {gone.key} is gone")
                break
            except BaseException as error:  # the user's code may raise anything: it becomes a failed outcome
                if self._interrupted():
                    raise KeyboardInterrupt from error
                yield Failed(
                    segment=segment.number,
                    key=step.key,
                    kind=kind_of(error),
                    message=message_of(error),
                    traceback=traceback_of(error),
                    worker=_name(),
                )
                break
            yield Reported(
                segment=segment.number,
                key=step.key,
                measures=measures,
                resumable=step.stored and step.resumable,
                stored=step.stored,
                steps=steps,
                seconds=time.perf_counter() - began,
                adopted=adopted,
                found=found,
                checkpoint=checkpoint,
                worker=_name(),
            )
            began, steps = time.perf_counter(), 0
        else:
            self._forget_checkpoints()
        yield Ended(segment=segment.number)

    def _stored(self, step: Step) -> _Held | None:
        """The step's state, if it is there to be measured: made for a study that measured less, or just now."""
        header = self.store.states.header(step.key) if step.evaluated else None
        if header is None or (step.resumable and header.get("resumable") != "1"):
            return None
        data = self.store.states.read(step.key)
        return None if data is None else _held(data)

    def _run(self, step: Step, made: Mapping[str, _Held]) -> tuple[_Held, _Trained]:
        parents = [made[key] if key in made else self._fetch(key, step.goes_on) for key in step.inputs]
        states = [parent.state for parent in parents]
        if isinstance(step.op, ops.Train) and step.op.fresh_optimizer and not step.goes_on:
            states[0] = states[0].without_optimizer()
        stages = self._stages[step.task]
        trained = _Trained([*parents[0].curve] if step.goes_on else [], step.steps)
        if step.begun:
            states[0], trained = self._where_it_was(step, states[0], trained)
        curve = trained.curve
        every = round(self.job.evaluate_every * self._steps_per_epoch(step))
        if isinstance(step.op, ops.Train):
            since = 0 if step.goes_on else step.op.to - step.steps
            if not _whole(curve, every, since, states[0].position):
                curve.clear()
                every = 0
        probe: Probe | None = None
        if every:

            def probe(position: int, model: torch.nn.Module) -> None:
                curve.append([position, *curve_point(model, stages.loaded)])

        state = stages.run(step.op, states, probe, every, self._watch(step, trained))
        return _Held(state, _lineage(step, parents, state.remarks), curve), trained

    def _watch(self, step: Step, trained: _Trained) -> Watch | None:
        """Looks at the clock after every batch: whether it is time for a checkpoint, or all the time there is."""
        every, longest = 60 * self.job.checkpoint_minutes, self.job.timeout_seconds
        if not isinstance(step.op, ops.Train):
            return None
        if step.begun:  # and interrupted: it may be again, and is to get further each time
            every = min(every, SOON_SECONDS)  # 0 stays 0: never
        began = self._clock()
        due = began + (every or math.inf)
        last = Place(key=step.key, position=trained.checkpoint)

        def watch(position: int, reached: Callable[[int], State]) -> None:
            nonlocal due, last
            now = self._clock()
            leaving = self._leaving.is_set()
            if now >= due or leaving:
                place = Place(key=step.key, position=position)
                last = self._checkpoint(place, last, step, reached(position), trained.curve)
                due = self._clock() + (every or math.inf)
            if leaving:
                raise _Left
            if longest and now - began > longest:
                raise TimedOut(f"the stage takes longer than timeout_seconds = {longest:g}")

        return watch

    def _checkpoint(self, place: Place, last: Place, step: Step, state: State, curve: list[list[float]]) -> Place:
        """Make a training durable as it is now, and remove the checkpoint before. Returns where the last one is: one
        that cannot be written is worth a word, and no more."""
        header = {
            "key": place.key,
            "study": self.job.study,
            "task": self._info_of(step).digest,
            "curve": json.dumps(curve),
        }
        self._checkpointed.add(place.key)
        try:
            self.store.checkpoints.write(place, sealed(to_bytes(state, header)))
            if last.position:
                self.store.checkpoints.delete(last)
        except StoreError as error:
            _LOG.warning("no checkpoint at step %d: %s", place.position, error)
            return last
        return place

    def _where_it_was(self, step: Step, start: State, trained: _Trained) -> tuple[State, _Trained]:
        """The last checkpoint of a training that somebody else has begun, or where it starts if there is none."""
        self._checkpointed.add(step.key)
        data = self.store.checkpoints.latest(step.key)
        if data is None:
            return start, trained
        state, curve = from_bytes(data), json.loads(read_header(data)["curve"])
        if state.position <= start.position:  # another cut of the same training is further by now
            return start, trained
        return state, _Trained(curve, step.steps - (state.position - start.position), state.position)

    def _forget_checkpoints(self) -> None:
        """What is stored, or of no more use, needs none."""
        while self._checkpointed:
            key = self._checkpointed.pop()
            try:
                self.store.checkpoints.delete_all(key)
            except StoreError as error:  # they are swept with the study
                _LOG.warning("the checkpoints of %s stay: %s", key[:12], error)

    def _steps_per_epoch(self, step: Step) -> int:
        info = self._info_of(step)
        return info.steps_per_epoch(step.op.recipe.batch_size) if isinstance(step.op, ops.Train) else 0

    def _info_of(self, step: Step) -> TaskInfo:
        return self.info.others[step.task] if step.task else self.info

    def _measure(
        self, step: Step, held: _Held, curve: list[list[float]] | None, seconds: float
    ) -> dict[str, Any] | None:
        if not step.evaluated:
            return None
        measures = measure(
            self._stages[step.task], held.state, remarks=_remarks(held.lineage), latency=self.job.latency
        )
        return measures | {
            "curve": curve or None,
            "position_steps": held.state.position,
            "task_digest": self._info_of(step).digest,
            "device": self.device,
            "seconds": seconds,
            "finished_at": time.time(),
            "versions": {"torch": str(torch.__version__), "python": platform.python_version(), "cpu": _cpu()},
        }

    def _commit(self, step: Step, made: dict[str, _Held], measures: Mapping[str, Any] | None) -> bool:
        """Store the state with its outcome in the header; True when another worker's copy was there first."""
        # Whoever goes on from here gets what the store gives, from memory as well.
        held = made[step.key]
        kept = held.state if step.resumable else replace(held.state, optimizer={})
        made[step.key] = replace(held, state=kept, resumable=step.resumable)
        header = {
            "key": step.key,
            "resumable": "1" if step.resumable else "0",
            "outcome": json.dumps(measures),
            "lineage": json.dumps(held.lineage),
            "curve": json.dumps(list(held.curve)),
            "task": self._info_of(step).digest,
        }
        data = sealed(to_bytes(kept, header))
        adopted = not self.store.states.commit(step.key, data)
        if adopted:
            theirs = self.store.states.header(step.key) or {}
            if step.resumable and theirs.get("resumable") != "1":
                self.store.states.replace(step.key, data)
                adopted = False
            else:
                made[step.key] = self._read(step.key)
        self._cache.hold(step.key, made[step.key], made[step.key].state.nbytes)
        return adopted

    def _fetch(self, key: str, resumable: bool) -> _Held:
        """A state, from memory or from the store. It may have been removed and made again by a study that wants less
        of it: a training that went on without the optimizer's state would silently become another one."""
        held = self._cache.get(key)
        if held is None or (resumable and not held.resumable):
            held = self._read(key)
        self._cache.hold(key, held, held.state.nbytes)
        if resumable and not held.resumable:
            raise _Gone(key)
        return held

    def _read(self, key: str) -> _Held:
        data = self.store.states.read(key)
        if data is None:
            raise _Gone(key)
        return _held(data)


def shake_hands(job: Job, worker: int | str) -> None:
    """Check that this process runs the driver's code and sees the driver's store, and leave a note there.

    Raises:
        WorkersUnusable: naming this node and what differs.
    """
    mine = code_digest()
    if job.code and mine != job.code:
        raise WorkersUnusable(
            f"the worker on {platform.node()} runs other code than the driver ({mine[:12]}, not {job.code[:12]}); "
            "install the same orchardist there"
        )
    if job.nonce:
        files = Store(job.store_url).files
        try:
            nonce = files.read(job.nonce)
        except FileNotFoundError:
            raise WorkersUnusable(
                f"the worker on {platform.node()} does not see the driver's store {files.name}: "
                "the store must be shared storage"
            ) from None
        files.write(note(job, worker), nonce)


def _forget_what_is_of_no_use(made: dict[str, _Held], left: Sequence[Step]) -> None:
    """Only what is still needed of a segment is held beside the cache: of twenty rounds one state, not twenty."""
    needed = {key for step in left for key in step.inputs}
    for key in made.keys() - needed:
        del made[key]


def _held(data: bytes) -> _Held:
    header = read_header(data)
    curve, resumable = json.loads(header.get("curve", "[]")), header.get("resumable") == "1"
    return _Held(from_bytes(data), tuple(json.loads(header["lineage"])), curve, resumable)


def _whole(curve: Sequence[list[float]], every: int, since: int, position: int) -> bool:
    """Whether a learning curve has every point up to `position` of a training that began at `since`.

    A cut or a checkpoint of a study that took none, or took it at other steps, has not.
    """
    if not every:
        return not curve
    last = position // every * every
    places = [point[0] for point in curve]
    return places == list(range(last - every * (len(places) - 1), last + 1, every)) if places else last <= since


def _remarks(lineage: tuple[Mapping[str, Any], ...]) -> Mapping[str, Any] | None:
    """What the last pruning behind a state had to say; None where there was none."""
    return next((entry.get("remarks", {}) for entry in reversed(lineage) if entry["op"] == "Prune"), None)


def _lineage(step: Step, parents: list[_Held], remarks: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Every stage behind the state, each after its parents. A run of training counts once, wherever it was cut."""
    first = parents[0].lineage[:-1] if step.goes_on else parents[0].lineage if parents else ()
    before = list(first)
    for parent in parents[1:]:
        before += [entry for entry in parent.lineage if entry not in before]
    ancestors = [line[-1]["key"] for line in (first, *(parent.lineage for parent in parents[1:])) if line]
    said = {"remarks": remarks} if remarks else {}
    where = {"task": step.task} if step.task else {}
    return (*before, {"key": step.key, **ops.to_plain(step.op), "from": ancestors, **where, **said})


def _name() -> str:
    return f"{platform.node()}:{os.getpid()}"


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
