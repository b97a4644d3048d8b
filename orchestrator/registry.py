"""Name -> function, for everything that a study file may name.

A registered function brings its own documentation: the first line of its docstring is what `orchardist list` prints.
A user's own function is named `"package.module:function"`. Whoever read its source binds it under that name, in each
process, since a name registered in one process would be unknown in the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from orchestrator.errors import UnknownName

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class Entry(Generic[F]):
    """One registered function with what its registry wants to know of it."""

    name: str
    function: F
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return (self.function.__doc__ or "").strip().partition("\n")[0]


class Registry(Generic[F]):
    """The functions of one kind by name; `kind` is the singular noun used in messages."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry[F]] = {}
        self._of_users: dict[str, Entry[F]] = {}

    def register(self, name: str, **facts: Any) -> Callable[[F], F]:
        """A decorator that enters a function under `name`; registering a name twice is our own mistake."""

        def enter(function: F) -> F:
            assert name not in self._entries, f"{self.kind} {name!r} is registered twice"
            self._entries[name] = Entry(name=name, function=function, facts=facts)
            return function

        return enter

    def __getitem__(self, name: str) -> Entry[F]:
        """The entry called `name`.

        Raises:
            UnknownName: no such entry; the message lists the known ones.
        """
        entry = self._entries.get(name) or self._of_users.get(name)
        if entry is None:
            raise UnknownName(self.kind, name, self._entries)
        return entry

    def bind(self, name: str, function: F) -> None:
        """Let `name`, which has the form `"package.module:function"`, mean the user's `function` from now on."""
        assert ":" in name, name
        self._of_users[name] = Entry(name=name, function=function)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[Entry[F]]:
        return iter(self._entries.values())

    @property
    def names(self) -> list[str]:
        """The registered names in order of registration."""
        return list(self._entries)
