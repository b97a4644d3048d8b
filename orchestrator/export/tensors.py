"""A pruned model as files of named tensors (safetensors)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from orchestrator.export import MASKS, PACKED, WEIGHTS
from orchestrator.export.packed import packed_file
from orchestrator.state import State, of_model


def files_of(state: State) -> dict[str, bytes]:
    """The three files of every fetched model, by name.

    `weights.safetensors` is a plain state dict with zeros for what was pruned, `masks.safetensors` has a 0/1 tensor
    (uint8) for each pruned weight, and `packed.safetensors` holds kept values and where they stand alone.
    """
    masked = state.masked()
    return {
        WEIGHTS: save(dict(masked.weights)),
        MASKS: save({name: mask.to(torch.uint8) for name, mask in masked.masks.items()}),
        PACKED: packed_file(masked),
    }


def shrunk_file(model: nn.Module) -> bytes:
    """The state dict of a model whose removed units were cut out."""
    return save(of_model(model))


def masks_of(content: bytes) -> Mapping[str, Tensor]:
    """The masks of `masks.safetensors`, True = kept."""
    return {name: mask.bool() for name, mask in load(content).items()}
