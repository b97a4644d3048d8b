"""A state: what a stage yields, and its bytes on storage.

A masked tensor is stored as its bit-packed mask and the values of its kept entries, so that a pruned weight cannot come
back with a value. Everything is safetensors: nothing is ever unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

FORMAT = "1"

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By how many bytes they take."""


@dataclass(frozen=True, kw_only=True)
class State:
    """Weights, buffers, masks and optimizer state at a position in training, all in full coordinates on the CPU.

    Args:
        weights: parameters and persistent buffers by name; tied parameters once, under their first name.
        masks: by parameter name, bool and of the parameter's shape; True = kept. A tensor without a mask is dense.
        optimizer: moments and step counts by `"slot/parameter"`; empty where training begins with fresh ones.
        position: optimizer steps since init.
        gathered: statistics over the training data by `"what/parameter"`, of the parameter's shape and never masked.
        remarks: what the stage that yielded the state has to say of it, as JSON-ready data; it goes into the lineage
            and not into the state's bytes.

    Names stand in sorted order, however the state was made: what draws or adds up over them gives the same for a state
    that was trained here and for one that was read.
    """

    weights: Mapping[str, Tensor]
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)
    position: int = 0
    gathered: Mapping[str, Tensor] = field(default_factory=dict)
    remarks: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind in ("weights", "masks", "optimizer", "gathered"):
            object.__setattr__(self, kind, dict(sorted(getattr(self, kind).items())))

    def masked(self) -> State:
        """The same state with exact (positive) zeros under every mask, in weights and optimizer state."""
        made: dict[str, dict[torch.dtype, Tensor]] = {name: {} for name in self.masks}
        weights = {n: zeroed(tensor, self.masks.get(n), made.get(n)) for n, tensor in self.weights.items()}
        optimizer = {}
        for slot, tensor in self.optimizer.items():
            name = slot.partition("/")[2]
            optimizer[slot] = zeroed(tensor, self.masks.get(name), made.get(name))
        return replace(self, weights=weights, optimizer=optimizer)

    def without_optimizer(self) -> State:
        """The same state, to be trained on with a fresh optimizer, and with fresh statistics therefore."""
        return replace(self, optimizer={}, gathered={})

    @property
    def nbytes(self) -> int:
        """Memory that the tensors take."""
        kinds = (self.weights, self.masks, self.optimizer, self.gathered)
        tensors = [tensor for kind in kinds for tensor in kind.values()]
        return sum(tensor.nbytes for tensor in tensors)


def zeroed(tensor: Tensor, mask: Tensor | None, factors: dict[torch.dtype, Tensor] | None = None) -> Tensor:
    """`tensor` with +0.0 where `mask` is False; -0.0 would make equal weights differ in their bytes.

    `factors` keeps what is made of this mask for the next tensor under it.
    """
    if mask is None or mask.shape != tensor.shape:
        return tensor
    if tensor.itemsize not in INTEGERS:
        return torch.where(mask, tensor, torch.zeros((), dtype=tensor.dtype))
    # The same bits in a fraction of the time: `where` branches on each entry. Times floats would keep NaN and -0.0.
    bits = INTEGERS[tensor.itemsize]
    factors = {} if factors is None else factors
    if bits not in factors:
        factors[bits] = mask.to(bits)
    return tensor.view(bits).mul(factors[bits]).view(tensor.dtype)


def of_model(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's parameters and persistent buffers on the CPU; tied parameters once."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in _own(model).items()}


def into_model(weights: Mapping[str, Tensor], model: nn.Module) -> None:
    """Copy `weights` into the model in place.

    Raises:
        ValueError: the names or a shape differ from the model's; the message names the first.
    """
    own = _own(model)
    if own.keys() != weights.keys():
        name = min(own.keys() ^ weights.keys())
        raise ValueError(f"the weights do not fit the model: {name!r} is in only one of them")
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.shape != weights[name].shape:
                shapes = f"{tuple(weights[name].shape)}, the model wants {tuple(tensor.shape)}"
                raise ValueError(f"the weights do not fit the model: {name!r} has shape {shapes}")
            tensor.copy_(weights[name])


def _own(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by their first names. A state dict's hooks may rename theirs."""
    passing = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    return {**dict(model.named_parameters()), **{n: b for n, b in model.named_buffers() if n not in passing}}


def to_bytes(state: State, header: Mapping[str, str] | None = None) -> bytes:
    """`state` as one safetensors file; `header` goes into its metadata."""
    tensors: dict[str, Tensor] = {}
    places = {name: _places(mask) for name, mask in state.masks.items()}
    for name, tensor in state.weights.items():
        tensors["weights/" + name] = _packed(tensor, state.masks.get(name), places.get(name))
    for name, mask in state.masks.items():
        tensors["masks/" + name] = pack_bits(mask)
        tensors["shapes/" + name] = torch.tensor(mask.shape, dtype=torch.int64)
    for slot, tensor in state.optimizer.items():
        name = slot.partition("/")[2]
        tensors["optimizer/" + slot] = _packed(tensor, state.masks.get(name), places.get(name))
    for name, tensor in state.gathered.items():
        tensors["gathered/" + name] = tensor.detach().contiguous()
    return save(tensors, {**(header or {}), "format": FORMAT, "position": str(state.position)})


def from_bytes(data: bytes) -> State:
    """The inverse of `to_bytes`, bit for bit."""
    from orchestrator.header import read_header

    tensors = load(data)
    masks = {
        name.removeprefix("masks/"): unpack_bits(packed, tensors["shapes/" + name.removeprefix("masks/")].tolist())
        for name, packed in tensors.items()
        if name.startswith("masks/")
    }
    places = {name: _places(mask) for name, mask in masks.items()}

    def whole(kept: Tensor, name: str) -> Tensor:
        if name not in masks or kept.dim() == 0:
            return kept
        full = torch.zeros(masks[name].numel(), dtype=kept.dtype)
        return full.index_copy_(0, places[name], kept).reshape(masks[name].shape)

    weights = {
        name.removeprefix("weights/"): whole(tensor, name.removeprefix("weights/"))
        for name, tensor in tensors.items()
        if name.startswith("weights/")
    }
    optimizer = {
        name.removeprefix("optimizer/"): whole(tensor, name.split("/", 2)[2])
        for name, tensor in tensors.items()
        if name.startswith("optimizer/")
    }
    gathered = {
        name.removeprefix("gathered/"): tensor for name, tensor in tensors.items() if name.startswith("gathered/")
    }
    position = int(read_header(data)["position"])
    return State(weights=weights, masks=masks, optimizer=optimizer, position=position, gathered=gathered)


def _places(mask: Tensor) -> Tensor:
    """Where the kept entries lie in the flattened tensor; numpy finds them in a fraction of torch's time."""
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def _packed(tensor: Tensor, mask: Tensor | None, places: Tensor | None) -> Tensor:
    """The kept entries in their order; all where nothing of the tensor is masked, as for a step count."""
    if mask is None or places is None or mask.shape != tensor.shape:
        return tensor.detach().contiguous()
    return tensor.detach().reshape(-1).index_select(0, places)


def pack_bits(mask: Tensor) -> Tensor:
    """A bool tensor as bytes, eight entries each, first entry in the highest bit."""
    return torch.from_numpy(np.packbits(mask.numpy().reshape(-1)))


def unpack_bits(packed: Tensor, shape: list[int]) -> Tensor:
    """The inverse of `pack_bits` for a mask of `shape`."""
    count = int(np.prod(shape))
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=count).astype(bool)).reshape(shape)
