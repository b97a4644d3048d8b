"""Which parameters to try next: ask, tell, rebuild. The only importer of optuna, and only for the samplers that learn.

Proposal n is drawn by a fresh sampler seeded with a hash of (seed, n), so that a restart at any point goes on as if
there had been none: random, grid and enqueued proposals always, the others given the same results told.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from search.pareto import DIRECTIONS, Direction, best_first
from search.space import Choice, Range, Space, flatten

if TYPE_CHECKING:
    import optuna

State = Literal["done", "failed", "stopped", "running"]
Added = tuple[Mapping[str, Any], Sequence[float], Mapping[str, float]]

STATES: tuple[State, ...] = ("done", "failed", "stopped", "running")

SAMPLERS: Mapping[str, str] = {
    "tpe": "tree-structured Parzen estimators, the default: learns quickly, conditional parameters included",
    "nsga2": "a genetic algorithm for two or three objectives, in generations of 50 trials",
    "nsga3": "a genetic algorithm for four objectives and more, in generations of 50 trials",
    "gp": "Gaussian processes: the fewest trials but seconds a proposal, so for studies under about 200 trials",
    "random": "independent draws that look at no result",
    "grid": "every combination once, in order",
}
LEARNS: frozenset[str] = frozenset({"tpe", "nsga2", "nsga3", "gp"})

MOST_SEEN = 2000
"""How many finished trials a learning sampler sees at most; one more, and its memory is thinned out to four fifths."""

# Where a proposal's notes keep what the sampler wrote about the study as a whole.
_STUDY = "study"
_GENERATIONS_KEPT = 3


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """What to try next. `attrs` are the sampler's notes, plain JSON, to be stored and handed back in `Told.attrs`."""

    number: int
    params: dict[str, Any]
    attrs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Told:
    """One trial as a rebuilt proposer needs it. A constraint is violated above 0; `values` are needed when done."""

    number: int
    params: Mapping[str, Any]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    values: tuple[float, ...] | None = None
    constraints: Mapping[str, float] = field(default_factory=dict)
    state: State


class Proposer(Protocol):
    """Asks are numbered from 0 without gaps; tells may come in any order."""

    def ask(self) -> Proposal | None:
        """The next proposal; None when nothing is left to try."""
        ...

    def tell(
        self,
        number: int,
        values: Sequence[float] | None,
        *,
        constraints: Mapping[str, float] = {},
        state: State = "done",
    ) -> None:
        """How proposal `number` ended. A second word on it counts only where a stopped trial went on and is done.

        A result that is not finite counts as failed: nothing can be learnt from it.

        Raises:
            ValueError: the number was never asked, the state is unknown, or a done trial lacks a value.
        """
        ...

    def add(self, params: Mapping[str, Any], values: Sequence[float], constraints: Mapping[str, float] = {}) -> None:
        """A finished trial that nobody asked for: it teaches, but has no number; the same parameters count once."""
        ...


def preload(sampler: str) -> None:
    """Import what the sampler will need; `make` does so too, but somebody may be waiting for it then."""
    if sampler in LEARNS:
        import optuna.samplers  # noqa: F401


