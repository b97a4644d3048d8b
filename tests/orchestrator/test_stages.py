"""What each op yields: states whose weights, masks, moments and position are told one by one."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from orchestrator.errors import StageFailed
from orchestrator.ops import SHRUNK, Gather, Init, Prune, Recalibrate, Recipe, Regrow, Rewind, Train
from orchestrator.pruning.masks import index_hashes
from orchestrator.seeds import derive
from orchestrator.stages import Stages, copies_truly, rewind
from orchestrator.state import State, into_model
from orchestrator.tasks import Task
from orchestrator.tasks.load import LoadedTask
from orchestrator.tasks.source import Source
from orchestrator.training.loop import learning_rate
from orchestrator.training.narrowing import Narrowable

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(24) % 3
EPOCH = 6


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def stages(**given: Any) -> Stages:
    fields: dict[str, Any] = {"model": net, "train": (X, Y), "valid": (X, Y), "data_version": "1", **given}
    return Stages(LoadedTask(Task(**fields), Source(name="fake.py", module="fake", files={}, digest="0"), {}))


RECIPE = Recipe(optimizer="adam", lr=0.01, batch_size=4, lr_schedule="cosine", horizon=5 * EPOCH, lr_final_fraction=0.1)


def train(to: int, **given: Any) -> Train:
    return Train(**{"recipe": RECIPE, "order_seed": 0, "to": to, **given})


def prune(**given: Any) -> Prune:
    return Prune(**{"criterion": "magnitude", "scope": "global", "rate": 0.5, **given})


def gradients(room: Stages, state: State, **given: Any) -> dict[str, Tensor]:
    op = Gather(**{"what": ("gradient",), "examples": 1024, "seed": 0, "round": 1, **given})
    return {name.removeprefix("gradient/"): tensor for name, tensor in room.run(op, [state]).gathered.items()}


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def under(masks: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By hand: zeros under the masks, everything else as it is."""
    found = {}
    for name, tensor in tensors.items():
        mask = masks.get(name.split("/")[-1])
        found[name] = tensor if mask is None or tensor.dim() == 0 else tensor * mask
    return found


def test_init_follows_its_seed_alone() -> None:
    room = stages()
    torch.manual_seed(5)
    first = room.run(Init(seed=1), [])
    torch.manual_seed(6)
    assert equal(first.weights, room.run(Init(seed=1), []).weights)
    assert not equal(first.weights, room.run(Init(seed=2), []).weights)
    assert (first.masks, first.optimizer, first.position) == ({}, {}, 0)


def test_init_of_a_model_that_comes_trained() -> None:
    def trained() -> nn.Module:
        model = net()
        for parameter in model.parameters():
            nn.init.ones_(parameter)
        return model

    room = stages(model=trained, fresh=net)
    assert room.run(Init(seed=1), []).weights["0.weight"].unique().tolist() == [1]
    assert room.run(Init(seed=1, fresh=True), []).weights["0.weight"].unique().numel() > 1


def test_prune_masks_weights_and_moments_and_keeps_the_rest() -> None:
    room = stages()
    dense = room.run(train(2 * EPOCH), [room.run(Init(seed=0), [])])
    copies = {name: tensor.clone() for name, tensor in {**dense.weights, **dense.optimizer}.items()}
    pruned = room.run(prune(), [dense])
    assert set(pruned.masks) == {"0.weight", "4.weight"}
    assert sum(int(mask.sum()) for mask in pruned.masks.values()) == 36
    assert equal(pruned.weights, under(pruned.masks, dense.weights))
    assert equal(pruned.optimizer, under(pruned.masks, dense.optimizer))
    assert pruned.optimizer["step/0.weight"].item() == 2 * EPOCH
    assert pruned.position == dense.position == 2 * EPOCH
    assert not any(
        torch.signbit(tensor[~pruned.masks[name]]).any()
        for name, tensor in pruned.weights.items()
        if name in pruned.masks
    )
    assert equal(copies, {**dense.weights, **dense.optimizer}), "the parent was written on"
    again = room.run(prune(), [pruned])
    assert all(not (again.masks[name] & ~mask).any() for name, mask in pruned.masks.items())


