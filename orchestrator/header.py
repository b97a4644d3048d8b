"""The metadata at the head of a safetensors file, read without loading a tensor (and without torch)."""

from __future__ import annotations

import json


def read_header(data: bytes) -> dict[str, str]:
    """The `__metadata__` of a safetensors file given as bytes, or as its first bytes.

    Raises:
        ValueError: the bytes are no safetensors file, or too few of its first ones.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 + length or length < 2:
        raise ValueError("not a safetensors file, or its head is cut off")
    try:
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
        return dict(metadata)
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, TypeError) as error:
        raise ValueError(f"not a safetensors file: {error}") from error
