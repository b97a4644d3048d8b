"""How much masks agree, always beside how much they would agree by chance.

By chance means: each mask keeps as many weights of each layer as it does, anywhere in that layer, independently of the
other masks. What two masks then share in a layer is hypergeometric; layers add up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from orchestrator.errors import PlanError
from orchestrator.seeds import derive
from orchestrator.tickets.packed import Packed, Words, check_alike, kept_counts
from orchestrator.tickets.votes import at_least, cast, merge

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
T = TypeVar("T")

CHUNK = 2048
"""Words of each mask that are compared at a time, so that they stay in the processor's cache."""


@dataclass(frozen=True, kw_only=True)
class ByLayer(Generic[T]):
    """The same figure over all tensors together, and for each by name."""

    overall: T
    layers: Mapping[str, T]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Every pair of N masks: each field but `size` an array of shape (N, N), symmetric.

    On the diagonal stands each mask with itself, and as chance two independent masks that keep as many.

    Args:
        size: how many weights there are, kept or not.
        shared: how many both keep.
        jaccard: shared / kept by either; 1 where both keep nothing.
        hamming: share of the weights of which one mask keeps and the other does not.
        overlap: shared / kept by the one that keeps fewer; 1 where it keeps nothing.
        chance_shared: expected by chance, exactly.
        chance_shared_std: its standard deviation, exactly.
        chance_jaccard: expected by chance, to second order in what is shared: the error falls with the square of the
            size, and d / (2 - d) is approached for two masks of density d.
        chance_hamming: expected by chance, exactly.
        chance_overlap: expected by chance, exactly.
        z: (shared - chance_shared) / chance_shared_std; NaN where chance has no freedom, as in a dense layer.
        excess: (shared - chance_shared) / (mean of what the two keep - chance_shared), which is Cohen's kappa (1960):
            expected to be 0 for independent masks, 1 for equal masks and no others; NaN where chance has no freedom.
        excess_error: its standard deviation for independent masks.
    """

    size: int
    shared: Counts
    jaccard: Floats
    hamming: Floats
    overlap: Floats
    chance_shared: Floats
    chance_shared_std: Floats
    chance_jaccard: Floats
    chance_hamming: Floats
    chance_overlap: Floats
    z: Floats
    excess: Floats
    excess_error: Floats


def agreement(masks: Sequence[Packed]) -> ByLayer[Agreement]:
    """Every pair of the masks, per layer and overall.

    Raises:
        PlanError: the masks are not of the same tensors.
    """
    shared = _shared(masks)
    sizes = {name: prod(shape) for name, shape in masks[0].shapes.items()}
    chance = {name: _chance(sizes[name], np.diagonal(both)) for name, both in shared.items()}
    layers = {name: _agreement(sizes[name], shared[name], *chance[name]) for name in shared}
    overall = _agreement(sum(sizes.values()), *_summed(shared, chance))
    return ByLayer(overall=overall, layers=layers)


@dataclass(frozen=True, kw_only=True)
class Permuted:
    """What N masks share when each is shuffled within its layers: fields of shape (N, N), over the draws.

    Args:
        draws: how many times all masks were shuffled.
        shared: mean of what both keep.
        shared_std: its standard deviation over draws.
        jaccard: mean of the Jaccard similarities.
        jaccard_std: their standard deviation over draws.
        z: of what the masks share, unshuffled, against these draws; NaN where they do not vary.
    """

    draws: int
    shared: Floats
    shared_std: Floats
    jaccard: Floats
    jaccard_std: Floats
    z: Floats


def by_permutation(masks: Sequence[Packed], draws: int, seed: int) -> ByLayer[Permuted]:
    """The chance that `agreement` computes, found by shuffling: the one checks the other.

    Raises:
        PlanError: fewer than 2 draws, or the masks are not of the same tensors.
    """
    if draws < 2:
        raise PlanError(f"{draws} permutations; legal: 2 and more")
    found = _shared(masks)
    drawn: dict[str, list[Counts]] = {name: [] for name in found}
    for name, shape in masks[0].shapes.items():
        bits = np.stack([np.unpackbits(each.words[name].view(np.uint8), count=prod(shape)) for each in masks])
        generator = np.random.Generator(np.random.PCG64(derive(seed, "permutation", name)))
        for _ in range(draws):
            shuffled = np.packbits(generator.permuted(bits, axis=1), axis=1)
            padded = np.pad(shuffled, ((0, 0), (0, -shuffled.shape[1] % 8)))
            drawn[name].append(_all_pairs(padded.view(np.uint64)))
    stacked = {name: np.stack(counts) for name, counts in drawn.items()}
    layers = {name: _permuted(found[name], counts) for name, counts in stacked.items()}
    overall = _permuted(_total(found), _total(stacked))
    return ByLayer(overall=overall, layers=layers)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The share of weights that at least k of N masks keep, for k = 1, 2, …, N.

    Args:
        share: as found.
        chance: expected of independent masks with the same counts in each layer (Poisson binomial), exactly.
    """

    share: tuple[float, ...]
    chance: tuple[float, ...]


