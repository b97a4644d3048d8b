"""Columns that need no arithmetic are left out; everything else stays as if they were there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from orchestrator.ops import Recipe, Train
from orchestrator.state import State, of_model
from orchestrator.tasks import Task
from orchestrator.tasks.data import InMemory
from orchestrator.training.loop import loss_of, train
from orchestrator.training.narrowing import Narrowable, examine, narrowed, only_torch

WIDE = 64


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(WIDE, 48), nn.ReLU(), nn.Linear(48, 3))


ALL = Narrowable(alone=frozenset({"1.weight", "3.weight"}), on_input=frozenset({"1.weight"}))


def rows(count: int = 12, *, silent: int = 0) -> InMemory:
    """Inputs whose first `silent` features are zero in every row."""
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, WIDE, generator=draw)
    inputs[:, :silent] = 0
    return InMemory(inputs, torch.arange(count) % 3)


def task(model: Callable[[], nn.Module] = plain, **given: Any) -> Task:
    return Task(model=model, train=None, valid=None, **given)


def seen(model: nn.Module, inputs: Any = None) -> Narrowable:
    """What `examine` says of a model that is trained on two rows of `inputs`."""
    inputs = rows(2).inputs if inputs is None else inputs
    targets = torch.tensor([0, 1])
    return examine(model, inputs, lambda model: loss_of(model, (inputs, targets), task()))


class Net(nn.Module):
    """A user's network of two layers; subclasses do something odd."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDE, 48)
        self.out = nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.fc(x)))  # type: ignore[no-any-return]


class ReadsInTraining(Net):
    """Adds a penalty on the mean weight, in training alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (self.fc.weight.mean() if self.training else 0)


class ReadsShape(Net):
    """Scales by the number of inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / self.fc.weight.shape[1]


class ReadsView(Net):
    """Holds a view of a layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first_row = self.fc.weight.detach()[0]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.first_row.sum()


class ReadsAllParameters(Net):
    """Adds the norm of everything."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.cat([p.flatten() for p in self.parameters()]).norm()


class Functional(Net):
    """Multiplies with a layer's weight by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(F.linear(x, self.fc.weight, self.fc.bias)))  # type: ignore[no-any-return]


class ByKeyword(Net):
    """Calls a layer by keyword."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(input=F.relu(self.fc(input=x)))  # type: ignore[no-any-return]


class TiedOut(Net):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(WIDE, 48)
        self.again.weight = self.fc.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.fc(x) + self.again(x)))  # type: ignore[no-any-return]


class Double(nn.Linear):
    """A linear layer of the user's own, twice as large."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, 2 * self.weight, self.bias)


class OwnLayer(Net):
    """Holds one of these."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = Double(WIDE, 48)


class Unused(Net):
    """Has a layer that is not called."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x[:, :48])  # type: ignore[no-any-return]


class Attention(Net):
    """Attention reads its output layer's weight by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.MultiheadAttention(WIDE, 2)  # type: ignore[assignment]
        self.out = nn.Linear(WIDE, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc(x[None], x[None], x[None])[0][0])  # type: ignore[no-any-return]


def hooked() -> nn.Module:
    model = Net()
    model.fc.register_forward_hook(lambda module, inputs, output: output + module.weight.mean())
    return model


def weight_hooked() -> nn.Module:
    model = Net()
    model.fc.weight.register_hook(lambda gradient: gradient / gradient.shape[1])
    return model


def patched() -> nn.Module:
    model = Net()
    vars(model.fc)["forward"] = lambda x: F.linear(x, model.fc.weight).abs()
    return model


def normed() -> nn.Module:
    model = Net()
    parametrizations.weight_norm(model.fc)
    return model


@pytest.mark.parametrize(
    ("build", "alone"),
    [
        (Net, {"fc.weight", "out.weight"}),
        (ByKeyword, {"fc.weight", "out.weight"}),
        (ReadsInTraining, {"out.weight"}),
        (ReadsShape, {"out.weight"}),
        (ReadsView, {"out.weight"}),
        (ReadsAllParameters, set()),
        (Functional, {"out.weight"}),
        (TiedOut, {"out.weight"}),
        (OwnLayer, {"out.weight"}),
        (Unused, {"out.weight"}),
        (Attention, {"out.weight"}),
        (hooked, {"out.weight"}),
        (weight_hooked, {"out.weight"}),
        (patched, {"out.weight"}),
        (normed, {"out.weight"}),
        (lambda: nn.Sequential(nn.Conv1d(1, 1, 1)), set()),
    ],
)
def test_a_weight_that_anything_else_looks_at_is_left_whole(build: Callable[[], nn.Module], alone: set[str]) -> None:
    found = seen(build())
    assert found.alone == alone
    assert not found.on_input, "a user's forward pass may do something else in the next step"


