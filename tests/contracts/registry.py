"""What every registry promises, whatever it holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.errors import UnknownName
from orchestrator.registry import Registry


def unknown_names_are_refused_with_the_known_ones(registry: Registry[Any]) -> None:
    first = registry.names[0]
    with pytest.raises(UnknownName) as caught:
        registry[first + "x"]
    message = str(caught.value)
    assert message.startswith(f"unknown {registry.kind} {first + 'x'!r}; did you mean {first!r}? Known: ")
    assert all(name in message for name in registry.names)
    assert "\n" not in message
    with pytest.raises(UnknownName, match=f"unknown {registry.kind} '木'. Known: "):
        registry["木"]


def every_entry_says_in_one_line_what_it_is(registry: Registry[Any]) -> None:
    for entry in registry:
        assert entry.summary.endswith("."), f"{entry.name}: the first line of its docstring is no sentence"
        assert 10 < len(entry.summary) <= 120, f"{entry.name}: {entry.summary!r}"


def every_name_is_how_a_study_file_writes_it(registry: Registry[Any]) -> None:
    for name in registry.names:
        assert name == name.lower() and " " not in name and ":" not in name


def entries_are_found_by_their_names(registry: Registry[Any]) -> None:
    assert registry.names == [entry.name for entry in registry] and len(set(registry.names)) == len(registry.names)
    for entry in registry:
        assert registry[entry.name] is entry and entry.name in registry and callable(entry.function)


def a_name_is_registered_once(registry: Registry[Any]) -> None:
    with pytest.raises(AssertionError, match="registered twice"):
        registry.register(registry.names[0])(lambda: None)


REGISTRY_CHECKS: list[Callable[[Registry[Any]], None]] = [
    unknown_names_are_refused_with_the_known_ones,
    every_entry_says_in_one_line_what_it_is,
    every_name_is_how_a_study_file_writes_it,
    entries_are_found_by_their_names,
    a_name_is_registered_once,
]
