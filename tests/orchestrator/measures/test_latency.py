"""A median of passes after a warm-up; how long they take is no test's business."""

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
