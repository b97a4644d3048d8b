"""A user's checkpoint: tensors read from a file of weights, and laid over the model that a task builds."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from orchestrator.errors import TaskError
from orchestrator.tasks.source import Sent, sent_bytes

LEGAL = "legal: names to tensors, as model.state_dict() gives them"


def read_checkpoint(checkpoint: Sent, root: Path | None = None) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or of a `.pt`, `.pth` or `.bin` file that holds a state dict.

    Only tensors are ever unpickled: no code in the file is run.

    Raises:
        TaskError: the file cannot be read, is no state dict, or holds NaN or infinite values.
    """
    data, what = sent_bytes(checkpoint, root), f"checkpoint {checkpoint.name!r}"
    try:
        found = _parsed(checkpoint.name, data)
    except pickle.UnpicklingError as error:
        raise TaskError(
            f"{what} is no plain state dict, and pickled objects are never loaded, nor their code run; {LEGAL}"
        ) from error
    except Exception as error:  # torch's reader of pickles raises anything on bytes that are none
        said = str(error).strip().partition("\n")[0]
        raise TaskError(f"{what} cannot be read: {said or type(error).__name__}") from error
    if not isinstance(found, Mapping):
        raise TaskError(f"{what} holds a {type(found).__name__}, not a state dict; {LEGAL}")
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise TaskError(f"{what}: {name!r} is no tensor but of type {type(value).__name__}; {LEGAL}")
        if not _plain(value):
            raise TaskError(f"{what}: {name!r} is no plain tensor but {value.layout} of {value.dtype}")
        if (value.is_floating_point() or value.is_complex()) and not torch.isfinite(value).all():
            raise TaskError(f"{what}: {name!r} holds NaN or infinite values")
    return dict(found)


def lay_over(weights: Mapping[str, Tensor], model: nn.Module) -> None:
    """Copies `weights` into the model's parameters and persistent buffers in place.

    A tied tensor needs only one of its names.

    Raises:
        TaskError: the names or a shape differ from the model's, or a tied tensor's names disagree; the message names
            the first.
    """
    own = dict(_named(model))
    aliases: dict[int, list[str]] = {}
    for name, tensor in own.items():
        aliases.setdefault(id(tensor), []).append(name)
    lacking = next((names[0] for names in aliases.values() if not weights.keys() & names), None)
    foreign = next((name for name in weights if name not in own), None)
    wrong = [f"it lacks {lacking!r}"] if lacking is not None else []
    wrong += [f"it has {foreign!r}, which the model does not have"] if foreign is not None else []
    if wrong:
        raise TaskError(" and ".join(wrong))
    for name, value in weights.items():
        if value.shape != own[name].shape:
            raise TaskError(f"{name!r} has shape {tuple(value.shape)}, the model wants {tuple(own[name].shape)}")
    for names in aliases.values():
        given = [name for name in names if name in weights]
        for name in given[1:]:
            if not torch.equal(weights[name], weights[given[0]]):
                raise TaskError(f"{given[0]!r} and {name!r} are one tensor in the model, and differ in the file")
    with torch.no_grad():
        for name, value in weights.items():
            own[name].copy_(value)


def _parsed(name: str, data: bytes) -> Any:
    if name.endswith(".safetensors"):
        return safetensors.torch.load(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a pickle's protocol, on the way to an error
        return torch.load(BytesIO(data), map_location="cpu", weights_only=True)


def _plain(tensor: Tensor) -> bool:
    """Whether it holds a number for each of its entries; of one-byte floats torch cannot say which are finite."""
    tiny = tensor.is_floating_point() and tensor.itemsize == 1
    return tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_meta or tiny)


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers under all of their names. A state dict's hooks may rename theirs."""
    passing = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }
    yield from model.named_parameters(remove_duplicate=False)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name not in passing:
            yield name, buffer
