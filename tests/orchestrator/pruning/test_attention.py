"""Heads go, the width stays: attention with fewer heads gives what the masked one gave."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from orchestrator.pruning.attention import NarrowAttention, find_heads
from orchestrator.pruning.refits import REFITS
from orchestrator.pruning.structure import Slice, Units, without
from orchestrator.removal.shrinking import shrink

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}

warned_of_nested = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")


class Reader(nn.Module):
    """Attends from its input to itself, or to another input, with every choice that a call has."""

    def __init__(self, width: int = 8, heads: int = 4, **given: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, **given)

    def forward(self, query: Tensor, key: Tensor | None = None, **given: Any) -> Tensor:
        key = query if key is None else key
        output: Tensor = self.attention(query, key, key, **given)[0]
        return output


def drawn(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Every parameter from a Gaussian: torch starts attention's biases at zero, which would hide a forgotten one."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64) / 2)
    return model.to(dtype).eval()


def rows(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def masked(model: nn.Module, units: Sequence[Units], dead: Sequence[Sequence[int]]) -> nn.Module:
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    masks = without([(group, kept(group, gone)) for group, gone in zip(units, dead, strict=True)], {}, shapes)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(masks.get(name, torch.ones_like(parameter, dtype=torch.bool)))
    return model


def kept(group: Units, gone: Sequence[int]) -> Tensor:
    stays = torch.ones(group.count, dtype=torch.bool)
    stays[list(gone)] = False
    return stays


def shrunk(model: nn.Module, units: Sequence[Units], dead: Sequence[Sequence[int]]) -> nn.Module:
    """What shrinking does, in a dozen lines: cut every tensor, then refit each touched module, children first."""
    model = copy.deepcopy(model)
    cut: dict[str, Tensor] = {name: value.detach() for name, value in model.named_parameters()}
    stays: dict[tuple[str, int], Tensor] = {}
    for group, gone in zip(units, dead, strict=True):
        for piece in group.slices:
            alive = (piece.owner < 0) | kept(group, gone)[piece.owner.clamp(min=0)]
            stays[piece.tensor, piece.dim] = stays.get((piece.tensor, piece.dim), alive) & alive
    for (name, dim), alive in stays.items():
        cut[name] = cut[name].index_select(dim, alive.nonzero().squeeze(1))
    for path, module in sorted(model.named_modules(), key=lambda found: -len(found[0].split("."))):
        own = {local: cut[f"{path}.{local}".lstrip(".")] for local, _ in module.named_parameters(recurse=False)}
        if any(name.rpartition(".")[0] == path for name, _ in stays):
            narrow = REFITS[type(module)](module, own)
            if not path:
                model = narrow
            else:
                setattr(model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], narrow)
    return model


def assert_same(
    model: nn.Module, units: Sequence[Units], dead: Sequence[Sequence[int]], call: Callable[[nn.Module], Tensor]
) -> nn.Module:
    """The shrunk model, whose output is the masked model's."""
    small = shrunk(model, units, dead)
    expected, found = call(masked(model, units, dead)), call(small)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert (found - expected).abs().max() <= TOLERANCE[expected.dtype]
    return small


PADDING = torch.tensor([[False, False, False, True, True], [False] * 5])
CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)

