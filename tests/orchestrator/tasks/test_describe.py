"""What the driver is told of a task, and the proof that its parts fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.errors import TaskError
from orchestrator.tasks import Metric, Task
from orchestrator.tasks.describe import describe
from orchestrator.tasks.load import LoadedTask
from orchestrator.tasks.source import Source

X = torch.arange(12.0).reshape(6, 2)
Y = torch.tensor([0, 1, 0, 1, 0, 1])
SOURCE = Source(name="fake.py", module="fake", files={"fake.py": ""}, digest="0" * 64)


def fake(**given: Any) -> LoadedTask:
    fields: dict[str, Any] = {"model": lambda: nn.Linear(2, 2), "train": (X, Y), "valid": (X, Y), **given}
    return LoadedTask(Task(**fields), SOURCE, {})


class Pairs:
    """A dataset that is not held in tensors."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index], Y[index]


class Tied(nn.Module):
    """An embedding whose weights are also the output layer's, and one attention layer between."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(4, 2, batch_first=True, kdim=3, vdim=3)
        self.norm = nn.BatchNorm1d(4)
        self.out = nn.Linear(4, 5, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x, _ = self.attention(x, x, x)
        y, _ = self.cross(x, x[..., :3], x[..., :3])
        return self.out(self.norm((x + y).mean(1)))  # type: ignore[no-any-return]


def test_layers_in_model_order_with_tied_tensors_once() -> None:
    tokens = torch.arange(6).reshape(3, 2) % 5
    info = describe(fake(model=Tied, train=(tokens, tokens[:, 0]), valid=(tokens, tokens[:, 0])))
    assert [(layer.name, layer.shape) for layer in info.layers] == [
        ("embed.weight", (5, 4)),
        ("attention.in_proj_weight", (12, 4)),
        ("attention.out_proj.weight", (4, 4)),
        ("cross.q_proj_weight", (4, 4)),
        ("cross.k_proj_weight", (4, 3)),
        ("cross.v_proj_weight", (4, 3)),
        ("cross.out_proj.weight", (4, 4)),
    ]


def test_convolutions_of_every_kind() -> None:
    model = nn.Sequential(
        nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.ConvTranspose1d(3, 2, 2), nn.Flatten(), nn.Linear(4, 2)
    )
    data = (X.unsqueeze(2), Y)
    info = describe(fake(model=lambda: model, train=data, valid=data))
    assert [layer.label for layer in info.layers] == ["0", "2", "4"]
    assert [layer.size for layer in info.layers] == [6, 12, 8]


def test_a_predicate_chooses() -> None:
    info = describe(fake(prunable=lambda name, parameter: parameter.ndim == 1))
    assert [layer.name for layer in info.layers] == ["bias"]


def test_metrics_and_their_directions() -> None:
    error = Metric(lambda outputs, targets: 0.0, "minimise")
    info = describe(fake(metrics={"top": "accuracy", "mine": lambda outputs, targets: 1.0, "error": error}))
    assert info.metrics == (("top", "maximise"), ("mine", "maximise"), ("error", "minimise"))


def test_data_that_are_not_tensors_need_a_version() -> None:
    with pytest.raises(
        TaskError, match="^task 'fake.py': train is not held in tensors .*: name its data with data_version$"
    ):
        describe(fake(train=Pairs()))
    one, same, other = (describe(fake(train=Pairs(), data_version=version)) for version in ("1", "1", "2"))
    assert one == same
    assert one.digest != other.digest
    assert one.train_examples == 6


@pytest.mark.parametrize("form", [list, iter])
def test_a_function_of_the_epoch(form: Callable[[Any], Any]) -> None:
    batches = [(X[:4], Y[:4]), (X[4:], Y[4:]), (X[:2], Y[:2])]
    info = describe(fake(train=lambda epoch, generator: form(batches), data_version="1"))
    assert info.batches_per_epoch == 3
    assert info.steps_per_epoch(batch_size=100) == 3
    with pytest.raises(TaskError, match="^task 'fake.py': train has no batches in epoch 0$"):
        describe(fake(train=lambda epoch, generator: [], data_version="1"))


@pytest.mark.parametrize("spoil", [lambda x: x * 2, lambda x: x.double(), lambda x: x.flip(0)])
@pytest.mark.parametrize("part", ["train", "valid", "test"])
def test_the_digest_covers_every_split(spoil: Callable[[Tensor], Tensor], part: str) -> None:
    plain: dict[str, Any] = {"model": lambda: nn.Sequential(Single(), nn.Linear(2, 2)), "test": (X, Y)}
    assert describe(fake(**plain)).digest == describe(fake(**plain)).digest
    assert describe(fake(**plain)).digest != describe(fake(**{**plain, part: (spoil(X), Y)})).digest


class Single(nn.Module):
    """Takes any float type."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float()


def test_parameters_and_source_are_in_the_digest() -> None:
    task = Task(model=lambda: nn.Linear(2, 2), train=(X, Y), valid=(X, Y))
    digests = {LoadedTask(task, SOURCE, params).info.digest for params in ({}, {"a": 1}, {"a": 2}, {"b": 1})}
    assert len(digests) == 4


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    describe(fake(model=lambda: nn.Sequential(nn.Dropout(), nn.Linear(2, 2))))
    assert torch.equal(torch.get_rng_state(), before)


def test_batch_norm_and_a_step_of_the_users_own() -> None:
    def step(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    info = describe(fake(model=lambda: nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)), step=step))
    assert len(info.layers) == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"model": lambda: nn.Linear(3, 2)},
            "the model cannot take an input of shape (1, 2): mat1 and mat2 shapes cannot be multiplied",
        ),
        (
            {"example": torch.zeros(1, 3)},
            "the model cannot take an input of shape (1, 3): mat1 and mat2 shapes cannot be multiplied",
        ),
        (
            {"valid": (torch.zeros(4, 5), Y[:4])},
            "the model cannot take an input of shape (2, 5) (from valid): ",
        ),
        (
            {"loss": F.mse_loss, "train": (X, torch.zeros(6, 5))},
            "the model's output (2, 2) does not fit loss mse_loss with targets (2, 5): ",
        ),
        ({"loss": lambda outputs, targets: 0.5}, "loss <lambda> must give a scalar tensor, not float"),
        ({"loss": lambda outputs, targets: outputs.sum(1)}, "loss <lambda> must give a scalar tensor, not (2,)"),
        ({"loss": lambda outputs, targets: outputs.sum().detach()}, "loss <lambda> gives no gradient: "),
        ({"step": lambda model, batch: model(1)}, "step failed on a batch of shape (2, 2): "),
        (
            {"model": lambda: nn.Linear(2, 3), "classes": ["a", "b"]},
            "the model's output (2, 3) does not fit the 2 classes",
        ),
        ({"metrics": {"mse": "mse"}}, "metric 'mse' failed on outputs (2, 2) and targets (2,) of valid: "),
        (
            {"model": lambda: nn.Sequential(nn.Bilinear(1, 1, 1)), "prunable": lambda name, parameter: False},
            "the model cannot take an input",
        ),
        (
            {"prunable": lambda name, parameter: False},
            "there is nothing to prune in the model: `prunable` accepts no parameter",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_what_does_not_fit_is_told_in_one_line(given: dict[str, Any], said: str) -> None:
    with pytest.raises(TaskError) as caught:
        describe(fake(**given))
    assert str(caught.value).startswith("task 'fake.py': " + said)
    assert "\n" not in str(caught.value)


def test_nothing_to_prune_by_default() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    with pytest.raises(TaskError, match="it has no linear, convolutional or attention layer"):
        describe(fake(model=Scale))
