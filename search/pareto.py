"""What is best when several objectives count: non-dominated fronts, ranks, hypervolume and the knee.

Every function takes `values` of shape (n, m), one row a point and one column an objective, with one direction a column.
A point dominates another when it is at least as good in every objective and better in one. A row with a NaN was not
fully measured: it dominates nothing, is on no front and adds no volume.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Direction = Literal["maximise", "minimise"]
Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

DIRECTIONS: tuple[Direction, ...] = ("maximise", "minimise")

# Rows compared with the front at a time: small enough that the comparison stays in cache.
_BLOCK = 512
# Of so many rows, a few are looked at first: they dominate nearly all the others.
_SAMPLE = 4096
_PIVOTS = 16


def front(values: ArrayLike, directions: Sequence[Direction]) -> Indices:
    """The indices of the non-dominated rows, ascending; equal rows of the front are all on it.

    One and two objectives take O(n log n). More are sorted by their sum and compared, block by block, with the front so
    far: O(n * front).
    """
    costs = _costs(values, directions)
    unmeasured = np.isnan(costs).any(axis=1)
    if not unmeasured.any():
        return np.sort(_minimal(costs))
    measured = np.flatnonzero(~unmeasured)
    return np.sort(measured[_minimal(_rows(costs, measured))])


def ranks(values: ArrayLike, directions: Sequence[Direction]) -> Indices:
    """Each row's non-domination rank: 0 on the front, 1 on the front of the rest, and so on; NaN rows come last."""
    costs = _costs(values, directions)
    result = np.zeros(len(costs), dtype=np.intp)
    measured = np.flatnonzero(~np.isnan(costs).any(axis=1))
    if costs.shape[1] <= 2:
        result[measured] = _ranks_by_sweep(costs[measured])
    else:
        left, rank = measured, 0
        while len(left):
            best = _minimal(costs[left])
            result[left[best]] = rank
            left, rank = np.delete(left, best), rank + 1
    result[np.isnan(costs).any(axis=1)] = result[measured].max(initial=-1) + 1
    return result


def crowding(values: ArrayLike, directions: Sequence[Direction]) -> Floats:
    """How alone each row is among the others (Deb et al., 2002): greater is lonelier, the extremes are infinite.

    Per objective the gap between a row's two neighbours over the whole spread, summed; meant for rows of one front.
    """
    costs = _costs(values, directions)
    alone = np.zeros(len(costs))
    for column in costs.T:
        order = np.argsort(column, kind="stable")
        ordered = column[order]
        if len(order) == 0 or not np.isfinite(spread := ordered[-1] - ordered[0]) or spread == 0:
            continue
        alone[order[[0, -1]]] = np.inf
        alone[order[1:-1]] += (ordered[2:] - ordered[:-2]) / spread
    return alone


def best_first(
    values: ArrayLike, constraints: Sequence[Mapping[str, float]], directions: Sequence[Direction]
) -> Indices:
    """The indices of all rows from the best on: the least violation, then the lowest rank, then the loneliest of it.

    Args:
        values: (n, m).
        constraints: for each row how far it is beyond each bound; 0 or less where it keeps it.
        directions: one for each column of `values`.

    Equal rows keep their order.
    """
    costs = np.array([sum(max(value, 0.0) for value in each.values()) for each in constraints])
    rank = ranks(values, directions)
    array = np.asarray(values, dtype=np.float64)
    alone = np.zeros(len(rank))
    for level in np.unique(rank):
        alone[rank == level] = crowding(array[rank == level], directions)
    order: Indices = np.lexsort((-alone, rank, costs))
    return order


def hypervolume(values: ArrayLike, directions: Sequence[Direction], reference: Sequence[float]) -> float:
    """The volume that the rows dominate, up to `reference`, in the units of `values`; rows beyond it add nothing.

    Exact: a sweep in two objectives, hypervolume by slicing objectives (While et al., 2006) in more, which suits fronts
    of some hundred points in three or four objectives.
    """
    costs = _costs(values, directions)
    limit = _costs([list(reference)], directions)[0]
    inside = costs[(costs < limit).all(axis=1)]
    return _volume(inside, limit)


