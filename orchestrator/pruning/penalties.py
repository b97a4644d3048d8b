"""Penalties that draw weights towards zero while a model trains: one function per penalty.

Each adds its (sub)gradient, times a strength, to a weight's gradient in place. It is zero where the weight is, so that
masked weights stay masked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.registry import Registry

if TYPE_CHECKING:  # the driver reads this registry, and has no use for torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Rows:
    """How a weight falls into rows: all that makes one output, a filter for a convolution.

    Args:
        dims: the dimensions that one row spans, at least one.
        roots: the square root of how many kept weights each row has, of the weight's shape but for sizes of 1 in
            `dims`. Masked ones are not counted, so that it is all the same whether they are there at all.
    """

    dims: tuple[int, ...]
    roots: Tensor


PENALTIES: Registry[Callable[[Tensor, Tensor, float, Rows], None]] = Registry("penalty")
penalty = PENALTIES.register


@penalty("l1")
def l1(weight: Tensor, gradient: Tensor, strength: float, rows: Rows) -> None:
    """Sum of the absolute weights (Tibshirani, 1996)."""
    gradient.add_(weight.sign(), alpha=strength)


@penalty("l2")
def l2(weight: Tensor, gradient: Tensor, strength: float, rows: Rows) -> None:
    """Half the sum of the squared weights (Hoerl & Kennard, 1970)."""
    gradient.add_(weight, alpha=strength)


@penalty("group-lasso")
def group_lasso(weight: Tensor, gradient: Tensor, strength: float, rows: Rows) -> None:
    """Sum over rows of norm times root of kept size (Yuan & Lin, 2006; per filter: Wen et al., 2016)."""
    import torch

    wide = torch.promote_types(weight.dtype, torch.float32)  # the squares of halves overflow
    norms = torch.linalg.vector_norm(weight, dim=rows.dims, keepdim=True, dtype=wide)
    pull = (strength * rows.roots / norms).masked_fill(norms == 0, 0.0)
    gradient.addcmul_(weight, pull)
