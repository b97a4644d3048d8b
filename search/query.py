"""Bounds on measures: "accuracy >= 0.97", "latency_ms <= dense * 0.5", and how far a result is from keeping them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

OPERATORS = (">=", "<=", "==", ">", "<")
LEGAL = "a bound reads MEASURE >= 0.97: >=, <=, >, < or ==, then a number, 98%, dense, dense - 0.01 or dense * 0.5"

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?\s*%?"
_NAME = re.compile(r"[A-Za-z_][\w.\-]*")
_BOUND = re.compile(r"\s*(?P<measure>[^<>=]*?)\s*(?P<operator>>=|<=|==|>|<)\s*(?P<limit>[^<>=]*?)\s*")
_LIMITS = (
    re.compile(rf"(?P<number>{_NUMBER})"),
    re.compile(r"(?P<dense>dense)"),
    re.compile(rf"(?P<dense>dense)\s*(?P<sign>[+-])\s*(?P<number>{_NUMBER})"),
    re.compile(rf"(?P<dense>dense)\s*\*\s*(?P<factor>{_NUMBER})"),
    re.compile(rf"(?P<factor>{_NUMBER})\s*\*\s*(?P<dense>dense)"),
)


class BoundError(ValueError):
    """A bound that cannot be read, or that asks for what was not measured; the message says what would be legal."""


@dataclass(frozen=True, kw_only=True)
class Bound:
    """`measure operator limit`; the limit is `factor` times the dense model's value of the measure, plus `offset`."""

    measure: str
    operator: str
    factor: float = 0.0
    offset: float = 0.0

    def __str__(self) -> str:
        if not self.factor:
            return f"{self.measure} {self.operator} {self.offset!r}"
        dense = "dense" if self.factor == 1 else f"dense * {self.factor!r}"
        sign = "-" if self.offset < 0 else "+"
        offset = f" {sign} {abs(self.offset)!r}" if self.offset else ""
        return f"{self.measure} {self.operator} {dense}{offset}"

    def limit(self, dense: float | None = None) -> float:
        """The number on the right side; BoundError when it depends on a dense value that is missing."""
        if not self.factor:
            return self.offset
        if dense is None or math.isnan(dense):
            raise BoundError(f"{str(self)!r} needs the dense model's {self.measure}, which was not measured")
        return self.factor * dense + self.offset


def parse(text: str, *, measure: str | None = None) -> Bound:
    """The bound that `text` spells; with `measure`, the text starts at the operator, as in a study's `[constraints]`.

    Raises:
        BoundError: quoting the text and the legal form.
    """
    match = _BOUND.fullmatch(text)
    if match is None:
        raise BoundError(f"cannot read the bound {text!r}: {LEGAL}")
    if measure is not None and match["measure"]:
        raise BoundError(f"the bound {text!r} on {measure} must start with an operator: {', '.join(OPERATORS)}")
    name = measure if measure is not None else match["measure"]
    if not _NAME.fullmatch(name):
        raise BoundError(f"{name!r} in the bound {text!r} is not the name of a measure: {LEGAL}")
    for pattern in _LIMITS:
        limit = pattern.fullmatch(match["limit"])
        if limit is not None:
            return _bound(name, match["operator"], limit.groupdict(), text)
    raise BoundError(f"cannot read {match['limit']!r} in the bound {text!r}: {LEGAL}")


def violations(bound: Bound, column: ArrayLike, dense: float | None = None) -> NDArray[np.float64]:
    """How far each value is beyond the bound, as a fraction of the limit (or as it is, where the limit is 0).

    Above 0 exactly when the bound does not hold, and infinite for NaN, so that sums over bounds compare. Equality
    allows a relative 1e-9.
    """
    values = np.asarray(column, dtype=np.float64)
    limit = bound.limit(dense)
    scale = abs(limit) or 1.0
    with np.errstate(invalid="ignore", over="ignore"):
        excess = (limit - values) / scale if bound.operator in (">=", ">") else (values - limit) / scale
    if bound.operator == "==":
        excess = np.where(np.abs(excess) <= 1e-9, 0.0, np.abs(excess))
    # Infinity measured against an infinite limit is NaN by subtraction but keeps or breaks the bound all the same.
    excess = np.where(values == limit, 0.0, excess)
    if bound.operator in (">", "<"):
        excess = np.where(values == limit, np.finfo(np.float64).tiny, excess)
    return np.where(np.isnan(values), np.inf, excess)


def constraint(bound: Bound, value: float, dense: float | None = None) -> float:
    """`violations` of one value, as the search wants it: positive when violated, infinite for NaN."""
    return float(violations(bound, [value], dense)[0])


def satisfied(
    bounds: Sequence[Bound], columns: Mapping[str, ArrayLike], dense: Mapping[str, float] | None = None
) -> NDArray[np.bool_]:
    """For each row of the columns whether every bound holds; BoundError for a measure that is not among them."""
    return _total(bounds, columns, dense or {}) <= 0


def nearest_miss(
    bounds: Sequence[Bound], columns: Mapping[str, ArrayLike], dense: Mapping[str, float] | None = None
) -> int | None:
    """The row with the least total violation, the first among equals; None where there are no rows.

    Raises:
        BoundError: a bound's measure is not among the columns, or its dense value is needed and missing.
    """
    total = _total(bounds, columns, dense or {})
    return int(np.argmin(total)) if len(total) else None


def _total(
    bounds: Sequence[Bound], columns: Mapping[str, ArrayLike], dense: Mapping[str, float]
) -> NDArray[np.float64]:
    rows = len(np.asarray(next(iter(columns.values())))) if columns else 0
    total = np.zeros(rows)
    for bound in bounds:
        if bound.measure not in columns:
            raise BoundError(f"{bound.measure!r} in {str(bound)!r} was not measured. Measured: {', '.join(columns)}")
        total += np.maximum(violations(bound, columns[bound.measure], dense.get(bound.measure)), 0.0)
    return total


def _bound(measure: str, operator: str, limit: Mapping[str, str | None], text: str) -> Bound:
    factor = _number(limit.get("factor") or "1", text) if limit.get("dense") else 0.0
    offset = _number(limit.get("number") or "0", text)
    return Bound(
        measure=measure, operator=operator, factor=factor, offset=-offset if limit.get("sign") == "-" else offset
    )


def _number(text: str, bound: str) -> float:
    digits = text.replace(" ", "")
    # The division rounds once, so that 98% is 0.98 to the bit.
    number = float(digits[:-1]) / 100 if digits.endswith("%") else float(digits)
    if not math.isfinite(number):
        raise BoundError(f"{text!r} in the bound {bound!r} is not a finite number")
    return number
