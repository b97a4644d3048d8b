"""What a study may optimise, and what it may not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.errors import InputError
from orchestrator.objectives import OBJECTIVES, Objective, objectives
from orchestrator.outcome import OUTCOME_COLUMNS
from orchestrator.tasks.groups import GROUP_MEASURES
from orchestrator.tasks.info import TaskInfo

INFO = TaskInfo(
    digest="t",
    layers=(),
    train_examples=1,
    metrics=(("accuracy", "maximise"), ("error", "minimise")),
    classes=("a", "b"),
)


def test_each_knows_its_direction_and_its_column() -> None:
    found = objectives(["accuracy", "flops", "error"], INFO)
    assert [(o.name, o.column, o.direction) for o in found] == [
        ("accuracy", "accuracy", "maximise"),
        ("flops", "flops_effective", "minimise"),
        ("error", "error", "minimise"),
    ]


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=lambda objective: str(objective.name))
def test_each_is_a_column_of_the_ledger_or_a_metric_and_says_what_it_is(objective: Objective) -> None:
    assert objective.column in OUTCOME_COLUMNS or objective.name in GROUP_MEASURES
    assert objective.summary and "test" not in objective.summary


@pytest.mark.parametrize(
    ("name", "info", "message"),
    [
        ("acuracy", INFO, "unknown objective 'acuracy'; did you mean 'accuracy'? Known: accuracy, bytes, error, "),
        ("test_accuracy", INFO, "the test split is only ever reported; legal: 'accuracy'"),
        ("accuracy", replace(INFO, metrics=(("error", "minimise"),)), "does not measure it; its metrics: error"),
        ("worst_class_accuracy", replace(INFO, classes=None), "the task names no classes; give Task(classes=[...])"),
        ("group_gap", INFO, "objective 'group_gap': the task names no groups; give Task(groups={...})"),
        ("unit_sparsity", INFO, "legal: 'sparsity'"),
        ("flops", replace(INFO, metrics=(("flops", "maximise"),)), "the task's metric needs another name"),
    ],
)
def test_refused(name: str, info: TaskInfo, message: str) -> None:
    with pytest.raises(InputError) as caught:
        objectives([name], info)
    assert message in str(caught.value)
