"""Where every random number comes from: a run has an init seed and an order seed, and nothing comes from a key."""

from __future__ import annotations

import hashlib


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed for one purpose, a function of `seed` and the names alone."""
    text = "/".join(str(name) for name in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
