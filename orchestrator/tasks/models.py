"""The built-in tasks' architectures, with Gaussian Glorot weights and zero biases (Frankle & Carbin, 2019).

Each draws from torch's global generator alone. What reads a sequence takes it in any shape of as many numbers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AnyModule = TypeVar("AnyModule", bound=nn.Module)

IMAGE_MODELS = ("lenet-300-100", "lenet-conv", "resnet", "depthwise", "transformer", "lstm", "tied")
"""What `image_model` builds."""


def image_model(name: str, side: int, hidden: int) -> Callable[[], nn.Module]:
    """The builder of the model called `name` (of `IMAGE_MODELS`) for images of `side` x `side` pixels in 10 classes.

    "lenet-300-100" takes them flat, (n, side²), and its first layer is `hidden` wide; all others take (n, 1, side,
    side). "lenet-conv" takes a side of 28 only.
    """
    builders: dict[str, Callable[[], nn.Module]] = {
        "lenet-300-100": partial(mlp, side * side, hidden, 100, 10),
        "lenet-conv": lenet_conv,
        "resnet": ResNet,
        "depthwise": depthwise_separable,
        "transformer": partial(Transformer, side, side),
        "lstm": partial(LSTM, side, side),
        "tied": partial(TiedTokens, side * side),
    }
    return builders[name]


def matrices(name: str, parameter: Tensor) -> bool:
    """Whether a parameter has two dimensions or more: a task's `prunable`, for an LSTM's weights to count as well."""
    del name
    return parameter.dim() >= 2


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


class ResNet(nn.Module):
    """A small residual network with BatchNorm (after He et al., 2016): (n, 1, side, side) -> (n, classes).

    A 3x3 stem and three basic blocks; each block after the first doubles the channels and halves the side. Any side
    from 4 on; 77,754 parameters.
    """

    def __init__(self, classes: int = 10, channels: int = 16) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.block1 = BasicBlock(channels, channels, stride=1)
        self.block2 = BasicBlock(channels, 2 * channels, stride=2)
        self.block3 = BasicBlock(2 * channels, 4 * channels, stride=2)
        self.out = nn.Linear(4 * channels, classes)
        glorot(self)

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.norm(self.conv(images)))
        features = self.block3(self.block2(self.block1(features)))
        return self.out(features.mean(dim=(2, 3)))  # type: ignore[no-any-return]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm beside a shortcut: (n, inputs, s, s) -> (n, outputs, s / stride, s / stride).

    The shortcut is the identity where the shapes agree, else a 1x1 convolution with BatchNorm.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut.add_module("conv", nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False))
            self.shortcut.add_module("norm", nn.BatchNorm2d(outputs))

    def forward(self, inputs: Tensor) -> Tensor:
        features = F.relu(self.norm1(self.conv1(inputs)))
        return F.relu(self.norm2(self.conv2(features)) + self.shortcut(inputs))


def depthwise_separable(classes: int = 10, channels: int = 16) -> nn.Sequential:
    """A small MobileNet (after Howard et al., 2017): (n, 1, side, side) -> (n, classes).

    A 3x3 stem and three depthwise-separable convolutions, all with BatchNorm and ReLU; the second and the third halve
    the side. Any side from 4 on; 9,034 parameters.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(1, channels, 3, padding=1, bias=False),
        norm=nn.BatchNorm2d(channels),
        relu=nn.ReLU(),
        separable1=_separable(channels, 2 * channels, stride=1),
        separable2=_separable(2 * channels, 4 * channels, stride=2),
        separable3=_separable(4 * channels, 4 * channels, stride=2),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        out=nn.Linear(4 * channels, classes),
    )
    return glorot(nn.Sequential(layers))


def _separable(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """A 3x3 convolution within each channel, then a 1x1 convolution across them."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        depthwise=nn.Conv2d(inputs, inputs, 3, stride=stride, padding=1, groups=inputs, bias=False),
        norm1=nn.BatchNorm2d(inputs),
        relu1=nn.ReLU(),
        pointwise=nn.Conv2d(inputs, outputs, 1, bias=False),
        norm2=nn.BatchNorm2d(outputs),
        relu2=nn.ReLU(),
    )
    return nn.Sequential(layers)


class Transformer(nn.Module):
    """A transformer encoder over `steps` tokens of `width` numbers each (after Vaswani et al., 2017; pre-norm).

    (n, steps · width numbers) -> (n, classes). Learned positions, two layers of four heads, LayerNorm, the mean over
    the tokens; no dropout. 18,026 parameters for 8 tokens of 8 numbers, 19,306 for 28 of 28.
    """

    def __init__(self, steps: int, width: int, classes: int = 10, features: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.tokens = (steps, width)
        self.embed = nn.Linear(width, features)
        self.positions = nn.Parameter(0.02 * torch.randn(steps, features))
        self.layer1 = _encoder_layer(features, heads)
        self.layer2 = _encoder_layer(features, heads)
        self.norm = nn.LayerNorm(features)
        self.out = nn.Linear(features, classes)
        glorot(self)

    def forward(self, inputs: Tensor) -> Tensor:
        tokens = self.embed(inputs.reshape(-1, *self.tokens)) + self.positions
        tokens = self.layer2(self.layer1(tokens))
        return self.out(self.norm(tokens).mean(dim=1))  # type: ignore[no-any-return]


def _encoder_layer(features: int, heads: int) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(
        features, heads, dim_feedforward=2 * features, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )


class LSTM(nn.Module):
    """An LSTM (Hochreiter & Schmidhuber, 1997) that reads `steps` rows of `width` numbers and answers after the last.

    (n, steps · width numbers) -> (n, classes); 19,594 parameters for rows of 8 numbers, 24,714 for rows of 28.
    """

    def __init__(self, steps: int, width: int, classes: int = 10, units: int = 64) -> None:
        super().__init__()
        self.rows = (steps, width)
        self.lstm = nn.LSTM(width, units, batch_first=True)
        self.out = nn.Linear(units, classes)
        glorot(self)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs, _ = self.lstm(inputs.reshape(-1, *self.rows))
        return self.out(outputs[:, -1])  # type: ignore[no-any-return]


class TiedTokens(nn.Module):
    """A neural language model (after Bengio et al., 2003) that reads pixels as words and says the digit as the next.

    (n, `pixels` numbers in [0, 1]) -> (n, classes). The vocabulary is 17 shades of grey and the classes; one matrix is
    both the words' embedding and the output layer (Press & Wolf, 2017), so `out.weight` is also `embedding.weight`.
    33,568 parameters for 64 pixels, 402,208 for 784.
    """

    SHADES = 17

    def __init__(self, pixels: int, classes: int = 10, features: int = 8, hidden: int = 64) -> None:
        super().__init__()
        words = self.SHADES + classes
        self.embedding = nn.Embedding(words, features)
        self.fc1 = nn.Linear(pixels * features, hidden)
        self.fc2 = nn.Linear(hidden, features)
        self.out = nn.Linear(features, words, bias=False)
        glorot(self)
        self.embedding.weight = self.out.weight

    def forward(self, inputs: Tensor) -> Tensor:
        words = (inputs.flatten(1) * (self.SHADES - 1)).round().long()
        hidden = F.relu(self.fc1(self.embedding(words).flatten(1)))
        return self.out(self.fc2(hidden))[:, self.SHADES :]  # type: ignore[no-any-return]


def glorot(model: AnyModule) -> AnyModule:
    """Draws every linear and convolutional weight from a Gaussian of Glorot's variance; biases become zero."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
