"""Every trial of a study: what was tried, how it ended, and what was measured after its last round."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from orchestrator import history
from orchestrator.outcome import MEASURES

if TYPE_CHECKING:
    from orchestrator.study import Study

MEASURED = ("key", "metrics", *MEASURES)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One proposal. Times are in seconds since 1970 UTC; None where nothing was noted."""

    number: int
    params: Mapping[str, Any]
    state: Literal["done", "failed", "stopped", "running"]
    """A trial without an ending counts as running, also while nobody runs it: the next `run` goes on with it."""
    values: Sequence[float] | None
    """Of the objectives, after the last round; means over seeds."""
    constraints: Mapping[str, float]
    reason: str
    """Why it failed."""
    keys: Sequence[str]
    """The states after the last round, one for each seed; none of trials that ended before these were noted."""
    measures: Mapping[str, float]
    """Means over these states; what one of them lacks is left out."""
    began: float | None
    ended: float | None


def trials(study: Study) -> list[Trial]:
    """All trials of a study in order of their numbers, the dense model and controls left out."""
    store, name = study.store, study.spec.name
    past = history.read(store, name)
    ended: dict[int, tuple[float, Sequence[str]]] = {}
    for row in history.rows(store.table(name, "events", ["event", "trial", "at", "detail"])):
        if row["event"] in ("done", "failed", "stopped"):
            ended[row["trial"]] = row["at"], json.loads(row["detail"] or "{}").get("keys", ())
    columns = store.table(name, "proposals", ["trial", "proposed_at"])
    began = dict(zip(columns["trial"].to_pylist(), columns["proposed_at"].to_pylist(), strict=True))
    wanted = {key for _, keys in ended.values() for key in keys}
    rows = history.rows(store.table(name, "outcomes", MEASURED))
    measured = {row["key"]: _measures(row) for row in rows if row["key"] in wanted}
    found = []
    for number, (params, _) in sorted(past.proposals.items()):
        ending = past.endings.get(number)
        at, keys = ended.get(number, (None, ()))
        found.append(
            Trial(
                number=number,
                params=params,
                state="running" if ending is None else ending.state,
                values=None if ending is None else ending.values,
                constraints={} if ending is None else ending.constraints,
                reason="" if ending is None else ending.reason,
                keys=keys,
                measures=_means([measured[key] for key in keys if key in measured]),
                began=began.get(number),
                ended=at,
            )
        )
    return found


def _measures(row: Mapping[str, Any]) -> dict[str, float]:
    metrics = json.loads(row["metrics"] or "{}")
    return {name: value for name, value in {**row, **metrics}.items() if isinstance(value, int | float)}


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    shared = [name for name in rows[0] if all(name in row for row in rows)] if rows else []
    return {name: fmean(row[name] for row in rows) for name in shared}
