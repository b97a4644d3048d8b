"""The smallest copy of a pruned model: its kept values, and where they stand in about as few bits as chance allows.

A mask is written in whichever of these ways is the shortest, named by its first byte:

    0 … 31     gaps between kept entries in the code of Rice (1971); the number says how many low bits are plain
    32 … 63    the same of the gaps between pruned entries, where those are rarer
    64         one bit for each entry, through zlib: whole rows and patterns such as 2:4
    65         one bit for each entry
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch import Tensor

from orchestrator.header import read_header
from orchestrator.state import State, from_bytes, pack_bits, unpack_bits

Bytes = NDArray[np.uint8]
Places = NDArray[np.int64]

FORMAT = "2"
"""Format 1 is that of the store's states, which has one bit for each entry of a mask; it is read too."""

_PRUNED, _DEFLATED, _BITS = 32, 64, 65


def packed_file(state: State) -> bytes:
    """Weights and masks as one safetensors file: the kept values of each tensor, and each mask in its shortest form."""
    tensors = {}
    for name, tensor in state.weights.items():
        mask = state.masks.get(name)
        tensors[f"weights/{name}"] = (tensor if mask is None else tensor.detach()[mask]).contiguous()
    for name, mask in state.masks.items():
        tensors[f"masks/{name}"] = torch.from_numpy(coded(mask))
    shapes = {name: list(mask.shape) for name, mask in state.masks.items()}
    return save(tensors, {"packed": FORMAT, "shapes": json.dumps(shapes, separators=(",", ":"))})


def from_packed(content: bytes) -> State:
    """The inverse of `packed_file`, bit for bit; files of earlier versions are read too.

    Raises:
        ValueError: this is no such file, or its masks and values do not fit together.
    """
    header = read_header(content)
    if "packed" not in header:
        return from_bytes(content)
    if header["packed"] != FORMAT:
        raise ValueError(f"the packed file has format {header['packed']!r}; this version reads {FORMAT!r} and older")
    tensors = load(content)
    shapes = json.loads(header["shapes"])
    masks = {name: decoded(tensors[f"masks/{name}"].numpy(), shape) for name, shape in shapes.items()}
    weights = {}
    for whole, kept in tensors.items():
        kind, _, name = whole.partition("/")
        if kind == "weights":
            weights[name] = kept if name not in masks else _spread(name, kept, masks[name])
    return State(weights=weights, masks=masks)


def coded(mask: Tensor) -> Bytes:
    """A bool tensor as bytes, in the shortest of the ways above."""
    flat = mask.detach().to("cpu").numpy().reshape(-1)
    bits = pack_bits(mask).numpy()
    found = [_marked(_BITS, bits), _marked(_DEFLATED, np.frombuffer(zlib.compress(bits.tobytes(), 9), np.uint8))]
    for pruned in (False, True):
        places = np.flatnonzero(flat != pruned)
        low, length = _shortest(places)
        if length < len(found[0]):
            found.append(_marked(low + _PRUNED * pruned, _rice(places, low)))
    return min(found, key=len)


def decoded(code: Bytes, shape: Sequence[int]) -> Tensor:
    """The inverse of `coded` for a mask of `shape`.

    Raises:
        ValueError: the bytes are no mask of that shape.
    """
    count = prod(shape)
    if not len(code) or code[0] > _BITS:
        raise ValueError("a mask is written in a way that this version does not know")
    way, rest = int(code[0]), code[1:]
    if way >= _DEFLATED:
        bits = rest if way == _BITS else _inflated(rest, -(-count // 8))
        if len(bits) != -(-count // 8):
            raise ValueError(f"a mask of {count:,} entries has {len(bits):,} bytes of bits")
        return unpack_bits(torch.from_numpy(bits.copy()), list(shape))
    places = _unrice(rest, way % _PRUNED, count)
    flat = np.full(count, way >= _PRUNED)
    flat[places] = way < _PRUNED
    return torch.from_numpy(flat).reshape(list(shape))


def _marked(way: int, code: Bytes) -> Bytes:
    return np.concatenate([np.array([way], dtype=np.uint8), code])


def _shortest(places: Places) -> tuple[int, int]:
    """How many low bits are best written plain, and how many bytes the code then takes."""
    gaps = _gaps(places)
    # A larger one than the longest gap has bits only costs more.
    lows = range(min(_PRUNED, int(gaps.max(initial=0)).bit_length() + 1))
    bits = [int((gaps >> low).sum()) + len(gaps) * (1 + low) for low in lows]
    low = int(np.argmin(bits))
    return low, 4 + -(-bits[low] // 8)


def _gaps(places: Places) -> Places:
    """How many entries are passed over before each place."""
    return np.diff(places, prepend=-1) - 1


def _rice(places: Places, low: int) -> Bytes:
    """The count in four bytes; then all high parts in unary, and all low ones plain."""
    gaps = _gaps(places)
    ends = np.cumsum((gaps >> low) + 1) - 1
    bits = np.zeros((int(ends[-1]) + 1 if len(ends) else 0) + low * len(gaps), dtype=bool)
    bits[ends] = True
    if low:
        plain = (gaps[:, None] >> np.arange(low - 1, -1, -1)) & 1
        bits[len(bits) - plain.size :] = plain.reshape(-1)
    return np.concatenate([np.array([len(gaps)], dtype="<u4").view(np.uint8), np.packbits(bits)])


def _unrice(code: Bytes, low: int, entries: int) -> Places:
    if len(code) < 4:
        raise ValueError("a mask is cut off")
    count = int.from_bytes(code[:4].tobytes(), "little")
    bits = np.unpackbits(code[4:])
    ends = np.flatnonzero(bits)[:count]
    unary = int(ends[-1]) + 1 if len(ends) else 0
    if len(ends) < count or unary + low * count > len(bits):
        raise ValueError("a mask is cut off")
    plain = bits[unary : unary + low * count].reshape(count, low).astype(np.int64)
    gaps = (np.diff(ends, prepend=-1) - 1 << low) + plain @ (1 << np.arange(low - 1, -1, -1, dtype=np.int64))
    places = np.cumsum(gaps + 1) - 1
    if count and int(places[-1]) >= entries:
        raise ValueError(f"a mask of {entries:,} entries names one beyond them")
    return places


def _inflated(code: Bytes, size: int) -> Bytes:
    """At most one byte more than `size` is made, whatever the code promises."""
    try:
        return np.frombuffer(zlib.decompressobj().decompress(code.tobytes(), size + 1), np.uint8)
    except zlib.error as error:
        raise ValueError(f"a mask cannot be read: {error}") from error


def _spread(name: str, kept: Tensor, mask: Tensor) -> Tensor:
    if kept.dim() != 1 or len(kept) != int(mask.sum()):
        raise ValueError(f"{name!r} has {kept.numel():,} values for {int(mask.sum()):,} kept entries")
    full = torch.zeros(mask.shape, dtype=kept.dtype)
    full[mask] = kept
    return full
