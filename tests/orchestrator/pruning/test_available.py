"""What cannot be had of a model is found out before it is needed, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.pruning.available import missing
from orchestrator.pruning.criteria import FROM_DATA, FROM_STATE
from orchestrator.tasks import Task


class OnceSquared(torch.autograd.Function):
    """A square whose derivative nobody can differentiate."""

    @staticmethod
    def forward(ctx: Any, given: Tensor) -> Tensor:
        ctx.save_for_backward(given)
        return given.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        given: Tensor = ctx.saved_tensors[0]
        if grad.requires_grad:
            raise RuntimeError("a square is differentiable once")
        return 2 * given * grad


def found(
    what: str, model: Callable[[], nn.Module], loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
) -> dict[str, str]:
    x, y = torch.ones(2, 1, 4, 4), torch.tensor([0, 1])
    task = Task(model=model, train=(x, y), valid=(x, y), loss=loss)
    names = [name for name, parameter in model().named_parameters() if parameter.dim() > 1]
    return missing(what, model, task, [(x, y)], names, x[:1])


def network(middle: Callable[[], nn.Module] = lambda: nn.Conv2d(3, 3, 2)) -> nn.Module:
    ends = nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), middle(), nn.BatchNorm2d(3)
    return nn.Sequential(*ends, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))


@pytest.mark.parametrize("what", [*FROM_DATA, "synaptic_flow"])
def test_all_is_there(what: str) -> None:
    assert found(what, network) == {}


def test_every_need_can_be_tried() -> None:
    assert {*FROM_DATA, *FROM_STATE} == {*FROM_DATA, "synaptic_flow", "batchnorm_scale"}


def test_layers_that_lack_it_are_named_and_no_others() -> None:
    assert list(found("batchnorm_scale", network)) == ["6.weight"]
    turned = lambda: network(lambda: nn.ConvTranspose2d(3, 3, 2))  # noqa: E731
    for what in ("input_norm", "input_gram", "activation"):
        (name,) = (lacking := found(what, turned))
        assert name == "2.weight" and "plain convolutions" in lacking[name]
    assert found("gradient", turned) == {}


def test_a_derivative_that_nobody_wrote_is_a_reason_against_all() -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        squared: Tensor = OnceSquared.apply(outputs)  # type: ignore[no-untyped-call]
        return F.cross_entropy(squared, targets)

    assert found("gradient", network, loss) == {}
    for what in ("hessian_diagonal", "hessian_gradient"):
        (reason,) = (lacking := found(what, network, loss)).values()
        assert (
            list(lacking) == [""]
            and reason == f"its {what} cannot be had: RuntimeError: a square is differentiable once"
        )


def test_what_is_not_finite_yet_may_become_so() -> None:
    assert found("gradient", network, lambda outputs, targets: (outputs / 0).sum()) == {}


def test_no_memory_is_no_reason() -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        raise MemoryError

    with pytest.raises(MemoryError):
        found("gradient", network, loss)
