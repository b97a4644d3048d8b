"""Operation counts against counts made by hand."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from orchestrator.measures.flops import Flops, Heads, count, left
from orchestrator.pruning.attention import find_heads
from orchestrator.pruning.structure import without
from orchestrator.removal.shrinking import shrink


def kept(some: int, others: int) -> Tensor:
    """A mask that keeps so many, and not so many others."""
    return torch.tensor([True] * some + [False] * others)


@pytest.mark.parametrize(
    ("model", "shape", "weight"),
    [
        (nn.Linear(3, 4), (1, 3), 2 * 3 * 4),
        (nn.Linear(3, 4, bias=False), (1, 5, 3), 2 * 5 * 3 * 4),
        (nn.Linear(3, 4), (3,), 2 * 3 * 4),
        (nn.Linear(3, 4, bias=False), (3,), 2 * 3 * 4),
        # Output length 7, two channels in.
        (nn.Conv1d(2, 4, 3), (1, 2, 9), 2 * 7 * 4 * 2 * 3),
        (nn.Conv1d(2, 4, 3, groups=2), (1, 2, 9), 2 * 7 * 4 * 1 * 3),
        # Output 4x4 by stride 2 and padding 1.
        (nn.Conv2d(3, 8, 3, stride=2, padding=1), (1, 3, 8, 8), 2 * 16 * 8 * 3 * 9),
        (nn.Conv3d(1, 2, 2), (1, 1, 3, 3, 3), 2 * 8 * 2 * 8),
        # Each of the 25 places of the input meets every weight.
        (nn.ConvTranspose2d(3, 4, 2), (1, 3, 5, 5), 2 * 25 * 3 * 4 * 4),
        (nn.ConvTranspose1d(4, 6, 3, groups=2), (1, 4, 5), 2 * 5 * 4 * 3 * 3),
    ],
)
def test_one_layer(model: nn.Module, shape: tuple[int, ...], weight: int) -> None:
    assert count(model, torch.zeros(shape)) == Flops(total=weight, by_tensor={"weight": weight})


def test_lenet_300_100() -> None:
    model = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    flops = count(model, torch.zeros(1, 784))
    assert flops.total == 2 * (784 * 300 + 300 * 100 + 100 * 10) == 532_400
    assert flops.by_tensor == {"0.weight": 470_400, "2.weight": 60_000, "4.weight": 2_000}


class Attention(nn.Module):
    """Self-attention over five tokens of width 8 with two heads."""

    def __init__(self, heads: int = 2, **options: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, heads, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("options", [{"batch_first": True}, {"batch_first": True, "bias": False}])
def test_attention_with_its_projections_and_products(options: dict[str, bool]) -> None:
    flops = count(Attention(**options), torch.zeros(1, 5, 8))
    # QK^T and its product with V: each 2 heads x 5 queries x 5 keys x width 4.
    assert flops.by_tensor == {
        "attention.in_proj_weight": 2 * 5 * 8 * 24,
        "attention.out_proj.weight": 2 * 5 * 8 * 8,
    }
    makers = ["attention.in_proj_weight", "attention.in_proj_bias"][: 1 + options.get("bias", True)]
    assert flops.by_heads == {
        makers[0]: Heads(work=2 * 2 * (2 * 5 * 5 * 4), count=2, makers=tuple((name, 3) for name in makers))
    }
    assert flops.total == 1920 + 640 + 800


def test_cross_attention_of_other_widths() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True, kdim=6, vdim=7)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.attention(q, k, v)[0]  # type: ignore[no-any-return]

    flops = count(Cross(), (torch.zeros(1, 5, 8), torch.zeros(1, 3, 6), torch.zeros(1, 3, 7)))
    assert flops.by_tensor == {
        "attention.q_proj_weight": 2 * 5 * 8 * 8,
        "attention.k_proj_weight": 2 * 3 * 6 * 8,
        "attention.v_proj_weight": 2 * 3 * 7 * 8,
        "attention.out_proj.weight": 2 * 5 * 8 * 8,
    }
    projections = tuple((f"attention.{each}_proj_weight", 1) for each in "qkv")
    heads = Heads(work=2 * 2 * (2 * 5 * 3 * 4), count=2, makers=(*projections, ("attention.in_proj_bias", 3)))
    assert flops.by_heads == {"attention.q_proj_weight": heads}


def test_a_transformer_layer_is_not_hidden_by_its_fast_path() -> None:
    model = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
    flops = count(model, torch.zeros(1, 5, 8))
    assert flops.total == 1920 + 640 + 800 + 2 * (2 * 5 * 8 * 16)
    assert torch.backends.mha.get_fastpath_enabled()


def test_functional_attention() -> None:
    class Plain(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, q, q)

    assert count(Plain(), torch.zeros(1, 2, 5, 4)) == Flops(total=800, by_tensor={"": 800})


def test_recurrent_layers_count_every_step() -> None:
    flops = count(nn.LSTM(3, 4), torch.zeros(2, 1, 3))
    assert flops.by_tensor == {"weight_ih_l0": 2 * 2 * 3 * 16, "weight_hh_l0": 2 * 2 * 4 * 16}


class Reuse(nn.Module):
    """A module called twice, a tied output, and a functional use of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.twice = nn.Linear(4, 4)
        self.out = nn.Linear(4, 5, bias=False)
        self.out.weight = self.embed.weight
        self.extra = nn.Parameter(torch.zeros(5, 5))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.out(self.twice(self.twice(self.embed(tokens))))
        return F.linear(x, self.embed.weight.T) @ self.embed.weight.T + x @ self.extra  # type: ignore[no-any-return]


