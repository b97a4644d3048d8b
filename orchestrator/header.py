"""The metadata at the head of a safetensors file, read without loading a tensor (and without torch)."""

from __future__ import annotations

import json

_LONGEST = 100_000_000  # the format's own limit


def read_header(data: bytes, size: int | None = None) -> dict[str, str]:
    """The `__metadata__` of a safetensors file, {} where it has none.

    Args:
        data: the file, or its first bytes.
        size: of the whole file in bytes, where `data` is only its beginning.

    Raises:
        ValueError: no safetensors file, one that is cut off, or too few of its first bytes.
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
    return dict(metadata)


def header_end(data: bytes) -> int:
    """Where the header ends by the file's first eight bytes, which may promise more than the file has."""
    return 8 + int.from_bytes(data[:8], "little")
