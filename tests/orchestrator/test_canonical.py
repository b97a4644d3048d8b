"""One digest for equal data, and another for anything else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.canonical import canonical, digest, finite


@dataclass(frozen=True, kw_only=True)
class Old:
    size: int
    name: str = "a"


@dataclass(frozen=True, kw_only=True)
class New:
    size: int
    name: str = "a"
    extra: float = 0.0
    more: tuple[int, ...] = ()
    options: dict[str, int] = field(default_factory=dict)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def same(one: Any, other: Any) -> bool:
    """Equal in value and type: True is not 1, and 1 is not 1.0, and 0.0 is not -0.0."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and repr(one) == repr(other)


def test_by_eye() -> None:
    assert canonical(Old(size=1)) == {"size": 1}
    assert canonical({"b": (1, Old(size=2, name="c")), "a": None}) == {"b": [1, {"size": 2, "name": "c"}], "a": None}
    assert digest({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


def test_a_new_field_at_its_default_changes_nothing() -> None:
    assert digest(Old(size=1)) == digest(New(size=1)) == digest(New(size=1, extra=0.0, options={}))
    for changed in (New(size=1, extra=0.1), New(size=1, more=(0,)), New(size=1, options={"a": 0})):
        assert digest(changed) != digest(Old(size=1))


def test_a_default_of_another_type_is_no_default() -> None:
    assert canonical(New(size=1, extra=False)) == {"size": 1, "extra": False}


def test_a_required_field_is_always_there() -> None:
    assert canonical(Old(size=0)) == {"size": 0}


@given(PLAIN, PLAIN)
def test_digests_are_equal_when_the_data_are(one: Any, other: Any) -> None:
    assert (digest(one) == digest(other)) == same(one, other)
    assert digest({"x": one, "y": other}) == digest({"y": other, "x": one})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, b"x", object()])
def test_what_is_no_plain_data_has_no_digest(value: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        digest({"x": value})


def test_what_json_cannot_say_is_none() -> None:
    inf = float("inf")
    assert finite({"a": [1, inf, (-inf, "x")], "b": {"c": float("nan"), "d": 1.5}, "e": True}) == {
        "a": [1, None, [None, "x"]],
        "b": {"c": None, "d": 1.5},
        "e": True,
    }
