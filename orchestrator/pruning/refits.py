"""How a module takes narrower tensors: each type that can be shrunk sets its own attributes right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias, TypeVar

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

Refit: TypeAlias = Callable[[nn.Module, Mapping[str, Tensor]], nn.Module]
"""From a module and all of its own tensors by local name, narrowed where units were removed, to the module that holds
them. The module given is a copy, whose children were refitted before: it may be changed and returned. Raises ValueError
with a clause that says why, where the tensors do not fit together."""

REFITS: dict[type[nn.Module], Refit] = {}
"""By exact type: a subclass may do with its tensors what its parent does not."""

R = TypeVar("R", bound=Refit)


def refit(*types: type[nn.Module]) -> Callable[[R], R]:
    """A decorator that enters a refit for each of `types`; registering a type twice is our own mistake."""

    def enter(function: R) -> R:
        for kind in types:
            assert kind not in REFITS, f"{kind.__name__} has two refits"
            REFITS[kind] = function
        return function

    return enter


def hold(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The module, in place, with `tensors` as its parameters and buffers of those names; what was frozen stays so."""
    for name, tensor in tensors.items():
        parameter = module._parameters.get(name)
        if parameter is None:
            module._buffers[name] = tensor
        else:
            module._parameters[name] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
    return module


@refit(nn.Linear, NonDynamicallyQuantizableLinear)
def linear(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Weight (out, in) and bias (out,)."""
    assert isinstance(module, nn.Linear)
    module.out_features, module.in_features = tensors["weight"].shape
    return hold(module, tensors)


@refit(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def convolution(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Weight (out, in / groups, …) and bias (out,); of a grouped convolution whole groups go."""
    assert isinstance(module, nn.modules.conv._ConvNd)
    outputs, inputs = tensors["weight"].shape[:2]
    module.groups = _groups(module, outputs, module.out_channels, inputs == module.weight.shape[1])
    module.out_channels, module.in_channels = outputs, inputs * module.groups
    return hold(module, tensors)


@refit(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def transposed(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Weight (in, out / groups, …) and bias (out,); of a grouped convolution whole groups go."""
    assert isinstance(module, nn.modules.conv._ConvNd)
    inputs, outputs = tensors["weight"].shape[:2]
    module.groups = _groups(module, inputs, module.in_channels, outputs == module.weight.shape[1])
    module.in_channels, module.out_channels = inputs, outputs * module.groups
    return hold(module, tensors)


def _groups(module: nn.modules.conv._ConvNd, channels: int, before: int, whole: bool) -> int:
    """How many groups are left when `channels` of those that ran over all groups `before` are."""
    if module.groups == 1:
        return 1
    width = before // module.groups
    if not whole or channels % width:
        raise ValueError("of a grouped convolution only whole groups can go")
    return channels // width


@refit(
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
def channelwise_norm(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Scale, shift and running statistics (channels,), each where there is one."""
    assert isinstance(module, nn.modules.batchnorm._NormBase)
    module.num_features = max(tensor.numel() for tensor in tensors.values() if tensor.dim() == 1)
    return hold(module, tensors)


@refit(nn.PReLU)
def prelu(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Weight (channels,)."""
    assert isinstance(module, nn.PReLU)
    module.num_parameters = tensors["weight"].numel()
    return hold(module, tensors)


@refit(nn.Embedding)
def embedding(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Weight (entries, width)."""
    assert isinstance(module, nn.Embedding)
    module.num_embeddings, module.embedding_dim = tensors["weight"].shape
    return hold(module, tensors)
