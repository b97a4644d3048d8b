"""Room in the store: which states nobody needs any more, and how one that is gone is made again."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from orchestrator import history
from orchestrator.errors import OrchardistError, QueryError, StageFailed, StoreError
from orchestrator.interrupts import noticed
from orchestrator.outcome import DENSE_TRIAL
from orchestrator.store import paths
from orchestrator.store.checkpoints import Place
from orchestrator.store.files import NoRoom
from orchestrator.store.lease import Pulse, decided
from orchestrator.store.store import Store

if TYPE_CHECKING:
    from orchestrator.plan import Plan
    from orchestrator.pools.protocol import Job
    from orchestrator.store.files import Leftover
    from orchestrator.store.ledger import Ledger
    from orchestrator.study import Study
    from orchestrator.tasks.info import TaskInfo

_LOG = logging.getLogger("orchardist.retention")

UNPRUNED = frozenset({"Init", "Given", "Train"})
"""The ops behind a state that other trials may rewind to or start from."""

STALE_SECONDS = 6 * 3600.0
"""By the store's own clock, where it has one: longer than any file takes to be written, and than machines' clocks
differ that are in use."""

_AT_ONCE = 16
_KEY = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Swept:
    """What was removed, or would be."""

    study: str
    states: int
    bytes: int
    kept: int
    """How many of the study's states are still there."""
    checkpoints: int = 0
    """Trainings in the middle that nobody will go on with; `bytes` counts them, too."""
    leftovers: int = 0
    """What killed writers left anywhere in the store; `bytes` counts it, too."""


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A state of the study that is there."""

    key: str
    bytes: int
    measured: bool
    ops: frozenset[str]
    """The kinds of ops behind it."""
    ancestors: tuple[str, ...]
    parents: frozenset[str]


class Others:
    """The other studies of a store, and which of them are being run; see `orchestrator.store.lease` for how it is told.

    To be kept by who asks again and again: drivers on other machines are known from one look to the next.
    """

    def __init__(self, store: Store, study: str) -> None:
        self.store = store
        self.study = study
        self._pulses: dict[str, Pulse] = {}

    def names(self) -> list[str]:
        """Those that there are now."""
        return [name for name in self.store.studies() if name != self.study]

    def running(self, *, at_once: bool) -> set[str]:
        """Those that may be run at the moment. `at_once` counts whom nothing is known of as running; else drivers on
        other machines are watched, all at the same time, until they are known to be dead or alive."""
        pulses = {name: self._pulses.setdefault(name, Pulse(self.store.files, name)) for name in self.names()}
        look = (lambda pulse: pulse.look().alive) if at_once else (lambda pulse: decided(pulse).alive)
        return {name for name, alive in zip(pulses, _each(look, pulses.values()), strict=True) if alive is not False}


def sweep(
    store: Store,
    study: str,
    ledger: Ledger | None,
    *,
    others: Others | None = None,
    under_way: Collection[str] | None = None,
) -> Swept:
    """Remove the states of a study that nobody needs: no front, dense model or ticket of any study of the store, no
    trial to rewind to, and no study that is being run.

    A driver on another machine whose counter stands still for 15 s is dead: its study counts as stopped, and goes on
    from what is left. Who begins to run a study while this is at work is seen before anything is removed; who begins
    after that finds that a state is gone, and makes it again.

    Args:
        store: where the studies are.
        study: whose states are looked at.
        ledger: of this process, which drives the study; without one nothing is removed, only counted.
        others: what is known of other drivers by now.
        under_way: the states that trials under way may need, where the study is being run by this very process: then
            nothing is waited for, and what killed writers left stays for another time.

    An outcome is in the merged ledger before its state goes; on a full disk, where nothing can be merged, it is in a
    part, which is as durable. What is gone is made again when somebody asks for it.
    """
    full = False
    if ledger is not None:
        from orchestrator.store.ledger import GRACE_SECONDS

        grace_seconds = 0.0 if under_way is None else GRACE_SECONDS
        try:
            ledger.compact(grace_seconds)
        except NoRoom as error:
            _LOG.warning("%s; states that nobody needs go first", error)
            full = True
    epoch = None if ledger is None else ledger.epoch
    swept = _sweep(store, study, epoch, others or Others(store, study), under_way)
    if ledger is not None and full:
        with suppress(NoRoom):
            ledger.compact(grace_seconds)
    return swept


def sweep_a_full_disk(store: Store, study: str) -> Swept:
    """As `sweep`, where there is no room even for a lease: nothing is written.

    Who begins to run the study while this is at work is seen before anything is removed, as with other studies.

    Raises:
        StoreError: the study is being run.
    """
    sign = decided(Pulse(store.files, study))
    if sign.alive:
        raise StoreError(f"study {study} is being run by {sign.driver}; stop it first")
    return _sweep(store, study, sign.epoch, Others(store, study), None)


def _sweep(store: Store, study: str, epoch: int | None, others: Others, under_way: Collection[str] | None) -> Swept:
    """What `sweep` does for a driver under this epoch, or after it; None: nothing is removed."""
    running = others.running(at_once=under_way is not None)
    while True:
        gone, kept = _unneeded(store, study, others.names(), running, under_way or ())
        left = _checkpoints(store, study, running, ended=False if under_way is not None else None)
        litter = _litter(store, running) if under_way is None else []
        now = others.running(at_once=True)
        if now <= running:
            break
        running |= now
    if epoch is not None:
        newest = Pulse(store.files, study).look()
        if newest.epoch > epoch:
            by = newest.driver or "another process"
            raise StoreError(f"study {study} was taken over by {by}: nothing is removed")
        _each(store.states.delete, [each.key for each in gone])
        _each(store.checkpoints.delete, left)
        _each(lambda each: each.remove(), litter)
    return Swept(
        study=study,
        states=len(gone),
        bytes=sum([*(each.bytes for each in gone), *left.values(), *(each.bytes for each in litter)]),
        kept=kept,
        checkpoints=len(left),
        leftovers=len(litter),
    )


def _unneeded(
    store: Store, study: str, others: Iterable[str], running: Collection[str], under_way: Collection[str]
) -> tuple[list[_Candidate], int]:
    """The study's states that nobody needs, and how many of its states are needed."""
    measured = set(store.table(study, "outcomes", ["key"])["key"].to_pylist())
    candidates = _candidates(store, study, measured)
    needed = _wanted(store, study) | set(under_way)
    for name in others:
        needed |= _keys(store, name) if name in running else _wanted(store, name)
    gone = [
        each
        for each in candidates
        if each.key not in needed
        and not each.ops <= UNPRUNED
        # A stage on the way, without an outcome, may be what a running trial goes on from.
        and (each.key in measured if each.measured else not running)
    ]
    return gone, len(candidates) - len(gone)


