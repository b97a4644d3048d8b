"""The search space as plain data: which parameters there are, what values they take and when each applies.

    [space]
    scope = "layer"                                             a plain value is fixed
    criterion = ["magnitude", "taylor"]                         a list is a choice
    rate = { low = 0.1, high = 0.5, step = 0.05 }               a table with low and high is a range
    rewind_epoch = { choices = [0, 1], when = { retrain = ["rewind"] } }
    ignored = { value = ["conv1", "fc"] }                       a fixed list
    criteria.taylor.examples = [64, 256]                     any other table is a namespace: "criteria.taylor.examples"

`when` says that a parameter applies only if each parameter it names applies and has one of the values listed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from typing import Any, NoReturn

Condition = Mapping[str, tuple[Any, ...]]

CHOICE_KEYS = frozenset({"choices", "when"})
RANGE_KEYS = frozenset({"low", "high", "step", "log", "when"})
FIXED_KEYS = frozenset({"value", "when"})


class SpaceError(ValueError):
    """A space or a value in it is wrong; the message names the value, its place and the legal ones."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One of `values`, which have no order."""

    name: str
    values: tuple[Any, ...]
    when: Condition = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.values:
            _refuse(self.name, "has no choices; give at least one")
        for place, value in enumerate(self.values):
            if _among(value, self.values[:place]):
                _refuse(self.name, f"lists {value!r} twice")

    def index(self, value: Any) -> int:
        """Where `value` stands among the values, True and 1 being two; SpaceError when it is none of them."""
        found = next((index for index, known in enumerate(self.values) if _same(known, value)), None)
        if found is None:
            _refuse(self.name, f"{value!r} is not legal; it is {_spell(self.values)}")
        return found


@dataclass(frozen=True, kw_only=True)
class Range:
    """A number from `low` to `high`, both included; on the grid `low + k * step` where there is a step."""

    name: str
    low: float
    high: float
    step: float | None = None
    log: bool = False
    integer: bool
    when: Condition = field(default_factory=dict)

    def __post_init__(self) -> None:
        bounds = {"low": self.low, "high": self.high} | ({} if self.step is None else {"step": self.step})
        for key, value in bounds.items():
            if not _finite(value):
                _refuse(self.name, f"{key} must be a finite number, not {_shown(value)}")
        if not isinstance(self.log, bool):
            _refuse(self.name, f"log must be true or false, not {self.log!r}")
        if self.low > self.high:
            _refuse(self.name, f"low {self.low!r} is above high {self.high!r}")
        if self.step is not None and self.step <= 0:
            _refuse(self.name, f"step must be above 0, not {self.step!r}")
        if self.log and self.low <= 0:
            _refuse(self.name, f"low must be above 0 on a log scale, not {self.low!r}")
        if self.log and self.step is not None:
            _refuse(self.name, "takes a step or a log scale, not both")

    @cached_property
    def count(self) -> int | None:
        """How many values there are; None when the range is continuous."""
        if not self.integer and self.step is None:
            return 1 if self.low == self.high else None
        return int((_decimal(self.high) - _decimal(self.low)) / self._stride) + 1

    def at(self, index: int) -> float:
        """The value at `index` of a countable range, as it would be written: 0.1 + 3 steps of 0.05 is 0.25."""
        value = _decimal(self.low) + index * self._stride
        return int(value) if self.integer else float(value)

    def nearest(self, value: float) -> int:
        """The index of the grid value nearest to `value`, which may lie outside."""
        return round((_decimal(value) - _decimal(self.low)) / self._stride)

    @property
    def _stride(self) -> Decimal:
        return _decimal(1 if self.step is None else self.step)


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """A parameter with one value."""

    name: str
    value: Any
    when: Condition = field(default_factory=dict)


Parameter = Choice | Range | Fixed


