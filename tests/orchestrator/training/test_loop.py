"""Training is a function of state, recipe, data and position; masked weights are exactly zero throughout."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import Dataset

from orchestrator.errors import NotFinite, StageFailed
from orchestrator.ops import Recipe, Train
from orchestrator.pruning.penalties import PENALTIES, Rows
from orchestrator.registry import Entry
from orchestrator.state import State, from_bytes, of_model, to_bytes
from orchestrator.tasks import Task
from orchestrator.tasks.data import Batches, Indexed, InMemory
from orchestrator.training import loop as training
from orchestrator.training.loop import arithmetic, learning_rate, loss_of, train
from orchestrator.training.narrowing import Narrowable, examine

X = torch.randn(26, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(26) % 3
DATA = InMemory(X, Y)
BATCH = 4
STEPS = 7  # in an epoch; the last batch has two rows


def mlp() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Dropout(0.3), nn.BatchNorm1d(32), nn.Linear(32, 3))


def task(**given: Any) -> Task:
    return Task(**{"model": mlp, "train": None, "valid": None, **given})


def recipe(**given: Any) -> Recipe:
    return Recipe(**{"optimizer": "adam", "lr": 0.01, "batch_size": BATCH, **given})


def run(
    state: State,
    to: int,
    build: Callable[[], nn.Module] = mlp,
    data: Any = DATA,
    given_task: Task | None = None,
    probe: Any = None,
    silent: Tensor | None = None,
    narrow: bool = True,
    watch: Any = None,
    **options: Any,
) -> State:
    """Train on to step `to`, as a worker does."""
    op = Train(recipe=recipe(**options), order_seed=5, to=to)
    given_task = given_task or task(model=build)
    two = data.inputs[:2] if isinstance(data, InMemory) else X[:2]
    layers = examine(build(), two, lambda model: loss_of(model, (two, Y[:2]), given_task))
    prunable = [name for name in state.weights if name.endswith(".weight") and state.weights[name].dim() > 1]
    return train(
        build(),
        state,
        op,
        given_task,
        data,
        steps_per_epoch=STEPS,
        layers=layers if narrow else Narrowable(),
        silent=silent,
        prunable=prunable,
        probe=probe,
        probe_every=1,
        watch=watch,
    )


def start(build: Callable[[], nn.Module] = mlp, masks: dict[str, Tensor] | None = None) -> State:
    return State(weights=of_model(build()), masks=masks or {}).masked()


def half(weights: dict[str, Tensor] | Any, *names: str) -> dict[str, Tensor]:
    """Masks with half of the entries and, for the narrowing, most of the columns of the last layer gone."""
    draw = torch.Generator().manual_seed(3)
    masks = {name: torch.rand(weights[name].shape, generator=draw) < 0.5 for name in names}
    if "4.weight" in masks:
        masks["4.weight"][:, :20] = False
    return masks


def same(one: State, other: State) -> bool:
    def bits(state: State) -> dict[str, bytes]:
        tensors = {**state.weights, **{"o/" + name: tensor for name, tensor in state.optimizer.items()}}
        tensors |= {"g/" + name: tensor for name, tensor in state.gathered.items()}
        return {name: tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}

    return bits(one) == bits(other) and one.position == other.position


class Augmented(Dataset[Any]):
    """Draws from every generator there is, for each item."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        noise = torch.rand(6) + random.random() + float(np.random.rand())
        return X[index] + 0.1 * noise, int(Y[index])


