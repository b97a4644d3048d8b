"""1,797 handwritten digits of 8x8 pixels that ship with scikit-learn: 1,257 to train, 270 to validate, 270 to test."""

from __future__ import annotations

import gzip
from functools import partial
from io import BytesIO

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from orchestrator.errors import TaskError
from orchestrator.tasks.models import lenet_conv, mlp
from orchestrator.tasks.packaged import DIGITS, choice, package_folder, positive, stratified
from orchestrator.tasks.task import Task

SIZES = (1257, 270, 270)
SPLIT_SEED = 0


def task(model: str = "lenet-300-100", hidden: int = 300, size: int = 8) -> Task:
    """Handwritten digits with pixels in [0, 1]; at size 28 they fit the models of task "mnist".

    Args:
        model: "lenet-300-100" (size²-`hidden`-100-10 on flat pixels) or, at size 28, "lenet-conv" (a small LeNet).
        hidden: the width of the first hidden layer of "lenet-300-100".
        size: 8 as they ship, or 28: scaled to 20x20 (bilinear) with a margin of 4, as MNIST's are.

    Raises:
        TaskError: an unknown model or size, a model that needs another size, or scikit-learn is not installed.
    """
    choice("digits", "model", model, ("lenet-300-100", "lenet-conv"))
    choice("digits", "size", size, (8, 28))
    positive("digits", hidden=hidden)
    if model == "lenet-conv" and size != 28:
        raise TaskError(f"task 'digits': model = 'lenet-conv' needs size = 28, not {size}")
    pixels, labels = read()
    images = torch.from_numpy(pixels / 16).reshape(-1, 1, 8, 8)
    if size == 28:
        images = F.pad(F.interpolate(images, size=(20, 20), mode="bilinear"), (4, 4, 4, 4))
    if model == "lenet-300-100":
        images = images.reshape(-1, size * size)
    targets = torch.from_numpy(labels)
    train, valid, test = (torch.from_numpy(rows) for rows in stratified(labels, SIZES, SPLIT_SEED))
    return Task(
        model=lenet_conv if model == "lenet-conv" else partial(mlp, size * size, hidden, 100, 10),
        train=(images[train], targets[train]),
        valid=(images[valid], targets[valid]),
        test=(images[test], targets[test]),
        classes=DIGITS,
    )


def read() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Pixels (1797, 64) in 0..16 and labels (1797,)."""
    path = package_folder("digits", "sklearn", "scikit-learn") / "datasets" / "data" / "digits.csv.gz"
    table = np.loadtxt(BytesIO(gzip.decompress(path.read_bytes())), delimiter=",", dtype=np.float32)
    return table[:, :-1], table[:, -1].astype(np.int64)
