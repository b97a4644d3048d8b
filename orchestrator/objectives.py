"""What a study may optimise: measures with a direction. Only the validation split steers; the test split never does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from orchestrator.errors import SpecError, UnknownName
from orchestrator.tasks.groups import GROUP_MEASURES
from orchestrator.tasks.info import TaskInfo

Direction = Literal["maximise", "minimise"]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A measure that a study optimises. `column` is its name in the ledger."""

    name: str
    column: str
    direction: Direction
    summary: str = ""


def _built_in(name: str, direction: Direction, summary: str, column: str = "") -> Objective:
    return Objective(name=name, column=column or name, direction=direction, summary=summary)


OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        _built_in("accuracy", "maximise", "on the validation split; a task's other metrics go by their own names"),
        _built_in("loss", "minimise", "mean loss on the validation split"),
        _built_in("worst_class_accuracy", "maximise", "the accuracy of the class that does worst"),
        _built_in("worst_group_accuracy", "maximise", "the accuracy of the group of Task(groups=...) that does worst"),
        _built_in("group_gap", "minimise", "the largest difference in accuracy between the labels of one group"),
        _built_in("sparsity", "maximise", "masked fraction of the prunable weights"),
        _built_in("params", "minimise", "non-zero parameters", "nonzero_params"),
        _built_in("flops", "minimise", "2 x MACs at batch 1, each layer by its kept fraction", "flops_effective"),
        _built_in("bytes", "minimise", "size of the fetched inference artefact"),
        _built_in("latency_ms", "minimise", "median time of one forward pass at batch 1 on the worker's device"),
    )
}

NOT_MEASURED = {
    "unit_sparsity": "a dense model and single weights have no units; legal: 'sparsity'",
    "flops_shrunk": "a model without removed units has none; legal: 'flops'",
}
"""Measures with a column that is not filled for every state, so that not all could be compared."""


def objectives(names: Sequence[str], info: TaskInfo) -> list[Objective]:
    """The objectives called `names` for a task; its metrics are objectives too.

    Raises:
        UnknownName: neither a built-in objective nor a metric of the task.
        SpecError: an objective on the test split, or one that the task does not measure.
    """
    metrics = dict(info.metrics)
    found = []
    for name in names:
        if name.startswith("test_"):
            raise SpecError(f"objective {name!r}: the test split is only ever reported; legal: {name[5:]!r}")
        if name in NOT_MEASURED:
            raise SpecError(f"objective {name!r}: {NOT_MEASURED[name]}")
        if name in metrics:
            if name in OBJECTIVES and name != "accuracy":
                raise SpecError(
                    f"objective {name!r} is a measure of Orchardist's own: the task's metric needs another name"
                )
            direction: Direction = "minimise" if metrics[name] == "minimise" else "maximise"
            found.append(Objective(name=name, column=name, direction=direction))
        elif name not in OBJECTIVES:
            raise UnknownName("objective", name, {*OBJECTIVES, *metrics})
        else:
            found.append(OBJECTIVES[name])
        if name == "accuracy" and name not in metrics:
            raise SpecError(f"objective 'accuracy': the task does not measure it; its metrics: {', '.join(metrics)}")
        if name == "worst_class_accuracy" and info.classes is None:
            raise SpecError("objective 'worst_class_accuracy': the task names no classes; give Task(classes=[...])")
        if name in GROUP_MEASURES and not info.groups:
            raise SpecError(f"objective {name!r}: the task names no groups; give Task(groups={{...}})")
    return found
