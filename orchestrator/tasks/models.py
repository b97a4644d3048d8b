"""The built-in tasks' architectures, with Gaussian Glorot weights and zero biases (Frankle & Carbin, 2019)."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

from torch import nn


def mlp(*widths: int) -> nn.Sequential:
    """A ReLU network of linear layers named `fc1`, `fc2`, …, `out`: (n, widths[0]) -> (n, widths[-1]).

    `mlp(784, 300, 100, 10)` is LeNet-300-100 (LeCun et al., 1998).
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    *hidden, last = pairwise(widths)
    for number, (inputs, outputs) in enumerate(hidden, start=1):
        layers[f"fc{number}"] = nn.Linear(inputs, outputs)
        layers[f"relu{number}"] = nn.ReLU()
    layers["out"] = nn.Linear(*last)
    return glorot(nn.Sequential(layers))


def lenet_conv(classes: int = 10) -> nn.Sequential:
    """LeNet-5 with ReLU and max pooling (after LeCun et al., 1998): (n, 1, 28, 28) -> (n, classes), 61,706 weights."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(1, 6, 5, padding=2),
        relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(6, 16, 5),
        relu2=nn.ReLU(),
        pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        fc1=nn.Linear(400, 120),
        relu3=nn.ReLU(),
        fc2=nn.Linear(120, 84),
        relu4=nn.ReLU(),
        out=nn.Linear(84, classes),
    )
    return glorot(nn.Sequential(layers))


def conv_1d(classes: int = 10, channels: int = 25) -> nn.Sequential:
    """The convolutional baseline of MNIST-1D (Greydanus & Kobak, 2024): (n, 40) -> (n, classes); 5,210 parameters."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        unsqueeze=nn.Unflatten(1, (1, 40)),
        conv1=nn.Conv1d(1, channels, 5, stride=2, padding=1),
        relu1=nn.ReLU(),
        conv2=nn.Conv1d(channels, channels, 3, stride=2, padding=1),
        relu2=nn.ReLU(),
        conv3=nn.Conv1d(channels, channels, 3, stride=2, padding=1),
        relu3=nn.ReLU(),
        flatten=nn.Flatten(),
        out=nn.Linear(5 * channels, classes),
    )
    return glorot(nn.Sequential(layers))


def glorot(model: nn.Sequential) -> nn.Sequential:
    """Draws every linear and convolutional weight from a Gaussian of Glorot's variance; biases become zero."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
