"""The loop: ask, plan, merge, run, record, tell."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from orchestrator import history
from orchestrator.canonical import digest
from orchestrator.errors import InputError, StoreError
from orchestrator.graph import Facts, Graph, Segment
from orchestrator.history import History
from orchestrator.interrupts import held
from orchestrator.joblog import doing
from orchestrator.judging import Judge, Rounds
from orchestrator.metrics import metrics
from orchestrator.objectives import Objective
from orchestrator.outcome import CONTROL_TRIAL, DENSE_TRIAL
from orchestrator.plan import Plan
from orchestrator.planning.trial import dense_plan, trial_plan
from orchestrator.pools.protocol import RETRIED, Ended, Event, Failed, Pool, Reported
from orchestrator.pools.retries import Retries
from orchestrator.progress import Progress, Silent, Standing
from orchestrator.room import Room
from orchestrator.settings import FINAL
from orchestrator.spec import StudySpec
from orchestrator.store.address import without_secrets
from orchestrator.store.lease import Lease
from orchestrator.store.ledger import GRACE_SECONDS
from orchestrator.store.store import Store
from orchestrator.tasks.info import TaskInfo
from orchestrator.warm_start import WarmStart
from search.proposer import LEARNS, Ahead, Proposal, make

_LOG = logging.getLogger("orchardist.driver")

FLUSH_SECONDS = 0.25
"""What was measured waits at most this long to become durable; a state's header has a copy all the while."""

PUBLISH_SECONDS = 1.0

AHEAD = 128
"""Trials under way at a time for samplers that look at no result; those that learn get two for each worker."""

MOST_CUTS = 32
"""A space with more places to rewind to than this has the dense training cut only where trials ask for it."""

POINT_DIGITS = 12
"""So many digits of its points' keys are noted with a trial that is done: enough to see that one is missing."""

SHARED_FAILURE = "a stage that it shares with another trial failed"


@dataclass
class _Trial:
    """One proposal under way: a plan for each seed, and which of its points are still to come."""

    number: int
    params: dict[str, Any]
    whole: list[Plan]
    rung: int | None = None
    """The round after which it pauses, to be compared with others; None: it goes on to its end."""
    missing: set[str] = field(default_factory=set)
    comparing: set[str] = field(default_factory=set)
    """Controls of its tickets that are still to come; one that fails is merely missing from the comparison."""
    uncompared: set[str] = field(default_factory=set)
    """Those of them that failed."""
    again: bool = False
    """It is done since an earlier run, and only controls that are missing are tried again."""
    failure: str = ""

    @cached_property
    def rounds(self) -> int:
        """How many it asks for."""
        return max((plan.rounds for plan in self.whole), default=0)

    @property
    def plans(self) -> list[Plan]:
        """What is under way of them."""
        return self.whole if self.rung is None else [plan.until(self.rung) for plan in self.whole]

    @property
    def settled(self) -> bool:
        """Whether there is nothing more to wait for."""
        return bool(self.failure) or not (self.missing or self.comparing)

    @property
    def epochs(self) -> float:
        return sum(plan.epochs for plan in self.plans)

    @property
    def stages(self) -> int:
        return sum(len(plan.nodes) for plan in self.plans)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a driver works for and with."""

    spec: StudySpec
    info: TaskInfo
    objectives: Sequence[Objective]
    code: Mapping[str, str]
    """Digests of the user's own functions, by name."""
    warm: WarmStart = field(default_factory=WarmStart)
    """What earlier studies give it to begin with."""


