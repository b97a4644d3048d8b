"""Merges plans by key: what is wanted, what is ready to be run, and what that costs.

Pure bookkeeping: no torch, no ray, no files, no time. For each key, *known* (its outcome is recorded) and *present* (its
state exists) are separate facts, which the caller brings when a plan is added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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
    """One stage of a segment: run `op` on the states `inputs`; a Train op goes on from where its run was last cut."""

    key: str
    op: Op
    inputs: tuple[str, ...]
    goes_on: bool = False
    """The input is a cut of the same run of training, not its start."""
    steps: int = 0
    """Optimizer steps that this takes."""
    evaluated: bool = False
    stored: bool = False
    resumable: bool = False


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A run of stages for one worker, from states that are present; each evaluated or stored one is reported."""

    number: int
    steps: tuple[Step, ...]

    @property
    def base(self) -> frozenset[str]:
        """The present states that it starts from."""
        made = {step.key for step in self.steps}
        return frozenset(key for step in self.steps for key in step.inputs if key not in made)

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


@dataclass
class _Entry:
    node: Node
    facts: Facts = Facts()
    asked: bool = False
    children: set[str] = field(default_factory=set)
    holders: int = 0
    height: int = 0
    running: bool = False
    failed: bool = False


class Graph:
    """The stages of all plans that are under way."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._runs: dict[tuple[str, str], list[str]] = {}
        self._numbers = count(1)
        self._failed: set[str] = set()

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, plan: Plan, facts: Callable[[str], Facts]) -> None:
        """Merge a plan; `facts` is asked once for each key of which an outcome or a state is wanted."""
        for node in plan.nodes:
            entry = self._entries.get(node.key)
            if entry is None:
                entry = self._entries[node.key] = _Entry(node=node)
                parents = [self._entries[key] for key in node.parents]
                entry.failed = node.key in self._failed or any(parent.failed for parent in parents)
                for parent in parents:
                    parent.children.add(node.key)
                if isinstance(node.op, Train):
                    self._cut(node)
            elif not entry.running:
                entry.node = merged(entry.node, node)
            if not entry.asked and (node.evaluated or node.stored):
                entry.facts, entry.asked = facts(node.key), True
            entry.holders += 1
        for node in reversed(plan.nodes):
            self._raise_height(node.key)

    def release(self, plan: Plan) -> None:
        """Forget what only this plan wanted."""
        for node in reversed(plan.nodes):
            entry = self._entries[node.key]
            entry.holders -= 1
            if not entry.holders:
                del self._entries[node.key]
                for parent in node.parents:
                    self._entries[parent].children.discard(node.key)
                if isinstance(node.op, Train):
                    cuts = self._runs[_run(node)]
                    cuts.remove(node.key)
                    if not cuts:
                        del self._runs[_run(node)]

    def ready(self) -> Iterator[Segment]:
        """Segments that can be run now, the one on the longest way to go first; each is given out once."""
        needed = self._needed()
        for target in sorted(needed, key=lambda key: (-self._entries[key].height, key)):
            steps = None if self._entries[target].running else self._way(target)
            if steps is not None:
                yield self._give_out(self._goes_on_from(target, steps, needed))

    def done(self, key: str, facts: Facts) -> None:
        """A stage was run and reported; `facts` is what there is of its key now."""
        entry = self._entries.get(key)
        if entry is not None:
            entry.running = False
            entry.facts = facts

    def give_back(self, segment: Segment) -> None:
        """The segment's unreported stages were not run after all; they are ready again."""
        for step in segment.steps:
            if step.key in self._entries:
                self._entries[step.key].running = False

    def fail(self, key: str) -> set[str]:
        """A stage cannot be done: it fails with everything that waits for it. Returns the failed keys."""
        failed: set[str] = set()
        stack = [key]
        while stack:
            key = stack.pop()
            entry = self._entries.get(key)
            if entry is None or key in failed:
                continue
            failed.add(key)
            self._failed.add(key)
            entry.failed = True
            entry.running = False
            stack += entry.children
            stack += [later for later in self._later_cuts(entry.node) if not self._entries[later].facts.present]
        return failed

    def known(self, key: str) -> bool:
        """Whether the outcome of this key is recorded."""
        return key in self._entries and self._entries[key].facts.known

    def failed(self, key: str) -> bool:
        """Whether this key has failed since the graph began."""
        return key in self._entries and self._entries[key].failed

    def _cut(self, node: Node) -> None:
        """Enter a Train node among the cuts of its run; what comes after it may now go on from it."""
        self._runs.setdefault(_run(node), []).append(node.key)
        earlier = self._last_cut_before(node)
        if earlier is not None:
            self._want_resumable(earlier)
        for later in self._later_cuts(node):
            entry = self._entries[later]
            if not entry.running and not entry.facts.present and self._last_cut_before(entry.node) == node.key:
                self._want_resumable(node.key)

    def _want_resumable(self, key: str) -> None:
        entry = self._entries[key]
        if not entry.running and not entry.facts.present:
            entry.node = replace(entry.node, stored=True, resumable=True)

    def _last_cut_before(self, node: Node) -> str | None:
        """The cut of the node's run that it can go on from: one that is there, or that will be."""
        best: tuple[int, str] | None = None
        for key in self._runs.get(_run(node), ()):
            entry = self._entries[key]
            to = _to(entry.node)
            there = entry.facts.present and entry.facts.resumable
            coming = not entry.facts.present and not entry.failed and (entry.node.resumable or not entry.running)
            if to < _to(node) and (there or coming) and (best is None or to > best[0]):
                best = to, key
        return best[1] if best else None

    def _later_cuts(self, node: Node) -> list[str]:
        if not isinstance(node.op, Train):
            return []
        return [key for key in self._runs.get(_run(node), ()) if _to(self._entries[key].node) > _to(node)]

    def _inputs(self, key: str) -> tuple[str, ...]:
        """What the stage is run from: its parents, or the last cut of its run of training."""
        node = self._entries[key].node
        if isinstance(node.op, Train):
            cut = self._last_cut_before(node)
            if cut is not None:
                return (cut,)
        return node.parents

    def _there(self, key: str) -> bool:
        facts, node = self._entries[key].facts, self._entries[key].node
        return facts.present and (facts.resumable or not node.resumable)

    def _needed(self) -> set[str]:
        """Stages that must be run and reported: unknown points, and stored states on the way to them."""
        needed: set[str] = set()
        seen: set[str] = set()
        stack = [k for k, e in self._entries.items() if e.node.evaluated and not e.facts.known and not e.failed]
        needed.update(stack)
        while stack:
            key = stack.pop()
            if key in seen:
                continue
            seen.add(key)
            for source in self._inputs(key):
                entry = self._entries[source]
                if self._there(source):
                    continue
                if entry.node.stored:
                    needed.add(source)
                elif isinstance(entry.node.op, Train) and len(entry.children) > 1:
                    entry.node = replace(entry.node, stored=True)
                    needed.add(source)
                stack.append(source)
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
            if any(self._entries[key].node.stored or self._entries[key].failed for key in missing):
                return None
            if missing:
                stack += missing
            else:
                key = stack.pop()
                way.setdefault(key, self._step(key, inputs))
        return list(way.values())

    def _goes_on_from(self, key: str, steps: list[Step], needed: set[str]) -> list[Step]:
        """`steps` and the stages after them for as long as there is no branch, for one worker to run in one go."""
        while True:
            targets = self._targets_after(key) & needed
            following = min(targets, default=None)
            if len(targets) != 1 or following is None or self._entries[following].running:
                return steps
            way = self._way(following, frozenset(step.key for step in steps))
            if way is None:
                return steps
            steps = [*steps, *way]
            key = following

    def _targets_after(self, key: str) -> set[str]:
        """The next stages to be reported that wait for `key`."""
        found: set[str] = set()
        stack = [*self._waiting_for(key)]
        while stack:
            child = stack.pop()
            entry = self._entries[child]
            if entry.node.stored or entry.node.evaluated:
                found.add(child)
            else:
                stack += self._waiting_for(child)
        return found

    def _waiting_for(self, key: str) -> Iterable[str]:
        node = self._entries[key].node
        later = [cut for cut in self._later_cuts(node) if self._last_cut_before(self._entries[cut].node) == key]
        return [*self._entries[key].children, *later]

    def _step(self, key: str, inputs: tuple[str, ...]) -> Step:
        entry = self._entries[key]
        node = entry.node
        goes_on = isinstance(node.op, Train) and inputs != node.parents
        begin = _to(self._entries[inputs[0]].node) if goes_on else node.start
        return Step(
            key=key,
            op=node.op,
            inputs=inputs,
            goes_on=goes_on,
            steps=_to(node) - begin if isinstance(node.op, Train) else 0,
            evaluated=node.evaluated and not entry.facts.known,
            stored=node.stored,
            resumable=node.resumable,
        )

    def _give_out(self, steps: list[Step]) -> Segment:
        for step in steps:
            if step.stored or step.evaluated:
                self._entries[step.key].running = True
        return Segment(number=next(self._numbers), steps=tuple(steps))

    def _raise_height(self, key: str) -> None:
        """Height: optimizer steps on the longest way from here to the end, this stage included."""
        entry = self._entries[key]
        inputs = self._inputs(key)
        own = self._step(key, inputs).steps + 1
        entry.height = max([entry.height, *(own + self._entries[child].height for child in self._waiting_for(key)), own])


def _to(node: Node) -> int:
    assert isinstance(node.op, Train)
    return node.op.to


def _run(node: Node) -> tuple[str, str]:
    """What names a run of training: where it starts and everything of its op but the position to reach."""
    assert isinstance(node.op, Train)
    return node.parents[0], repr(replace(node.op, to=0))
