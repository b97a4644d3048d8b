"""Constants go where they are read, or the layer that cannot take them is named."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from orchestrator.pruning.attention import find_heads
from orchestrator.pruning.coupling import find_units
from orchestrator.pruning.structure import Units, without
from orchestrator.removal.folding import fold, fold_removed
from orchestrator.removal.proof import ShrinkRefused
from orchestrator.removal.shrinking import masked_copy, shrink
from orchestrator.tasks import models


def rows(*shape: int) -> Tensor:
    """Gaussian numbers, the same in every run."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def chain(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def convolutions(reader: Callable[[], nn.Module]) -> nn.Sequential:
    first = {"conv": nn.Conv2d(1, 4, 3, padding=1), "norm": nn.BatchNorm2d(4), "act": nn.Softplus()}
    last = {"pool": nn.AdaptiveAvgPool2d(2), "flatten": nn.Flatten(), "out": nn.Linear(12, 2)}
    return chain(**first, reader=reader(), **last)


IMAGE = rows(1, 1, 6, 6)
NETWORKS: Mapping[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mlp": (lambda: models.mlp(3, 5, 4, 2), rows(1, 3)),
    "without padding": (lambda: convolutions(lambda: nn.Conv2d(4, 3, 3)), IMAGE),
    "wrapped around": (lambda: convolutions(lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular")), IMAGE),
    "flattened": (lambda: chain(conv=nn.Conv1d(1, 4, 2), act=nn.Sigmoid(), flat=nn.Flatten(), out=nn.Linear(12, 2)), rows(1, 1, 4)),
    "depthwise": (lambda: chain(conv=nn.Conv1d(1, 4, 1), act=nn.ReLU(), deep=nn.Conv1d(4, 4, 3, groups=4, padding=1), out=nn.Conv1d(4, 2, 2)), rows(1, 1, 5)),
    "residual": (lambda: models.Transformer(2, 3, features=8), rows(1, 6)),
}  # fmt: skip


def drawn(model: nn.Module) -> nn.Module:
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    return model


def weights_only(units: Sequence[Units], model: nn.Module, gone: Callable[[Units], Tensor]) -> dict[str, Tensor]:
    """Masks of the weights that make some units, and of nothing else."""
    masks = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in model.named_parameters() if p.dim() > 1}
    for group in units:
        dead = gone(group)
        for piece in group.slices:
            if piece.role == "makes" and piece.tensor in masks:
                masks[piece.tensor].movedim(piece.dim, 0)[dead[piece.owner] & (piece.owner >= 0)] = False
    return masks


def found(model: nn.Module, example: Tensor) -> tuple[Units, ...]:
    return find_units(model, example, "channel", [name for name, p in model.named_parameters() if p.dim() > 1]).units


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_folded_and_shrunk_is_masked(name: str, seed: int) -> None:
    build, example = NETWORKS[name]
    model, example = drawn(build()).double().eval(), example.double()
    units = found(model, example)
    draw = torch.Generator().manual_seed(seed)

    def gone(group: Units) -> Tensor:
        return (torch.rand(group.count, generator=draw) < 0.5).index_fill(0, torch.tensor([seed % group.count]), False)

    masks = weights_only(units, model, gone)
    folded, after = fold(model, masks, units, example)
    small = shrink(folded, after, units, example).model
    inputs = torch.cat([example, -2 * example])
    expected = masked_copy(model, masks)(inputs)
    assert (small(inputs) - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_a_number_moves_into_the_bias_by_eye() -> None:
    model = models.mlp(1, 2, 1)
    with torch.no_grad():
        model.get_parameter("fc1.bias").copy_(torch.tensor([3.0, 5.0]))
        model.get_parameter("out.weight").copy_(torch.tensor([[10.0, 100.0]]))
    units = found(model, rows(1, 1))
    masks = {"fc1.weight": torch.tensor([[False], [True]])}
    folded, after = fold(model, masks, units, rows(1, 1))
    assert folded.get_parameter("out.bias").tolist() == [30.0]
    assert model.get_parameter("out.bias").tolist() == [0.0], "the model given stays as it is"
    assert after["fc1.bias"].tolist() == [False, True]
    assert after["out.weight"].tolist() == [[False, True]]


def test_living_units_are_left_alone() -> None:
    model = drawn(models.mlp(3, 4, 2))
    units = found(model, rows(1, 3))
    masks = {"fc1.weight": torch.eye(4, 3, dtype=torch.bool)}
    masks["fc1.weight"][3, 0] = True
    folded, after = fold(model, masks, units, rows(1, 3))
    before = model.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in folded.state_dict().items())
    assert all(mask.all() for name, mask in after.items() if name != "fc1.weight")


def refusal(model: nn.Module, example: Tensor = IMAGE, units: Sequence[Units] | None = None) -> ShrinkRefused:
    units = found(model, example)[:1] if units is None else units
    masks = weights_only(units, model, lambda group: torch.arange(group.count) == 1)
    with pytest.raises(ShrinkRefused) as caught:
        fold(model, masks, units, example)
    return caught.value


def test_zero_padding_is_refused() -> None:
    error = refusal(drawn(convolutions(lambda: nn.Conv2d(4, 3, 3, padding=1))))
    assert error.layer == "reader" and "it pads with zeros" in error.reason


def test_zero_padding_does_no_harm_to_a_zero() -> None:
    model = drawn(chain(conv=nn.Conv2d(1, 4, 3), relu=nn.ReLU(), reader=nn.Conv2d(4, 2, 3, padding=1)))
    with torch.no_grad():
        model.get_parameter("conv.bias").fill_(-1)
    units = found(model, IMAGE)[:1]
    masks = weights_only(units, model, lambda group: torch.arange(group.count) == 1)
    folded, after = fold(model, masks, units, IMAGE)
    assert shrink(folded, after, units, IMAGE).model.get_submodule("conv").out_channels == 3


def test_a_reader_without_a_bias_is_refused() -> None:
    error = refusal(drawn(convolutions(lambda: nn.Conv2d(4, 3, 3, bias=False))))
    assert error.layer == "reader" and "it has no bias" in error.reason


def test_a_transposed_reader_is_refused() -> None:
    error = refusal(drawn(convolutions(lambda: nn.ConvTranspose2d(4, 3, 3))))
    assert error.layer == "reader" and "transposed" in error.reason


class Ramp(nn.Module):
    """Adds to each pixel its place."""

    def forward(self, images: Tensor) -> Tensor:
        return images * torch.arange(images.shape[-1], dtype=images.dtype)


def test_what_is_not_constant_is_refused() -> None:
    error = refusal(drawn(chain(conv=nn.Conv2d(1, 4, 3), ramp=Ramp(), reader=nn.Conv2d(4, 2, 3))))
    assert error.layer == "reader" and "do not give it a constant" in error.reason


def test_the_same_model_folds_to_the_same_biases() -> None:
    build, example = NETWORKS["without padding"]
    model = drawn(build())
    units = found(model, example)
    masks = weights_only(units, model, lambda group: torch.arange(group.count) == 1)
    one, two = (fold(copy.deepcopy(model), masks, units, example)[0].state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


class Attending(nn.Module):
    """Attention from a sequence to itself, with biases that say something."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 4, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.attention(tokens, tokens, tokens)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("build", [Attending, lambda: nn.TransformerEncoderLayer(8, 4, 12, batch_first=True)])
def test_a_head_without_weights_gives_the_bias_of_its_values(build: Callable[[], nn.Module]) -> None:
    model, example = drawn(build()).double().eval(), rows(1, 5, 8).double()
    units = find_heads(model, [name for name, _ in model.named_parameters()]).units
    masks = weights_only(units, model, lambda group: torch.arange(group.count) % 2 == 1)
    folded, after = fold(model, masks, units, example)
    small = shrink(folded, after, units, example).model
    inputs = torch.cat([example, -2 * example])
    expected = masked_copy(model, masks)(inputs)
    assert (small(inputs) - expected).abs().max() <= 1e-12 * expected.abs().max()
    plain = shrink(model, after, units, example).model
    assert (plain(inputs) - expected).abs().max() > 0.1, "without folding the biases of dead heads are lost"


def removed(units: Sequence[Units], model: nn.Module, gone: int) -> dict[str, Tensor]:
    """Masks without the first units of every group."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return without([(group, torch.arange(group.count) >= gone) for group in units], {}, shapes)


@pytest.mark.parametrize("name", ["mlp", "without padding", "flattened"])
def test_unit_after_unit_is_folded(name: str) -> None:
    build, example = NETWORKS[name]
    model, example = drawn(build()).double().eval(), example.double()
    units = found(model, example)
    first, second = removed(units, model, 1), removed(units, model, 2)
    once = fold_removed(model, {}, first, units, example)
    twice = fold_removed(masked_copy(once, first), first, second, units, example)
    weights = weights_only(units, model, lambda group: torch.arange(group.count) == 0)
    inputs = torch.cat([example, -2 * example])
    expected = masked_copy(model, weights)(inputs)
    assert (masked_copy(once, first)(inputs) - expected).abs().max() <= 1e-12 * expected.abs().max()
    made = {n: mask & first[n] for n, mask in weights_only(units, model, lambda g: torch.arange(g.count) < 2).items()}
    left = {n: made.get(n, mask) for n, mask in first.items()}
    expected = masked_copy(once, left)(inputs)
    assert (masked_copy(twice, second)(inputs) - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_what_went_before_is_read_no_more() -> None:
    """A unit that is gone gives softplus(0) for ever; behind padding that would be refused, did anything read it."""
    model = drawn(convolutions(lambda: nn.Conv2d(4, 3, 3, padding=1)))
    units = found(model, IMAGE)[:1]
    gone = removed(units, model, 1)
    again = fold_removed(masked_copy(model, gone), gone, gone, units, IMAGE)
    assert all(
        torch.equal(one, two)
        for one, two in zip(again.parameters(), masked_copy(model, gone).parameters(), strict=True)
    )