class Driver:
    """Runs a study to the end, or on from wherever its ledger says it stands."""

    def __init__(
        self, setting: Setting, store: Store, pool: Pool, lease: Lease, past: History, progress: Progress | None = None
    ) -> None:
        self.setting = setting
        self.spec = setting.spec
        self.store = store
        self.pool = pool
        self.lease = lease
        self.past = past
        self.progress = progress or Silent()
        self.ledger = store.ledger(self.spec.name, lease.epoch)
        self.graph = Graph()
        self.space = self.spec.search_space()
        self.judge = Judge(setting.objectives, self.spec.constraints)
        self._values = self.judge.values
        for key, values in history.measured(store, self.spec.name, self.judge.columns):
            self._values[key] = tuple(values.values())
        lacking = self._lacking(past)
        if lacking:
            _LOG.warning("outcomes of the study %s are missing; they are looked for in the states", self.spec.name)
            for number in lacking:
                del past.endings[number]
        self._unfinished = past.unfinished(self.spec.halving())
        """Trials of earlier runs that are to go on."""
        self._owners: dict[str, tuple[int, int, int, Mapping[str, Any]]] = {}
        self._trials: dict[int, _Trial] = {}
        self._waiting_for: dict[str, set[int]] = {}
        self._reasons: dict[str, str] = {}
        self._dense: _Trial | None = None
        self._complete: deque[int] = deque()
        self._directions = [objective.direction for objective in setting.objectives]
        self._brackets = past.brackets(self.spec.halving(), self._directions)
        self._paused: dict[int, _Trial] = {}
        """Trials that wait for the verdict on their bracket."""
        self._proposed: deque[Proposal] = deque()
        """Trials that are recorded and have yet to begin."""
        self._finished = False
        self._segments: dict[int, Segment] = {}
        self._retries = Retries(pool.gpus, past.shares)
        self._checkpoints = store.checkpoints.positions()
        self._rows: dict[str, list[dict[str, Any]]] = {"proposals": [], "outcomes": [], "events": []}
        self._flushed_at = time.monotonic()
        self._published_at = -math.inf
        self._told = {digest(params) for params, _ in past.proposals.values()}
        self._told |= {digest(params) for params, _, _ in (*past.added, *setting.warm.told)}
        self._compactor = ThreadPoolExecutor(1, thread_name_prefix="compaction")
        self._compaction: Future[None] | None = None
        self._room = Room(store, self.spec.name, self.spec.max_store_gb, self.ledger, self._compactor)
        over = [past.endings[number] for number in past.endings.keys() - {*self._unfinished}]
        self.standing = Standing(
            asked=self.spec.trials,
            done=sum(ending.state == "done" for ending in over),
            stopped=sum(ending.state == "stopped" for ending in over),
            epochs_asked=sum(ending.epochs for ending in over),
            epochs_run=past.epochs_run,
            stages_asked=sum(ending.stages for ending in over),
            stages_run=past.stages_run,
            retries=sum(past.retries.values()),
        )
        for ended in over:
            self.standing.note(setting.objectives, ended.best)

    def run(self) -> Standing:
        """Run until every asked-for trial has ended. What is recorded stays recorded, however this ends.

        Raises:
            StoreError: another driver has taken the study over, or the store cannot be written.
        """
        self._event("started", detail={"epoch": self.lease.epoch, "task": self.setting.info.digest})
        learns = self.spec.sampler in LEARNS
        proposer = make(
            self.spec.sampler,
            self.space,
            self._directions,
            seed=self.spec.sampler_seed,
            enqueued=[*self.spec.points(), *self.setting.warm.points],
            history=self.past.told(),
            added=[*self.past.added, *self.setting.warm.told],
        )
        to_ask = max(0, self.spec.trials - len(self.past.proposals))
        for number in self._unfinished:
            self._proposed.append(Proposal(number=number, params=self.past.proposals[number][0], attrs={}))
        with Ahead(proposer, max(1, min(self._window(), to_ask))) as ahead:
            self._ahead = ahead
            try:
                with held():
                    self._room.keep(self._under_way, now=True, idle=bool(to_ask or self._proposed))
                    self._begin_dense()
                    self._compare_again()
                while True:
                    self.lease.check()
                    window = self._window()
                    asked: list[Proposal] = []
                    room = min(window - len(self._trials) - len(self._proposed), to_ask)
                    # A sampler that looks at no result is asked for many proposals, to be recorded at once.
                    if room > 0 and not self._room.full and (learns or room >= min(window // 2, to_ask)):
                        asked = self._ask(room, patient=not learns or not self._trials)
                        to_ask = 0 if ahead.exhausted and not asked else to_ask - len(asked)
                    with held():
                        self._propose(asked)
                        self._begin_some(window)
                        if not (to_ask or self._proposed):
                            self._brackets.close()
                        self._submit()
                        self._settle()
                    if not (self._segments or self._trials or self._proposed or to_ask or self._complete):
                        self._finished = True
                        break
                    events = self.pool.completed(FLUSH_SECONDS)
                    with held():
                        self._hear(events)
                        self._settle()
                        self._record()
                        idle = bool(to_ask or self._proposed) and not (self._trials or self._segments)
                        self._room.keep(self._under_way, idle=idle)
                    self.progress.show(self.standing)
                    self._publish()
            finally:
                with held():
                    self._end()
        return self.standing

    def _window(self) -> int:
        """How many trials may be under way; workers come and go."""
        twice = 2 * self.pool.workers
        return twice if self.spec.sampler in LEARNS else max(AHEAD, twice)

    def _lacking(self, past: History) -> list[int]:
        """The ended trials of which outcomes are gone with a damaged file; all of them where it is not known whose."""
        there = {key[:POINT_DIGITS] for key in self._values}
        if len(self._values) < past.outcomes:
            return list(past.endings)
        return [number for number, ending in past.endings.items() if not there.issuperset(ending.points)]

    def _under_way(self) -> set[str]:
        """The states of the trials that are under way or wait for others."""
        trials = (*self._trials.values(), *self._paused.values())
        return {node.key for trial in trials for plan in trial.plans for node in plan.nodes}

    def _begin_dense(self) -> None:
        """The unpruned model of every seed, outside `trials`, with states kept where trials may rewind to."""
        cuts = self._cuts()
        plans = [
            dense_plan(self.spec.train, seed, self.setting.info, device=self.pool.device, cuts=cuts)
            for seed in self.spec.seeds
        ]
        self._dense = _Trial(DENSE_TRIAL, {}, plans)
        self._add(self._dense)

    def _cuts(self) -> list[float]:
        """Epochs of the dense training that trials rewind to, begin to prune at or, at a constant rate, end at."""
        epochs: set[float] = set()
        per_epoch = self.setting.info.steps_per_epoch(self.spec.train.batch_size)
        if "rewind" in (self.space.possible("retrain") or ()):
            epochs.update(self.space.possible("rewind_epoch") or ())
            epochs.update(step / per_epoch for step in self.space.possible("rewind_step") or ())
        if "during" in (self.space.possible("phase") or ()):
            epochs.update(self.space.possible("prune_begin") or (self.spec.train.epochs / 4,))
        if self.spec.train.lr_schedule == "constant" and "lr_schedule" not in self.space.names:
            epochs.update(self.space.possible("epochs") or ())
        return sorted(epoch for epoch in epochs if epoch) if len(epochs) <= MOST_CUTS else []

    def _ask(self, most: int, *, patient: bool) -> list[Proposal]:
        """At most `most` proposals: those that are ready, or all of them for the patient."""
        asked: list[Proposal] = []
        while len(asked) < most:
            more = self._ahead.take(most - len(asked), wait=patient)
            if not more:
                break
            asked += more
        return asked

    def _propose(self, proposals: Sequence[Proposal]) -> None:
        """Record proposals durably; then they may begin."""
        if not proposals:
            return
        now = time.time()
        self._rows["proposals"] += [
            {"trial": p.number, "params": p.params, "attrs": p.attrs, "proposed_at": now} for p in proposals
        ]
        self._record(at_once=True)
        for proposal in proposals:
            self._told.add(digest(proposal.params))
            doing(self.spec.name, "proposed", {"trial": proposal.number, "params": proposal.params})
        self._proposed.extend(proposals)

    def _begin_some(self, window: int) -> None:
        """Begin trials for a moment: each asks the store what is there, and workers are not to wait for a thousand."""
        until = time.monotonic() + FLUSH_SECONDS
        while self._proposed and len(self._trials) < window and not self._room.full:
            self._begin(self._proposed.popleft())
            if time.monotonic() >= until:
                break

    def _compare_again(self) -> None:
        """Try again what tickets of trials that are done could not be compared with, whatever had failed."""
        for number, controls in sorted(self.past.compared.items()):
            ending = self.past.endings.get(number)
            if ending is None or ending.state != "done" or controls <= self._values.keys():
                continue
            params, _ = self.past.proposals[number]
            with suppress(InputError):  # like other points, a plan that is refused by now means that the task changed
                plans = self._plans(params)
                if all(key in self._values for plan in plans for _, key in plan.points):
                    self._add(_Trial(number, params, plans, again=True))

    def _begin(self, proposal: Proposal) -> None:
        trial = self._trial(proposal)
        if trial.failure:
            self._trials[trial.number] = trial
            self._complete.append(trial.number)
            return
        self._brackets.begin(trial.number, trial.rounds)
        trial.rung = self._brackets.rule.next_rung(0, trial.rounds)
        self._add(trial)

    def _trial(self, proposal: Proposal) -> _Trial:
        try:
            return _Trial(proposal.number, proposal.params, self._plans(proposal.params))
        except InputError as error:
            return _Trial(proposal.number, proposal.params, [], failure=f"refused: {error}")

    def _plans(self, params: Mapping[str, Any]) -> list[Plan]:
        settings = self.spec.settings(dict(params), self.setting.code)
        return [trial_plan(settings, seed, self.setting.info, device=self.pool.device) for seed in self.spec.seeds]

    def _add(self, trial: _Trial) -> None:
        self._trials[trial.number] = trial
        self.standing.running = sum(number != DENSE_TRIAL for number in self._trials)
        for seed, plan in zip(self.spec.seeds, trial.plans, strict=True):
            rounds = {key: number for number, key in plan.points}
            controls = plan.compared
            for node in plan.nodes:
                if node.evaluated and node.key not in self._values:  # a trial's own dense model is its round 0
                    owner = trial.number, rounds.get(node.key, 0), seed, trial.params
                    if node.task or (node.key in controls and node.key not in rounds):
                        owner = CONTROL_TRIAL, controls.get(node.key, 0), seed, trial.params
                    self._owners.setdefault(node.key, owner)
            self._fail(self.graph.add(plan, self._facts), SHARED_FAILURE)
            for key in controls:
                if self.graph.failed(key):
                    self._not_compared(trial, key, self._reasons[key])
                elif not self.graph.known(key):
                    trial.comparing.add(key)
                    self._waiting_for.setdefault(key, set()).add(trial.number)
            for _, key in plan.points:
                if self.graph.failed(key):
                    trial.failure = trial.failure or SHARED_FAILURE
                elif not self.graph.known(key):
                    trial.missing.add(key)
                    self._waiting_for.setdefault(key, set()).add(trial.number)
        if trial.settled:
            self._complete.append(trial.number)

    def _facts(self, key: str) -> Facts:
        """What the ledger and the store know of a key. An outcome in a state's header is taken over from there, if it
        has what this study asks for: another one may have measured less."""
        header = self.store.states.header(key) or {}
        if key not in self._values and key in self._owners:
            outcome = json.loads(header.get("outcome", "null"))
            if outcome is not None and None not in self.judge.asked_of(outcome):
                self._outcome(key, outcome)
        return Facts(known=key in self._values, present=bool(header), resumable=header.get("resumable") == "1")

    def _submit(self) -> None:
        if self.pool.free:
            for segment in self.graph.ready():
                begun = {s.key for s in segment.steps if s.key in self._checkpoints or self._retries.interrupted(s.key)}
                if begun:
                    steps = tuple(replace(step, begun=step.key in begun) for step in segment.steps)
                    segment = replace(segment, steps=steps)
                gpus = self._retries.gpus(segment)
                if gpus:
                    segment = replace(segment, gpus=gpus)
                self._segments[segment.number] = segment
                self.pool.submit(segment)
                if not self.pool.free:
                    break

    def _hear(self, events: Sequence[Event]) -> None:
        for event in events:
            match event:
                case Reported():
                    self._reported(event)
                case Failed():
                    self._failed(event)
                case Ended():
                    self.graph.give_back(self._segments.pop(event.segment))

    def _reported(self, event: Reported) -> None:
        segment = self._segments[event.segment]
        left = segment.after(event.key)
        stages = sum(step.key not in {s.key for s in left.steps} for step in segment.steps)
        self._segments[event.segment] = left
        epochs = self._epochs_of(segment, event)
        if event.found:
            epochs, stages = 0.0, 0
        self.standing.epochs_run += epochs
        self.standing.stages_run += stages
        detail: dict[str, Any] = {"epochs": epochs, "stages": stages, "seconds": event.seconds}
        if event.checkpoint:
            detail["checkpoint"] = event.checkpoint
        self._event("work", key=event.key, detail=detail, worker=event.worker)
        self._checkpoints.pop(event.key, None)
        if event.measures is not None and event.key not in self._values:
            self._outcome(event.key, event.measures)
        facts = Facts(known=event.key in self._values, present=event.stored, resumable=event.resumable)
        self.graph.done(event.key, facts)
        # Without its outcome the point is still to come: the graph has the state measured.
        for number in self._waiting_for.pop(event.key, ()) if facts.known else ():
            trial = self._trials[number]
            trial.missing.discard(event.key)
            trial.comparing.discard(event.key)
            if trial.settled and not trial.failure:
                self._complete.append(number)

    def _epochs_of(self, segment: Segment, event: Reported) -> float:
        """The training behind a report in epochs of its own batch size."""
        epochs = 0.0
        for step in segment.steps:
            recipe = getattr(step.op, "recipe", None)
            if recipe is not None:
                info = self.setting.info.others[step.task] if step.task else self.setting.info
                epochs += step.steps / info.steps_per_epoch(recipe.batch_size)
            if step.key == event.key:
                break
        return epochs

    def _outcome(self, key: str, measures: Mapping[str, Any]) -> None:
        """Record what was measured of a state, under the first trial that asked for it."""
        if key not in self._owners:
            return  # nobody waits any more: the trial that did has failed elsewhere
        trial, number, seed, params = self._owners.pop(key)
        self._rows["outcomes"].append(
            {**measures, "key": key, "trial": trial, "round": number, "seed": seed, "params": params}
        )
        self._values[key] = self.judge.asked_of(measures)

    def _failed(self, event: Failed) -> None:
        # Its worker has left out its own secrets; this process may have others.
        message, shown = (without_secrets(text, os.environ) for text in (event.message, event.traceback))
        event = replace(event, message=message, traceback=shown)
        if event.kind == "gone":
            self.graph.lost(event.key)
            return
        if event.kind == "store":  # no trial's fault: whoever runs the study again goes on from here
            raise StoreError(event.message)
        reason = f"{event.kind}: {event.message}"
        if event.kind in RETRIED:
            self._checkpoints = self.store.checkpoints.positions()
            segment = self._segments[event.segment]
            position = sum(self._checkpoints.get(step.key, 0) for step in segment.steps)
            verdict = self._retries.judge(segment, event, position)
            reason = verdict.reason
            if verdict.again:
                detail = {"kind": event.kind, "reason": reason, "tries": verdict.tries}
                if verdict.like:
                    detail |= {"like": verdict.like, "gpus": verdict.gpus}
                self._event("tried again", key=event.key, detail=detail)
                self.standing.retries += 1
                _LOG.warning("the stage %s is tried again: %s", event.key[:12], reason)
                return
        detail = {"reason": reason, "traceback": event.traceback}
        self._event("stage failed", key=event.key, detail=detail, worker=event.worker)
        self._fail(self.graph.fail(event.key), reason)

    def _fail(self, keys: Iterable[str], reason: str) -> None:
        """The trials that wait for any of the keys have failed."""
        for key in keys:
            self._reasons.setdefault(key, reason)
            for number in self._waiting_for.pop(key, ()):
                trial = self._trials.get(number)
                if trial is None or trial.failure:
                    continue
                if key in trial.comparing:
                    trial.comparing.discard(key)
                    self._not_compared(trial, key, reason)
                else:
                    trial.failure = reason
                if trial.settled:
                    self._complete.append(number)

    def _not_compared(self, trial: _Trial, key: str, reason: str) -> None:
        """A control failed: the trial goes on without it, and the record says why."""
        trial.uncompared.add(key)
        self._event("control failed", trial=trial.number, key=key, detail={"reason": reason})

    def _settle(self) -> None:
        """End the trials whose points have all come in, or cannot."""
        for _ in range(len(self._complete)):
            number = self._complete.popleft()
            trial = self._trials[number]
            if number != DENSE_TRIAL and self._dense_is_missing():
                self._complete.append(number)
                continue
            for key in trial.missing | trial.comparing:
                self._waiting_for.get(key, set()).discard(number)
            del self._trials[number]
            self.standing.running = sum(number != DENSE_TRIAL for number in self._trials)
            for plan in trial.plans:
                self.graph.release(plan)
            if trial.uncompared and not trial.failure:
                what = f"{len(trial.uncompared)} control{'s' if len(trial.uncompared) > 1 else ''}"
                _LOG.warning("%s of trial %d failed: `tickets` says why", what, number)
            if number == DENSE_TRIAL:
                self._settle_dense(trial)
            elif not trial.again:
                rounds = {} if trial.failure else self._reached(trial)
                trial.failure = trial.failure or self.judge.without_a_number(rounds)
                if trial.failure:
                    self._settle_failed(trial)
                else:
                    self._climb(trial, rounds)
        self._decide()

    def _reached(self, trial: _Trial) -> Rounds:
        assert self._dense is not None
        return self.judge.rounds(trial.plans, self._dense.plans)

    def _climb(self, trial: _Trial, rounds: Rounds) -> None:
        """Note what the trial reached at the rung where it is, if it is at one; it is done, or pauses there."""
        reached = max(rounds)
        if self._brackets.rule.is_rung(reached):
            values, constraints = rounds[reached]
            self._brackets.reached(trial.number, reached, values, constraints)
            detail = {"round": reached, "of": trial.rounds, "values": values, "constraints": constraints}
            self._event("rung", trial=trial.number, detail=detail)
        if trial.rung is None:
            self._settle_done(trial, rounds)
        else:
            self._paused[trial.number] = trial

    def _decide(self) -> None:
        """Go on with the trials that their brackets let go on, and stop the others."""
        for number, goes_on in self._brackets.decide():
            trial = self._paused.pop(number, None)
            if goes_on:
                self._go_on(trial or self._stopped_before(number))
            elif trial is not None:
                self._settle_stopped(trial)

    def _stopped_before(self, number: int) -> _Trial:
        """A trial that was stopped in an earlier run, where its bracket had fewer trials."""
        ending = self.past.endings[number]
        self.standing.stopped -= 1
        self.standing.epochs_asked -= ending.epochs
        self.standing.stages_asked -= ending.stages
        trial = self._trial(Proposal(number=number, params=self.past.proposals[number][0], attrs={}))
        trial.rung = ending.round
        return trial

    def _go_on(self, trial: _Trial) -> None:
        assert trial.rung is not None
        trial.rung = self._brackets.rule.next_rung(trial.rung, trial.rounds)
        self._add(trial)

    def _dense_is_missing(self) -> bool:
        """Whether a bound is relative to the dense model and that is not measured yet."""
        return self.judge.compares_with_dense and DENSE_TRIAL in self._trials

    def _settle_dense(self, trial: _Trial) -> None:
        if trial.failure:
            self.standing.dense_failure = trial.failure
            self._event("dense failed", trial=DENSE_TRIAL, detail={"reason": trial.failure})

    def _settle_failed(self, trial: _Trial) -> None:
        self.standing.failed += 1
        self.standing.last_failure = trial.failure
        _LOG.warning("trial %d failed: %s", trial.number, trial.failure)
        self._event("failed", trial=trial.number, detail={"reason": trial.failure})
        self._ahead.tell(trial.number, None, state="failed")
        self._brackets.over(trial.number)

    def _settle_stopped(self, trial: _Trial) -> None:
        rounds = self._reached(trial)
        _, constraints = rounds[max(rounds)]
        self.standing.stopped += 1
        self._event("stopped", trial=trial.number, detail=self._ended(trial, rounds))
        self._ahead.tell(trial.number, None, constraints=constraints, state="stopped")
        self._learn(trial, rounds)

    def _settle_done(self, trial: _Trial, rounds: Rounds) -> None:
        values, constraints = rounds[max(rounds)]
        self.standing.done += 1
        self._event("done", trial=trial.number, detail={"values": values, **self._ended(trial, rounds)})
        tickets = [
            {"seed": seed, **asdict(ticket)}
            for seed, plan in zip(self.spec.seeds, trial.plans, strict=True)
            for ticket in plan.tickets
        ]
        if tickets:
            self._event("tickets", trial=trial.number, detail={"params": trial.params, "tickets": tickets})
        self._ahead.tell(trial.number, values, constraints=constraints)
        self._learn(trial, rounds)
        self._brackets.over(trial.number)

    def _ended(self, trial: _Trial, rounds: Rounds) -> dict[str, Any]:
        """What is recorded of a trial that was run to the last of `rounds`."""
        last = max(rounds)
        self.standing.epochs_asked += trial.epochs
        self.standing.stages_asked += trial.stages
        return {
            "round": last,
            "constraints": rounds[last][1],
            "best": self.judge.best(rounds),
            "epochs": trial.epochs,
            "stages": trial.stages,
            "outcomes": len(self._values),
            "points": [key[:POINT_DIGITS] for plan in trial.plans for _, key in plan.points],
            "keys": [dict(plan.points)[last] for plan in trial.plans],
        }

    def _learn(self, trial: _Trial, rounds: Rounds) -> None:
        """Note the best of what was reached, and tell the sampler of the shorter trials in it."""
        self.standing.note(self.setting.objectives, self.judge.best(rounds))
        if self.spec.sampler in LEARNS:
            for number, (values, constraints) in rounds.items():
                if number != trial.rounds:
                    self._tell_shorter(trial, number, values, constraints)

    def _tell_shorter(
        self, trial: _Trial, rounds: int, values: Sequence[float], constraints: Mapping[str, float]
    ) -> None:
        """Under a rate or a threshold the first rounds of a trial are the shorter trial, where the space has it."""
        possible = self.space.possible("rounds") or ()
        if any(name in trial.params for name in FINAL) or rounds not in possible:
            return
        if not all(map(math.isfinite, [*values, *constraints.values()])):
            return
        params = trial.params | {"rounds": rounds}
        name = digest(params)
        if name not in self._told and self.space.complete(params):
            self._told.add(name)
            self._ahead.add(params, values, constraints)
            self._event(
                "shorter", trial=trial.number, detail={"params": params, "values": values, "constraints": constraints}
            )

    def _event(
        self, event: str, *, trial: int | None = None, key: str = "", detail: Mapping[str, Any], worker: str = ""
    ) -> None:
        self._rows["events"].append(
            {"event": event, "trial": trial, "key": key, "at": time.time(), "detail": dict(detail)}
        )
        owner = self._owners.get(key)
        whose = {"trial": trial} if owner is None else dict(zip(("trial", "round", "seed"), owner, strict=False))
        doing(self.spec.name, event, {**detail, **whose, "key": key, "worker": worker})

    def _publish(self, *, at_once: bool = False) -> None:
        """Let whoever watches the cluster see how the study stands, not too often."""
        now = time.monotonic()
        if at_once or now - self._published_at >= PUBLISH_SECONDS:
            self._published_at = now
            self.pool.publish(self.spec.name, metrics(self.standing, self.graph.queued))

    def _record(self, *, at_once: bool = False) -> None:
        """Make what was noted durable, and now and then merge the ledger's parts."""
        now = time.monotonic()
        if not at_once and now - self._flushed_at < FLUSH_SECONDS:
            return
        self._flushed_at = now
        for kind, rows in self._rows.items():
            self.ledger.append(kind, rows)
            rows.clear()
        self.ledger.flush()
        if self._compaction is not None and self._compaction.done():
            self._compaction.result()
            self._compaction = None
        if self._compaction is None and self.ledger.should_compact():
            self._compaction = self._compactor.submit(self.ledger.compact, GRACE_SECONDS)

    def _end(self) -> None:
        if self.lease.lost:  # the newer driver decides from now on; what was measured is a fact all the same
            self._rows["proposals"].clear()
            self._rows["events"].clear()
        else:
            detail = {"done": self.standing.done, "failed": self.standing.failed, "finished": self._finished}
            self._event("ended", detail=detail)
        try:
            self._record(at_once=True)
            self._publish(at_once=True)
            self._compactor.shutdown()
            if not self.lease.lost:
                self.ledger.compact()
        finally:
            self._compactor.shutdown(wait=False)
            self.progress.end(self.standing)
