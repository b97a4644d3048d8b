"""Linear layers with two of every four weights left (2:4): packed in a file that any machine reads, fast on some GPUs.

GPUs of compute capability 8.0 and above multiply such layers by skipping what is gone (Mishra et al., 2021).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from orchestrator.errors import InputError
from orchestrator.export.csr import linear_layers
from orchestrator.state import INTEGERS, into_model, of_model
from orchestrator.tasks.data import transform

CAPABILITY = (8, 0)
"""The least compute capability of a GPU that skips them."""

ROWS, COLUMNS = 32, 64
"""What a layer's sides must be multiples of for torch to run it so in half precision."""


TAKES = (
    f"that takes a GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or above and layers whose sides are "
    f"multiples of {ROWS} and {COLUMNS}"
)


def packable(model: nn.Module) -> list[str]:
    """The linear layers with at most two weights left in each four along the inputs, and something gone."""
    return [name for name, layer in linear_layers(model) if _is_two_of_four(layer.weight.detach())]


def semi_file(model: nn.Module) -> bytes:
    """The tensors of the model, packable layers as two: `NAME.values` (out, in / 2), and `NAME.places` (out, in / 8
    rounded up), uint8, where each two bits say which of its four a value is; the first value has the lowest bits."""
    tensors = dict(of_model(model))
    for name in packable(model):
        weight = tensors.pop(f"{name}.weight")
        tensors[f"{name}.values"], tensors[f"{name}.places"] = _packed(weight)
    return save(tensors, {"format": "2:4"})


def from_semi(content: bytes, model: nn.Module) -> nn.Module:
    """The model with the weights of `semi_file` in full, bit for bit; the model given is changed.

    Raises:
        InputError: the tensors do not fit the model, or each other.
    """
    given = load(content)
    for name in [name.removesuffix(".places") for name in given if name.endswith(".places")]:
        if f"{name}.values" not in given:
            raise InputError(f"the 2:4 layer {name!r} has places and no values")
        given[f"{name}.weight"] = _unpacked(name, given.pop(f"{name}.values"), given.pop(f"{name}.places"))
    try:
        into_model(given, model)
    except ValueError as error:
        raise InputError(str(error)) from error
    return model.eval()


def why_not(model: nn.Module) -> str:
    """Why a model's 2:4 layers cannot skip what is gone on its device; empty where they can."""
    if next(model.parameters()).device.type != "cuda":
        return "no CPU skips what is gone of 2:4 layers"
    capability = torch.cuda.get_device_capability()
    if capability < CAPABILITY:
        return f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}"
    return "" if _taken(model) else "no layer has the sides for it"


def accelerated(model: nn.Module) -> nn.Module:
    """A copy in half precision whose 2:4 layers run on sparse tensor cores; inputs and outputs stay as they were.

    Raises:
        InputError: the model's device, or its layers' sides, do not allow it.
    """
    if reason := why_not(model):
        raise InputError(f"2:4 layers cannot be run packed here ({reason}): {TAKES}")
    small = copy.deepcopy(model).half().eval()
    for name in _taken(small):
        layer = small.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        packed = torch.sparse.to_sparse_semi_structured(layer.weight.detach())
        layer.weight = nn.Parameter(packed, requires_grad=False)
    return HalfPrecision(small)


def _taken(model: nn.Module) -> list[str]:
    """The 2:4 layers with sides that torch takes."""
    sides = {name: model.get_parameter(f"{name}.weight").shape for name in packable(model)}
    return [name for name, (rows, columns) in sides.items() if rows % ROWS == 0 and columns % COLUMNS == 0]


class HalfPrecision(nn.Module):
    """A model in half precision that takes and gives single precision."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any, **named: Any) -> Any:
        positional = [transform(_half, each) for each in inputs]
        outputs = self.model(*positional, **{name: transform(_half, each) for name, each in named.items()})
        return transform(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor, outputs)


def _half(tensor: Tensor) -> Tensor:
    return tensor.half() if tensor.is_floating_point() else tensor


def _is_two_of_four(weight: Tensor) -> bool:
    if weight.shape[1] % 4 or weight.itemsize not in INTEGERS:
        return False
    left = _bits(weight).reshape(len(weight), -1, 4).ne(0)
    return bool((left.sum(-1) <= 2).all()) and not bool(left.all())


def _bits(weight: Tensor) -> Tensor:
    """-0.0 is a value too, and comes back."""
    return weight.detach().to("cpu").contiguous().view(INTEGERS[weight.itemsize])


def _packed(weight: Tensor) -> tuple[Tensor, Tensor]:
    rows = len(weight)
    fours = weight.reshape(rows, -1, 4)
    left = _bits(weight).reshape(rows, -1, 4).ne(0)
    # Those that are left first, each kind in its order; of fewer than two left a zero is taken along.
    order = torch.argsort((~left).to(torch.uint8), dim=-1, stable=True)[..., :2].sort(dim=-1).values
    values = fours.gather(-1, order).reshape(rows, -1)
    places = order.reshape(rows, -1).to(torch.uint8)
    places = torch.nn.functional.pad(places, (0, -places.shape[1] % 4)).reshape(rows, -1, 4)
    packed = places[..., 0] | places[..., 1] << 2 | places[..., 2] << 4 | places[..., 3] << 6
    return values.contiguous(), packed.contiguous()


def _unpacked(name: str, values: Tensor, packed: Tensor) -> Tensor:
    rows, half = values.shape if values.dim() == 2 else (-1, -1)
    if half % 2 or packed.dtype != torch.uint8 or packed.shape != (rows, -(-half // 4)):
        raise InputError(f"the values and places of the 2:4 layer {name!r} do not fit together")
    places = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1).reshape(rows, -1)[:, :half]
    fours = torch.zeros(rows, half // 2, 4, dtype=values.dtype)
    order = places.reshape(rows, half // 2, 2).long()
    if bool((order[..., 0] >= order[..., 1]).any()):
        raise InputError(f"the places of the 2:4 layer {name!r} are not in order")
    return fours.scatter_(-1, order, values.reshape(rows, half // 2, 2)).reshape(rows, -1)
