"""What a report on pruning should say (Blalock et al., 2020, arXiv 2003.03033), and whether a study says it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.objectives import Objective

State = Literal["met", "in part", "missing", "yours to say"]

OPERATING_POINTS = (2, 4, 8, 16, 32)
LEAST_POINTS = 5
LEAST_SEEDS = 3
LEAST_PAIRS = 3
NEAR = 1.25
"""A point within this ratio of an operating point stands for it."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One rule, whether it is met, and by what, or what is missing."""

    rule: str
    state: State
    says: str


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the checklist looks at.

    Args:
        task: its name in the study.
        builtin: the line on a built-in task; "" for another one.
        valid_examples: of the validation split.
        test_examples: of the test split; None or 0 without one.
        seeds: how many each proposal ran under.
        objectives: of the study.
        dense: the dense model's point.
        points: the front.
        ratios: compression ratio of every measured point.
        mixes: pruning choices (criterion and scope) that finished trials ran with.
        starts: by seed, the initial states behind the front's models; empty where no file says.
        retraining: names of the settings of training and retraining that differ between trials.
        versions: of libraries and devices, each distinct set once.
    """

    task: str
    builtin: str
    valid_examples: int | None
    test_examples: int | None
    seeds: int
    objectives: Sequence[Objective]
    dense: Mapping[str, Any] | None
    points: Sequence[Mapping[str, Any]]
    ratios: Sequence[float]
    mixes: Sequence[tuple[str, str]]
    starts: Mapping[int, frozenset[str]]
    retraining: Sequence[str]
    versions: Sequence[Mapping[str, Any]]


def checklist(facts: Facts) -> list[Item]:
    """Every rule of the checklist for one study, in the paper's order."""
    return [
        _named(facts),
        _pairs(facts),
        _metric(facts),
        _sizes(facts),
        _raw_and_delta(facts),
        _top_five(facts),
        _curve(facts),
        _seeds(facts),
        _baseline("random", facts),
        _baseline("magnitude", facts),
        _starts(facts),
        _retraining(facts),
        _versions(facts),
        Item(
            rule="Code that repeats it", state="yours to say", says="The study file is below; the task's code is not."
        ),
    ]


def _named(facts: Facts) -> Item:
    rule = "Data set and architecture named exactly"
    layers = ", ".join(f"{name} ({total:,})" for name, (_, total) in (facts.dense or {}).get("layers", {}).items())
    total = (facts.dense or {}).get("total_params")
    built = f"{total:,} parameters; prunable: {layers}. " if total and layers else "The architecture is not recorded. "
    if facts.builtin:
        state: State = "met" if layers else "in part"
        return Item(rule=rule, state=state, says=f"{facts.task}: {facts.builtin}. {built}")
    return Item(rule=rule, state="in part", says=f"{built}Which data the task {facts.task!r} loads is yours to say.")


def _pairs(facts: Facts) -> Item:
    says = f"One study is one pair of data set and architecture; {LEAST_PAIRS} are asked for."
    toy = " Built-in tasks are small: the paper asks for more than these." if facts.builtin else ""
    return Item(rule=f"At least {LEAST_PAIRS} pairs, not toy data alone", state="missing", says=says + toy)


def _metric(facts: Facts) -> Item:
    rule = "Metric and split named, and a test split that chose nothing"
    names = ", ".join(objective.name for objective in facts.objectives)
    if not facts.test_examples:
        return Item(rule=rule, state="in part", says=f"{names} on validation; there is no test split.")
    says = f"{names} on {facts.valid_examples or 0:,} validation examples choose; {facts.test_examples:,} test examples"
    return Item(rule=rule, state="met", says=f"{says} are reported only.")


def _sizes(facts: Facts) -> Item:
    rule = "Compression ratio and theoretical speed-up, both original over new"
    have = [name for name in ("compression_ratio", "theoretical_speedup") if _all_have(facts.points, name)]
    if len(have) < 2:
        return Item(rule=rule, state="missing" if not have else "in part", says=_recorded(facts.points, have))
    ranges = (f"{n.replace('_', ' ')} {_least(facts, n):.3g}× to {_most(facts, n):.3g}×" for n in have)
    return Item(rule=rule, state="met", says="On the front: " + ", ".join(ranges) + ".")


def _raw_and_delta(facts: Facts) -> Item:
    rule = "Raw accuracy and change against dense"
    if facts.dense is None or "accuracy" not in facts.dense:
        return Item(rule=rule, state="missing", says="The accuracy of the dense model is not recorded.")
    if not _all_have(facts.points, "accuracy"):
        return Item(rule=rule, state="missing", says=_recorded(facts.points, []))
    return Item(rule=rule, state="met", says="Both are in the table of chosen models.")