def made(epoch: int, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """A whole epoch at once, from the generator alone."""
    order = torch.randperm(26, generator=generator).split(BATCH)
    return [(X[rows] + epoch * 0.1, Y[rows]) for rows in order]


def drawn(epoch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One by one, from the global generators too, though it should not."""
    for rows in torch.randperm(26, generator=generator).split(BATCH):
        yield X[rows] + torch.rand(1) + random.random() + float(np.random.rand()), Y[rows]


class DrawsFromPython(nn.Module):
    """Drops a whole layer at times, by Python's generator and numpy's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.fc = nn.Linear(6, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and random.random() < 0.5:
            return self.out(x) * float(np.random.rand())  # type: ignore[no-any-return]
        return self.out(F.relu(self.fc(x)))  # type: ignore[no-any-return]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"optimizer": "adamw", "weight_decay": 0.1, "lr_schedule": "cosine", "horizon": 21, "warmup": 3},
    {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.01, "lr_schedule": "step", "milestones": (9,)},
    {"penalty": "group-lasso", "penalty_strength": 0.01, "gather": ("movement",)},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    "data", [DATA, Indexed(Augmented()), Batches(made), Batches(drawn)], ids=["memory", "dataset", "list", "generator"]
)
@pytest.mark.parametrize("masked", [False, True])
def test_a_run_may_be_cut_anywhere(data: Any, options: dict[str, Any], masked: bool) -> None:
    begin = start(masks=half(start().weights, "0.weight", "4.weight") if masked else None)
    whole = run(begin, 21, data=data, **options)
    assert not same(whole, run(begin, 20, data=data, **options))
    for cuts in ((7,), (3, 4, 13)):
        state = begin
        for cut in (*cuts, 21):
            torch.rand(cut)  # whatever the process did before
            random.seed(cut)
            np.random.seed(cut)
            state = run(state, cut, data=data, **options)
        assert same(whole, state), cuts


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("data", [DATA, Batches(drawn)], ids=["memory", "generator"])
@pytest.mark.parametrize("masked", [False, True])
def test_whoever_watches_sees_the_state_of_a_cut_and_disturbs_nothing(
    data: Any, options: dict[str, Any], masked: bool
) -> None:
    begin = start(masks=half(start().weights, "0.weight", "4.weight") if masked else None)
    silent = torch.arange(6) < 1
    seen: dict[int, State] = {}

    def watch(position: int, reached: Callable[[int], State]) -> None:
        if position % 5 == 0:
            seen[position] = from_bytes(to_bytes(reached(position)))

    whole = run(begin, 12, data=data, silent=silent, watch=watch, **options)
    assert same(whole, run(begin, 12, data=data, silent=silent, **options))
    assert list(seen) == [5, 10]
    for position, state in seen.items():
        assert same(state, run(begin, position, data=data, silent=silent, **options)), position
        assert same(run(state, 12, data=data, silent=silent, **options), whole), position


def test_whoever_watches_is_asked_after_every_step_but_the_last_and_may_end_it() -> None:
    asked: list[int] = []

    def watch(position: int, reached: Callable[[int], State]) -> None:
        asked.append(position)
        if position == 9:
            raise StageFailed("that is enough")

    run(start(), 5, watch=watch)
    assert asked == [1, 2, 3, 4]
    with pytest.raises(StageFailed, match="that is enough"):
        run(start(), 12, watch=watch)
    assert asked[-1] == 9


def test_a_model_may_draw_from_any_generator() -> None:
    begin = start(DrawsFromPython)
    whole = run(begin, 14, DrawsFromPython)
    random.seed(99)
    np.random.seed(99)
    assert same(whole, run(run(begin, 5, DrawsFromPython), 14, DrawsFromPython))


def test_a_loss_and_a_step_may_draw_from_any_generator() -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs * (1 + random.random()) + float(np.random.rand()) * outputs, targets)

    def step(model: nn.Module, batch: Any) -> Tensor:
        return loss(model(batch[0]), batch[1])

    for given_task in (task(loss=loss), task(step=step)):
        whole = run(start(), 14, given_task=given_task)
        random.seed(99)
        np.random.seed(99)
        assert same(whole, run(run(start(), 5, given_task=given_task), 14, given_task=given_task))


def test_a_cut_without_its_optimizer_would_be_noticed() -> None:
    cut = run(start(), 5)
    assert not same(run(start(), 14), run(cut.without_optimizer(), 14))


def test_epochs_have_their_own_order_and_dropout() -> None:
    seen: list[Tensor] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(targets)
        return F.cross_entropy(outputs, targets)

    run(start(), 14, given_task=task(loss=loss))
    batches = seen[1:]  # the first was watched only
    assert [len(targets) for targets in batches] == [4, 4, 4, 4, 4, 4, 2] * 2
    first, second = torch.cat(batches[:7]), torch.cat(batches[7:])
    assert torch.equal(first.sort().values, Y.sort().values)
    assert not torch.equal(first, second)


def test_a_plain_loop_gives_the_same_bits() -> None:
    build = lambda: nn.Sequential(*[layer for layer in mlp() if not isinstance(layer, nn.Dropout)])  # noqa: E731
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    batches: list[Any] = []

    def step(model: nn.Module, batch: Any) -> Tensor:
        batches.append(batch)
        return F.cross_entropy(model(batch[0]), batch[1])

    ours = run(start(build), 10, build, given_task=task(step=step))
    for inputs, targets in batches[1:]:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    theirs = of_model(model)
    assert all(torch.equal(ours.weights[name], tensor) for name, tensor in theirs.items())
    moments = optimizer.state[model[0].weight]  # type: ignore[index]
    assert torch.equal(ours.optimizer["exp_avg/0.weight"], moments["exp_avg"])
    assert ours.optimizer["step/0.weight"].item() == 10


def holds_masks(model: nn.Module, masks: dict[str, Tensor]) -> bool:
    """The law: exactly +0.0 at every masked weight."""
    for name, mask in masks.items():
        dropped = model.get_parameter(name).detach()[~mask]
        if (dropped != 0).any() or torch.signbit(dropped).any():
            return False
    return True


LAWS: list[dict[str, Any]] = [
    {"optimizer": "adam"},
    {"optimizer": "adam", "weight_decay": 0.1},
    {"optimizer": "adamw", "weight_decay": 0.1},
    {"optimizer": "sgd"},
    {"optimizer": "sgd", "momentum": 0.9},
    {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1},
    {"optimizer": "adam", "penalty": "l1", "penalty_strength": 0.1},
    {"optimizer": "sgd", "momentum": 0.9, "penalty": "group-lasso", "penalty_strength": 0.1, "gather": ("movement",)},
    {"optimizer": "adamw", "penalty": "l2", "penalty_strength": 0.1, "weight_decay": 0.1},
]


@pytest.mark.parametrize("options", LAWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_masked_weights_are_plus_zero_after_each_step(options: dict[str, Any], dtype: torch.dtype) -> None:
    # Moments from dense training, so that there is something to come back from.
    data = InMemory(X.to(dtype), Y)

    def build() -> nn.Module:
        return mlp().to(dtype)

    dense = run(start(build), 7, build, data, **options)
    masks = half(dense.weights, "0.weight", "4.weight")
    pruned = State(weights=dense.weights, masks=masks, optimizer=dense.optimizer, position=7).masked()
    held: list[bool] = []
    state = run(pruned, 14, build, data, probe=lambda step, model: held.append(holds_masks(model, masks)), **options)
    assert held == [True] * 7
    assert state.weights["0.weight"].dtype == dtype
    for slot, tensor in state.optimizer.items():
        if slot.split("/")[1] in masks and tensor.dim():
            assert not tensor[~masks[slot.split("/")[1]]].any(), slot


@pytest.mark.parametrize("options", LAWS)
def test_without_the_gradient_mask_they_would_come_back(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_factor", lambda mask, parameter: None)
    masks = half(start().weights, "0.weight", "4.weight")
    held: list[bool] = []
    with pytest.raises(StageFailed, match=r"^masked weights of '0.weight' came back in training: "):
        run(start(masks=masks), 7, probe=lambda step, model: held.append(holds_masks(model, masks)), **options)
    assert not any(held)


def test_without_masked_moments_they_would_come_back() -> None:
    options = {"optimizer": "sgd", "momentum": 0.9}
    dense = run(start(), 7, **options)
    masks = half(dense.weights, "0.weight", "4.weight")
    zeros = State(weights=dense.weights, masks=masks).masked().weights
    careless = State(weights=zeros, masks=masks, optimizer=dense.optimizer, position=7)
    with pytest.raises(StageFailed, match="came back"):
        run(careless, 14, **options)


class Lifts(nn.Linear):
    """Writes on its own weights."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.clamp_(min=0.01)
        return super().forward(input)


def test_a_model_that_writes_on_masked_weights_is_told() -> None:
    def build() -> nn.Module:
        return nn.Sequential(Lifts(6, 3))

    masks = {"0.weight": torch.rand(3, 6, generator=torch.Generator().manual_seed(0)) < 0.5}
    with pytest.raises(StageFailed, match=r"^masked weights of '0.weight' came back in training: "):
        run(start(build, masks), 3, build)


class NoGradient(torch.autograd.Function):
    """Passes a weight on; its gradient is NaN where the weight is zero, as that of a square root is."""

    @staticmethod
    def forward(context: Any, weight: Tensor) -> Tensor:
        context.save_for_backward(weight)
        return weight.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        (weight,) = context.saved_tensors
        return gradients[0] + torch.where(weight == 0, float("nan"), 0.0)


class Rooted(nn.Linear):
    """A layer with such a weight."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, NoGradient.apply(self.weight), self.bias)  # type: ignore[no-untyped-call]


def test_a_nan_gradient_at_a_masked_weight_is_not_hidden() -> None:
    def build() -> nn.Module:
        return nn.Sequential(Rooted(6, 3))

    run(start(build), 7, build)
    masks = {"0.weight": torch.ones(3, 6, dtype=torch.bool)}
    masks["0.weight"][0, 0] = False
    with pytest.raises(NotFinite):
        run(start(build, masks), 7, build)
    with pytest.raises(NotFinite, match=r"^0.weight holds NaN or infinite values at step 1: the training diverged$"):
        run(start(build, masks), 1, build)


class Holds(nn.Linear):
    """Beside its weights, what is finite though its sum is not, and a frozen NaN beside a masked entry."""

    large: Tensor

    def __init__(self) -> None:
        torch.manual_seed(1)
        super().__init__(6, 3)
        self.register_buffer("large", torch.ones(4))
        self.fixed = nn.Parameter(torch.tensor([float("nan"), 1.0, -1.0]), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        self.large.fill_(3e38)
        return super().forward(input)


def test_what_was_not_finite_before_and_what_only_sums_to_it_is_no_divergence() -> None:
    state = run(start(Holds, {"fixed": torch.tensor([True, False, True])}), 3, Holds)
    assert state.weights["large"].eq(3e38).all() and state.weights["large"].sum().isinf()
    assert state.weights["fixed"][1:].tolist() == [0, -1]


@pytest.mark.parametrize("options", [{"optimizer": "sgd", "lr": 1e30}, {"optimizer": "adam", "lr": 1e38}])
def test_a_training_that_diverges(options: dict[str, Any]) -> None:
    with pytest.raises(NotFinite, match="the training diverged$"):
        run(start(), 21, **options)


def test_a_loss_that_is_not_finite() -> None:
    with pytest.raises(NotFinite, match=r"^the training loss is nan at step 3: the training diverged$"):
        run(start(), 3, given_task=task(loss=lambda outputs, targets: (outputs * 0).sum().log() * float("nan")))


class Odd(nn.Module):
    """A frozen layer, an unused one, one used now and then, and buffers of every sort."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.frozen = nn.Linear(6, 8)
        self.frozen.requires_grad_(False)
        self.unused = nn.Linear(8, 8)
        self.seldom = nn.Linear(8, 8)
        self.out = nn.Linear(8, 3)
        self.register_buffer("causal", torch.full((2, 2), float("-inf")).triu(1))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("passing", torch.zeros(3), persistent=False)
        self.fixed = nn.Parameter(torch.tensor([float("-inf"), 0.0]), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.frozen(x)
        if self.training:
            self.calls += 1
        if self.calls % 3 == 1:
            x = x + self.seldom(x)
        return self.out(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("options", LAWS)
def test_parameters_without_a_gradient_are_left_alone(options: dict[str, Any]) -> None:
    masks = {
        f"{name}.weight": torch.rand(8, 8 if name != "frozen" else 6) < 0.5 for name in ("frozen", "unused", "seldom")
    }
    begin = start(Odd, masks)
    state = run(begin, 7, Odd, **options)
    for name in ("frozen.weight", "unused.weight", "unused.bias", "fixed", "causal"):
        assert torch.equal(state.weights[name], begin.weights[name]), name
    assert state.weights["calls"].item() == 7
    assert "passing" not in state.weights
    assert not any("frozen" in slot for slot in state.optimizer)
    assert same(state, run(run(begin, 4, Odd, **options), 7, Odd, **options))
    # Three of the seven steps reach `seldom`, as with torch.optim.
    if "adam" in str(options["optimizer"]):
        assert [state.optimizer[f"step/{name}.weight"].item() for name in ("unused", "seldom", "out")] == [0, 3, 7]


def test_dtypes_may_be_mixed() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.body = nn.Linear(6, 8).to(torch.bfloat16)
            self.head = nn.Linear(8, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x.bfloat16()).double())  # type: ignore[no-any-return]

    for options in LAWS:
        begin = start(Mixed, {"body.weight": torch.rand(8, 6) < 0.5})
        state = run(begin, 9, Mixed, **options)
        assert state.weights["body.weight"].dtype == torch.bfloat16
        assert same(state, run(run(begin, 2, Mixed, **options), 9, Mixed, **options))


def test_training_leaves_its_parent_alone() -> None:
    begin = run(start(masks=half(start().weights, "4.weight")), 5)
    copies = {name: tensor.clone() for name, tensor in {**begin.weights, **begin.optimizer}.items()}
    run(begin, 9)
    assert all(torch.equal(tensor, copies[name]) for name, tensor in {**begin.weights, **begin.optimizer}.items())


def test_batch_functions_that_give_too_few() -> None:
    def short(epoch: int, generator: torch.Generator) -> list[Any]:
        return made(epoch, generator)[: STEPS - 2 * epoch]

    run(start(), 12, data=Batches(short))
    said = r"^the batches of epoch 1 end after 5, but every epoch must have as many as epoch 0: 7$"
    with pytest.raises(StageFailed, match=said):
        run(start(), 13, data=Batches(short))


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="none"), r"one of shape \(4,\)"),
        (lambda outputs, targets: 1.0, "float"),
        (lambda outputs, targets: None, "NoneType"),
    ],
)
def test_a_loss_that_is_no_scalar(loss: Any, said: str) -> None:
    with pytest.raises(StageFailed, match=f"^the training loss must be a scalar tensor, not {said}$"):
        run(start(), 3, given_task=task(loss=loss))
    run(start(), 3, given_task=task(loss=lambda outputs, targets: F.cross_entropy(outputs, targets).reshape(1)))


def plain() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3)).double()


class Upwards(nn.Module):
    """Transposed convolutions, whose filters lie along the second dimension, one of them in two groups."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.one = nn.ConvTranspose1d(1, 4, 3)
        self.two = nn.ConvTranspose1d(4, 6, 2, groups=2)
        self.out = nn.Conv1d(6, 3, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.two(self.one(x[:, None].double())).tanh()).flatten(1)  # type: ignore[no-any-return]


def rows_of_weight(name: str, weight: Tensor) -> Tensor:
    """One row for each output."""
    if name == "one.weight":
        return weight.transpose(0, 1).flatten(1)
    if name == "two.weight":
        return torch.cat([half.transpose(0, 1).flatten(1) for half in weight.chunk(2)])
    return weight.flatten(1)


PENALTY: dict[str, Callable[[Tensor], Tensor]] = {
    "l1": lambda rows: rows.abs().sum(),
    "l2": lambda rows: rows.square().sum() / 2,
    # No weight is exactly zero but the masked ones, which do not count.
    "group-lasso": lambda rows: ((rows != 0).double().sum(1).sqrt() * torch.linalg.vector_norm(rows, dim=1)).sum(),
}


@pytest.mark.parametrize("build", [plain, lambda: Upwards().double()], ids=["linear", "transposed"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", PENALTY)
def test_a_penalty_is_as_if_added_to_the_loss(name: str, masked: bool, build: Callable[[], nn.Module]) -> None:
    dense = start(build)
    draw = torch.Generator().manual_seed(3)
    masks = {n: torch.rand(w.shape, generator=draw) < 0.5 for n, w in dense.weights.items() if w.dim() > 1}
    begin = start(build, masks) if masked else dense
    data = InMemory(X.double(), Y)

    def step(model: nn.Module, batch: Any) -> Tensor:
        loss = F.cross_entropy(model(batch[0]), batch[1])
        penalised = {name: p for name, p in model.named_parameters() if p.dim() > 1}
        return loss + 0.05 * sum(PENALTY[name](rows_of_weight(n, p)) for n, p in penalised.items())

    ours = run(begin, 9, build, data, optimizer="sgd", penalty=name, penalty_strength=0.05)
    theirs = run(begin, 9, build, data, task(step=step), optimizer="sgd")
    unpenalised = run(begin, 9, build, data, optimizer="sgd")
    for label, weight in theirs.weights.items():
        assert torch.allclose(ours.weights[label], weight, rtol=1e-11, atol=1e-14), label
        assert not torch.allclose(ours.weights[label], unpenalised.weights[label], rtol=1e-6), label


@pytest.mark.parametrize("name", PENALTY)
def test_a_penalty_counts_masked_columns_where_they_are_narrowed_away(name: str) -> None:
    begin = start(plain)
    masks = {"0.weight": torch.ones(32, 6, dtype=torch.bool), "2.weight": torch.rand(3, 32) < 0.5}
    masks["2.weight"][:, 10:] = False
    data = InMemory(X.double(), Y)
    begin = State(weights=begin.weights, masks=masks).masked()
    options = {"penalty": name, "penalty_strength": 0.05, "gather": ("movement",)}
    narrow, whole = (run(begin, 9, plain, data, narrow=narrow, **options) for narrow in (True, False))
    assert all(torch.allclose(narrow.weights[label], weight, rtol=1e-9) for label, weight in whole.weights.items())
    assert all(torch.allclose(narrow.gathered[label], moved, rtol=1e-9) for label, moved in whole.gathered.items())
    assert not narrow.weights["2.weight"][:, 10:].any()


def wide() -> nn.Module:
    """With enough inputs to be narrowed to those that are not silent."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 3))


SILENT = torch.arange(48) < 20
LOUD = InMemory(torch.randn(26, 48, generator=torch.Generator().manual_seed(0)), Y)
QUIET = InMemory(LOUD.inputs * ~SILENT, Y)


@pytest.mark.parametrize("name", PENALTY)
def test_a_penalty_shrinks_what_reads_a_silent_input(name: str) -> None:
    begin = start(wide)
    options = {"data": QUIET, "optimizer": "sgd"}

    def columns(**more: Any) -> Tensor:
        return run(begin, 9, wide, **options, **more).weights["0.weight"][:, SILENT]

    assert torch.equal(columns(silent=SILENT), begin.weights["0.weight"][:, SILENT])
    shrunk = columns(silent=SILENT, penalty=name, penalty_strength=0.05)
    assert (shrunk.abs() < begin.weights["0.weight"][:, SILENT].abs()).all()
    assert torch.equal(shrunk, columns(penalty=name, penalty_strength=0.05))


def test_a_weight_that_a_step_does_not_reach_is_not_penalised_in_it() -> None:
    begin = start(Odd)
    options = {"optimizer": "sgd", "penalty": "l1", "penalty_strength": 0.05}
    for steps in (1, 2):  # the second step does not reach `seldom`
        state = run(begin, steps, Odd, **options)
        plain = run(begin, steps, Odd, optimizer="sgd")
        assert torch.equal(state.weights["unused.weight"], begin.weights["unused.weight"])
        assert torch.equal(state.weights["frozen.weight"], begin.weights["frozen.weight"])
        assert not torch.equal(state.weights["out.weight"], plain.weights["out.weight"])
    first = run(begin, 1, Odd, **options)
    assert torch.equal(first.weights["seldom.weight"], state.weights["seldom.weight"])
    assert not torch.equal(first.weights["seldom.weight"], plain.weights["seldom.weight"])


def test_a_penalty_without_strength_changes_nothing() -> None:
    for name in PENALTY:
        assert same(run(start(), 9, penalty=name, penalty_strength=0.0), run(start(), 9))


def test_a_penalty_that_is_not_zero_at_zero_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def brings_back(weight: Tensor, gradient: Tensor, strength: float, rows: Rows) -> None:
        gradient.add_(torch.where(weight < 0, -1.0, 1.0), alpha=strength)

    monkeypatch.setitem(PENALTIES._entries, "l1", Entry(name="l1", function=brings_back))
    masks = half(start().weights, "0.weight", "4.weight")
    run(start(), 3, penalty="l1", penalty_strength=0.1)
    for options in ({"optimizer": "sgd"}, {"optimizer": "sgd", "momentum": 0.9}, {"optimizer": "adam"}):
        with pytest.raises(StageFailed, match=r"^masked weights of '0.weight' came back in training: "):
            run(start(masks=masks), 3, penalty="l1", penalty_strength=0.1, **options)


def watched(build: Callable[[], nn.Module], begin: State, to: int, **options: Any) -> dict[str, Tensor]:
    """The sum of -gradient · weight over the steps, kept by hooks on the weights."""
    sums: dict[str, Tensor] = {}

    def note(name: str, parameter: nn.Parameter, gradient: Tensor) -> None:
        sums[name] -= gradient * parameter.detach()

    def step(model: nn.Module, batch: Any) -> Tensor:
        for name, parameter in model.named_parameters():
            if name not in sums:
                sums[name] = torch.zeros_like(parameter)
                parameter.register_hook(partial(note, name, parameter))
        return F.cross_entropy(model(batch[0]), batch[1])

    op = Train(recipe=recipe(**options), order_seed=5, to=to)
    train(build(), begin, op, task(step=step), InMemory(X.double(), Y), steps_per_epoch=STEPS)
    return sums


@pytest.mark.parametrize("masked", [False, True])
def test_movement_is_the_sum_of_minus_gradient_times_weight(masked: bool) -> None:
    masks = {"0.weight": torch.rand(32, 6) < 0.5, "2.weight": torch.arange(96).reshape(3, 32) % 32 < 8}
    begin = start(plain, masks if masked else None)
    data = InMemory(X.double(), Y)
    state = run(begin, 9, plain, data, optimizer="sgd", gather=("movement",))
    expected = watched(plain, begin, 9, optimizer="sgd")
    assert set(state.gathered) == {"movement/0.weight", "movement/2.weight"}
    for label, moved in state.gathered.items():
        assert moved.shape == begin.weights[label.removeprefix("movement/")].shape
        assert torch.allclose(moved, expected[label.removeprefix("movement/")], rtol=1e-10, atol=1e-15)
        assert moved.any()
        if masked:
            assert not moved[~masks[label.removeprefix("movement/")]].any()


def test_movement_is_of_the_loss_alone() -> None:
    begin, data = start(plain), InMemory(X.double(), Y)
    options = {"optimizer": "sgd", "gather": ("movement",)}
    penalised = run(begin, 1, plain, data, penalty="l2", penalty_strength=1.0, **options)
    assert same(
        State(weights={}, gathered=penalised.gathered),
        State(weights={}, gathered=run(begin, 1, plain, data, **options).gathered),
    )


@pytest.mark.parametrize("options", LAWS)
def test_gathering_changes_no_weight(options: dict[str, Any]) -> None:
    masks = half(start().weights, "0.weight", "4.weight")
    with_it = run(start(masks=masks), 9, **{**options, "gather": ("movement",)})
    without = run(start(masks=masks), 9, **{**options, "gather": ()})
    assert without.gathered == {}
    assert same(State(weights=with_it.weights, optimizer=with_it.optimizer, position=9), without)


def test_a_statistic_that_is_lost_at_a_cut_would_be_noticed() -> None:
    options = {"gather": ("movement",)}
    whole, cut = run(start(), 14, **options), run(start(), 5, **options)
    assert same(whole, run(cut, 14, **options))
    assert not same(whole, run(State(**{**vars(cut), "gathered": {}}), 14, **options))
    fresh = cut.without_optimizer()
    assert same(run(fresh, 14, **options), run(State(weights=cut.weights, position=5), 14, **options))


def test_what_was_gathered_before_a_mask_or_on_silent_inputs_is_kept() -> None:
    """The narrowed columns hold no sums while training, and come back with those that they had."""
    options = {"gather": ("movement",)}
    dense = run(start(), 7, **options)
    masks = half(dense.weights, "0.weight", "4.weight")
    pruned = State(**{**vars(dense), "masks": masks}).masked()
    narrow, whole = (run(pruned, 14, narrow=narrow, **options) for narrow in (True, False))
    for name, mask in masks.items():
        before = dense.gathered[f"movement/{name}"]
        for state in (narrow, whole):
            assert torch.equal(state.gathered[f"movement/{name}"][~mask], before[~mask])
            assert not torch.equal(state.gathered[f"movement/{name}"][mask], before[mask])
    assert same(narrow, run(run(pruned, 10, **options), 14, **options))
    dense = run(start(wide), 7, wide, data=LOUD, **options)
    narrow, whole = (run(dense, 14, wide, data=QUIET, silent=silent, **options) for silent in (SILENT, None))
    before = dense.gathered["movement/0.weight"]
    for state in (narrow, whole):
        assert torch.equal(state.gathered["movement/0.weight"][:, SILENT], before[:, SILENT])
        assert not torch.equal(state.gathered["movement/0.weight"], before)


def test_only_its_own_statistics_come_out() -> None:
    begin = State(weights=of_model(mlp()), gathered={"other/0.weight": torch.ones(1)}, remarks={"floor": 1})
    for options in ({}, {"gather": ("movement",)}):
        state = run(begin, 3, **options)
        assert not any(label.startswith("other") for label in state.gathered)
        assert state.remarks == {}


def test_movement_of_frozen_seldom_used_and_half_precise_weights() -> None:
    state = run(start(Odd), 7, Odd, gather=("movement",))
    assert not state.gathered["movement/frozen.weight"].any()
    assert not state.gathered["movement/unused.weight"].any()
    assert state.gathered["movement/seldom.weight"].any()
    assert same(state, run(run(start(Odd), 4, Odd, gather=("movement",)), 7, Odd, gather=("movement",)))

    def build() -> nn.Module:
        return mlp().to(torch.bfloat16)

    halves = run(start(build), 7, build, InMemory(X.to(torch.bfloat16), Y), gather=("movement",))
    assert halves.gathered["movement/0.weight"].dtype == torch.float32


def test_constant_and_warm_up() -> None:
    assert [learning_rate(recipe(lr=0.5), step) for step in (0, 7, 10**6)] == [0.5, 0.5, 0.5]
    rising = recipe(lr=0.5, warmup=5)
    assert [learning_rate(rising, step) for step in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.5])


def test_steps() -> None:
    falling = recipe(lr=1.0, lr_schedule="step", milestones=(2, 4), lr_step_factor=0.5)
    assert [learning_rate(falling, step) for step in range(6)] == [1, 1, 0.5, 0.5, 0.25, 0.25]


@pytest.mark.parametrize(("schedule", "quarter"), [("linear", 0.75), ("cosine", (1 + 0.5**0.5) / 2)])
@pytest.mark.parametrize("final", [0.0, 0.2])
def test_falling_schedules(schedule: str, quarter: float, final: float) -> None:
    falling = recipe(lr=2.0, lr_schedule=schedule, horizon=108, warmup=8, lr_final_fraction=final)

    def fraction(step: int) -> float:
        return learning_rate(falling, step) / 2

    assert fraction(7) == 1
    assert fraction(8) == 1
    assert fraction(33) == pytest.approx(final + (1 - final) * quarter)
    assert fraction(58) == pytest.approx(final + (1 - final) * 0.5)
    assert fraction(83) == pytest.approx(final + (1 - final) * (1 - quarter))
    assert fraction(108) == pytest.approx(final)
    assert fraction(1000) == pytest.approx(final)


@given(st.sampled_from(["linear", "cosine", "step", "constant"]), st.integers(1, 50), st.integers(0, 9))
def test_after_the_warm_up_no_schedule_rises(schedule: str, horizon: int, warmup: int) -> None:
    falling = recipe(lr_schedule=schedule, horizon=horizon, warmup=warmup, milestones=(3, 20))
    rates = [learning_rate(falling, step) for step in range(warmup, horizon + 5)]
    assert all(0 <= later <= earlier <= 0.01 for earlier, later in pairwise(rates))


def test_arithmetic_gives_back_what_was_there() -> None:
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())

    def draw() -> None:
        assert torch.get_num_threads() == 1
        torch.rand(1)
        random.random()
        np.random.rand()
        raise KeyError

    with pytest.raises(KeyError), arithmetic(torch.device("cpu")):
        draw()
    assert torch.get_num_threads() == threads
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert before[2] == str(np.random.get_state())


def test_inner_arithmetic_does_not_end_the_outer() -> None:
    def flushed() -> bool:
        return bool((torch.full((64,), 1e-40) * 0.5 == 0).all())

    tiny = sys.float_info.min
    with arithmetic(torch.device("cpu")):
        with arithmetic(torch.device("cpu")):
            assert flushed()
        assert flushed()
    assert not flushed()
    assert tiny * 0.5 > 0
