"""Masks, exact to the single weight. True = kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.errors import NotFinite
from orchestrator.seeds import derive

Ties = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""What decides between equal scores: from a tensor's number and flat places in it to their magnitudes and hashes."""

CHUNK = 1 << 22
"""Scores are looked at in pieces of so many, so that selecting among many takes little memory beside them."""

PIECE = 1 << 20
"""Tied scores are told apart so many at a time: each takes some 60 bytes for it."""

Values = NDArray[np.floating[Any]]
Keys = NDArray[Any]


def keep_top(scores: Tensor, keep: int, ties: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
    """Exactly `keep` True entries, at the highest scores.

    Ties fall by magnitude, then by hash; a rule by position would cut whole rows or layers first.

    Args:
        scores: shape (n,); higher is kept.
        keep: how many of the n stay.
        ties: gives what decides between equal scores, magnitudes and then hashes (int64), each of shape (n,). Asked for
            only where equal scores must be told apart.

    Raises:
        NotFinite: a score is NaN or infinite, so that there is no order.
    """

    def at(_: int, places: Tensor) -> tuple[Tensor, Tensor]:
        magnitudes, hashes = ties()
        return magnitudes[places], hashes[places]

    return select([scores], [None], keep, at)[0]


def select(scores: Sequence[Tensor], among: Sequence[Tensor | None], keep: int, ties: Ties) -> list[Tensor]:
    """Masks with exactly `keep` True entries in all, at the highest scores of all tensors together.

    Takes time in proportion to the number of scores, and little memory beside them however many they are.

    Args:
        scores: of any shapes, floating point, on the CPU; higher is kept.
        among: for each tensor where entries may be kept, bool of its shape; None: everywhere.
        keep: how many stay, at most as many as there are in `among`.
        ties: asked for only where equal scores must be told apart.

    Raises:
        NotFinite: a score in `among` is NaN or infinite, so that there is no order.
    """
    available = sum(s.numel() if a is None else count(a) for s, a in zip(scores, among, strict=True))
    assert 0 <= keep <= available, f"cannot keep {keep} of {available}"
    _refuse_not_finite(scores, among, available)
    if keep == 0:
        return [torch.zeros(s.shape, dtype=torch.bool) for s in scores]
    if any(s.dtype != _common(scores) for s in scores):
        scores = [s.to(_common(scores)) for s in scores]  # else the threshold itself would be rounded
    threshold = float(_kth_largest(lambda: _counted(scores, among), available, keep))
    kept = [_and((s >= threshold).contiguous(), a) for s, a in zip(scores, among, strict=True)]
    excess = sum(count(mask) for mask in kept) - keep
    if excess:
        tied = [_and((s == threshold).contiguous(), a) for s, a in zip(scores, among, strict=True)]
        _drop_worst(kept, tied, excess, ties)
    return kept


def _drop_worst(kept: Sequence[Tensor], tied: Sequence[Tensor], excess: int, ties: Ties) -> None:
    """Take `excess` of the tied entries out of `kept`: the smallest in magnitude, and of equal ones by hash.

    Looks at them piece by piece: of a large network a good part may be tied.
    """

    def entries() -> Iterator[tuple[Tensor, Tensor, NDArray[Any], Keys]]:
        for number, mask in enumerate(tied):
            for start, piece in enumerate(torch.split(mask.view(-1), PIECE)):
                places = torch.from_numpy(np.flatnonzero(piece.numpy()) + start * PIECE)
                if len(places):
                    magnitudes, hashes = ties(number, places)
                    first = ~(
                        hashes.numpy().view(np.uint64) ^ np.uint64(1 << 63)
                    )  # of equal size the smallest hash stays
                    yield kept[number].view(-1), places, magnitudes.double().numpy(), first

    stay = sum(count(mask) for mask in tied) - excess
    if not stay:
        for mask, places, _, _ in entries():
            mask[places] = False
        return
    size = _kth_largest(lambda: (sizes for _, _, sizes, _ in entries()), stay + excess, stay)
    larger = sum(int(np.count_nonzero(sizes > size)) for _, _, sizes, _ in entries())
    equal = sum(int(np.count_nonzero(sizes == size)) for _, _, sizes, _ in entries())
    last = _kth_largest(lambda: (first[sizes == size] for _, _, sizes, first in entries()), equal, stay - larger)
    for mask, places, sizes, first in entries():
        goes = (sizes < size) | ((sizes == size) & (first < last))
        mask[places[torch.from_numpy(goes)]] = False


def ranks(scores: Sequence[Tensor], among: Sequence[Tensor | None], ties: Ties) -> list[Tensor]:
    """The place of each score in the order of all tensors together, from the highest at 0; int64 of the scores' shapes.

    The first k places are those that `select` keeps. Entries outside `among` come after all others.

    Raises:
        NotFinite: as `select` does.
    """
    _refuse_not_finite(
        scores, among, sum(s.numel() if a is None else count(a) for s, a in zip(scores, among, strict=True))
    )
    flat = [s.reshape(-1) for s in scores]
    found = [ties(number, torch.arange(s.numel())) for number, s in enumerate(flat)]
    kept = [_everywhere(s) if a is None else a.reshape(-1) for s, a in zip(flat, among, strict=True)]
    order = _best_first(
        torch.cat([s.double() for s in flat]),
        torch.cat(kept),
        torch.cat([magnitudes.double() for magnitudes, _ in found]),
        torch.cat([hashes for _, hashes in found]),
    )
    parts = torch.split(_places(order), [s.numel() for s in flat])
    return [part.reshape(s.shape) for part, s in zip(parts, scores, strict=True)]


def ranks_in_rows(scores: Tensor, among: Tensor | None, magnitudes: Tensor, hashes: Tensor) -> Tensor:
    """The place of each score in the order of its own row, the last dimension, from the highest at 0; int64.

    All four are of one shape; ties fall and entries outside `among` come last as in `ranks`.

    Raises:
        NotFinite: as `select` does.
    """
    _refuse_not_finite([scores], [among], scores.numel() if among is None else count(among))
    return _places(_best_first(scores, _everywhere(scores) if among is None else among, magnitudes, hashes))


def index_hashes(name: str, count: int) -> Tensor:
    """A hash for each entry of the tensor called `name`: shape (count,), int64, the same on every worker."""
    return hashes_at(name, torch.arange(count))


def hashes_at(name: str, places: Tensor) -> Tensor:
    """The hashes of the entries at `places` (int64, flat) of the tensor called `name`."""
    with np.errstate(over="ignore"):  # splitmix64 (Steele et al., 2014) wraps on purpose
        z = places.numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(derive(0, "ties", name))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return torch.from_numpy(z.view(np.int64))


def count(mask: Tensor) -> int:
    """How many entries of a mask on the CPU are True; many times faster than their sum."""
    return int(np.count_nonzero(mask.numpy()))


def sparsity(masks: Mapping[str, Tensor], sizes: Mapping[str, int]) -> float:
    """The masked fraction of the prunable weights; tensors without a mask are dense.

    Args:
        masks: by parameter name; those of parameters that are not prunable do not count.
        sizes: how many weights each prunable tensor has.
    """
    masked = sum(size - int(masks[name].sum()) for name, size in sizes.items() if name in masks)
    return masked / sum(sizes.values())


def _everywhere(scores: Tensor) -> Tensor:
    return torch.ones(scores.shape, dtype=torch.bool)


def _best_first(scores: Tensor, among: Tensor, magnitudes: Tensor, hashes: Tensor) -> Tensor:
    """The indices that sort the last dimension; what is not in `among` comes last."""
    keys = (hashes, -magnitudes.double(), -scores.double(), ~among)
    return torch.from_numpy(np.lexsort([key.numpy() for key in keys], axis=-1))


def _places(order: Tensor) -> Tensor:
    """Where each index stands in an order of the last dimension."""
    numbers = torch.arange(order.shape[-1]).expand(order.shape)
    return torch.empty_like(order).scatter_(-1, order, numbers)


def _common(scores: Sequence[Tensor]) -> torch.dtype:
    """Double precision where one of the tensors is, else single."""
    return torch.float64 if any(s.dtype == torch.float64 for s in scores) else torch.float32


def _pieces(scores: Sequence[Tensor], among: Sequence[Tensor | None]) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The scores in pieces of bounded size, each with where it counts."""
    dtype = _common(scores)
    for tensor, where in zip(scores, among, strict=True):
        flat = torch.split(tensor.reshape(-1), CHUNK)
        wanted = [None] * len(flat) if where is None else torch.split(where.reshape(-1), CHUNK)
        for piece, mine in zip(flat, wanted, strict=True):
            yield piece.to(dtype), mine


def _counted(scores: Sequence[Tensor], among: Sequence[Tensor | None]) -> Iterator[Values]:
    """The scores that count, in pieces."""
    for piece, mine in _pieces(scores, among):
        yield piece.numpy() if mine is None else piece.numpy().take(np.flatnonzero(mine.numpy()))


def _refuse_not_finite(scores: Sequence[Tensor], among: Sequence[Tensor | None], available: int) -> None:
    bad = 0
    for piece, mine in _pieces(scores, among):
        finite = np.isfinite(piece.numpy())
        if not finite.all():
            bad += int(np.count_nonzero(~finite if mine is None else ~finite & mine.numpy()))
    if bad:
        raise NotFinite(f"{bad} of {available} scores are NaN or infinite")


def _kth_largest(pieces: Callable[[], Iterator[NDArray[Any]]], left: int, k: int) -> Any:
    """The k-th largest of `left` numbers, which `pieces` gives as often as asked.

    Of many, it is sought among those that share its leading bits.
    """
    prefix, bits = 0, 0
    while left > CHUNK:
        counts = np.zeros(1 << 16, dtype=np.int64)
        for piece in pieces():
            keys = _with_prefix(_ordered(piece), prefix, bits)
            if bits == 8 * keys.itemsize:
                return _value(prefix, piece.dtype)
            digits = (keys >> keys.dtype.type(8 * keys.itemsize - bits - 16)) & keys.dtype.type(0xFFFF)
            counts += np.bincount(digits.astype(np.intp), minlength=1 << 16)
        above = counts[::-1].cumsum()
        place = int(np.searchsorted(above, k))
        left = int(counts[0xFFFF - place])
        k -= int(above[place]) - left
        prefix, bits = prefix << 16 | 0xFFFF - place, bits + 16
    found = [piece[_has_prefix(_ordered(piece), prefix, bits)] if bits else piece for piece in pieces()]
    values = found[0] if len(found) == 1 else np.concatenate(found)
    return np.partition(values, left - k)[left - k]


def _ordered(values: NDArray[Any]) -> Keys:
    """Floating-point numbers as unsigned integers in the same order, both zeros as one; such integers as they are."""
    if values.dtype.kind == "u":
        return values
    bits: Keys = (values + values.dtype.type(0)).view(f"u{values.itemsize}")
    sign = bits.dtype.type(1 << (8 * values.itemsize - 1))
    return np.where(bits & sign, ~bits, bits | sign)


def _has_prefix(keys: Keys, prefix: int, bits: int) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = keys >> keys.dtype.type(8 * keys.itemsize - bits) == prefix
    return found


def _with_prefix(keys: Keys, prefix: int, bits: int) -> Keys:
    return keys[_has_prefix(keys, prefix, bits)] if bits else keys


def _value(key: int, dtype: np.dtype[Any]) -> Any:
    """The number of which `_ordered` made `key`."""
    if dtype.kind == "u":
        return dtype.type(key)
    width = 8 * dtype.itemsize
    sign = 1 << (width - 1)
    bits = key ^ sign if key & sign else ~key & ((1 << width) - 1)
    return np.array([bits], dtype=f"u{dtype.itemsize}").view(dtype)[0]


def _and(mask: Tensor, where: Tensor | None) -> Tensor:
    return mask if where is None else mask.logical_and_(where)
