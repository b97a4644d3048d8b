"""Recalibrated statistics are those of the examples; nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orchestrator.errors import StageFailed
from orchestrator.state import into_model, of_model
from orchestrator.training.recalibration import recalibrate

X = torch.randn(24, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 3 + 2
FLAT = X.flatten(1)[:, :6].contiguous()


class Net(nn.Module):
    """Convolutions and a head, with dropout between that would change the statistics."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 4, 3)
        self.drop = nn.Dropout(0.5)
        self.second = nn.BatchNorm2d(4, momentum=None)
        self.unkept = nn.BatchNorm2d(4, track_running_stats=False)
        self.instance = nn.InstanceNorm2d(4, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.drop(self.conv(self.first(x))))
        return self.instance(self.unkept(x))  # type: ignore[no-any-return]


def batches(*sizes: int, x: Tensor = X) -> list[tuple[Tensor, None]]:
    return [(rows, None) for rows in x.split(list(sizes))]


def test_one_batch_gives_exactly_its_mean_and_unbiased_variance() -> None:
    model = nn.Sequential(nn.BatchNorm1d(6)).double()
    x = FLAT.double()
    assert recalibrate(model, batches(24, x=x)) == 1
    assert torch.allclose(model[0].running_mean, x.mean(dim=0), rtol=1e-14, atol=0)  # type: ignore[arg-type]
    assert torch.allclose(model[0].running_var, x.var(dim=0), rtol=1e-14, atol=0)  # type: ignore[arg-type]


def test_several_batches_are_weighed_by_their_values() -> None:
    model = nn.Sequential(nn.BatchNorm1d(6)).double()
    x = FLAT.double()
    recalibrate(model, batches(10, 10, 4, x=x))
    assert torch.allclose(model[0].running_mean, x.mean(dim=0), rtol=1e-13)  # type: ignore[arg-type]
    variances = sum(len(rows) * rows.var(dim=0) for rows in x.split([10, 10, 4])) / 24
    assert torch.allclose(model[0].running_var, variances, rtol=1e-13)  # type: ignore[arg-type]


def test_equal_batches_give_what_torch_averages_itself() -> None:
    ours, theirs = nn.BatchNorm1d(6), nn.BatchNorm1d(6, momentum=None)
    recalibrate(ours, batches(8, 8, 8, x=FLAT))
    for rows in FLAT.split(8):
        theirs(rows)
    assert torch.allclose(ours.running_mean, theirs.running_mean)  # type: ignore[arg-type]
    assert torch.allclose(ours.running_var, theirs.running_var)  # type: ignore[arg-type]
    assert ours.num_batches_tracked == theirs.num_batches_tracked == 3


def test_a_layer_further_up_sees_the_recalibrated_one_below() -> None:
    model = Net()
    model.first.running_mean.fill_(50.0)  # type: ignore[union-attr]
    assert recalibrate(model, batches(24)) == 2
    assert torch.allclose(model.first.running_mean, X.mean(dim=(0, 2, 3)), rtol=1e-5)  # type: ignore[arg-type]
    normal = (X - X.mean(dim=(0, 2, 3), keepdim=True)) / (
        X.var(dim=(0, 2, 3), correction=0, keepdim=True) + 1e-5
    ).sqrt()
    seen = model.conv(normal)
    assert torch.allclose(model.second.running_mean, seen.mean(dim=(0, 2, 3)), atol=1e-5)  # type: ignore[arg-type]
    assert torch.allclose(model.second.running_var, seen.var(dim=(0, 2, 3)), rtol=1e-4)  # type: ignore[arg-type]


def test_only_the_statistics_change() -> None:
    model = Net()
    model.train()
    model.drop.eval()
    before = of_model(model)
    recalibrate(model, batches(12, 12))
    changed = {name for name, tensor in of_model(model).items() if not torch.equal(tensor, before[name])}
    kept = ("running_mean", "running_var", "num_batches_tracked")
    assert changed == {f"{norm}.{name}" for norm in ("first", "second") for name in kept}
    assert model.first.num_batches_tracked == 2
    assert (model.first.momentum, model.second.momentum) == (0.1, None)
    assert model.training and model.first.training and not model.drop.training
    assert not model.first._forward_pre_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_was_there_before_does_not_matter() -> None:
    first, other = Net(), Net()
    with torch.no_grad():
        other.first.running_mean.add_(5)  # type: ignore[union-attr]
        other.second.num_batches_tracked.add_(100)  # type: ignore[union-attr]
    torch.rand(3)
    recalibrate(first, batches(12, 8, 4))
    recalibrate(other, batches(12, 8, 4))
    assert all(torch.equal(tensor, of_model(other)[name]) for name, tensor in of_model(first).items())
    recalibrate(first, batches(12, 8, 4))
    assert all(torch.equal(tensor, of_model(other)[name]) for name, tensor in of_model(first).items())


def test_a_module_that_is_called_twice_sees_all_its_values() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(6, affine=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) + self.norm(3 * x)  # type: ignore[no-any-return]

    model = Twice()
    recalibrate(model, batches(24, x=FLAT))
    assert torch.allclose(model.norm.running_mean, 2 * FLAT.mean(dim=0), rtol=1e-5)  # type: ignore[arg-type]


def test_statistics_of_the_dense_model_are_wrong_for_the_pruned_one() -> None:
    """The canary: without recalibration the outputs of the pruned model are no longer normal."""
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    recalibrate(model, batches(24, x=FLAT))
    weights = of_model(model)
    weights["0.weight"][:, :5] = 0
    into_model(weights, model)
    model.eval()
    assert (model(FLAT).std(dim=0) - 1).abs().min() > 0.05
    recalibrate(model, batches(24, x=FLAT))
    model.eval()
    assert (model(FLAT).std(dim=0) - 1).abs().max() < 0.05


def test_a_model_without_batch_norm_is_left_alone() -> None:
    def never() -> Any:
        raise AssertionError("no batch is wanted")
        yield

    assert recalibrate(nn.Sequential(nn.Linear(6, 2), nn.LayerNorm(2)), never()) == 0
    assert recalibrate(nn.Sequential(nn.BatchNorm1d(6, track_running_stats=False)), never()) == 0


def test_a_batch_without_a_variance_and_no_batch_at_all() -> None:
    model = nn.Sequential(nn.BatchNorm1d(6))
    said = r"^cannot recalibrate '0' on a batch with a single value per channel: no variance$"
    with pytest.raises(StageFailed, match=said):
        recalibrate(model, batches(23, 1, x=FLAT))
    assert not model[0]._forward_pre_hooks and model[0].momentum == 0.1
    with pytest.raises(StageFailed, match=r"^there is no batch to recalibrate BatchNorm on$"):
        recalibrate(model, [])


def test_inputs_by_keyword() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(6)

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.norm(x * scale)  # type: ignore[no-any-return]

    model = Named()
    recalibrate(model, [({"x": FLAT, "scale": torch.tensor(2.0)}, None)])
    assert torch.allclose(model.norm.running_mean, 2 * FLAT.mean(dim=0), rtol=1e-5)  # type: ignore[arg-type]
