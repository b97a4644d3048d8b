"""A worker as the driver sees it, and which workers can make room for a larger one."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from orchestrator.graph import Segment

_HELD = 64


@dataclass(eq=False)
class Slot:
    """One worker: where it is, what it runs, and which states it lately held."""

    number: int
    actor: Any
    gpus: float
    coming: Any
    """What it will answer when it is ready; None once it is."""
    node: str = ""
    gpu: str = ""
    """Its number on the node."""
    leaving: bool = False
    """Its node is being drained: it gets no new stages."""
    idle_since: float = 0.0
    """When it last had nothing to do; while it is coming: since when it is asked for."""
    needed_at: float = 0.0
    """When a stage last needed that it has more of a GPU than usual."""
    running: deque[Segment] = field(default_factory=deque)
    stream: Any = None
    held: OrderedDict[str, None] = field(default_factory=OrderedDict)
    began: tuple[str, float] | None = None
    """The stage that it is at and since when, where stages have a time limit."""

    @property
    def idle(self) -> bool:
        """Whether it can be given something to do."""
        return self.coming is None and not self.running and not self.leaving

    def hold(self, key: str) -> None:
        """Note that it has made a state, which it is likely to have in memory for a while."""
        self.held[key] = None
        while len(self.held) > _HELD:
            self.held.popitem(last=False)


def give_way(slots: Iterable[Slot], wanted: float) -> list[Slot]:
    """Idle workers of one GPU in whose room one with the share `wanted` fits; none as long as there are too few."""
    beside: dict[tuple[str, str], list[Slot]] = {}
    for slot in slots:
        beside.setdefault((slot.node, slot.gpu), []).append(slot)
    for neighbours in beside.values():
        idle = [slot for slot in neighbours if slot.idle]
        if sum(slot.gpus for slot in idle) >= wanted:
            enough = next(n for n in range(1, len(idle) + 1) if sum(slot.gpus for slot in idle[:n]) >= wanted)
            return idle[:enough]
        if len(idle) == len(neighbours):
            return idle  # what is left over of the GPU is free then
    return []
