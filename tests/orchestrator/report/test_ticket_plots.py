"""Pictures of tickets: what they show is read off matplotlib's own objects, not off pixels."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from orchestrator import Study
from orchestrator.errors import InputError, QueryError
from orchestrator.pools.local import LocalPool
from orchestrator.settings import CONTROLS, TRANSFER_CONTROLS
from orchestrator.tickets.study import agreement
from orchestrator.tickets.study.structure import Body
from orchestrator.tickets.study.table import Found, read, steps_to_best
from tests.orchestrator.pools import small

pytest.importorskip("matplotlib")

from orchestrator.report import ticket_plots as plots

PNG = b"\x89PNG\r\n\x1a\n"


def found(
    trial: int = 0,
    round: int = 1,
    kept: int = 50,
    accuracy: Sequence[float] = (0.9, 0.92),
    controls: dict[str, Sequence[float]] | None = None,
    curve: bool = False,
    **params: Any,
) -> Found:
    """A ticket that keeps `kept` of 100 weights, with the test accuracies of each seed."""

    def row(value: float) -> dict[str, Any]:
        points = json.dumps([[10, 0.5, 0.8], [20, 0.4, 0.9], [30, 0.45, 0.9]])
        layers = json.dumps({"fc.weight": [kept, 100]})
        return {"test_accuracy": value, "accuracy": value, "layers": layers, "curve": points if curve else None}

    return Found(
        trial=trial,
        params=params,
        round=round,
        tickets={seed: {"key": "", "searches": [], "controls": []} for seed in range(len(accuracy))},
        rows={seed: row(value) for seed, value in enumerate(accuracy)},
        controls={
            kind: {seed: [row(value)] for seed, value in enumerate(values)} for kind, values in (controls or {}).items()
        },
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_task(tmp_path_factory.mktemp("root"))


def run(root: Path, name: str, space: dict[str, Any], **fields: Any) -> Study:
    study = Study(small.spec(name=name, sampler="grid", space=space, **fields), root / "store", root=root)
    study.run(LocalPool())
    return study


@pytest.fixture(scope="module")
def rounds(root: Path) -> Study:
    """Two criteria, two rounds each, under two seeds, with learning curves and siblings."""
    space = {"criterion": ["magnitude", "random"], "rate": 0.5, "rounds": 2, "retrain": "rewind"}
    train = dict(small.TRAIN) | {"evaluate_every": 1}
    tickets = {"controls": ["dense", "shuffled", "sibling"], "rounds": [1, 2]}
    return run(root, "rounds", space, trials=2, seeds=(0, 1), train=train, tickets=tickets)


@pytest.fixture(scope="module")
def consensus(root: Path) -> Study:
    """One ticket from three searches."""
    space = {"rate": 0.5, "rounds": 1, "retrain": "rewind", "searches": 3, "rule": "at-least", "at_least": 2}
    return run(root, "consensus", space, trials=1, tickets={"controls": ["dense", "random"]})


def assert_pictures(drawn: plots.Drawn, folder: Path, names: Sequence[str]) -> None:
    assert [path.name for path in drawn.files] == [f"{name}.png" for name in names]
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{name}.png" for name in names)
    for path in drawn.files:
        picture = path.read_bytes()
        assert picture.startswith(PNG)
        width, height = struct.unpack(">II", picture[16:24])
        assert 400 < width < 3000 and 400 < height < 2500, path
        assert 5_000 < len(picture) < 400_000, path


def test_everything_of_a_study_with_rounds_is_drawn(rounds: Study, tmp_path: Path) -> None:
    from orchestrator.tickets.study.stability import measure

    measure(rounds)
    drawn = plots.plot_tickets(rounds, tmp_path / "made" / "here")
    layers = [f"first-layer-trial-{trial}" for trial in (0, 1)]
    names = ["accuracy", "steps", "agreement-of-tickets", "k-of-n-of-tickets", *layers, "stability"]
    assert_pictures(drawn, tmp_path / "made" / "here", names)
    assert drawn.left_out == ()


def test_a_consensus_ticket_shows_its_searches_and_says_what_is_missing(consensus: Study, tmp_path: Path) -> None:
    drawn = plots.plot_tickets(consensus, tmp_path)
    assert_pictures(drawn, tmp_path, ["accuracy", "agreement", "k-of-n", "first-layer"])
    assert [line.partition(":")[0] for line in drawn.left_out] == ["steps.png", "stability.png"]
    assert "evaluate_every" in drawn.left_out[0] and "--stability" in drawn.left_out[1]


def test_the_same_masks_give_the_same_picture(tmp_path: Path) -> None:
    one, other = (plots._write(plots.k_of_n_figure(COMPARED), tmp_path / f"{name}.png") for name in ("one", "other"))
    assert one.read_bytes() == other.read_bytes()


def test_a_study_without_tickets_draws_nothing(root: Path, tmp_path: Path) -> None:
    study = run(root, "none", {"rate": 0.5, "retrain": "finetune"}, trials=1)
    with pytest.raises(QueryError, match="has no ticket yet"):
        plots.plot_tickets(study, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_folder_that_is_a_file_is_refused(consensus: Study, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write accuracy.png"):
        plots.plot_tickets(consensus, tmp_path / "file")


def test_a_missing_matplotlib_names_the_extra(
    consensus: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r'pip install "orchardist\[report\]"'):
        plots.plot_tickets(consensus, tmp_path)


# --- Contenders ----------------------------------------------------------------------------------------------------


def test_every_control_has_a_look_of_its_own() -> None:
    assert plots.LOOKS.keys() == {*CONTROLS, *TRANSFER_CONTROLS} - {"sibling"}
    looks = {(str(look["color"]), str(look["marker"])) for look in plots.LOOKS.values()}
    assert len(looks) == len(plots.LOOKS)
    assert len({look["marker"] for look in plots.LOOKS.values()}) == len(plots.LOOKS), "told apart without colour"


def test_points_are_means_with_intervals_over_seeds() -> None:
    tickets = [
        found(round=2, kept=25, accuracy=(0.8, 0.9), controls={"shuffled": (0.7, 0.7)}),
        found(round=1, kept=50, accuracy=(0.9, 0.9)),
    ]
    (panel,) = plots.panels(tickets, lambda row: row["test_accuracy"])
    line = panel.lines[""]
    assert line.left == (0.5, 0.25) and line.mean == pytest.approx((0.9, 0.85))
    assert line.half_width == pytest.approx((0.0, 12.7062 * 0.05), rel=1e-4)  # t(0.975, 1)
    assert panel.lines["shuffled"].left == (0.25,)


def test_tickets_of_different_criteria_have_panels_of_their_own() -> None:
    tickets = [
        found(trial=0, criterion="magnitude", rate=0.5, rounds=1),
        found(trial=1, criterion="taylor", rate=0.5, rounds=1),
        found(trial=2, criterion="magnitude", rate=0.7, rounds=1, kept=30),
    ]
    told = agreement.lines(tickets)
    assert [title for title, _ in told] == ["magnitude", "taylor"]
    assert [[ticket.trial for ticket in group] for _, group in told] == [[0, 2], [1]]


def test_the_picture_draws_each_contender_where_it_is(rounds: Study) -> None:
    tickets = list(read(rounds))
    figure = plots.accuracy_figure(rounds, tickets)
    assert not isinstance(figure, str)
    first, second = figure.axes
    assert [axes.get_title("left") for axes in (first, second)] == ["magnitude", "random"]
    assert first.get_xscale() == "log" and first.get_xlim()[0] > first.get_xlim()[1]
    assert first.get_ylim() == second.get_ylim()
    handles, labels = first.get_legend_handles_labels()
    assert set(labels) == {"dense", "shuffled", "ticket"}
    line = cast(Any, handles[labels.index("ticket")])[0]  # of a container of line, caps and bars
    own = [ticket for ticket in tickets if ticket.params["criterion"] == "magnitude"]
    assert line.get_xdata() == pytest.approx([agreement.kept_share(ticket) for ticket in own])
    means = [100 * np.mean([row["test_accuracy"] for row in ticket.rows.values()]) for ticket in own]
    assert line.get_ydata() == pytest.approx(means)
    assert first.get_ylabel() == "accuracy on test (%)" and first.get_xlabel() == "prunable weights left (%)"


def test_a_task_without_accuracy_says_so(rounds: Study) -> None:
    tickets = [found()]
    for row in tickets[0].rows.values():
        cast(dict[str, Any], row).update(test_accuracy=None)
    assert plots.accuracy_figure(rounds, tickets) == "the task does not measure accuracy"


def test_no_interval_covers_another() -> None:
    kinds = [kind for kind in CONTROLS if kind != "sibling"]
    shifts = [plots._step_aside(kind, kinds) for kind in ["", *kinds] if kind != "dense"]
    assert len(set(shifts)) == len(shifts) and shifts[0] == 0 and abs(sum(shifts)) <= 5


def test_tickets_of_one_sparsity_stand_beside_their_controls(consensus: Study) -> None:
    figure = plots.accuracy_figure(consensus, list(read(consensus)))
    assert not isinstance(figure, str)
    (axes,) = figure.axes
    names = [label.get_text() for label in axes.get_xticklabels()]
    assert names[0].startswith("ticket,") and names[1:] == ["dense", "random"]


def test_steps_are_those_of_the_least_loss() -> None:
    (panel,) = plots.panels([found(curve=True)], lambda row: float(steps_to_best(row)))
    assert panel.lines[""].mean == (20.0,)


@pytest.mark.parametrize("limits", [(35.0, 99.5), (97.0, 99.9), (10.0, 60.0), (0.0, 100.0), (88.2, 98.9)])
def test_an_axis_of_accuracy_has_round_ticks_that_do_not_crowd(limits: tuple[float, float]) -> None:
    low, high = limits
    ticks = plots.accuracy_ticks(low, high)
    assert 3 <= len(ticks) <= 20
    assert all(low <= tick <= high for tick in ticks)
    start, end = plots._by_error(np.array(limits))
    assert (np.diff(plots._by_error(np.array(ticks))) > plots.LEAST_GAP * (end - start)).all()
    assert plots._from_error(plots._by_error(np.array(ticks, dtype=float))) == pytest.approx(ticks)


# --- Agreement -----------------------------------------------------------------------------------------------------


def masks(*kept: Sequence[int], size: int = 8) -> tuple[dict[str, Tensor], ...]:
    return tuple({"fc.weight": torch.zeros(size).index_fill_(0, torch.tensor(each), 1).bool()} for each in kept)


COMPARED = agreement.Compared(
    name="",
    title="three masks",
    labels=("a", "b", "c"),
    by_seed=(masks([0, 1, 2, 3], [0, 1, 2, 3], [2, 3, 4, 5]), masks([0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7])),
)


def test_below_the_diagonal_stands_what_is_shared_and_above_what_chance_gives() -> None:
    found = agreement.mean_agreement(COMPARED)
    assert list(found) == ["", "fc.weight"]
    assert found[""]["jaccard"][1, 0] == 1.0
    assert found[""]["jaccard"][2, 0] == pytest.approx((2 / 6 + 0) / 2)  # the mean of two seeds
    figure = plots.agreement_figure(COMPARED)
    image = np.asarray(figure.axes[0].get_images()[0].get_array())
    assert image[1, 0] == 1.0 and image[0, 1] == pytest.approx(found[""]["chance_jaccard"][0, 1])
    assert 0.3 < image[0, 1] < 0.4 and np.isnan(image.diagonal().astype(float)).all()
    assert {text.get_text() for text in figure.axes[0].texts} >= {"1.00", "0.17"}
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a", "b", "c"]
    assert figure.axes[1].get_title("left").startswith("fc: mean excess")


def test_canary_agreement_and_chance_are_not_the_same_picture() -> None:
    found = agreement.mean_agreement(COMPARED)[""]
    assert not np.allclose(found["jaccard"], found["chance_jaccard"])


def test_the_layers_of_a_model_come_in_its_order(consensus: Study) -> None:
    (compared,) = agreement.comparable(consensus, list(read(consensus)))
    assert list(compared.by_seed[0][0]) == ["0.weight", "2.weight"]
    assert compared.labels == ("1", "2", "3")


def test_criteria_are_compared_under_the_same_seed(rounds: Study) -> None:
    (compared,) = agreement.comparable(rounds, list(read(rounds)))
    assert [label.partition("\n")[0] for label in compared.labels] == ["magnitude", "random"]
    assert len(compared.by_seed) == 2


def test_curves_of_k_of_n_are_shares_beside_chance() -> None:
    curve = agreement.mean_curves(COMPARED)["fc.weight"]
    assert curve.share == pytest.approx(((6 + 8) / 16, (4 + 4) / 16, (2 + 0) / 16))
    assert curve.chance == pytest.approx((7 / 8, 4 / 8, 1 / 8))
    figure = plots.k_of_n_figure(COMPARED)
    drawn = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert drawn["as found"].get_ydata() == pytest.approx(curve.share)
    assert drawn["by chance"].get_ydata() == pytest.approx(curve.chance)
    assert figure.axes[0].get_xlabel() == "" or figure.axes[-1].get_xlabel() == "k of 3"


# --- First layers --------------------------------------------------------------------------------------------------


def test_each_input_counts_what_reads_it() -> None:
    mask = torch.tensor([[1, 0, 1, 0], [1, 1, 0, 0]]).bool()
    assert plots.kept_by_input([mask], (2, 2)).tolist() == [[2.0, 1.0], [1.0, 0.0]]
    assert plots.kept_by_input([mask, ~mask], (4,)).tolist() == [1.0, 1.0, 1.0, 1.0]
    assert plots.kept_by_input([mask], (2, 1, 2)).tolist() == [[3.0, 1.0]]  # two channels of one row


def test_a_matched_mask_keeps_as_many_elsewhere_and_is_drawn_from_its_seed() -> None:
    mask = (torch.arange(100).reshape(10, 10) < 30).bool()
    drawn = plots.matched(mask, 0)
    assert drawn.shape == mask.shape and int(drawn.sum()) == 30 and not torch.equal(drawn, mask)
    assert torch.equal(drawn, plots.matched(mask, 0)) and not torch.equal(drawn, plots.matched(mask, 1))


def test_a_model_without_a_first_layer_over_inputs_says_why(rounds: Study) -> None:
    nothing = Body(shapes={}, no_chain="it branches")
    assert plots.first_layer_figure(rounds, list(read(rounds)), "", nothing) == "it branches"


def test_images_are_shown_as_images_on_one_scale(rounds: Study) -> None:
    body = Body(chain=("0.weight", "2.weight"), shapes={"0.weight": (8, 4), "2.weight": (3, 8)}, geometry=(2, 2))
    tickets = [ticket for ticket in read(rounds) if ticket.params["criterion"] == "magnitude"]
    figure = plots.first_layer_figure(rounds, tickets, "", body)
    assert not isinstance(figure, str)
    images = [axes.get_images()[0] for axes in figure.axes if axes.get_images() and axes.get_title("left")]
    assert len(images) == 4  # two rounds, each above its random mask
    arrays = [np.asarray(image.get_array()) for image in images]
    assert all(array.shape == (2, 2) for array in arrays)
    assert arrays[0].sum() == arrays[2].sum() or arrays[0].sum() == arrays[1].sum()  # as many kept
    assert len({image.get_clim() for image in images}) == 2
