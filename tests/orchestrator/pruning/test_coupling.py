"""What goes together is found, and what cannot go is refused with the reason."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from orchestrator.pruning import coupling
from orchestrator.pruning.coupling import Found, find_units
from orchestrator.pruning.structure import Slice, Units
from orchestrator.tasks import models
from orchestrator.tasks.data import Nested


def rows(*shape: int) -> Tensor:
    """Gaussian numbers, the same in every run."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Named layers and a function of (layers, inputs) as the forward pass."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def chain(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def found(model: nn.Module, example: Nested, structure: str = "channel") -> Found:
    torch.manual_seed(0)
    return find_units(model, example, structure, [name for name, p in model.named_parameters() if p.dim() > 1])


def owners(units: Units) -> dict[tuple[str, int], list[int]]:
    return {(piece.tensor, piece.dim): piece.owner.tolist() for piece in units.slices}


def roles(units: Units) -> dict[str, str]:
    return {piece.tensor: piece.role for piece in units.slices}


def test_a_neuron_owns_its_row_its_bias_and_the_column_that_reads_it() -> None:
    units, refused = found(models.mlp(3, 2, 2), torch.zeros(1, 3), "neuron").units, None
    assert [group.name for group in units] == ["fc1.weight"]
    assert owners(units[0]) == {("fc1.weight", 0): [0, 1], ("fc1.bias", 0): [0, 1], ("out.weight", 1): [0, 1]}
    assert roles(units[0]) == {"fc1.weight": "makes", "fc1.bias": "makes", "out.weight": "reads"}
    assert refused is None


def test_the_output_layer_is_refused() -> None:
    assert found(models.mlp(3, 2, 2), torch.zeros(1, 3)).refused == {"out.weight": "it feeds the model's output"}


def test_batch_norm_goes_with_the_channel_it_normalises() -> None:
    model = chain(
        conv=nn.Conv2d(1, 2, 3, bias=False), norm=nn.BatchNorm2d(2), flatten=nn.Flatten(), out=nn.Linear(8, 2)
    )
    (units,) = found(model, torch.zeros(1, 1, 4, 4)).units
    assert roles(units) == {
        "conv.weight": "makes",
        "norm.weight": "norm",
        "norm.bias": "norm",
        "norm.running_mean": "buffer",
        "norm.running_var": "buffer",
        "out.weight": "reads",
    }
    assert owners(units)["out.weight", 1] == [0, 0, 0, 0, 1, 1, 1, 1], "a channel is flattened to several columns"


@pytest.mark.parametrize("steps", [2, 3], ids=["as many steps as units", "more steps than units"])
def test_flattened_steps_repeat_the_units(steps: int) -> None:
    layers = {"each": nn.Linear(2, 3), "flatten": nn.Flatten(), "fc": nn.Linear(3 * steps, 2), "out": nn.Linear(2, 2)}
    units = found(chain(**layers), rows(1, steps, 2)).units[0]
    assert owners(units)["fc.weight", 1] == [0, 1, 2] * steps


def test_flattened_embeddings_repeat_their_width() -> None:
    model = chain(words=nn.Embedding(9, 2), flatten=nn.Flatten(), out=nn.Linear(6, 2))
    (units,) = found(model, torch.tensor([[1, 2, 3]])).units
    assert owners(units) == {("words.weight", 1): [0, 1], ("out.weight", 1): [0, 1, 0, 1, 0, 1]}


def test_a_residual_sum_ties_what_it_adds() -> None:
    found_units = found(models.ResNet(channels=2), rows(1, 1, 4, 4)).units
    by_name = {group.name: set(roles(group)) for group in found_units}
    assert list(by_name) == [
        "conv.weight",
        "block1.conv1.weight",
        "block2.conv1.weight",
        "block2.conv2.weight",
        "block3.conv1.weight",
        "block3.conv2.weight",
    ]
    assert {"conv.weight", "block1.conv2.weight", "block2.shortcut.conv.weight"} <= by_name["conv.weight"]
    assert {"block3.conv2.weight", "block3.shortcut.conv.weight", "out.weight"} <= by_name["block3.conv2.weight"]


def test_what_is_concatenated_stays_apart() -> None:
    model = Net(
        lambda net, x: net.out(net.norm(torch.cat([net.a(x), net.b(x)], dim=1)).mean((2, 3))),
        a=nn.Conv2d(1, 2, 3),
        b=nn.Conv2d(1, 1, 3),
        c=nn.Conv2d(1, 3, 3),
        norm=nn.BatchNorm2d(3),
        out=nn.Linear(3, 2),
    )
    result = found(model, rows(1, 1, 4, 4))
    (units,) = result.units
    assert owners(units)["norm.weight", 0] == owners(units)["out.weight", 1] == [0, 1, -1]
    assert result.refused["b.weight"] == "it has a single unit"
    assert result.refused["c.weight"] == "nothing was seen to pass through it"


def test_a_depthwise_channel_is_the_channel_it_filters() -> None:
    model = models.depthwise_separable(channels=2)
    units = found(model, rows(1, 1, 8, 8)).units[0]
    assert roles(units)["separable1.depthwise.weight"] == roles(units)["conv.weight"] == "makes"
    assert owners(units)["separable1.depthwise.weight", 0] == owners(units)["conv.weight", 0] == [0, 1]


@pytest.mark.parametrize(("width", "into"), [(1, 1), (1, 2), (2, 1), (2, 3)])
@pytest.mark.parametrize("turned", [False, True], ids=["convolution", "transposed"])
def test_of_a_grouped_convolution_a_unit_is_a_group(width: int, into: int, turned: bool) -> None:
    kind = nn.ConvTranspose1d if turned else nn.Conv1d
    model = chain(
        first=nn.Conv1d(2, 4 * width, 1),
        grouped=kind(4 * width, 4 * into, 2, groups=4),
        out=nn.Conv1d(4 * into, 2, 1),
    )
    result = found(model, rows(1, 2, 5))
    if not result.units:  # Torch-Pruning takes a convolution with one output a group for a depthwise one
        assert (width, into) == (2, 1) and result.refused["first.weight"] == (
            f"its units pass through the {kind.__name__} 'grouped'"
        )
        return
    (units,) = result.units
    assert units.count == 4
    assert owners(units)["first.weight", 0] == [group for group in range(4) for _ in range(width)]
    assert owners(units)["out.weight", 1] == [group for group in range(4) for _ in range(into)]


def test_a_transposed_convolution_makes_along_its_second_dimension() -> None:
    model = chain(conv=nn.Conv2d(1, 2, 1), up=nn.ConvTranspose2d(2, 3, 2), out=nn.Conv2d(3, 2, 1))
    conv, up = found(model, rows(1, 1, 3, 3), "filter").units
    assert owners(conv)["up.weight", 0] == [0, 1]
    assert owners(up) == {("up.weight", 1): [0, 1, 2], ("up.bias", 0): [0, 1, 2], ("out.weight", 1): [0, 1, 2]}


def test_halves_that_are_multiplied_are_one() -> None:
    model = Net(lambda net, x: net.out(F.glu(net.gated(x))), gated=nn.Linear(2, 4), out=nn.Linear(2, 2))
    chunked = Net(
        lambda net, x: net.out(torch.mul(*net.gated(x).chunk(2, dim=1))), gated=nn.Linear(2, 4), out=nn.Linear(2, 2)
    )
    assert owners(found(chunked, rows(1, 2)).units[0])["gated.weight", 0] == [0, 1, 0, 1]
    assert "gated.weight" in found(model, rows(1, 2)).refused


def test_a_layer_that_is_called_twice_ties_its_inputs_to_its_outputs() -> None:
    model = Net(
        lambda net, x: net.out(net.again(net.again(net.first(x)).relu())),
        first=nn.Linear(2, 3),
        again=nn.Linear(3, 3),
        out=nn.Linear(3, 2),
    )
    (units,) = found(model, rows(1, 2)).units
    assert owners(units)["again.weight", 0] == owners(units)["again.weight", 1] == [0, 1, 2]


def tied() -> Net:
    """Tokens' mean through a layer to the words again, by the same matrix."""
    model = Net(
        lambda net, tokens: net.out(net.fc(net.words(tokens).mean(dim=1)).relu()),
        words=nn.Embedding(7, 3),
        fc=nn.Linear(3, 3),
        out=nn.Linear(3, 7, bias=False),
    )
    model.get_submodule("out").weight = model.get_parameter("words.weight")
    return model


def test_a_tied_matrix_is_cut_once_under_its_first_name() -> None:
    (units,) = found(tied(), torch.tensor([[1, 2]])).units
    assert owners(units) == {
        ("words.weight", 1): [0, 1, 2],
        ("fc.weight", 0): [0, 1, 2],
        ("fc.weight", 1): [0, 1, 2],
        ("fc.bias", 0): [0, 1, 2],
    }
    assert roles(units)["words.weight"] == "makes"


def test_words_are_no_units_where_an_embedding_looks_them_up() -> None:
    model = tied()
    after = chain(relu=nn.ReLU(), out=nn.Linear(7, 2))
    result = found(
        Net(lambda net, tokens: net.after(net.tied(tokens)), tied=model, after=after), torch.tensor([[1, 2]])
    )
    assert [(group.name, group.count) for group in result.units] == [("tied.words.weight", 3)]
    assert {place[1] for place in owners(result.units[0]) if place[0] == "tied.words.weight"} == {1}


def test_neurons_that_are_tied_to_another_kind_of_layer_are_channels() -> None:
    assert found(tied(), torch.tensor([[1, 2]]), "neuron").refused["fc.weight"] == (
        "its units are tied to those of 'words.weight': these are channels"
    )


def encoder() -> Net:
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=3, batch_first=True)
    return Net(
        lambda net, tokens: net.out(net.encoder(net.words(tokens)).mean(dim=1)),
        words=nn.Embedding(7, 4),
        encoder=nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        out=nn.Linear(4, 2),
    )


