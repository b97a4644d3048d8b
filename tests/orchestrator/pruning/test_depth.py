"""Whole layers go where a skip connection passes by; what is left computes what the masked model did."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from orchestrator.pruning.attention import NarrowAttention, find_heads
from orchestrator.pruning.depth import Nothing, NothingConvolved, are_branches, find_layers, narrowable, remove_branches
from orchestrator.pruning.structure import Slice, Units, without
from orchestrator.removal.shrinking import shrink

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


class Block(nn.Module):
    """Two convolutions beside a skip connection, which has one of its own where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, in_place: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(in_place)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.down: nn.Module | None = None
        if stride > 1 or inputs != outputs:
            self.down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x if self.down is None else self.down(x)
        rectified: Tensor = self.relu(y)
        return rectified


def resnet() -> nn.Module:
    return drawn(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), Block(4, 4), Block(4, 6, 2), Block(6, 6, in_place=False),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2),
        )
    )  # fmt: skip


class Gated(nn.Module):
    """Attention of its own making, a gated feed-forward part, and a learned scale on each."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend = Attend(width)
        self.up, self.gate, self.down = (nn.Linear(*sizes) for sizes in ((width, 12), (width, 12), (12, width)))
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale * self.attend(self.norm1(x))[0]
        y = self.norm2(x)
        result: Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return result


class Attend(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (part(x).unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        weights = (q @ k.transpose(2, 3)).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2)), weights


def drawn(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Every tensor from a Gaussian, running variances positive: nothing is zero by chance."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point():
                values = torch.randn(tensor.shape, generator=draw, dtype=torch.float64) / 2
                tensor.copy_(values.abs() + 0.5 if name.endswith("running_var") else values)
    return model.to(dtype).eval()


def image(rows: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)


def sequence(rows: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, 5, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)


def weights(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.dim() > 1]


def layers(model: nn.Module, example: Any, unit: int | None = None) -> list[set[str]]:
    """The layers of each branch."""
    (units,) = find_layers(model, example, weights(model)).units
    found: list[set[str]] = [set() for _ in range(units.count)]
    for piece in units.slices:
        found[int(piece.owner[0])].add(piece.tensor.rpartition(".")[0])
    return found


def masked(model: nn.Module, units: Units, kept: Tensor) -> nn.Module:
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    masks = without([(units, kept)], {}, shapes)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in masks:
                parameter.masked_fill_(~masks[name], 0)
    return model


def assert_same(model: nn.Module, inputs: Any, dead: Sequence[int]) -> nn.Module:
    """The model without the dead branches, whose output is the masked model's and which holds nothing of them."""
    (units,) = find_layers(model, inputs[:1], weights(model)).units
    kept = torch.tensor([unit not in dead for unit in range(units.count)])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    large = masked(model, units, kept)
    small = remove_branches(large, units, kept, inputs[:1])
    expected = large(inputs)
    assert (small(inputs) - expected).abs().max() <= TOLERANCE[expected.dtype]
    gone = {piece.tensor for piece in units.slices if int(piece.owner[0]) in dead}
    assert not gone & set(small.state_dict())
    assert set(small.state_dict()) | gone | {n for n in before if n.endswith("num_batches_tracked")} == set(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return small


@given(st.sets(st.integers(0, 2)))
@settings(deadline=None, max_examples=8)
def test_any_residual_blocks_may_go(dead: set[int]) -> None:
    assert_same(resnet(), image(), sorted(dead))


def test_a_residual_block_in_single_precision() -> None:
    model = resnet().float()
    assert_same(model, image(dtype=torch.float32), [0, 2])


def test_the_branches_of_residual_blocks_are_their_convolutions() -> None:
    model = resnet()
    inside = {"conv1", "bn1", "conv2", "bn2"}
    assert layers(model, image(1)) == [{f"{block}.{layer}" for layer in inside} for block in (1, 2, 3)]
    refused = find_layers(model, image(1), weights(model)).refused
    assert refused == {
        "0.weight": "no skip connection passes by",
        "2.down.0.weight": "nothing would be left beside it if the layers parallel to it went, too",
        "6.weight": "no skip connection passes by",
    }


def test_norms_and_running_figures_go_with_their_layer() -> None:
    model = resnet()
    (units,) = find_layers(model, image(1), weights(model)).units
    roles = {piece.tensor: piece.role for piece in units.slices if int(piece.owner[0]) == 0}
    assert roles == {
        "1.conv1.weight": "makes",
        "1.conv2.weight": "makes",
        **{f"1.bn{n}.{name}": "norm" for n in (1, 2) for name in ("weight", "bias")},
        **{f"1.bn{n}.running_{name}": "buffer" for n in (1, 2) for name in ("mean", "var")},
    }
    assert all(piece.dim == 0 and (piece.owner == piece.owner[0]).all() for piece in units.slices)


@pytest.mark.parametrize("dead", [[0], [1], [0, 1], [2, 3], [0, 1, 2, 3]])
@pytest.mark.parametrize("norm_first", [True, False])
def test_an_encoders_attention_and_feed_forward_parts_may_go(norm_first: bool, dead: list[int]) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
    model = drawn(nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first))
    parts = [{"self_attn", "self_attn.out_proj"}, {"linear1", "linear2"}]
    norms = [{"norm1"}, {"norm2"}] if norm_first else [set[str](), set[str]()]
    assert layers(model, sequence(1)) == [
        {f"layers.{n}.{name}" for name in part | norm} for n in (0, 1) for part, norm in zip(parts, norms, strict=True)
    ]
    small = assert_same(model, sequence(), dead)
    with torch.no_grad():  # where torch takes its fast path, if it can
        assert_same(model, sequence(), dead)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[0, 3:] = True
    with torch.no_grad():
        kept = torch.tensor([unit not in dead for unit in range(4)])
        large = masked(model, find_layers(model, sequence(1), weights(model)).units[0], kept)
        torch.backends.mha.set_fastpath_enabled(False)  # it gives zeros, not what is computed, where rows are padded
        try:
            expected = large(sequence(), src_key_padding_mask=padding)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        assert (small(sequence(), src_key_padding_mask=padding) - expected).abs().max() <= 1e-12


