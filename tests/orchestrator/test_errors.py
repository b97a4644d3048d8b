"""The family of errors."""

from __future__ import annotations

import re

import pytest

from orchestrator import errors
from orchestrator.errors import InputError, OrchardistError, UnknownName

FAMILY = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, OrchardistError)]


def test_the_tree_is_drawn_as_it_grows() -> None:
    drawn: list[tuple[str, str]] = []
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r"([│├└─ ]*)(\w+)", line):
            depth = len(match[1]) // 4
            if match[2] in vars(errors):
                path[depth:] = [match[2]]
                drawn.append((match[2], path[depth - 1] if depth else "Exception"))
    assert sorted(drawn) == sorted((e.__name__, e.__bases__[0].__name__) for e in FAMILY)


@pytest.mark.parametrize("error", FAMILY, ids=lambda error: str(error.__name__))
def test_wrong_input_is_a_value_error_and_nothing_else_is(error: type[Exception]) -> None:
    assert issubclass(error, ValueError) == issubclass(error, InputError)
    assert error.__doc__


def test_an_unknown_name_says_what_is_known() -> None:
    assert str(UnknownName("fruit", "aple", ["pear", "apple"])) == (
        "unknown fruit 'aple'; did you mean 'apple'? Known: apple, pear"
    )
    assert str(UnknownName("fruit", 3, ["pear"])) == "unknown fruit 3. Known: pear"
    assert str(UnknownName("fruit", "x", [])) == "unknown fruit 'x'. Known: none"
