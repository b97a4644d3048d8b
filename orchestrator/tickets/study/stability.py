"""How stable training is from a study's tickets: error barriers between siblings, measured once and kept in the store.

A barrier is a fact about two states and says nothing of a study, so that studies share it as they share the states.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from orchestrator.canonical import digest
from orchestrator.errors import QueryError, TaskError
from orchestrator.measures.accuracy import predict
from orchestrator.ops import Recalibrate
from orchestrator.stages import Stages
from orchestrator.state import State, from_bytes, into_model
from orchestrator.store import paths
from orchestrator.tasks.load import isolated, load
from orchestrator.tasks.metrics import IGNORED
from orchestrator.tasks.source import collect
from orchestrator.tickets.interval import interval
from orchestrator.tickets.stability import POINTS, STABLE, Barrier, barrier
from orchestrator.tickets.study.table import Found, read
from orchestrator.training.loop import arithmetic

if TYPE_CHECKING:
    from orchestrator.study import Study

KINDS = ("ticket", "dense", "reinitialised")
"""The networks that are trained twice from one start."""
RECALIBRATED = 2048
"""Training examples for the norms' statistics at each point of the line."""
VERSION = 1
"""Of how a barrier is measured; another one measures anew."""

Pair = tuple[str, str]


def measure(study: Study, told: Callable[[str], None] = lambda line: None) -> None:
    """Measure every pair of siblings whose barrier is not in the store yet.

    Args:
        study: an opened study; its task is loaded.
        told: is given a line for each pair that is measured.

    Raises:
        QueryError: the store has no siblings of the study.
        TaskError: the task names no accuracy, or has changed since the study ran.
    """
    wanted = {pair: ticket for ticket in read(study) for pair in _pairs(ticket)}
    unmeasured = {pair: ticket for pair, ticket in wanted.items() if _recorded(study, pair) is None}
    missing = {pair: ticket for pair, ticket in unmeasured.items() if _trained(study, pair)}
    if len(unmeasured) == len(wanted) and not missing:
        raise QueryError(
            f"the study {study.spec.name!r} has no siblings in the store, between which stability is measured; legal: "
            "'sibling' among the controls in [tickets]"
        )
    if not missing:
        return
    source = collect(study.spec.task, study.root, study.spec.checkpoint)
    loaded = load(source, study.spec.task_params, study.root)
    if "accuracy" not in loaded.metrics:
        raise TaskError(f"task {study.spec.task!r} has no metric 'accuracy': stability is a barrier in its error")
    digests = {row["task_digest"] for ticket in missing.values() for row in ticket.rows.values()}
    if digests != {loaded.info.digest}:
        raise TaskError(f"the task {study.spec.task!r} has changed since the study ran: its tickets cannot be measured")
    stages = Stages(loaded, "cuda" if torch.cuda.is_available() else "cpu")
    for number, pair in enumerate(missing, start=1):
        told(f"pair {number} of {len(missing)}: {pair[0][:12]} and {pair[1][:12]}")
        found = between(stages, _state(study, pair[0]), _state(study, pair[1]))
        document = {"pair": pair, "split": _split(study), "points": POINTS, "recalibrated": RECALIBRATED, **vars(found)}
        study.store.files.write(_path(study, pair), json.dumps(document, allow_nan=False).encode())