def make(
    sampler: str,
    space: Space,
    directions: Sequence[Direction],
    *,
    seed: int,
    enqueued: Sequence[Mapping[str, Any]] = (),
    history: Sequence[Told] = (),
    added: Sequence[Added] = (),
) -> Proposer:
    """The proposer of the name, as it stood after `history` and `added`.

    The enqueued points come first, in order, but for those that the history's notes say were run, each as often as it
    was; their missing parameters are drawn, and a parameter that was left out takes the first value under which the
    given ones apply.

    Raises:
        ValueError: the sampler or a direction is unknown.
        SpaceError: an enqueued point is not in the space, or a grid is asked of a continuous one.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}. Known: {', '.join(SAMPLERS)}")
    for direction in directions:
        if direction not in DIRECTIONS:
            raise ValueError(f"unknown direction {direction!r}. Known: {', '.join(DIRECTIONS)}")
    if not directions:
        raise ValueError("a search needs at least one objective")
    line = _Line(space, enqueued, history)
    if sampler == "random":
        return _Random(space, seed, line)
    if sampler == "grid":
        return _Grid(space, seed, line, history)
    return _Learner(sampler, space, directions, seed, line, history, added)


class _Line:
    """The numbers of the proposals and the enqueued points that come before all others."""

    def __init__(self, space: Space, enqueued: Sequence[Mapping[str, Any]], history: Sequence[Told]) -> None:
        self.number = max((told.number for told in history), default=-1) + 1
        notes = [told.attrs["enqueued"] for told in history if "enqueued" in told.attrs]
        spent = Counter(_key(note) for note in notes if isinstance(note, Mapping))
        # Studies begun with an earlier version noted the index of the point.
        indices = {note for note in notes if isinstance(note, int)}
        self._waiting: deque[tuple[dict[str, Any], dict[str, Any]]] = deque()
        for index, table in enumerate(enqueued):
            place = f"enqueue[{index}]"
            point = space.validate(flatten(table), place)
            given = space.validate(space.imply(point), place)
            if index in indices:
                continue
            key = _key(point)
            if spent[key]:
                spent[key] -= 1
            else:
                self._waiting.append((point, given))

    @property
    def enqueued(self) -> bool:
        """Whether the next proposal is an enqueued point."""
        return bool(self._waiting)

    def step(self) -> tuple[int, dict[str, Any], dict[str, Any]]:
        """The next number, its first notes and the values that are given for it."""
        number = self.number
        self.number += 1
        if not self._waiting:
            return number, {}, {}
        point, given = self._waiting.popleft()
        return number, {"enqueued": point}, given

    def check(self, number: int, state: State) -> None:
        """ValueError for a number that was not asked or a state that no trial ends in."""
        if not 0 <= number < self.number:
            raise ValueError(f"trial {number} was never asked; the next one is {self.number}")
        if state not in STATES or state == "running":
            raise ValueError(f"a trial cannot end as {state!r}, only as done, failed or stopped")


class _Random:
    """Independent draws; remembers nothing but the next number."""

    def __init__(self, space: Space, seed: int, line: _Line) -> None:
        self._space, self._seed, self._line = space, seed, line

    def ask(self) -> Proposal | None:
        number, notes, given = self._line.step()
        params = self._space.resolve(partial(_given_or_drawn, given=given, seed=self._seed, number=number))
        return Proposal(number=number, params=params, attrs=notes)

    def tell(
        self,
        number: int,
        values: Sequence[float] | None,
        *,
        constraints: Mapping[str, float] = {},
        state: State = "done",
    ) -> None:
        self._line.check(number, state)

    def add(self, params: Mapping[str, Any], values: Sequence[float], constraints: Mapping[str, float] = {}) -> None:
        pass


class _Grid(_Random):
    """Every point of the grid in order, after the enqueued ones; what those leave out is drawn at random."""

    def __init__(self, space: Space, seed: int, line: _Line, history: Sequence[Told]) -> None:
        super().__init__(space, seed, line)
        self._next = max((int(told.attrs.get("point", -1)) for told in history), default=-1) + 1
        self._points: Iterator[dict[str, Any]] = islice(space.grid(), self._next, None)

    def ask(self) -> Proposal | None:
        if self._line.enqueued:
            return super().ask()
        params = next(self._points, None)
        if params is None:
            return None
        number, notes, _ = self._line.step()
        self._next += 1
        return Proposal(number=number, params=params, attrs={**notes, "point": self._next - 1})


class _Learner:
    """An Optuna study in memory, always in one canonical order, so that a rebuilt one proposes the same.

    The added trials come first, sorted by their parameters, then all others by number. What cannot be appended in that
    order marks the study stale, and the next ask builds it anew from the records. Study numbers are positions in that
    order and never leave this class.
    """

    def __init__(
        self,
        sampler: str,
        space: Space,
        directions: Sequence[Direction],
        seed: int,
        line: _Line,
        history: Sequence[Told],
        added: Sequence[Added],
    ) -> None:
        self._sampler, self._space, self._directions = sampler, space, tuple(directions)
        self._seed, self._line = seed, line
        self._records: dict[int, Told] = {}
        self._added: dict[str, Told] = {}
        self._bounds: set[str] = set()
        self._parents: dict[str, list[int]] = {}
        self._stale = True
        for told in sorted(history, key=lambda told: told.number):
            self._records[told.number] = self._judged(told)
            self._note_parents(told.attrs.get(_STUDY, {}))
        self._finished = sum(told.state != "running" for told in self._records.values())
        for params, values, constraints in added:
            self.add(params, values, constraints)
        self._forget()

    def ask(self) -> Proposal | None:
        if self._stale:
            self._build()
        number, notes, given = self._line.step()
        study = self._study
        study.sampler = _sampler(self._sampler, _hash32(self._seed, number))
        if given:
            study.enqueue_trial(self._coordinates(given))
        before = self._storage.get_study_system_attrs(self._study_id)
        trial = study.ask()
        if self._sampler.startswith("nsga"):
            # Optuna counts a trial into a generation only when it draws for it, and an enqueued one would stay outside.
            _ = trial.relative_params
        params = self._space.resolve(lambda parameter: _suggested(trial, parameter))
        system = self._storage.get_trial_system_attrs(trial.number)
        notes |= {key: value for key, value in system.items() if key != "fixed_params"}
        after = self._storage.get_study_system_attrs(self._study_id)
        parents = {key: [self._order[place] for place in after[key]] for key in after.keys() - before.keys()}
        if parents:
            notes[_STUDY] = parents
            self._note_parents(parents)
        self._place[number] = trial.number
        self._order.append(number)
        self._records[number] = Told(number=number, params=params, attrs=notes, state="running")
        return Proposal(number=number, params=dict(params), attrs=dict(notes))

    def tell(
        self,
        number: int,
        values: Sequence[float] | None,
        *,
        constraints: Mapping[str, float] = {},
        state: State = "done",
    ) -> None:
        self._line.check(number, state)
        record = self._records.get(number)
        resumed = record is not None and record.state == "stopped" and state == "done"
        if record is None or not (record.state == "running" or resumed):
            return
        told = self._judged(
            Told(
                number=number,
                params=record.params,
                attrs=record.attrs,
                values=None if values is None else tuple(float(value) for value in values),
                constraints=dict(constraints),
                state=state,
            )
        )
        self._records[number] = told
        self._finished += not resumed
        self._forget()
        if resumed:
            self._stale = True
        elif not self._stale:
            self._finish(told)

    def add(self, params: Mapping[str, Any], values: Sequence[float], constraints: Mapping[str, float] = {}) -> None:
        legal = self._space.validate(params, "an added trial")
        told = self._judged(
            Told(
                number=-1,
                params=legal,
                values=tuple(float(value) for value in values),
                constraints=dict(constraints),
                state="done",
            )
        )
        key = _key(legal)
        if told.state == "done" and key not in self._added:
            self._added[key] = told
            self._finished += 1
            self._stale = True
            self._forget()

    def _judged(self, told: Told) -> Told:
        """`told` as the sampler may see it: values only when done, and failed when a number in it is not finite."""
        values: tuple[float, ...] | None = None
        state, constraints = told.state, dict(told.constraints)
        if state == "done":
            if told.values is None or len(told.values) != len(self._directions):
                place = "an added trial" if told.number < 0 else f"trial {told.number}"
                raise ValueError(f"{place} is done with values {told.values}, not one for each of {self._directions}")
            values = tuple(told.values)
        if not all(math.isfinite(number) for number in (*(values or ()), *constraints.values())):
            state, values, constraints = "failed", None, {}
        if state == "failed":
            constraints = {}
        if state in ("done", "stopped") and not constraints.keys() <= self._bounds:
            self._bounds |= constraints.keys()
            self._stale = True
        return Told(
            number=told.number,
            params=told.params,
            attrs=told.attrs,
            values=values,
            constraints=constraints,
            state=state,
        )

    def _finish(self, told: Told) -> None:
        from optuna.trial import Trial, TrialState

        place = self._place[told.number]
        trial = Trial(self._study, place)
        for name, value in self._padded(told).items():
            trial.set_constraint(name, value)
        state = {"done": TrialState.COMPLETE, "stopped": TrialState.PRUNED, "failed": TrialState.FAIL}[told.state]
        self._study.tell(place, told.values, state)

    def _padded(self, told: Told) -> dict[str, float]:
        """The constraints of a judged trial, all names that any trial has: Gaussian processes refuse unequal lists."""
        if told.state not in ("done", "stopped"):
            return {}
        return {name: float(told.constraints.get(name, 0.0)) for name in sorted(self._bounds)}

    def _build(self) -> None:
        import optuna
        from optuna.trial import TrialState, create_trial

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        states = {
            "done": TrialState.COMPLETE,
            # Without intermediate values: with them a multi-objective TPE raises at its next ask.
            "stopped": TrialState.PRUNED,
            "failed": TrialState.FAIL,
            "running": TrialState.RUNNING,
        }
        self._storage = optuna.storages.InMemoryStorage()
        self._study: optuna.Study = optuna.create_study(
            storage=self._storage,
            sampler=_sampler(self._sampler, 0),
            directions=["maximize" if direction == "maximise" else "minimize" for direction in self._directions],
        )
        self._study_id = self._storage.get_study_id_from_name(self._study.study_name)
        told_in_order = [self._added[key] for key in sorted(self._added)]
        told_in_order += [self._records[number] for number in sorted(self._records)]
        self._order = [told.number for told in told_in_order]
        self._place = {number: place for place, number in enumerate(self._order) if number >= 0}
        for told in told_in_order:
            coordinates = self._coordinates(told.params)
            notes = {key: value for key, value in told.attrs.items() if ":" in key}
            self._study.add_trial(
                create_trial(
                    state=states[told.state],
                    values=told.values,
                    params=coordinates,
                    distributions={name: self._distributions[name] for name in coordinates},
                    system_attrs=notes,
                    constraints=self._padded(told),
                )
            )
        for key, numbers in self._parents.items():
            places = [self._place[number] for number in numbers if number in self._place]
            self._storage.set_study_system_attr(self._study_id, key, places)
        self._stale = False

    @cached_property
    def _distributions(self) -> dict[str, optuna.distributions.BaseDistribution]:
        drawn = [parameter for parameter in self._space.parameters if isinstance(parameter, Choice | Range)]
        return {parameter.name: _distribution(parameter) for parameter in drawn}

    def _coordinates(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters that Optuna draws, in its terms; fixed ones are none of its business."""
        drawn = {name: self._space.parameter(name) for name in params}
        return {
            name: _coordinate(parameter, params[name])
            for name, parameter in drawn.items()
            if isinstance(parameter, Choice | Range)
        }

    def _note_parents(self, parents: Mapping[str, Sequence[int]]) -> None:
        """Keep the members of the last generations' parents: late results would make Optuna choose others."""
        self._parents |= {key: list(numbers) for key, numbers in parents.items()}
        for key in sorted(self._parents, key=lambda key: int(key.rpartition(":")[2]))[:-_GENERATIONS_KEPT]:
            del self._parents[key]

    def _forget(self) -> None:
        """Thin out what the sampler sees: the latest stay, then the best by feasibility, rank and crowding.

        A fifth less than may be seen stays, so that it is rare, and the parents of the last generations besides.
        """
        if self._finished <= MOST_SEEN:
            return
        kept = MOST_SEEN - MOST_SEEN // 5
        finished = [number for number, told in self._records.items() if told.state != "running"]
        parents = {number for numbers in self._parents.values() for number in numbers}
        latest = set(sorted(finished)[-(kept // 2) :])
        rest: list[tuple[str | int, Told]] = [
            (number, self._records[number])
            for number in sorted(finished)
            if self._records[number].state == "done" and number not in latest
        ]
        rest += [(key, self._added[key]) for key in sorted(self._added)]
        best = {key for key, _ in _best_first(rest, self._directions)[: kept - len(latest)]}
        for number in finished:
            if number not in latest and number not in best and number not in parents:
                del self._records[number]
        self._added = {key: told for key, told in self._added.items() if key in best}
        self._finished = len(self._added) + sum(told.state != "running" for told in self._records.values())
        self._stale = True


class Ahead:
    """A proposer that works in a thread of its own and keeps up to `depth` proposals ready, in their usual order.

    `tell` and `add` return at once and are heeded before the next proposal is prepared. Safe to use from any thread.
    """

    def __init__(self, proposer: Proposer, depth: int) -> None:
        if depth < 1:
            raise ValueError(f"depth must be at least 1, not {depth}")
        self._proposer, self._depth = proposer, depth
        self._ready: deque[Proposal] = deque()
        self._heard: deque[Callable[[], None]] = deque()
        self._change = threading.Condition()
        self._spent = self._closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="proposer", daemon=True)
        self._thread.start()

    def take(self, most: int, *, wait: bool = False) -> list[Proposal]:
        """At most `most` proposals that are ready; with `wait`, blocks until there is one or no more can come.

        Raises:
            Exception: whatever the proposer raised, in `tell` and `add` too; it proposes nothing from then on.
        """
        with self._change:
            if wait and most > 0:
                self._change.wait_for(lambda: self._ready or self._spent or self._closed or self._error is not None)
            if self._error is not None:
                raise self._error
            taken = [self._ready.popleft() for _ in range(min(most, len(self._ready)))]
            self._change.notify_all()
            return taken

    def tell(
        self,
        number: int,
        values: Sequence[float] | None,
        *,
        constraints: Mapping[str, float] = {},
        state: State = "done",
    ) -> None:
        """Passes the end of a trial on; see `Proposer.tell`."""
        self._hear(partial(self._proposer.tell, number, values, constraints=dict(constraints), state=state))

    def add(self, params: Mapping[str, Any], values: Sequence[float], constraints: Mapping[str, float] = {}) -> None:
        """Passes a trial that nobody asked for on; see `Proposer.add`."""
        self._hear(partial(self._proposer.add, dict(params), values, dict(constraints)))

    @property
    def exhausted(self) -> bool:
        """Whether every proposal that there is has been taken."""
        with self._change:
            return self._spent and not self._ready

    def close(self) -> None:
        """Ends the thread once the proposal in hand is done; proposals that nobody took are dropped."""
        with self._change:
            self._closed = True
            self._ready.clear()
            self._change.notify_all()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _hear(self, message: Callable[[], None]) -> None:
        with self._change:
            self._heard.append(message)
            self._change.notify_all()

    def _work(self) -> None:
        try:
            while self._step():
                pass
        except BaseException as error:
            with self._change:
                self._error = error
                self._change.notify_all()

    def _step(self) -> bool:
        """Heeds what was heard and prepares one proposal; False when closed."""
        with self._change:
            self._change.wait_for(
                lambda: self._closed or self._heard or (len(self._ready) < self._depth and not self._spent)
            )
            if self._closed:
                return False
            heard, self._heard = self._heard, deque()
            room = len(self._ready) < self._depth and not self._spent
        for message in heard:
            message()
        if room:
            proposal = self._proposer.ask()
            with self._change:
                if proposal is None:
                    self._spent = True
                elif not self._closed:
                    self._ready.append(proposal)
                self._change.notify_all()
        return True


def _best_first(
    trials: Sequence[tuple[str | int, Told]], directions: Sequence[Direction]
) -> list[tuple[str | int, Told]]:
    """Done trials from the best on: the least violation, then the lowest rank, then the loneliest."""
    if not trials:
        return []
    values = [told.values or () for _, told in trials]
    order = best_first(values, [told.constraints for _, told in trials], directions)
    return [trials[index] for index in order]


def _key(params: Mapping[str, Any]) -> str:
    """Equal for parameters that are equal, in whatever order and whether or not they have been through a ledger."""
    return json.dumps(params, sort_keys=True, default=repr)


def _hash32(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{number}".encode()).digest()[:4], "big")


def _given_or_drawn(parameter: Choice | Range, given: Mapping[str, Any], seed: int, number: int) -> Any:
    """The given value, or one drawn from (seed, number, name): no draw depends on which others were made."""
    if parameter.name in given:
        return given[parameter.name]
    digest = hashlib.sha256(f"{seed}:{number}:{parameter.name}".encode()).digest()
    share = (int.from_bytes(digest[:8], "big") >> 11) / 2**53
    if isinstance(parameter, Choice):
        return parameter.values[int(share * len(parameter.values))]
    low, high = parameter.low, parameter.high
    if parameter.log and parameter.integer:
        # Half a unit more at either end, so that the ends are as likely as their neighbours.
        low, high = low - 0.5, high + 0.5
    elif parameter.count is not None:
        return parameter.at(int(share * parameter.count))
    value = math.exp(math.log(low) + share * math.log(high / low)) if parameter.log else low + share * (high - low)
    value = min(max(value, parameter.low), parameter.high)
    return round(value) if parameter.integer else value


def _sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    from optuna import samplers

    if name == "tpe":
        return samplers.TPESampler(seed=seed)
    if name == "nsga2":
        return samplers.NSGAIISampler(seed=seed)
    if name == "nsga3":
        # Called without the decorator that warns of an experiment: muting a warning is not safe between threads.
        nsga3 = samplers.NSGAIIISampler.__new__(samplers.NSGAIIISampler)
        inspect.unwrap(samplers.NSGAIIISampler.__init__)(nsga3, seed=seed)
        return nsga3
    return samplers.GPSampler(seed=seed, warn_independent_sampling=False)


# Optuna sees choices and stepped ranges by index: lists may be choices, True is not 1, and no step is rounded.


def _distribution(parameter: Choice | Range) -> optuna.distributions.BaseDistribution:
    from optuna import distributions

    if isinstance(parameter, Choice):
        return distributions.CategoricalDistribution(tuple(range(len(parameter.values))))
    if parameter.step is not None:
        assert parameter.count is not None, "a stepped range can be counted"
        return distributions.IntDistribution(0, parameter.count - 1)
    if parameter.integer:
        return distributions.IntDistribution(int(parameter.low), int(parameter.high), log=parameter.log)
    return distributions.FloatDistribution(float(parameter.low), float(parameter.high), log=parameter.log)


def _coordinate(parameter: Choice | Range, value: Any) -> float:
    if isinstance(parameter, Choice):
        return parameter.index(value)
    return value if parameter.step is None else parameter.nearest(value)


def _suggested(trial: optuna.Trial, parameter: Choice | Range) -> Any:
    if isinstance(parameter, Choice):
        return parameter.values[trial.suggest_categorical(parameter.name, tuple(range(len(parameter.values))))]
    if parameter.step is not None:
        assert parameter.count is not None, "a stepped range can be counted"
        return parameter.at(trial.suggest_int(parameter.name, 0, parameter.count - 1))
    if parameter.integer:
        return int(trial.suggest_int(parameter.name, int(parameter.low), int(parameter.high), log=parameter.log))
    return float(trial.suggest_float(parameter.name, parameter.low, parameter.high, log=parameter.log))


if TYPE_CHECKING:

    def _prove(space: Space, line: _Line) -> tuple[Proposer, Proposer, Proposer]:
        learner = _Learner("tpe", space, ("maximise",), 0, line, (), ())
        return _Random(space, 0, line), _Grid(space, 0, line, ()), learner
