"""The ticket file that a study starts from, as a state and as what a plan must know of it."""

from __future__ import annotations

from pathlib import Path

from orchestrator.errors import InputError
from orchestrator.header import read_header
from orchestrator.state import State
from orchestrator.tasks.info import GivenTicket, Layer
from orchestrator.tasks.source import Sent, sent_bytes
from orchestrator.tickets.ticket_file import from_file_bytes


def read_given(sent: Sent, root: Path | None = None) -> tuple[State, GivenTicket]:
    """The ticket's masks over the kept weights that it starts from, and what a plan must know of it.

    Raises:
        InputError: the file is no ticket, not what was written, or only says how its weights are made.
    """
    data = sent_bytes(sent, root)
    try:
        ticket = from_file_bytes(data)
    except InputError as error:
        raise InputError(f"{sent.kind} {sent.name!r}: {error}") from error
    if ticket.weights is None:
        raise InputError(
            f"{sent.kind} {sent.name!r} has a recipe for its weights, but not the weights; legal: a file that "
            "`fetch --ticket` wrote"
        )
    layers = tuple(Layer(name=name, shape=tuple(mask.shape)) for name, mask in ticket.masks.items())
    # Not the file's own hash: the same ticket may be written in another order.
    known = GivenTicket(sha256=read_header(data)["sha256"], layers=layers)
    return State(weights=ticket.weights, masks=ticket.masks, position=ticket.position), known