def _checkpoints(store: Store, study: str, running: Collection[str], ended: bool | None) -> dict[Place, int]:
    """The checkpoints that nobody will go on from, with their sizes: the study's own of stages that are done, and all
    of them once it has ended, unless another one that is being run may go on from them; torn ones, and those of studies
    that are no more, once they are so old that nobody can be writing them."""
    found: dict[Place, int] = {}
    studies: set[str] | None = None
    for place in store.checkpoints.places():
        with suppress(FileNotFoundError):
            owner = store.checkpoints.study(place)
            if owner == study:
                if ended is None:
                    ended = not running and history.read(store, study).finished
                header = store.states.header(place.key) or {}
                if ended or header.get("resumable") == "1":
                    found[place] = store.checkpoints.size(place)
                continue
            if studies is None:
                studies = set(store.studies())
            if (owner is None or owner not in studies) and _is_stale(store, place):
                found[place] = store.checkpoints.size(place)
    return found


def _is_stale(store: Store, place: Place) -> bool:
    try:
        return store.checkpoints.age(place) >= STALE_SECONDS
    except StoreError:  # it does not say
        return False


def _litter(store: Store, running: Collection[str]) -> list[Leftover]:
    """What killed writers left. The handshake of a driver is in use for as long as it runs, for days perhaps."""
    try:
        return [
            each
            for each in store.files.leftovers(paths.HANDSHAKE)
            if each.age_seconds >= STALE_SECONDS and not (running and each.path.startswith(paths.HANDSHAKE))
        ]
    except StoreError as error:  # the age of things is found out by writing one
        _LOG.warning("what killed writers may have left in the store %s stays: %s", store.name, error)
        return []


