"""What the ledger has of every class and group under a task as it is now, column by column: a study may be long."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from orchestrator.errors import QueryError, TaskError
from orchestrator.measures.accuracy import group_measure
from orchestrator.outcome import CONTROL_TRIAL, DENSE_TRIAL
from orchestrator.responsible.answers import Group, Ints, answer, groups_of, targets_of
from orchestrator.stages import Stages
from orchestrator.state import from_bytes
from orchestrator.tasks.load import LoadedTask

if TYPE_CHECKING:
    from orchestrator.study import Study

MOST_LISTED = 1000
"""States of which an account has rows; of more, so many in runs that are evenly spread over the record."""

MOST_FITTED = 5000
"""States that the class-accuracy model is fitted to, likewise."""

_SHORTEST_KEY = 6
_RUNS = 50


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A measured state, by its record."""

    key: str
    trial: int
    round: int
    seed: int
    sparsity: float
    accuracies: Mapping[str, float]
    """By the group's name."""


class Record:
    """What the ledger has of a study, for the task as it is now.

    Raises:
        TaskError: the task has changed since the study ran.
    """

    def __init__(self, study: Study, loaded: LoadedTask) -> None:
        self.study = study
        self.loaded = loaded
        self.split = "valid" if loaded.test is None else "test"
        self.notes: list[str] = []
        assert loaded.classes is not None
        self.targets = targets_of(loaded, self.split)
        self.groups: list[Group] = groups_of(self.targets, loaded.classes, loaded.groups.get(self.split, {}))
        self.supports = np.array([group.support for group in self.groups], dtype=np.int64)
        self._outcomes = study.store.outcomes(study.spec.name)
        self._read()

    def _read(self) -> None:
        names = ["trial", "round", "seed", "sparsity", "task_digest", "finished_at"]
        table = self._outcomes.table(names)
        self._trials, self._rounds, self._seeds = (
            np.asarray(table[name], dtype=np.int64) for name in ("trial", "round", "seed")
        )
        self._sparsities = np.asarray(table["sparsity"].to_numpy(), dtype=np.float64)
        ours = np.array([digest == self.loaded.info.digest for digest in table["task_digest"].to_pylist()], dtype=bool)
        some = self._trials != CONTROL_TRIAL
        others = int((some & ~ours).sum())
        if others and others == int(some.sum()):
            raise TaskError(
                f"the task {self.study.spec.task!r} has changed since the study ran: nothing can be compared"
            )
        if others:
            self.notes.append(f"{others} states were measured before the task changed and are left out")
        is_dense = (self._trials == DENSE_TRIAL) | (self._rounds == 0)
        when = np.nan_to_num(np.asarray(table["finished_at"].to_numpy(), dtype=np.float64))
        order = np.argsort(when, kind="stable")
        self.pruned: Ints = order[(ours & some & ~is_dense)[order]]
        """The rows of pruned states in the order in which they were measured."""
        self._dense_rows = order[(ours & some & is_dense)[order]]

    @cached_property
    def stages(self) -> Stages:
        """What runs the models."""
        return Stages(self.loaded, "cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def dense(self) -> dict[str, Outcome]:
        """The dense models by key."""
        return {one.key: one for one in self._of(self._dense_rows)}

    def others(self, chosen: Sequence[Outcome]) -> list[Outcome]:
        """The pruned states that were not chosen, or `MOST_LISTED` of them with a note that says so."""
        rows = _evenly(self.pruned, MOST_LISTED)
        if len(rows) < len(self.pruned):
            self.notes.append(
                f"rows has {len(rows):,} of {len(self.pruned):,} pruned states, evenly spread over them, and those "
                "that were looked at; a KEY or bounds show any other"
            )
        done = {one.key for one in chosen}
        return [one for one in self._of(rows) if one.key not in done]

    def fitted(self) -> list[Outcome]:
        """The pruned states that a model is fitted to: all of them, or `MOST_FITTED`."""
        return self._of(_evenly(self.pruned, MOST_FITTED))

    def chosen(self, key: str | None, where: Sequence[str], minimise: str | None) -> list[Outcome]:
        """The states of one point of the study, one for each seed; the one that is looked at first comes first."""
        if key is None:
            found = self.study.front(where, minimise)
            if not found.points or found.knee is None:
                raise QueryError(f"the study {self.study.spec.name!r} has no finished trial that may be chosen")
            point = found.points[0 if minimise else found.knee]
            key, trial, number = point["key"], point["trial"], point["round"]
            keys: Collection[str] | None = set(point["keys"])
        else:
            row = self._row(key)
            (one,) = self._of([row])
            key, trial, number, keys = one.key, one.trial, one.round, None
        rows = self.pruned[(self._trials[self.pruned] == trial) & (self._rounds[self.pruned] == number)]
        states = [one for one in self._of(rows) if keys is None or one.key in keys]
        if key not in {one.key for one in states}:
            raise QueryError(f"the state {key[:12]} was measured before the task changed; run the study again")
        return sorted(states, key=lambda one: (one.key != key, one.seed))

    def _row(self, key: str) -> int:
        """The row of the pruned state whose key begins so."""
        name = self.study.spec.name
        long = len(key) >= _SHORTEST_KEY
        begins = self._outcomes.starting_with(key) if long else []
        found = np.intersect1d(begins, self.pruned).tolist()
        if np.intersect1d(begins, self._dense_rows).size:
            raise QueryError(f"{key!r} is a dense model of {name!r}: a pruned one is compared with it")
        if not found:
            shown = f"`front` shows keys, {_SHORTEST_KEY} characters are enough"
            raise QueryError(f"no pruned state {key!r} in the study {name!r}; {shown}")
        if len(found) > 1:
            raise QueryError(f"{len(found)} states begin with {key!r}: give more of the key")
        return int(found[0])

    def dense_of(self, one: Outcome) -> Outcome | None:
        """The trained dense model that a state was pruned from; that of the study under its seed if it never was."""
        if self._own_dense:
            header = self.study.store.states.header(one.key) or {}
            for entry in reversed(json.loads(header.get("lineage", "[]"))):
                if entry["key"] in self.dense:
                    return self.dense[entry["key"]]
        return self._dense_by_seed.get(one.seed)

    @cached_property
    def _own_dense(self) -> bool:
        """Whether trials train dense models of their own, so that one seed has several."""
        return any(one.trial != DENSE_TRIAL for one in self.dense.values())

    @cached_property
    def _dense_by_seed(self) -> dict[int, Outcome]:
        return {one.seed: one for one in self.dense.values() if one.trial == DENSE_TRIAL}

    def run(self, key: str) -> Ints:
        """The answers of a state to every example of the split."""
        data = self.study.store.states.read(key)
        if data is None:
            name = self.study.store.name
            raise QueryError(f"the state {key[:12]} is no longer in the store {name}; run the study again")
        return answer(self.stages, from_bytes(data), self.split)

    def _of(self, rows: Sequence[int] | Ints) -> list[Outcome]:
        """The record of some rows; of a long one no more is read than the parts that hold them."""
        assert self.loaded.classes is not None
        prefix = "test_" if self.split == "test" else ""
        column, classes = f"{prefix}class_accuracy", self.loaded.classes
        labels = self.groups[len(classes) :]
        indices = [int(row) for row in rows]
        columns = ["key", column, *(["metrics"] if labels else [])]
        found = []
        for row, recorded in zip(indices, self._outcomes.rows(indices, columns) if indices else [], strict=True):
            values = dict(zip(classes, recorded[column] or [None] * len(classes), strict=True))
            metrics = json.loads(recorded["metrics"] or "{}") if labels else {}
            for group in labels:
                values[group.name] = metrics.get(
                    prefix + group_measure(group.of, group.name.removeprefix(f"{group.of}="))
                )
            found.append(
                Outcome(
                    key=recorded["key"],
                    trial=int(self._trials[row]),
                    round=int(self._rounds[row]),
                    seed=int(self._seeds[row]),
                    sparsity=float(self._sparsities[row]),
                    accuracies={name: float("nan") if value is None else value for name, value in values.items()},
                )
            )
        return found


def _evenly(rows: Ints, most: int) -> Ints:
    """At most so many of the rows, from the first to the last, in runs: rows are stored some thousand together."""
    if len(rows) <= most:
        return rows
    length = -(-most // _RUNS)
    starts = np.linspace(0, len(rows) - length, most // length).round().astype(np.int64)
    return rows[np.unique(starts[:, None] + np.arange(length))]