def test_of_a_transformer_the_inner_neurons_go_and_the_stream_stays() -> None:
    result = found(encoder(), torch.tensor([[1, 2, 3]]))
    assert [group.name for group in result.units] == [f"encoder.layers.{i}.linear1.weight" for i in range(2)]
    stream = "the LayerNorm 'encoder.layers.0.norm1' normalises its units together"
    attention = "encoder.layers.{}.self_attn"
    assert result.refused == {
        "words.weight": stream,
        "encoder.layers.0.linear2.weight": stream,
        "encoder.layers.1.linear2.weight": stream,
        **{
            f"{attention.format(i)}.out_proj.weight": f"it is a part of the MultiheadAttention {attention.format(i)!r}"
            for i in range(2)
        },
        "out.weight": "it feeds the model's output",
    }


def normed(norm: nn.Module) -> nn.Sequential:
    return chain(
        conv=nn.Conv2d(1, 4, 3), norm=norm, pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), out=nn.Linear(4, 2)
    )


def baked(net: Any, images: Tensor) -> Any:
    return net.out(net.conv(images).view(-1, 16))


def lstm(net: Any, rows: Tensor) -> Any:
    return net.out(net.lstm(net.fc(rows))[0][:, -1])


IMAGE = rows(1, 1, 4, 4)
CONV = partial(nn.Conv2d, 1, 4, 3)