def k_of_n(masks: Sequence[Packed]) -> ByLayer[Curve]:
    """How many weights at least k of the masks keep, per layer and overall.

    Raises:
        PlanError: the masks are not of the same tensors.
    """
    check_alike([each.shapes for each in masks])
    votes = reduce(merge, map(cast, masks))
    sizes = {name: prod(shape) for name, shape in masks[0].shapes.items()}
    kept = [kept_counts(each) for each in masks]
    reached = [kept_counts(at_least(votes, k)) for k in range(1, len(masks) + 1)]
    found = {name: np.array([each[name] for each in reached], dtype=np.float64) for name in sizes}
    chance = {
        name: size * _at_least_by_chance([each[name] / max(1, size) for each in kept]) for name, size in sizes.items()
    }
    layers = {name: _curve(size, found[name], chance[name]) for name, size in sizes.items()}
    return ByLayer(overall=_curve(sum(sizes.values()), _total(found), _total(chance)), layers=layers)


def _shared(masks: Sequence[Packed]) -> dict[str, Counts]:
    check_alike([each.shapes for each in masks])
    return {name: _all_pairs(np.stack([each.words[name] for each in masks])) for name in masks[0].words}


def _all_pairs(words: Words) -> Counts:
    """What each pair of rows has in common: from (N, words) to (N, N)."""
    rows = len(words)
    shared = np.zeros((rows, rows), dtype=np.int64)
    for start in range(0, words.shape[1], CHUNK):
        block = words[:, start : start + CHUNK]
        for row in range(rows):
            shared[row, row:] += np.bitwise_count(block[row] & block[row:]).sum(axis=1, dtype=np.int64)
    upper = np.triu(shared, 1)
    return shared + upper.T


def _chance(size: int, kept: Counts) -> tuple[Floats, Floats]:
    """Mean and variance of what each pair shares by chance: hypergeometric."""
    density = kept / max(1, size)
    mean = np.multiply.outer(kept, kept) / max(1, size)
    spread = np.outer(density * (1 - density), density * (1 - density)) * size
    return mean, spread * (size / max(1, size - 1))


def _summed(shared: Mapping[str, Counts], chance: Mapping[str, tuple[Floats, Floats]]) -> tuple[Counts, Floats, Floats]:
    means = {name: mean for name, (mean, _) in chance.items()}
    variances = {name: variance for name, (_, variance) in chance.items()}
    return _total(shared), _total(means), _total(variances)


def _total(arrays: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    if not arrays:
        raise PlanError("the masks hold no tensor; legal: one or more")
    return reduce(np.add, arrays.values())


def _agreement(size: int, shared: Counts, mean: Floats, variance: Floats) -> Agreement:
    kept = np.diagonal(shared)
    both = np.add.outer(kept, kept)
    fewer = np.minimum.outer(kept, kept)
    std = np.sqrt(variance)
    room = both / 2 - mean
    free = variance > 0
    # The second derivative of s / (both - s) is 2 · both / (both - s)³.
    curvature = _ratio(both * variance, (both - mean) ** 3, 0.0)
    return Agreement(
        size=size,
        shared=shared,
        jaccard=_ratio(shared, both - shared, 1.0),
        hamming=(both - 2 * shared) / max(1, size),
        overlap=_ratio(shared, fewer, 1.0),
        chance_shared=mean,
        chance_shared_std=std,
        chance_jaccard=_ratio(mean, both - mean, 1.0) + curvature,
        chance_hamming=(both - 2 * mean) / max(1, size),
        chance_overlap=_ratio(mean, fewer, 1.0),
        z=np.where(free, _ratio(shared - mean, std, np.nan), np.nan),
        excess=np.where(free, _ratio(shared - mean, room, np.nan), np.nan),
        excess_error=np.where(free, _ratio(std, room, np.nan), np.nan),
    )


def _permuted(shared: Counts, drawn: Counts) -> Permuted:
    kept = np.diagonal(shared)
    jaccard = _ratio(drawn, np.add.outer(kept, kept) - drawn, 1.0)
    # A mask and its own shuffle are one: the diagonal is what it keeps, in every draw.
    mean, std = drawn.mean(axis=0), drawn.std(axis=0, ddof=1)
    return Permuted(
        draws=len(drawn),
        shared=mean,
        shared_std=std,
        jaccard=jaccard.mean(axis=0),
        jaccard_std=jaccard.std(axis=0, ddof=1),
        z=_ratio(shared - mean, std, np.nan),
    )


def _at_least_by_chance(densities: Sequence[float]) -> Floats:
    """P(at least k of N), k = 1..N, for independent events."""
    exactly = reduce(np.convolve, [np.array([1 - density, density]) for density in densities])
    return np.cumsum(exactly[::-1])[::-1][1:]


def _curve(size: int, found: Floats, chance: Floats) -> Curve:
    return Curve(share=tuple((found / max(1, size)).tolist()), chance=tuple((chance / max(1, size)).tolist()))


def _ratio(above: NDArray[Any], below: NDArray[Any], otherwise: float) -> Floats:
    """above / below, and `otherwise` where that is divided by 0."""
    result = np.full(np.broadcast_shapes(above.shape, below.shape), otherwise, dtype=np.float64)
    np.divide(above, below, out=result, where=below != 0)
    return result
