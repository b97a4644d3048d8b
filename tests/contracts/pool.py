"""What every pool keeps to, wherever its workers run: one check a promise, each given a pool and an empty folder.

@pytest.mark.parametrize("check", POOL_CHECKS)
def test_contract(check, pool, tmp_path):
    check(pool, tmp_path)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.code import code_digest
from orchestrator.errors import TaskError, WorkersUnusable
from orchestrator.graph import Facts, Graph, Segment
from orchestrator.planning.trial import trial_plan
from orchestrator.pools.protocol import Ended, Event, Failed, Job, Pool, Reported
from orchestrator.store.store import Store
from orchestrator.tasks.info import TaskInfo
from orchestrator.tasks.source import collect
from tests.orchestrator.pools import small

PATIENCE_SECONDS = 60.0


def job(folder: Path, task: str = "my_task.py", **task_params: Any) -> Job:
    """A job over the small task, with a store and a nonce in it, in `folder`."""
    small.write_task(folder)
    Store(folder / "store").files.write("handshake/nonce", b"nonce")
    return Job(
        store_url=str(folder / "store"),
        study="small",
        task=collect(task, folder),
        task_params=task_params,
        root=str(folder),
        nonce="handshake/nonce",
        code=code_digest(),
    )


def segments(info: TaskInfo, **params: Any) -> list[Segment]:
    """All that can be run at once of one trial's plan."""
    settings = small.spec().settings({"criterion": "magnitude", "rate": 0.5, "retrain": "finetune"} | params)
    graph = Graph()
    graph.add(trial_plan(settings, 0, info), lambda key: Facts())
    return list(graph.ready())


def until_ended(pool: Pool, count: int = 1) -> list[Event]:
    """Every event until `count` segments have ended."""
    events: list[Event] = []
    began = time.monotonic()
    while sum(isinstance(event, Ended) for event in events) < count:
        assert time.monotonic() - began < PATIENCE_SECONDS, f"no end in sight after {events}"
        events += pool.completed(0.1)
    return events


def reported_keys(segment: Segment) -> list[str]:
    return [step.key for step in segment.steps if step.evaluated or step.stored]


def events_of_a_segment_come_in_order_and_end(pool: Pool, folder: Path) -> None:
    (segment,) = segments(pool.prepare(job(folder)), rounds=3)
    pool.submit(segment)
    *reports, end = until_ended(pool)
    assert [report.key for report in reports if isinstance(report, Reported)] == reported_keys(segment)
    assert len(reports) == len(reported_keys(segment)) == 4
    assert end == Ended(segment=segment.number)
    assert not pool.completed(0.05), "nothing is said of a segment after its end"


def what_is_reported_is_stored_with_its_outcome(pool: Pool, folder: Path) -> None:
    (segment,) = segments(pool.prepare(job(folder)))
    pool.submit(segment)
    store = Store(folder / "store")
    for event in until_ended(pool):
        if isinstance(event, Reported):
            header = store.states.header(event.key)
            assert header is not None and event.stored and not event.found
            assert event.measures is not None and 0 <= event.measures["accuracy"] <= 1
            assert "accuracy" in header["outcome"]


def several_segments_end_once_each(pool: Pool, folder: Path) -> None:
    info = pool.prepare(job(folder))
    given = [segments(info, epochs=epochs)[0] for epochs in (1, 2, 3, 4)]
    waiting = [Segment(number=number, steps=segment.steps) for number, segment in enumerate(given)]
    events: list[Event] = []
    while waiting or sum(isinstance(event, Ended) for event in events) < len(given):
        while waiting and pool.free:
            pool.submit(waiting.pop())
        events += until_ended(pool)
    assert sorted(event.segment for event in events if isinstance(event, Ended)) == [0, 1, 2, 3]
    said = [(event.segment, event.key) for event in events if not isinstance(event, Ended)]
    assert len(set(said)) == len(said) == sum(len(reported_keys(segment)) for segment in given)
    assert pool.free


