"""The built-in architectures: their shapes and sizes, what of them can be pruned, and that they learn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from orchestrator import Study, StudySpec
from orchestrator.pools.local import LocalPool
from orchestrator.tasks import digits, mnist1d
from orchestrator.tasks.load import load
from orchestrator.tasks.models import IMAGE_MODELS, LSTM, ResNet, TiedTokens, Transformer, conv_1d, image_model
from orchestrator.tasks.source import collect

NEW = ("resnet", "depthwise", "transformer", "lstm", "tied")


def built(name: str, side: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return image_model(name, side, 300)()


def layers(**params: str) -> list[str]:
    return [layer.name for layer in load(collect("digits", Path()), params).info.layers]


@pytest.mark.parametrize("side", [8, 28])
@pytest.mark.parametrize("name", NEW)
def test_images_of_either_side_become_ten_outputs(name: str, side: int) -> None:
    outputs = built(name, side)(torch.rand(3, 1, side, side))
    assert outputs.shape == (3, 10) and torch.isfinite(outputs).all()


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (ResNet(), 77_754),
        (image_model("depthwise", 8, 0)(), 9_034),
        (Transformer(8, 8), 18_026),
        (Transformer(28, 28), 19_306),
        (LSTM(8, 8), 19_594),
        (LSTM(28, 28), 24_714),
        (TiedTokens(64), 33_568),
        (TiedTokens(784), 402_208),
        (conv_1d(), 5_210),
    ],
)
def test_sizes_are_those_in_the_docstrings(model: nn.Module, parameters: int) -> None:
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert f"{parameters:,}" in (type(model).__doc__ or "") or isinstance(model, nn.Sequential)


@pytest.mark.parametrize("name", NEW)
def test_every_new_model_learns_sixty_four_digits_by_heart(name: str) -> None:
    images, targets = (part[:64] for part in digits.task(model=name).train)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = built(name, 8)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(model(images), targets).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    assert (model(images).argmax(dim=1) == targets).float().mean() > 0.95


def test_signals_are_sequences_too() -> None:
    task = mnist1d.task(model="transformer")
    assert task.model()(task.train[0][:3]).shape == (3, 10)


def test_a_block_that_halves_the_side_has_a_convolution_beside_it() -> None:
    model = ResNet()
    assert len(model.block1.shortcut) == 0
    assert model.block2.shortcut.get_submodule("conv").weight.shape == (32, 16, 1, 1)
    assert model.block2(torch.rand(2, 16, 8, 8)).shape == (2, 32, 4, 4)


def test_a_depthwise_layer_has_a_filter_for_each_channel() -> None:
    weight = built("depthwise", 8).get_parameter("separable2.depthwise.weight")
    assert weight.shape == (32, 1, 3, 3)


def test_batch_norms_and_positions_are_not_pruned() -> None:
    assert not [name for name in layers(model="resnet") if "norm" in name]
    assert layers(model="transformer")[:3] == [
        "embed.weight",
        "layer1.self_attn.in_proj_weight",
        "layer1.self_attn.out_proj.weight",
    ]


def test_an_lstm_s_own_weights_are_pruned() -> None:
    assert layers(model="lstm") == ["lstm.weight_ih_l0", "lstm.weight_hh_l0", "out.weight"]


def test_tied_weights_are_one_tensor_and_are_pruned_once() -> None:
    model = built("tied", 8)
    assert model.get_parameter("out.weight") is model.get_parameter("embedding.weight")
    assert layers(model="tied") == ["embedding.weight", "fc1.weight", "fc2.weight"]


def test_a_pixel_is_read_as_the_nearest_of_seventeen_shades() -> None:
    model = built("tied", 8)
    shades = torch.linspace(0, 1, 17).repeat(4)[:64].reshape(1, 1, 8, 8)
    assert torch.equal(model(shades), model((shades + 0.02).clamp(max=1)))
    assert not torch.equal(model(shades), model((shades + 0.04).clamp(max=1)))


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_a_study_prunes_every_model(name: str, tmp_path: Path) -> None:
    size = 28 if name == "lenet-conv" else 8
    spec = StudySpec(
        name="zoo",
        task="digits",
        trials=1,
        sampler="random",
        task_params={"model": name, "size": size},
        train={"epochs": 0.25, "retrain_epochs": 0.25, "batch_size": 64, "lr": 0.01},
        space={"criterion": "magnitude", "scope": "global", "sparsity": 0.5, "retrain": "finetune"},
    )
    study = Study(spec, tmp_path / "store")
    assert study.run(LocalPool()).done == 1
    point = study.front().points[0]
    assert point["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert point["flops_effective"] < point["flops"]