def test_reuse_ties_and_functional_use() -> None:
    assert count(Reuse(), torch.zeros(1, dtype=torch.long)).by_tensor == {
        "twice.weight": 2 * 2 * 16,
        "embed.weight": 3 * 2 * 20,
        "extra": 2 * 25,
    }


def test_training_mode_is_restored_and_inputs_by_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            return self.fc(x)  # type: ignore[no-any-return]

    model = Named()
    assert count(model, {"x": torch.zeros(1, 2)}).total == 8
    assert model.training
    with pytest.raises(RuntimeError):
        count(model, {"x": torch.zeros(1, 3)})
    assert model.training


@given(widths=st.lists(st.integers(1, 6), min_size=2, max_size=5))
def test_a_chain_is_the_sum_of_its_layers(widths: list[int]) -> None:
    layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
    assert count(nn.Sequential(*layers), torch.zeros(1, widths[0])).total == sum(
        2 * layer.weight.numel() for layer in layers
    )


def test_masked_weights_cost_nothing() -> None:
    flops = Flops(total=140, by_tensor={"a": 100, "b": 20, "": 20})
    assert left(flops, {"a": kept(1, 3), "b": kept(0, 5)}) == 45
    assert left(flops, {"a": kept(1, 2)}) == Fraction(220, 3)
    assert left(flops, {}) == 140


def test_products_of_attention_go_with_whole_heads_alone() -> None:
    heads = Heads(work=80, count=2, makers=(("w", 3), ("b", 3)))
    flops = Flops(total=100, by_tensor={"w": 20}, by_heads={"w": heads})
    first = torch.tensor([[0, 1]] * 3).reshape(6).bool()  # of queries, keys and values the second head
    assert left(flops, {"w": first[:, None].expand(6, 4), "b": first}) == 50
    assert left(flops, {"w": first[:, None].expand(6, 4)}) == 90, "a bias makes a head, too"
    assert left(flops, {"w": torch.zeros(6, 4).bool(), "b": torch.zeros(6).bool()}) == 0


@given(st.dictionaries(st.sampled_from("abc"), st.integers(0, 10)))
def test_what_is_left_never_exceeds_the_whole(there: dict[str, int]) -> None:
    flops = Flops(total=60, by_tensor={"a": 10, "b": 20, "c": 30})
    assert 0 <= left(flops, {name: kept(some, 10 - some) for name, some in there.items()}) <= flops.total


class Other(nn.Module):
    """Attends to a sequence of other length, with keys and values of other widths."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 4, kdim=6, vdim=7, batch_first=True)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attention(q, k, v)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("gone", [1, 2, 3])
@pytest.mark.parametrize(
    ("build", "shapes"),
    [
        (lambda: Attention(heads=4, batch_first=True), [(1, 5, 8)]),
        (lambda: Attention(heads=4, batch_first=True, bias=False), [(1, 5, 8)]),
        (Other, [(1, 5, 8), (1, 3, 6), (1, 3, 7)]),
        (lambda: nn.TransformerEncoderLayer(8, 4, dim_feedforward=16, batch_first=True), [(1, 5, 8)]),
        (lambda: nn.TransformerDecoderLayer(8, 4, dim_feedforward=16, batch_first=True), [(1, 5, 8), (1, 3, 8)]),
    ],
)
def test_without_heads_what_is_left_is_what_the_smaller_model_does(
    build: Callable[[], nn.Module], shapes: list[tuple[int, ...]], gone: int
) -> None:
    model, example = build(), tuple(torch.rand(shape) for shape in shapes)
    names = {name: parameter.shape for name, parameter in model.named_parameters()}
    units = find_heads(model, list(names)).units
    assert units
    masks = without([(group, torch.arange(group.count) >= gone) for group in units], {}, names)
    small = shrink(model, masks, units, example).model
    flops = count(model, example)
    assert left(flops, masks) == count(small, example).total < flops.total


def test_the_counter_agrees_with_torchs_own() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    builders: list[Callable[[], nn.Module]] = [
        lambda: nn.Sequential(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2), nn.Flatten()),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 5), nn.Linear(5, 3)),
    ]
    for build in builders:
        model, example = build(), torch.zeros(1, 1, 28, 28)
        with FlopCounterMode(display=False) as theirs:
            model(example)
        assert count(model, example).total == theirs.get_total_flops()
