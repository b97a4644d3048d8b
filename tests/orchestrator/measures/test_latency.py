"""Medians and intervals of passes after a warm-up; how long they take is no test's business."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from orchestrator.measures import latency


class Counted(nn.Module):
    """Counts its calls, and takes a tensor or a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.calls = 0
        self.modes: set[tuple[bool, bool]] = set()

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        self.calls += 1
        self.modes.add((self.training, torch.is_inference_mode_enabled()))
        return self.fc(x if y is None else x + y)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "example", [torch.zeros(1, 2), (torch.zeros(1, 2), torch.ones(1, 2)), {"x": torch.zeros(1, 2)}]
)
def test_median_after_the_warm_up(example: object, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Counted().train()
    now = 0.0

    def clock() -> float:
        # The first passes are slow, one later pass is very slow, the others take 2 ms.
        nonlocal now
        call = model.calls
        now += (9.0 if call <= latency.WARM_UP else 5.0 if call == latency.WARM_UP + 3 else 0.002) * (call > 0)
        return now

    monkeypatch.setattr(latency.time, "perf_counter", clock)
    assert latency.median_ms(model, example) == pytest.approx(2.0)
    assert model.calls == latency.WARM_UP + latency.RUNS
    assert model.modes == {(False, True)}


class Clocked(nn.Module):
    """A pass moves a clock on by the next of some milliseconds, round and round."""

    def __init__(self, clock: list[float], *milliseconds: float) -> None:
        super().__init__()
        self.clock, self.milliseconds, self.calls = clock, milliseconds, 0

    def forward(self, x: Tensor) -> Tensor:
        self.clock[0] += self.milliseconds[self.calls % len(self.milliseconds)] / 1000
        self.calls += 1
        return x


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds, which only a pass moves on."""
    now = [0.0]
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])
    return now


def test_two_models_in_turns(clock: list[float]) -> None:
    before, after = Clocked(clock, 6.0), Clocked(clock, 1.0, 2.0, 3.0)
    found = latency.compare(before, after, torch.zeros(1), seconds=1.0)
    assert found.pairs == latency.PAIRS and before.calls == after.calls == latency.WARM_UP + latency.PAIRS
    assert found.before.median == pytest.approx(6) and found.after.median == pytest.approx(2)
    assert (found.after.low, found.after.high) == (pytest.approx(1), pytest.approx(3))
    assert found.speedup == pytest.approx(3)
    assert found.low <= found.speedup <= found.high


def test_a_slow_model_is_timed_a_few_times(clock: list[float]) -> None:
    before, after = Clocked(clock, 9000.0), Clocked(clock, 3000.0)
    found = latency.compare(before, after, torch.zeros(1), seconds=1.0)
    assert found.pairs == latency.FEWEST_PAIRS
    assert (found.low, found.speedup, found.high) == pytest.approx((3, 3, 3))


def test_short_passes_are_timed_several_at_once(clock: list[float]) -> None:
    before, after = Clocked(clock, 0.06), Clocked(clock, 0.06)
    found = latency.compare(before, after, torch.zeros(1), seconds=1.0)
    assert before.calls == latency.WARM_UP + 4 * found.pairs
    assert found.before.median == pytest.approx(0.06)


@pytest.mark.parametrize(("count", "cut"), [(7, 1), (20, 6), (101, 41)])
def test_the_interval_of_a_median_is_that_of_the_sign_test(count: int, cut: int) -> None:
    from scipy.stats import binomtest

    values = [float(value) for value in range(1, count + 1)]
    assert latency.median_interval(values[::-1]) == (cut, count + 1 - cut)
    # A true median just outside would be rejected, one just inside not.
    assert binomtest(cut - 1, count).pvalue < 0.05 <= binomtest(cut, count).pvalue