@pytest.mark.parametrize(
    ("model", "example", "layer", "reason"),
    [
        (normed(nn.GroupNorm(2, 4)), IMAGE, "conv", "the GroupNorm 'norm' normalises its units together"),
        (normed(nn.LocalResponseNorm(2)), IMAGE, "conv", "the LocalResponseNorm 'norm' normalises its units together"),
        (chain(fc=nn.Linear(2, 4), norm=nn.RMSNorm(4), out=nn.Linear(4, 2)), rows(1, 2), "fc", "the RMSNorm"),
        (Net(lambda n, x: n.out(F.layer_norm(n.fc(x), (3,))), fc=nn.Linear(2, 3), out=nn.Linear(3, 2)), rows(1, 2), "fc", "a layer norm normalises its units together"),
        (Net(lambda n, x: n.out(n.fc(x).softmax(-1)), fc=nn.Linear(2, 3), out=nn.Linear(3, 2)), rows(1, 2), "fc", "a softmax mixes its units"),
        (Net(lambda n, x: n.out(x + n.fc(x)), fc=nn.Linear(3, 3), out=nn.Linear(3, 2)), rows(1, 3), "fc", "its units are tied to the model's input"),
        (chain(conv=nn.Conv2d(3, 3, 1, groups=3), pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), out=nn.Linear(3, 2)), rows(1, 3, 2, 2), "conv", "its units are tied to the model's input"),
        (Net(lstm, fc=nn.Linear(2, 3), lstm=nn.LSTM(3, 2, batch_first=True), out=nn.Linear(2, 2)), rows(1, 4, 2), "fc", "its units pass through the LSTM 'lstm'"),
        (Net(baked, conv=CONV(), out=nn.Linear(16, 2)), IMAGE, "conv", "at 'out', it does not take the narrower tensors"),
        (Net(lambda n, x: n.out(n.fc(x).sort(dim=1).values), fc=nn.Linear(2, 3), out=nn.Linear(3, 2)), rows(1, 2), "fc", "at 'out', its outputs differ"),
        (Net(lambda n, x: n.out(n.fc(x) + torch.arange(4.0)), fc=nn.Linear(2, 4), out=nn.Linear(4, 2)), rows(1, 2), "fc", "at 'fc', it does not take"),
        (chain(fc=parametrizations.weight_norm(nn.Linear(2, 3)), out=nn.Linear(3, 2)), rows(1, 2), "fc", "its weight is parametrised"),
        (Net(lambda n, x: n.out(x.new_tensor(n.fc(x).tolist())), fc=nn.Linear(2, 3), out=nn.Linear(3, 2)), rows(1, 2), "fc", "nothing was seen to pass through it"),
        (Net(lambda n, x: n.out(n.missing), fc=nn.Linear(2, 3), out=nn.Linear(3, 2)), rows(1, 2), "fc", "the model cannot be traced ('Net' object has no attribute 'missing')"),
    ],
)  # fmt: skip
def test_what_cannot_go_is_refused_with_the_reason(model: nn.Module, example: Tensor, layer: str, reason: str) -> None:
    result = found(model, example)
    assert not result.units
    assert reason in result.refused[f"{layer}.weight"]


