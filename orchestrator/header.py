"""The metadata at the head of a safetensors file, read without loading a tensor (and without torch).

A sealed file carries a checksum of itself, so that a flipped bit on some disk makes it no file and never another model.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

SEAL = "crc32"

_LONGEST = 100_000_000  # the format's own limit


def read_header(data: bytes, size: int | None = None) -> dict[str, str]:
    """The `__metadata__` of a safetensors file, {} where it has none.

    Args:
        data: the file, or its first bytes.
        size: of the whole file in bytes, where `data` is only its beginning.

    Raises:
        ValueError: no safetensors file, one that is cut off, too few of its first bytes, or a whole file that is not
            what was sealed.
    """
    end = header_end(data)
    if len(data) < 8 or end > 8 + _LONGEST or len(data) < end:
        raise ValueError("not a safetensors file, or its head is cut off")
    try:
        header = json.loads(data[8:end])
        metadata = header.pop("__metadata__", {})
        last = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        texts = all(isinstance(text, str) for text in metadata.values())
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise ValueError(f"not a safetensors file: {error}") from error
    if not texts or end + last != (len(data) if size is None else size):
        raise ValueError("not a safetensors file, or it is cut off")
    seal = metadata.pop(SEAL, None)
    if seal is not None and end + last == len(data) and seal != _checksum(header | {"__metadata__": metadata}, data):
        raise ValueError("the file is damaged: its checksum is not that of what it holds")
    return dict(metadata)


def sealed(data: bytes) -> bytes:
    """A safetensors file with a checksum of its header and its tensors among the metadata; not sealed before."""
    header = {"__metadata__": {}} | json.loads(data[8 : header_end(data)])
    header["__metadata__"] |= {SEAL: _checksum(header, data)}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return b"".join([len(head).to_bytes(8, "little"), head, memoryview(data)[header_end(data) :]])


def header_end(data: bytes) -> int:
    """Where the header ends by the file's first eight bytes, which may promise more than the file has."""
    return 8 + int.from_bytes(data[:8], "little")


def _checksum(header: dict[str, Any], data: bytes) -> str:
    told = zlib.crc32(json.dumps(header, sort_keys=True).encode())
    return f"{zlib.crc32(memoryview(data)[header_end(data) :], told):08x}"
