"""Merges plans by key: what is wanted, what is ready to be run, and what that costs.

Pure bookkeeping: no torch, no ray, no files, no time. For each key, *known* (its outcome is recorded) and *present*
(its state exists) are separate facts, which the caller brings when a plan is added and when a stage was run.

A *run* of training starts at one state and is cut at several positions; each cut is a Train node of its own, which goes
on from the last cut before it that is there, or that will be. A stage that is evaluated or stored is run once; one that
is neither is run by each segment that needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import count

from orchestrator.ops import Op, Train
from orchestrator.plan import Node, Plan, merged


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is already there of a key: its outcome, its state, and the optimizer state with it."""

    known: bool = False
    present: bool = False
    resumable: bool = False


@dataclass(frozen=True, kw_only=True)
class Step:
    """One stage of a segment: run `op` on the states `inputs`; a Train op goes on from where its run was last cut.

    Where the state is there and only its outcome is wanted, the input is that very state.
    """

    key: str
    op: Op
    inputs: tuple[str, ...]
    task: str = ""
    """The name of the task that it runs in; empty: the study's own."""
    goes_on: bool = False
    """The input is a cut of the same run of training, not its start."""
    steps: int = 0
    """Optimizer steps that this takes."""
    evaluated: bool = False
    stored: bool = False
    resumable: bool = False
    begun: bool = False
    """Somebody else has begun this training and has left checkpoints in the store."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A run of stages for one worker, from states that are present; each evaluated or stored one is reported."""

    number: int
    steps: tuple[Step, ...]
    gpus: float = 0.0
    """The least share of a GPU that it is to be run on; 0: whatever its worker has."""

    @property
    def base(self) -> frozenset[str]:
        """The present states that it starts from."""
        made: set[str] = set()
        base: set[str] = set()
        for step in self.steps:
            base.update(key for key in step.inputs if key not in made)
            made.add(step.key)
        return frozenset(base)

    @property
    def cost(self) -> int:
        """Optimizer steps in all."""
        return sum(step.steps for step in self.steps)

    def after(self, key: str) -> Segment:
        """What is left to run once the stored state `key` was reported: the later stages and what these still need."""
        at = next(index for index, step in enumerate(self.steps) if step.key == key)
        left = list(self.steps[at + 1 :])
        wanted = {source for step in left for source in step.inputs}
        for step in reversed(self.steps[:at]):
            if step.key in wanted and not step.stored:
                left.insert(0, step)
                wanted.update(step.inputs)
        return replace(self, steps=tuple(left))


_Run = tuple[str, str]
"""What names a run of training: the state where it starts, and task and op without the position to reach."""


@dataclass
class _Entry:
    """A stage that some plan wants."""

    node: Node
    run: _Run | None
    facts: Facts = Facts()
    asked: bool = False
    children: set[str] = field(default_factory=set)
    holders: int = 0
    height: int = 0
    """Optimizer steps on the longest way from here to the end, and a little for each stage; this one included."""
    failed: bool = False


@dataclass(frozen=True)
class _Running:
    """A stage in a worker's hands. What plans want of it since then it may not bring."""

    segment: int
    beside: frozenset[str]
    """All stages of its segment."""
    resumable: bool


