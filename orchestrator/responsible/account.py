"""The account of a study: what pruning did to every class and group, of one model in detail and of all by their record.

The models that are looked at are loaded from the store and run on the test split (on the validation split where there
is no other), each beside the dense model that it comes from, so that the same examples are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator.errors import InputError, QueryError, TaskError
from orchestrator.responsible import regression
from orchestrator.responsible.across import across_seeds, minority_contrast
from orchestrator.responsible.answers import (
    Disagreement,
    Ints,
    disagreements,
    pairs,
)
from orchestrator.responsible.covariates import RARE, ClassFacts, class_facts
from orchestrator.responsible.harm import Floats, Harm, judge, untested, wilson
from orchestrator.responsible.record import Outcome, Record
from orchestrator.tasks.load import load as load_task
from orchestrator.tasks.source import collect

if TYPE_CHECKING:
    from orchestrator.study import Study

METHODS = {
    "test": "exact McNemar (1947) on the same examples, two-sided, Holm (1979) over every group of one model",
    "interval": "95 %, Newcombe (1998) for paired proportions, method 10; for what is not tested, for independent ones",
    "accuracy_interval": "95 %, Wilson (1927)",
    "across_seeds": "95 %, paired Student-t over seeds, Holm over groups, five seeds at least",
    "minority": "paired Student-t over seeds and Student-t among classes, both below 5 %",
    "disagreements": "examples on which dense and pruned differ (Hooker et al., 2019); modal: the votes do",
}


def account(
    study: Study,
    key: str | None = None,
    *,
    where: Sequence[str] = (),
    minimise: str | None = None,
    learnt_above: float | None = None,
    told: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Who pays for the pruning, as plain data: the document that `orchardist responsible --format json` prints.

    Without a choice the knee of the front is looked at, and "rows" has every state of the study, or as many as
    `record.MOST_LISTED` of them; with one, its alone.

    Args:
        study: an opened study of a task with classes.
        key: the state to look at, or its first characters.
        where: bounds to choose it from the front by.
        minimise: the measure to choose it by.
        learnt_above: a class of which the dense model has no larger share right was never learnt; by default that of
            guessing.
        told: is given a line for each model that is run.

    Raises:
        QueryError: no such state, nothing keeps the bounds, or a state that is no longer in the store.
        TaskError: a task without classes, with several targets for each example, or changed since the study ran.
    """
    loaded = load_task(collect(study.spec.task, study.root, study.spec.checkpoint), study.spec.task_params, study.root)
    if loaded.classes is None:
        raise TaskError(f"task {study.spec.task!r} names no classes: give Task(classes=[...])")
    bound = 1 / len(loaded.classes) if learnt_above is None else learnt_above
    if not 0 <= bound < 1:
        raise InputError(f"learnt_above = {bound!r} must be a share from 0 to below 1")
    record = Record(study, loaded)
    chosen = record.chosen(key, where, minimise)
    compared = [_compare(record, one, bound) for one in _run_all(record, chosen, told)]
    rows = [row for each in compared for row in each.rows]
    if key is None and not where and minimise is None:
        rows += _recorded_rows(record, record.others(chosen), bound)
    facts = class_facts(loaded)
    differing = disagreements(record.targets, [one.dense for one in compared], [one.pruned for one in compared])
    first = compared[0]
    return {
        "study": study.spec.name,
        "split": record.split,
        "examples": int((record.targets >= 0).sum()),
        "chosen": {
            "key": chosen[0].key,
            "keys": [one.key for one in chosen],
            "seeds": [one.seed for one in chosen],
            "trial": chosen[0].trial,
            "round": chosen[0].round,
            "sparsity": chosen[0].sparsity,
            "dense_key": first.dense_key,
            "dense": _share_right(record.targets, first.dense),
            "pruned": _share_right(record.targets, first.pruned),
        },
        "rows": rows,
        "across_seeds": _across(record, compared),
        "minority": _minority(record, compared, facts),
        "disagreements": [_named(record, one) for one in differing],
        "model": _model(record, facts),
        "classes": _facts(loaded.classes, facts),
        "learnt_above": bound,
        "methods": METHODS,
        "notes": record.notes,
    }


@dataclass(frozen=True, kw_only=True)
class _Run:
    """A pruned model and its dense one with their answers (n,)."""

    outcome: Outcome
    dense_key: str
    dense: Ints
    pruned: Ints


