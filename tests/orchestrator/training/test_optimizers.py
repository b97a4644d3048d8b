"""The steps are torch.optim's own, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from orchestrator.errors import UnknownName
from orchestrator.ops import Recipe
from orchestrator.training import optimizers

SHAPES = ((7, 5), (5,), (3, 2, 2), (1,))
CASES: list[tuple[str, dict[str, float]]] = [
    ("adam", {}),
    ("adam", {"weight_decay": 0.1}),
    ("adamw", {}),
    ("adamw", {"weight_decay": 0.1}),
    ("sgd", {}),
    ("sgd", {"momentum": 0.9}),
    ("sgd", {"momentum": 0.9, "weight_decay": 0.01}),
]
THEIRS: dict[str, Any] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_twenty_steps_of_torch_optim(name: str, options: dict[str, float], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    start = [torch.randn(shape).to(dtype) for shape in SHAPES]
    ours = [tensor.clone() for tensor in start]
    theirs = [tensor.clone().requires_grad_() for tensor in start]
    # What torch.optim.AdamW decays by default is said outright.
    fused = dtype is not torch.bfloat16 or name != "sgd"
    reference = THEIRS[name](theirs, lr=0.1, fused=fused, **{"weight_decay": 0.0, **options})
    recipe = Recipe(optimizer=name, lr=0.1, batch_size=1, **options)  # type: ignore[arg-type]
    optimizer = optimizers.get(name)
    slots = optimizers.fresh_slots(optimizer, ours)
    for step in range(20):
        lr = 0.1 / (step + 1)
        gradients = [torch.randn(shape).to(dtype) for shape in SHAPES]
        optimizer.step(ours, [gradient.clone() for gradient in gradients], slots, recipe, lr)
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), step
    for slot in optimizer.slots:
        if slot == "momentum" and not recipe.momentum:
            continue
        name_there = "momentum_buffer" if slot == "momentum" else slot
        for mine, parameter in zip(slots[slot], theirs, strict=True):
            assert torch.equal(mine, reference.state[parameter][name_there]), slot


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_halves_agree_with_single_precision(name: str, options: dict[str, float], dtype: torch.dtype) -> None:
    """Torch's fused kernel for SGD is wrong in all but the last few of 35 entries."""
    torch.manual_seed(0)
    half = [torch.randn(35).to(dtype)]
    full = [half[0].float()]
    optimizer = optimizers.get(name)
    slots = [optimizers.fresh_slots(optimizer, parameters) for parameters in (half, full)]
    recipe = Recipe(optimizer=name, lr=0.1, batch_size=1, **options)  # type: ignore[arg-type]
    for _ in range(5):
        gradient = torch.randn(35).to(dtype)
        optimizer.step(half, [gradient.clone()], slots[0], recipe, 0.1)
        optimizer.step(full, [gradient.float()], slots[1], recipe, 0.1)
    assert (half[0].float() - full[0]).abs().max() < 0.05


@pytest.mark.parametrize(("name", "options"), CASES)
def test_what_is_zero_throughout_stays_plus_zero(name: str, options: dict[str, float]) -> None:
    parameters = [torch.tensor([0.0, 1.0])]
    optimizer = optimizers.get(name)
    slots = optimizers.fresh_slots(optimizer, parameters)
    recipe = Recipe(optimizer=name, lr=0.1, batch_size=1, **options)  # type: ignore[arg-type]
    for sign in (1.0, -1.0, 1.0):
        optimizer.step(parameters, [torch.tensor([sign * 0.0, sign])], slots, recipe, 0.1)
        assert parameters[0][0] == 0
        assert not torch.signbit(parameters[0][0])


def test_an_unknown_optimizer() -> None:
    with pytest.raises(UnknownName, match=r"^unknown optimizer 'adm'; did you mean 'adam'\? Known: adam, adamw, sgd$"):
        optimizers.get("adm")
