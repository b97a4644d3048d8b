"""The criteria that move weights: what stays is changed so that it makes up for what goes.

Two kinds, registered with criteria as `compensate` and `solve`. Both take what the criterion needs and its own
parameters by keyword, as the criterion itself does:

    compensate(weight, before, after, **supplied) -> weight                   the mask is chosen, the rest is moved
    solve(weight, before, keep, pattern, **supplied) -> (mask, weight)        mask and weights are found together

Removed weights come out as exact zeros; weights that were masked before stay zero. Inputs are left alone; the linear
algebra is done in double precision.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from orchestrator.errors import NotFinite, StageFailed
from orchestrator.pruning.criteria import DAMPING
from orchestrator.pruning.masks import hashes_at, keep_top

COLUMNS = 128
"""SparseGPT chooses the mask for so many columns at a time, as in the paper."""

BLOCKS_AT_ONCE = 2**21
"""Entries of Hessian blocks that are held in double precision at a time."""


def surgeon(weight: Tensor, before: Tensor, after: Tensor, hessian_blocks: Tensor, damping: float = DAMPING) -> Tensor:
    """The kept weights moved so that the loss, to second order, rises least (Hassibi & Stork, 1993).

    All removed weights of a block are made up for together: δw = −H⁻¹[:,Q] (H⁻¹[Q,Q])⁻¹ w_Q, with H restricted to what
    was kept before.

    Args:
        weight: n entries, zero outside `before`.
        before, after: masks of the weight's shape, `after` within `before`.
        hessian_blocks: (1, n, n), or (ceil(n / b), b, b) of b consecutive entries each.
        damping: added to the Hessian's diagonal, relative to the diagonal's mean.

    Raises:
        StageFailed: the damped Hessian is not positive definite.
    """
    assert not (after & ~before).any(), "a mask grew"
    ridge = _ridge(hessian_blocks, damping, weight.numel())
    size = hessian_blocks.shape[-1]
    old = _zeroed(weight.detach().double(), before).reshape(-1)
    removed = _in_blocks(old * (before & ~after).reshape(-1), size)
    stays = _in_blocks(after.reshape(-1), size)
    moves = []
    for blocks, gone, kept in zip(*(_split(t, size) for t in (hessian_blocks, removed, stays)), strict=True):
        # With δ_Q = −w_Q, the rest of the block is where its own gradient vanishes: H_SS·δ_S = H_SQ·w_Q.
        pull = (blocks.double() @ gone.unsqueeze(-1)) * kept.unsqueeze(-1)
        moves.append(torch.cholesky_solve(pull, _factor(_restricted(blocks, kept, ridge), damping)).squeeze(-1))
    moved = old + torch.cat(moves).reshape(-1)[: old.numel()]
    return _zeroed(moved.reshape(weight.shape), after).to(weight.dtype)


def sweep(
    weight: Tensor,
    before: Tensor,
    keep: int | Tensor | None,
    pattern: tuple[int, int] | None,
    input_gram: Tensor,
    damping: float = DAMPING,
) -> tuple[Tensor, Tensor]:
    """Mask and weights by one sweep over the columns, each removal made up for by columns to its right.

    (Frantar & Alistarh, 2023.) As there, the mask is chosen for 128 columns at a time from weights that already make up
    for what went before. How many stay in each such block follows from the errors of single removals before the sweep,
    not evenly as in the paper: inputs that are never on would keep their share. Convolutions are swept as matrices, by
    place in the kernel, then by input channel.

    Args:
        weight: (rows, …) of a linear layer or a convolution; zero outside `before`.
        before: the mask so far, of the weight's shape.
        keep: how many weights stay in all, or int64 of shape (rows,): in each row. Not looked at with a pattern.
        pattern: (n, m): n stay of every m neighbours along the inputs, or as many as `before` has left of them.
        input_gram: (d, d), or (groups, d, d) where equal groups of rows read different inputs; d entries a row.
        damping: added to the Gram matrix's diagonal, relative to the diagonal's mean.

    Raises:
        StageFailed: the Gram matrix does not fit the weight or, damped, is not positive definite; the pattern does not
            fit the number of inputs.
        NotFinite: a score is NaN or infinite.
    """
    rows = weight.shape[0]
    grams = _grams(weight, input_gram)
    groups, width = grams.shape[:2]
    if pattern is not None and weight.shape[1] % pattern[1]:
        raise StageFailed(f"{pattern[0]}:{pattern[1]} does not fit a weight of {weight.shape[1]} inputs")
    order = _by_place(weight.shape)
    old = _zeroed(weight.detach().double(), before).reshape(rows, width)[:, order]
    allowed = before.reshape(rows, width)[:, order]
    inverse = torch.cholesky_inverse(
        _factor(grams[:, order][:, :, order] + _ridge(grams, damping, groups * width) * _eye(width), damping)
    )
    upper = torch.linalg.cholesky(inverse, upper=True)
    size = COLUMNS if pattern is None else max(1, COLUMNS // pattern[1]) * pattern[1]
    errors = old.square() / _over_groups(inverse.diagonal(dim1=1, dim2=2), rows)
    shares = None if pattern is not None else _shares(errors, old, allowed, keep, size)

    swept = old.reshape(groups, rows // groups, width).clone()
    mask = torch.zeros(rows, width, dtype=torch.bool)
    pivots = upper.diagonal(dim1=1, dim2=2)
    scale = _over_groups(pivots.square(), rows)
    for start in range(0, width, size):
        stop = min(start + size, width)
        here = slice(start, stop)
        tile, triangle = swept[:, :, here], upper[:, here, here]
        debts = torch.zeros_like(tile)
        if shares is not None:
            now = tile.reshape(rows, -1)
            mask[:, here] = _best(now.square() / scale[:, here], now, allowed[:, here], shares[start // size])
        for column in range(stop - start):
            place = start + column
            if pattern is not None and place % pattern[1] == 0:
                few = slice(place, place + pattern[1])
                now = swept[:, :, few].reshape(rows, -1)
                count = allowed[:, few].sum(dim=1).clamp(max=pattern[0])
                mask[:, few] = _best(now.square() / scale[:, few], now, allowed[:, few], count)
            value = tile[:, :, column].clone()
            debt = value * ~mask[:, place].reshape(groups, -1) / pivots[:, None, place]
            tile[:, :, column:] -= debt.unsqueeze(-1) * triangle[:, None, column, column:]
            debts[:, :, column] = debt
        swept[:, :, stop:] -= debts @ upper[:, here, stop:]
    back = torch.argsort(order)
    kept = mask[:, back].reshape(weight.shape)
    return kept, _zeroed(swept.reshape(rows, width)[:, back].reshape(weight.shape), kept).to(weight.dtype)


def inverse_diagonal(hessian_blocks: Tensor, kept: Tensor, damping: float) -> Tensor:
    """The diagonal of the inverse of the damped Hessian over the `kept` entries; 1 for the others.

    Args:
        hessian_blocks: (blocks, b, b).
        kept: bool of shape (n,).
        damping: added to the diagonal, relative to its mean.

    Returns:
        float64 of shape (n,).

    Raises:
        StageFailed: the damped Hessian is not positive definite.
    """
    ridge = _ridge(hessian_blocks, damping, kept.numel())
    size = hessian_blocks.shape[-1]
    found = []
    for blocks, stays in zip(_split(hessian_blocks, size), _split(_in_blocks(kept, size), size), strict=True):
        factor = _factor(_restricted(blocks, stays, ridge), damping)
        found.append(torch.cholesky_inverse(factor).diagonal(dim1=1, dim2=2))
    return torch.cat(found).reshape(-1)[: kept.numel()]


def output_errors(weight: Tensor, input_gram: Tensor, damping: float) -> Tensor:
    """w² / [H⁻¹]_jj with the damped Gram matrix of the inputs as H: float64 of the weight's shape.

    Raises:
        StageFailed: the Gram matrix does not fit the weight or, damped, is not positive definite.
    """
    grams = _grams(weight, input_gram)
    groups, width = grams.shape[:2]
    damped = grams + _ridge(grams, damping, groups * width) * _eye(width)
    inverse = torch.cholesky_inverse(_factor(damped, damping)).diagonal(dim1=1, dim2=2)
    return weight.double().square() / _over_groups(inverse, weight.shape[0]).reshape(weight.shape)


def _grams(weight: Tensor, input_gram: Tensor) -> Tensor:
    """The Gram matrices as (groups, d, d) in double precision."""
    grams = input_gram.double().reshape(-1, *input_gram.shape[-2:])
    rows, width = weight.shape[0], weight[0].numel()
    if grams.shape[1:] != (width, width) or rows % len(grams):
        shapes = f"{tuple(input_gram.shape)} does not fit a weight of shape {tuple(weight.shape)}"
        raise StageFailed(f"an input_gram of shape {shapes}")
    return grams


def _over_groups(values: Tensor, rows: int) -> Tensor:
    """(groups, d) values, each group's for its rows: (rows, d)."""
    return values.repeat_interleave(rows // len(values), dim=0)


def _by_place(shape: torch.Size) -> Tensor:
    """The order of a row's entries by place in the kernel, then by input channel, so that neighbours are channels."""
    if len(shape) < 3:
        return torch.arange(shape[1:].numel())
    return torch.arange(shape[1:].numel()).reshape(shape[1], -1).t().reshape(-1)


def _shares(errors: Tensor, old: Tensor, allowed: Tensor, keep: int | Tensor | None, size: int) -> list[int | Tensor]:
    """How many weights stay in each block of columns, in all or in each row."""
    assert keep is not None, "either a pattern or how many to keep"
    tiles = torch.split(_best(errors, old, allowed, keep), size, dim=1)
    return [tile.sum(dim=1) if isinstance(keep, Tensor) else int(tile.sum()) for tile in tiles]


def _best(scores: Tensor, values: Tensor, allowed: Tensor, keep: int | Tensor) -> Tensor:
    """Exactly `keep` True entries, in all or in each row, at the highest scores among the allowed ones.

    Ties fall by magnitude, then by hash, as everywhere.
    """
    places = allowed.reshape(-1).nonzero().squeeze(1)
    found, sizes = scores.reshape(-1)[places], values.reshape(-1)[places].abs()
    hashes = hashes_at("sweep", places)
    mask = torch.zeros(allowed.numel(), dtype=torch.bool)
    if not isinstance(keep, Tensor):
        mask[places] = keep_top(found, keep, lambda: (sizes, hashes))
        return mask.reshape(allowed.shape)
    if not torch.isfinite(found).all():
        raise NotFinite(f"{int((~torch.isfinite(found)).sum())} of {found.numel()} scores are NaN or infinite")
    row = places // allowed.shape[1]
    order = torch.from_numpy(np.lexsort((hashes.numpy(), -sizes.numpy(), -found.numpy(), row.numpy())))
    starts = torch.searchsorted(row, torch.arange(len(allowed)))
    assert not (keep > allowed.sum(dim=1)).any(), "cannot keep more than there are"
    rank = torch.arange(len(order)) - starts[row]  # rows come in order, sorted or not
    mask[places[order]] = rank < keep[row]
    return mask.reshape(allowed.shape)


def _in_blocks(values: Tensor, size: int) -> Tensor:
    """(n,) values as (blocks, size), filled up with zeros."""
    missing = -len(values) % size
    return torch.cat([values, values.new_zeros(missing)]).reshape(-1, size)


def _split(blocks: Tensor, size: int) -> tuple[Tensor, ...]:
    return torch.split(blocks, max(1, BLOCKS_AT_ONCE // size**2))


def _restricted(blocks: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """Damped blocks with the identity where an entry is not kept: its inverse is that of the kept entries alone."""
    both = kept.unsqueeze(1) & kept.unsqueeze(2)
    damped = blocks.double() + ridge * _eye(blocks.shape[-1])
    return torch.where(both, damped, _eye(blocks.shape[-1]))


def _ridge(blocks: Tensor, damping: float, count: int) -> float:
    """What is added to the diagonal; the filling of the last block does not count. A Hessian of zeros gets ones."""
    mean = float(blocks.diagonal(dim1=-2, dim2=-1).reshape(-1)[:count].double().mean())
    return damping * mean if mean else 1.0


def _factor(matrices: Tensor, damping: float) -> Tensor:
    factors, failed = torch.linalg.cholesky_ex(matrices)
    if failed.any():
        raise StageFailed(f"a Hessian cannot be inverted with damping = {damping}: a larger one is needed")
    return factors  # type: ignore[no-any-return]


def _eye(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def _zeroed(values: Tensor, kept: Tensor) -> Tensor:
    return torch.where(kept, values, torch.zeros((), dtype=values.dtype))
