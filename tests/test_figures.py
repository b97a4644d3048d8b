"""The figures that are run by hand are good studies, and count as the papers do."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator import Study
from tests.figures.__main__ import FIGURES
from tests.figures.lenet import WEIGHTS, exact, kept

FOLDER = Path(__file__).parent / "figures"


def test_every_figure_is_listed() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} - {"__main__", "markdown"} == FIGURES.keys()


@pytest.mark.parametrize("name", ["lenet", "mnist1d", "consensus", "consensus_50"])
def test_a_figure_is_a_good_study(name: str) -> None:
    spec = FIGURES[name].study(FIGURES[name].SEEDS)
    assert len(spec.seeds) >= 5
    assert Study(spec, "memory://check").check().layers


def test_landmarks_lie_where_the_paper_has_them() -> None:
    left = {
        rounds: sum(kept(size, 10 if name == "out.weight" else 5, rounds) for name, size in WEIGHTS.items()) / 266_200
        for rounds in (1, 3, 7, 11)
    }
    assert {rounds: round(100 * share, 1) for rounds, share in left.items()} == {1: 80.0, 3: 51.3, 7: 21.1, 11: 8.7}
    assert [kept(5, 5, 1), kept(12, 5, 1), kept(13, 5, 1)] == [4, 10, 10]


def test_a_count_that_is_off_by_one_is_noticed() -> None:
    layers = {name: [kept(size, 10 if name == "out.weight" else 5, 2), size] for name, size in WEIGHTS.items()}
    row = {"trial": 0, "round": 2, "layers": str(layers).replace("'", '"')}
    assert exact([row], 2)
    off = row | {"layers": row["layers"].replace(f"[{layers['out.weight'][0]},", f"[{layers['out.weight'][0] + 1},")}
    assert not exact([row, off], 2)
