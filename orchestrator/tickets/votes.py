"""How many masks keep each weight, counted in bits, so that the counts of many searches merge as a tree, in any order.

A count is held as bit planes: plane b holds bit b of the count of 64 weights in each word. Adding two counts is a
ripple of a few word operations, and integer counts are exact, so every order of merging gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm

import numpy as np
import torch
from torch import Tensor

from orchestrator.errors import NotFinite, PlanError
from orchestrator.pruning.allocation import exact
from orchestrator.tickets.packed import Packed, Words, check_alike, kept_counts, unpacked

Planes = tuple[Words, ...]


@dataclass(frozen=True, kw_only=True)
class Votes:
    """The votes for each weight.

    Args:
        planes: by tensor name, least significant bit first; as many as the bits of `total`.
        shapes: the shape of each tensor.
        total: the votes that a weight has which every mask keeps.
        fewest: the smallest number of weights that any one mask keeps in each tensor.
    """

    planes: Mapping[str, Planes]
    shapes: Mapping[str, tuple[int, ...]]
    total: int
    fewest: Mapping[str, int]


def cast(packed: Packed, weight: int = 1) -> Votes:
    """One search's votes: `weight` for each weight that it keeps.

    Raises:
        PlanError: `weight` is below 1.
    """
    if weight < 1:
        raise PlanError(f"a search has a vote of {weight}; legal: 1 and more")
    planes = {
        name: tuple(words if weight >> bit & 1 else np.zeros_like(words) for bit in range(weight.bit_length()))
        for name, words in packed.words.items()
    }
    return Votes(planes=planes, shapes=packed.shapes, total=weight, fewest=kept_counts(packed))


def merge(a: Votes, b: Votes) -> Votes:
    """The votes of both together. Associative and commutative, to the byte.

    Raises:
        PlanError: the two are not of the same tensors.
    """
    check_alike([a.shapes, b.shapes])
    total = a.total + b.total
    return Votes(
        planes={name: _added(planes, b.planes[name], total.bit_length()) for name, planes in a.planes.items()},
        shapes=a.shapes,
        total=total,
        fewest={name: min(count, b.fewest[name]) for name, count in a.fewest.items()},
    )


def at_least(votes: Votes, threshold: int) -> Packed:
    """The weights with `threshold` votes or more.

    Raises:
        PlanError: `threshold` is not between 1 and all votes.
    """
    if not 1 <= threshold <= votes.total:
        raise PlanError(f"at least {threshold} of {votes.total} votes; legal: 1 to {votes.total}")
    words = {name: _reach(planes, threshold) for name, planes in votes.planes.items()}
    return Packed(words=words, shapes=votes.shapes)


def counts(votes: Votes) -> dict[str, Tensor]:
    """The votes for each weight as numbers: int64, of the tensors' shapes.

    Raises:
        PlanError: there are more votes than 62 bits hold.
    """
    if votes.total.bit_length() > 62:
        raise PlanError("the searches' votes need more than 62 bits; legal: weights with fewer digits")
    result = {}
    for name, planes in votes.planes.items():
        found = torch.zeros(votes.shapes[name], dtype=torch.int64)
        for bit, plane in enumerate(planes):
            found += unpacked(plane, votes.shapes[name]).to(torch.int64) << bit
        result[name] = found
    return result


def whole_weights(weights: Sequence[float]) -> list[int]:
    """The smallest whole numbers in the same proportions as the weights, taken as they are written in decimal.

    Raises:
        PlanError: a weight is not above 0, or there is none.
    """
    for weight in weights:
        if not 0 < weight < float("inf"):
            raise PlanError(f"a search's vote weighs {weight:g}; legal: above 0")
    if not weights:
        raise PlanError("no search has a vote; legal: one or more")
    fractions = [exact(float(weight)) for weight in weights]
    scale = lcm(*(fraction.denominator for fraction in fractions))
    whole = [int(fraction * scale) for fraction in fractions]
    return [value // gcd(*whole) for value in whole]


def needed(share: float, total: int) -> int:
    """The fewest votes that are at least `share` of all, and never none.

    Raises:
        PlanError: `share` is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise PlanError(f"a weight is kept at a share of {share:g} of the votes; legal: above 0, at most 1")
    wanted: Fraction = exact(float(share)) * total
    return max(1, -(-wanted.numerator // wanted.denominator))


def standing(scores: Mapping[str, Tensor], groups: Sequence[tuple[str, ...]]) -> dict[str, Tensor]:
    """Each weight's rank in one search: int64, higher is better; equal scores share their mean rank.

    The rank counts the scores below and those not above, twice the mean rank, so that it stays a whole number. Sums of
    it over searches (`merge_standing`) order the weights as their mean ranks do.

    Args:
        scores: of one search, by tensor name; higher is kept.
        groups: the tensors that are ranked together.

    Raises:
        NotFinite: a score is NaN or infinite.
    """
    result: dict[str, Tensor] = {}
    for group in groups:
        joined = torch.cat([scores[name].detach().to("cpu").reshape(-1) for name in group])
        if not torch.isfinite(joined).all():
            raise NotFinite(f"scores of {', '.join(group)} are NaN or infinite")
        ordered, places = joined.sort()
        _, lengths = torch.unique_consecutive(ordered, return_counts=True)
        not_above = lengths.cumsum(0)
        ranks = torch.empty_like(places)
        ranks[places] = (2 * not_above - lengths).repeat_interleave(lengths)
        parts = torch.split(ranks, [scores[name].numel() for name in group])
        result |= {name: part.reshape(scores[name].shape) for name, part in zip(group, parts, strict=True)}
    return result


def merge_standing(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sums of the ranks of both. Associative and commutative."""
    check_alike([{name: tuple(ranks.shape) for name, ranks in each.items()} for each in (a, b)])
    return {name: ranks + b[name] for name, ranks in a.items()}


def _added(a: Planes, b: Planes, bits: int) -> Planes:
    nothing = np.zeros_like(a[0])
    result = []
    carry = nothing
    for bit in range(bits):
        x = a[bit] if bit < len(a) else nothing
        y = b[bit] if bit < len(b) else nothing
        either = x ^ y
        result.append(either ^ carry)
        carry = (x & y) | (either & carry)
    return tuple(result)


def _reach(planes: Planes, threshold: int) -> Words:
    """Compare from the highest bit down: above, or still level at the end."""
    above = np.zeros_like(planes[0])
    level = ~above
    for bit in reversed(range(len(planes))):
        if threshold >> bit & 1:
            level = level & planes[bit]
        else:
            above |= level & planes[bit]
            level = level & ~planes[bit]
    return above | level
