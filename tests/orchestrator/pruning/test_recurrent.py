"""Recurrent units go, layer by layer and direction by direction; what is left computes what the masked layers did."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from orchestrator.pruning.recurrent import NarrowRecurrent, find_recurrent
from orchestrator.pruning.refits import REFITS
from orchestrator.pruning.structure import Slice, Units, without
from orchestrator.removal.shrinking import shrink

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
KINDS: dict[str, Callable[..., nn.RNNBase]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "tanh": nn.RNN,
    "relu": lambda *sizes, **given: nn.RNN(*sizes, nonlinearity="relu", **given),
}


class Net(nn.Module):
    """Five units that read three features, and a linear layer that reads them after the last step."""

    def __init__(self, kind: str = "lstm", **given: Any) -> None:
        super().__init__()
        self.rnn = KINDS[kind](3, 5, batch_first=True, **given)
        self.out = nn.Linear(10 if self.rnn.bidirectional else 5, 2)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.out(self.rnn(x)[0][:, -1])
        return output

    def last(self, states: Any) -> Tensor:
        """The last layer's last states, of both directions side by side."""
        states = states[0] if self.rnn.mode == "LSTM" else states
        return torch.cat(tuple(states[-2:] if self.rnn.bidirectional else states[-1:]), 1)


class Pooled(Net):
    """Reads the maximum over time, rectified."""

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.out(self.rnn(x)[0].transpose(1, 2).max(dim=2).values.relu())
        return output


class LastState(Net):
    """Reads the last states instead of the output."""

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.out(self.last(self.rnn(x)[1]))
        return output


class Packed(Net):
    """Packs sequences of unlike lengths, in no order."""

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.arange(len(x)) % 3 + x.shape[1] - 3
        packed = pack_padded_sequence(x, lengths.flip(0), batch_first=True, enforce_sorted=False)
        output, states = self.rnn(packed)
        read: Tensor = self.out(pad_packed_sequence(output, batch_first=True)[0].mean(1)) - self.out(self.last(states))
        return read


class Flat(Net):
    """Reads every step at a place of its own."""

    def __init__(self, kind: str = "lstm", **given: Any) -> None:
        super().__init__(kind, **given)
        self.out = nn.Linear(6 * self.out.in_features, 2)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.out(self.rnn(x)[0].flatten(1))
        return output


def drawn(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64) / 2)
    return model.to(dtype).eval()


def rows(count: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, 6, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def kept(group: Units, gone: Sequence[int]) -> Tensor:
    stays = torch.ones(group.count, dtype=torch.bool)
    stays[list(gone)] = False
    return stays


def masked(model: nn.Module, units: Sequence[Units], dead: Sequence[Sequence[int]]) -> nn.Module:
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    masks = without([(group, kept(group, gone)) for group, gone in zip(units, dead, strict=True)], {}, shapes)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(masks.get(name, torch.ones_like(parameter, dtype=torch.bool)))
    return model


def shrunk(model: nn.Module, units: Sequence[Units], dead: Sequence[Sequence[int]]) -> nn.Module:
    """What shrinking does, in a dozen lines: cut every tensor, then refit each touched module."""
    model = copy.deepcopy(model)
    cut: dict[str, Tensor] = {name: value.detach() for name, value in model.named_parameters()}
    stays: dict[tuple[str, int], Tensor] = {}
    for group, gone in zip(units, dead, strict=True):
        for piece in group.slices:
            alive = (piece.owner < 0) | kept(group, gone)[piece.owner.clamp(min=0)]
            stays[piece.tensor, piece.dim] = stays.get((piece.tensor, piece.dim), alive) & alive
    for (name, dim), alive in stays.items():
        cut[name] = cut[name].index_select(dim, alive.nonzero().squeeze(1))
    for path, module in list(model.named_modules()):
        own = {local: cut[f"{path}.{local}"] for local, _ in module.named_parameters(recurse=False)}
        if own:
            setattr(
                model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], REFITS[type(module)](module, own)
            )
    return model


