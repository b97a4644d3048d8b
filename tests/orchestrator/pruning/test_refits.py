"""A refitted module is what the narrower layer would have been from the start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from orchestrator.pruning.refits import REFITS, hold, refit


@pytest.mark.parametrize(
    ("before", "after", "inputs"),
    [
        (lambda: nn.Linear(3, 4), lambda: nn.Linear(2, 3), (1, 2)),
        (lambda: nn.Linear(3, 4, bias=False), lambda: nn.Linear(2, 3, bias=False), (1, 2)),
        (lambda: nn.Conv1d(3, 4, 2, stride=2), lambda: nn.Conv1d(2, 3, 2, stride=2), (1, 2, 6)),
        (
            lambda: nn.Conv2d(3, 4, 2, padding=1, padding_mode="circular"),
            lambda: nn.Conv2d(2, 3, 2, padding=1, padding_mode="circular"),
            (1, 2, 4, 4),
        ),
        (lambda: nn.Conv3d(3, 4, 1, bias=False), lambda: nn.Conv3d(2, 3, 1, bias=False), (1, 2, 2, 2, 2)),
        (lambda: nn.Conv1d(4, 4, 2, groups=4), lambda: nn.Conv1d(2, 2, 2, groups=2), (1, 2, 4)),
        (lambda: nn.Conv1d(6, 9, 2, groups=3), lambda: nn.Conv1d(4, 6, 2, groups=2), (1, 4, 4)),
        (lambda: nn.Conv1d(6, 9, 2, groups=3), lambda: nn.Conv1d(2, 3, 2, groups=1), (1, 2, 4)),
        (lambda: nn.ConvTranspose1d(3, 4, 2), lambda: nn.ConvTranspose1d(2, 3, 2), (1, 2, 4)),
        (lambda: nn.ConvTranspose2d(6, 9, 2, groups=3), lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), (1, 4, 3, 3)),
        (lambda: nn.BatchNorm2d(3), lambda: nn.BatchNorm2d(2), (1, 2, 3, 3)),
        (lambda: nn.BatchNorm1d(3, affine=False), lambda: nn.BatchNorm1d(2, affine=False), (1, 2, 3)),
        (lambda: nn.BatchNorm1d(3, track_running_stats=False), lambda: nn.BatchNorm1d(2, track_running_stats=False), (2, 2)),
        (lambda: nn.InstanceNorm1d(3, affine=True), lambda: nn.InstanceNorm1d(2, affine=True), (1, 2, 4)),
        (lambda: nn.PReLU(3), lambda: nn.PReLU(2), (1, 2)),
    ],
)  # fmt: skip
def test_it_is_the_narrower_layer(
    before: Callable[[], nn.Module], after: Callable[[], nn.Module], inputs: tuple[int, ...]
) -> None:
    wide, expected = before(), after()
    tensors = {**dict(expected.named_parameters()), **dict(expected.named_buffers())}
    found = REFITS[type(wide)](wide, {name: tensor.detach().clone() for name, tensor in tensors.items()})
    assert repr(found) == repr(expected)
    given = torch.randn(inputs)
    assert torch.equal(found.eval()(given), expected.eval()(given))


def test_an_embedding_keeps_its_words() -> None:
    found = REFITS[nn.Embedding](nn.Embedding(5, 3, padding_idx=1), {"weight": torch.randn(5, 2)})
    assert repr(found) == "Embedding(5, 2, padding_idx=1)"
    assert found(torch.tensor([4])).shape == (1, 2)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv1d(6, 9, 2, groups=3), (8, 2, 2)),
        (nn.Conv1d(6, 9, 2, groups=3), (6, 1, 2)),
        (nn.ConvTranspose1d(6, 9, 2, groups=3), (5, 3, 2)),
        (nn.ConvTranspose1d(6, 9, 2, groups=3), (4, 2, 2)),
    ],
)
def test_a_torn_group_is_refused(module: nn.Module, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="of a grouped convolution only whole groups can go"):
        REFITS[type(module)](module, {"weight": torch.zeros(shape), "bias": torch.zeros(9)})


def test_what_was_frozen_stays_frozen() -> None:
    layer = nn.Linear(2, 3).requires_grad_(False)
    layer.bias.requires_grad_(True)
    hold(layer, {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)})
    assert [(name, p.requires_grad, len(p)) for name, p in layer.named_parameters()] == [
        ("weight", False, 2),
        ("bias", True, 2),
    ]


def test_a_type_has_one_refit() -> None:
    with pytest.raises(AssertionError, match="Linear has two refits"):
        refit(nn.Linear)(REFITS[nn.Linear])


def test_subclasses_are_strangers() -> None:
    class Odd(nn.Linear):
        def forward(self, given: Any) -> Any:
            return given

    assert Odd not in REFITS
