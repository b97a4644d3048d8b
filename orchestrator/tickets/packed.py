"""Masks as bits, 64 to the word: what they have in common is found a word at a time, and they travel small."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.errors import PlanError
from orchestrator.state import pack_bits, unpack_bits

Masks = Mapping[str, Tensor]
"""Masks by tensor name, bool and of the tensor's shape; True = kept."""
Words = NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Masks as bits in the order that states are stored in; the bits that fill up a tensor's last word are 0.

    Args:
        words: by tensor name, uint64 of shape (entries / 64, rounded up,).
        shapes: the shape of each tensor.
    """

    words: Mapping[str, Words]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def nbytes(self) -> int:
        """Memory that the bits take."""
        return sum(words.nbytes for words in self.words.values())


def pack(masks: Masks) -> Packed:
    """The masks as bits.

    Raises:
        PlanError: a tensor is not bool.
    """
    for name, mask in masks.items():
        if mask.dtype != torch.bool:
            raise PlanError(f"the mask of {name!r} holds {mask.dtype}; legal: torch.bool")
    return Packed(
        words={name: _words(mask) for name, mask in masks.items()},
        shapes={name: tuple(mask.shape) for name, mask in masks.items()},
    )


def unpack(packed: Packed) -> dict[str, Tensor]:
    """The inverse of `pack`."""
    return {name: unpacked(words, packed.shapes[name]) for name, words in packed.words.items()}


def unpacked(words: Words, shape: Sequence[int]) -> Tensor:
    """One tensor's bits as bools of `shape`."""
    return unpack_bits(torch.from_numpy(words.view(np.uint8)), list(shape))


def intersect(a: Packed, b: Packed) -> Packed:
    """What both keep. Associative, commutative, idempotent: partial results merge in any order.

    Raises:
        PlanError: the two are not masks of the same tensors.
    """
    check_alike([a.shapes, b.shapes])
    return Packed(words={name: words & b.words[name] for name, words in a.words.items()}, shapes=a.shapes)


def unite(a: Packed, b: Packed) -> Packed:
    """What either keeps. Associative, commutative, idempotent: partial results merge in any order.

    Raises:
        PlanError: the two are not masks of the same tensors.
    """
    check_alike([a.shapes, b.shapes])
    return Packed(words={name: words | b.words[name] for name, words in a.words.items()}, shapes=a.shapes)


def kept_counts(packed: Packed) -> dict[str, int]:
    """How many weights of each tensor are kept."""
    return {name: int(np.bitwise_count(words).sum(dtype=np.int64)) for name, words in packed.words.items()}


def in_common(masks: Sequence[Masks]) -> list[Masks]:
    """Each set of masks without the tensors that not all have in the same shape: heads of different tasks."""
    if not masks:
        return []
    names = [name for name, mask in masks[0].items() if all(_has(other, name, mask) for other in masks)]
    return [{name: each[name] for name in names} for each in masks]


def _has(masks: Masks, name: str, like: Tensor) -> bool:
    return name in masks and masks[name].shape == like.shape


def check_alike(shapes: Sequence[Mapping[str, tuple[int, ...]]]) -> None:
    """Refuse masks that are not of the same tensors.

    Args:
        shapes: by tensor name, for each set of masks.

    Raises:
        PlanError: naming the first tensor, by name, that is missing somewhere or has two shapes; or there are no masks.
    """
    if not shapes:
        raise PlanError("there are no masks to combine; legal: one or more")
    first = shapes[0]
    strange = {name for other in shapes for name in first.keys() ^ other.keys()}
    unequal = {name for other in shapes for name in first.keys() & other.keys() if other[name] != first[name]}
    wrong = min(strange | unequal, default=None)
    if wrong is None:
        return
    if wrong in strange:
        raise PlanError(f"the masks are not of the same tensors: {wrong!r} is in only some of them")
    found = " and ".join(str(shape) for shape in sorted({other[wrong] for other in shapes}))
    raise PlanError(f"the masks are not of the same tensors: {wrong!r} has the shapes {found}")


def _words(mask: Tensor) -> Words:
    packed = pack_bits(mask.detach().to("cpu")).numpy()
    words = np.zeros(-(-packed.size // 8), dtype=np.uint64)
    words.view(np.uint8)[: packed.size] = packed
    return words
