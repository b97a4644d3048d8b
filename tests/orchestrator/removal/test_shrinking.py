"""What is masked is removed, and what is left computes the same, or nothing is handed out."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from orchestrator.errors import StageFailed
from orchestrator.pruning.coupling import find_units
from orchestrator.pruning.finding import find
from orchestrator.pruning.structure import Slice, Units, without
from orchestrator.removal.shrinking import ShrinkRefused, Shrunk, narrow, scatter, shrink
from orchestrator.tasks import models
from orchestrator.tasks.data import Nested, call, transform

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


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


def conv_flatten() -> nn.Module:
    return chain(
        conv=nn.Conv2d(2, 4, 3), act=nn.Sigmoid(), flatten=nn.Flatten(), fc=nn.Linear(36, 5), out=nn.Linear(5, 3)
    )


def residual() -> nn.Module:
    return Net(
        lambda net, x: net.out((net.norm2(net.b(net.norm1(net.a(x)).relu())) + net.a(x)).sigmoid().mean((2, 3))),
        a=nn.Conv2d(1, 4, 3),
        norm1=nn.BatchNorm2d(4),
        b=nn.Conv2d(4, 4, 3, padding=1),
        norm2=nn.BatchNorm2d(4),
        out=nn.Linear(4, 2),
    )


def concatenated() -> nn.Module:
    return Net(
        lambda net, x: net.out(net.last(net.norm(torch.cat([net.a(x), net.b(x), net.a(x)], dim=1)).relu()).flatten(1)),
        a=nn.Conv1d(2, 3, 2),
        b=nn.Conv1d(2, 4, 2),
        norm=nn.BatchNorm1d(10),
        last=nn.Conv1d(10, 3, 2),
        out=nn.Linear(9, 2),
    )


def separable() -> nn.Module:
    return chain(
        conv=nn.Conv2d(1, 4, 3),
        prelu=nn.PReLU(4),
        wide=nn.Conv2d(4, 8, 3, groups=4, padding=1),
        norm=nn.InstanceNorm2d(8),
        relu=nn.ReLU(),
        point=nn.Conv2d(8, 3, 1),
        bare=nn.BatchNorm2d(3, affine=False),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        out=nn.Linear(3, 2),
    )


def grouped() -> nn.Module:
    return chain(
        first=nn.Conv1d(1, 8, 2),
        middle=nn.Conv1d(8, 12, 2, groups=4),
        norm=nn.BatchNorm1d(12),
        up=nn.ConvTranspose1d(12, 8, 2, groups=4),
        again=nn.ConvTranspose1d(8, 3, 2),
        out=nn.Conv1d(3, 2, 1),
    )


def transposed() -> nn.Module:
    return chain(
        down=nn.Conv2d(1, 4, 3),
        norm=nn.BatchNorm2d(4),
        up=nn.ConvTranspose2d(4, 3, 3, bias=False),
        relu=nn.ReLU(),
        each=nn.ConvTranspose2d(3, 3, 2, groups=3),
        out=nn.Conv2d(3, 1, 1),
    )


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=6, batch_first=True)
    return Net(
        lambda net, tokens: net.out(net.encoder(net.words(tokens)).mean(dim=1)),
        words=nn.Embedding(7, 4),
        encoder=nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        out=nn.Linear(4, 2),
    )


def tied() -> nn.Module:
    model = Net(
        lambda net, tokens: net.out(net.fc(net.words(tokens).mean(dim=1)).sigmoid() * net.words(tokens[:, 0])),
        words=nn.Embedding(7, 4),
        fc=nn.Linear(4, 4),
        out=nn.Linear(4, 7, bias=False),
    )
    model.get_submodule("out").weight = model.get_parameter("words.weight")
    return model


def two_inputs() -> nn.Module:
    return Net(
        lambda net, left, right: {
            "logits": net.out((net.a(left) * net.b(right)).sigmoid()),
            "left": net.more(net.a(left)),
        },
        a=nn.Linear(2, 4),
        b=nn.Linear(3, 4),
        out=nn.Linear(4, 2),
        more=nn.Linear(4, 1),
    )


def squeeze_excite() -> nn.Module:
    def forward(net: Any, images: Tensor) -> Any:
        features = net.conv(images)
        gates = net.up(net.down(features.mean((2, 3))).relu()).sigmoid()
        return net.out((features * gates[:, :, None, None]).mean((2, 3)))

    layers = {"conv": nn.Conv2d(1, 4, 3), "down": nn.Linear(4, 3), "up": nn.Linear(3, 4), "out": nn.Linear(4, 2)}
    return Net(forward, **layers)


IMAGE, TOKENS = rows(1, 1, 5, 5), torch.tensor([[1, 5, 2], [0, 6, 3]])
NETWORKS: Mapping[str, tuple[Callable[[], nn.Module], Nested]] = {
    "mlp": (lambda: models.mlp(4, 6, 5, 3), rows(1, 4)),
    "convolution, flattened": (conv_flatten, rows(1, 2, 5, 5)),
    "residual sum": (residual, IMAGE),
    "concatenation": (concatenated, rows(1, 2, 5)),
    "depthwise": (separable, IMAGE),
    "groups": (grouped, rows(1, 1, 6)),
    "transposed": (transposed, IMAGE),
    "residual network": (lambda: models.ResNet(channels=3), rows(1, 1, 4, 4)),
    "separable network": (lambda: models.depthwise_separable(channels=3), rows(1, 1, 8, 8)),
    "1-D convolutions": (lambda: models.conv_1d(channels=4), rows(1, 40)),
    "transformer": (lambda: models.Transformer(2, 3, features=8), rows(1, 6)),
    "encoder, evaluated fast": (encoder, TOKENS),
    "tied": (tied, TOKENS),
    "tied tokens": (lambda: models.TiedTokens(6, features=3, hidden=5), rows(1, 6).sigmoid()),
    "two inputs": (two_inputs, {"left": rows(1, 2), "right": rows(1, 3)}),
    "squeeze and excite": (squeeze_excite, IMAGE),
}


def drawn(model: nn.Module) -> nn.Module:
    """Every parameter and running statistic from a random distribution: zero biases would hide forgotten ones."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(torch.rand(buffer.shape, generator=draw) + 0.5)
    return model


