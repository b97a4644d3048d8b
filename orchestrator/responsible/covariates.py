"""What sets the classes of a task apart before any training: how rare they are and how complex their examples."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.tasks.data import InMemory
from orchestrator.tasks.load import LoadedTask

MOST_EXAMPLES = 200
"""Of a class; its complexity is measured on the first of them."""

RARE = 0.5
"""A class with less than this part of an equal share of the training rows is called a minority."""


@dataclass(frozen=True, kw_only=True)
class ClassFacts:
    """One class in the training data.

    Args:
        rows: its examples.
        share: its part of all rows, divided by an equal one: 1 in balanced data.
        compressed_bytes: mean size of one example's inputs, as 8-bit values, after zlib; None where the inputs are not
            one tensor of real numbers.
        entropy_bits: mean Shannon entropy of these values; likewise.
    """

    rows: int
    share: float
    compressed_bytes: float | None
    entropy_bits: float | None


def class_facts(loaded: LoadedTask) -> list[ClassFacts] | None:
    """The facts of every class, in their order; None where the training data are not labelled tensors in memory."""
    train = loaded.train
    if loaded.classes is None or not isinstance(train, InMemory) or not isinstance(train.targets, Tensor):
        return None
    targets = train.targets.reshape(len(train), -1)
    if targets.shape[1] != 1:
        return None
    targets = targets[:, 0]
    inputs = _eight_bits(train.inputs)
    many = len(loaded.classes)
    total = int((targets >= 0).sum())
    found = []
    for number in range(many):
        rows = (targets == number).nonzero().flatten()
        examples = [] if inputs is None else [inputs[row] for row in rows[:MOST_EXAMPLES].tolist()]
        found.append(
            ClassFacts(
                rows=len(rows),
                share=len(rows) * many / total if total else float("nan"),
                compressed_bytes=float(np.mean([compressed_bytes(each) for each in examples])) if examples else None,
                entropy_bits=float(np.mean([entropy_bits(each) for each in examples])) if examples else None,
            )
        )
    return found


def compressed_bytes(values: NDArray[np.uint8]) -> int:
    """The size of the values after zlib at its best."""
    return len(zlib.compress(np.ascontiguousarray(values).tobytes(), 9))


def entropy_bits(values: NDArray[np.uint8]) -> float:
    """Shannon's entropy of the values' histogram, in bits per value: 0 for one value, 8 at most."""
    counts = np.bincount(values.reshape(-1), minlength=256)
    shares = counts[counts > 0] / values.size
    return float(-(shares * np.log2(shares)).sum() + 0.0)


def _eight_bits(inputs: object) -> NDArray[np.uint8] | None:
    """Inputs (n, …) on a scale of 0 to 255 between the least and the greatest value of all."""
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        return None
    values = inputs.detach().to("cpu", torch.float32)
    least, greatest = float(values.min()), float(values.max())
    scaled = (values - least) * (255 / (greatest - least) if greatest > least else 0.0)
    return scaled.round().to(torch.uint8).numpy()
