"""The barrier on the line between two networks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from orchestrator.errors import NotFinite, PlanError
from orchestrator.tickets.stability import barrier, interpolate


def ends() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    first = {"w": torch.tensor([0.1, -0.7]), "mean": torch.tensor([0.0]), "count": torch.tensor(3)}
    second = {"w": torch.tensor([0.3, 1.1]), "mean": torch.tensor([4.0]), "count": torch.tensor(5)}
    return first, second


def test_a_hill_on_the_line_is_measured_from_the_mean_of_the_ends() -> None:
    first, second = {"w": torch.tensor([-1.0])}, {"w": torch.tensor([1.0])}
    found = barrier(first, second, lambda weights: 0.1 + 0.2 * (1 - float(weights["w"]) ** 2), points=5)
    assert found.alphas == (0, 0.25, 0.5, 0.75, 1)
    assert found.errors == pytest.approx((0.1, 0.25, 0.3, 0.25, 0.1))
    assert found.barrier == pytest.approx(0.2)
    assert not found.stable


def test_a_slope_is_no_less_than_half_its_height() -> None:
    first, second = {"w": torch.tensor([0.0])}, {"w": torch.tensor([1.0])}
    found = barrier(first, second, lambda weights: 0.03 * float(weights["w"]))
    assert len(found.errors) == 30
    assert found.barrier == pytest.approx(0.015)
    assert found.stable


def test_in_one_valley_there_is_no_barrier() -> None:
    first, _ = ends()
    found = barrier(first, first, lambda weights: 0.04)
    assert found.barrier == 0 and found.stable


def test_the_ends_come_out_bit_for_bit() -> None:
    first, second = ends()
    for alpha, end in ((0.0, first), (1.0, second)):
        found = interpolate(first, second, alpha)
        assert torch.equal(found["w"], end["w"])
    assert interpolate(first, second, 0.5)["mean"].item() == 2
    assert interpolate(first, second, 1.0)["count"].item() == 3
    found = interpolate(first, first, 0.0)
    found["count"] += 1
    assert first["count"].item() == 3, "the ends are not written on"


def test_the_line_is_drawn_in_double_precision() -> None:
    first, second = {"w": torch.tensor([1e-3]).half()}, {"w": torch.tensor([3e-3]).half()}
    found = interpolate(first, second, 1 / 3)["w"]
    exact = first["w"].double() * (2 / 3) + second["w"].double() / 3
    assert found.dtype == torch.float16
    assert torch.equal(found, exact.half())


def test_siblings_under_one_mask_stay_under_it() -> None:
    mask = torch.tensor([True, False])
    first, second = ({"w": end["w"] * mask} for end in ends())
    assert all(interpolate(first, second, alpha)["w"][1] == 0 for alpha in (0.0, 0.3, 1.0))


def test_buffers_are_recomputed_at_every_point_when_told() -> None:
    first, second = ends()
    seen = []

    def recalibrate(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**weights, "mean": torch.tensor([9.0])}

    def error(weights: dict[str, Tensor]) -> float:
        seen.append(weights["mean"].item())
        return 0.1

    barrier(first, second, error, points=3, recalibrate=recalibrate)
    assert seen == [9, 9, 9]
    seen.clear()
    barrier(first, second, error, points=3)
    assert seen == [0, 2, 4]


def test_what_makes_no_line_is_refused() -> None:
    first, second = ends()
    with pytest.raises(PlanError, match=r"^no line between the two networks: 'count' is in only one$"):
        interpolate(first, {"w": second["w"], "mean": second["mean"]}, 0.5)
    with pytest.raises(PlanError, match=r"'w' is torch.float32 \(2,\) in one, torch.float64 \(2,\) in the other"):
        interpolate(first, {**second, "w": second["w"].double()}, 0.5)
    with pytest.raises(PlanError, match="1 points on the line; legal: 2 and more"):
        barrier(first, second, lambda weights: 0.0, points=1)
    with pytest.raises(NotFinite, match="the error at 0 of the line is nan"):
        barrier(first, second, lambda weights: float("nan"))