def knee(values: ArrayLike, directions: Sequence[Direction]) -> int:
    """The index of the front's knee: beyond it, a little more of one objective costs much of another.

    Each objective is scaled to [0, 1] over the front; the knee is farthest from the hyperplane through the best
    point of each objective, on the side of the ideal (Das, "On characterizing the knee of the Pareto curve", 1999).
    Where none lies on that side, and on a front of one or two points, there is no knee: then the point nearest to the
    ideal, and among equals the better one in the first objective.

    Raises:
        ValueError: no row is fully measured.
    """
    candidates = front(values, directions)
    if not len(candidates):
        raise ValueError("no point is measured in every objective, so there is no knee")
    costs = _costs(values, directions)[candidates]
    spread = costs.max(axis=0) - costs.min(axis=0)
    scaled = (costs - costs.min(axis=0)) / np.where(spread > 0, spread, 1.0)
    depth = _depth(scaled)
    if len(candidates) < 3 or depth.max() <= 1e-12:
        depth = -np.linalg.norm(scaled, axis=1)
    deepest = np.flatnonzero(depth >= depth.max() - 1e-12)
    return int(candidates[deepest[np.argmin(costs[deepest, 0])]])


def _costs(values: ArrayLike, directions: Sequence[Direction]) -> Floats:
    """`values` as floats to be minimised, checked against the directions; each column lies in one piece."""
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0 and array.ndim == 1:
        array = array.reshape(0, len(directions))
    if array.ndim != 2 or array.shape[1] != len(directions):
        raise ValueError(f"values of shape {array.shape} do not fit {len(directions)} objectives: they must be (n, m)")
    for direction in directions:
        if direction not in DIRECTIONS:
            raise ValueError(f"unknown direction {direction!r}. Known: {', '.join(DIRECTIONS)}")
    if not len(directions):
        raise ValueError("there must be at least one objective")
    signs: Floats = np.array([-1.0 if direction == "maximise" else 1.0 for direction in directions])
    return np.multiply(array, signs, order="F")


def _rows(costs: Floats, indices: Indices) -> Floats:
    """Some rows, whose columns lie in one piece again."""
    return costs.T[:, indices].T


def _minimal(costs: Floats) -> Indices:
    """The indices of the rows that no row dominates, in any order; no NaN."""
    if not len(costs):
        return np.empty(0, dtype=np.intp)
    if costs.shape[1] == 1:
        return np.flatnonzero(costs[:, 0] == costs[:, 0].min())
    left = _thinned(costs)
    candidates = _rows(costs, left)
    return left[_minimal_of_two(candidates) if costs.shape[1] == 2 else _minimal_by_blocks(candidates)]


def _thinned(costs: Floats) -> Indices:
    """The rows that a few good rows do not dominate: a cheap pass over each instead of a place in the sort."""
    if len(costs) <= _SAMPLE:
        return np.arange(len(costs))
    sample = _rows(costs, np.arange(0, len(costs), len(costs) // _SAMPLE))
    if costs.shape[1] == 2:
        return np.flatnonzero(_reaches_below(sample[_minimal_of_two(sample)], costs))
    left = np.arange(len(costs))
    sums = _scaled_sums(sample)
    for _ in range(_PIVOTS):
        if not len(sample):
            break
        pivot = sample[int(np.argmin(sums))]
        kept = ~_dominated_by(pivot, _rows(costs, left))
        left = left[kept]
        if kept.mean() > 0.9:
            break
        # The pivot stays among the rows, but is not chosen again.
        others = ~_dominated_by(pivot, sample) & (sample != pivot).any(axis=1)
        sample, sums = _rows(sample, np.flatnonzero(others)), sums[others]
    return left


def _reaches_below(front: Floats, costs: Floats) -> NDArray[np.bool_]:
    """In two objectives, the rows whose second cost no row of the front undercuts at a first cost no greater."""
    stairs = front[np.lexsort((front[:, 1], front[:, 0]))]
    step = np.searchsorted(stairs[:, 0], costs[:, 0], side="right")
    undercut = np.concatenate([[np.inf], stairs[:, 1]])
    return costs[:, 1] <= undercut[step]


def _minimal_of_two(costs: Floats) -> Indices:
    order = np.argsort(costs[:, 0])
    first, second = costs[order, 0], costs[order, 1]
    starts = np.flatnonzero(np.concatenate([[True], first[1:] != first[:-1]]))
    lowest = np.minimum.reduceat(second, starts)
    before = np.concatenate([[np.inf], np.minimum.accumulate(lowest)[:-1]])
    # The first group has nothing before it, so that it stays even where its lowest is infinite.
    stays = (lowest < before) | (np.arange(len(starts)) == 0)
    group = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(first))))
    found: Indices = order[stays[group] & (second == lowest[group])]
    return found


