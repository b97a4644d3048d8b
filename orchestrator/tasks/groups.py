"""The groups that a task's examples are in: labels for each row of a split, checked and numbered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.errors import TaskError

if TYPE_CHECKING:
    from torch import Tensor

    from orchestrator.tasks.task import Task

GROUP_MEASURES = ("worst_group_accuracy", "group_gap")
"""Measured where the task names groups."""


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The label of each row: `names[codes[i]]`. `names` are sorted and the same for every split, `codes` int64 (n,)."""

    names: tuple[str, ...]
    codes: Tensor


def labels_by_split(task: Task, rows: Mapping[str, int]) -> dict[str, dict[str, Labels]]:
    """The task's groups by split, then by name; nothing for a task without groups.

    Args:
        task: as the user gave it.
        rows: how many rows each of its evaluated splits has, by "valid" and "test".

    Raises:
        TaskError: a split without labels or with too many, a label that is neither a word nor a whole number, or a
            group with one label only.
    """
    groups = task.groups
    if not isinstance(groups, Mapping):
        raise TaskError(f'groups must be a dict such as {{"sex": {{"valid": [...]}}}}, not {type(groups).__name__}')
    if not groups:
        return {}
    if task.classes is None:
        raise TaskError("groups need classes: their measures count the examples that are predicted right")
    taken = [name for name in GROUP_MEASURES if name in task.metrics]
    if taken:
        raise TaskError(f"a metric cannot be called {taken[0]!r}: that name is taken by a measure of the groups")
    found: dict[str, dict[str, Labels]] = {split: {} for split in rows}
    for group, given in groups.items():
        labels = _words(str(group), given, rows)
        names = tuple(sorted({word for words in labels.values() for word in words}))
        if len(names) < 2:
            raise TaskError(f"groups[{group!r}] has one label only, {names[0]!r}: a group needs two to compare")
        for split, words in labels.items():
            found[split][str(group)] = Labels(names=names, codes=_codes(words, names))
    return found


def _words(group: str, given: Any, rows: Mapping[str, int]) -> dict[str, list[str]]:
    place = f"groups[{group!r}]"
    if not isinstance(given, Mapping) or set(given) != set(rows):
        wanted = " and ".join(map(repr, rows))
        has = ", ".join(map(repr, given)) if isinstance(given, Mapping) else type(given).__name__
        raise TaskError(f"{place} must hold the labels of {wanted}, one for each example; it holds {has or 'nothing'}")
    found = {}
    for split, count in rows.items():
        values = given[split].tolist() if hasattr(given[split], "tolist") else given[split]
        if isinstance(values, str) or not isinstance(values, (list, tuple)):
            kind = type(values).__name__
            raise TaskError(f"{place}[{split!r}] must be a sequence of labels or a tensor (n,), not {kind}")
        if len(values) != count:
            raise TaskError(f"{place}[{split!r}] has {len(values)} labels and {split} has {count} rows")
        for row, value in enumerate(values):
            if not isinstance(value, (str, int)):
                raise TaskError(f"{place}[{split!r}] holds {value!r} at row {row}: legal are words and whole numbers")
        found[split] = [str(value) for value in values]
    return found


def _codes(words: list[str], names: tuple[str, ...]) -> Tensor:
    import torch

    number = {name: index for index, name in enumerate(names)}
    return torch.tensor([number[word] for word in words], dtype=torch.int64)