def between(stages: Stages, first: State, second: State) -> Barrier:
    """The barrier between two trained states in error on the test split, or on validation where there is no other.

    Batch norms are recalibrated on the first `RECALIBRATED` training examples of a fixed draw, at every point.
    """
    loaded = stages.loaded
    rows = loaded.valid if loaded.test is None else loaded.test
    model = stages.model()

    def error(weights: Mapping[str, Tensor]) -> float:
        into_model(weights, model)
        predicted, wanted = predict(model, rows, stages.device)
        return float((predicted != wanted)[wanted != IGNORED].double().mean())

    def recalibrated(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        state = State(weights=weights, masks=first.masks)
        return dict(stages.run(Recalibrate(examples=RECALIBRATED, seed=0), [state]).weights)

    norms = any(isinstance(module, _BatchNorm) and module.track_running_stats for module in model.modules())
    with isolated(0), arithmetic(stages.device):
        return barrier(first.weights, second.weights, error, recalibrate=recalibrated if norms else None)


def recorded(study: Study, ticket: Found) -> dict[str, dict[str, Any]] | None:
    """What was measured of a ticket, the dense model and the reinitialised ticket; None where nothing was.

    For each: the mean "barrier" over the seeds with "half_width" of its 95 % interval, whether it is "stable", "n",
    the barriers "by_seed", and the mean "errors" along the line at "alphas".
    """
    found = {}
    for kind in KINDS:
        by_seed = {
            seed: [line for pair in pairs if (line := _recorded(study, pair)) is not None]
            for seed, pairs in _siblings(ticket, kind).items()
        }
        if by_seed and all(by_seed.values()):
            found[kind] = _summary(by_seed)
    return found or None


def rows(document: Mapping[str, Any]) -> list[dict[str, str]]:
    """The barriers in the document of `ticket_table` as a table: a row for each network."""
    told = []
    for ticket in document["tickets"]:
        for kind, found in (ticket["stability"] or {}).items():
            width = "" if found["half_width"] is None else f" ± {100 * found['half_width']:.2f}"
            told.append(
                {
                    "ticket": ticket["key"][:12],
                    "round": str(ticket["round"]),
                    "sparsity": f"{ticket['sparsity']:.4f}",
                    "network": kind,
                    "barrier": f"{100 * found['barrier']:.2f}{width} points",
                    "n": str(found["n"]),
                    "verdict": "stable" if found["stable"] else "not stable",
                }
            )
    return told


def _summary(by_seed: Mapping[int, list[dict[str, Any]]]) -> dict[str, Any]:
    barriers = {seed: fmean(line["barrier"] for line in drawn) for seed, drawn in by_seed.items()}
    mean, half_width = interval(list(barriers.values()))
    lines = [line for drawn in by_seed.values() for line in drawn]
    return {
        "barrier": mean,
        "half_width": half_width,
        "n": len(barriers),
        "stable": mean < STABLE,
        "by_seed": {str(seed): height for seed, height in barriers.items()},
        "alphas": lines[0]["alphas"],
        "errors": [fmean(point) for point in zip(*(line["errors"] for line in lines), strict=True)],
    }


def _pairs(ticket: Found) -> Iterator[Pair]:
    for kind in KINDS:
        for pairs in _siblings(ticket, kind).values():
            yield from pairs


def _siblings(ticket: Found, kind: str) -> dict[int, list[Pair]]:
    """By seed, each network with its sibling."""
    return {
        seed: [(each["beside"], each["key"]) for each in found["controls"] if each["kind"] == f"sibling/{kind}"]
        for seed, found in ticket.tickets.items()
    }


def _trained(study: Study, pair: Pair) -> bool:
    """Whether both states are there: a control's training may have failed, and states may have been swept away."""
    return all(study.store.states.has(key) for key in pair)


def _split(study: Study) -> str:
    return "test" if study.noted().get("test_examples") else "valid"


def _path(study: Study, pair: Pair) -> str:
    how = {"split": _split(study), "points": POINTS, "recalibrated": RECALIBRATED, "version": VERSION}
    return paths.barrier(digest({"pair": pair, **how}))


def _recorded(study: Study, pair: Pair) -> dict[str, Any] | None:
    try:
        found = json.loads(study.store.files.read(_path(study, pair)))
    except (FileNotFoundError, ValueError):  # a torn file is measured again and replaced
        return None
    return found if isinstance(found, dict) and tuple(found.get("pair", ())) == pair else None


def _state(study: Study, key: str) -> State:
    data = study.store.states.read(key)
    if data is None:
        raise QueryError(f"the state {key[:12]} is no longer in the store {study.store.name}; run the study again")
    return from_bytes(data)
