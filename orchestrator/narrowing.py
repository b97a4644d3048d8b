"""Linear layers without the input columns whose outgoing weights are all masked: less arithmetic, the same training.

A column of zeros adds nothing to the output, gets no gradient that matters and needs no optimizer step. Whether a layer
is narrowed follows from its mask alone, so a plan is always or never run this way and stays reproducible.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.tasks.data import call

LEAST_SHARE = 1 / 32
"""A layer is left whole when fewer of its columns than this are empty: gathering the inputs would cost what it saves."""


@contextmanager
def narrowed(model: nn.Module, masks: Mapping[str, Tensor], probe: Any) -> Iterator[dict[str, Tensor]]:
    """Narrow the model's linear layers while the context lasts, in place.

    Args:
        model: holds masked weights.
        masks: by parameter name.
        probe: inputs of a few examples; a model that reads a layer's weight by itself is found out with them, and
            left whole.

    Yields:
        For each narrowed parameter the indices of its kept columns.
    """
    found = {name: columns for name, columns in _candidates(model, masks)}
    if found and not _same_outputs(model, found, probe):
        found = {}
    originals = {name: _narrow(model, name, columns) for name, columns in found.items()}
    try:
        yield found
    finally:
        for name, original in originals.items():
            _widen(model, name, original, found[name])


def widen_columns(tensor: Tensor, columns: Tensor, like: Tensor) -> Tensor:
    """`tensor` of shape (rows, len(columns)) in the full shape of `like`, zero in the other columns."""
    full = torch.zeros_like(like)
    full[:, columns] = tensor
    return full


def _candidates(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    times_used: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            times_used[id(parameter)] = times_used.get(id(parameter), 0) + 1
    for path, module in model.named_modules():
        name = f"{path}.weight" if path else "weight"
        if type(module) is not nn.Linear or name not in masks or times_used[id(module.weight)] > 1:
            continue
        if module._forward_hooks or module._forward_pre_hooks:
            continue
        columns = masks[name].any(dim=0)
        empty = columns.numel() - int(columns.sum())
        if empty >= LEAST_SHARE * columns.numel() and bool(columns.any()):
            yield name, torch.nonzero(columns).squeeze(1).to(module.weight.device)


def _same_outputs(model: nn.Module, found: Mapping[str, Tensor], probe: Any) -> bool:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            whole = call(model, probe)
            originals = {name: _narrow(model, name, columns) for name, columns in found.items()}
            try:
                narrow = call(model, probe)
            except (RuntimeError, IndexError):
                return False
            finally:
                for name, original in originals.items():
                    _widen(model, name, original, found[name])
    finally:
        model.train(training)
    if not (isinstance(whole, Tensor) and isinstance(narrow, Tensor)):
        return False
    return whole.shape == narrow.shape and torch.allclose(whole, narrow, rtol=1e-3, atol=1e-5)


def _narrow(model: nn.Module, name: str, columns: Tensor) -> nn.Parameter:
    module = model.get_submodule(name.rpartition(".")[0])
    original = module.weight
    assert isinstance(original, nn.Parameter)
    module.weight = nn.Parameter(original.detach().index_select(1, columns), original.requires_grad)
    module.__dict__["forward"] = MethodType(lambda self, x: F.linear(x.index_select(-1, columns), self.weight, self.bias), module)
    return original


def _widen(model: nn.Module, name: str, original: nn.Parameter, columns: Tensor) -> None:
    module = model.get_submodule(name.rpartition(".")[0])
    with torch.no_grad():
        original.copy_(widen_columns(module.weight.detach(), columns, original))
    module.weight = original
    del module.__dict__["forward"]