def chain() -> tuple[Stages, State, State, State]:
    """An ancestor at epoch 1, the dense model at epoch 5, and the dense model pruned."""
    room = stages()
    ancestor = room.run(train(EPOCH), [room.run(Init(seed=0), [])])
    dense = room.run(train(5 * EPOCH), [ancestor])
    return room, ancestor, dense, room.run(prune(), [dense])


def test_the_three_ways_to_retrain_differ_in_weights_position_and_optimizer_alone() -> None:
    _, ancestor, dense, pruned = chain()
    finetune = pruned.without_optimizer()
    lr_rewound = rewind(Rewind(what="lr", to=2 * EPOCH), [pruned])
    rewound = rewind(Rewind(what="weights"), [pruned, ancestor])

    assert equal(finetune.masks, pruned.masks)
    assert equal(lr_rewound.masks, pruned.masks)
    assert equal(rewound.masks, pruned.masks)

    kept = under(pruned.masks, dense.weights)  # buffers too: the running statistics
    assert equal(finetune.weights, kept)
    assert equal(lr_rewound.weights, kept)
    assert equal(rewound.weights, under(pruned.masks, ancestor.weights))
    assert not torch.equal(dense.weights["1.running_mean"], ancestor.weights["1.running_mean"])

    assert finetune.optimizer == {}
    assert lr_rewound.optimizer == {}
    assert equal(rewound.optimizer, under(pruned.masks, ancestor.optimizer))
    assert rewound.optimizer["step/0.weight"].item() == EPOCH

    assert [state.position for state in (finetune, lr_rewound, rewound)] == [5 * EPOCH, 2 * EPOCH, EPOCH]
    rates = [learning_rate(RECIPE, state.position) for state in (finetune, lr_rewound, rewound)]
    assert rates[0] == pytest.approx(0.001)
    assert rates[0] < rates[1] < rates[2] < 0.01


def test_a_rewind_that_does_not_rewind_would_be_noticed() -> None:
    _, ancestor, dense, pruned = chain()
    rewound = rewind(Rewind(what="weights"), [pruned, dense])
    assert not equal(rewound.weights, under(pruned.masks, ancestor.weights))


def test_rewound_to_init_the_optimizer_is_fresh() -> None:
    room, _, _, pruned = chain()
    init = room.run(Init(seed=0), [])
    rewound = rewind(Rewind(what="weights"), [pruned, init])
    assert (rewound.optimizer, rewound.position) == ({}, 0)
    again = room.run(train(3), [rewound])
    assert again.optimizer["step/0.weight"].item() == 3
    assert not any(again.weights[name][~mask].any() for name, mask in pruned.masks.items())


def test_under_a_constant_rate_only_order_tells_lr_rewinding_from_fine_tuning() -> None:
    constant = Recipe(optimizer="adam", lr=0.01, batch_size=4)
    assert learning_rate(constant, 2 * EPOCH) == learning_rate(constant, 5 * EPOCH)


def random_masks(room: Stages, state: State, **given: Any) -> Mapping[str, Tensor]:
    return room.run(prune(**{"criterion": "random", "seed": 3, "round": 1, **given}), [state]).masks


def test_random_draws_follow_seed_round_and_name() -> None:
    room = stages(model=lambda: nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)))
    state = room.run(Init(seed=0), [])
    other = room.run(Init(seed=1), [])
    masks = random_masks(room, state, scope="layer")
    assert equal(masks, random_masks(room, other, scope="layer")), "the weights have no say"
    assert not equal(masks, random_masks(room, state, scope="layer", seed=4))
    assert not equal(masks, random_masks(room, state, scope="layer", round=2))
    assert not torch.equal(masks["0.weight"], masks["1.weight"])
    draw = torch.Generator().manual_seed(derive(3, "random", 1, "0.weight"))
    scores = torch.empty(6, 6, dtype=torch.float64).uniform_(generator=draw)
    assert torch.equal(masks["0.weight"], scores > scores.flatten().kthvalue(18).values)


def test_taylor_is_the_change_of_the_loss_to_first_order() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()

    room = stages(model=build, train=(X.double(), Y), valid=(X.double(), Y))
    state = room.run(Init(seed=0), [])
    found = gradients(room, state)
    model = room.model()

    def loss(weights: Mapping[str, Tensor]) -> float:
        into_model(weights, model)
        with torch.no_grad():
            return float(F.cross_entropy(model(X.double()), Y))

    for name in room.prunable:
        for index in range(state.weights[name].numel()):
            weight = float(state.weights[name].view(-1)[index])
            ends = []
            for step in (1e-5, -1e-5):  # a hundred-thousandth of the way to removing it, and the other way
                moved = {key: tensor.clone() for key, tensor in state.weights.items()}
                moved[name].view(-1)[index] -= step * weight
                ends.append(loss(moved))
            change = (ends[0] - ends[1]) / 2e-5
            assert abs(weight * float(found[name].view(-1)[index])) == pytest.approx(abs(change), rel=1e-4, abs=1e-9)


