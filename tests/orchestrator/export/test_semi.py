"""Layers with two of every four weights left come back bit for bit on any machine; who cannot run them so says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load as load_tensors
from safetensors.torch import save
from torch import Tensor, nn

from orchestrator import Study, StudySpec, load
from orchestrator.errors import InputError
from orchestrator.export.semi import HalfPrecision, accelerated, from_semi, packable, semi_file, why_not
from orchestrator.pools.local import LocalPool
from orchestrator.tasks.models import mlp


def two_of_four(*shape: int, seed: int = 0) -> Tensor:
    """Random weights of which two in each four along the inputs are left."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    fours = weight.view(shape[0], -1, 4)
    least = fours.abs().argsort(dim=-1)[..., :2]
    return fours.scatter(-1, least, 0.0).view(shape)


def model(weight: Tensor) -> nn.Sequential:
    built = mlp(weight.shape[1], weight.shape[0], 2)
    with torch.no_grad():
        built.get_parameter("fc1.weight").copy_(weight)
    return built.eval()


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 9))
def test_every_bit_comes_back(rows: int, fours: int, seed: int) -> None:
    pruned = model(two_of_four(rows, 4 * fours, seed=seed))
    again = from_semi(semi_file(pruned), mlp(4 * fours, rows, 2))
    for name, parameter in pruned.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name


def test_as_it_is_written() -> None:
    weight = torch.tensor([[0, 5, 0, 7, 1, 2, 0, 0], [0, 0, 0, 0, 0, 0, 0, -0.0], [0, 0, 3, 0, 0, 0, 0, 9]])
    tensors = load_tensors(semi_file(model(weight)))
    assert tensors["fc1.values"].tolist() == [[5, 7, 1, 2], [0, 0, 0, 0], [0, 3, 0, 9]]
    assert tensors["fc1.places"].flatten().tolist() == [0b01001101, 0b11000100, 0b11001000]
    again = from_semi(semi_file(model(weight)), mlp(8, 3, 2)).get_parameter("fc1.weight")
    assert torch.signbit(again[1, 7]) and not torch.signbit(again[1, 0])
    assert "out.weight" in tensors and "fc1.weight" not in tensors


def test_half_the_values_and_two_bits_each() -> None:
    pruned = model(two_of_four(64, 128))
    assert packable(pruned) == ["fc1"]
    dense = 64 * 128 * 4
    assert len(semi_file(pruned)) < dense / 2 + dense / 32 + 2_000


@pytest.mark.parametrize("shape", [(4, 6), (4, 8)])
def test_what_is_not_2_4_is_left_alone(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    assert packable(model(weight)) == []
    weight[:, :2] = 0  # only the first four of eight keep to it
    assert packable(model(weight)) == []


def test_what_does_not_fit_is_refused() -> None:
    tensors = load_tensors(semi_file(model(two_of_four(4, 8))))
    places = tensors["fc1.places"]
    for change, complaint in (
        ({"fc1.places": places[:2]}, "do not fit together"),
        ({"fc1.places": torch.zeros_like(places)}, "are not in order"),
        ({"fc1.places": places.to(torch.int16)}, "do not fit together"),
    ):
        with pytest.raises(InputError, match=complaint):
            from_semi(save({**tensors, **change}), mlp(8, 4, 2))
    with pytest.raises(InputError, match="places and no values"):
        from_semi(save({n: t for n, t in tensors.items() if n != "fc1.values"}), mlp(8, 4, 2))
    with pytest.raises(InputError, match="do not fit the model"):
        from_semi(save(tensors), mlp(8, 5, 2))


def test_a_cpu_does_not_pretend_to_run_them_packed() -> None:
    pruned = model(two_of_four(64, 128))
    assert why_not(pruned) == "no CPU skips what is gone of 2:4 layers"
    with pytest.raises(InputError, match=r"cannot be run packed here .*: that takes a GPU of compute capability 8.0"):
        accelerated(pruned)


def test_in_half_precision_it_takes_and_gives_single() -> None:
    pruned = model(two_of_four(8, 16))
    rows = torch.randn(3, 16)
    with torch.no_grad():
        expected, found = pruned(rows), HalfPrecision(model(two_of_four(8, 16)).half())(rows)
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert HalfPrecision(nn.Identity())(torch.tensor([3])).tolist() == [3]


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="no such GPU")
def test_a_gpu_that_skips_them_computes_the_same() -> None:
    pruned = model(two_of_four(64, 128)).cuda()
    rows = torch.randn(64, 128, device="cuda")
    with torch.no_grad():
        assert torch.allclose(accelerated(pruned)(rows), HalfPrecision(pruned.half())(rows), atol=1e-2)


def test_fetched_and_loaded(tmp_path: Path) -> None:
    spec = StudySpec(
        name="two-of-four",
        task="digits",
        trials=1,
        sampler="grid",
        train={"epochs": 1, "retrain_epochs": 1},
        space={"structure": "2:4"},
    )
    study = Study(spec, tmp_path / "store")
    assert study.run(LocalPool()).done == 1
    folder = study.fetch(None, tmp_path / "out")
    card = json.loads((folder / "card.json").read_text())
    assert (
        card["certificate"]["2:4"] == 0 and card["certificate"]["accuracy"]["2:4"] == card["measures"]["test_accuracy"]
    )
    assert "Its 2:4 layers are packed too, but not run so on this device" in card["says"]
    assert card["bytes"]["two_of_four"] < 0.6 * card["bytes"]["weights"]
    plain, packed = load(folder), load(folder, format="2:4")
    assert all(torch.equal(packed.get_parameter(name), value) for name, value in plain.named_parameters())
