"""Many masks made one: intersection, union, votes, and a wanted sparsity. Every rule is symmetric in its searches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from math import floor, prod

import torch
from torch import Tensor

from orchestrator.errors import PlanError, StageFailed
from orchestrator.pruning.allocation import exact
from orchestrator.pruning.masks import index_hashes, keep_top
from orchestrator.tickets import votes as voting
from orchestrator.tickets.packed import Masks, check_alike, intersect, pack, unite, unpack
from orchestrator.tickets.votes import Votes


def intersection(masks: Sequence[Masks]) -> dict[str, Tensor]:
    """What every mask keeps (Paganini & Forde, 2020, algorithm 1).

    Raises:
        PlanError: the masks are not of the same tensors; the message names the first. All rules here raise it.
    """
    check_alike([_shapes(each) for each in masks])
    return unpack(reduce(intersect, map(pack, masks)))


def union(masks: Sequence[Masks]) -> dict[str, Tensor]:
    """What any mask keeps."""
    check_alike([_shapes(each) for each in masks])
    return unpack(reduce(unite, map(pack, masks)))


def at_least(masks: Sequence[Masks], k: int) -> dict[str, Tensor]:
    """What `k` or more of the masks keep: 1 is the union, all of them the intersection.

    Raises:
        PlanError: `k` is not between 1 and the number of masks.
    """
    return unpack(voting.at_least(poll(masks), k))


def weighted_vote(masks: Sequence[Masks], weights: Sequence[float], share: float = 0.5) -> dict[str, Tensor]:
    """What masks keep that together hold at least `share` of all votes, compared exactly, in decimal.

    Raises:
        PlanError: a weight is not above 0, their number is not that of the masks, or `share` is not in (0, 1].
    """
    result = poll(masks, weights)
    return unpack(voting.at_least(result, voting.needed(share, result.total)))


def poll(masks: Sequence[Masks], weights: Sequence[float] | None = None) -> Votes:
    """The votes of all masks: one each, or in proportion to `weights`."""
    check_alike([_shapes(each) for each in masks])
    if weights is not None and len(weights) != len(masks):
        raise PlanError(f"{len(weights)} weights for {len(masks)} masks; legal: one for each")
    whole = [1] * len(masks) if weights is None else voting.whole_weights(weights)
    return reduce(voting.merge, (voting.cast(pack(each), weight) for each, weight in zip(masks, whole, strict=True)))


def most_voted(
    votes: Votes,
    keep: Mapping[tuple[str, ...], int],
    seed: int,
    standing: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The weights with the most votes, exactly as many as wanted.

    Ties fall by mean rank across the searches, then by a seeded hash of the index, never by position.

    Args:
        votes: of all searches.
        keep: how many weights stay in each group of tensors that are ranked together, as from `keep_for`; together the
            groups name every tensor once.
        seed: of the hash.
        standing: the sums of the searches' ranks, from `merge_standing`; without it ties fall by hash alone.
    """
    assert sorted(name for group in keep for name in group) == sorted(votes.shapes), "groups must part the tensors"
    counted = voting.counts(votes)
    masks: dict[str, Tensor] = {}
    for group, wanted in keep.items():
        masks |= _best(group, wanted, counted, seed, standing)
    return {name: masks[name] for name in votes.shapes}


def keep_for(
    shapes: Mapping[str, Sequence[int]], sparsity: float, *, total: int | None = None, per_layer: bool = False
) -> dict[tuple[str, ...], int]:
    """How many weights stay for a wanted sparsity: all tensors as one group, or each by itself.

    Per layer every tensor is equally dense, as far as whole numbers allow: the largest remainders are rounded up, the
    earlier tensor first among equals. The overall count is the same either way.

    Args:
        shapes: of the masked tensors.
        sparsity: the masked fraction of `total` weights.
        total: all prunable weights, those of unmasked tensors too; by default those of `shapes`.
        per_layer: whether each tensor is a group of its own.

    Raises:
        PlanError: the sparsity is not in [0, 1].
        StageFailed: the masked tensors have too few weights for it.
    """
    if not 0 <= sparsity <= 1:
        raise PlanError(f"a sparsity of {sparsity:g}; legal: 0 to 1")
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    whole = sum(sizes.values())
    masked = floor(exact(float(sparsity)) * (whole if total is None else total) + Fraction(1, 2))
    keep = whole - masked
    if keep < 0:
        raise StageFailed(f"a sparsity of {sparsity:g} masks {masked} weights, but only {whole} can be masked")
    if not per_layer:
        return {tuple(shapes): keep}
    shares = {name: Fraction(keep * size, max(1, whole)) for name, size in sizes.items()}
    kept = {name: floor(share) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: shares[name] - kept[name], reverse=True)
    for name in by_remainder[: keep - sum(kept.values())]:
        kept[name] += 1
    return {(name,): count for name, count in kept.items()}


def cut_off(masks: Masks) -> list[str]:
    """The tensors of which nothing is kept: through such a layer no signal passes."""
    return [name for name, mask in masks.items() if mask.numel() and not mask.any()]


@dataclass(frozen=True, kw_only=True)
class Repaired:
    """Masks without a layer that is cut off.

    Args:
        masks: after the repair; equal to those before where nothing was cut off.
        added: how many weights were put back, by tensor name; empty where nothing was.
    """

    masks: dict[str, Tensor]
    added: dict[str, int]


def repair(masks: Masks, votes: Votes, seed: int, standing: Mapping[str, Tensor] | None = None) -> Repaired:
    """Put the most-voted weights back into each layer that is cut off; other layers stay as they are.

    As many as the search that kept fewest there kept, so that the layer is no denser than any search wanted it; 1 where
    a search had cut the layer off itself. Ties as in `most_voted`. The result is less sparse: report `added`, and
    compare at the sparsity achieved.
    """
    check_alike([votes.shapes, _shapes(masks)])
    gone = cut_off(masks)
    added = {name: max(1, votes.fewest[name]) for name in gone}
    counted = voting.counts(votes) if gone else {}
    mended = dict(masks)
    for name in gone:
        mended |= _best((name,), added[name], counted, seed, standing)
    return Repaired(masks=mended, added=added)


def _best(
    group: tuple[str, ...],
    keep: int,
    counted: Mapping[str, Tensor],
    seed: int,
    standing: Mapping[str, Tensor] | None,
) -> dict[str, Tensor]:
    scores = torch.cat([counted[name].reshape(-1) for name in group])

    def ties() -> tuple[Tensor, Tensor]:
        ranks = torch.zeros_like(scores)
        if standing is not None:
            ranks = torch.cat([standing[name].reshape(-1) for name in group])
        return ranks, torch.cat([index_hashes(f"{seed}/{name}", counted[name].numel()) for name in group])

    kept = keep_top(scores, keep, ties)
    parts = torch.split(kept, [counted[name].numel() for name in group])
    return {name: part.reshape(counted[name].shape) for name, part in zip(group, parts, strict=True)}


def _shapes(masks: Masks) -> dict[str, tuple[int, ...]]:
    return {name: tuple(mask.shape) for name, mask in masks.items()}
