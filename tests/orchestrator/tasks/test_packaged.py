"""Stratified splits."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.tasks.packaged import stratified


def test_four_rows_two_classes() -> None:
    first, second = stratified(np.array([0, 0, 1, 1]), (2, 2), seed=0)
    assert sorted([*first, *second]) == [0, 1, 2, 3]
    assert {0, 1} & set(first) and {2, 3} & set(first)


@given(labels=st.lists(st.integers(0, 4), min_size=4, max_size=200), seed=st.integers(0, 100), data=st.data())
def test_parts_are_disjoint_exact_and_proportional(labels: list[int], seed: int, data: st.DataObject) -> None:
    array = np.array(labels)
    first = data.draw(st.integers(1, len(labels) - 1))
    parts = stratified(array, (first, len(labels) - first), seed)
    assert sorted(np.concatenate(parts)) == list(range(len(labels)))
    assert len(parts[0]) == first
    for label in set(labels):
        share = (array == label).mean()
        assert abs((array[parts[0]] == label).sum() - share * first) <= len(set(labels)) / 2 + 1


def test_the_seed_shuffles() -> None:
    labels = np.repeat([0, 1], 50)
    assert (stratified(labels, (40,), 0)[0] == stratified(labels, (40,), 0)[0]).all()
    assert (stratified(labels, (40,), 0)[0] != stratified(labels, (40,), 1)[0]).any()
