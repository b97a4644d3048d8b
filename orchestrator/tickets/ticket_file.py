"""A ticket as a small file: bit-packed masks, the weights it starts from or how they are made, and its lineage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from orchestrator.errors import InputError
from orchestrator.header import read_header
from orchestrator.state import State, from_bytes, to_bytes
from orchestrator.tasks.describe import hash_tensors

KIND = "orchardist ticket 1"
_UNSIGNED = "0" * 64


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """A mask with the weights it starts from.

    Args:
        masks: by tensor name, bool; True = kept.
        weights: that it starts from, in full coordinates, zero under the masks; None where only `recipe` tells.
        recipe: JSON-ready: how the weights are made: the task, its parameters and digest, "init" with its seed and
            whether it is fresh, the "steps" trained since, and "weights_sha256". Without weights all of it is needed.
        lineage: JSON-ready: the ops that found the masks, the first one first.
        position: optimizer steps since init of the weights.
    """

    masks: Mapping[str, Tensor]
    weights: Mapping[str, Tensor] | None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    lineage: Sequence[Mapping[str, Any]] = ()
    position: int = 0


def weights_sha256(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> str:
    """A hash of the weights under the masks, by which weights that are made again are known to be the same."""
    digest = hashlib.sha256()
    hash_tensors(digest, "weights", dict(State(weights=weights, masks=masks).masked().weights))
    return digest.hexdigest()


def to_file_bytes(ticket: Ticket) -> bytes:
    """The ticket as one safetensors file, with a hash of everything in it.

    Raises:
        InputError: there are no masks, neither weights nor a recipe, or what should be JSON is not.
    """
    if not ticket.masks:
        raise InputError("a ticket without masks is none")
    if ticket.weights is None and not ticket.recipe:
        raise InputError("a ticket needs the weights it starts from, or a recipe for them")
    try:
        told = {name: json.dumps(value, allow_nan=False) for name, value in _told(ticket).items()}
    except (TypeError, ValueError) as error:
        raise InputError(f"a ticket's recipe and lineage must be plain JSON: {error}") from error
    weights = {} if ticket.weights is None else ticket.weights
    state = State(weights=weights, masks=ticket.masks, position=ticket.position).masked()
    data = to_bytes(state, {**told, "kind": KIND, "sha256": _UNSIGNED})
    length = 8 + int.from_bytes(data[:8], "little")
    head = data[:length].replace(f'"sha256":"{_UNSIGNED}"'.encode(), f'"sha256":"{_digest(data)}"'.encode())
    return head + data[length:]


def from_file_bytes(data: bytes) -> Ticket:
    """The inverse of `to_file_bytes`.

    Raises:
        InputError: the bytes are no ticket, or not what was written.
    """
    try:
        header = read_header(data)
    except ValueError as error:
        raise InputError(f"not a ticket file: {error}") from error
    if header.get("kind") != KIND:
        raise InputError(f"not a ticket file: it is of kind {header.get('kind', 'none')!r}; legal: {KIND!r}")
    if header.get("sha256") != _digest(data):
        raise InputError("the ticket file is damaged: its hash is not that of what it holds")
    try:
        _check_sizes(data)
        state = from_bytes(data)
        recipe, lineage = json.loads(header["recipe"]), json.loads(header["lineage"])
        has_weights = json.loads(header["has_weights"])
    except (SafetensorError, ValueError, KeyError, RuntimeError, IndexError) as error:
        raise InputError(f"not a ticket file: {error}") from error
    return Ticket(
        masks=state.masks,
        weights=state.weights if has_weights else None,
        recipe=recipe,
        lineage=lineage,
        position=state.position,
    )


def _told(ticket: Ticket) -> dict[str, Any]:
    return {
        "recipe": dict(ticket.recipe),
        "lineage": [dict(step) for step in ticket.lineage],
        "has_weights": ticket.weights is not None,
    }


def _digest(data: bytes) -> str:
    """SHA-256 over the file, without its own place in the header and whatever order that is written in."""
    length = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:length])
    header["__metadata__"] = {name: text for name, text in header["__metadata__"].items() if name != "sha256"}
    found = hashlib.sha256(json.dumps(header, sort_keys=True, separators=(",", ":")).encode())
    found.update(data[length:])
    return found.hexdigest()


def _check_sizes(data: bytes) -> None:
    """Refuse shapes that are not those of the bits, before memory is taken for them."""
    tensors = load(data)
    for name, bits in tensors.items():
        if name.startswith("masks/"):
            shape = tensors[name.replace("masks/", "shapes/", 1)].tolist()
            if min(shape, default=0) < 0 or bits.numel() != -(-prod(shape) // 8):
                raise ValueError(f"the mask of {name.removeprefix('masks/')!r} has {bits.numel()} bytes for {shape}")
