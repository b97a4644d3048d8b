"""Every choice that a study file has, kind by kind, with a line of what it is: what `orchardist list` prints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

from orchestrator import settings
from orchestrator.errors import UnknownName
from orchestrator.objectives import OBJECTIVES
from orchestrator.pruning import allocation, criteria, schedules
from orchestrator.registry import Registry
from orchestrator.tasks import BUILTIN
from search.proposer import SAMPLERS

Rows = list[dict[str, Any]]


def catalogue(kind: str) -> Rows:
    """The choices of a kind as rows with `name` and `what`.

    Raises:
        UnknownName: no such kind; the message lists them.
    """
    if kind not in KINDS:
        raise UnknownName("kind of choice", kind, KINDS)
    return KINDS[kind]()


def _registered(registry: Registry[Any]) -> Rows:
    return [{"name": entry.name, "what": entry.summary} for entry in registry]


def _criteria() -> Rows:
    rows = []
    for entry in criteria.CRITERIA:
        own = ", ".join(f"{name} = {value}" for name, value in criteria.parameters(entry).items())
        needs = ", ".join(criteria.needs(entry)) or "-"
        rows.append({"name": entry.name, "needs": needs, "parameters": own or "-", "what": entry.summary})
    return rows


def _described(texts: Any) -> Rows:
    return [{"name": name, "what": what} for name, what in texts.items()]


def _objectives() -> Rows:
    return [{"name": o.name, "direction": o.direction, "what": o.summary} for o in OBJECTIVES.values()]


RETRAIN = {
    "none": "prune, and leave it at that",
    "finetune": "go on with a fresh optimizer for retrain_epochs (Han et al., 2015)",
    "rewind": "weights, optimizer and position back to rewind_epoch, then train to epochs (Frankle & Carbin, 2019)",
    "lr-rewind": "weights stay, the learning-rate schedule goes back by retrain_epochs (Renda et al., 2020)",
    "reinit": "new initial weights under the mask, trained in full: a control for rewinding",
}
PHASES = {
    "before": "prune the initial weights, then train",
    "during": "prune while training, from prune_begin to prune_end, the optimizer kept",
    "after": "train, then prune and retrain in rounds",
}
STRUCTURES = {"weight": "single weights (unstructured)"}

assert RETRAIN.keys() == set(get_args(settings.Retrain))
assert PHASES.keys() == set(get_args(settings.Phase))
assert STRUCTURES.keys() == set(get_args(settings.Structure))

KINDS: dict[str, Callable[[], Rows]] = {
    "criteria": _criteria,
    "scopes": lambda: _registered(allocation.SCOPES),
    "allocations": lambda: _registered(allocation.ALLOCATIONS),
    "structures": lambda: _described(STRUCTURES),
    "schedules": lambda: _registered(schedules.SCHEDULES),
    "retrain": lambda: _described(RETRAIN),
    "phases": lambda: _described(PHASES),
    "samplers": lambda: _described(SAMPLERS),
    "objectives": _objectives,
    "tasks": lambda: _described(BUILTIN),
}
