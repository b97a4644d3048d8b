"""The picture of a front: drawn from recorded outcomes alone, whatever the study measured."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator import Study, StudySpec
from orchestrator.errors import InputError, QueryError
from orchestrator.outcome import DENSE_TRIAL
from orchestrator.report.plot import _edge, _gathered, _scale, _sensitivities, _spread, plot_front, plot_sensitivity
from orchestrator.store.store import Store

pytest.importorskip("matplotlib")

CRITERIA = ("magnitude", "taylor", "random")
PNG = b"\x89PNG\r\n\x1a\n"

NUMBERS = count()

Row = dict[str, Any]


def study(
    rows: Sequence[Mapping[str, Any]], objectives: Sequence[str] = ("accuracy", "sparsity"), **more: Any
) -> Study:
    """A study in a fresh memory store whose ledger holds `rows`; none of it was ever run."""
    url = f"memory://plot-{next(NUMBERS)}"
    spec = StudySpec(name="drawn", task="nowhere.py", objectives=objectives, **more)
    store = Store(url)
    store.write_study("drawn", spec.to_toml(), {})
    ledger = store.ledger("drawn", 1)
    ledger.append("outcomes", rows)
    ledger.flush()
    return Study.open(url, "drawn")


def rows(size: int, seed: int = 0, criteria: Sequence[str] = CRITERIA) -> list[Row]:
    """A dense model and `size` pruned ones: the sparser, the worse."""
    draws = np.random.default_rng(seed)
    sparsity = 1 - np.exp2(-6 * draws.random(size))
    accuracy = 0.97 - 0.1 * sparsity**8 - 0.05 * draws.random(size) ** 2
    found = [outcome(DENSE_TRIAL, 0, accuracy=0.96, sparsity=0.0, bytes=400_000, latency_ms=0.3)]
    for trial in range(size):
        found.append(
            outcome(
                trial,
                accuracy=accuracy[trial],
                sparsity=sparsity[trial],
                bytes=int(400_000 * (1 - sparsity[trial])) + 500,
                latency_ms=0.3,
                params={"criterion": criteria[trial % len(criteria)], "rate": 0.2},
            )
        )
    return found


def outcome(trial: int, round: int = 1, *, seed: int = 0, **measures: Any) -> Row:
    return {
        "key": f"{trial + 1:04x}{round:02x}{seed:02x}" + "0" * 56,
        "trial": trial,
        "round": round,
        "seed": seed,
        **{name: value.item() if isinstance(value, np.generic) else value for name, value in measures.items()},
    }


def drawn(opened: Study, folder: Path, name: str = "front.png", **front: Any) -> bytes:
    plot_front(opened, opened.front(**front), folder / name)
    return (folder / name).read_bytes()


SPACE = {"criterion": list(CRITERIA), "rate": 0.2}


@pytest.mark.parametrize(
    ("objectives", "count"),
    [
        (("accuracy", "sparsity"), 60),
        (("accuracy", "sparsity"), 1),
        (("accuracy", "bytes"), 60),
        (("bytes", "accuracy"), 60),
        (("latency_ms", "accuracy"), 10),
        (("accuracy", "sparsity", "bytes"), 60),
        (("accuracy",), 60),
        (("sparsity",), 60),
    ],
)
def test_every_pair_of_objectives_is_drawn(objectives: tuple[str, ...], count: int, tmp_path: Path) -> None:
    found = rows(count)
    for row in found:
        row["loss"] = 1 - row["accuracy"]
    picture = drawn(study(found, objectives, space=SPACE), tmp_path)
    assert picture.startswith(PNG)
    width, height = struct.unpack(">II", picture[16:24])
    assert width > height > 500
    assert len(picture) < 200_000


def test_many_points_and_many_criteria(tmp_path: Path) -> None:
    names = [f"package.module:criterion_{number}" for number in range(9)]
    picture = drawn(study(rows(20_000, criteria=names), space={"criterion": names, "rate": 0.2}), tmp_path)
    assert picture.startswith(PNG)


def test_a_picture_says_what_it_shows(tmp_path: Path) -> None:
    opened = study(rows(40), space=SPACE)
    text = drawn(opened, tmp_path, "front.svg").decode()
    found = opened.front()
    assert found.knee is not None
    # In an SVG each text stands in a comment beside its outlines.
    for words in (
        f"drawn: 0 trials · 40 pruned models · {len(found.points)} on the front",
        "accuracy on validation (%), more is better",
        *CRITERIA,
        "dense model",
        f"knee {found.points[found.knee]['key'][:12]}",
    ):
        assert f"<!-- {words} -->" in text, words


def test_points_are_means_over_seeds(tmp_path: Path) -> None:
    found = [outcome(DENSE_TRIAL, 0, seed=seed, accuracy=0.9, sparsity=0.0) for seed in (0, 1)]
    found += [outcome(0, seed=seed, accuracy=0.8 + 0.02 * seed, sparsity=0.5) for seed in (0, 1)]
    text = drawn(study(found, seeds=(0, 1)), tmp_path, "front.svg").decode()
    assert "1 pruned models · 1 on the front · means of 2 seeds" in text


def test_the_same_study_gives_the_same_picture(tmp_path: Path) -> None:
    opened = study(rows(30), space=SPACE)
    assert drawn(opened, tmp_path, "a.png") == drawn(opened, tmp_path, "b.png")


def test_a_task_s_own_metric_is_an_axis(tmp_path: Path) -> None:
    found = [outcome(DENSE_TRIAL, 0, sparsity=0.0, metrics={"cost in $": 3.0})]
    found += [outcome(trial, sparsity=0.2 * trial, metrics={"cost in $": 3.0 + trial}) for trial in range(4)]
    opened = study(found)
    opened.store.write_study(
        "drawn",
        opened.spec.to_toml(),
        {
            "objectives": [
                {"name": "cost in $", "column": "cost in $", "direction": "minimise"},
                {"name": "sparsity", "column": "sparsity", "direction": "maximise"},
            ]
        },
    )
    text = drawn(Study.open(opened.store.url, "drawn"), tmp_path, "front.svg").decode()
    assert "less is better" in text


def test_bounds_and_a_chosen_point(tmp_path: Path) -> None:
    opened = study(rows(60), space=SPACE)
    text = drawn(opened, tmp_path, "front.svg", where=["accuracy >= dense - 0.02"], minimise="bytes").decode()
    assert "1 on the front" in text
    assert "<!-- best " in text


def test_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    found = [*rows(5), outcome(5, sparsity=0.5), outcome(6, accuracy=0.9)]
    assert drawn(study(found), tmp_path).startswith(PNG)


def test_a_front_that_no_point_reaches(tmp_path: Path) -> None:
    opened = study(rows(5), constraints={"accuracy": ">= 0.99"})
    assert not opened.front().points
    assert drawn(opened, tmp_path).startswith(PNG)


def test_a_study_without_a_dense_model(tmp_path: Path) -> None:
    assert drawn(study(rows(5)[1:]), tmp_path).startswith(PNG)


def test_nothing_finished_is_an_input_error(tmp_path: Path) -> None:
    for found in ([], rows(1)[:1]):
        with pytest.raises(InputError, match="no finished trial yet"):
            drawn(study(found), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["front", "front.jpeg", "front.toml", ".png"])
def test_another_ending_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"legal: \.png, \.svg, \.pdf"):
        drawn(study(rows(3)), tmp_path, name)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot write it: No such file or directory"):
        drawn(study(rows(3)), tmp_path / "absent")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match="cannot write it: Is a directory"):
        drawn(study(rows(3)), tmp_path, "folder.png")


def test_a_missing_matplotlib_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r'pip install "orchardist\[report\]"'):
        drawn(study(rows(3)), tmp_path)


def test_odd_paths(weird_tmp_path: Path) -> None:
    assert drawn(study(rows(3)), weird_tmp_path, "a front.PNG").startswith(PNG)


def test_a_bound_on_nothing_is_still_refused(tmp_path: Path) -> None:
    with pytest.raises(QueryError):
        drawn(study(rows(3)), tmp_path, where=["beauty >= 1"])


def test_sparsity_is_spaced_by_what_is_left() -> None:
    sparsity = np.array([0.0, 0.5, 0.75, 0.875])
    assert _spread(sparsity).tolist() == [0.0, 1.0, 2.0, 3.0]
    assert _gathered(_spread(sparsity)).tolist() == sparsity.tolist()
    assert np.isfinite(_spread(np.array([1.0]))).all()


def test_what_is_far_below_the_front_does_not_press_it_flat() -> None:
    opened = study([*rows(30), outcome(30, accuracy=0.1, sparsity=0.3)])
    found = opened.front()
    accuracy = np.array([0.1, *(point["accuracy"] for point in found.points)])
    edge = _edge(accuracy, found, found.objectives[0])
    assert 0.1 < edge < min(point["accuracy"] for point in found.points)
    assert _edge(accuracy[1:], found, found.objectives[0]) == -np.inf


def test_neither_torch_nor_ray_nor_the_task_is_imported(tmp_path: Path) -> None:
    """Its own process: a task that cannot be imported, and a look at what was."""
    code = f"""
