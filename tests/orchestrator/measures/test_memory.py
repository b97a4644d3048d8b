"""The most that a forward pass holds at once, in numbers that can be added up by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from orchestrator.measures.memory import peak_bytes


class Stages(nn.Module):
    """Keeps the first of three results until the end, or lets each go when the next is there."""

    def __init__(self, keep: bool) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        first = x + 1
        second = first * 2
        if not self.keep:
            del first
        third = second - 3
        return third + first if self.keep else third


def test_what_is_alive_at_once_counts() -> None:
    x = torch.zeros(25)
    assert peak_bytes(Stages(keep=False), x) == 200
    assert peak_bytes(Stages(keep=True), x) == 400


def test_weights_inputs_and_views_count_nothing() -> None:
    layer = nn.Linear(4, 4, bias=False)
    assert peak_bytes(layer, torch.zeros(10, 4)) == 160
    assert peak_bytes(nn.Flatten(), torch.zeros(10, 2, 2)) == 0


def test_a_fused_layer_is_run_operation_by_operation() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=64, batch_first=True).eval()
    assert peak_bytes(layer, torch.zeros(1, 10, 4)) > 10 * 64 * 4
    assert torch.backends.mha.get_fastpath_enabled()