class Noise(nn.Module):
    """Noise on the inputs, in training alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x) if self.training else x


@pytest.mark.parametrize(
    ("model", "on_input"),
    [
        (plain(), {"1.weight"}),
        (nn.Sequential(nn.Linear(WIDE, 3)), {"0.weight"}),
        (nn.Sequential(nn.Identity(), nn.Linear(WIDE, WIDE), nn.ReLU(), nn.Linear(WIDE, 3)), {"1.weight"}),
        (nn.Sequential(nn.Dropout(), nn.Linear(WIDE, 3)), set()),
        (nn.Sequential(nn.BatchNorm1d(WIDE), nn.Linear(WIDE, 3)), set()),
        (nn.Sequential(nn.Hardtanh(1.0, 2.0, inplace=True), nn.Linear(WIDE, 3)), set()),
        (nn.Sequential(Noise(), nn.Linear(WIDE, 3)), set()),
    ],
)
def test_layers_on_the_input_itself(model: nn.Module, on_input: set[str]) -> None:
    assert seen(model).on_input == on_input


def test_a_layer_called_twice_is_not_on_the_input() -> None:
    layer = nn.Linear(WIDE, WIDE)
    found = seen(nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(WIDE, 3)))
    assert found.alone == {"0.weight", "3.weight"}
    assert not found.on_input


def test_images_are_flattened_at_most() -> None:
    images = torch.randn(2, 1, 8, 8)
    assert seen(plain(), images).on_input == {"1.weight"}
    layer = nn.Sequential(nn.Linear(8, 8), nn.Flatten(), nn.Linear(64, 3))
    assert seen(layer, images).on_input == set()


def test_what_cannot_be_watched_is_left_whole() -> None:
    assert examine(plain(), None, lambda model: 1 / 0) == Narrowable()
    with pytest.raises(MemoryError):
        examine(plain(), None, starved)


def starved(model: nn.Module) -> None:
    raise MemoryError


def test_only_torch() -> None:
    assert only_torch(plain())
    assert only_torch(nn.TransformerEncoderLayer(8, 2, activation=F.gelu))
    assert not only_torch(nn.Sequential(Net()))
    assert not only_torch(patched())
    assert not only_torch(nn.TransformerEncoderLayer(8, 2, activation=lambda x: x))
    model = plain()
    model.register_forward_hook(lambda *given: None)
    assert not only_torch(model)


def masks(*empty: int) -> dict[str, Tensor]:
    mask = torch.rand(3, 48, generator=torch.Generator().manual_seed(2)) < 0.7
    mask[0] = True
    mask[:, list(empty)] = False
    return {"3.weight": mask}


def test_empty_columns_are_gone_and_come_back() -> None:
    model = plain()
    whole = copy.deepcopy(model)
    layer = model[3]
    assert isinstance(layer, nn.Linear)
    original = layer.weight
    with narrowed(model, masks(*range(16)), ALL) as narrow:
        assert {name: columns.tolist() for name, columns in narrow.columns.items()} == {"3.weight": [*range(16, 48)]}
        assert layer.weight.shape == (3, 32)
        assert [name for name, _ in model.named_parameters()] == [name for name, _ in whole.named_parameters()]
        with torch.no_grad():
            layer.weight += 1
        with narrow.whole():
            assert layer.weight is original
            assert layer.weight.shape == (3, 48)
            assert torch.equal(layer.weight[:, 16:], whole[3].weight[:, 16:] + 1)
        assert layer.weight.shape == (3, 32)
    assert layer.weight is original
    assert torch.equal(original[:, :16], whole[3].weight[:, :16])
    assert torch.equal(original[:, 16:], whole[3].weight[:, 16:] + 1)
    assert "forward" not in vars(layer)


@pytest.mark.parametrize(
    ("empty", "kept"),
    [
        (range(0), None),  # nothing is empty
        (range(1), None),  # filled up to a multiple of 16 again
        (range(20), range(16, 48)),  # four columns fill up
        (range(48), None),  # nothing would be left
    ],
)
def test_columns_follow_from_the_mask_alone(empty: range, kept: range | None) -> None:
    for scale in (1.0, 1e30, float("nan")):
        model = plain()
        with torch.no_grad():
            model[3].weight.mul_(scale)
        with narrowed(model, masks(*empty), ALL) as narrow:
            found = narrow.columns.get("3.weight")
            if kept is None:
                assert found is None
            else:
                # The first idle columns are the ones that fill up.
                assert found is not None
                assert found.tolist() == [*range(len(kept) - (48 - len(empty))), *range(len(empty), 48)]


def test_whole_again_after_an_exception() -> None:
    model = plain()
    before = dict(model.named_parameters())
    values = of_model(model)
    with pytest.raises(KeyboardInterrupt), narrowed(model, masks(*range(16)), ALL):
        raise KeyboardInterrupt
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert all(torch.equal(value, values[name]) for name, value in of_model(model).items())


def test_whole_again_when_memory_runs_out_half_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model = plain()
    silent = torch.arange(WIDE) < 32
    original = model[1].weight
    made: list[int] = []
    select = Tensor.index_select

    def scarce(*given: Any) -> Tensor:
        made.append(1)
        if len(made) == 2:
            raise MemoryError
        return select(*given)

    monkeypatch.setattr(Tensor, "index_select", scarce)
    with pytest.raises(MemoryError), narrowed(model, masks(*range(16)), ALL, silent):
        pass
    monkeypatch.undo()
    assert model[1].weight is original
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_copy_made_in_the_middle_stands_alone() -> None:
    model = plain()
    inputs = rows().inputs
    with narrowed(model, masks(*range(16)), ALL):
        twin = copy.deepcopy(model)
        before = twin(inputs)
        with torch.no_grad():
            model[3].weight.zero_()
        assert torch.equal(twin(inputs), before)


def trained(
    layers: Narrowable,
    state_masks: Mapping[str, Tensor],
    build: Callable[[], nn.Module] = plain,
    silent: Tensor | None = None,
    data: InMemory | None = None,
    probe: Any = None,
    **options: Any,
) -> State:
    recipe = Recipe(**{"optimizer": "adam", "lr": 1e-2, "batch_size": 4, **options})
    torch.manual_seed(0)
    state = State(weights=of_model(build()), masks=state_masks).masked()
    op = Train(recipe=recipe, order_seed=0, to=9)
    data = data or rows()
    return train(
        build(), state, op, task(), data, steps_per_epoch=3, layers=layers, silent=silent, probe=probe, probe_every=4
    )


def differences(one: State, other: State) -> float:
    assert one.weights.keys() == other.weights.keys()
    assert one.optimizer.keys() == other.optimizer.keys()
    pairs = [(one.weights[name], other.weights[name]) for name in one.weights]
    pairs += [(one.optimizer[name], other.optimizer[name]) for name in one.optimizer]
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


@pytest.mark.parametrize(
    "options",
    [{}, {"weight_decay": 0.1}, {"optimizer": "adamw", "weight_decay": 0.1}, {"optimizer": "sgd", "momentum": 0.9}],
)
def test_the_same_training(options: dict[str, Any]) -> None:
    whole = trained(Narrowable(), masks(*range(20)), **options)
    narrow = trained(ALL, masks(*range(20)), **options)
    assert differences(whole, narrow) < 1e-6
    assert narrow.weights["3.weight"].shape == (3, 48)


def test_in_double_precision_the_difference_vanishes() -> None:
    data = rows()
    exact = InMemory(data.inputs.double(), data.targets)
    states = [
        trained(layers, masks(*range(20)), lambda: plain().double(), data=exact) for layers in (Narrowable(), ALL)
    ]
    assert differences(*states) < 1e-14


def test_a_reader_that_went_unnoticed_would_train_otherwise() -> None:
    half = {"fc.weight": torch.cat([torch.zeros(48, 32), torch.ones(48, 32)], 1).bool()}

    class Penalty(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1 + self.fc.weight.pow(2).mean())

    unnoticed = Narrowable(alone=frozenset({"fc.weight"}))
    whole = trained(Narrowable(), half, Penalty)
    assert differences(whole, trained(unnoticed, half, Penalty)) > 1e-5
    assert differences(whole, trained(seen(Penalty()), half, Penalty)) < 1e-6


SILENT = torch.arange(WIDE) < 32


def test_silent_inputs_train_nothing() -> None:
    data = rows(silent=32)
    whole = trained(Narrowable(), {}, data=data)
    narrow = trained(ALL, {}, data=data, silent=SILENT)
    assert differences(whole, narrow) < 1e-6
    start = of_model(plain())["1.weight"]
    assert torch.equal(narrow.weights["1.weight"][:, :32], start[:, :32])
    assert not torch.equal(narrow.weights["1.weight"][:, 32:], start[:, 32:])


def test_weight_decay_moves_weights_on_silent_inputs() -> None:
    state = trained(ALL, {}, data=rows(silent=32), silent=SILENT, optimizer="adamw", weight_decay=0.5)
    start = of_model(plain())["1.weight"]
    assert (state.weights["1.weight"][:, :32].abs() < start[:, :32].abs()).all()


def test_a_probe_sees_the_whole_model() -> None:
    other = rows(5).inputs  # nothing is silent in these

    def outputs(layers: Narrowable) -> list[Tensor]:
        found: list[Tensor] = []

        def probe(position: int, model: nn.Module) -> None:
            with torch.no_grad():
                found.append(model(other))

        trained(layers, masks(*range(20)), data=rows(silent=32), silent=SILENT, probe=probe)
        return found

    whole, narrow = outputs(Narrowable()), outputs(ALL)
    assert len(whole) == len(narrow) == 2
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(whole, narrow, strict=True))
