"""A pruned Hugging Face model as `save_pretrained` writes it, which `from_pretrained` loads without this library."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from orchestrator.errors import InputError
from orchestrator.export import ExportRefused
from orchestrator.export.certificate import difference
from orchestrator.tasks.data import Nested, call

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FARTHEST = 1e-5
"""Outputs that differ by more, relative to the largest, are another model's."""

Shapes = Mapping[str, tuple[int, ...]]


def save_pretrained(model: nn.Module, folder: str | Path, example: Nested) -> Path:
    """Write a model that is a `transformers.PreTrainedModel`, its removed units left out where its config can say so.

    Where only single weights are masked, the config stays as it is. Where widths are smaller, the numbers in the config
    are looked for that make all of them, such as `intermediate_size`; most configs have one number for all layers, so
    every layer must have lost as many units. What was written is loaded again and must give the same outputs.

    Args:
        model: as `orchestrator.load` gives it; stays as it is.
        folder: is made; `config.json` and `model.safetensors` are written into it.
        example: inputs to compare the outputs on.

    Returns:
        The folder.

    Raises:
        InputError: transformers is not installed, the model is none of its own, or the folder cannot be written.
        ExportRefused: no config of its kind has these widths, or the loaded model computes something else.
    """
    try:
        from transformers import PreTrainedModel
    except ImportError as error:
        raise InputError('save_pretrained wants transformers: pip install "orchardist[huggingface]"') from error
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"save_pretrained writes models of transformers, and this is a {type(model).__name__}")
    whole = type(model)(_config(model))
    whole.load_state_dict(model.state_dict())
    folder = Path(folder)
    try:
        whole.save_pretrained(folder)
    except OSError as error:
        raise InputError(f"the model cannot be written into {folder}: {error.strerror}") from error
    again = type(model).from_pretrained(folder)
    _compare(model, again, example)
    return folder


def _config(model: PreTrainedModel) -> Any:
    """A config whose model has the shapes of this one."""
    wanted = _shapes(model)
    before = _built(model, {})
    if before == wanted:
        return model.config
    if before is None or before.keys() != wanted.keys():
        raise ExportRefused("whole layers are gone, which a config cannot say")
    changes = sorted(
        {(old, new) for name in wanted for old, new in zip(before[name], wanted[name], strict=True) if old != new}
    )
    for change in _candidates(model.config, changes):
        if _built(model, change) == wanted:
            config = copy.deepcopy(model.config)
            for name, value in change.items():
                setattr(config, name, value)
            return config
    widths = ", ".join(f"{old} became {new}" for old, new in changes)
    raise ExportRefused(
        f"no {type(model.config).__name__} has these widths ({widths}): it has one number for all layers; "
        'scope = "layer" removes as many units from each'
    )


def _candidates(config: Any, changes: list[tuple[int, int]]) -> Iterator[dict[str, int]]:
    """For each width that changed one of the config's numbers that had its old value."""
    numbers = {name: value for name, value in config.to_dict().items() if type(value) is int}
    fields = [[name for name, value in numbers.items() if value == old] for old, _ in changes]
    for names in product(*fields):
        if len(set(names)) == len(names):
            yield {name: new for name, (_, new) in zip(names, changes, strict=True)}


def _built(model: PreTrainedModel, change: Mapping[str, int]) -> Shapes | None:
    """The shapes of a fresh model under a changed config; None where there is no such model."""
    config = copy.deepcopy(model.config)
    for name, value in change.items():
        setattr(config, name, value)
    try:
        with torch.device("meta"):
            return _shapes(type(model)(config))
    except Exception:  # a library's models refuse numbers that do not go together in many ways
        return None


def _shapes(model: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _compare(model: nn.Module, again: nn.Module, example: Nested) -> None:
    before = model.training
    try:
        with torch.no_grad():
            outputs = call(model.eval(), example)
            apart = difference(outputs, call(again.eval(), example))
    finally:
        model.train(before)
    largest = float(outputs.abs().max()) if isinstance(outputs, torch.Tensor) else 1.0
    if not apart <= FARTHEST * max(1.0, largest):
        raise ExportRefused(f"what was written computes something else: outputs differ by {apart:.1e}")