def _top_five(facts: Facts) -> Item:
    rule = "Top-1 and top-5 accuracy"
    names = [name for name in facts.dense or {} if "top5" in name.lower().replace("_", "").replace("-", "")]
    if names:
        return Item(rule=rule, state="met", says=f"Also measured: {', '.join(names)}.")
    return Item(rule=rule, state="missing", says="No top-5 metric; a task can measure one in Task(metrics=...).")


def _curve(facts: Facts) -> Item:
    rule = f"The whole curve, {LEAST_POINTS} operating points or more"
    own = sorted({round(p["compression_ratio"], 2) for p in facts.points if "compression_ratio" in p})
    near = [at for at in OPERATING_POINTS if any(at / NEAR <= ratio <= at * NEAR for ratio in facts.ratios)]
    lacking = [f"{at}×" for at in OPERATING_POINTS if at not in near]
    says = f"{len(own)} compression ratios on the front. "
    says += f"Nothing was measured near {', '.join(lacking)}." if lacking else "2, 4, 8, 16 and 32× were all measured."
    state: State = "missing" if not own else "met" if len(own) >= LEAST_POINTS and not lacking else "in part"
    return Item(rule=rule, state=state, says=says)


def _seeds(facts: Facts) -> Item:
    rule = f"Mean and standard deviation over {LEAST_SEEDS} seeds or more"
    if facts.seeds >= LEAST_SEEDS:
        return Item(rule=rule, state="met", says=f"{facts.seeds} seeds; the table has means, deviations and intervals.")
    many = "1 seed: no deviation" if facts.seeds == 1 else f"{facts.seeds} seeds"
    return Item(
        rule=rule, state="missing" if facts.seeds == 1 else "in part", says=f"{many}; {LEAST_SEEDS} are asked for."
    )


def _baseline(criterion: str, facts: Facts) -> Item:
    rule = f"{criterion.capitalize()} pruning as a baseline, globally and layer by layer"
    scopes = sorted({scope for name, scope in facts.mixes if name == criterion})
    if not scopes:
        return Item(rule=rule, state="missing", says=f"No finished trial pruned by {criterion!r}.")
    lacking = [scope for scope in ("global", "layer") if scope not in scopes]
    if lacking:
        return Item(
            rule=rule, state="in part", says=f"Run with scope {', '.join(scopes)}; not with {', '.join(lacking)}."
        )
    return Item(rule=rule, state="met", says=f"Run with scope {', '.join(scopes)}.")


def _starts(facts: Facts) -> Item:
    rule = "The same initial weights for all that are compared"
    if not facts.starts:
        return Item(rule=rule, state="yours to say", says="The states of the front are no longer in the store.")
    several = [seed for seed, keys in facts.starts.items() if len(keys) > 1]
    if several:
        return Item(
            rule=rule, state="missing", says=f"Seeds with several initial states: {', '.join(map(str, several))}."
        )
    named = ", ".join(f"seed {seed}: {next(iter(keys))[:12]}" for seed, keys in sorted(facts.starts.items()))
    return Item(rule=rule, state="met", says=f"One initial state for each seed behind the front ({named}).")


def _retraining(facts: Facts) -> Item:
    rule = "The same training and fine-tuning for all that are compared"
    if facts.retraining:
        says = f"These differ between trials, as parameters of the search: {', '.join(facts.retraining)}."
        return Item(rule=rule, state="in part", says=says)
    return Item(rule=rule, state="met", says="All trials share the settings in the study file.")


def _versions(facts: Facts) -> Item:
    rule = "Versions and hardware"
    told = "; ".join(", ".join(f"{name} {value}" for name, value in each.items()) for each in facts.versions if each)
    if not told:
        return Item(rule=rule, state="missing", says="None are recorded.")
    several = len(facts.versions) > 1
    return Item(rule=rule, state="in part" if several else "met", says=("A mix: " if several else "") + told + ".")


def _all_have(points: Sequence[Mapping[str, Any]], name: str) -> bool:
    return bool(points) and all(name in point for point in points)


def _recorded(points: Sequence[Mapping[str, Any]], have: Sequence[str]) -> str:
    if not points:
        return "There is no front yet."
    return f"Recorded of the front: {', '.join(have)}." if have else "Not recorded of the front."


def _least(facts: Facts, name: str) -> float:
    return min(float(point[name]) for point in facts.points)


def _most(facts: Facts, name: str) -> float:
    return max(float(point[name]) for point in facts.points)