def remake(study: Study, job: Job, row: Mapping[str, Any]) -> bytes:
    """The state behind an outcome, made again in this process from what is left of its stages, and stored.

    Args:
        study: an opened study.
        job: what a worker must know of it.
        row: the outcome: its key, trial, round, seed, params and device.

    Raises:
        QueryError: it would not be the same: the task, the code or the kind of device differs.
        StageFailed: a stage could not be done.
    """
    from orchestrator.graph import Facts, Graph
    from orchestrator.pools.protocol import Failed, Reported
    from orchestrator.pools.worker import Worker

    _LOG.warning("the state %s is no longer in the store; it is made again", row["key"][:12])
    # How long a stage may take in a study says nothing of this machine.
    asked: list[int] = []
    job = replace(job, timeout_seconds=0)
    worker, graph = Worker(job, device=row["device"], interrupted=lambda: bool(asked)), Graph()

    def facts(key: str) -> Facts:
        header = study.store.states.header(key) or {}
        return Facts(present=bool(header), resumable=header.get("resumable") == "1")

    graph.add(_plan(study, row, worker.info, {name: source.digest for name, source in job.functions.items()}), facts)
    while not graph.known(row["key"]):
        segment = next(graph.ready())
        with noticed(asked):
            events = list(worker.run(segment))
        for event in events:
            if isinstance(event, Failed):
                raise StageFailed(f"the state {row['key'][:12]} could not be made again: {event.kind}: {event.message}")
            if isinstance(event, Reported):
                known = event.measures is not None
                graph.done(event.key, Facts(known=known, present=event.stored, resumable=event.resumable))
        graph.give_back(segment)
    data = study.store.states.read(row["key"])
    if data is None:
        raise QueryError(f"the state {row['key'][:12]} was made again and is gone from the store once more")
    return data


def _plan(study: Study, row: Mapping[str, Any], info: TaskInfo, code: Mapping[str, str]) -> Plan:
    """The plan of the row's trial, with nothing to show but the row's state."""
    from orchestrator.planning.trial import dense_plan, trial_plan

    if row["trial"] == DENSE_TRIAL:
        plan = dense_plan(study.spec.train, row["seed"], info, device=row["device"])
    else:
        settings = study.spec.settings(json.loads(row["params"] or "{}"), code)
        plan = trial_plan(settings, row["seed"], info, device=row["device"])
    if row["key"] not in {node.key for node in plan.nodes}:
        raise QueryError(
            f"the state {row['key'][:12]} is no longer in the store {study.store.name} and cannot be made again: the "
            "task, its data or the code is not what it was"
        )
    nodes = tuple(
        replace(node, evaluated=node.key == row["key"], stored=node.stored or node.key == row["key"])
        for node in plan.nodes
    )
    return replace(plan, nodes=nodes, points=((row["round"], row["key"]),))


def _wanted(store: Store, study: str) -> set[str]:
    """The states of a study's front, of its dense models and of its tickets."""
    from orchestrator.study import Study  # which imports this module

    rows = store.table(study, "outcomes", ["key", "trial"]).to_pylist()
    wanted = {row["key"] for row in rows if row["trial"] == DENSE_TRIAL}
    try:
        opened = Study.open(store.url, study)
        wanted |= {key for point in opened.front().points for key in point["keys"]}
    except OrchardistError as error:
        _LOG.warning("the front of the study %s cannot be told (%s): all its states are kept", study, error)
        wanted |= {row["key"] for row in rows}
    for row in store.table(study, "events", ["event", "detail"]).to_pylist():
        if row["event"] == "tickets":
            wanted.update(_KEY.findall(row["detail"] or ""))
    return wanted


def _keys(store: Store, study: str) -> set[str]:
    """Every state that a study's records name."""
    keys = set(store.table(study, "outcomes", ["key"])["key"].to_pylist())
    return keys | _wanted(store, study)


def _candidates(store: Store, study: str, measured: set[str]) -> list[_Candidate]:
    """The study's states that are there: those with outcomes, those on the way to them, and cuts in between."""
    others = [name for name in store.studies() if name != study]
    elsewhere = {key for name in others for key in store.table(name, "outcomes", ["key"])["key"].to_pylist()}
    there = store.states.keys()
    looked_at = _each(_look(store), [key for key in there if key in measured or key not in elsewhere])
    found = {each.key: each for each in looked_at if each is not None}
    # A lineage names a run of training once, wherever it was cut: a cut is known by where its run starts.
    family = measured | {key for each in found.values() if each.key in measured for key in each.ancestors}
    return [each for each in found.values() if each.key in family or each.parents & family]


def _look(store: Store) -> Callable[[str], _Candidate | None]:
    def look(key: str) -> _Candidate | None:
        header = store.states.header(key)
        if header is None:
            return None
        try:
            lineage = json.loads(header.get("lineage", "[]"))
            return _Candidate(
                key=key,
                bytes=store.states.size(key),
                measured=header.get("outcome", "null") != "null",
                ops=frozenset(entry["op"] for entry in lineage),
                ancestors=tuple(entry["key"] for entry in lineage),
                parents=frozenset(lineage[-1]["from"]) if lineage else frozenset(),
            )
        except (ValueError, TypeError, LookupError, FileNotFoundError):
            return None  # foreign, or gone meanwhile: nothing of ours to remove

    return look


def _each(act: Callable[[Any], Any], things: Iterable[Any]) -> Iterator[Any]:
    """`act` on everything, several at a time: an object store takes its time for each."""
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        return iter(list(threads.map(act, things)))
