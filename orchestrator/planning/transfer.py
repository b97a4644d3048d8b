"""Tickets on other tasks in a plan: each beside controls that are trained there as it is; and tickets from a file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from orchestrator.errors import PlanError
from orchestrator.ops import Given, Transfer
from orchestrator.plan import Compared, Ticket, Transferred
from orchestrator.planning import sharing
from orchestrator.planning import tickets as ticket_plan
from orchestrator.planning.builder import Builder
from orchestrator.settings import OtherTask, Settings


def carry_over(builder: Builder, settings: Settings) -> None:
    """Try the plan's tickets on the tasks of `transfer_to`, those of the rounds that are compared at all.

    Raises:
        PlanError: a task shares no prunable tensor with the study's own.
    """
    tasks = [task for task in settings.tickets.tasks if task.label in settings.tickets.transfer_to]
    for place, ticket in enumerate(builder.tickets):
        if ticket_plan.is_compared(settings, ticket.round):
            tried = tuple(_tried(builder, settings, task, ticket) for task in tasks)
            builder.tickets[place] = replace(ticket, transfers=tried)


def given(builder: Builder, settings: Settings) -> list[tuple[int, str]]:
    """The ticket of a file, on the study's own task, beside controls there.

    A file has only the kept weights, so that controls with other masks are drawn over the task's own init.

    Raises:
        PlanError: the ticket masks no tensor that the task's model has.
    """
    ticket = builder.info.ticket
    assert ticket is not None
    if not sharing.shared(builder.info.layers, ticket.layers):
        raise PlanError(
            f"the ticket masks {sharing.described(ticket.layers)}; no prunable tensor of the task has the same name "
            f"and shape: {sharing.described(builder.info.layers)}"
        )
    init = builder.init()
    start = builder.add(Transfer(), [builder.add(Given(sha256=ticket.sha256), []), init])
    trained = builder.show(builder.train_on(start, to=builder.end))
    ticket_plan.compare(builder, settings, 1, start, trained, init)
    builder.tickets[-1] = replace(builder.tickets[-1], rule="from a file")
    return [(1, trained)]


def _tried(builder: Builder, settings: Settings, task: OtherTask, ticket: Ticket) -> Transferred:
    """One ticket on one task. Its weights go along, so that it starts there as it does at home."""
    common = sharing.body(builder.info, [task])
    there = builder.on(task.label)
    with sharing.naming(task.label):
        settings = sharing.protecting(settings, there.info, common)
        start, ancestor = (
            there.add(Transfer(leave=task.leave), [key, there.init()]) for key in (ticket.start, ticket.ancestor)
        )
        trained = there.show(there.train_on(start, to=there.end))
        home = _rewind_point(builder, there, ticket.ancestor)
        rounds = ticket.round * max(1, len(ticket.searches))
        controls = [
            compared
            for kind in settings.tickets.transfer_controls
            for compared in _compared(there, settings, kind, rounds, start, trained, ancestor, home)
        ]
    return Transferred(task=task.label, key=trained, start=start, ancestor=ancestor, controls=tuple(controls))


def _compared(
    there: Builder, settings: Settings, kind: str, rounds: int, start: str, trained: str, ancestor: str, home: str
) -> Iterator[Compared]:
    """The trained states of one kind of control. Masks that the task finds go over its own weights, those at `home`."""
    if kind == "dense-transferred":
        yield Compared(kind=kind, key=there.show(there.train_on(ancestor, to=there.end)))
    elif kind == "imp":
        yield Compared(kind=kind, key=ticket_plan.imp(there, settings, rounds, start, home))
    else:
        over = home if kind == "one-shot" else ancestor
        yield from ticket_plan.compared(there, settings, kind, rounds, start, trained, over)


def _rewind_point(builder: Builder, there: Builder, ancestor: str) -> str:
    """The dense state of the other task as far into its training as the ancestor is into the study's own."""
    step = round(builder.position(ancestor) / builder.steps_per_epoch * there.steps_per_epoch)
    return there.train_on(there.init(), to=step, stored=True, resumable=True) if step else there.init()
