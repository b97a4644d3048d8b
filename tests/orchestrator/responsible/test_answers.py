"""Answers that can be checked by eye."""

from __future__ import annotations

import numpy as np
import torch

from orchestrator.responsible.answers import disagreements, groups_of, pairs
from orchestrator.responsible.harm import Pairs
from orchestrator.tasks.groups import Labels

TARGETS = np.array([0, 0, 1, 1, -100])
DENSE = np.array([0, 1, 1, 1, 0])
PRUNED = np.array([1, 1, 1, 0, 1])


def test_groups_are_classes_and_labels_without_what_counts_nowhere() -> None:
    labels = {"sex": Labels(names=("f", "m"), codes=torch.tensor([0, 1, 1, 1, 1]))}
    found = groups_of(TARGETS, ["a", "b", "c"], labels)
    assert [(group.name, group.of, group.support) for group in found] == [
        ("a", "class", 2),
        ("b", "class", 2),
        ("c", "class", 0),
        ("sex=f", "sex", 1),
        ("sex=m", "sex", 3),
    ]
    assert found[4].rows.tolist() == [False, True, True, True, False]


def test_pairs_by_hand() -> None:
    everywhere = TARGETS >= 0
    assert pairs(everywhere, TARGETS, DENSE, PRUNED) == Pairs(both=1, lost=2, won=0, neither=1)
    assert pairs(TARGETS == 0, TARGETS, PRUNED, DENSE) == Pairs(both=0, lost=0, won=1, neither=1)


def test_disagreements_of_one_pair() -> None:
    found = disagreements(TARGETS, [DENSE], [PRUNED])
    assert [(one.index, one.target, one.dense, one.pruned, one.seeds) for one in found] == [
        (0, 0, 0, 1, 1),
        (3, 1, 1, 0, 1),
    ]
    assert all(one.modal for one in found)


def test_more_seeds_come_first_then_what_dense_had_right() -> None:
    targets = np.array([0, 0, 0])
    dense = [np.array([1, 0, 0]), np.array([0, 0, 0]), np.array([0, 0, 0])]
    pruned = [np.array([0, 1, 1]), np.array([0, 0, 1]), np.array([0, 0, 1])]
    found = disagreements(targets, dense, pruned)
    assert [(one.index, one.seeds, one.modal) for one in found] == [(2, 3, True), (1, 1, False), (0, 1, False)]


def test_the_vote_counts_where_the_first_pair_agrees() -> None:
    targets = np.array([0])
    dense = [np.array([0]), np.array([0]), np.array([0])]
    pruned = [np.array([0]), np.array([1]), np.array([1])]
    (one,) = disagreements(targets, dense, pruned)
    assert (one.dense, one.pruned, one.seeds, one.modal) == (0, 0, 2, True)
