"""The study file: read, validated, and named by a digest of what decides its results."""

from __future__ import annotations

import json
import math
import random
import re
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from orchestrator.canonical import digest
from orchestrator.errors import InputError, SpecError, UnknownName
from orchestrator.mixes import resolve
from orchestrator.pruning import criteria
from orchestrator.pruning.patterns import UNITS
from orchestrator.settings import (
    FINAL,
    IN_SPACE,
    Number,
    OtherTask,
    PruneSettings,
    Section,
    Settings,
    StoppingSettings,
    TicketSettings,
    TrainSettings,
    Whole,
    check_value,
    complaints,
)
from orchestrator.store.paths import is_study
from search.proposer import SAMPLERS
from search.query import BoundError, parse
from search.space import Choice, Fixed, Parameter, Range, Space, SpaceError, flatten
from search.space import parse as parse_space
from search.stopping import NEVER, Halving

CHECKPOINTS = (".safetensors", ".pt", ".pth", ".bin")
OPEN = ("trials", "enqueue", "keep", "stopping", "max_store_gb", "checkpoint_minutes", "timeout_seconds")
"""What may change from one run of a study to the next."""

MOST_MIXES = 1000
"""How many mixes of choices are tried out before a study starts; of larger spaces, as many drawn at random."""

MOST_LEVELS = 64
"""Tables and lists within each other, at most."""

Seed = Annotated[Whole, Field(ge=0, lt=2**63)]


