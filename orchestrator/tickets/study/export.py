"""A study's ticket as a small file of its own, to be tried elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import QueryError
from orchestrator.export import artefact
from orchestrator.header import read_header
from orchestrator.ops import Init
from orchestrator.retrieve import meant, refuse_folder
from orchestrator.stages import Stages
from orchestrator.state import State, from_bytes
from orchestrator.tasks.load import load
from orchestrator.tasks.source import collect
from orchestrator.tickets.ticket_file import Ticket, to_file_bytes, weights_sha256

if TYPE_CHECKING:
    from orchestrator.study import Study

TICKET = "ticket.safetensors"


def fetch_ticket(
    study: Study,
    key: str | None,
    folder: Path,
    *,
    where: Sequence[str] = (),
    minimise: str | None = None,
    recipe: bool = False,
) -> Path:
    """Write one ticket of a study into `folder` as `ticket.safetensors`; returns the file.

    Args:
        study: an opened study.
        key: of the trained ticket, or its first characters; None takes the front's knee, or the best by `minimise`.
        folder: is made where there is none.
        where: bounds for choosing from the front.
        minimise: the measure to choose by.
        recipe: write how the weights are made in the place of the weights.

    Raises:
        QueryError: no such state, it is no ticket, nothing keeps the bounds, or no recipe makes the weights again.
        InputError: `folder` cannot be written.
    """
    refuse_folder(folder)
    content = ticket_file(study, meant(study, key, where, minimise), recipe=recipe)
    artefact.write(folder / TICKET, content)
    return folder / TICKET


def ticket_file(study: Study, row: Mapping[str, Any], *, recipe: bool = False) -> bytes:
    """The ticket behind an outcome: its masks over the weights that it was trained from, how they were made, lineage.

    Args:
        study: an opened study.
        row: the outcome of the trained ticket.
        recipe: leave the weights out, which a model of the same task has again under the same init seed.

    Raises:
        QueryError: the outcome is no ticket's, its starting weights are gone, or they were trained and are left out.
    """
    record = _record(study, row["key"])
    data = study.state(row)
    lineage = json.loads(read_header(data)["lineage"])
    made = next(entry for entry in lineage if entry["op"] == "Init" and "task" not in entry)
    ancestor = _ancestor(study, record["ancestor"], made)
    if recipe and ancestor.position:
        raise QueryError(
            f"the ticket {row['key'][:12]} starts from weights that were trained for {ancestor.position} steps, which "
            "a recipe does not make again; legal: without --recipe"
        )
    masks = from_bytes(data).masks
    ticket = Ticket(
        masks=masks,
        weights=None if recipe else ancestor.weights,
        position=ancestor.position,
        recipe={
            "study": study.spec.name,
            "task": study.spec.task,
            "task_params": study.spec.task_params,
            "task_digest": row["task_digest"],
            "init": {"seed": made["seed"], "fresh": made.get("fresh", False)},
            "steps": ancestor.position,
            "weights_sha256": weights_sha256(ancestor.weights, masks),
        },
        lineage=lineage[:-1],
    )
    return to_file_bytes(ticket)


def _record(study: Study, key: str) -> dict[str, Any]:
    """What the driver recorded of the ticket whose trained state is `key`."""
    for event in study.store.table(study.spec.name, "events").to_pylist():
        if event["event"] == "tickets":
            for ticket in json.loads(event["detail"])["tickets"]:
                if ticket["key"] == key and ticket["rule"] == "from a file":
                    raise QueryError(f"the ticket {key[:12]} came from a file: {study.spec.tickets.ticket}")
                if ticket["key"] == key:
                    return dict(ticket)
    raise QueryError(f"{key[:12]} is no ticket of the study {study.spec.name!r}; `tickets` shows their keys")


def _ancestor(study: Study, key: str, made: Mapping[str, Any]) -> State:
    """The dense state whose weights the ticket starts from; an init is made again."""
    data = study.store.states.read(key)
    if data is not None:
        return from_bytes(data).without_optimizer()
    if made["key"] != key:
        raise QueryError(f"the state {key[:12]}, which the ticket starts from, is no longer in {study.store.name}")
    source = collect(study.spec.task, study.root, study.spec.checkpoint)
    stages = Stages(load(source, study.spec.task_params, study.root))
    if stages.loaded.info.digest != study.noted()["task_digest"]:
        raise QueryError(f"the task {study.spec.task!r} has changed since: the weights of the ticket cannot be made")
    return stages.run(Init(seed=made["seed"], fresh=made.get("fresh", False)), [])
