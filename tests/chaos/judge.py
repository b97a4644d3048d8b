"""What is left of a study that was disturbed, beside the undisturbed one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator import Study
from orchestrator.errors import OrchardistError
from orchestrator.state import State, from_bytes
from orchestrator.store.store import Store
from tests.orchestrator.pools import small

_OF_THE_DAY = {"seconds", "finished_at", "versions"}
"""What differs from run to run by its nature."""


@dataclass(kw_only=True)
class Witness:
    """What was durable at some moment: it must be there in the end."""

    states: set[str] = field(default_factory=set)
    outcomes: set[str] = field(default_factory=set)
    done: set[int] = field(default_factory=set)

    def look(self, url: str, name: str = "small") -> None:
        """Note what is there now."""
        store = Store(url)
        self.states |= _whole(store)
        self.outcomes |= set(store.table(name, "outcomes", ["key"])["key"].to_pylist())
        self.done |= _trials(store, name, "done").keys()


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The undisturbed study."""

    rows: Mapping[str, Mapping[str, Any]]
    models: Mapping[str, State]
    front: list[tuple[Any, ...]]
    params: list[tuple[int, str]]
    work: Mapping[str, int]
    """How often each stage was reported as run."""
    steps: int

    @classmethod
    def of(cls, study: Study, steps: int) -> Reference:
        """As the study stands now; its training took so many steps."""
        return cls(
            rows=_rows(study),
            models=small.models(study.store, study.spec.name),
            front=_front(study),
            params=_params(study),
            work=_work(study),
            steps=steps,
        )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One disturbed run of the study. `says` has a line for everything that is wrong."""

    faults: int
    lost: int
    """Finished stages that are gone, or were run again; outcomes and ended trials that are gone."""
    doubled: int
    """Rows that count twice."""
    keys: bool
    """The same proposals, keys, measures and front."""
    weights: bool
    steps_again: int
    says: tuple[str, ...] = ()

    @property
    def good(self) -> bool:
        return not self.says


def judge(
    url: str,
    reference: Reference,
    witness: Witness,
    *,
    faults: int,
    steps: int,
    most_again: float,
    name: str = "small",
    spoilt: frozenset[str] = frozenset(),
    ended_again: bool = False,
    says: tuple[str, ...] = (),
) -> Verdict:
    """Compare the study `name` at `url`, which has ended, with the undisturbed one.

    Args:
        url: the store.
        reference: the undisturbed study.
        witness: what was durable on the way.
        faults: how many were planted.
        steps: training steps taken in all.
        most_again: more steps than this must not have been taken twice.
        name: the study's.
        spoilt: keys of states whose files were damaged on purpose.
        ended_again: outcomes were damaged on purpose too, and trials that lost some are ended anew; the last time counts.
        says: what is known to be wrong already.
    """
    study = Study.open(url, name)
    wrong = list(says)

    def count(what: str, found: Any) -> int:
        if found:
            wrong.append(f"{what}: {_shown(found)}")
        return len(found)

    there = _whole(study.store)
    rows, trials = _rows(study), _trials(study.store, name, "done")
    again = {key for key, times in _work(study).items() if times > max(1, reference.work.get(key, 0))}
    lost = count("states lost", witness.states - there - spoilt)
    lost += count("outcomes lost", witness.outcomes - rows.keys())
    lost += count("ended trials lost", witness.done - trials.keys())
    lost += count("finished stages run again", again - spoilt)
    doubled = count("outcomes twice", _twice(study.store.table(name, "outcomes", ["key"])["key"].to_pylist()))
    doubled += count("proposals twice", _twice(_trials(study.store, name, "proposed").elements()))
    doubled += count("trials ended twice", {n for n, times in trials.items() if times > 1 and not ended_again})
    differing = count("proposals differ", set(_params(study)) ^ set(reference.params))
    differing += count("keys differ", rows.keys() ^ reference.rows.keys())
    differing += count(
        "measures differ", {key for key in rows.keys() & reference.rows.keys() if rows[key] != reference.rows[key]}
    )
    differing += count("points of the front differ", set(_front(study)) ^ set(reference.front))
    status = study.status()
    if (status["state"], status["trials"]["done"]) != ("done", len(reference.params)):
        differing += count("it has not come to its end", [f"{status['state']}, {status['trials']}"])
    steps_again = steps - reference.steps
    if steps_again > most_again:
        wrong.append(f"{steps_again} training steps were taken twice, of which at most {most_again:g} may be")
    other_weights = count("weights differ", _other_weights(study, reference))
    return Verdict(
        faults=faults,
        lost=lost,
        doubled=doubled,
        keys=not differing,
        weights=not other_weights,
        steps_again=steps_again,
        says=tuple(wrong),
    )


def _whole(store: Store) -> set[str]:
    """The keys of the states that are there and can be read."""
    keys = store.states.keys()
    return {key for key in keys if store.states.header(key) is not None}


def _other_weights(study: Study, reference: Reference) -> list[str]:
    """The keys whose states are not, bit for bit, the undisturbed ones. One that is gone is made again."""
    differing = []
    for row in study.table().to_pylist():
        if row["key"] in reference.models:
            try:
                same = small.same_bits(from_bytes(study.state(row)), reference.models[row["key"]])
            except (OrchardistError, ValueError) as error:
                differing.append(f"{row['key'][:12]} ({error})")
            else:
                differing += [] if same else [row["key"][:12]]
    return differing


def _rows(study: Study) -> dict[str, dict[str, Any]]:
    rows = study.table().to_pylist()
    return {row["key"]: {name: row[name] for name in row.keys() - _OF_THE_DAY} for row in rows}


def _front(study: Study) -> list[tuple[Any, ...]]:
    names = ("key", "trial", "round", "accuracy", "test_accuracy", "sparsity")
    return [tuple(point[name] for name in names) for point in study.front().points]


def _params(study: Study) -> list[tuple[int, str]]:
    rows = study.store.table(study.spec.name, "proposals", ["trial", "params"]).to_pylist()
    return sorted((row["trial"], row["params"]) for row in rows)


def _work(study: Study) -> Counter[str]:
    """How often each key was reported with training of its own."""
    events = study.store.table(study.spec.name, "events", ["event", "key", "detail"]).to_pylist()
    return Counter(
        row["key"] for row in events if row["event"] == "work" and json.loads(row["detail"]).get("epochs", 0) > 0
    )


def _trials(store: Store, name: str, what: str) -> Counter[int]:
    """How often each trial was proposed, or done."""
    if what == "proposed":
        return Counter(store.table(name, "proposals", ["trial"])["trial"].to_pylist())
    events = store.table(name, "events", ["event", "trial"]).to_pylist()
    return Counter(row["trial"] for row in events if row["event"] == what)


def _twice(found: Any) -> set[Any]:
    return {each for each, times in Counter(found).items() if times > 1}


def _shown(found: Any) -> str:
    names = sorted(each[:12] if isinstance(each, str) and len(each) == 64 else str(each) for each in found)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
