"""What each model answers to each example of a split, and on which of them two models disagree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from orchestrator.errors import TaskError
from orchestrator.measures.accuracy import predict
from orchestrator.responsible.harm import Pairs
from orchestrator.stages import Stages
from orchestrator.state import State
from orchestrator.tasks.groups import Labels
from orchestrator.tasks.load import LoadedTask, isolated
from orchestrator.training.loop import arithmetic

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Some of the examples of a split, all of one class or one label.

    Args:
        name: the class, or "sex=f".
        of: "class", or the name of the group: "sex".
        rows: whether each example belongs to it (n,).
    """

    name: str
    of: str
    rows: Bools

    @property
    def support(self) -> int:
        """Its examples."""
        return int(self.rows.sum())


@dataclass(frozen=True, kw_only=True)
class Disagreement:
    """An example on which the dense and the pruned model differ (Hooker et al., 2019).

    Args:
        index: its row in the split.
        target: the class that is right.
        dense: the class that the dense model predicts.
        pruned: the class that the pruned model predicts.
        seeds: under how many seeds the two predict different classes.
        modal: whether the class that most dense models predict is not the one that most pruned models do.
    """

    index: int
    target: int
    dense: int
    pruned: int
    seeds: int
    modal: bool


def answer(stages: Stages, state: State, split: str) -> Ints:
    """The class that the state's model predicts for each example of the split "valid" or "test" (n,)."""
    loaded = stages.loaded
    rows = loaded.test if split == "test" else loaded.valid
    assert rows is not None
    with isolated(0), arithmetic(stages.device):
        predicted, _ = predict(stages.model_of(state), rows, stages.device)
    return _one_each(predicted)


def targets_of(loaded: LoadedTask, split: str) -> Ints:
    """The class of each example of the split (n,), -100 where it counts nowhere.

    Raises:
        TaskError: examples with several targets each.
    """
    rows = loaded.test if split == "test" else loaded.valid
    assert rows is not None
    return _one_each(torch.cat([targets.to("cpu") for _, targets in rows.batches(1024)]))


def groups_of(targets: Ints, classes: Sequence[str], labels: dict[str, Labels]) -> list[Group]:
    """Every class, then every label of every group, without the examples that count nowhere."""
    counted = targets >= 0
    found = [Group(name=name, of="class", rows=targets == number) for number, name in enumerate(classes)]
    for group, given in labels.items():
        codes = given.codes.numpy()
        found += [
            Group(name=f"{group}={name}", of=group, rows=(codes == number) & counted)
            for number, name in enumerate(given.names)
        ]
    return found


def pairs(rows: Bools, targets: Ints, dense: Ints, pruned: Ints) -> Pairs:
    """How many of the rows both models have right, only one of them, or neither."""
    before, after = (dense == targets)[rows], (pruned == targets)[rows]
    return Pairs(
        both=int((before & after).sum()),
        lost=int((before & ~after).sum()),
        won=int((~before & after).sum()),
        neither=int((~before & ~after).sum()),
    )


def disagreements(targets: Ints, dense: Sequence[Ints], pruned: Sequence[Ints]) -> list[Disagreement]:
    """The examples that pruning singles out: the first pair of models differs on them, or the vote of all seeds does.

    Those that differ under most seeds come first, then those that the dense model had right.

    Args:
        targets: (n,); an example whose target counts nowhere is passed over.
        dense: predictions (n,) by seed, of the model that is looked at first.
        pruned: likewise, of the same seeds.
    """
    differ = np.array([before != after for before, after in zip(dense, pruned, strict=True)])
    modal = _vote(dense) != _vote(pruned)
    singled = (differ[0] | modal) & (targets >= 0)
    seeds = differ.sum(axis=0)
    was_right = dense[0] == targets
    found = [
        Disagreement(
            index=index,
            target=int(targets[index]),
            dense=int(dense[0][index]),
            pruned=int(pruned[0][index]),
            seeds=int(seeds[index]),
            modal=bool(modal[index]),
        )
        for index in np.flatnonzero(singled).tolist()
    ]
    return sorted(found, key=lambda one: (-one.seeds, not was_right[one.index], one.index))


def _vote(predicted: Sequence[Ints]) -> Ints:
    """The class that most models predict for each example (n,); of equally many the least."""
    table = np.stack(predicted)
    counts = np.stack([(table == number).sum(axis=0) for number in range(int(table.max()) + 1)])
    return np.asarray(counts.argmax(axis=0), dtype=np.int64)


def _one_each(values: torch.Tensor) -> Ints:
    flat = values.reshape(len(values), -1)
    if flat.shape[1] != 1:
        raise TaskError(
            f"each example has {flat.shape[1]} targets, and those of one example are not independent; "
            "legal here: one class for each example"
        )
    return np.asarray(flat[:, 0].numpy(), dtype=np.int64)