def a_state_that_is_there_is_measured_and_not_made_again(pool: Pool, folder: Path) -> None:
    (segment,) = segments(pool.prepare(job(folder)))
    pool.submit(segment)
    first = [event for event in until_ended(pool) if isinstance(event, Reported)]
    pool.submit(Segment(number=99, steps=segment.steps))
    again = [event for event in until_ended(pool) if isinstance(event, Reported)]
    assert [(event.found, event.steps) for event in again] == [(True, 0)] * len(first)
    for one, other in zip(first, again, strict=True):
        assert one.measures is not None and other.measures is not None
        assert one.measures["loss"] == other.measures["loss"]


def trouble_is_a_value_and_the_pool_goes_on(pool: Pool, folder: Path) -> None:
    kinds = {"": "diverged", "raises": "raised", "exits": "raised", "memory": "out of memory"}
    for trouble, kind in kinds.items():
        info = pool.prepare(job(folder, trouble=trouble))
        (bad,) = segments(info, lr=1e30)
        pool.submit(bad)
        failed, end = until_ended(pool)
        assert isinstance(failed, Failed) and isinstance(end, Ended)
        assert (failed.segment, failed.kind) == (bad.number, kind)
        assert failed.key in {step.key for step in bad.steps}
        assert failed.message and "Traceback" in failed.traceback
        (good,) = segments(info)
        pool.submit(Segment(number=77, steps=good.steps))
        assert not any(isinstance(event, Failed) for event in until_ended(pool))


def a_training_that_takes_too_long_is_ended_and_goes_on_from_its_checkpoint(pool: Pool, folder: Path) -> None:
    given = replace(job(folder), checkpoint_minutes=1e-9)
    info = pool.prepare(replace(given, timeout_seconds=0.05))
    (long,) = segments(info, epochs=60)
    pool.submit(long)
    failed, end = until_ended(pool)
    assert isinstance(failed, Failed) and isinstance(end, Ended)
    assert (failed.kind, failed.segment, failed.key) == ("timed out", long.number, reported_keys(long)[0])
    assert "takes longer than timeout_seconds = 0.05" in failed.message
    checkpoints = Store(folder / "store").checkpoints
    reached = checkpoints.positions()[failed.key]
    assert reached > 0
    pool.prepare(given)
    pool.submit(replace(long, steps=tuple(replace(step, begun=step.key == failed.key) for step in long.steps)))
    first, *_, end = until_ended(pool)
    assert isinstance(first, Reported) and isinstance(end, Ended)
    assert (first.key, first.checkpoint) == (failed.key, reached)
    assert first.steps == next(step.steps for step in long.steps if step.key == failed.key) - reached
    assert not checkpoints.positions(), "what is done needs none"


def prepare_refuses_what_is_wrong(pool: Pool, folder: Path) -> None:
    right = job(folder)
    fields = vars(right)
    (folder / "wrong.py").write_text("def task():\n    raise KeyError('no data here')\n")
    with pytest.raises(TaskError, match=r"wrong.py:2: KeyError: 'no data here'"):
        pool.prepare(Job(**fields | {"task": collect("wrong.py", folder)}))
    with pytest.raises(WorkersUnusable, match="runs other code than the driver"):
        pool.prepare(Job(**fields | {"code": "0" * 64}))
    with pytest.raises(WorkersUnusable, match="does not see the driver's store"):
        pool.prepare(Job(**fields | {"nonce": "handshake/another"}))
    assert pool.prepare(right).layers


POOL_CHECKS: Sequence[Callable[[Pool, Path], None]] = (
    events_of_a_segment_come_in_order_and_end,
    what_is_reported_is_stored_with_its_outcome,
    several_segments_end_once_each,
    a_state_that_is_there_is_measured_and_not_made_again,
    trouble_is_a_value_and_the_pool_goes_on,
    a_training_that_takes_too_long_is_ended_and_goes_on_from_its_checkpoint,
    prepare_refuses_what_is_wrong,
)
