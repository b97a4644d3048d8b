"""What the built-in tasks share: finding data that ship inside installed packages, and splitting them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from orchestrator.errors import TaskError

DIGITS = tuple(str(digit) for digit in range(10))
"""The class names of all three built-in tasks."""


def package_folder(task: str, package: str, distribution: str) -> Path:
    """The folder of an installed package, without importing it: some of these take a second to import.

    Raises:
        TaskError: the package is not installed; the message says how to get it.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise missing_package(task, distribution)
    return Path(spec.submodule_search_locations[0])


def missing_package(task: str, distribution: str) -> TaskError:
    """The error for a built-in task whose data package is not installed."""
    return TaskError(f'task {task!r} needs the package {distribution}: pip install "orchardist[tasks]"')


def stratified(labels: NDArray[np.int64], sizes: Sequence[int], seed: int) -> list[NDArray[np.int64]]:
    """Indices of disjoint parts of exactly `sizes` rows, each holding every class in its overall proportion.

    Every class is shuffled and spread evenly over [0, 1); the parts are cut from the rows in that order. So each part
    is within one row of the exact proportion for every class, and its classes alternate.
    """
    assert sum(sizes) <= len(labels), f"{sum(sizes)} rows asked of {len(labels)}"
    # RandomState's stream is frozen for good; that of default_rng may change between versions of numpy.
    order = np.random.RandomState(seed).permutation(len(labels))
    place = np.empty(len(labels))
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        place[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    ranked = np.lexsort((labels, place))
    return np.split(ranked, np.cumsum(sizes))[: len(sizes)]


def choice(task: str, name: str, value: object, legal: Sequence[object]) -> None:
    """Raises TaskError unless `value` is one of `legal`."""
    if value not in legal or isinstance(value, bool):
        known = ", ".join(map(repr, legal))
        raise TaskError(f"task {task!r}: {name} = {value!r} is not one of {known}")


def positive(task: str, **widths: object) -> None:
    """Raises TaskError unless every value is a positive whole number."""
    for name, value in widths.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise TaskError(f"task {task!r}: {name} = {value!r} is not a positive whole number")
