"""How large a pruned model is, and the two ratios of Blalock et al. (2020), original over new."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf

from torch import Tensor, nn

from orchestrator.errors import InputError


def parameters(model: nn.Module, masks: Mapping[str, Tensor]) -> tuple[int, int]:
    """How many parameters are left, and how many there are: (nonzero, total), tied tensors once.

    Masked entries count as zero; all others count as nonzero whatever their value, biases and norms among them.

    Args:
        masks: boolean tensors by parameter name, True = kept; under any of the names of a tied tensor.

    Raises:
        InputError: a mask for a parameter that the model does not have, or of another shape.
    """
    all_names = dict(model.named_parameters(remove_duplicate=False))
    masked: dict[int, int] = {}
    for name, mask in masks.items():
        if name not in all_names:
            raise InputError(f"there is a mask for {name!r}, which is no parameter of the model")
        parameter = all_names[name]
        if parameter.shape != mask.shape:
            raise InputError(
                f"the mask of {name!r} has shape {tuple(mask.shape)}, its weights {tuple(parameter.shape)}"
            )
        masked[id(parameter)] = mask.numel() - int(mask.count_nonzero())
    total = sum(parameter.numel() for parameter in model.parameters())
    return total - sum(masked.values()), total


def compression_ratio(nonzero: int, total: int) -> float:
    """Original size over new size, in parameters (Blalock et al., 2020); infinite where nothing is left."""
    return total / nonzero if nonzero else inf


def theoretical_speedup(flops: float, flops_effective: float) -> float:
    """Original operations over those that are left (Blalock et al., 2020); infinite where nothing is left."""
    return flops / flops_effective if flops_effective else inf