class Augmented(Dataset[Any]):
    """Draws from every global generator for each item."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return X[index] + torch.rand(6) + random.random() + float(np.random.rand()), int(Y[index])


def test_taylor_draws_its_examples_by_seed_and_round() -> None:
    room = stages(train=Augmented())
    state = room.run(Init(seed=0), [])

    torch.manual_seed(1)
    random.seed(1)
    before = torch.get_rng_state()
    first = gradients(room, state, examples=5)
    assert torch.equal(before, torch.get_rng_state())
    random.seed(2)
    np.random.seed(2)
    torch.manual_seed(2)
    assert equal(first, gradients(room, state, examples=5))
    assert not equal(first, gradients(room, state, examples=5, seed=1))
    assert not equal(first, gradients(room, state, examples=5, round=2))


def test_examples_of_a_batch_function() -> None:
    room = stages(train=lambda epoch, generator: [(X[rows], Y[rows]) for rows in torch.arange(24).split(4)])
    counts = [sum(len(x) for x, _ in room._examples(count, torch.Generator())) for count in (1, 4, 5, 8, 10**6)]
    assert counts == [4, 4, 8, 8, 24]
    rows = stages()
    assert [sum(len(x) for x, _ in rows._examples(n, torch.Generator())) for n in (1, 5, 24, 99)] == [1, 5, 24, 24]


def test_attention_projections_and_tied_weights_are_pruned_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 4)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.out = nn.Linear(4, 5, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            x = x + self.attention(x, x, x, need_weights=False)[0]
            return self.out(x.mean(1))  # type: ignore[no-any-return]

    tokens = torch.arange(48).reshape(24, 2) % 5
    room = stages(model=Tied, train=(tokens, tokens[:, 0]), valid=(tokens, tokens[:, 0]))
    assert room.prunable == ["embed.weight", "attention.in_proj_weight", "attention.out_proj.weight"]
    pruned = room.run(prune(rate=0.75), [room.run(train(3), [room.run(Init(seed=0), [])])])
    assert sum(int(mask.sum()) for mask in pruned.masks.values()) == 21  # of 20 + 48 + 16
    state = room.run(train(12), [pruned])
    assert not any(state.weights[name][~mask].any() for name, mask in state.masks.items())
    model: Any = room.model_of(state)
    assert model.out.weight is model.embed.weight
    assert torch.equal(model.out.weight, state.weights["embed.weight"])
    assert gradients(room, state).keys() == set(room.prunable)


class Closure(nn.Module):
    """Its activation reaches for a parameter through a function that remembers the module it was made in."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.fc = nn.Linear(6, 3)
        self.act = lambda x: self.scale * x

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc(x))  # type: ignore[no-any-return]


class Hooked(nn.Module):
    """Keeps what passes through a layer, by a hook, and adds it to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.ones(()))
        self.fc.register_forward_hook(lambda module, inputs, output: output * self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)  # type: ignore[no-any-return]


class GradientHook(nn.Module):
    """Doubles one parameter's gradient, which a deep copy forgets to do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.ones(()))
        self.scale.register_hook(double)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.scale  # type: ignore[no-any-return]


def double(gradient: Tensor) -> Tensor:
    return 2 * gradient


