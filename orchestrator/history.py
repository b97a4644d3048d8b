"""What a study's ledger says of its past: the trials that ended, those under way, and what was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from orchestrator.outcome import MEASURES
from orchestrator.store.store import Store
from search.pareto import Direction
from search.proposer import Told
from search.space import Fixed, Space
from search.stopping import NEVER, Brackets, Halving


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a trial ended, from its last event."""

    state: Literal["done", "failed", "stopped"]
    values: tuple[float, ...] | None
    constraints: Mapping[str, float]
    epochs: float
    stages: int
    reason: str = ""
    points: tuple[str, ...] = ()
    """How the keys of its points begin."""
    round: int = 0
    """The last one that it came to."""
    best: tuple[float, ...] = ()
    """Of each objective the best value after any round; nothing of a failed trial."""


Rung = tuple[int, tuple[float, ...], dict[str, float]]
"""Of how many rounds the trial was, the objectives' values, and how far each bound was violated."""


@dataclass(kw_only=True)
class History:
    """A study's past. `run` counts what all its drivers ran."""

    proposals: dict[int, tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=dict)
    """Parameters and the sampler's notes by trial."""
    endings: dict[int, Ending] = field(default_factory=dict)
    compared: dict[int, set[str]] = field(default_factory=dict)
    """What the tickets of each trial that is done are compared with, and what they become elsewhere: keys by trial."""
    rungs: dict[int, dict[int, Rung]] = field(default_factory=dict)
    """What trials had reached when they were compared, by trial and round."""
    added: list[tuple[dict[str, Any], tuple[float, ...], dict[str, float]]] = field(default_factory=list)
    """Shorter trials that the sampler was told of."""
    epochs_run: float = 0.0
    stages_run: int = 0
    outcomes: int = 0
    """How many outcomes there were when the last trial was done."""
    retries: dict[str, int] = field(default_factory=dict)
    """How often stages were tried again, by why."""
    shares: dict[str, float] = field(default_factory=dict)
    """The share of a GPU that stages were seen to need, by what names their like."""
    finished: bool = False
    """The last driver to end found nothing more to do."""

    def ask_for(self, space: Space) -> None:
        """Where the study asks for more rounds of every trial than it did, those that are done with fewer go on."""
        match space.parameter("rounds") if "rounds" in space.names else None:
            case Fixed(value=rounds):
                for number, (params, notes) in self.proposals.items():
                    if params.get("rounds", rounds) < rounds:
                        self.proposals[number] = {**params, "rounds": rounds}, notes
                        if number in self.endings and self.endings[number].round < rounds:
                            del self.endings[number]

    def told(self) -> list[Told]:
        """Every trial for the sampler. A failed one runs again, so to the sampler it is still running."""
        return [self._told(number) for number in sorted(self.proposals)]

    def _told(self, number: int) -> Told:
        params, attrs = self.proposals[number]
        ending = self.endings.get(number)
        if ending is None or ending.state == "failed":
            return Told(number=number, params=params, attrs=attrs, state="running")
        return Told(
            number=number,
            params=params,
            attrs=attrs,
            values=ending.values,
            constraints=ending.constraints,
            state=ending.state,
        )

    def unfinished(self, rule: Halving = NEVER) -> list[int]:
        """Trials that were proposed and are to go on: all but those that are done, or stopped at a rung of `rule`."""
        return [number for number in sorted(self.proposals) if not self._over(number, rule)]

    def _over(self, number: int, rule: Halving) -> bool:
        ending = self.endings.get(number)
        if ending is None:
            return False
        return ending.state == "done" or (ending.state == "stopped" and rule.is_rung(ending.round))

    def brackets(self, rule: Halving, directions: Sequence[Direction]) -> Brackets:
        """Who has come how far among the trials that need no more work."""
        brackets = Brackets(rule, directions)
        for number, ending in self.endings.items():
            if self._over(number, rule):
                for rung, (rounds, values, constraints) in self.rungs.get(number, {}).items():
                    if rule.is_rung(rung):
                        brackets.begin(number, rounds)
                        brackets.reached(number, rung, values, constraints)
                if ending.state == "done":
                    brackets.over(number)
        return brackets


def read(store: Store, study: str) -> History:
    """The study's past, from its proposals and events."""
    past = History()
    for row in rows(store.table(study, "proposals")):
        past.proposals[row["trial"]] = json.loads(row["params"]), json.loads(row["attrs"] or "{}")
    for row in rows(store.table(study, "events")):
        detail = json.loads(row["detail"] or "{}")
        match row["event"]:
            case "done" | "failed" | "stopped" as state:
                past.endings[row["trial"]] = ending(state, detail)
                past.outcomes = max(past.outcomes, detail.get("outcomes", 0))
            case "rung":
                reached = detail["of"], tuple(detail["values"]), detail["constraints"]
                past.rungs.setdefault(row["trial"], {})[detail["round"]] = reached
            case "tickets":
                past.compared[row["trial"]] = set(_compared(detail["tickets"]))
            case "shorter":
                past.added.append((detail["params"], tuple(detail["values"]), detail["constraints"]))
            case "started":
                past.finished = False
            case "ended":
                past.finished = detail.get("finished", False)
            case "tried again":
                past.retries[detail["kind"]] = past.retries.get(detail["kind"], 0) + 1
                if detail.get("like"):
                    past.shares[detail["like"]] = max(past.shares.get(detail["like"], 0.0), detail["gpus"])
            case "work":
                past.epochs_run += detail["epochs"]
                past.stages_run += detail["stages"]
    # With a damaged file a proposal may be gone: the trial is proposed again, and has yet to end.
    for number in past.endings.keys() - past.proposals.keys():
        del past.endings[number]
    return past


def ending(state: Literal["done", "failed", "stopped"], detail: Mapping[str, Any]) -> Ending:
    """The ending that an event's detail describes."""
    return Ending(
        state=state,
        values=tuple(detail["values"]) if detail.get("values") is not None else None,
        constraints=detail.get("constraints") or {},
        epochs=detail.get("epochs", 0.0),
        stages=detail.get("stages", 0),
        reason=detail.get("reason", ""),
        points=tuple(detail.get("points", ())),
        round=detail.get("round", 0),
        best=tuple(detail.get("best") or detail.get("values") or ()),
    )


def _compared(tickets: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for ticket in tickets:
        moved = ticket.get("transfers", ())
        yield from (other["key"] for other in moved)
        yield from (control["key"] for each in (ticket, *moved) for control in each["controls"])


def measured(store: Store, study: str, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, float | None]]]:
    """(key, values by column) of every outcome; a column that is no measure of its own is looked up in `metrics`."""
    own = [name for name in columns if name in MEASURES]
    other = [name for name in columns if name not in MEASURES]
    for row in rows(store.table(study, "outcomes", ["key", *own, *(["metrics"] if other else [])])):
        metrics = json.loads(row["metrics"] or "{}") if other else {}
        yield row["key"], {n: row[n] if n in MEASURES else metrics.get(n) for n in columns}


def rows(table: Any) -> Iterator[dict[str, Any]]:
    """The rows of an Arrow table as dicts, a batch at a time."""
    for batch in table.to_batches(max_chunksize=10_000):
        yield from batch.to_pylist()