CALLS: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "no weights": {"need_weights": False},
    "weights of each head": {"average_attn_weights": False},
    "padded": {"key_padding_mask": PADDING},
    "padded, no weights": {"key_padding_mask": PADDING, "need_weights": False},
    "causal": {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
    "causal, with weights": {"attn_mask": CAUSAL, "is_causal": True},
    "causal and padded": {"attn_mask": CAUSAL, "key_padding_mask": PADDING, "is_causal": True, "need_weights": False},
    "added": {"attn_mask": rows(5, 5), "need_weights": False},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("given", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_self_attention_is_as_masked(bias: bool, batch_first: bool, given: dict[str, Any], dtype: torch.dtype) -> None:
    model = drawn(Reader(batch_first=batch_first, bias=bias), dtype)
    found = find_heads(model, names(model))
    assert [group.count for group in found.units] == [4] and not found.refused
    query = rows(2, 5, 8, dtype=dtype) if batch_first else rows(5, 2, 8, dtype=dtype)
    given = {
        name: value.to(dtype) if name == "attn_mask" and value.is_floating_point() else value
        for name, value in given.items()
    }
    assert_same(model, found.units, [[0, 2]], lambda model: model(query, **given))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("widths", [{}, {"kdim": 6, "vdim": 6}], ids=["same width", "other width"])
def test_cross_attention_is_as_masked(widths: dict[str, int], batch_first: bool) -> None:
    model = drawn(Reader(batch_first=batch_first, **widths))
    query, key = rows(2, 5, 8), rows(2, 3, widths.get("kdim", 8))
    if not batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    small = assert_same(model, find_heads(model, names(model)).units, [[1]], lambda model: model(query, key))
    assert set(small.state_dict()) == set(model.state_dict())
    padding = torch.tensor([[False, False, True], [False, False, False]])
    assert_same(
        model,
        find_heads(model, names(model)).units,
        [[1]],
        lambda model: model(query, key, key_padding_mask=padding, need_weights=False),
    )


def test_one_example_without_a_batch_is_as_masked() -> None:
    model = drawn(Reader())
    units = find_heads(model, names(model)).units
    assert_same(model, units, [[3]], lambda model: model(rows(5, 8)))
    assert_same(model, units, [[3]], lambda model: model(rows(5, 8), key_padding_mask=PADDING[0]))


@given(st.sets(st.integers(0, 3)), st.booleans())
@settings(deadline=None, max_examples=32)
def test_any_heads_may_go(gone: set[int], need_weights: bool) -> None:
    model = drawn(Reader(batch_first=True))
    units = find_heads(model, names(model)).units
    small = assert_same(model, units, [sorted(gone)], lambda model: model(rows(2, 5, 8), need_weights=need_weights))
    narrow = small.get_submodule("attention")
    if gone:
        assert isinstance(narrow, NarrowAttention) and narrow.num_heads == 4 - len(gone)


def test_without_any_head_the_output_bias_is_left() -> None:
    model = drawn(Reader(batch_first=True))
    small = shrunk(model, find_heads(model, names(model)).units, [[0, 1, 2, 3]])
    bias = model.get_parameter("attention.out_proj.bias")
    assert torch.equal(small(rows(2, 5, 8), need_weights=False), bias.expand(2, 5, 8))


def test_exactly_the_heads_asked_for_go_and_the_width_stays() -> None:
    """Torch-Pruning 1.6.1, asked for 4 of these 16 heads, narrows the width and keeps 4."""
    model = drawn(Reader(width=64, heads=16, batch_first=True))
    gone = [1, 5, 6, 15]
    small = assert_same(model, find_heads(model, names(model)).units, [gone], lambda model: model(rows(2, 5, 64)))
    narrow = small.get_submodule("attention")
    assert isinstance(narrow, NarrowAttention) and (narrow.num_heads, narrow.head_dim) == (12, 4)
    assert narrow.in_proj_weight is not None and narrow.in_proj_weight.shape == (3 * 48, 64)
    assert narrow.out_proj.weight.shape == (64, 48)
    stays = [head for head in range(16) if head not in gone]
    values = model.get_parameter("attention.in_proj_weight")[128:].view(16, 4, 64)
    assert torch.equal(narrow.in_proj_weight[96:].view(12, 4, 64), values[stays])


def encoder(layers: int = 2, **given: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 4, 16, batch_first=True, **given)
    return drawn(nn.TransformerEncoder(layer, layers, enable_nested_tensor=not given.get("norm_first", False)))


@pytest.mark.parametrize("dead", [[[0], [1, 2]], [[], [3]], [[0, 1], []]])
@pytest.mark.parametrize("norm_first", [True, False])
def test_an_encoder_with_unlike_layers_is_as_masked(norm_first: bool, dead: list[list[int]]) -> None:
    model = encoder(norm_first=norm_first)
    found = find_heads(model, names(model))
    assert [group.name for group in found.units] == [f"layers.{n}.self_attn.in_proj_weight" for n in (0, 1)]
    assert_same(model, found.units, dead, lambda model: model(rows(2, 5, 8)))
    assert_same(model, found.units, dead, lambda model: model(rows(2, 5, 8), mask=CAUSAL, is_causal=True))
    with torch.no_grad():  # where torch takes its fast path, if it can
        assert_same(model, found.units, dead, lambda model: model(rows(2, 5, 8)))


@warned_of_nested
@pytest.mark.parametrize("dead", [[[0], [1, 2]], [[], [3]], [[0, 1], []], [[0, 1, 2, 3], [0]]])
def test_an_encoder_that_packs_padded_rows_is_as_masked(dead: list[list[int]]) -> None:
    model = encoder()
    assert isinstance(model, nn.TransformerEncoder) and model.use_nested_tensor
    with torch.no_grad():
        units = find_heads(model, names(model)).units
        assert_same(model, units, dead, lambda model: model(rows(2, 5, 8), src_key_padding_mask=PADDING))


def test_a_decoder_is_as_masked() -> None:
    model = drawn(nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 4, 16, batch_first=True), 2))
    units = find_heads(model, names(model)).units
    assert len(units) == 4
    assert_same(model, units, [[0], [1], [2, 3], []], lambda model: model(rows(2, 5, 8), rows(2, 3, 8)))