@dataclass(frozen=True, kw_only=True)
class _Compared:
    """A run, judged."""

    dense_key: str
    dense: Ints
    pruned: Ints
    harms: list[Harm]
    rows: list[dict[str, Any]]


def _run_all(record: Record, chosen: Sequence[Outcome], told: Callable[[str], None]) -> list[_Run]:
    answers: dict[str, Ints] = {}
    wanted = []
    for one in chosen:
        dense = record.dense_of(one)
        if dense is None:
            raise QueryError(f"seed {one.seed} has no dense model in the study to compare {one.key[:12]} with")
        wanted.append((one, dense))
    keys = list(dict.fromkeys(key for one, dense in wanted for key in (dense.key, one.key)))
    for number, key in enumerate(keys, start=1):
        told(f"running model {number} of {len(keys)} on the {record.split} split: {key[:12]}")
        answers[key] = record.run(key)
    return [
        _Run(outcome=one, dense_key=dense.key, dense=answers[dense.key], pruned=answers[one.key])
        for one, dense in wanted
    ]


def _compare(record: Record, run: _Run, learnt_above: float) -> _Compared:
    tables = [pairs(group.rows, record.targets, run.dense, run.pruned) for group in record.groups]
    harms = judge(tables, learnt_above)
    one = run.outcome
    recorded = [one.accuracies[group.name] for group in record.groups]
    if not np.allclose(recorded, [harm.pruned for harm in harms], atol=1e-9, equal_nan=True):
        record.notes.append(f"{one.key[:12]} answers a little otherwise on this device than where it was measured")
    rows = _rows(record, [(one, run.dense_key)], harms)
    for row, table in zip(rows, tables, strict=True):
        row |= {"lost": table.lost, "won": table.won}
    return _Compared(dense_key=run.dense_key, dense=run.dense, pruned=run.pruned, harms=harms, rows=rows)


def _recorded_rows(record: Record, ones: Sequence[Outcome], learnt_above: float) -> list[dict[str, Any]]:
    """Rows for the states of `ones` by the record alone, all at once: there may be a thousand."""
    beside = [(one, dense) for one in ones if (dense := record.dense_of(one)) is not None]
    if not beside:
        return []
    before = np.concatenate([_values(record, dense) for _, dense in beside])
    after = np.concatenate([_values(record, one) for one, _ in beside])
    supports = np.tile(record.supports, len(beside))
    harms = untested(supports, before, after, learnt_above, models=len(beside))
    return _rows(record, [(one, dense.key) for one, dense in beside], harms)


def _values(record: Record, one: Outcome) -> Floats:
    return np.array([one.accuracies[group.name] for group in record.groups], dtype=np.float64)


def _rows(record: Record, ones: Sequence[tuple[Outcome, str]], harms: Sequence[Harm]) -> list[dict[str, Any]]:
    """One row for each state and group, with the intervals of both accuracies.

    Args:
        record: what the groups are.
        ones: states, each with the key of its dense model.
        harms: of every group of the first state, then of the next.
    """
    supports = np.array([harm.support for harm in harms])
    spans = {
        name: [bound.tolist() for bound in wilson(np.nan_to_num(shares) * supports, supports)]
        for name, shares in (
            ("dense", np.array([harm.dense for harm in harms])),
            ("pruned", np.array([harm.pruned for harm in harms])),
        )
    }
    places = [(one, dense_key, group) for one, dense_key in ones for group in record.groups]
    return [
        {
            "key": one.key,
            "sparsity": one.sparsity,
            "group": group.name,
            "support": harm.support,
            "dense": harm.dense,
            "pruned": harm.pruned,
            "change": harm.change,
            "low": harm.low,
            "high": harm.high,
            "verdict": harm.verdict,
            "of": group.of,
            "p": harm.p,
            "p_holm": harm.p_holm,
            **{f"{name}_low": lows[index] for name, (lows, _) in spans.items()},
            **{f"{name}_high": highs[index] for name, (_, highs) in spans.items()},
            "trial": one.trial,
            "round": one.round,
            "seed": one.seed,
            "dense_key": dense_key,
        }
        for index, ((one, dense_key, group), harm) in enumerate(zip(places, harms, strict=True))
    ]


def _across(record: Record, compared: Sequence[_Compared]) -> list[dict[str, Any]]:
    some = [index for index, support in enumerate(record.supports.tolist()) if support]
    changes = np.array([[one.harms[index].change for one in compared] for index in some])
    found = across_seeds(changes, record.supports[some].tolist())
    return [
        {"group": record.groups[index].name, "of": record.groups[index].of, **vars(mean), "verdict": verdict}
        for index, (mean, verdict) in zip(some, found, strict=True)
    ]