class Locked(nn.Module):
    """Cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.ones(()))
        self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.scale  # type: ignore[no-any-return]


@pytest.mark.parametrize("build", [Closure, Hooked, GradientHook, Locked])
def test_models_that_cannot_be_copied_are_built_anew(build: Callable[[], nn.Module]) -> None:
    assert not copies_truly(build())
    room = stages(model=build)
    init = room.run(Init(seed=0), [])
    state = room.run(train(4), [init])
    assert state.weights["scale"] != init.weights["scale"]
    assert room.model() is not room.model()
    model = room.model_of(state)
    with torch.no_grad():
        outputs = model(X)
        by_hand = F.linear(X, state.weights["fc.weight"], state.weights["fc.bias"]) * state.weights["scale"]
    assert torch.allclose(outputs, by_hand)


def test_a_plain_model_is_copied() -> None:
    assert copies_truly(net())
    assert copies_truly(nn.TransformerEncoderLayer(8, 2))
    room = stages()
    model = room.model()
    with torch.no_grad():
        model[0].weight.zero_()  # type: ignore[index]
    assert room.model()[0].weight.any()  # type: ignore[index]


class Counts(nn.Module):
    """Keeps a count in plain Python."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.fc(x) / self.calls  # type: ignore[no-any-return]


def test_what_a_model_keeps_in_python_starts_anew_each_time() -> None:
    room = stages(model=Counts)
    init = room.run(Init(seed=0), [])
    first = room.run(train(5), [init])
    assert room.narrowable.alone == {"fc.weight"}
    assert room.flops.total == 36
    assert equal(first.weights, room.run(train(5), [init]).weights)
    assert room.model().calls == 0


def test_silent_features() -> None:
    inputs = X.clone()
    inputs[:, [0, 3]] = 0
    inputs[0, 1] = -0.0
    assert stages(train=(inputs, Y)).silent.tolist() == [True, False, False, True, False, False]  # type: ignore[union-attr]
    assert stages(train=(inputs.reshape(24, 2, 3), Y)).silent.tolist() == [True, False, False, True, False, False]  # type: ignore[union-attr]
    assert stages(train=({"x": inputs}, Y)).silent is None
    assert stages(train=Augmented()).silent is None
    tokens = torch.tensor([0, 1, 2])
    silent = stages(model=lambda: nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 3)), train=(tokens, tokens)).silent
    assert silent is not None
    assert silent.tolist() == [False]


def test_a_step_of_the_users_own_narrows_nothing() -> None:
    def step(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    assert stages().narrowable.alone == {"0.weight", "4.weight"}
    assert stages(step=step).narrowable == Narrowable()


def test_global_ties_are_spread_over_layers() -> None:
    def ones() -> nn.Module:
        model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
        for parameter in model.parameters():
            nn.init.ones_(parameter)
        return model

    room = stages(model=ones)
    masks = room.run(prune(), [room.run(Init(seed=0), [])]).masks
    hashes = torch.cat([index_hashes(name, 36) for name in ("0.weight", "1.weight")])
    kept = torch.cat([masks["0.weight"].flatten(), masks["1.weight"].flatten()])
    assert int(kept.sum()) == 36
    assert 9 < int(masks["0.weight"].sum()) < 27
    assert hashes[kept].max() < hashes[~kept].min()


def test_statistics_are_of_the_training_data_alone() -> None:
    other = stages(valid=(X + 100, Y), test=(X - 100, Y))
    room = stages()
    state = room.run(Init(seed=0), [])
    for what in ("gradient", "activation", "input_norm"):
        op = Gather(what=(what,), examples=7, seed=0, round=1)
        assert equal(room.run(op, [state]).gathered, other.run(op, [state]).gathered)


def test_a_criterion_without_what_it_needs_is_refused() -> None:
    room = stages()
    state = room.run(Init(seed=0), [])
    with pytest.raises(StageFailed, match="needs 'movement', which the training before this pruning did not gather"):
        room.run(prune(criterion="movement"), [state])


def test_movement_is_gathered_on_the_way_to_the_pruning() -> None:
    room = stages()
    gathering = replace(RECIPE, gather=("movement",))
    trained = room.run(train(EPOCH, recipe=gathering), [room.run(Init(seed=0), [])])
    pruned = room.run(prune(criterion="movement"), [trained])
    sums = torch.cat([trained.gathered[f"movement/{name}"].flatten() for name in room.prunable])
    kept = torch.cat([pruned.masks[name].flatten() for name in room.prunable])
    assert sums[kept].min() >= sums[~kept].max()


@pytest.mark.parametrize("by", ["set", "rigl"])
def test_regrowing_keeps_the_count_and_grows_zeros(by: str) -> None:
    room = stages()
    pruned = room.run(prune(scope="layer"), [room.run(Init(seed=0), [])])
    state = room.run(train(EPOCH), [pruned])
    given = room.run(Gather(what=("gradient",), examples=24, seed=0, round=1), [state])
    parents = [state, given] if by == "rigl" else [state]
    after = room.run(Regrow(by=by, fraction=0.5, seed=0, round=1), parents)
    for name in room.prunable:
        assert int(after.masks[name].sum()) == int(state.masks[name].sum())
        grown = after.masks[name] & ~state.masks[name]
        assert grown.any()
        assert not after.weights[name][grown].any()
        assert not after.optimizer[f"exp_avg/{name}"][grown | ~after.masks[name]].any()
        if by == "rigl":
            slopes = given.gathered[f"gradient/{name}"].abs()
            assert slopes[grown].min() >= slopes[~after.masks[name] & ~state.masks[name]].max()


def test_opened_masks_are_trained_from_zero() -> None:
    room = stages()
    pruned = room.run(prune(), [room.run(Init(seed=0), [])])
    opened = room.run(Regrow(by="all", fraction=1.0, factors=(("4.weight", 0.0),)), [pruned])
    assert opened.masks["0.weight"].all()
    assert torch.equal(opened.masks["4.weight"], pruned.masks["4.weight"]), "protected"
    assert equal(opened.weights, pruned.weights)
    trained = room.run(train(3), [opened])
    assert trained.weights["0.weight"][~pruned.masks["0.weight"]].any()


def test_recalibration_gives_the_statistics_of_the_pruned_model() -> None:
    room = stages()
    pruned = room.run(prune(rate=0.8), [room.run(train(3 * EPOCH), [room.run(Init(seed=0), [])])])
    after = room.run(Recalibrate(examples=24, seed=0), [pruned])
    hidden = F.linear(X, pruned.weights["0.weight"], pruned.weights["0.bias"])
    assert torch.allclose(after.weights["1.running_mean"], hidden.mean(0), atol=1e-6)
    assert torch.allclose(after.weights["1.running_var"], hidden.var(0), atol=1e-6)
    assert not torch.allclose(pruned.weights["1.running_mean"], hidden.mean(0), atol=1e-2)
    assert equal(after.masks, pruned.masks)
    assert equal(after.optimizer, pruned.optimizer)
    same = {name for name, tensor in after.weights.items() if torch.equal(tensor, pruned.weights[name])}
    assert same == {name for name in after.weights if not name.startswith("1.") or name in ("1.weight", "1.bias")}


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3))


