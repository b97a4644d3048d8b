"""What a study cannot mean, or cannot have of its task, is refused in a line before anything runs; what is idle is said."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from orchestrator import Study
from orchestrator.cli import main
from orchestrator.pools.local import LocalPool
from orchestrator.pruning.finding import find
from orchestrator.pruning.structure import kept_units
from orchestrator.removal.shrinking import masked_copy
from orchestrator.state import into_model
from orchestrator.tasks.models import Transformer
from tests.orchestrator.pools import small

TASK = '''
import torch
import torch.nn.functional as F
from torch import nn

from orchestrator.tasks import Task
from orchestrator.tasks.models import Transformer


def images(*last):
    return nn.Sequential(nn.Conv2d(1, 4, 3), *last, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))


MODELS = {
    "plain": lambda: images(nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.Softplus()),
    "normed": lambda: images(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),
    "transposed": lambda: images(nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 4, 2), nn.BatchNorm2d(4)),
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Sigmoid(), nn.Linear(8, 3)),
    "transformer": lambda: nn.Sequential(nn.Flatten(), Transformer(6, 6, classes=3, features=8, heads=4)),
}


def task(model: str = "plain", step: bool = False) -> Task:
    """Twelve pictures to train on."""
    y = torch.arange(20) % 3
    x = torch.randn(20, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    own = {"step": lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])} if step else {}
    return Task(
        model=MODELS[model], train=(x[:12], y[:12]), valid=(x[12:], y[12:]), loss=F.cross_entropy, **own
    )
'''
CRITERIA = """
def nan(weight):
    return weight * float("nan")


def short(weight):
    return weight.sum(0)


def no_weight(w):
    return w


def wants_more(weight, loss):
    return weight
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the task and of users' criteria, which is the current one."""
    (tmp_path / "pictures.py").write_text(TASK)
    (tmp_path / "mine.py").write_text(CRITERIA)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(place: Path, model: str, space: str, **said: str) -> str:
    """The name of a study file."""
    params = said.get("params", "")
    text = f"""
name = "s"
task = "pictures.py"
trials = 1
sampler = "random"
{said.get("top", "")}
[task_params]
model = "{model}"
{params}
[train]
epochs = 1
retrain_epochs = 1
batch_size = 4
{said.get("train", "")}
[prune]
{said.get("prune", "")}
[space]
{space}
"""
    (place / "s.toml").write_text(text)
    return "s.toml"


def called(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of a command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["orchardist", *arguments])
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    return 0


