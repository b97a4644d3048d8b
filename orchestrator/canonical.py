"""One canonical form of plain data, for every digest. What equals its default is left out: a new field is no change."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any


def canonical(value: Any) -> Any:
    """`value` as JSON-ready plain data without default-valued dataclass fields."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: canonical(getattr(value, f.name)) for f in fields(value) if not _is_default(f, value)}
    if isinstance(value, Mapping):
        return {str(name): canonical(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [canonical(item) for item in value]
    return value


def finite(value: Any) -> Any:
    """Plain data with None for every number that JSON cannot say: NaN and the infinities."""
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_default(field: Any, value: Any) -> bool:
    actual = getattr(value, field.name)
    if field.default is not MISSING:
        default = field.default
    elif field.default_factory is not MISSING:
        default = field.default_factory()
    else:
        return False
    return type(actual) is type(default) and bool(actual == default)


def digest(value: Any) -> str:
    """SHA-256, in hex, of the canonical form; equal data give equal digests on every machine."""
    text = json.dumps(canonical(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