def test_units_go_with_everything_that_makes_or_reads_them() -> None:
    room = stages(model=wide)
    pruned = room.run(prune(structure="neuron", scope="layer"), [room.run(Init(seed=0), [])])
    gone = ~pruned.masks["0.weight"].any(1)
    assert int(gone.sum()) == 4
    for name in ("0.weight", "0.bias", "1.weight", "1.bias"):
        assert torch.equal(~pruned.masks[name].reshape(8, -1).any(1), gone)
    assert torch.equal(~pruned.masks["3.weight"].any(0), gone)
    assert pruned.masks["5.weight"].any(1).all(), "the outputs stay"
    assert pruned.remarks["units"] == [8, 15] or pruned.remarks["units"] == [7, 15]


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_training_the_shrunk_model_is_training_the_masked_one(optimizer: str) -> None:
    room = stages(model=lambda: wide().double(), train=(X.double(), Y), valid=(X.double(), Y))
    recipe = replace(RECIPE, optimizer=optimizer, momentum=0.9 if optimizer == "sgd" else 0.0)
    trained = room.run(train(EPOCH, recipe=recipe), [room.run(Init(seed=0), [])])
    pruned = room.run(prune(structure="neuron", scope="layer"), [trained])
    masked = room.run(train(3 * EPOCH, recipe=recipe), [pruned])
    small = replace(recipe, arithmetic=recipe.arithmetic + SHRUNK)
    shrunk = room.run(train(3 * EPOCH, recipe=small), [pruned])
    assert shrunk.weights.keys() == masked.weights.keys()
    assert shrunk.optimizer.keys() == masked.optimizer.keys()
    assert equal(shrunk.masks, masked.masks)
    for name, tensor in masked.weights.items():
        if not name.startswith("1.running"):  # of a unit that is gone nobody keeps figures
            assert torch.allclose(shrunk.weights[name].double(), tensor.double(), atol=1e-9), name
    assert all(torch.allclose(shrunk.optimizer[name], moment, atol=1e-9) for name, moment in masked.optimizer.items())
