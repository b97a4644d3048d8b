"""Room in the store: which states nobody needs any more, and how one that is gone is made again."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from orchestrator import history
from orchestrator.errors import OrchardistError, QueryError, StageFailed
from orchestrator.outcome import DENSE_TRIAL
from orchestrator.store.checkpoints import Place
from orchestrator.store.lease import Lease, held
from orchestrator.store.store import Store

if TYPE_CHECKING:
    from orchestrator.plan import Plan
    from orchestrator.pools.protocol import Job
    from orchestrator.study import Study
    from orchestrator.tasks.info import TaskInfo

_LOG = logging.getLogger("orchardist.retention")

UNPRUNED = frozenset({"Init", "Given", "Train"})
"""The ops behind a state that other trials may rewind to or start from."""

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


def sweep(store: Store, study: str, lease: Lease | None) -> Swept:
    """Remove the states of a study that nobody needs: no front, dense model or ticket of any study of the store, no
    trial to rewind to, and no study that is being run.

    Args:
        store: where the studies are.
        study: whose states are looked at.
        lease: this process drives the study; without one nothing is removed, only counted.

    An outcome is in the merged ledger before its state goes. What is gone is made again when somebody asks for it.
    """
    if lease is not None:
        store.ledger(study, lease.epoch).compact()
    measured = set(store.table(study, "outcomes", ["key"])["key"].to_pylist())
    candidates = _candidates(store, study, measured)
    others = [name for name in store.studies() if name != study]
    running = {name for name in others if held(store.files, name)}
    needed = _wanted(store, study)
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
    left = _checkpoints(store, study, running)
    if lease is not None:
        _each(store.states.delete, [each.key for each in gone])
        for place in left:
            store.checkpoints.delete(place)
    return Swept(
        study=study,
        states=len(gone),
        bytes=sum([*(each.bytes for each in gone), *left.values()]),
        kept=len(candidates) - len(gone),
        checkpoints=len(left),
    )


def _checkpoints(store: Store, study: str, running: Iterable[str]) -> dict[Place, int]:
    """The study's checkpoints that nobody will go on from, with their sizes: of stages that are done, and all of them
    once the study has ended, unless another one that is being run may go on from them."""
    found: dict[Place, int] = {}
    ended: bool | None = None
    for place in store.checkpoints.places():
        if store.checkpoints.study(place) != study:
            continue
        if ended is None:
            ended = not running and history.read(store, study).finished
        header = store.states.header(place.key) or {}
        if ended or header.get("resumable") == "1":
            with suppress(FileNotFoundError):
                found[place] = store.checkpoints.size(place)
    return found


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
    worker, graph = Worker(replace(job, timeout_seconds=0), device=row["device"]), Graph()

    def facts(key: str) -> Facts:
        header = study.store.states.header(key) or {}
        return Facts(present=bool(header), resumable=header.get("resumable") == "1")

    graph.add(_plan(study, row, worker.info, {name: source.digest for name, source in job.functions.items()}), facts)
    while not graph.known(row["key"]):
        segment = next(graph.ready())
        for event in worker.run(segment):
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


def _each(act: Callable[[str], Any], keys: Iterable[str]) -> Iterator[Any]:
    """`act` on every key, several at a time: an object store takes its time for each."""
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        return iter(list(threads.map(act, keys)))