@dataclass(frozen=True, kw_only=True)
class Space:
    """The parameters of a study, each after those that its `when` names.

    Raises:
        SpaceError: two parameters share a name, or a `when` names an unknown parameter, a value that its parameter
            never has, or itself in a circle.
    """

    parameters: tuple[Parameter, ...]

    def __post_init__(self) -> None:
        if len(self._by_name) < len(self.parameters):
            names = [parameter.name for parameter in self.parameters]
            _refuse(next(name for name in names if names.count(name) > 1), "is given twice")
        for parameter in self.parameters:
            self._check_condition(parameter)
        object.__setattr__(self, "parameters", _parents_first(self.parameters))

    @cached_property
    def _by_name(self) -> dict[str, Parameter]:
        return {parameter.name: parameter for parameter in self.parameters}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all parameters, in order."""
        return tuple(parameter.name for parameter in self.parameters)

    def parameter(self, name: str) -> Parameter:
        """The parameter called `name`; SpaceError if there is none."""
        if name not in self._by_name:
            _refuse(name, f"is unknown. Known: {', '.join(self._by_name) or 'none'}")
        return self._by_name[name]

    def possible(self, name: str) -> tuple[Any, ...] | None:
        """Every value that `name` can take: None when it is continuous, () when there is no such parameter."""
        return _possible(self._by_name[name]) if name in self._by_name else ()

    def validate(self, params: Mapping[str, Any], place: str) -> dict[str, Any]:
        """`params` with stepped values moved exactly onto their grid; missing ones are fine. `place` is for messages.

        Raises:
            SpaceError: a name is unknown, a value is not legal, or a parameter does not apply under the values given.
        """
        for name in params:
            if name not in self._by_name:
                raise SpaceError(f"{place}: {name!r} is no parameter of the space. Known: {', '.join(self.names)}")
        legal = {name: _legal(self._by_name[name], value, place) for name, value in params.items()}
        for name, value in legal.items():
            if self._applies(self._by_name[name], legal) is False:
                when = " and ".join(f"{key} is {_spell(values)}" for key, values in self._by_name[name].when.items())
                raise SpaceError(f"{place}: {name} = {value!r} does not apply here, only when {when}")
        return legal

    def complete(self, params: Mapping[str, Any]) -> bool:
        """Whether `params` is legal and gives every parameter that applies; fixed ones may be left out."""
        try:
            known = self.validate(params, "parameters")
        except SpaceError:
            return False
        return all(
            isinstance(parameter, Fixed) or parameter.name in known or self._applies(parameter, known) is False
            for parameter in self.parameters
        )

    def imply(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """`params` with the conditions of what is given: a missing parent gets the first value its child asks for."""
        implied = dict(params)
        for parameter in reversed(self.parameters):
            if parameter.name not in implied:
                continue
            for name, values in parameter.when.items():
                if not isinstance(self._by_name[name], Fixed):
                    implied.setdefault(name, _legal(self._by_name[name], values[0], f"space.{name}"))
        return implied

    def resolve(self, suggest: Callable[[Choice | Range], Any]) -> dict[str, Any]:
        """One point: `suggest` is asked for each choice and range that applies, parents first; fixed ones join them."""
        params: dict[str, Any] = {}
        for parameter in self.parameters:
            if self._applies(parameter, params, settled=True):
                params[parameter.name] = parameter.value if isinstance(parameter, Fixed) else suggest(parameter)
        return params

    def grid(self) -> Iterator[dict[str, Any]]:
        """Every point once, the last parameter turning fastest.

        Raises:
            SpaceError: a parameter is continuous.
        """
        for parameter in self.parameters:
            if _size(parameter) is None:
                _refuse(parameter.name, "is continuous: a grid needs a step, integers or choices")
        return self._points(0, {})

    def size(self) -> int | None:
        """How many points the grid has, counted without walking it; None when a parameter is continuous."""
        if any(_size(parameter) is None for parameter in self.parameters):
            return None
        deciding = {name for parameter in self.parameters for name in parameter.when}
        return self._count(0, {}, deciding)

    def _points(self, depth: int, params: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if depth == len(self.parameters):
            yield params
            return
        parameter = self.parameters[depth]
        if not self._applies(parameter, params, settled=True):
            yield from self._points(depth + 1, params)
            return
        for value in _possible(parameter) or ():
            yield from self._points(depth + 1, {**params, parameter.name: value})

    def _count(self, depth: int, params: dict[str, Any], deciding: set[str]) -> int:
        if depth == len(self.parameters):
            return 1
        parameter = self.parameters[depth]
        if not self._applies(parameter, params, settled=True):
            return self._count(depth + 1, params, deciding)
        if parameter.name not in deciding:
            return (_size(parameter) or 0) * self._count(depth + 1, params, deciding)
        values = _possible(parameter) or ()
        return sum(self._count(depth + 1, {**params, parameter.name: value}, deciding) for value in values)

    def _applies(self, parameter: Parameter, params: Mapping[str, Any], *, settled: bool = False) -> bool | None:
        """Whether the condition holds; None when a missing parent leaves it open, which `settled` rules out."""
        answer: bool | None = True
        for name, values in parameter.when.items():
            parent = self._by_name[name]
            holds = self._applies(parent, params, settled=settled)
            if holds is not False:
                if name in params:
                    holds = holds if _among(params[name], values) else False
                elif isinstance(parent, Fixed):
                    holds = holds if _among(parent.value, values) else False
                else:
                    holds = False if settled else None
            if holds is False:
                return False
            answer = answer and holds
        return answer

    def _check_condition(self, parameter: Parameter) -> None:
        for name, values in parameter.when.items():
            if name not in self._by_name:
                _refuse(parameter.name, f"when names {name!r}, which is unknown. Known: {', '.join(self._by_name)}")
            if not values:
                _refuse(parameter.name, f"when gives no value for {name!r}")
            for value in values:
                _legal(self._by_name[name], value, f"space.{parameter.name}: when")


def parse(table: Mapping[str, Any]) -> Space:
    """The space that a study's `[space]` table describes, by the rules at the top of this page.

    Raises:
        SpaceError: naming the parameter, what is wrong with it and what would be legal.
    """
    return Space(parameters=tuple(_parameters(table, "")))


def flatten(table: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables as dotted names, the way a space names its parameters; SpaceError if two meet in one name."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        items = {f"{key}.{name}": inner for name, inner in flatten(value).items()} if _table(value) else {key: value}
        for name, inner in items.items():
            if name in flat:
                _refuse(name, "is given twice")
            flat[name] = inner
    return flat


def _parameters(table: Mapping[str, Any], prefix: str) -> Iterator[Parameter]:
    for key, value in table.items():
        name = f"{prefix}{key}"
        if prefix and key == "when":
            _refuse(name, "stands in a namespace; only a table with low and high, choices or value has a `when`")
        if isinstance(value, list | tuple):
            yield Choice(name=name, values=tuple(value))
        elif not _table(value):
            yield Fixed(name=name, value=value)
        elif "choices" in value:
            _known_keys(name, value, CHOICE_KEYS)
            if not isinstance(value["choices"], list | tuple):
                _refuse(name, f"choices must be a list, not {value['choices']!r}")
            yield Choice(name=name, values=tuple(value["choices"]), when=_condition(name, value))
        elif "low" in value or "high" in value:
            yield _range(name, value)
        elif "value" in value:
            _known_keys(name, value, FIXED_KEYS)
            yield Fixed(name=name, value=value["value"], when=_condition(name, value))
        else:
            yield from _parameters(value, f"{name}.")


def _range(name: str, table: Mapping[str, Any]) -> Range:
    _known_keys(name, table, RANGE_KEYS)
    for key in ("low", "high"):
        if key not in table:
            _refuse(name, f"has no {key}; a range needs low and high")
    low, high, step = table["low"], table["high"], table.get("step")
    numbers = [low, high] + ([] if step is None else [step])
    whole = all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)
    log = table.get("log", False)
    return Range(name=name, low=low, high=high, step=step, log=log, integer=whole, when=_condition(name, table))


def _condition(name: str, table: Mapping[str, Any]) -> Condition:
    when = table.get("when", {})
    if not _table(when):
        _refuse(name, f'when must be a table such as {{ retrain = ["rewind"] }}, not {when!r}')
    return {
        parent: tuple(values) if isinstance(values, list | tuple) else (values,)
        for parent, values in flatten(when).items()
    }


def _known_keys(name: str, table: Mapping[str, Any], known: frozenset[str]) -> None:
    for key in table:
        if key not in known:
            _refuse(name, f"has the unknown key {key!r}. Known: {', '.join(sorted(known))}")


def _parents_first(parameters: Sequence[Parameter]) -> tuple[Parameter, ...]:
    """In the order given, each held back until all parameters that its `when` names have come."""
    ordered: list[Parameter] = []
    waiting = list(parameters)
    placed: set[str] = set()
    while waiting:
        ready = next((parameter for parameter in waiting if parameter.when.keys() <= placed), None)
        if ready is None:
            _refuse(waiting[0].name, f"when goes in a circle: {', '.join(parameter.name for parameter in waiting)}")
        waiting.remove(ready)
        ordered.append(ready)
        placed.add(ready.name)
    return tuple(ordered)


def _size(parameter: Parameter) -> int | None:
    if isinstance(parameter, Range):
        return parameter.count
    return len(parameter.values) if isinstance(parameter, Choice) else 1


def _possible(parameter: Parameter) -> tuple[Any, ...] | None:
    if isinstance(parameter, Fixed):
        return (parameter.value,)
    if isinstance(parameter, Choice):
        return parameter.values
    return None if parameter.count is None else tuple(parameter.at(index) for index in range(parameter.count))


def _legal(parameter: Parameter, value: Any, place: str) -> Any:
    """`value` as the parameter has it; SpaceError when it never does."""
    if not isinstance(parameter, Range):
        values = _possible(parameter) or ()
        for known in values:
            if _same(known, value):
                return known
        raise SpaceError(f"{place}: {parameter.name} = {_shown(value)} is not legal; it is {_spell(values)}")
    if _finite(value):
        if parameter.count is None or (parameter.step is None and not parameter.integer):
            if parameter.low <= value <= parameter.high:
                return float(value)
        else:
            index = parameter.nearest(value)
            tolerance = min(1e-9, float(parameter.step or 1) / 1000)
            if 0 <= index < parameter.count and abs(value - parameter.at(index)) <= tolerance:
                return parameter.at(index)
    kind = "an integer" if parameter.integer else "a number"
    grid = "" if parameter.step is None else f" in steps of {parameter.step!r}"
    between = f"{kind} from {parameter.low!r} to {parameter.high!r}{grid}"
    raise SpaceError(f"{place}: {parameter.name} = {_shown(value)} is not legal; it is {between}")


def _spell(values: Sequence[Any]) -> str:
    spelled = [repr(value) for value in values]
    return spelled[0] if len(spelled) == 1 else f"{', '.join(spelled[:-1])} or {spelled[-1]}"


def _decimal(number: float) -> Decimal:
    return Decimal(repr(float(number))) if isinstance(number, float) else Decimal(int(number))


def _finite(value: Any) -> bool:
    """Whether `value` is a number that a float can hold, which integers may exceed."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _shown(value: Any) -> str:
    """`value` for a message, without hundreds of digits."""
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        return "an integer above 1.8e308" if value > 0 else "an integer below -1.8e308"
    return repr(value)


def _same(one: Any, other: Any) -> bool:
    """Equal, where True is not 1 and a tuple is its list."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def _among(value: Any, values: Sequence[Any]) -> bool:
    return any(_same(value, other) for other in values)


def _table(value: Any) -> bool:
    return isinstance(value, Mapping)


def _refuse(name: str, reason: str) -> NoReturn:
    raise SpaceError(f"space.{name}: {reason}")
