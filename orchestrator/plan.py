"""What a plan is: the small graph of stages that is one trial, with every choice resolved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from orchestrator.ops import Op, Train


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One stage of a plan and what is wanted of the state that it yields."""

    key: str
    op: Op
    parents: tuple[str, ...]
    task: str = ""
    """The name of the task that it runs in; empty: the study's own."""
    start: int = 0
    """For a Train op: the position where its run starts, in steps."""
    evaluated: bool = False
    stored: bool = False
    resumable: bool = False
    """The optimizer state is stored too, since training goes on from here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """A trained control of a ticket; of kinds that draw there may be several."""

    kind: str
    key: str
    draw: int = 0
    beside: str = ""
    """For a sibling: the state trained from the same start in the run's own order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Transferred:
    """A ticket of one task tried on another.

    Args:
        task: the other task's name.
        key: the ticket, trained there.
        start: the ticket in the other task's init, before training.
        ancestor: the same without its mask: the dense weights that it starts from there.
        controls: trained there as the ticket is.
    """

    task: str
    key: str
    start: str
    ancestor: str
    controls: tuple[Compared, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ticket:
    """A mask over the weights that it starts from, and what it is compared with.

    Args:
        round: of the trial.
        key: the trained ticket.
        start: the ticket before training.
        ancestor: the dense state whose weights it starts from.
        rule: how the searches' masks became one; empty for a single search.
        searches: the pruned states that were combined.
        depth: how many trainings follow one another on the way to the ticket.
        trainings: how many there were in all.
        controls: trained as the ticket is.
        transfers: the same ticket tried on other tasks.
    """

    round: int
    key: str
    start: str
    ancestor: str
    rule: str
    searches: tuple[str, ...]
    depth: int
    trainings: int
    controls: tuple[Compared, ...]
    transfers: tuple[Transferred, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The stages of one trial under one seed, each after its parents, and what it shows: (round, key) by round."""

    nodes: tuple[Node, ...]
    points: tuple[tuple[int, str], ...]
    steps_per_epoch: Mapping[str, int]
    """By task; empty: the study's own."""
    tickets: tuple[Ticket, ...] = ()

    @cached_property
    def steps_by_task(self) -> Mapping[str, int]:
        """Optimizer steps that the trial would take on its own, by task; a training that is cut counts once."""
        runs: dict[tuple[str, str, Train], int] = {}
        for node in self.nodes:
            if isinstance(node.op, Train):
                run = node.task, node.parents[0], replace(node.op, to=0)
                runs[run] = max(runs.get(run, 0), node.op.to - node.start)
        steps = {"": 0}
        for (task, _, _), taken in runs.items():
            steps[task] = steps.get(task, 0) + taken
        return steps

    @property
    def epochs(self) -> float:
        """Epochs of training that the trial would take on its own, in all tasks."""
        return sum(steps / self.steps_per_epoch[task] for task, steps in self.steps_by_task.items())

    @property
    def rounds(self) -> int:
        """The number of the last round that it shows."""
        return max((number for number, _ in self.points), default=0)

    def until(self, last: int) -> Plan:
        """The same trial ended after its round `last`, whose tickets are compared with nothing yet."""
        if last >= self.rounds:
            return self
        points = tuple((number, key) for number, key in self.points if number <= last)
        wanted = {key for _, key in points}
        nodes: list[Node] = []
        for node in reversed(self.nodes):
            if node.key in wanted:
                wanted.update(node.parents)
                nodes.append(node)
        return replace(self, nodes=tuple(reversed(nodes)), points=points, tickets=())

    @property
    def compared(self) -> dict[str, int]:
        """What tickets are compared with, and what they become on other tasks: the rounds by key. No points."""
        rounds: dict[str, int] = {}
        for ticket in self.tickets:
            moved = [key for other in ticket.transfers for key in (other.key, *(each.key for each in other.controls))]
            rounds |= dict.fromkeys([*(each.key for each in ticket.controls), *moved], ticket.round)
        return rounds


def merged(one: Node, other: Node) -> Node:
    """The same stage as two plans see it: every mark that either asks for."""
    return replace(
        one,
        evaluated=one.evaluated or other.evaluated,
        stored=one.stored or other.stored,
        resumable=one.resumable or other.resumable,
    )