import sys
from pathlib import Path
from orchestrator import Study, StudySpec
from orchestrator.report.plot import plot_front
from orchestrator.store.store import Store
store = Store({str(tmp_path / "store")!r})
store.write_study("drawn", StudySpec(name="drawn", task="nowhere.py").to_toml(), {{}})
ledger = store.ledger("drawn", 1)
ledger.append("outcomes", {rows(3)!r})
ledger.flush()
opened = Study.open(store.url, "drawn")
plot_front(opened, opened.front(), Path({str(tmp_path / "front.png")!r}))
print(*sorted({{"torch", "ray", "matplotlib.pyplot"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_canary_the_axis_of_percent_is_not_one_of_fractions() -> None:
    from matplotlib.figure import Figure

    from orchestrator.objectives import OBJECTIVES

    axes = Figure().add_subplot()
    _scale(axes, OBJECTIVES["accuracy"], np.array([0.9, 0.95]), 0.92, "y")
    assert axes.yaxis.get_major_formatter()(0.935, None) == "93.5"


def scan(**more: Any) -> Study:
    """Two layers of 100 weights, each pruned alone by a half and by nine tenths, under two seeds."""
    found = [outcome(DENSE_TRIAL, 0, seed=seed, accuracy=0.9, sparsity=0.0) for seed in (0, 1)]
    for trial, (layer, kept) in enumerate([("out", 10), ("out", 50), ("fc1", 50), ("fc1", 10)]):
        layers = {"fc1.weight": [100, 100], "out.weight": [100, 100], f"{layer}.weight": [kept, 100]}
        for seed in (0, 1):
            accuracy = 0.5 + kept / 1000 + (0.2 if seed else 0.0)
            pruned: dict[str, Any] = {"layers": layers, "params": {"only": layer, "rate": 1 - kept / 100}}
            found.append(outcome(trial, seed=seed, accuracy=accuracy, sparsity=(100 - kept) / 200, **pruned))
    return study(found, space={"only": ["fc1", "out"], "rate": [0.5, 0.9]}, seeds=(0, 1), **more)


def test_a_layer_pruned_alone_shows_means_over_its_own_weights() -> None:
    opened = scan()
    lines, dense = _sensitivities(opened, opened.front().objectives[0])
    assert dense == pytest.approx(0.9)
    assert list(lines) == ["fc1", "out"]  # as the space has them, not as they were run
    assert all(line == [(0.5, pytest.approx(0.65)), (0.9, pytest.approx(0.61))] for line in lines.values())


@pytest.mark.parametrize("ending", [".png", ".svg", ".pdf"])
def test_sensitivities_are_drawn(ending: str, tmp_path: Path) -> None:
    plot_sensitivity(scan(), str(tmp_path / f"drawn{ending}"))
    assert (tmp_path / f"drawn{ending}").stat().st_size > 5000


def test_every_criterion_of_a_scan_has_a_line_of_its_own() -> None:
    found = [outcome(DENSE_TRIAL, 0, accuracy=0.9, sparsity=0.0)]
    for trial, criterion in enumerate(("magnitude", "taylor")):
        pruned = {"layers": {"out.weight": [50, 100]}, "params": {"only": "out", "criterion": criterion}}
        found.append(outcome(trial, accuracy=0.8, sparsity=0.5, **pruned))
    opened = study(found, space={"only": "out", "criterion": ["magnitude", "taylor"], "rate": 0.5})
    lines, _ = _sensitivities(opened, opened.front().objectives[0])
    assert list(lines) == ["out, magnitude", "out, taylor"]


def test_a_study_that_prunes_no_layer_alone_has_no_sensitivities(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no finished trial that pruned some layers only.* says `only` in \[space\]"):
        plot_sensitivity(study(rows(5), space=SPACE), tmp_path / "none.png")
    assert not list(tmp_path.iterdir())
