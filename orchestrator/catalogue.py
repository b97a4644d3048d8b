"""Every choice that a study file has, kind by kind, with a line of what it is: what `orchardist list` prints.

A registry is imported when its kind is asked for: some need torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, get_args

from orchestrator import settings
from orchestrator.errors import UnknownName
from orchestrator.objectives import OBJECTIVES
from orchestrator.pruning import criteria
from orchestrator.pruning.patterns import UNITS
from orchestrator.registry import Entry, Registry
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


def _registered(module: str, name: str, *facts: str) -> Callable[[], Rows]:
    """The rows of the registry called `name` in `module`, with columns for these facts of its entries."""

    def rows() -> Rows:
        registry: Registry[Any] = getattr(import_module(module), name)
        return _with_papers(
            registry,
            [{"name": e.name, **{f: str(e.facts.get(f) or "-") for f in facts}, "what": e.summary} for e in registry],
        )

    return rows


def _criteria() -> Rows:
    return _with_papers(criteria.CRITERIA, [_criterion(entry) for entry in criteria.CRITERIA])


def _criterion(entry: Entry[Any]) -> dict[str, Any]:
    own = ", ".join(f"{name} = {value}" for name, value in criteria.parameters(entry).items())
    needs = ", ".join(criteria.needs(entry))
    return {"name": entry.name, "needs": needs or "-", "parameters": own or "-", "what": entry.summary}


def _settings() -> Rows:
    """Every key of a study file's tables, with its default."""
    sections: dict[str, type[settings.Section]] = {
        "train": settings.TrainSettings,
        "prune": settings.PruneSettings,
        "space": settings.Choices,
        "tickets": settings.TicketSettings,
        "stopping": settings.StoppingSettings,
    }
    return [
        {"name": f"{table}.{name}", "default": _shown(key.default), "what": key.description or _legal(key.annotation)}
        for table, section in sections.items()
        for name, key in section.model_fields.items()
    ]


def _shown(default: Any) -> str:
    empty = default is None or default == "" or (isinstance(default, (tuple, dict)) and not default)
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, tuple) and default:
        return ", ".join(default)
    return "-" if empty else str(default)


def _legal(annotation: Any) -> str:
    """What may stand there, where the type says it all."""
    names = [str(name) for name in get_args(annotation) if isinstance(name, str)]
    return f"one of {', '.join(names)}" if names else ""


def _with_papers(registry: Registry[Any], rows: Rows) -> Rows:
    """The rows with a column for the papers that their functions come from, where the registry names any."""
    papers = {entry.name: entry.facts.get("paper") or "-" for entry in registry}
    if set(papers.values()) <= {"-"}:
        return rows
    for row in rows:
        row["paper"], row["what"] = papers[row["name"]], row.pop("what")
    return rows


def _described(texts: Mapping[str, str]) -> Callable[[], Rows]:
    return lambda: [{"name": name, "what": what} for name, what in texts.items()]


def _controls() -> Rows:
    return _described(CONTROLS)() + _registered("orchestrator.tickets.controls", "CONTROLS")()


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
    "ticket": "start from a ticket's file, [tickets] ticket, and train",
}
LR_SCHEDULES = {
    "constant": "the same learning rate throughout",
    "step": "times lr_step_factor at each of lr_step_epochs",
    "linear": "down to lr_final_fraction in a straight line",
    "cosine": "down to lr_final_fraction along half a cosine (Loshchilov & Hutter, 2017)",
}
STRUCTURES = {
    "weight": "single weights (unstructured)",
    "neuron": "outputs of linear layers, with the weights that read them",
    "filter": "outputs of convolutions, with the weights that read them",
    "channel": "outputs of linear layers and convolutions alike, scored over all that makes and reads them",
    "head": "heads of nn.MultiheadAttention, with their part of its output projection",
    "layer": "whole layers that a skip connection passes by",
    "N:M": "N weights are kept of every M along the inputs, such as 2:4",
    "RxC": "blocks of R x C weights, such as 4x1",
}

RULES = {
    "intersection": "what every search keeps (Paganini & Forde, 2020)",
    "union": "what any search keeps",
    "at-least": "what at_least of the searches keep",
    "weighted": "what searches keep that hold half of [tickets] weights",
    "most-voted": "the weights with the most votes, as many as ticket_sparsity leaves; ties by mean rank",
}
CONTROLS = {
    "dense": "the unpruned model",
    "dense-long": "the unpruned model, trained for as many steps as the ticket and its search",
    "one-shot": "magnitude pruning of the trained model at once, to the ticket's count, then rewound as the ticket is",
    "imp": "for combined tickets: iterative magnitude pruning to the same count",
    "sibling": "the ticket trained again in another order of the data, for `tickets --stability`",
    "missing-the-mark": "shuffled, reinitialised and inverted (Frankle et al., 2021)",
}

assert RETRAIN.keys() == set(get_args(settings.Retrain))
assert PHASES.keys() == set(get_args(settings.Phase))
assert LR_SCHEDULES.keys() == set(get_args(settings.LrSchedule))
assert RULES.keys() == set(get_args(settings.Rule))
assert STRUCTURES.keys() == {"weight", *UNITS, "N:M", "RxC"}

KINDS: dict[str, Callable[[], Rows]] = {
    "criteria": _criteria,
    "scopes": _registered("orchestrator.pruning.allocation", "SCOPES"),
    "allocations": _registered("orchestrator.pruning.allocation", "ALLOCATIONS"),
    "structures": _described(STRUCTURES),
    "norms": _registered("orchestrator.pruning.structure", "NORMS"),
    "schedules": _registered("orchestrator.pruning.schedules", "SCHEDULES"),
    "retrain": _described(RETRAIN),
    "phases": _described(PHASES),
    "penalties": _registered("orchestrator.pruning.penalties", "PENALTIES"),
    "regrowths": _registered("orchestrator.pruning.regrow", "REGROW", "needs"),
    "rules": _described(RULES),
    "controls": _controls,
    "optimizers": _registered("orchestrator.training.optimizers", "OPTIMIZERS"),
    "lr-schedules": _described(LR_SCHEDULES),
    "settings": _settings,
    "samplers": _described(SAMPLERS),
    "objectives": _objectives,
    "metrics": _registered("orchestrator.tasks.metrics", "METRICS", "direction"),
    "tasks": _described(BUILTIN),
}
"""What `list` prints by kind; a registry joins with one line here."""
