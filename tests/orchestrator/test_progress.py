from __future__ import annotations

import io

import pytest

from orchestrator.objectives import OBJECTIVES
from orchestrator.progress import Lines, Standing


def test_the_best_of_each_objective_is_kept() -> None:
    standing = Standing(asked=3)
    objectives = [OBJECTIVES["accuracy"], OBJECTIVES["bytes"]]
    for values in ([0.5, 100], [0.9, 300], [0.7, 50]):
        standing.note(objectives, values)
    assert standing.best == {"accuracy": 0.9, "bytes": 50}


def test_one_line_says_trials_epochs_stages_and_what_was_shared() -> None:
    standing = Standing(asked=9, done=4, failed=1, epochs_asked=40, epochs_run=10, stages_asked=8, stages_run=6)
    assert standing.says() == "5/9 trials · 1 failed · 10 of 40 epochs and 6 of 8 stages run, 75% shared"


@pytest.mark.parametrize(("asked", "expected"), [(10, "about 30 s left"), (100, "about 8 min left")])
def test_a_log_gets_a_line_now_and_then_with_the_time_left(asked: int, expected: str) -> None:
    now, out = [100.0], io.StringIO()
    lines = Lines(out, clock=lambda: now[0])
    standing = Standing(asked=asked, done=2)
    lines.show(standing)
    for second, done in ((5, 3), (20, 6), (21, 6)):
        now[0], standing.done = 100.0 + second, done
        lines.show(standing)
    if asked == 10:
        expected = "about 20 s left"  # four trials in 20 s, four to go
    assert out.getvalue().count("\n") == 1 and expected in out.getvalue()
    lines.end(standing)
    assert out.getvalue().count("\n") == 2
