from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from orchestrator.graph import Segment, Step
from orchestrator.ops import Gather, Recipe, Train
from orchestrator.pools.protocol import Failed
from orchestrator.pools.retries import MOST_TRIES, MOST_TRIES_EVER, TRIES_FOR_A_BYSTANDER, Retries, Verdict


def training(key: str = "a", batch_size: int = 16, task: str = "") -> Step:
    op = Train(recipe=Recipe(optimizer="sgd", lr=0.1, batch_size=batch_size), order_seed=0, to=9)
    return Step(key=key, op=op, inputs=(), task=task, stored=True)


def segment(*steps: Step, gpus: float = 0.0) -> Segment:
    return Segment(number=1, steps=steps, gpus=gpus)


def failed(kind: str, key: str = "a") -> Failed:
    return Failed(segment=1, key=key, kind=kind, message="as it was told")


def deaths(retries: Retries, count: int, key: str = "a") -> list[Verdict]:
    return [retries.judge(segment(training(key)), failed("worker died", key)) for _ in range(count)]


def test_a_stage_that_kills_its_workers_is_given_up() -> None:
    verdicts = deaths(Retries(0.0), MOST_TRIES)
    assert [verdict.again for verdict in verdicts] == [True] * (MOST_TRIES - 1) + [False]
    assert [verdict.tries for verdict in verdicts] == [1, 2, 3, 4, 5]
    assert verdicts[-1].reason.startswith("worker died: 5 workers died over this stage (out of memory, or a crash")
    assert verdicts[-1].reason.endswith("the last: as it was told")


def test_every_stage_has_its_own_count() -> None:
    retries = Retries(0.0)
    assert all(verdict.again for key in "abcdefgh" for verdict in deaths(retries, MOST_TRIES - 1, key))


def test_where_workers_die_that_are_at_nothing_a_stage_is_tried_more_often_and_not_for_ever() -> None:
    retries = Retries(0.0)
    death = failed("worker died")
    verdicts = [retries.judge(segment(training()), replace(death, bystanders=min(n, 3))) for n in range(15)]
    most = MOST_TRIES + 3 * TRIES_FOR_A_BYSTANDER
    assert [verdict.again for verdict in verdicts] == [n < most for n in range(1, 16)]
    assert not retries.judge(segment(training()), replace(death, bystanders=3)).again
    again = Retries(0.0)
    tries = [again.judge(segment(training()), replace(death, bystanders=n)).again for n in range(MOST_TRIES_EVER)]
    assert all(tries[:-1]) and not tries[-1]


def test_one_that_gets_further_each_time_goes_on() -> None:
    retries = Retries(0.0)
    for position in range(1, 50):
        assert retries.judge(segment(training()), failed("worker died"), position).again
    assert [verdict.again for verdict in deaths(retries, MOST_TRIES - 1)] == [True] * (MOST_TRIES - 2) + [False]


def test_a_preempted_one_is_not_counted() -> None:
    retries = Retries(0.0)
    assert all(retries.judge(segment(training()), failed("preempted")).again for _ in range(100))
    assert deaths(retries, 1)[0].tries == 1


@pytest.mark.parametrize(("begin", "shares"), [(0.25, [0.5, 1.0, 0]), (0.3, [0.6, 1.0, 0]), (1.0, [0]), (2.0, [0])])
def test_a_share_doubles_up_to_a_whole_gpu(begin: float, shares: list[float]) -> None:
    retries = Retries(begin)
    for share in shares:
        tried = segment(training(), gpus=retries.gpus(segment(training())))
        verdict = retries.judge(tried, failed("out of GPU memory"))
        assert (verdict.again, verdict.gpus) == (bool(share), share)
        assert verdict.reason == "out of GPU memory: as it was told"


def test_without_a_gpu_there_is_no_larger_share() -> None:
    assert not Retries(0.0).judge(segment(training()), failed("out of GPU memory")).again


def test_what_is_like_it_begins_with_the_larger_share() -> None:
    retries = Retries(0.25)
    gather = Step(key="g", op=Gather(what=("gradient",), examples=8, seed=0, round=1), inputs=())
    first = segment(gather, training())
    assert retries.gpus(first) == 0
    verdict = retries.judge(first, failed("out of GPU memory"))
    assert (verdict.like, verdict.gpus) == ("batch_size=16", 0.5)
    assert retries.gpus(segment(training("another"))) == 0.5
    assert retries.gpus(segment(gather, training("third"))) == 0.5
    assert retries.gpus(segment(gather)) == retries.gpus(segment(training("b", batch_size=32))) == 0
    assert retries.gpus(segment(training("c", task="elsewhere"))) == 0


@pytest.mark.parametrize(
    ("gpus", "learnt", "share"),
    [(0.25, {"batch_size=16": 0.5}, 0.5), (0.5, {"batch_size=16": 0.5}, 0), (0.0, {"batch_size=16": 0.5}, 0)],
)
def test_what_was_learnt_before_counts_where_workers_have_less(
    gpus: float, learnt: Mapping[str, float], share: float
) -> None:
    assert Retries(gpus, learnt).gpus(segment(training())) == share