def test_removal_is_by_the_projects_own_shrink() -> None:
    model = encoder()
    units = find_heads(model, names(model)).units
    dead = [[0], [1, 2]]
    pairs = [(group, kept(group, gone)) for group, gone in zip(units, dead, strict=True)]
    masks = without(pairs, {}, {name: tuple(parameter.shape) for name, parameter in model.named_parameters()})
    small = shrink(model, masks, units, rows(1, 5, 8), inputs=[rows(2, 5, 8)]).model
    assert (small(rows(2, 5, 8)) - masked(model, units, dead)(rows(2, 5, 8))).abs().max() <= 1e-12
    left = [module.num_heads for module in small.modules() if isinstance(module, NarrowAttention)]
    assert left == [3, 2]


def test_gradients_are_those_of_the_kept_weights() -> None:
    model = drawn(Reader(batch_first=True))
    units = find_heads(model, names(model)).units
    small, large = shrunk(model, units, [[1]]), masked(model, units, [[1]])
    for one in (small, large):
        one(rows(2, 5, 8)).square().sum().backward()
    stays = torch.tensor([head != 1 for head in range(4)]).repeat_interleave(2).repeat(3)
    full, cut = (one.get_parameter("attention.in_proj_weight").grad for one in (large, small))
    assert full is not None and cut is not None and torch.allclose(full[stays], cut)


def forget(units: Sequence[Units], change: Callable[[Slice], Slice | None]) -> list[Units]:
    return [
        Units(name=group.name, count=group.count, slices=tuple(p for p in map(change, group.slices) if p is not None))
        for group in units
    ]


def differs(model: nn.Module, units: Sequence[Units], planted: Sequence[Units]) -> bool:
    """Whether the comparison catches a model that was masked by `planted` and cut by `units`."""
    expected = masked(model, planted, [[2]])(rows(2, 5, 8))
    return bool((shrunk(model, units, [[2]])(rows(2, 5, 8)) - expected).abs().max() > 1e-3)


def test_forgotten_or_misplaced_slices_would_be_caught() -> None:
    model = drawn(Reader(batch_first=True))
    units = find_heads(model, names(model)).units

    def without_value_bias(piece: Slice) -> Slice | None:
        if not piece.tensor.endswith("in_proj_bias"):
            return piece if piece.role == "makes" else None  # columns that are masked hide what is not
        forgotten = piece.owner.index_fill(0, torch.arange(16, 24), -1)
        return Slice(tensor=piece.tensor, dim=0, owner=forgotten, role="makes")

    def other_columns(piece: Slice) -> Slice:
        wrong = piece.owner.flip(0)
        return piece if piece.role == "makes" else Slice(tensor=piece.tensor, dim=1, owner=wrong, role="reads")

    def rows_interleaved(piece: Slice) -> Slice:
        wrong = torch.arange(4).repeat(2).repeat(3)
        return piece if piece.role == "reads" else Slice(tensor=piece.tensor, dim=0, owner=wrong, role="makes")

    assert not differs(model, units, units)
    assert differs(model, units, forget(units, without_value_bias))
    assert differs(model, forget(units, other_columns), units)
    assert differs(model, forget(units, rows_interleaved), units)