class Odd(nn.Linear):
    """Does with its weight what nobody can know."""


def test_a_layer_that_no_refit_is_known_for_is_refused() -> None:
    result = found(chain(fc=Odd(2, 3), out=nn.Linear(3, 2)), rows(1, 2))
    assert "at 'fc', no refit is known for Odd" in result.refused["fc.weight"]


def test_one_bad_group_does_not_take_the_others_with_it() -> None:
    def forward(net: Any, x: Tensor) -> Any:
        return net.out(net.c(net.b(net.a(x).relu()).sort(dim=1).values).relu())

    layers = {"a": nn.Linear(2, 3), "b": nn.Linear(3, 4), "c": nn.Linear(4, 3), "out": nn.Linear(3, 2)}
    result = found(Net(forward, **layers), rows(1, 2))
    assert [group.name for group in result.units] == ["a.weight", "c.weight"]
    assert sorted(result.refused) == ["b.weight", "out.weight"]


def test_a_protected_layer_keeps_its_units_but_not_its_columns() -> None:
    result = find_units(models.mlp(2, 3, 3, 2), rows(1, 2), "neuron", ["fc1.weight"])
    assert [group.name for group in result.units] == ["fc1.weight"]
    assert roles(result.units[0])["fc2.weight"] == "reads"
    assert result.refused["fc2.weight"] == "'fc2.weight', which makes its units, is not prunable"