@cache
def network(name: str) -> tuple[nn.Module, tuple[Units, ...], Nested]:
    build, example = NETWORKS[name]
    model = drawn(build())
    prunable = [name for name, parameter in model.named_parameters() if parameter.dim() > 1]
    units = find_units(model, example, "channel", prunable).units
    assert units
    return model, units, example


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def random_masks(model: nn.Module, units: Sequence[Units], seed: int) -> dict[str, Tensor]:
    """Some units of each group gone, and a few single weights."""
    draw = torch.Generator().manual_seed(seed)
    kept = []
    for group in units:
        stays = torch.rand(group.count, generator=draw) < 0.6
        stays[torch.randint(group.count, (), generator=draw)] = True
        kept.append(stays)
    single = {name: torch.rand(shape, generator=draw) < 0.9 for name, shape in shapes(model).items() if len(shape) > 1}
    return without(zip(units, kept, strict=True), single, shapes(model))


def masked(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(masks.get(name, torch.ones(())))
    return model


def outputs(model: nn.Module, inputs: Nested) -> Tensor:
    with torch.no_grad():
        found = call(model.eval(), inputs)
    return torch.cat([part.flatten() for part in found.values()]) if isinstance(found, dict) else found


def doubled(value: Nested) -> Nested:
    return transform(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, value)


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_masked_is_shrunk(name: str, seed: int) -> None:
    model, units, example = network(name)
    masks = random_masks(model, units, seed)
    for dtype in (torch.float32, torch.float64):
        whole = copy.deepcopy(model).to(dtype)
        inputs = doubled(example) if dtype == torch.float64 else example
        small = shrink(whole, masks, units, inputs).model
        expected, found = outputs(masked(whole, masks), inputs), outputs(small, inputs)
        assert found.dtype == dtype and found.shape == expected.shape
        assert (found - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize("name", NETWORKS)
def test_what_was_removed_is_really_gone(name: str) -> None:
    model, units, example = network(name)
    masks = without([(group, torch.arange(group.count) % 2 == 0) for group in units], {}, shapes(model))
    small = shrink(model, masks, units, example).model
    expected = {name: int(masks[name].sum()) if name in masks else p.numel() for name, p in model.named_parameters()}
    assert {name: parameter.numel() for name, parameter in small.named_parameters()} == expected
    assert sum(expected.values()) < sum(parameter.numel() for parameter in model.parameters())
    assert not any(bool((parameter == 0).all()) for parameter in small.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_full_coordinates_come_back(name: str) -> None:
    model, units, example = network(name)
    masks = random_masks(model, units, 3)
    kept = shrink(model, masks, units, example).kept
    whole = masked(model, masks).state_dict()
    assert set(whole) <= set(kept)
    small = narrow(whole, kept)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in scatter(small, kept, whole).items())
    zeros = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    back = scatter(small, kept, zeros)
    for name in masks:
        assert torch.equal(back[name], whole[name]), "what was removed is zero"
    again = narrow(back, kept)
    assert all(torch.equal(again[name], small[name]) for name in small)
    shrunk_masks = narrow(masks, kept)
    dense = {name: torch.zeros_like(mask) for name, mask in masks.items()}
    assert all(torch.equal(mask, masks[name]) for name, mask in scatter(shrunk_masks, kept, dense).items())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_shrunk_model_holds_what_narrowing_gives(name: str) -> None:
    model, units, example = network(name)
    masks = random_masks(model, units, 4)
    result = shrink(model, masks, units, example)
    expected = narrow(masked(model, masks).state_dict(), result.kept)
    found = result.model.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_shrunk_model_is_copied_saved_and_trained_like_any_other(name: str) -> None:
    model, units, example = network(name)
    small = shrink(model, random_masks(model, units, 5), units, example).model
    other = drawn(copy.deepcopy(small))
    other.load_state_dict(small.state_dict())
    assert torch.equal(outputs(other, example), outputs(small, example))
    loss = call(small.eval(), example)
    sum(part.square().sum() for part in (loss.values() if isinstance(loss, dict) else [loss])).backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


def of_every_structure(model: nn.Module, example: Tensor) -> dict[str, tuple[Units, ...]]:
    names = [name for name, parameter in model.named_parameters() if parameter.dim() > 1]
    return {name: find(model, example, name, names).units for name in ("channel", "head", "layer")}


@pytest.mark.parametrize(
    ("build", "example", "structures"),
    [
        (lambda: models.Transformer(2, 3, features=8, heads=2), rows(1, 6), ["channel", "head", "layer"]),
        (lambda: models.ResNet(channels=3), rows(1, 1, 4, 4), ["channel", "layer"]),
        (lambda: models.LSTM(2, 3, units=5), rows(1, 6), ["channel"]),
    ],
    ids=["transformer", "residual network", "lstm"],
)
def test_heads_hidden_units_and_whole_layers_go_by_themselves_and_together(
    build: Callable[[], nn.Module], example: Tensor, structures: list[str]
) -> None:
    model = drawn(build())
    units = {name: found for name, found in of_every_structure(model, example).items() if found}
    assert list(units) == structures
    sizes = []
    for chosen in (*units.values(), sum(units.values(), ())):
        gone = [(group, torch.arange(group.count) != 1) for group in chosen]
        masks = without(gone, {}, shapes(model))
        result = shrink(model, masks, chosen, example)
        expected = outputs(masked(model, masks), example)
        assert (outputs(result.model, example) - expected).abs().max() <= 1e-5 * expected.abs().max()
        sizes.append(sum(parameter.numel() for parameter in result.model.parameters()))
        small, whole = result.model.state_dict(), masked(model, masks).state_dict()
        assert {name: tuple(map(len, result.kept[name])) for name in small} == {n: t.shape for n, t in small.items()}
        back = scatter(small, result.kept, whole)
        assert all(torch.equal(back[name], tensor) for name, tensor in whole.items())
    assert max(sizes) < sum(parameter.numel() for parameter in model.parameters())
    assert sizes[-1] == min(sizes)


def test_numbers_pass_through() -> None:
    kept = {"w": (torch.tensor([1]), torch.tensor([0, 2]))}
    steps = {"w": torch.tensor(7.0)}
    assert narrow(steps, kept) == scatter(steps, kept, {"w": torch.tensor(0.0)}) == steps


def test_a_step_count_is_not_spread_over_its_parameter() -> None:
    kept = {"w": (torch.tensor([1]), torch.tensor([0, 2]))}
    assert torch.equal(scatter({"w": torch.tensor(7.0)}, kept, {"w": torch.zeros(2, 3)})["w"], torch.tensor(7.0))


def test_narrowing_and_scattering_by_eye() -> None:
    kept = {"w": (torch.tensor([1]), torch.tensor([0, 2]))}
    small = narrow({"w": torch.tensor([[1, 2, 3], [4, 5, 6]])}, kept)
    assert small["w"].tolist() == [[4, 6]]
    assert scatter(small, kept, {"w": torch.zeros(2, 3)})["w"].tolist() == [[0, 0, 0], [4, 0, 6]]


def one(name: str, gone: Sequence[int], of: str) -> tuple[nn.Module, tuple[Units, ...], Nested, dict[str, Tensor]]:
    """A network and the masks without some units of one group."""
    model, units, example = network(name)
    (group,) = [group for group in units if group.name == of]
    kept = torch.ones(group.count, dtype=torch.bool)
    kept[list(gone)] = False
    return model, units, example, without([(group, kept)], {}, shapes(model))


def test_attributes_say_what_the_tensors_are() -> None:
    model, units, example, masks = one("depthwise", [1], "conv.weight")
    small = shrink(model, masks, units, example).model
    conv, wide, point = (small.get_submodule(name) for name in ("conv", "wide", "point"))
    assert isinstance(conv, nn.Conv2d) and isinstance(wide, nn.Conv2d) and isinstance(point, nn.Conv2d)
    assert (conv.in_channels, conv.out_channels, conv.groups) == (1, 3, 1)
    assert (wide.in_channels, wide.out_channels, wide.groups) == (3, 6, 3)
    assert (point.in_channels, point.out_channels, point.groups) == (6, 3, 1)
    assert small.get_submodule("prelu").num_parameters == 3
    assert small.get_submodule("norm").num_features == 6, "told by what reaches it: it holds no tensor"


def test_tied_matrices_stay_one() -> None:
    model, units, example, masks = one("tied", [0, 2], "words.weight")
    small = shrink(model, masks, units, example).model
    assert small.get_parameter("out.weight") is small.get_parameter("words.weight")
    assert small.get_parameter("out.weight").shape == (7, 2)
    assert small.get_submodule("out").in_features == small.get_submodule("words").embedding_dim == 2


def test_a_shared_layer_stays_one_under_both_names() -> None:
    layer = nn.Linear(3, 3)
    model = drawn(chain(first=nn.Linear(2, 3), one=layer, relu=nn.ReLU(), two=layer, out=nn.Linear(3, 2)))
    prunable = [name for name, _ in model.named_parameters()]
    units = find_units(model, rows(1, 2), "neuron", prunable).units
    masks = without([(units[0], torch.tensor([True, False, True]))], {}, shapes(model))
    small = shrink(model, masks, units, rows(1, 2)).model
    assert small.get_submodule("one") is small.get_submodule("two")
    assert small.get_parameter("one.weight").shape == (2, 2)


def test_the_model_given_and_its_modes_stay() -> None:
    model, units, example, masks = one("residual network", [0], "conv.weight")
    model = copy.deepcopy(model).train()
    model.get_submodule("block1").eval()
    model.get_parameter("out.bias").requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    small = shrink(model, masks, units, example).model
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    modes = {name: module.training for name, module in model.named_modules()}
    assert {name: module.training for name, module in small.named_modules()} == modes
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in model.parameters()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in small.modules())


def test_masks_without_a_dead_unit_change_nothing_but_single_weights() -> None:
    model, units, example = network("mlp")
    masks = {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes(model).items()}
    masks["fc1.weight"][2, 1] = False
    small = shrink(model, masks, units, example).model
    assert shapes(small) == shapes(model)
    assert small.get_parameter("fc1.weight")[2, 1] == 0


def test_the_backends_settings_stay() -> None:
    model, units, example, masks = one("mlp", [0], "fc1.weight")
    flags = torch.backends.cudnn
    before = flags.enabled, flags.benchmark, flags.deterministic, flags.allow_tf32
    shrink(model, masks, units, example)
    assert (flags.enabled, flags.benchmark, flags.deterministic, flags.allow_tf32) == before


def test_the_global_random_state_stays() -> None:
    model, units, example, masks = one("mlp", [0], "fc1.weight")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    shrink(model, masks, units, example)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_that_is_bound_to_its_rows_is_compared_on_as_many() -> None:
    model = drawn(Net(lambda net, x: net.out(net.fc(x).reshape(2, -1)), fc=nn.Linear(2, 3), out=nn.Linear(3, 1)))
    units = find_units(model, rows(2, 2), "neuron", ["fc.weight"]).units
    masks = without([(units[0], torch.tensor([True, False, True]))], {}, shapes(model))
    assert shrink(model, masks, units, rows(2, 2)).model.get_submodule("fc").out_features == 2


# Faults planted, to see each one caught.


def refused(*args: Any, **kwargs: Any) -> ShrinkRefused:
    with pytest.raises(ShrinkRefused) as caught:
        shrink(*args, **kwargs)
    return caught.value


def test_a_forgotten_batch_norm_shift_is_caught_where_it_is_read() -> None:
    model = drawn(chain(conv=nn.Conv1d(1, 4, 2), norm=nn.BatchNorm1d(4), out=nn.Conv1d(4, 1, 1)))
    example = rows(1, 1, 5)
    units = find_units(model, example, "filter", ["conv.weight"]).units
    masks = without([(units[0], torch.arange(4) != 1)], {}, shapes(model))
    del masks["norm.bias"]
    assert shrink(model, masks, units, example), "nothing reads the shift"
    del masks["out.weight"]
    error = refused(model, masks, units, example)
    assert error.layer == "out" and "its outputs differ from the masked model's by" in error.reason


def test_a_forgotten_column_is_caught_where_zero_is_not_left_zero() -> None:
    model, units, example, masks = one("convolution, flattened", [1], "conv.weight")
    forgotten = {name: mask for name, mask in masks.items() if name != "fc.weight"}
    assert refused(model, forgotten, units, example).layer == "fc"


def test_a_forgotten_column_does_no_harm_where_zero_stays_zero() -> None:
    model, units, example, masks = one("mlp", [1], "fc1.weight")
    del masks["fc2.weight"]
    assert shrink(model, masks, units, example).model.get_submodule("fc2").in_features == 5


@pytest.mark.parametrize(("forgotten", "layer"), [("fc2.weight", "fc2"), ("fc1.bias", "fc1")])
def test_units_that_forget_a_tensor_are_caught(forgotten: str, layer: str) -> None:
    model, units, example, masks = one("mlp", [1], "fc1.weight")
    pieces = tuple(piece for piece in units[0].slices if piece.tensor != forgotten)
    error = refused(model, masks, (Units(name=units[0].name, count=units[0].count, slices=pieces),), example)
    assert error.layer == layer and "does not take the narrower tensors" in error.reason


def by_hand(name: str, count: int, *pieces: tuple[str, int]) -> Units:
    roles: dict[int, Any] = {0: "makes", 1: "reads"}
    return Units(
        name=name,
        count=count,
        slices=tuple(Slice(tensor=t, dim=dim, owner=torch.arange(count), role=roles[dim]) for t, dim in pieces),
    )


def fault(model: nn.Module, units: Units, example: Nested, **given: Any) -> ShrinkRefused:
    kept = torch.arange(units.count) != 1
    return refused(model, without([(units, kept)], {}, shapes(model)), (units,), example, **given)


CONV = ("conv.weight", 0), ("conv.bias", 0), ("out.weight", 1)
FC = ("fc.weight", 0), ("fc.bias", 0), ("out.weight", 1)


def test_a_group_norm_is_refused_by_name() -> None:
    model = drawn(chain(conv=nn.Conv1d(1, 4, 2), norm=nn.GroupNorm(2, 4), out=nn.Conv1d(4, 1, 1)))
    example = rows(1, 1, 5)
    error = fault(model, by_hand("conv.weight", 4, *CONV, ("norm.weight", 0), ("norm.bias", 0)), example)
    assert str(error) == "cannot shrink 'norm': no refit is known for GroupNorm"
    assert fault(model, by_hand("conv.weight", 4, *CONV), example).layer == "norm"


def test_sizes_that_the_code_holds_are_refused_where_they_matter() -> None:
    model = Net(lambda net, x: net.out(net.conv(x).view(-1, 4, 4)), conv=nn.Conv1d(1, 4, 2), out=nn.Conv1d(4, 1, 1))
    error = fault(drawn(model), by_hand("conv.weight", 4, *CONV), rows(3, 1, 5))
    assert error.layer == "out" and "to have 3 channels, but got 4 channels" in error.reason


def test_outputs_of_another_shape_are_refused() -> None:
    model = drawn(chain(fc=nn.Linear(2, 3)))
    error = fault(model, by_hand("fc.weight", 3, *FC[:2]), rows(1, 2))
    assert "the model's output would have shape (4, 2), not (4, 3)" in error.reason


def test_the_last_unit_of_a_width_is_not_removed() -> None:
    model, units, example = network("mlp")
    masks = without([(units[0], torch.zeros(units[0].count, dtype=torch.bool))], {}, shapes(model))
    error = refused(model, masks, units, example)
    assert str(error) == "cannot shrink 'fc1.weight': none of its 6 units is left"


class Odd(nn.Linear):
    """Does with its weight what nobody can know."""


def test_an_unknown_module_is_refused() -> None:
    model = chain(fc=Odd(2, 3), out=nn.Linear(3, 2))
    assert "no refit is known for Odd" in str(fault(model, by_hand("fc.weight", 3, *FC), rows(1, 2)))


def test_a_hooked_module_is_refused() -> None:
    model = chain(fc=nn.Linear(2, 3), out=nn.Linear(3, 2))
    model.get_submodule("fc").register_forward_hook(lambda module, given, output: output * 2)
    error = fault(model, by_hand("fc.weight", 3, *FC), rows(1, 2))
    assert error.layer == "fc" and "forward hooks" in error.reason


def test_parametrised_tensors_are_refused() -> None:
    model = chain(fc=parametrizations.weight_norm(nn.Linear(2, 3)), out=nn.Linear(3, 2))
    weight = "fc.parametrizations.weight.original1"
    error = fault(model, by_hand(weight, 3, (weight, 0), *FC[1:]), rows(1, 2))
    assert error.layer == "fc" and "its tensors are parametrised" in error.reason


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = chain(fc=nn.Linear(2, 3), out=nn.Linear(3, 2))
    layer = model.get_submodule("fc")
    weight = layer._parameters.pop("weight")
    assert weight is not None
    layer.register_parameter("raw", nn.Parameter(weight.detach()))
    vars(layer)["weight"] = layer.get_parameter("raw") * 2
    assert "it cannot be copied" in refused(model, {}, (), rows(1, 2)).reason


def test_a_model_that_does_not_run_is_refused() -> None:
    model, units, _ = network("mlp")
    assert "it runs neither on random inputs" in refused(model, {}, units, rows(1, 5)).reason


def test_real_inputs_are_compared_too() -> None:
    """A layer that is dead on random inputs, and wakes for large ones only."""
    model = drawn(
        Net(lambda net, x: net.out((net.fc(x) + (x[:, :1] > 50)).relu()), fc=nn.Linear(2, 3), out=nn.Linear(3, 2))
    )
    units = by_hand("fc.weight", 3, *FC)
    masks = without([(units, torch.tensor([True, False, True]))], {}, shapes(model))
    del masks["out.weight"]
    example = rows(2, 2).sigmoid()
    assert shrink(model, masks, (units,), example, inputs=[rows(3, 2).sigmoid()])
    error = refused(model, masks, (units,), example, inputs=[rows(3, 2).sigmoid(), torch.full((1, 2), 99.0)])
    assert error.layer == "out"


def test_a_refusal_crosses_processes_and_is_a_failed_stage() -> None:
    error = pickle.loads(pickle.dumps(ShrinkRefused("fc", "it is odd")))
    assert isinstance(error, StageFailed) and str(error) == "cannot shrink 'fc': it is odd"
    assert str(ShrinkRefused("", "it is odd")) == "cannot shrink the model: it is odd"


def test_results_are_frozen() -> None:
    model, units, example = network("mlp")
    result = shrink(model, {}, units, example)
    assert isinstance(result, Shrunk)
    with pytest.raises(AttributeError):
        result.model = model  # type: ignore[misc]
