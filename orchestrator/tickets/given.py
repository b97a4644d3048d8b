"""The ticket file that a study starts from, as a state and as what a plan must know of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import InputError
from orchestrator.header import read_header
from orchestrator.ops import Init
from orchestrator.state import State
from orchestrator.tasks.info import GivenTicket, Layer
from orchestrator.tasks.source import Sent, sent_bytes
from orchestrator.tickets.ticket_file import Ticket, from_file_bytes, weights_sha256

if TYPE_CHECKING:
    from orchestrator.stages import Stages

WITH_WEIGHTS = "legal: a file with the weights, as `fetch --ticket` writes it without --recipe"


def read_given(sent: Sent, root: Path | None = None) -> tuple[Ticket, GivenTicket]:
    """The ticket in the file, and what a plan must know of it.

    Raises:
        InputError: the file is no ticket, not what was written, or has neither weights nor a recipe that makes them.
    """
    data = sent_bytes(sent, root)
    try:
        ticket = from_file_bytes(data)
        if ticket.weights is None:
            _init_of(ticket)
    except InputError as error:
        raise InputError(f"{sent.kind} {sent.name!r}: {error}") from error
    layers = tuple(Layer(name=name, shape=tuple(mask.shape)) for name, mask in ticket.masks.items())
    # Not the file's own hash: the same ticket may be written in another order.
    known = GivenTicket(sha256=read_header(data)["sha256"], layers=layers)
    return ticket, known


def start_of(ticket: Ticket, stages: Stages, name: str) -> State:
    """The ticket's masks over the kept weights that it starts from.

    Weights that the file only has a recipe for are those of the study's own model under the recipe's init seed, where
    they are the same to the bit.

    Args:
        ticket: as `read_given` returns it.
        stages: of the study's own task.
        name: of the file.

    Raises:
        InputError: the model does not have the ticket's weights under that seed.
    """
    weights = ticket.weights
    if weights is None:
        init, wanted = _init_of(ticket)
        weights = stages.run(init, []).weights
        fits = all(n in weights and weights[n].shape == mask.shape for n, mask in ticket.masks.items())
        if not fits or weights_sha256(weights, ticket.masks) != wanted:
            raise InputError(
                f"ticket {name!r} has a recipe in the place of its weights, and this study's model does not start from "
                f"them under init seed {init.seed}{_why(ticket, stages)}; {WITH_WEIGHTS}"
            )
    return State(weights=weights, masks=ticket.masks, position=ticket.position).masked()


def _init_of(ticket: Ticket) -> tuple[Init, str]:
    """The init that a recipe names, and the hash of its weights under the masks."""
    recipe: Any = ticket.recipe
    if ticket.position or recipe.get("steps"):
        raise InputError(
            f"its weights were trained for {ticket.position or recipe['steps']} steps, which its recipe does not make "
            f"again; {WITH_WEIGHTS}"
        )
    try:
        init, wanted = recipe["init"], recipe["weights_sha256"]
        return Init(seed=int(init["seed"]), fresh=bool(init["fresh"])), str(wanted)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"its recipe does not say how its weights are made: no init seed, or no hash of them; {WITH_WEIGHTS}"
        ) from error


def _why(ticket: Ticket, stages: Stages) -> str:
    here, there = stages.loaded.info.digest, str(ticket.recipe.get("task_digest", "unknown"))
    task = ticket.recipe.get("task", "unknown")
    return (
        "" if here == there else f": it was found on the task {task!r} of digest {there[:12]}, here it is {here[:12]}"
    )
