"""The way to a pruned model: each pruning, what it removed, what it cost, and what retraining gave back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.measures.accuracy import evaluate
from orchestrator.pruning.criteria import CRITERIA
from orchestrator.pruning.masks import sparsity
from orchestrator.state import State, from_bytes

if TYPE_CHECKING:
    from orchestrator.stages import Stages
    from orchestrator.store.states import States

MOST_MEASURED = 64
"""Prunings of one lineage that are measured: the last ones. Gradual pruning has hundreds, each with little to tell."""

HOW = ("criterion", "scope", "structure", "rate", "sparsity", "threshold", "unit_sparsity", "flops_budget")
"""What a pruning is told by, as far as its op names it."""

CHANGES_MASKS = ("Prune", "Regrow", "Combine", "Control", "Transfer")

Entry = Mapping[str, Any]


def prunings(lineage: Sequence[Entry], states: States, stages: Stages) -> dict[str, Any]:
    """What each pruning of a lineage did, measured on the validation split, in order.

    A model right after pruning is not in the store: it is the one before under the mask of the one after, but where the
    criterion moves the weights it keeps. What cannot be had any more is None.

    Args:
        lineage: the stages behind a state, each after its parents, the state's own last.
        states: where the states on the way are.
        stages: of the task that the state itself is of; what was done on others is left out.

    Returns:
        "metric", "split" and "prunings": "key", "how", weights "kept_before", "kept" and "of", "sparsity", and by the
        metric "before", "pruned", "cost" (pruned - before), "retrained", "gave_back" (retrained - pruned).
    """
    metric = next(iter(stages.loaded.metrics))
    home = lineage[-1].get("task") if lineage else None
    task = [entry for entry in lineage if entry.get("task") == home]  # those on other tasks have other metrics
    entries = [entry for entry in task if entry["op"] == "Prune"]
    read = _Reader(states)
    found = []
    for entry in entries[-MOST_MEASURED:]:
        before = read(entry["from"][0])
        after, last = _afterwards(entry, task, read)
        pruned = None
        if before is not None and after is not None:
            own = read(entry["key"])
            pruned = own or (None if _moves(entry) else State(weights=before.weights, masks=after.masks).masked())
        values = {
            "before": _score(stages, metric, before),
            "pruned": _score(stages, metric, pruned),
            "retrained": _score(stages, metric, last),
        }
        found.append(_told(entry, stages, before, after, values))
    return {"metric": metric, "split": "valid", "prunings": found, "left_out": max(0, len(entries) - MOST_MEASURED)}


def rows(history: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The prunings as a table of words, one row each."""
    metric, first = history["metric"], history["left_out"] + 1
    return [
        {
            "pruning": number,
            "how": ", ".join(str(value) for value in one["how"].values()),
            "weights removed": "" if one["removed"] is None else f"{one['removed']:,}",
            "sparsity": "" if one["sparsity"] is None else f"{one['sparsity']:.4f}",
            f"{metric} before": _shown(one["before"]),
            "pruned": _shown(one["pruned"]),
            "cost": _signed(one["cost"]),
            "retrained": _shown(one["retrained"]),
            "gave back": _signed(one["gave_back"]),
        }
        for number, one in enumerate(history["prunings"], start=first)
    ]


class _Reader:
    """Reads states, and remembers the last few: one pruning's end is the next one's beginning."""

    def __init__(self, states: States) -> None:
        self._states = states
        self._held: dict[str, State | None] = {}

    def __call__(self, key: str) -> State | None:
        if key not in self._held:
            data = self._states.read(key)
            self._held[key] = None if data is None else from_bytes(data).without_optimizer()
            while len(self._held) > 4:
                del self._held[next(iter(self._held))]
        return self._held[key]


def _afterwards(entry: Entry, lineage: Sequence[Entry], read: _Reader) -> tuple[State | None, State | None]:
    """The first state that is there under the pruning's mask, and the one that its retraining ended in."""
    first, last = read(entry["key"]), None
    for follower in _followers(entry, lineage):
        state = read(follower["key"])
        first = first or state
        last = state if follower["op"] in ("Train", "Recalibrate") else last
    return first, last


def _followers(entry: Entry, lineage: Sequence[Entry]) -> Iterator[Entry]:
    """What came of a pruning until masks changed again."""
    keys = {entry["key"]}
    for other in lineage:
        if keys & set(other["from"]) and other["op"] not in CHANGES_MASKS:
            keys.add(other["key"])
            yield other


def _moves(entry: Entry) -> bool:
    """Whether the criterion changes the weights that it keeps."""
    name = entry["criterion"]
    facts = CRITERIA[name].facts if name in CRITERIA else {}
    return bool(facts.get("compensate") or facts.get("solve"))


def _score(stages: Stages, metric: str, state: State | None) -> float | None:
    if state is None:
        return None
    loaded = stages.loaded
    model = stages.model_of(state.masked())
    found = evaluate(model, loaded.valid, loaded.task.loss, loaded.metrics, device=stages.device, step=loaded.task.step)
    value = found[metric]
    return value if isinstance(value, float) else None


def _told(
    entry: Entry, stages: Stages, before: State | None, after: State | None, values: Mapping[str, float | None]
) -> dict[str, Any]:
    sizes = {layer.name: layer.size for layer in stages.loaded.info.layers}
    whole = sum(sizes.values())
    shares = [None if state is None else sparsity(state.masks, sizes) for state in (before, after)]
    kept = [None if share is None else round((1 - share) * whole) for share in shares]
    return {
        "key": entry["key"],
        "how": {name: entry[name] for name in HOW if entry.get(name) not in (None, "")},
        "kept_before": kept[0],
        "kept": kept[1],
        "removed": None if kept[0] is None or kept[1] is None else kept[0] - kept[1],
        "of": whole,
        "sparsity": shares[1],
        **values,
        "cost": _difference(values["pruned"], values["before"]),
        "gave_back": _difference(values["retrained"], values["pruned"]),
    }


def _difference(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else after - before


def _shown(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.4f}"