def assert_same(
    model: nn.Module, dead: Sequence[Sequence[int]], dtype: torch.dtype = torch.float64, inputs: Tensor | None = None
) -> nn.Module:
    """The shrunk model, whose output is the masked model's."""
    inputs = rows(dtype=dtype) if inputs is None else inputs
    found = find_recurrent(model, inputs[:1], names(model))
    assert not found.refused
    small = shrunk(model, found.units, dead)
    expected = masked(model, found.units, dead)(inputs)
    assert (small(inputs) - expected).abs().max() <= TOLERANCE[dtype]
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    return small


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("net", [Net, Pooled, LastState, Flat])
@pytest.mark.parametrize("kind", KINDS)
def test_one_layer_stays_torchs_own(kind: str, net: type[Net], bias: bool, dtype: torch.dtype) -> None:
    model = drawn(net(kind, bias=bias), dtype)
    small = assert_same(model, [[1, 4]], dtype)
    layer = small.get_submodule("rnn")
    assert type(layer) is type(model.get_submodule("rnn")) and isinstance(layer, nn.RNNBase)
    assert layer.hidden_size == 3 and layer.get_parameter("weight_hh_l0").shape[1] == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("net", [Net, Pooled, LastState, Packed])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "both ways"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_layers_of_unlike_widths(kind: str, bidirectional: bool, net: type[Net], dtype: torch.dtype) -> None:
    model = drawn(net(kind, num_layers=2, bidirectional=bidirectional), dtype)
    dead = [[0], [1, 2], [4], [0, 1, 3]] if bidirectional else [[0], [1, 2]]
    small = assert_same(model, dead, dtype)
    layer = small.get_submodule("rnn")
    assert isinstance(layer, NarrowRecurrent)
    assert layer.widths == tuple(5 - len(gone) for gone in dead)
    assert set(small.state_dict()) == set(model.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_both_directions_of_one_layer(kind: str) -> None:
    assert isinstance(
        assert_same(drawn(Net(kind, bidirectional=True)), [[1], [0, 4]]).get_submodule("rnn"), NarrowRecurrent
    )
    assert isinstance(assert_same(drawn(Net(kind, bidirectional=True)), [[1], [4]]).get_submodule("rnn"), nn.RNNBase)


@given(
    st.lists(st.sets(st.integers(0, 4), max_size=4), min_size=4, max_size=4).filter(any), st.sampled_from(sorted(KINDS))
)
@settings(deadline=None, max_examples=25)
def test_any_units_may_go(dead: list[set[int]], kind: str) -> None:
    assert_same(drawn(LastState(kind, num_layers=2, bidirectional=True)), [sorted(gone) for gone in dead])


def test_a_unit_owns_its_gates_its_states_and_its_readers() -> None:
    model = Net(num_layers=2, bidirectional=True)
    units = find_recurrent(model, rows(1, torch.float32), names(model)).units
    assert [group.name for group in units] == [f"rnn.weight_ih_{s}" for s in ("l0", "l0_reverse", "l1", "l1_reverse")]
    owned = {(p.tensor, p.dim): (p.owner == 2).nonzero().squeeze(1).tolist() for p in units[1].slices}
    gates = [2, 7, 12, 17]
    assert owned == {
        ("rnn.weight_ih_l0_reverse", 0): gates,
        ("rnn.weight_hh_l0_reverse", 0): gates,
        ("rnn.bias_ih_l0_reverse", 0): gates,
        ("rnn.bias_hh_l0_reverse", 0): gates,
        ("rnn.weight_hh_l0_reverse", 1): [2],
        ("rnn.weight_ih_l1", 1): [7],
        ("rnn.weight_ih_l1_reverse", 1): [7],
    }
    assert {(p.tensor, p.dim): (p.owner == 2).nonzero().squeeze(1).tolist() for p in units[3].slices}[
        "out.weight", 1
    ] == [7]


def test_one_recurrent_layer_may_read_another() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.drop = nn.LSTM(3, 5, batch_first=True), nn.Dropout(0.5)
            self.second, self.out = nn.GRU(5, 4, batch_first=True, bidirectional=True), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.out(self.second(self.drop(self.first(x)[0]))[0].mean(1))
            return output

    assert_same(drawn(Stack()), [[0, 3], [1], [2, 3]])


def test_a_layer_that_is_read_twice_loses_its_columns_twice() -> None:
    class Twice(Net):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            output = self.rnn(x)[0]
            result: Tensor = self.out(output[:, -1]) * self.gate(output.mean(1)).sigmoid()
            return result

    assert_same(drawn(Twice()), [[0, 3]])


def test_no_batch_is_as_masked() -> None:
    class One(LastState):
        def forward(self, x: Tensor) -> Tensor:
            output, states = self.rnn(x[0])
            result: Tensor = self.out(output[-1] + states[0][-1])
            return result

    assert_same(drawn(One(num_layers=2)), [[0], [1, 2]])


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_states_given_back_go_on_where_they_ended(kind: str) -> None:
    model = drawn(Net(kind, num_layers=2))
    units = find_recurrent(model, rows(1), names(model)).units
    layer = shrunk(model, units, [[0], [1, 2]]).get_submodule("rnn")
    whole, _ = layer(rows())
    first, states = layer(rows()[:, :4])
    second, _ = layer(rows()[:, 4:], states)
    assert torch.allclose(torch.cat((first, second), 1), whole)
    alone, ends = layer(rows()[0, :4])
    assert torch.allclose(layer(rows()[0, 4:], ends)[0], whole[0, 4:]) and torch.allclose(alone, first[0])
    packed = pack_padded_sequence(rows(), torch.tensor([2, 4, 6, 3]), batch_first=True, enforce_sorted=False)
    _, states = layer(packed)
    again, _ = layer(packed, states)
    one, _ = layer(rows()[1:2, :4])
    _, end = layer(rows()[1:2, :4])
    assert isinstance(again, PackedSequence)
    assert torch.allclose(pad_packed_sequence(again, batch_first=True)[0][1, :4], layer(rows()[1:2, :4], end)[0][0])
    assert not torch.allclose(one, layer(rows()[1:2, :4], end)[0])
    wide = torch.zeros(2, 4, 5, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"^initial states must have the widths \(4, 3\), each \(batch, width\), or be None$"
    ):
        layer(rows(), (wide, wide) if kind == "lstm" else wide)


def test_dropout_between_layers_only_while_training() -> None:
    model = drawn(Net(num_layers=2, dropout=0.5))
    small = shrunk(model, find_recurrent(model, rows(1), names(model)).units, [[0], []])
    assert not small.get_submodule("rnn").training
    assert torch.equal(*(small.eval()(rows()) for _ in range(2)))
    assert not torch.equal(*(small.train()(rows()) for _ in range(2)))


def test_gradients_are_those_of_the_kept_weights() -> None:
    model = drawn(Net(num_layers=2))
    units = find_recurrent(model, rows(1), names(model)).units
    small, large = shrunk(model, units, [[0], [1, 2]]), masked(model, units, [[0], [1, 2]])
    for one in (small, large):
        one(rows()).square().sum().backward()
    full, cut = (one.get_parameter("rnn.weight_ih_l1").grad for one in (large, small))
    assert full is not None and cut is not None
    assert torch.allclose(full.view(4, 5, 5)[:, [0, 3, 4]][:, :, 1:].flatten(0, 1), cut)


def caught(change: Callable[[Slice], Slice | None]) -> bool:
    """Whether the comparison tells a model that was masked with changed slices from one cut with the right ones."""
    model = drawn(Net())
    units = find_recurrent(model, rows(1), names(model)).units
    planted = [
        Units(name=group.name, count=group.count, slices=tuple(p for p in map(change, group.slices) if p is not None))
        for group in units
    ]
    difference = shrunk(model, units, [[1]])(rows()) - masked(model, planted, [[1]])(rows())
    return bool(difference.abs().max() > 1e-3)


def test_forgotten_or_misplaced_slices_would_be_caught() -> None:
    assert not caught(lambda piece: piece)
    # Each of two mistakes hides the other's absence: a silent unit is read without harm, a loud one that none reads, too.
    assert caught(lambda piece: None if piece.role == "reads" or piece.tensor == "rnn.bias_hh_l0" else piece)
    assert caught(lambda piece: None if piece.tensor == "out.weight" or piece.tensor == "rnn.bias_ih_l0" else piece)

    def gates_interleaved(piece: Slice) -> Slice | None:
        wrong = torch.arange(5).repeat_interleave(4)
        return None if piece.dim == 1 else Slice(tensor=piece.tensor, dim=0, owner=wrong, role="makes")

    assert caught(gates_interleaved)


def test_units_that_forgot_their_readers_could_not_be_cut() -> None:
    model = drawn(Net())
    (units,) = find_recurrent(model, rows(1), names(model)).units
    slices = tuple(piece for piece in units.slices if piece.tensor != "out.weight")
    small = shrunk(model, [Units(name=units.name, count=units.count, slices=slices)], [[1]])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        small(rows())


def refusal(model: nn.Module, inputs: Tensor | None = None) -> dict[str, str]:
    return dict(
        find_recurrent(model.eval(), rows(1, torch.float32) if inputs is None else inputs, names(model)).refused
    )


def test_units_that_cannot_go_are_refused_with_the_reason() -> None:
    class Normed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(5)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.out(self.norm(self.rnn(x)[0]))
            return output

    class Bare(Net):
        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.rnn(x)[0]
            return output

    class Attending(Net):
        def forward(self, x: Tensor) -> Tensor:
            output = self.rnn(x)[0]
            read: Tensor = self.out((output @ output.transpose(1, 2)).softmax(-1) @ output)
            return read

    class Shared(Net):
        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.out(self.rnn(x)[0]) + self.out(x.repeat(1, 1, 2)[..., :5])
            return output

    class Stepping(Net):
        def forward(self, x: Tensor) -> Tensor:
            states = None
            for step in torch.split(x, 1, 1):
                output, states = self.rnn(step, states)
            read: Tensor = self.out(output[:, -1])
            return read

    class Viewed(Net):
        def __init__(self) -> None:
            super().__init__("gru", num_layers=2)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.out(self.rnn(x)[1].view(2, 1, len(x), -1)[-1, 0])
            return output

    class Started(Net):
        def __init__(self) -> None:
            super().__init__("gru")

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.out(self.rnn(x, torch.zeros(1, len(x), 5))[0].mean(1))
            return output

    label = "rnn.weight_ih_l0"
    assert refusal(Normed()) == {label: "it reaches norm (LayerNorm), which cannot do without single units"}
    assert refusal(Bare()) == {label: "it reaches the model's output other than through a linear layer"}
    assert refusal(Attending()) == {label: "several of its units reach out in one place"}
    assert refusal(Shared()) == {label: "out, which reads it, reads other things in the same place"}
    assert refusal(Stepping()) == {label: "it reaches rnn (LSTM), which cannot do without single units"}
    assert refusal(Viewed()) == {
        f"rnn.weight_ih_{suffix}": "removing its units changes more than them: at 'rnn', it does not take the narrower"
        " tensors ('tuple' object has no attribute 'view')"
        for suffix in ("l0", "l1")
    }
    assert refusal(Started()) == {
        label: "removing its units changes more than them: at 'rnn', it does not take the narrower tensors"
        " (Expected hidden size (1, 4, 2), got [1, 4, 5])"
    }
    assert refusal(nn.Sequential(OrderedDict(rnn=nn.LSTM(3, 5, proj_size=2)))) == {
        label: "a projection of its states (proj_size) ties its units together"
    }


def test_only_the_layers_that_are_read_unclearly_are_refused() -> None:
    class Both(Net):
        def forward(self, x: Tensor) -> Tensor:
            output, (h, _) = self.rnn(x)
            read: Tensor = self.out(output[:, -1]) + h[0].sum(1, keepdim=True)
            return read

    model = Both(num_layers=2)
    found = find_recurrent(model, rows(1, torch.float32), names(model))
    assert [group.name for group in found.units] == ["rnn.weight_ih_l1"]
    assert found.refused == {"rnn.weight_ih_l0": "it reaches the model's output other than through a linear layer"}


def test_layers_without_a_prunable_weight_are_no_units() -> None:
    model = Net(num_layers=2)
    found = find_recurrent(model, rows(1, torch.float32), ["rnn.weight_hh_l1", "out.weight"])
    assert [group.name for group in found.units] == ["rnn.weight_ih_l1"] and not found.refused
    assert find_recurrent(model, rows(1, torch.float32), ["out.weight"]).units == ()


def test_removal_is_by_the_projects_own_shrink() -> None:
    model = drawn(Net(num_layers=2, bidirectional=True))
    units = find_recurrent(model, rows(1), names(model)).units
    dead = [[0], [1, 2], [4], [0, 1, 3]]
    pairs = [(group, kept(group, gone)) for group, gone in zip(units, dead, strict=True)]
    masks = without(pairs, {}, {name: tuple(parameter.shape) for name, parameter in model.named_parameters()})
    small = shrink(model, masks, units, rows(1), inputs=[rows()]).model
    assert (small(rows()) - masked(model, units, dead)(rows())).abs().max() <= 1e-12
    assert isinstance(small.get_submodule("rnn"), NarrowRecurrent)


def test_a_model_that_will_have_no_nan_is_refused() -> None:
    class Wary(Net):
        def forward(self, x: Tensor) -> Tensor:
            features = self.rnn(x)[0]
            if features.isnan().any():
                raise RuntimeError("NaN!")
            output: Tensor = self.out(features.mean(1))
            return output

    assert refusal(Wary()) == {"rnn.weight_ih_l0": "its readers cannot be found (NaN!)"}


def test_a_layer_left_without_units_is_refused() -> None:
    model = drawn(Net(num_layers=2))
    units = find_recurrent(model, rows(1), names(model)).units
    with pytest.raises(ValueError, match=r"^layer 1 would have no unit left$"):
        shrunk(model, units, [[], [0, 1, 2, 3, 4]])