def _minimal_by_blocks(costs: Floats) -> Indices:
    # A row that dominates another comes before it: its sum is no greater, and equal sums are ordered by column.
    order = np.lexsort((*costs.T[::-1], _scaled_sums(costs)))
    found: list[Indices] = []
    best = np.empty((0, costs.shape[1]))
    for start in range(0, len(order), _BLOCK):
        block = order[start : start + _BLOCK]
        block = block[~_any_dominates(best, costs[block])]
        block = block[~_any_dominates(costs[block], costs[block])]
        found.append(block)
        best = np.concatenate([best, costs[block]])
    return np.concatenate(found)


def _scaled_sums(costs: Floats) -> Floats:
    """A sum per row that never falls when a cost grows, infinite ones included; columns weigh alike."""
    bounded = np.clip(costs, -1e150, 1e150)
    low = bounded.min(axis=0)
    spread = bounded.max(axis=0) - low
    total = np.zeros(len(costs))
    for column in range(costs.shape[1]):
        total += (bounded[:, column] - low[column]) / (spread[column] or 1.0)
    return total


def _dominated_by(row: Floats, costs: Floats) -> NDArray[np.bool_]:
    no_better = np.ones(len(costs), dtype=bool)
    equal = np.ones(len(costs), dtype=bool)
    for column, cost in enumerate(row):
        no_better &= costs[:, column] >= cost
        equal &= costs[:, column] == cost
    return no_better & ~equal


def _any_dominates(best: Floats, costs: Floats) -> NDArray[np.bool_]:
    """For each row of `costs`, whether some row of `best` dominates it."""
    dominated = np.zeros(len(costs), dtype=bool)
    for start in range(0, len(best), _BLOCK):
        open_rows = np.flatnonzero(~dominated)
        if not len(open_rows):
            break
        some, rows = best[start : start + _BLOCK], costs[open_rows]
        no_better = np.ones((len(some), len(rows)), dtype=bool)
        equal = np.ones((len(some), len(rows)), dtype=bool)
        for column in range(costs.shape[1]):
            no_better &= some[:, column, None] <= rows[None, :, column]
            equal &= some[:, column, None] == rows[None, :, column]
        dominated[open_rows] = (no_better & ~equal).any(axis=0)
    return dominated


def _ranks_by_sweep(costs: Floats) -> Indices:
    """Ranks in one or two objectives: each row joins the first front whose least second cost is above its own."""
    if not len(costs):
        return np.empty(0, dtype=np.intp)
    if costs.shape[1] == 1:
        return np.unique(costs[:, 0], return_inverse=True)[1].astype(np.intp)
    rows, place = np.unique(costs, axis=0, return_inverse=True)
    least: list[float] = []
    found = np.empty(len(rows), dtype=np.intp)
    for index, cost in enumerate(rows[:, 1].tolist()):
        rank = bisect_right(least, cost)
        least[rank : rank + 1] = [cost]
        found[index] = rank
    return found[place.reshape(-1)]


def _volume(costs: Floats, limit: Floats) -> float:
    costs = costs[_minimal(costs)]
    if not len(costs):
        return 0.0
    if len(limit) == 1:
        return float(limit[0] - costs.min())
    costs = costs[np.argsort(costs[:, -1], kind="stable")]
    if len(limit) == 2:
        widths = limit[0] - costs[:, 0]
        heights = np.diff(np.append(costs[:, 1], limit[1]))
        return float((widths[heights > 0] * heights[heights > 0]).sum())
    heights = np.diff(np.append(costs[:, -1], limit[-1]))
    slices = [_volume(costs[: i + 1, :-1], limit[:-1]) * h for i, h in enumerate(heights.tolist()) if h > 0]
    return float(sum(slices))


def _depth(scaled: Floats) -> Floats:
    """Distance of each row from the hyperplane through the best row of each objective, positive towards the ideal."""
    # Among equals in one objective the best is the one that is best in the others too.
    extremes = scaled[[int(np.lexsort((scaled.sum(axis=1), column))[0]) for column in scaled.T]]
    try:
        normal = np.linalg.solve(extremes, np.ones(scaled.shape[1]))
    except np.linalg.LinAlgError:
        normal = np.ones(scaled.shape[1])
    return np.divide(1.0 - scaled @ normal, np.linalg.norm(normal))
