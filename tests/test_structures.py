"""Whole studies of every structure, scope and amount, on a small convolutional net and a small transformer."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator import Study
from orchestrator.errors import InputError
from orchestrator.ops import Prune
from orchestrator.planning.trial import trial_plan
from orchestrator.pools.local import LocalPool
from orchestrator.seeds import derive
from orchestrator.spec import StudySpec
from orchestrator.state import State
from tests.orchestrator.pools import small

TASK = '''
import torch
import torch.nn.functional as F
from torch import nn

from orchestrator.tasks import Task
from orchestrator.tasks.models import Transformer


def task(model: str = "conv", side: int = 6) -> Task:
    """64 pictures of three classes: the bright column says which."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(96) % 3
    x = torch.randn(96, 1, side, side, generator=generator)
    for label in range(3):
        x[y == label, :, :, label] += 2.0
    inputs = x if model == "conv" else x.reshape(96, side * side)
    return Task(
        model=conv if model == "conv" else lambda: Transformer(side, side, classes=3, features=8, heads=4),
        train=(inputs[:64], y[:64]),
        valid=(inputs[64:80], y[64:80]),
        test=(inputs[80:], y[80:]),
        loss=F.cross_entropy,
    )


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))) + x)


def conv():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        Residual(8),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 12),
        nn.ReLU(),
        nn.Linear(12, 3),
    )
