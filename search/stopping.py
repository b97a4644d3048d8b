"""Which trials go on: successive halving over rounds, by non-dominated rank where several objectives count.

Trials compete in brackets of consecutive numbers. A trial pauses at each rung; when nobody else of its bracket can
still come to that rung, the best of those that did go on and the others stop there. Who was first decides nothing: one
worker or fifty, interrupted or not, the same results stop the same trials.

Jamieson & Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization" (2016); ranking by
non-domination as in Schmucker et al., "Multi-objective asynchronous successive halving" (2021), but brackets wait.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from search.pareto import Direction, best_first

Result = tuple[Sequence[float], Mapping[str, float]]
"""The objectives' values at a rung, and how far each bound is violated."""


@dataclass(frozen=True, kw_only=True)
class Halving:
    """Where trials pause, and how many of them go on.

    Args:
        reduction_factor: one of so many goes on, and each rung is so many times as many rounds away.
        min_rounds: of the first rung.
        bracket: how many trials compete with each other.
    """

    reduction_factor: int = 3
    min_rounds: int = 1
    bracket: int = 27

    def is_rung(self, rounds: int) -> bool:
        """Whether trials are compared after so many rounds."""
        return rounds in self.rungs(rounds)

    def next_rung(self, after: int, rounds: int) -> int | None:
        """Where a trial of so many rounds pauses next; None when it goes on to its end."""
        return next((rung for rung in self.rungs(rounds - 1) if rung > after), None)

    def rungs(self, last: int) -> Iterator[int]:
        """The rungs up to `last` rounds, in order."""
        rung = self.min_rounds
        while rung <= last:
            yield rung
            rung *= self.reduction_factor


NEVER = Halving(min_rounds=sys.maxsize)
"""Every trial runs to its end."""


@dataclass
class _Member:
    """A trial of a bracket."""

    rounds: int = 0
    """How many it asks for; 0 while it has not begun."""
    results: dict[int, Result] = field(default_factory=dict)
    over: bool = False
    """It is done, failed or stopped: it comes to no other rung."""

    def may_reach(self, rung: int, closed: bool) -> bool:
        """Whether its result at the rung is still to come."""
        if self.over or rung in self.results:
            return False
        return self.rounds >= rung if self.rounds else not closed


@dataclass
class _Bracket:
    members: dict[int, _Member]
    rung: int
    """The first one that is not decided."""


class Brackets:
    """The trials of a study as they climb. Every trial is told of once it has begun, has come to a rung, is over."""

    def __init__(self, rule: Halving, directions: Sequence[Direction]) -> None:
        self.rule = rule
        self._directions = tuple(directions)
        self._brackets: dict[int, _Bracket] = {}
        self._changed: set[int] = set()
        self._closed = False

    def begin(self, number: int, rounds: int) -> None:
        """A trial that asks for so many rounds."""
        self._member(number).rounds = rounds

    def reached(self, number: int, rung: int, values: Sequence[float], constraints: Mapping[str, float]) -> None:
        """A trial's result at a rung. Where it asks for no more rounds it takes part, but has no need to go on."""
        self._member(number).results[rung] = tuple(values), dict(constraints)

    def over(self, number: int) -> None:
        """Nothing more comes from a trial: it is done, or has failed."""
        self._member(number).over = True

    def close(self) -> None:
        """No other trial will begin: brackets no longer wait for those that have not."""
        if not self._closed:
            self._closed = True
            self._changed.update(self._brackets)

    def decide(self) -> Iterator[tuple[int, bool]]:
        """Each trial that waits at a rung of which the bracket is complete, and whether it goes on; each once."""
        for place in sorted(self._changed):
            bracket = self._brackets[place]
            while self._complete(bracket):
                yield from self._decide(bracket)
                bracket.rung *= self.rule.reduction_factor
        self._changed.clear()

    def _member(self, number: int) -> _Member:
        place, size = number // self.rule.bracket, self.rule.bracket
        if place not in self._brackets:
            members = {each: _Member() for each in range(place * size, (place + 1) * size)}
            self._brackets[place] = _Bracket(members, self.rule.min_rounds)
        self._changed.add(place)
        return self._brackets[place].members[number]

    def _complete(self, bracket: _Bracket) -> bool:
        members = bracket.members.values()
        here = any(bracket.rung in member.results for member in members)
        return here and not any(member.may_reach(bracket.rung, self._closed) for member in members)

    def _decide(self, bracket: _Bracket) -> Iterator[tuple[int, bool]]:
        rung = bracket.rung
        field = {number: member for number, member in bracket.members.items() if rung in member.results}
        values, constraints = zip(*(member.results[rung] for member in field.values()), strict=True)
        order = best_first(values, constraints, self._directions)
        chosen = {list(field)[place] for place in order[: max(1, len(field) // self.rule.reduction_factor)]}
        for number, member in field.items():
            # One that has gone on before goes on: with more trials in its bracket it might not be chosen again.
            if not member.over and member.rounds > rung and max(member.results) == rung:
                member.over = number not in chosen
                yield number, not member.over