class StudySpec(Section):
    """A study: a task, how to train and prune, what to search and what to optimise.

    Read from TOML with `StudySpec.load(path)`, or built in Python with the same names. A wrong value is a `SpecError`.
    """

    name: str = Field(description="names the study's folder in the store")
    task: str = Field(description="a built-in task, a path such as 'my_task.py', or 'package.module'")
    trials: Whole = Field(default=20, ge=0, le=10**9, description="how many proposals to run; enqueued ones count")
    seeds: tuple[Seed, ...] = Field(default=(0,), min_length=1, description="each proposal runs once under each")
    objectives: tuple[str, ...] = Field(
        default=("accuracy", "sparsity"), min_length=1, description="see `list objectives`"
    )
    keep: Literal["all", "front"] = Field(
        default="all", description="the states that stay when the study has ended; others are made again when asked for"
    )
    max_store_gb: Number = Field(
        default=0,
        ge=0,
        description="with more states in the store those that nothing needs go, or no trial begins; 0: no limit",
    )
    checkpoint_minutes: Number = Field(
        default=10, ge=0, description="a training is made durable this often, so that it can go on from there; 0: never"
    )
    timeout_seconds: Number = Field(
        default=0, ge=0, description="a stage that takes longer is ended, and its trial has failed; 0: no limit"
    )
    sampler: str = Field(default="tpe", description="see `list samplers`")
    sampler_seed: Seed = Field(default=0, description="proposal n is drawn under (sampler_seed, n)")
    warm_start: tuple[str, ...] = Field(
        default=(), description="earlier studies of the store, whose best configurations come first"
    )
    task_params: dict[str, Any] = Field(default={}, description="arguments of the task function")
    checkpoint: str = Field(default="", description="a file of weights that the task's model starts from")
    train: TrainSettings = TrainSettings()
    prune: PruneSettings = PruneSettings()
    tickets: TicketSettings = TicketSettings()
    stopping: StoppingSettings = StoppingSettings()
    space: dict[str, Any] = Field(
        default={}, description="what the sampler chooses; a list is a choice, a plain value is fixed"
    )
    constraints: dict[str, str] = Field(
        default={}, description="measure -> bound, such as '>= 0.8' or '>= dense - 0.01'"
    )
    enqueue: tuple[dict[str, Any], ...] = Field(
        default=(), description="proposals to run first; missing values are sampled"
    )

    def __init__(self, /, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise SpecError("\n".join(_legal(line) for line in complaints(error)[:2])) from error

    @classmethod
    def load(cls, path: str | Path) -> StudySpec:
        """Read a TOML study file.

        Raises:
            SpecError: the file is missing, is no TOML (with the line), or a value is wrong (with its name).
        """
        return cls.parse(read_text(path), str(path))

    @classmethod
    def parse(cls, text: str, path: str = "study") -> StudySpec:
        """The study that a TOML text describes; `path` is for messages."""
        try:
            return cls(**tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            end = f"at line {text.count(chr(10)) + 1}, the end of the file"
            raise SpecError(f"{path}: not valid TOML: {str(error).replace('at end of document', end)}") from error
        except InputError as error:
            raise SpecError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from error
        except RecursionError as error:
            raise SpecError(f"{path}: tables and lists lie too deep within each other") from error
        except ValueError as error:  # Python reads no integer of thousands of digits
            raise SpecError(f"{path}: a number is too long: {str(error).partition(';')[0]}") from error

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        if not is_study(name):
            raise ValueError("must be letters, digits, '.', '_' and '-', at most 100, a letter or digit first")
        return name

    @field_validator("sampler")
    @classmethod
    def _sampler(cls, name: str) -> str:
        if name not in SAMPLERS:
            raise ValueError(str(UnknownName("sampler", name, SAMPLERS)))
        return name

    @field_validator("checkpoint")
    @classmethod
    def _checkpoint(cls, path: str) -> str:
        if path and not path.endswith(CHECKPOINTS):
            raise ValueError(f"{path!r} must end in {', '.join(CHECKPOINTS[:-1])} or {CHECKPOINTS[-1]}")
        return path

    @field_validator("warm_start")
    @classmethod
    def _earlier(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if not is_study(name):
                raise ValueError(f"{name!r} is no name of a study; legal: as `name`")
        return names

    @field_validator("seeds", "objectives", "warm_start")
    @classmethod
    def _different(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(values)) < len(values):
            raise ValueError("must not repeat a value")
        return values

    @field_validator("task_params", "space", "enqueue", mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        return _plain(value)

    @field_validator("tickets", mode="before")
    @classmethod
    def _plain_table(cls, value: Any) -> Any:
        return _plain(value) if isinstance(value, Mapping) else value

    @field_validator("constraints")
    @classmethod
    def _bounds(cls, constraints: dict[str, str]) -> dict[str, str]:
        for measure, bound in constraints.items():
            if measure.startswith("test_"):
                raise ValueError(f"{measure!r}: the test split is only ever reported; legal: {measure[5:]!r}")
            try:
                parse(bound, measure=measure)
            except BoundError as error:
                raise ValueError(str(error)) from error
        return constraints

    @model_validator(mode="after")
    def _searchable(self) -> StudySpec:
        try:
            space = parse_space(self.space)
            for parameter in space.parameters:
                _check_parameter(parameter)
            for number, entry in enumerate(self.enqueue, start=1):
                space.validate(flatten(entry), f"enqueue {number}")
            if self.sampler == "grid":
                space.grid()
        except SpaceError as error:
            raise ValueError(str(error)) from error
        if self.name in self.warm_start:
            raise ValueError(f"warm_start: {self.name!r} is this study itself; legal: earlier ones")
        if any(task.label == self.task for task in self.tickets.tasks):
            raise ValueError(f"tickets.tasks: the study's own task is called {self.task!r}; legal: another name")
        if self.tickets.ticket and "ticket" not in (space.possible("phase") or ()):
            raise ValueError(
                "tickets.ticket: a ticket file is for phase 'ticket'; legal with it: space.phase = \"ticket\""
            )
        return self

    def search_space(self) -> Space:
        """The parsed `[space]`."""
        return parse_space(self.space)

    def points(self) -> list[dict[str, Any]]:
        """The enqueued proposals as flat parameters, in order."""
        return [self.search_space().validate(flatten(entry), "enqueue") for entry in self.enqueue]

    def structures(self) -> tuple[str, ...]:
        """The structures of units that a proposal may name."""
        return tuple(name for name in self.search_space().possible("structure") or () if name in UNITS)

    def budgeted(self) -> bool:
        """Whether a proposal may have a FLOPs budget."""
        return self.search_space().possible("flops_budget") != ()

    def functions(self) -> list[str]:
        """The user's own functions that the study names, as `package.module:function`."""
        names = self.search_space().possible("criterion") or ()
        return sorted({name for name in names if isinstance(name, str) and ":" in name})

    def needs(self) -> tuple[str, ...]:
        """What the criteria that a proposal may name need of the model and the data."""
        names = {*(self.search_space().possible("criterion") or ("magnitude",)), *self.tickets.criteria}
        needed = {need for name in names if isinstance(name, str) for need in criteria.needs(criteria.CRITERIA[name])}
        return tuple(need for need in (*criteria.FROM_DATA, *criteria.FROM_STATE) if need in needed)

    def halving(self) -> Halving:
        """Where trials pause, and how many of them go on; without a rule every trial runs to its end."""
        if self.stopping.rule == "none":
            return NEVER
        return Halving(**self.stopping.model_dump(exclude={"rule"}))

    def settings(self, params: Mapping[str, Any], code: Mapping[str, str] | None = None) -> Settings:
        """One proposal's parameters laid over the study's constants; raises PlanError for a mix without sense."""
        return resolve(self.train, self.prune, params, code, self.tickets)

    def too_few(self) -> str | None:
        """What is amiss where the grid ends before `trials` are run; None where it does not."""
        points = self.search_space().size() if self.sampler == "grid" else None
        if points is None or points + len(self.enqueue) >= self.trials:
            return None
        first = f"{len(self.enqueue)} enqueued proposals and " if self.enqueue else ""
        most = points + len(self.enqueue)
        return (
            f"trials = {self.trials}, but sampler 'grid' ends after {first}the {points} different proposals of "
            f"[space]; legal: trials = {most} or fewer, more values in [space], or another sampler"
        )

    def mixes(self) -> list[dict[str, Any]]:
        """Mixes of choices to try out beforehand: all, with ranges at their ends, or `MOST_MIXES` drawn at random."""
        ends = Space(
            parameters=tuple(
                Choice(name=p.name, values=_values(p), when=p.when) if isinstance(p, Range) else p
                for p in self.search_space().parameters
            )
        )
        if (ends.size() or 0) <= MOST_MIXES:
            return list(ends.grid())
        draw = random.Random(0)
        return [ends.resolve(lambda choice: draw.choice(_values(choice))) for _ in range(MOST_MIXES)]

    def check_mixes(self, code: Mapping[str, str] | None = None) -> list[Settings]:
        """Refuse a study of whose choices some go together badly.

        Raises:
            SpecError: the first such mix with the reason; a `when` in the space can exclude it.
        """
        settings = []
        for params in self.mixes():
            try:
                settings.append(self.settings(params, code))
            except InputError as error:
                raise SpecError(mix_refused(params, error)) from error
        return settings

    def digest(self) -> str:
        """What the study is, apart from how far it is run: trials and enqueued proposals are left out.

        The order of the space's parameters is part of it, as it decides what proposal n is.
        """
        plain = self.model_dump(exclude=set(OPEN), exclude_defaults=True)
        return digest(plain | ({"space": json.dumps(self.space)} if self.space else {}))

    def goes_on_from(self, before: StudySpec) -> bool:
        """Whether this is the study `before` with more rounds: a higher number, or a range or choice that has more.

        With a higher number every trial goes on from its last round, so that the rounds before must not depend on it:
        not under a final sparsity, nor where pruning is not done after training.
        """
        old, new = (spec.search_space() for spec in (before, self))
        if "rounds" not in {*old.names} & {*new.names}:
            return False
        as_before = self.model_copy(update={"space": self.space | {"rounds": before.space["rounds"]}})
        if as_before.digest() != before.digest():
            return False
        match old.parameter("rounds"), new.parameter("rounds"):
            case Fixed() as one, Fixed() as other:
                fixed = {"phase": "after", "searches": 1}
                on_the_way = all({*(new.possible(name) or ())} <= {value} for name, value in fixed.items())
                return one.when == other.when and other.value > one.value and on_the_way and not {*FINAL} & {*new.names}
            case Choice() as one, Choice() as other:
                return one.when == other.when and {*one.values} < {*other.values}
            case Range() as one, Range() as other:
                return replace(one, high=other.high) == other and other.high > one.high
        return False

    def to_toml(self) -> str:
        """The study as TOML, for studies that were made in Python."""
        return _toml(self.model_dump(exclude_defaults=True, exclude_none=True, mode="json"))


def read_text(path: str | Path) -> str:
    """The text of a study file; SpecError where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SpecError(f"cannot read the study file {str(path)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: not a text file in UTF-8") from error


def mix_refused(params: Mapping[str, Any], error: Exception) -> str:
    """The line that refuses a mix of choices."""
    mix = ", ".join(f"{name} = {value!r}" for name, value in params.items())
    return f"space: {error}\n(for {mix or 'an empty space'}; a `when` can keep choices apart)"


def _values(parameter: Parameter) -> tuple[Any, ...]:
    """The values of a parameter; of a range its ends."""
    if isinstance(parameter, Range):
        last = parameter.high if parameter.count is None else parameter.at(parameter.count - 1)
        first = parameter.low if parameter.integer else float(parameter.low)
        return tuple(dict.fromkeys((first, last)))
    return parameter.values if isinstance(parameter, Choice) else (parameter.value,)


def _check_parameter(parameter: Parameter) -> None:
    """Refuse a parameter that means nothing, or that has an illegal value."""
    first, dot, _ = parameter.name.partition(".")
    if not dot and first not in IN_SPACE:
        raise ValueError(str(UnknownName("parameter in [space]", first, IN_SPACE)))
    if dot and first not in ("criteria", "layers"):
        legal = "[space.criteria.NAME], [space.layers.PATTERN]"
        raise ValueError(f"space.{parameter.name}: unknown table [space.{first}]; legal: {legal}")
    for value in _values(parameter):
        try:
            check_value(parameter.name, value)
        except InputError as error:
            named = str(error).startswith(parameter.name)
            raise ValueError(f"space.{error}" if named else f"space.{parameter.name}: {error}") from error


def _plain(value: Any, place: str = "", level: int = 0) -> Any:
    """A copy of plain data that TOML can hold and that a digest can be made of; ValueError for anything else."""
    if level > MOST_LEVELS:
        raise ValueError(f"tables and lists lie too deep within each other; legal: {MOST_LEVELS} levels")
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise ValueError(f"{place or 'the table'} has a key that is no string: {name!r}")
        return {name: _plain(item, f"{place}.{name}" if place else name, level + 1) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, place, level + 1) for item in value]
    if isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    raise ValueError(
        f"{place or 'it'} = {value!r} must be text, a finite number, true or false, or lists and tables of these"
    )


def _legal(line: str) -> str:
    """A complaint about an unknown key also says which keys there are."""
    where, _, message = line.partition(": ")
    if not message.startswith("extra inputs are not permitted"):
        return line
    table, _, key = where.rpartition(".")
    table = re.sub(r"\.\d+$", "", table)
    sections: dict[str, type[Section]] = {
        "": StudySpec,
        "train": TrainSettings,
        "prune": PruneSettings,
        "tickets": TicketSettings,
        "stopping": StoppingSettings,
        "tickets.tasks": OtherTask,
    }
    known = sections[table].model_fields if table in sections else {}
    place = f"in [{table}]" if table else "at the top level"
    return str(UnknownName(f"key {place}:", key, known))


def _toml(table: Mapping[str, Any]) -> str:
    """Tables within tables stand inline, so that the parameters of a space keep their order."""
    lines, tables = [], []
    for name, value in table.items():
        if isinstance(value, Mapping):
            tables.append(f"\n[{name}]\n{_toml_lines(value)}")
        elif name == "enqueue":
            tables += [f"\n[[{name}]]\n{_toml_lines(item)}" for item in value]
        else:
            lines.append(_toml_lines({name: value}))
    return "".join([*lines, *tables])


def _toml_lines(table: Mapping[str, Any]) -> str:
    return "".join(f"{_toml_key(name)} = {_toml_value(value)}\n" for name, value in table.items())


def _toml_key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml_value(name)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml_key(name)} = {_toml_value(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return repr(value)