'''
TRAIN: Mapping[str, Any] = {"epochs": 1, "retrain_epochs": 0.5, "batch_size": 16, "lr": 0.01}
CONV = {"0": 72, "3.conv1": 576, "3.conv2": 576, "6": 384, "8": 36}
"""The prunable weights of the small convolutional net, layer by layer."""


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "orchardist")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the task."""
    folder = tmp_path_factory.mktemp("structures")
    (folder / "pictures.py").write_text(TASK)
    return folder


class Ran:
    """One proposal, run on its own in a store that others of the same model share."""

    def __init__(self, root: Path, model: str, params: Mapping[str, Any], **sections: Any) -> None:
        self.params = dict(params)
        spec = StudySpec(
            name=derive_name(model, params, sections),
            task="pictures.py",
            task_params={"model": model},
            trials=1,
            sampler="random",
            objectives=["accuracy", "sparsity"],
            train=TRAIN | sections.pop("train", {}),
            space=dict(params),
            **sections,
        )
        self.study = Study(spec, f"memory://structures-{model}", root=root)
        self.standing = self.study.run(LocalPool())
        rows = self.study.table().to_pylist()
        self.rows = sorted((row for row in rows if row["round"]), key=lambda row: row["round"])
        self.dense = next(row for row in rows if not row["round"])

    @property
    def last(self) -> dict[str, Any]:
        assert self.standing.failed == 0, self.study.status()["failures"]
        return self.rows[-1]

    def state(self, row: Mapping[str, Any] | None = None) -> State:
        return small.models(self.study.store, self.study.spec.name)[(row or self.last)["key"]]

    def kept(self) -> dict[str, int]:
        """How many weights of each prunable layer are kept."""
        masks = self.state().masks
        return {name: int(masks[f"{name}.weight"].sum()) for name in CONV}


def derive_name(*said: Any) -> str:
    """A study's name that says what it is of."""
    return f"study-{derive(0, *(str(part) for part in said))}"


AMOUNTS: Mapping[str, Mapping[str, Any]] = {
    "rate": {"rate": 0.3, "rounds": 2},
    "sparsity": {"sparsity": 0.5},
    "unit_sparsity": {"unit_sparsity": 0.5},
    "flops": {"flops_budget": 0.5},
    "params": {"params_budget": 0.5},
    "threshold": {"threshold": 0.2},
}


@pytest.mark.parametrize(
    ("structure", "scope", "amount"),
    [
        *[("weight", "global", "rate"), ("weight", "layer", "flops"), ("weight", "global", "params")],
        *[("weight", "layer", "threshold"), ("weight", "row", "sparsity")],
        *[("filter", "layer", "rate"), ("filter", "global", "sparsity"), ("filter", "layer", "params")],
        *[("channel", "global", "unit_sparsity"), ("channel", "layer", "flops"), ("channel", "layer", "threshold")],
        *[("4x1", "layer", "rate"), ("4x1", "global", "sparsity"), ("4x1", "layer", "unit_sparsity")],
    ],
)
def test_convolutions(root: Path, structure: str, scope: str, amount: str) -> None:
    how = dict(AMOUNTS[amount])
    if amount == "threshold" and structure != "weight":
        how = {"threshold": 0.8}  # the norm of a whole unit
    _check(Ran(root, "conv", {"structure": structure, "scope": scope, **how}), amount, **how)


@pytest.mark.parametrize(
    ("structure", "scope", "how"),
    [
        ("neuron", "layer", {"rate": 0.25, "rounds": 2}),
        ("neuron", "global", {"sparsity": 0.25}),
        ("head", "layer", {"unit_sparsity": 0.5}),
        ("head", "global", {"flops_budget": 0.8}),
        ("layer", "layer", {"rate": 0.25}),
        ("layer", "global", {"params_budget": 0.75}),
    ],
)
def test_transformers(root: Path, structure: str, scope: str, how: dict[str, Any]) -> None:
    (amount, *_) = how
    ran = Ran(root, "transformer", {"structure": structure, "scope": scope, **how})
    _check(ran, amount.removesuffix("_budget"), **how)


def _check(ran: Ran, amount: str, **how: Any) -> None:
    row, how = ran.last, how or dict(AMOUNTS[amount])
    assert 0 < row["sparsity"] < 1
    state = ran.state()
    for name, mask in state.masks.items():
        assert not state.weights[name][~mask].any(), name
    if amount == "sparsity":
        assert row["sparsity"] >= how["sparsity"] - 1e-9
    if amount == "unit_sparsity":
        assert row["unit_sparsity"] >= how["unit_sparsity"] - 0.05
    if amount == "flops":
        assert row["flops_effective"] <= how["flops_budget"] * row["flops"]
    if amount == "params":
        kept = sum(int(mask.sum()) for mask in state.masks.values())
        whole = sum(mask.numel() for mask in state.masks.values())
        assert row["total_params"] - (whole - kept) <= how["params_budget"] * row["total_params"]


# Training without what is removed is the same training.


@pytest.mark.parametrize(
    "params",
    [
        {"structure": "channel", "unit_sparsity": 0.4, "rounds": 2, "optimizer": "sgd", "momentum": 0.9},
        {"structure": "filter", "rate": 0.4, "phase": "during", "optimizer": "adam"},
        {"structure": "channel", "rate": 0.4, "phase": "before", "weight_decay": 0.01, "optimizer": "adamw"},
        {"structure": "filter", "rate": 0.4, "retrain": "rewind"},
    ],
    ids=lambda params: f"{params['structure']}-{params.get('optimizer', 'adam')}",
)
def test_training_shrunk(root: Path, params: dict[str, Any]) -> None:
    masked, shrunk = (Ran(root, "conv", params, train={"shrunk": shrunk}) for shrunk in (False, True))
    assert masked.last["key"] != shrunk.last["key"]
    one, other = masked.state(), shrunk.state()
    assert all(torch.equal(one.masks[name], other.masks[name]) for name in one.masks)
    for name, weight in one.weights.items():
        # What a norm has seen of a removed channel is nobody's concern.
        kept = one.masks.get(f"{name.rpartition('.')[0]}.weight" if "running" in name else name, torch.tensor(True))
        apart = (weight - other.weights[name]).where(kept, 0).abs().double().max()
        assert float(apart) <= 1e-4 * max(1e-3, float(weight.abs().double().max())), name


# When, and what grows back.


def ops(ran: Ran) -> list[str]:
    """The stages behind the last point, by the names of their ops."""
    nodes = trial_plan(ran.study.spec.settings(ran.params), 0, ran.study.check()).nodes
    return [type(node.op).__name__ for node in nodes]


def test_gradual_pruning_while_training(root: Path) -> None:
    params = {"sparsity": 0.8, "schedule": "cubic", "phase": "during", "prune_begin": 0.25, "prune_end": 0.75}
    by_steps = Ran(root, "conv", params | {"prune_every_steps": 1})
    by_epochs = Ran(root, "conv", params | {"prune_every": 0.25})
    assert by_steps.last["key"] == by_epochs.last["key"]
    assert ops(by_steps) == ["Init", "Train", "Prune", "Train", "Prune", "Train", "Prune", "Train"]
    assert by_steps.last["sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert sum(by_steps.kept().values()) == 1644 - round(0.8 * 1644)


def test_masks_that_open_and_close(root: Path) -> None:
    params = {"rate": 0.75, "rounds": 3, "phase": "during", "regrow": "all", "epochs": 2}
    ran = Ran(root, "conv", params)
    assert ops(ran).count("Regrow") == 2
    # Each pruning is of all weights again: a rate of what is left would leave a 64th.
    assert ran.kept() == {name: size - int(0.75 * size + 0.5) for name, size in CONV.items()}


@pytest.mark.parametrize("regrow", ["set", "rigl"])
def test_masks_that_move(root: Path, regrow: str) -> None:
    params = {"criterion": "random", "sparsity": 0.5, "allocation": "erk", "phase": "before"}
    still = Ran(root, "conv", params)
    ran = Ran(root, "conv", params | {"regrow": regrow, "regrow_every": 0.25})
    assert ops(ran).count("Regrow") == 3 and ops(ran).count("Gather") == (3 if regrow == "rigl" else 0)
    assert ran.kept() == still.kept()
    assert any(not torch.equal(ran.state().masks[name], mask) for name, mask in still.state().masks.items())


@pytest.mark.parametrize("phase", ["during", "after"])
def test_movement_is_gathered_while_training(root: Path, phase: str) -> None:
    params = {"criterion": "movement", "sparsity": 0.5, "rounds": 2, "phase": phase, "scope": "global"}
    ran = Ran(root, "conv", params)
    assert sum(ran.kept().values()) == 822
    assert ran.last["key"] != Ran(root, "conv", params | {"criterion": "magnitude"}).last["key"]


def test_a_hundred_prunings_are_neither_evaluated_nor_stored(root: Path) -> None:
    params = {"criterion": "synflow", "scope": "global", "sparsity": 0.95, "rounds": 100, "phase": "before"}
    ran = Ran(root, "conv", params, prune={"floor": 0})
    plan = trial_plan(ran.study.spec.settings(params), 0, ran.study.check())
    prunes = [node for node in plan.nodes if isinstance(node.op, Prune)]
    assert len(prunes) == 100 and not any(node.evaluated or node.stored for node in prunes)
    assert not any(ran.study.store.states.read(node.key) for node in prunes)
    assert sum(ran.kept().values()) == 1644 - int(0.95 * 1644 + 0.5)
    assert all(ran.kept()[name] for name in ("0", "6", "8"))  # a skip connection leads past the others


def test_a_thousand_prunings_are_planned(root: Path) -> None:
    params = {"criterion": "synflow", "scope": "global", "sparsity": 0.9, "rounds": 1000, "phase": "before"}
    spec = StudySpec(name="long", task="pictures.py", train=TRAIN, space=params)
    plan = trial_plan(spec.settings(params), 0, Study(spec, "memory://long", root=root).check())
    assert len(plan.nodes) == 1002


# Criteria that need more than weights.


@pytest.mark.parametrize(
    ("criterion", "more"),
    [
        ("obs", {"criteria.obs.examples": 16}),
        ("obs", {"structure": "filter"}),
        ("sparsegpt", {}),
        ("sparsegpt", {"scope": "row"}),
        ("wanda", {"scope": "row"}),
        ("taylor", {"structure": "channel"}),
        ("skeletonization", {"structure": "neuron"}),
        ("skeletonization", {"structure": "2x2"}),
        ("random", {"structure": "filter", "rounds": 2}),
        ("batchnorm", {"structure": "filter"}),
        ("lamp", {"scope": "global"}),
        ("grasp", {"phase": "before"}),
    ],
)
def test_criteria(root: Path, criterion: str, more: dict[str, Any]) -> None:
    _check(Ran(root, "conv", {"criterion": criterion, "rate": 0.4} | more), "rate", rate=0.4)


@pytest.mark.parametrize("criterion", ["magnitude", "sparsegpt", "wanda"])
def test_two_of_four(root: Path, criterion: str) -> None:
    ran = Ran(root, "conv", {"criterion": criterion, "structure": "2:4"})
    assert ran.kept() == {"0": 72, "3.conv1": 288, "3.conv2": 288, "6": 192, "8": 18}
    first = ran.state().masks["3.conv1.weight"]
    assert first.reshape(8, 2, 4, 3, 3).sum(dim=2).eq(2).all()  # along the channels, at each place of the kernel
    assert json.loads(ran.last["layers"])


def test_ignored_branches_stay(root: Path) -> None:
    params = {"structure": "layer", "rate": 0.5}
    ran = Ran(root, "transformer", params, prune={"ignore": ["layer1.*"]})
    masks = ran.state().masks
    assert all(bool(mask.all()) for name, mask in masks.items() if name.startswith("layer1"))
    assert ran.last["unit_sparsity"] == 0.25


@pytest.mark.parametrize(
    ("model", "params", "sections", "said"),
    [
        ("conv", {"structure": "head", "rate": 0.5}, {}, "the model has no head that can be removed"),
        ("conv", {"structure": "3:7"}, {}, "structure '3:7' fits no layer: 7 divides none of their inputs (0 1, "),
        (
            "conv",
            {"structure": "neuron", "rate": 0.5},
            {"prune": {"ignore": ["6"]}},
            "every neuron that can be removed",
        ),
        ("conv", {"rate": 0.5}, {"prune": {"ignore": ["conv9"]}}, "prune.ignore: no prunable layer matches 'conv9'"),
        ("conv", {"rate": 0.5, "scope": "global"}, {"prune": {"layer_factors": {"0": 0.5}}}, "scope = 'layer'"),
        ("conv", {"structure": "2:4"}, {"prune": {"layer_factors": {"0": 0.5}}}, "keeps as much everywhere"),
        ("conv", {"flops_budget": 0.1}, {"prune": {"ignore": ["3.*"]}}, "flops_budget 0.1 cannot be met"),
        ("conv", {"structure": "filter", "params_budget": 0.01}, {}, "params_budget 0.01 cannot be met: "),
        ("conv", {"structure": "neuron", "sparsity": 0.9}, {}, "sparsity 0.9 cannot be met: "),
        ("conv", {"criterion": "batchnorm", "rate": 0.5}, {}, "no batchnorm_scale of '6.weight', '8.weight'"),
        (
            "transformer",
            {"structure": "layer", "rate": 0.5, "criterion": "skeletonization"},
            {},
            "nothing reads a whole",
        ),
    ],
)
def test_refused(root: Path, model: str, params: dict[str, Any], sections: dict[str, Any], said: str) -> None:
    spec = StudySpec(
        name="refused", task="pictures.py", task_params={"model": model}, train=TRAIN, space=params, **sections
    )
    with pytest.raises(InputError) as caught:
        Study(spec, "memory://refused", root=root).check()
    assert said in str(caught.value)


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_what_only_the_weights_can_tell_is_met_or_fails_with_the_reason(root: Path, criterion: str) -> None:
    """The budget is met where the smallest of all layers is the one that stays."""
    ran = Ran(root, "transformer", {"structure": "layer", "criterion": criterion, "params_budget": 0.33})
    reasons = list(ran.study.status()["failures"].values())
    assert all("a params_budget of 0.33 cannot be met: 0.33" in reason and "\n" not in reason for reason in reasons)
    assert reasons or ran.last["nonzero_params"] <= 0.33 * ran.last["total_params"]