def test_a_decoders_three_parts_may_go() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), 2)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.decoder(x[:, :2], x[:, 2:])
            return result

    model = drawn(Decoder())
    assert len(layers(model, sequence(1))) == 6
    for dead in combinations(range(6), 2):
        assert_same(model, sequence(), dead)


def test_layers_of_ones_own_making_may_go() -> None:
    model = drawn(nn.Sequential(Gated(), Gated()))
    attend = {"norm1", "attend.q", "attend.k", "attend.v", "attend.out"}
    assert layers(model, sequence(1)) == [
        {f"{n}.{name}" for name in part} for n in (0, 1) for part in (attend, {"norm2", "up", "gate", "down"})
    ]
    small = assert_same(model, sequence(), [0, 3])
    assert isinstance(small.get_submodule("0.attend"), Nothing), "the scores are not computed either"
    assert isinstance(small.get_submodule("0.norm1"), Nothing)
    up = small.get_submodule("1.up")
    assert isinstance(up, Nothing) and (up.dim, up.size) == (-1, 1)


def test_what_is_left_of_a_convolution_has_one_channel() -> None:
    small = assert_same(resnet(), image(), [0])
    conv = small.get_submodule("1.conv1")
    assert isinstance(conv, NothingConvolved) and conv.channels == 1


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "given",
    [{}, {"padding": 1}, {"stride": 2, "padding": 2}, {"dilation": 2}, {"padding": "same"}, {"padding": "valid"}],
)
def test_nothing_convolved_has_the_convolutions_shape(dims: int, given: dict[str, Any]) -> None:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](2, 3, 3, **given)
    nothing = NothingConvolved(conv, 3)
    for shape in ((4, 2, 7, 8, 9)[: dims + 2], (2, 7, 8, 9)[: dims + 1]):
        x = torch.ones(shape)
        assert nothing(x).shape == conv(x).shape and not nothing(x).any()


def test_width_that_the_code_relies_on_is_kept() -> None:
    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.back = nn.Linear(8, 12), nn.Linear(6, 8)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.wide(x).chunk(2, -1)
            result: Tensor = x + self.back(a * b.sigmoid())
            return result

    small = assert_same(drawn(nn.Sequential(Halved())), sequence(), [0])
    wide = small.get_submodule("0.wide")
    assert isinstance(wide, Nothing) and wide.size == 12


def test_of_branches_within_one_another_the_inner_ones_are_units() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.inner, self.tail = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.head(x)
            result: Tensor = x + self.tail(y + self.inner(y).relu())
            return result

    model = drawn(Outer())
    assert layers(model, sequence(1)) == [{"inner"}]
    why = "it lies in a branch that holds others, such as inner"
    assert find_layers(model, sequence(1), weights(model)).refused == {"head.weight": why, "tail.weight": why}
    assert_same(model, sequence(), [0])


def only(module: type[nn.Module], example: Tensor | None = None) -> dict[str, str]:
    """Why none of the layers of a small model can go."""
    model = drawn(module())
    found = find_layers(model, sequence(1) if example is None else example, weights(model))
    assert found.units == ()
    return dict(found.refused)