def test_a_broadcast_gate_is_no_unit_of_what_it_scales() -> None:
    model = Net(
        lambda net, x: net.out((net.conv(x) * net.gate(x).sigmoid()).mean((2, 3))),
        conv=nn.Conv2d(1, 3, 3),
        gate=nn.Conv2d(1, 1, 3),
        out=nn.Linear(3, 2),
    )
    result = found(model, IMAGE)
    assert [group.name for group in result.units] == ["conv.weight"]
    assert result.refused["gate.weight"] == "it has a single unit"


def test_several_inputs_and_outputs_by_keyword() -> None:
    model = Net(
        lambda net, one, two: {"sum": net.out(net.a(one) + net.b(two)), "own": net.more(net.a(one))},
        a=nn.Linear(2, 3),
        b=nn.Linear(1, 3),
        out=nn.Linear(3, 2),
        more=nn.Linear(3, 2),
    )
    result = found(model, {"one": rows(1, 2), "two": rows(1, 1)})
    assert [group.name for group in result.units] == ["a.weight"]
    assert {"a.weight", "b.weight", "out.weight", "more.weight"} <= set(roles(result.units[0]))
    assert sorted(result.refused) == ["more.weight", "out.weight"]


def test_every_position_that_makes_units_has_an_owner() -> None:
    for group in found(models.ResNet(channels=3), rows(1, 1, 4, 4)).units:
        for piece in group.slices:
            if piece.role == "makes":
                assert sorted(set(piece.owner.tolist())) == list(range(group.count))


def test_the_model_stays_as_it_is() -> None:
    model = models.ResNet(channels=2).train()
    before = copy.deepcopy(model.state_dict())
    frozen = model.conv.weight.requires_grad_(False)
    found(model, rows(1, 1, 4, 4))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training and model.norm.training and not frozen.requires_grad
    assert not any(module._forward_hooks for module in model.modules())


def test_the_same_units_are_found_each_time_and_without_gradients() -> None:
    first = found(models.lenet_conv(), torch.zeros(1, 1, 28, 28))
    with torch.no_grad():
        second = found(models.lenet_conv(), torch.zeros(1, 1, 28, 28))
    assert [group.name for group in first.units] == ["conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight"]
    assert [owners(group) for group in first.units] == [owners(group) for group in second.units]


class Counted(nn.ReLU):
    """An activation of which every copy is known."""

    alive: ClassVar[weakref.WeakSet[Counted]] = weakref.WeakSet()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        Counted.alive.add(self)


def test_nothing_that_was_copied_lives_on() -> None:
    model = chain(fc=nn.Linear(2, 3), relu=Counted(), out=nn.Linear(3, 2))
    assert found(model, rows(1, 2)).units
    gc.collect()
    assert len(Counted.alive) == 0


def test_a_wrong_owner_does_not_pass_the_proof() -> None:
    model = models.mlp(2, 4, 2)
    (units,) = found(model, rows(1, 2)).units
    turned = tuple(
        Slice(tensor=s.tensor, dim=s.dim, owner=s.owner.flip(0) if s.role == "reads" else s.owner, role=s.role)
        for s in units.slices
    )
    wrong = Units(name=units.name, count=units.count, slices=turned)
    kept, changed = coupling._Proof(model, rows(1, 2)).split([wrong])
    assert kept == [] and "at 'out', its outputs differ" in changed["fc1.weight"]