def test_heads_that_forgot_their_columns_could_not_be_cut() -> None:
    model = drawn(Reader(batch_first=True))
    units = forget(find_heads(model, names(model)).units, lambda piece: None if piece.role == "reads" else piece)
    with pytest.raises(ValueError, match=r"rows, the output projection 8 columns$"):
        shrunk(model, units, [[2]])


def test_what_cannot_be_narrowed_is_refused_with_the_reason() -> None:
    class Mine(nn.MultiheadAttention):
        pass

    model = nn.ModuleDict(
        {
            "biased": nn.MultiheadAttention(8, 4, add_bias_kv=True),
            "zero": nn.MultiheadAttention(8, 4, add_zero_attn=True),
            "mine": Mine(8, 4),
            "fine": nn.MultiheadAttention(8, 4, kdim=6, vdim=6),
        }
    )
    found = find_heads(model, names(model))
    assert [group.name for group in found.units] == ["fine.q_proj_weight"]
    assert found.refused == {
        "biased.in_proj_weight": "every head has a learned key and value (add_bias_kv)",
        "zero.in_proj_weight": "every head has a zero key and value (add_zero_attn)",
        "mine.in_proj_weight": "a Mine may do with its heads what nn.MultiheadAttention does not",
    }


def test_attention_that_shares_a_weight_is_refused() -> None:
    model = nn.ModuleList([nn.MultiheadAttention(8, 4), nn.MultiheadAttention(8, 4)])
    model[1].register_parameter("in_proj_weight", model[0].get_parameter("in_proj_weight"))
    found = find_heads(model, names(model))
    assert not found.units
    assert found.refused == {"0.in_proj_weight": "it shares 0.in_proj_weight with another layer"}


def test_heads_without_a_prunable_projection_are_no_units() -> None:
    model = Reader()
    assert find_heads(model, ["attention.out_proj.weight"]).units == ()
    assert find_heads(model, []).refused == {}


def test_a_mask_for_heads_that_are_gone_is_refused() -> None:
    model = drawn(Reader(batch_first=True))
    small = shrunk(model, find_heads(model, names(model)).units, [[1]])
    with pytest.raises(ValueError, match=r"^attn_mask has 8 rows for 2 examples: this attention has 3 heads left$"):
        small(rows(2, 5, 8), attn_mask=CAUSAL.expand(8, 5, 5))
    assert small(rows(2, 5, 8), attn_mask=CAUSAL.expand(6, 5, 5)).shape == (2, 5, 8)
    with pytest.raises(ValueError, match=r"^is_causal says that attn_mask is causal: give attn_mask, too$"):
        small(rows(2, 5, 8), is_causal=True)


def test_training_drops_attention_only_while_training() -> None:
    model = drawn(Reader(batch_first=True, dropout=0.5))
    small = shrunk(model, find_heads(model, names(model)).units, [[1]])
    assert not small.get_submodule("attention").training
    with warnings.catch_warnings():
        for need_weights in (True, False):
            assert torch.equal(*(small.eval()(rows(2, 5, 8), need_weights=need_weights) for _ in range(2)))
            assert not torch.equal(*(small.train()(rows(2, 5, 8), need_weights=need_weights) for _ in range(2)))


def test_attention_written_by_hand_is_refused_by_name() -> None:
    class ByHand(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.n_head = 4
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    model = nn.Sequential(ByHand(), nn.Linear(8, 2))
    found = find_heads(model, names(model))
    assert not found.units
    assert found.refused == {"0.qkv.weight": "the ByHand '0' is no nn.MultiheadAttention, whose heads are known"}