REFUSED: dict[str, tuple[str, str, dict[str, str], str]] = {
    "no batchnorm": ("plain", 'criterion = "batchnorm"\nrate = 0.5', {}, "space: criterion 'batchnorm' has no batchnorm_scale of '0.weight', '2.weight', '6.weight': no BatchNorm"),
    "a layer without": ("normed", 'criterion = "batchnorm"\nrate = 0.5', {}, "of '7.weight': no BatchNorm with a scale reads the layer's output directly; legal: another criterion, or name them"),
    "no second derivative": ("plain", 'criterion = "obs"\nrate = 0.5', {"params": "step = true"}, "space: criterion 'obs' cannot be used on this task: hessian_blocks differentiate"),
    "not observed": ("transposed", 'criterion = "wanda"\nrate = 0.5', {}, "space: criterion 'wanda' has no input_norm of '3.weight'"),
    "one of two criteria": ("plain", 'criterion = ["magnitude", "batchnorm"]\nrate = 0.5', {}, "(for criterion = 'batchnorm', rate = 0.5; a `when` can keep choices apart)"),
    "flops of filters": ("plain", 'structure = "filter"\nflops_budget = 0.02', {}, "space: flops_budget 0.02 cannot be met: structure 'filter' leaves at least"),
    "params of filters": ("plain", 'structure = "filter"\nparams_budget = 0.5', {"prune": "round_to = 4"}, "(with prune.floor = 1, prune.round_to = 4); legal: another structure"),
    "flops of heads": ("transformer", 'structure = "head"\nflops_budget = 0.2', {}, "structure 'head' leaves at least"),
    "sparsity of filters": ("plain", 'structure = "filter"\nsparsity = 0.99', {}, "of the prunable weights (with prune.floor = 1); legal: "),
    "a floor of weights": ("mlp", "params_budget = 0.05", {"prune": "floor = 100"}, "structure 'weight' leaves at least"),
    "no heads": ("plain", 'structure = "head"\nrate = 0.5', {}, "space: the model has no head that can be removed: it has no nn.MultiheadAttention, whose heads are known"),
    "n:m that fits none": ("plain", 'structure = "2:7"', {}, "space: structure '2:7' fits no layer"),
    "a protected layer": ("plain", "rate = 0.5", {"prune": 'ignore = ["nine"]'}, "prune.ignore: no prunable layer matches 'nine'; there are: 0, 2, 6"),
    "a factor in global scope": ("plain", 'rate = 0.5\nscope = "global"', {"prune": 'layer_factors = { "0" = 0.5 }'}, "legal with them: scope = 'layer'"),
    "n:m with a threshold": ("plain", 'structure = "2:4"\nthreshold = 0.1', {}, "says itself how much stays, in one round; given: threshold"),
    "fold of weights": ("plain", "rate = 0.5\nfold = true", {}, "legal with it: neuron, filter, channel, head"),
    "fold and rewind": ("mlp", 'structure = "neuron"\nrate = 0.5\nfold = true\nretrain = "rewind"', {}, "legal with it: none, finetune, lr-rewind"),
    "a criterion of no weight": ("plain", 'criterion = "mine.py:no_weight"\nrate = 0.5', {}, "s.toml: space.criterion: criterion 'mine.py:no_weight' must take the tensor to score"),
    "a criterion that wants more": ("plain", 'criterion = "mine.py:wants_more"\nrate = 0.5', {}, "s.toml: space.criterion: criterion 'mine.py:wants_more' has a parameter 'loss'"),
    "no such function": ("plain", 'criterion = "mine.py:none"\nrate = 0.5', {}, "s.toml: space.criterion: function 'mine.py:none': 'mine.py' has no function 'none'"),
    "no such file": ("plain", 'criterion = "yours.py:none"\nrate = 0.5', {}, "s.toml: space.criterion: function 'yours.py:none': there is no file"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_a_line_before_anything_runs(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, space, said, message = REFUSED[name]
    file = written(place, model, space, **said)
    for command in (["check", file], ["run", file, "--local", "--store", "store"]):
        assert called(monkeypatch, *command) == 2
        shown = capsys.readouterr().err.strip()
        assert shown.startswith(f"{file}: ") and message in shown
        assert len(shown.splitlines()) <= 2
    assert not (place / "store" / "studies" / "s" / "study.toml").exists()


def run(place: Path, *said: Any, **more: str) -> Study:
    study = Study.load(place / written(place, *said, **more), place / "store")
    study.run(LocalPool())
    return study


@pytest.mark.parametrize("criterion", ["wanda", "activation", "sparsegpt"])
def test_what_cannot_be_scored_may_be_ignored(place: Path, criterion: str) -> None:
    space = f'criterion = "{criterion}"\nrate = 0.5\nretrain = "none"'
    study = run(place, "transposed", space, prune='ignore = ["3"]')
    assert study.status()["failures"] == {}
    row = max(study.table().to_pylist(), key=lambda row: row["round"])
    assert row["sparsity"] == (18 + 24) / (36 + 64 + 48)


def test_filters_of_a_transposed_convolution_go_by_their_norms_scale(place: Path) -> None:
    study = run(place, "transposed", 'criterion = "batchnorm"\nstructure = "filter"\nrate = 0.5\nretrain = "none"')
    assert study.status()["failures"] == {}
    row = max(study.table().to_pylist(), key=lambda row: row["round"])
    assert row["unit_sparsity"] == 0.5
    assert row["flops_effective"] == row["flops_shrunk"]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("nan", "criterion 'mine.py:nan': 36 of the 36 scores of '0.weight' are NaN or infinite"),
        ("short", "criterion 'mine.py:short' returned scores of shape (1, 3, 3) for a weight of shape (4, 1, 3, 3)"),
    ],
)
def test_a_users_criterion_that_gives_no_scores_is_a_failed_outcome(place: Path, function: str, message: str) -> None:
    study = run(place, "plain", f'criterion = "mine.py:{function}"\nrate = 0.5')
    (failure,) = study.status()["failures"].values()
    assert failure.startswith(f"raised: {message}")


@pytest.mark.parametrize("criterion", ["magnitude", "random", "taylor"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_flops_budget_over_heads_is_met_to_the_operation(place: Path, criterion: str, scope: str) -> None:
    space = f'structure = "head"\ncriterion = "{criterion}"\nscope = "{scope}"\nflops_budget = 0.8\nretrain = "none"'
    study = run(place, "transformer", space)
    row = max(study.table().to_pylist(), key=lambda row: row["round"])
    assert row["flops_effective"] == row["flops_shrunk"] <= 0.8 * row["flops"]


IDLE = """
rate = 0.5
schedule = "linear"
criterion = "lamp"
[space.criteria.wanda]
examples = 7
"""


def test_what_does_nothing_is_said(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prune = "round_to = 8\nrecalibrate = 5\nfloor = 1"
    file = written(
        place,
        "plain",
        IDLE,
        prune=prune,
        train="shrunk = true\nmomentum = 0.9",
    )
    assert called(monkeypatch, "check", file, "--format", "json") == 0
    out, err = capsys.readouterr()
    said = json.loads(out)["warnings"]
    assert [f"{file}: {line}" for line in said] == err.strip().splitlines()
    expected = [
        "criterion 'lamp' compares layers: in scope 'layer' it ranks as 'magnitude' does",
        "space.schedule does nothing in this study: it spreads a final sparsity, or a budget, over several rounds",
        "train.momentum does nothing",
        "train.shrunk does nothing in this study: a smaller model is trained where whole units are pruned",
        "prune.round_to does nothing in this study: it counts the units of a layer",
        "space.criteria.wanda.examples does nothing in this study: its criterion is never 'wanda'",
        "prune.recalibrate does nothing in this study: the model has no BatchNorm with running statistics",
    ]
    assert len(said) == len(expected)
    assert all(line.startswith(start) for line, start in zip(said, expected, strict=True))


def warned(place: Path, *said: Any, **more: str) -> list[str]:
    study = Study.load(place / written(place, *said, **more))
    study.check()
    return study.warnings()


def test_what_does_something_somewhere_is_not_said(place: Path) -> None:
    space = 'structure = ["weight", "filter"]\nsparsity = 0.5\nschedule = "linear"\nrounds = [1, 2]\n'
    criteria = 'criterion = ["lamp", "wanda"]\nscope = "global"\n[space.criteria.wanda]\nexamples = 7'
    more = {"prune": "round_to = 2\nrecalibrate = 5", "train": "shrunk = true"}
    assert warned(place, "normed", space + criteria, **more) == []


def test_more_examples_than_there_are_are_warned_of(place: Path) -> None:
    space = 'criterion = "wanda"\nrate = 0.5\n[space.criteria.wanda]\nexamples = 13'
    assert warned(place, "normed", space, prune="recalibrate = 13") == [
        "criteria.wanda.examples = 13, but there are 12 to train on: all are taken",
        "prune.recalibrate = 13, but there are 12 to train on: all are taken",
    ]
    assert warned(place, "normed", space.replace("13", "12"), prune="recalibrate = 12") == []


def test_a_grid_that_ends_early_is_warned_of(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(place, "mlp", "rate = [0.3, 0.5]")
    text = (place / file).read_text().replace("trials = 1", "trials = 3").replace('"random"', '"grid"')
    (place / file).write_text(text)
    said = "trials = 3, but sampler 'grid' ends after the 2 different proposals of [space]; legal: trials = 2 or fewer"
    for command in (["check", file], ["run", file, "--local", "--store", "store"]):
        assert called(monkeypatch, *command) == 0
        assert f"{file}: {said}, more values in [space], or another sampler" in capsys.readouterr().err
    (place / file).write_text(text.replace("trials = 3", "trials = 2"))
    assert called(monkeypatch, "check", file) == 0
    assert capsys.readouterr().err == ""


# Folding


def test_a_studys_folded_model_gives_what_the_weightless_units_gave(place: Path) -> None:
    space = 'structure = "channel"\nrate = 0.5\nretrain = "none"\nrounds = 2\n'
    study = run(place, "transformer", space + "fold = true")
    rows = {row["round"]: row for row in study.table().to_pylist()}
    dense, first = (small.models(study.store, "s")[rows[number]["key"]] for number in (0, 1))
    model = nn.Sequential(nn.Flatten(), Transformer(6, 6, classes=3, features=8, heads=4))
    example = torch.randn(9, 1, 6, 6, generator=torch.Generator().manual_seed(3))
    into_model(dense.weights, model)
    model.eval()
    made = {}
    names = [name for name, parameter in model.named_parameters() if parameter.dim() > 1]
    units = find(model, example[:1], "channel", names).units
    for group in units:
        gone = ~kept_units(group, first.masks)
        for piece in group.slices:
            if piece.role == "makes" and piece.tensor in names:
                made[piece.tensor] = torch.ones(dict(model.named_parameters())[piece.tensor].shape).bool()
                made[piece.tensor].movedim(piece.dim, 0)[gone[piece.owner.clamp(min=0)] & (piece.owner >= 0)] = False
    assert any(not mask.all() for mask in made.values())
    expected = masked_copy(model, made)(example)
    unfolded = masked_copy(model, first.masks)(example)
    into_model(first.weights, model)
    assert (model(example) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (unfolded - expected).abs().max() > 1e-3 * expected.abs().max(), "folding would show"
    assert rows[2]["flops_shrunk"] < rows[1]["flops_shrunk"]


def test_a_fold_that_padding_makes_inexact_is_a_failed_outcome(place: Path) -> None:
    space = 'structure = "filter"\nrate = 0.5\nretrain = "none"\nfold = true'
    study = run(place, "plain", space)
    (failure,) = study.status()["failures"].values()
    assert failure.startswith("raised: fold: the constants of removed units cannot move into '2': it pads with zeros")
