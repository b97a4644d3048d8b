"""Structures inside one tensor: blocks of r × c weights, and n kept of every m along the inputs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import ceil, prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the driver asks what a name means, and has no use for torch
    from torch import Tensor

UNITS = ("neuron", "filter", "channel", "head", "layer")
"""The structures that are made of units, which are masked in every tensor that makes or reads them."""

NM = re.compile(r"([1-9]\d{0,5}):([1-9]\d{0,5})")
BLOCK = re.compile(r"([1-9]\d{0,5})x([1-9]\d{0,5})")


def n_of_m(structure: str) -> tuple[int, int] | None:
    """(n, m) for a structure such as "2:4": n weights kept of every m; None for any other structure."""
    found = NM.fullmatch(structure)
    return (int(found[1]), int(found[2])) if found and int(found[1]) < int(found[2]) else None


def block_size(structure: str) -> tuple[int, int] | None:
    """(rows, columns) for a structure such as "4x1"; None for any other structure."""
    found = BLOCK.fullmatch(structure)
    return (int(found[1]), int(found[2])) if found else None


def fits(shape: Sequence[int], m: int) -> bool:
    """Whether m divides the input channels of a tensor of `shape`."""
    return len(shape) >= 2 and shape[1] % m == 0


def keep_n_of_m(scores: Tensor, before: Tensor, magnitudes: Tensor, hashes: Tensor, n: int, m: int) -> Tensor:
    """The mask that keeps the n best of every m consecutive input channels, for convolutions at each kernel position.

    Args:
        scores: of the weight's shape (out, in, …), where m divides `in`; higher is kept.
        before: bool, of that shape; what was masked stays so.
        magnitudes: what decides between equal scores, of that shape.
        hashes: what decides between equal magnitudes, int64 of that shape.
        n: how many of each m stay, at most.
        m: how many consecutive input channels make a group.

    Raises:
        NotFinite: a score in `before` is NaN or infinite.
    """
    from orchestrator.pruning.masks import ranks_in_rows

    last = before.movedim(1, -1).shape

    def grouped(values: Tensor) -> Tensor:
        return values.movedim(1, -1).reshape(*last[:-1], -1, m)

    best = ranks_in_rows(*map(grouped, (scores, before, magnitudes, hashes))) < n
    return best.reshape(last).movedim(-1, 1).logical_and(before).contiguous()


def turned(tensor: Tensor, groups: int) -> Tensor:
    """A transposed convolution's weight, or what has its shape, with the outputs first; and the other way round.

    (in, out / groups, …) becomes (out, in / groups, …), as a plain convolution's is, and that the first again.
    """
    return tensor.reshape(groups, -1, *tensor.shape[1:]).transpose(1, 2).flatten(0, 1).contiguous()


def block_count(shape: Sequence[int], rows: int, columns: int) -> int:
    """How many blocks a tensor of `shape` has, the smaller ones at its edges included."""
    return ceil(shape[0] / rows) * ceil(prod(shape[1:]) / columns)


def block_owner(shape: Sequence[int], rows: int, columns: int) -> tuple[Tensor, int]:
    """The block that each weight lies in, int64 of `shape`, and how many blocks there are.

    The tensor is seen as a matrix (out, everything else); blocks at its right and lower edges may be smaller.
    """
    import torch

    height, width = shape[0], prod(shape[1:])
    across = ceil(width / columns)
    owner = (torch.arange(height) // rows * across)[:, None] + torch.arange(width) // columns
    return owner.reshape(*shape), block_count(shape, rows, columns)