def _minority(
    record: Record, compared: Sequence[_Compared], facts: Sequence[ClassFacts] | None
) -> dict[str, Any] | None:
    """Whether the rare classes lose more than the others over the seeds; None where no class is rare."""
    if facts is None:
        return None
    some = [index for index in range(len(facts)) if record.supports[index]]
    rare = np.array([facts[index].share < RARE for index in some])
    if not rare.any() or rare.all():
        return None
    changes = np.array([[one.harms[index].change for one in compared] for index in some])
    found = minority_contrast(changes, rare, record.supports[some].tolist())
    of_rare, of_others = changes[rare].mean(axis=0), changes[~rare].mean(axis=0)
    return {
        "classes": [record.groups[index].name for index, is_rare in zip(some, rare.tolist(), strict=True) if is_rare],
        "rule": f"less than {RARE:g} of an equal share of the training rows",
        "change": float(of_rare.mean()),
        "change_of_others": float(of_others.mean()),
        "std": _std(of_rare),
        "std_of_others": _std(of_others),
        "difference": vars(found.over_seeds),
        "p_classes": found.p_classes,
        "claim": found.claim,
    }


def _std(values: Floats) -> float | None:
    return float(values.std(ddof=1)) if len(values) > 1 else None


def _named(record: Record, one: Disagreement) -> dict[str, Any]:
    assert record.loaded.classes is not None
    classes = record.loaded.classes
    labels = {
        group: given.names[int(given.codes[one.index])]
        for group, given in record.loaded.groups.get(record.split, {}).items()
    }
    names = {"target": classes[one.target], "dense": classes[one.dense], "pruned": classes[one.pruned]}
    return {"index": one.index, **names, **labels, "seeds": one.seeds, "modal": one.modal}


def _facts(classes: Sequence[str], facts: Sequence[ClassFacts] | None) -> list[dict[str, Any]]:
    return [] if facts is None else [{"class": name, **vars(fact)} for name, fact in zip(classes, facts, strict=True)]


def _model(record: Record, facts: Sequence[ClassFacts] | None) -> dict[str, Any]:
    """The class-accuracy model over every pruned state of the study and every class with examples."""
    assert record.loaded.classes is not None
    numbers = [
        number
        for number in range(len(record.loaded.classes))
        if record.supports[number] and (facts is None or facts[number].rows)
    ]
    fitted = record.fitted()
    runs = {seed: number for number, seed in enumerate(sorted({one.seed for one in fitted}))}
    seen: list[tuple[float, float, float, int, int]] = []
    for one in fitted:
        dense = record.dense_of(one)
        if dense is not None:
            before, after = _values(record, dense), _values(record, one)
            seen += [(after[c] - before[c], one.sparsity, before[c], c, runs[one.seed]) for c in numbers]
    table = np.array(seen, dtype=np.float64).reshape(-1, 5)
    table = table[np.isfinite(table).all(axis=1)]
    found = regression.fit(
        regression.Observations(
            change=table[:, 0],
            sparsity=table[:, 1],
            dense=table[:, 2],
            covariates={name: values[table[:, 3].astype(int)] for name, values in _covariates(facts).items()},
            class_=table[:, 3].astype(np.int64),
            run=table[:, 4].astype(np.int64),
        )
    )
    if found is None:
        return {"terms": [], "rows": len(table), "notes": ["too few states of different sparsity to fit a model"]}
    document = found.as_json()
    if len(fitted) < len(record.pruned):
        document["notes"].append(f"fitted to {len(fitted):,} of {len(record.pruned):,} states, evenly spread over them")
    return document


def _covariates(facts: Sequence[ClassFacts] | None) -> dict[str, Floats]:
    """The class covariates by name (classes,); those that are not known of the task are not there."""
    if facts is None:
        return {}
    with np.errstate(divide="ignore"):
        found = {"log share": np.log(np.array([fact.share for fact in facts]))}
    for name, values in (
        ("compressed bytes", [fact.compressed_bytes for fact in facts]),
        ("entropy", [fact.entropy_bits for fact in facts]),
    ):
        known = [value for value in values if value is not None]
        if len(known) == sum(fact.rows > 0 for fact in facts) and known:
            found[name] = np.array([float("nan") if value is None else value for value in values])
    return found


def _share_right(targets: Ints, predicted: Ints) -> float:
    counted = targets >= 0
    return float((predicted == targets)[counted].mean())
