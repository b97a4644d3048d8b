"""1,797 handwritten digits of 8x8 pixels that ship with scikit-learn: 1,257 to train, 270 to validate, 270 to test."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from io import BytesIO

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.errors import TaskError
from orchestrator.tasks.models import IMAGE_MODELS, image_model, matrices
from orchestrator.tasks.packaged import DIGITS, choice, package_folder, positive, stratified
from orchestrator.tasks.task import Task

SIZES = (1257, 270, 270)
SPLIT_SEED = 0


def task(
    model: str = "lenet-300-100",
    hidden: int = 300,
    size: int = 8,
    minority: Sequence[int] = (),
    minority_share: float = 0.1,
) -> Task:
    """Handwritten digits with pixels in [0, 1]; at size 28 they fit the models of task "mnist".

    Args:
        model: "lenet-300-100" (size²-`hidden`-100-10 on flat pixels), or on images "lenet-conv" (a small LeNet, at size
            28), "resnet", "depthwise" (a small MobileNet), "transformer" or "lstm" (over the rows), or "tied" (pixels
            as words).
        hidden: the width of the first hidden layer of "lenet-300-100".
        size: 8 as they ship, or 28: scaled to 20x20 (bilinear) with a margin of 4, as MNIST's are.
        minority: the digits that are made rare: of their training rows only a part is left, of the others all.
        minority_share: that part.

    Raises:
        TaskError: an unknown model, size or digit, a share that is no fraction, a model that needs another size, or
            scikit-learn is not installed.
    """
    choice("digits", "model", model, IMAGE_MODELS)
    choice("digits", "size", size, (8, 28))
    positive("digits", hidden=hidden)
    _check_minority(minority, minority_share)
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
    train = train[_thinned(targets[train], minority, minority_share)]
    return Task(
        model=image_model(model, size, hidden),
        train=(images[train], targets[train]),
        valid=(images[valid], targets[valid]),
        test=(images[test], targets[test]),
        classes=DIGITS,
        prunable=matrices if model == "lstm" else None,
    )


def _check_minority(digits: Sequence[int], share: float) -> None:
    if isinstance(digits, str) or not isinstance(digits, Sequence) or len(set(map(str, digits))) < len(digits):
        raise TaskError(f"task 'digits': minority = {digits!r} is not a list of different digits")
    for digit in digits:
        choice("digits", "minority", digit, range(10))
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise TaskError(f"task 'digits': minority_share = {share!r} is not a number above 0 and up to 1")


def _thinned(targets: Tensor, rare: Sequence[int], share: float) -> Tensor:
    """Which rows are left (n,): of each rare digit its first ones, at least one."""
    kept = torch.ones(len(targets), dtype=torch.bool)
    for digit in rare:
        rows = (targets == digit).nonzero().flatten()
        kept[rows[max(1, round(share * len(rows))) :]] = False
    return kept


def read() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Pixels (1797, 64) in 0..16 and labels (1797,)."""
    path = package_folder("digits", "sklearn", "scikit-learn") / "datasets" / "data" / "digits.csv.gz"
    table = np.loadtxt(BytesIO(gzip.decompress(path.read_bytes())), delimiter=",", dtype=np.float32)
    return table[:, :-1], table[:, -1].astype(np.int64)
