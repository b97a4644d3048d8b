"""MNIST-1D (Greydanus & Kobak, 2024): 5,000 generated signals; 3,200 to train, 800 to validate, 1,000 to test."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import nn

from orchestrator.tasks.models import LSTM, Transformer, conv_1d, matrices, mlp
from orchestrator.tasks.packaged import DIGITS, choice, missing_package, positive, stratified
from orchestrator.tasks.task import Task

SIZES = (3200, 800)
SPLIT_SEED = 0


def task(model: str = "mlp", hidden: int = 128, hidden2: int = 64) -> Task:
    """Signals of 40 samples with mean 0 and standard deviation 1, in 10 classes.

    Args:
        model: "mlp" (40-`hidden`-`hidden2`-10), "conv" (three 1-D convolutions and a linear layer), "transformer" (over
            8 tokens of 5 samples) or "lstm" (over 20 steps of 2).
        hidden: the width of the first hidden layer of "mlp".
        hidden2: the width of the second.

    Raises:
        TaskError: an unknown model, an illegal width, or mnist1d is not installed.
    """
    builders: dict[str, Callable[[], nn.Module]] = {
        "mlp": partial(mlp, 40, hidden, hidden2, 10),
        "conv": conv_1d,
        "transformer": partial(Transformer, 8, 5),
        "lstm": partial(LSTM, 20, 2),
    }
    choice("mnist1d", "model", model, tuple(builders))
    positive("mnist1d", hidden=hidden, hidden2=hidden2)
    signals = generate()
    x, y = torch.from_numpy(signals["x"]).float(), torch.from_numpy(signals["y"])
    train, valid = (torch.from_numpy(rows) for rows in stratified(signals["y"], SIZES, SPLIT_SEED))
    return Task(
        model=builders[model],
        train=(x[train], y[train]),
        valid=(x[valid], y[valid]),
        test=(torch.from_numpy(signals["x_test"]).float(), torch.from_numpy(signals["y_test"])),
        classes=DIGITS,
        prunable=matrices if model == "lstm" else None,
    )


def generate() -> dict[str, Any]:
    """The package's arrays: x (4000, 40), y (4000,), x_test (1000, 40), y_test (1000,)."""
    try:
        # get_dataset() would go to the network.
        make_dataset = import_module("mnist1d.data").make_dataset
    except ModuleNotFoundError as error:
        raise missing_package("mnist1d", "mnist1d") from error
    # It seeds the global generators of random and numpy and draws from them.
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        return dict(make_dataset())
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
