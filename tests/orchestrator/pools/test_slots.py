from __future__ import annotations

import pytest

from orchestrator.graph import Segment
from orchestrator.pools.slots import Slot, give_way


def slots(*shares: tuple[float, str, bool]) -> list[Slot]:
    """Workers as (share of a GPU, which GPU, whether it is idle)."""
    found = []
    for number, (share, gpu, idle) in enumerate(shares):
        slot = Slot(number, None, share, None, node="n", gpu=gpu)
        slot.running.extend([] if idle else [Segment(number=1, steps=())])
        found.append(slot)
    return found


@pytest.mark.parametrize(
    ("shares", "wanted", "gone"),
    [
        ([(0.25, "0", True), (0.25, "0", True), (0.25, "0", True), (0.25, "0", False)], 0.5, [0, 1]),
        ([(0.5, "0", True), (0.5, "1", True), (0.5, "0", False), (0.5, "1", True)], 1.0, [1, 3]),
        ([(0.5, "0", True), (0.5, "1", True), (0.5, "0", False), (0.5, "1", False)], 1.0, []),
        ([(0.3, "0", True), (0.3, "0", True), (0.3, "0", True)], 1.0, [0, 1, 2]),
        ([(0.25, "0", False)], 0.5, []),
        ([(0.25, "0", True)], 0.5, [0]),
    ],
)
def test_idle_workers_of_one_gpu_give_way_to_a_larger_one(
    shares: list[tuple[float, str, bool]], wanted: float, gone: list[int]
) -> None:
    assert [slot.number for slot in give_way(slots(*shares), wanted)] == gone


def test_a_worker_is_remembered_with_the_states_that_it_lately_made() -> None:
    (slot,) = slots((0.0, "", True))
    for number in range(100):
        slot.hold(str(number))
    assert list(slot.held) == [str(number) for number in range(36, 100)]