class Graph:
    """The stages of all plans that are under way."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._runs: dict[_Run, dict[str, None]] = {}
        self._running: dict[str, _Running] = {}  # beyond release too: a plan added meanwhile waits for the report
        self._unknown: dict[str, None] = {}  # the points whose outcomes are to be found out
        self._failed: set[str] = set()
        self._numbers = count(1)
        self._needed: dict[str, None] | None = None  # None when something changed since it was worked out

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, plan: Plan, facts: Callable[[str], Facts]) -> set[str]:
        """Merge a plan; `facts` is asked once for each key of which an outcome or a state is wanted.

        Returns the keys that cannot be had, since stages before them have failed already. Keys of earlier plans are
        among them where this plan wants more of a state than is there.
        """
        failed: set[str] = set()
        for node in plan.nodes:
            entry = self._entries.get(node.key)
            if entry is None:
                entry = self._enter(node)
            else:
                entry.node = merged(entry.node, node)
            if not entry.asked and (node.evaluated or node.stored):
                entry.facts, entry.asked = facts(node.key), True
            entry.holders += 1
            self._review(node.key)
            if any(self._entries[key].failed for key in node.parents) and not self._has_its_own(node.key):
                failed |= self.fail(node.key)
        for node in reversed(plan.nodes):
            self._raise_height(node.key)
        return failed

    def release(self, plan: Plan) -> None:
        """Forget what only this plan wanted."""
        for node in reversed(plan.nodes):
            entry = self._entries[node.key]
            entry.holders -= 1
            if not entry.holders:
                del self._entries[node.key]
                for parent in node.parents:
                    self._entries[parent].children.discard(node.key)
                if entry.run is not None:
                    del self._runs[entry.run][node.key]
                    if not self._runs[entry.run]:
                        del self._runs[entry.run]
            self._review(node.key)

    def ready(self) -> Iterator[Segment]:
        """Segments that can be run now, the one on the longest way to go first; each is given out once."""
        if self._needed is None:
            needed = self._find_needed()
            self._needed = dict.fromkeys(sorted(needed, key=lambda key: (-self._entries[key].height, key)))
        wanted = self._needed
        for target in wanted:
            steps = None if target in self._running else self._way(target)
            if steps is not None:
                yield self._give_out(self._goes_on_from(target, steps, wanted))

    @property
    def queued(self) -> int:
        """Stages that are wanted and in nobody's hands."""
        needed = self._find_needed() if self._needed is None else self._needed
        return sum(1 for key in needed if key not in self._running)

    def done(self, key: str, facts: Facts) -> None:
        """A stage was run and reported; `facts` is what the report brought of its key. What was there stays there."""
        self._running.pop(key, None)
        if key in self._entries:
            before = self._entries[key].facts
            self._entries[key].facts = Facts(
                known=before.known or facts.known,
                present=before.present or facts.present,
                resumable=before.resumable or facts.resumable,
            )
        self._review(key)

    def lost(self, key: str) -> None:
        """A state that was there has been removed: it is made again if something needs it."""
        if key in self._entries:
            entry = self._entries[key]
            entry.facts = replace(entry.facts, present=False, resumable=False)
        self._review(key)

    def give_back(self, segment: Segment) -> None:
        """The segment's unreported stages were not run after all; they are ready again."""
        for step in segment.steps:
            if step.key in self._running and self._running[step.key].segment == segment.number:
                del self._running[step.key]
        self._needed = None

    def fail(self, key: str) -> set[str]:
        """A stage cannot be done: it fails with everything that waits for it. Returns the failed keys.

        A stage that another worker is running from states that are there does not wait, and answers for itself.
        """
        failed: set[str] = set()
        stack = [key]
        while stack:
            key = stack.pop()
            if key in failed:
                continue
            failed.add(key)
            self._failed.add(key)
            self._running.pop(key, None)
            entry = self._entries.get(key)
            if entry is not None:
                entry.failed = True
                stack += [later for later in self._doomed_by(entry) if not self._has_its_own(later, key)]
            self._review(key)
        return failed

    def known(self, key: str) -> bool:
        """Whether the outcome of this key is recorded."""
        return key in self._entries and self._entries[key].facts.known

    def failed(self, key: str) -> bool:
        """Whether the outcome of this key is not recorded, and will not be before the next run of the study."""
        return key in self._entries and self._entries[key].failed and not self._entries[key].facts.known

    def _enter(self, node: Node) -> _Entry:
        run = (node.parents[0], repr((node.task, replace(node.op, to=0)))) if isinstance(node.op, Train) else None
        entry = self._entries[node.key] = _Entry(node=node, run=run, failed=node.key in self._failed)
        for parent in node.parents:
            self._entries[parent].children.add(node.key)
        if run is not None:
            self._runs.setdefault(run, {})[node.key] = None
        return entry

    def _review(self, key: str) -> None:
        """Bring up to date what follows from what is wanted and known of a key."""
        entry = self._entries.get(key)
        if entry is not None and entry.node.evaluated and not entry.facts.known and not entry.failed:
            self._unknown[key] = None
        else:
            self._unknown.pop(key, None)
        self._needed = None

    def _there(self, key: str) -> bool:
        """Whether the state exists with all that is wanted of it."""
        entry = self._entries[key]
        return entry.facts.present and (entry.facts.resumable or not entry.node.resumable)

    def _resumable(self, key: str) -> bool:
        """Whether the optimizer state is to be stored, where the state is."""
        return self._entries[key].node.resumable or self._is_gone_on_from(key)

    def _stored(self, key: str) -> bool:
        """Whether the state is to be stored: a plan says so, or training would otherwise be done twice."""
        entry = self._entries[key]
        if entry.node.stored or entry.run is None:
            return entry.node.stored
        return len(entry.children) > 1 or self._is_gone_on_from(key)

    def _is_gone_on_from(self, key: str) -> bool:
        """Whether a later cut of the same run is to go on from this one, once this is made."""
        entry = self._entries[key]
        if entry.facts.present:
            return False
        later = [cut for cut in self._later_cuts(entry) if self._is_coming(cut)]
        return any(self._last_cut_before(self._entries[cut]) == key for cut in later)

    def _is_coming(self, key: str) -> bool:
        return not self._there(key) and not self._entries[key].failed and key not in self._running

    def _last_cut_before(self, entry: _Entry) -> str | None:
        """The cut of the entry's run that it can go on from: one that is there, or that will be."""
        best: tuple[int, str] | None = None
        for key in self._runs[entry.run] if entry.run is not None else ():
            cut = self._entries[key]
            to = _to(cut.node)
            if to < _to(entry.node) and (best is None or to > best[0]) and self._can_go_on_from(key):
                best = to, key
        return best[1] if best else None

    def _can_go_on_from(self, key: str) -> bool:
        entry = self._entries[key]
        if entry.facts.present and entry.facts.resumable:
            return True
        if key in self._running:
            return self._running[key].resumable
        return not entry.failed and (entry.node.resumable or not entry.facts.present)

    def _later_cuts(self, entry: _Entry) -> list[str]:
        if entry.run is None or len(self._runs[entry.run]) == 1:
            return []
        return [key for key in self._runs[entry.run] if _to(self._entries[key].node) > _to(entry.node)]

    def _inputs(self, key: str) -> tuple[str, ...]:
        """What the stage is run from: its parents, or the last cut of its run of training, or itself to be measured."""
        if self._there(key):
            return (key,)
        entry = self._entries[key]
        cut = self._last_cut_before(entry)
        return entry.node.parents if cut is None else (cut,)

    def _waiting_for(self, key: str) -> list[str]:
        """The stages that are run from `key`, later cuts of its run included."""
        entry = self._entries[key]
        later = [cut for cut in self._later_cuts(entry) if self._last_cut_before(self._entries[cut]) == key]
        return [*entry.children, *later]

    def _doomed_by(self, failed: _Entry) -> list[str]:
        """The stages that would need the failed one, or that would only repeat what failed: later cuts of its run."""
        doomed = [*failed.children]
        for key in self._later_cuts(failed):
            cut = self._last_cut_before(self._entries[key])
            if cut is None or _to(self._entries[cut].node) < _to(failed.node):
                doomed.append(key)
        return doomed

    def _has_its_own(self, key: str, failed: str = "") -> bool:
        """Whether a stage does not wait for the failed one: its state is there, or another segment is at it."""
        return self._there(key) or (key in self._running and failed not in self._running[key].beside)

    def _find_needed(self) -> set[str]:
        """Stages that must be run and reported: unknown points, and stored states on the way to them."""
        stack = [key for key in self._unknown if key not in self._running]
        needed = set(stack)
        seen = set(stack)
        while stack:
            key = stack.pop()
            for source in self._inputs(key):
                if source in seen or source in self._running or self._there(source):
                    continue
                seen.add(source)
                stack.append(source)
                if self._stored(source):
                    needed.add(source)
        return needed

    def _way(self, target: str, made: frozenset[str] = frozenset()) -> list[Step] | None:
        """The stages to `target` from present states and from those `made` just before it on the same worker.

        None while a stored state on the way is still to come.
        """
        way: dict[str, Step] = {}
        stack = [target]
        while stack:
            inputs = self._inputs(stack[-1])
            missing = [k for k in inputs if k not in way and k not in made and not self._there(k)]
            if any(k in self._running or self._entries[k].failed or self._stored(k) for k in missing):
                return None
            if missing:
                stack += missing
            else:
                key = stack.pop()
                if key not in way:
                    way[key] = self._step(key, inputs)
        return list(way.values())

    def _goes_on_from(self, key: str, steps: list[Step], wanted: Mapping[str, None]) -> list[Step]:
        """`steps` and the stages after them for as long as there is no branch, for one worker to run in one go."""
        while True:
            made = frozenset(step.key for step in steps)
            following: list[list[Step]] = []
            for target in self._targets_after(key, wanted):
                way = self._way(target, made)
                if way is not None:
                    following.append(way)
                    if len(following) > 1:
                        return steps
            if not following:
                return steps
            steps = [*steps, *following[0]]
            key = steps[-1].key

    def _targets_after(self, key: str, wanted: Mapping[str, None]) -> Iterator[str]:
        """The next stages to be reported that wait for `key` and are in nobody's hands yet."""
        seen = {key}
        stack = self._waiting_for(key)
        while stack:
            child = stack.pop()
            if child in seen:
                continue
            seen.add(child)
            if child in wanted:
                if child not in self._running:
                    yield child
            elif not self._entries[child].node.evaluated and not self._stored(child):
                stack += self._waiting_for(child)

    def _step(self, key: str, inputs: tuple[str, ...]) -> Step:
        entry = self._entries[key]
        node = entry.node
        steps = 0
        goes_on = entry.run is not None and inputs != node.parents
        if entry.run is not None:
            steps = _to(node) - (_to(self._entries[inputs[0]].node) if goes_on else node.start)
        return Step(
            key=key,
            op=node.op,
            inputs=inputs,
            task=node.task,
            goes_on=goes_on,
            steps=steps,
            evaluated=node.evaluated and not entry.facts.known,
            stored=self._stored(key),
            resumable=self._resumable(key),
        )

    def _give_out(self, steps: list[Step]) -> Segment:
        number, keys = next(self._numbers), frozenset(step.key for step in steps)
        for step in steps:
            if step.stored or step.evaluated:
                self._running[step.key] = _Running(number, keys, step.resumable)
        return Segment(number=number, steps=tuple(steps))

    def _raise_height(self, key: str) -> None:
        entry = self._entries[key]
        own = self._step(key, self._inputs(key)).steps + 1
        above = (self._entries[child].height for child in self._waiting_for(key))
        entry.height = max(entry.height, own + max(above, default=0))


def _to(node: Node) -> int:
    assert isinstance(node.op, Train)
    return node.op.to