class Chain(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


class Three(nn.Module):
    """A skip connection in `forward`'s gift."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)


class Side(Three):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.one(x), self.two(x)), -1)


class Sigmoid(Three):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.two(x + self.one(x).sigmoid())
        return result


class Towers(Three):
    """Two inputs that meet in a sum: neither goes round the other."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        result: Tensor = self.one(x) + self.two(y)
        return result


class Parallel(Three):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.one(x) + self.two(x)
        return result


class Recurrent(nn.Module):
    """A branch whose end gives more than one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.GRU(8, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(x + self.rnn(x)[0])
        return result


class Twice(Three):
    """One layer in two places, as ALBERT has it."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + self.one(x)
        result: Tensor = self.two(x)
        return result


class Upwards(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.out = nn.ConvTranspose1d(5, 5, 4, stride=2, padding=1), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(x + self.up(x).unflatten(-1, (2, 8)).mean(2))
        return result


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(x + self.norm(x))
        return result


class Asking(Three):
    """Looks at its layer's weight."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.two(x + self.one(x.to(self.one.weight.dtype)))
        return result


class Broken(Three):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("not today")


class Positions(nn.Module):
    """An embedding of places, added to what is read, is no branch beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.out = nn.Embedding(9, 8), nn.Embedding(5, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(self.words(x) + self.places(torch.arange(x.shape[1])))
        return result


@pytest.mark.parametrize("module", [Chain, Side, Sigmoid, Twice])
def test_without_a_skip_connection_nothing_can_go(module: type[nn.Module]) -> None:
    assert set(only(module).values()) == {"no skip connection passes by"}


def test_sums_of_unlike_things_are_no_skip_connections() -> None:
    assert set(only(Positions, example=torch.tensor([[1, 2, 3, 4, 5]])).values()) == {"no skip connection passes by"}
    model = drawn(Towers())
    found = find_layers(model, (sequence(1), sequence(1)), weights(model))
    assert not found.units and set(found.refused.values()) == {"no skip connection passes by"}


def test_of_two_parallel_layers_one_may_go() -> None:
    model = drawn(Parallel())
    assert layers(model, sequence(1)) == [{"one"}]
    assert_same(model, sequence(), [0])


def test_a_branch_may_end_in_a_layer_that_gives_more_than_one_tensor() -> None:
    small = assert_same(drawn(Recurrent()), sequence(), [0])
    assert isinstance(small.get_submodule("rnn"), Nothing)


def test_what_cannot_be_replaced_or_traced_is_refused_with_the_reason() -> None:
    assert only(Upwards)["up.weight"] == "what shape up gives cannot be told from what it is given"
    assert only(Scaled)["out.weight"] == "no skip connection passes by"
    assert (
        only(Asking)["one.weight"] == "the model does not run without it ('Nothing' object has no attribute 'weight')"
    )
    assert set(only(Broken).values()) == {"the model cannot be traced (not today)"}


def test_a_branch_that_shares_its_weight_is_refused() -> None:
    class Tied(Three):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.two(x + self.one(x))
            return result

    model = Tied()
    model.two.weight = model.one.weight
    found = find_layers(model.double(), sequence(1), weights(model))
    assert not found.units
    assert found.refused == {"one.weight": "one shares a weight with two"}


def test_branches_without_a_prunable_weight_are_no_units() -> None:
    model = resnet()
    found = find_layers(model, image(1), ["1.conv2.weight", "6.weight"])
    assert [group.count for group in found.units] == [1]
    assert {piece.tensor.partition(".")[0] for piece in found.units[0].slices} == {"1"}
    assert set(found.refused) == {"6.weight"}
    assert find_layers(model, image(1), []).units == ()


def test_layers_are_told_from_units_that_are_cut() -> None:
    model = resnet()
    (units,) = find_layers(model, image(1), weights(model)).units
    rows = torch.arange(4)
    inner = Units(
        name="1.conv1",
        count=4,
        slices=(
            Slice(tensor="1.conv1.weight", dim=0, owner=rows, role="makes"),
            Slice(tensor="1.conv2.weight", dim=1, owner=rows, role="reads"),
        ),
    )
    assert are_branches(units) and not are_branches(inner)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    kept = torch.tensor([False, True, True])
    assert narrowable([units, inner], without([(units, kept)], {}, shapes)) == []
    assert narrowable([units, inner], {}) == [inner]


def test_layers_and_heads_may_go_together_by_the_projects_own_shrink() -> None:
    layer = nn.TransformerEncoderLayer(8, 4, 16, batch_first=True, norm_first=True)
    model = drawn(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    (branches,) = find_layers(model, sequence(1), weights(model)).units
    heads = find_heads(model, weights(model)).units
    some, every = torch.tensor([True, False, False, True]), torch.ones(4, dtype=torch.bool)
    kept = torch.tensor([False, True, True, True, True, False])
    masks = without([(branches, kept), *zip(heads, (every, some, every), strict=True)], {}, shapes)
    found = shrink(model, masks, [*heads, branches], sequence(1), inputs=[sequence()])
    gone = ("layers.0.self_attn.", "layers.0.norm1.", "layers.2.linear", "layers.2.norm2.")
    assert set(found.kept) == {name for name in shapes if not name.startswith(gone)}
    attention = found.model.get_submodule("layers.1.self_attn")
    assert isinstance(attention, NarrowAttention) and attention.num_heads == 2


def test_a_branch_that_does_not_go_whole_would_be_caught() -> None:
    """The comparison that every test here rests on sees a norm's shift that was forgotten."""
    model = resnet()
    (units,) = find_layers(model, image(1), weights(model)).units
    planted = Units(
        name=units.name, count=units.count, slices=tuple(p for p in units.slices if p.tensor != "1.bn2.bias")
    )
    kept = torch.tensor([False, True, True])
    small = remove_branches(masked(model, units, kept), units, kept, image(1))
    assert (small(image()) - masked(model, units, kept)(image())).abs().max() < 1e-12
    assert (small(image()) - masked(model, planted, kept)(image())).abs().max() > 1e-3
