"""The trained network that ships in a package: its figures, and what is refused in its place."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from orchestrator.errors import TaskError
from orchestrator.tasks import mnist_pretrained, packaged


@pytest.fixture
def unread() -> Iterator[None]:
    mnist_pretrained.weights.cache_clear()
    yield
    mnist_pretrained.weights.cache_clear()


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """All 5,000."""
    task = mnist_pretrained.task()
    inputs, targets = zip(task.train, task.valid, task.test, strict=True)
    return torch.cat(inputs), torch.cat(targets)


def accuracies(model: nn.Module, digits: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Of all, and of the class that does worst."""
    with torch.no_grad():
        right = torch.cat([model(part).argmax(1) for part in digits[0].split(500)]) == digits[1]
    return right.float().mean().item(), min(right[digits[1] == digit].float().mean().item() for digit in range(10))


def test_it_reads_997_of_1000_digits(digits: tuple[Tensor, Tensor]) -> None:
    model = mnist_pretrained.trained().eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == 390_410
    assert accuracies(model, digits) == pytest.approx((0.997, 0.986), abs=1e-3)


def test_without_80_percent_of_its_weights_one_digit_is_lost_before_the_mean_shows_it(
    digits: tuple[Tensor, Tensor],
) -> None:
    model = mnist_pretrained.trained().eval()
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    sizes = torch.cat([weight.detach().abs().flatten() for weight in weights])
    bar = sizes.kthvalue(round(0.8 * len(sizes))).values
    with torch.no_grad():
        for weight in weights:
            weight.mul_(weight.abs() > bar)
    assert accuracies(model, digits) == pytest.approx((0.970, 0.770), abs=0.005)


def test_the_untrained_one_knows_nothing() -> None:
    task = mnist_pretrained.task()
    assert task.fresh is not None
    assert accuracies(task.fresh().eval(), task.valid)[0] < 0.5


def test_a_missing_package_says_what_to_install(unread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "find_spec", lambda name: None)
    with pytest.raises(TaskError) as caught:
        mnist_pretrained.task()
    assert str(caught.value) == (
        "task 'mnist-pretrained' needs the package digit-recognizer-py: "
        "pip install --no-deps digit-recognizer-py==0.1.0"
    )


def test_another_file_of_weights_is_refused(unread: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    path = tmp_path / "models" / "handwriting_model.pth"
    torch.save(mnist_pretrained.untrained().state_dict(), path)
    monkeypatch.setattr(mnist_pretrained, "package_folder", lambda *names: tmp_path)
    with pytest.raises(TaskError) as caught:
        mnist_pretrained.task()
    assert str(caught.value) == (
        f"task 'mnist-pretrained': {path} is not the file of version 0.1.0: "
        "pip install --no-deps digit-recognizer-py==0.1.0"
    )
    path.unlink()
    with pytest.raises(TaskError, match="cannot read .*handwriting_model.pth: No such file or directory"):
        mnist_pretrained.task()


def test_the_package_is_not_imported() -> None:
    code = (
        "import sys\nfrom orchestrator.tasks import mnist_pretrained\nmnist_pretrained.task()\n"
        "print('digit_recognizer' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
