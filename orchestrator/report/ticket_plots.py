"""A study's tickets as pictures: how good they are beside their controls, where they agree, and what they look at."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from math import ceil, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from orchestrator.errors import InputError, QueryError
from orchestrator.report.plot import DARK, DOTS_PER_INCH, GREY, STYLES
from orchestrator.seeds import derive
from orchestrator.tickets.interval import interval
from orchestrator.tickets.stability import STABLE
from orchestrator.tickets.study.agreement import (
    Compared,
    comparable,
    kept_share,
    lines,
    mean_agreement,
    mean_curves,
)
from orchestrator.tickets.study.stability import recorded
from orchestrator.tickets.study.structure import Body, look, masks_of
from orchestrator.tickets.study.table import Found, compared_on, read, steps_to_best

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from orchestrator.study import Study

Floats = NDArray[np.float64]

_BLUE, _RED, _GREEN, _PINK, _ORANGE, _SKY = (colour for colour, _ in STYLES)
LOOKS: dict[str, dict[str, Any]] = {
    "dense": {"color": GREY, "linestyle": (0, (1, 2)), "marker": "*"},
    "dense-transferred": {"color": GREY, "linestyle": (0, (3, 1.5)), "marker": "d", "markerfacecolor": "white"},
    "dense-long": {"color": GREY, "linestyle": (0, (5, 2)), "marker": "p"},
    "one-shot": {"color": _BLUE, "linestyle": "-", "marker": "o"},
    "imp": {"color": _SKY, "linestyle": "-", "marker": "s"},
    "shuffled": {"color": _RED, "linestyle": "-", "marker": "^"},
    "random": {"color": _ORANGE, "linestyle": "-", "marker": "v"},
    "random-layer": {"color": _ORANGE, "linestyle": (0, (3, 1.5)), "marker": "<", "markerfacecolor": "white"},
    "inverted": {"color": GREY, "linestyle": "-", "marker": "X"},
    "reinitialised": {"color": _GREEN, "linestyle": "-", "marker": "D"},
    "sign-kept": {"color": _PINK, "linestyle": "-", "marker": "P"},
    "sign-constant": {"color": _PINK, "linestyle": (0, (3, 1.5)), "marker": "h", "markerfacecolor": "white"},
}
"""A colour, a line and a shape for each control: two of these tell any two apart."""
TICKET = {"color": DARK, "linestyle": "-", "marker": "o", "linewidth": 2.0}
STABILITY = {"ticket": TICKET, "dense": LOOKS["dense"], "reinitialised": LOOKS["reinitialised"]}

LEFT_TICKS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)
ACCURACY_TICKS = (*range(0, 90, 5), *range(90, 100), 99.5, 99.8, 100)
NO_ERROR = 0.2
"""Percent of error that are as good as none on an axis spaced by the error."""
LEAST_ERROR = 0.4
"""The axis ends at this part of the best mean's error; an interval may run beyond it."""
LEAST_GAP = 0.055
"""Between two ticks, of an axis."""
DODGE = 0.018
"""How far lines stand beside one another, in powers of e, so that their intervals do not cover each other."""
MOST_PANELS = 6
MOST_NAMED = 12
"""Cells of a larger heat map carry no numbers."""
MOST_ROUNDS = 4
"""So many rounds of one trial are shown as first-layer masks."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What was drawn, and why something was not."""

    files: tuple[Path, ...]
    left_out: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One contender over what is left of the weights.

    Args:
        left: share of the prunable weights that is kept, 0 to 1, in falling order.
        mean: over the seeds.
        half_width: of its 95 % interval; NaN with one seed.
    """

    left: tuple[float, ...]
    mean: tuple[float, ...]
    half_width: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """The tickets that lie on one line, with their controls."""

    title: str
    lines: Mapping[str, Line]
    """By kind of control; the ticket's under ""."""


def plot_tickets(study: Study, folder: Path) -> Drawn:
    """Draw what there is to draw of a study's tickets, as PNG files in `folder`; files of the same names are replaced.

    accuracy.png        test accuracy against weights left, beside every control
    accuracy-on-*.png   the same of the tickets that were tried on another task
    steps.png           steps to the best validation loss, where the study took learning curves
    agreement*.png      Jaccard similarity of the searches of a consensus ticket, or of tickets under the same seed,
                        per layer and overall, beside chance
    k-of-n*.png         the share of weights that at least k of them keep, beside chance
    first-layer*.png    what each input is read by, beside a count-matched random mask
    stability.png       the error between siblings, where it was measured

    Args:
        study: an opened study; its task is loaded for the first layer.
        folder: is made.

    Raises:
        QueryError: the study has no ticket yet.
        InputError: the folder cannot be written, or matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
    except ImportError as error:
        raise InputError('--plot needs matplotlib: pip install "orchardist[report]"') from error
    tickets = list(read(study))
    if not tickets:
        raise QueryError(f"the study {study.spec.name!r} has no ticket yet: there is nothing to draw")
    files, left_out = [], []
    with rc_context({"font.size": 9.5, "axes.edgecolor": GREY, "axes.titlesize": 10}):
        for name, make in _pictures(study, tickets):
            made = make()
            if isinstance(made, str):
                left_out.append(f"{name}.png: {made}")
            else:
                files.append(_write(made, folder / f"{name}.png"))
    return Drawn(files=tuple(files), left_out=tuple(left_out))


def _pictures(study: Study, tickets: Sequence[Found]) -> Iterator[tuple[str, Callable[[], Figure | str]]]:
    """The name of each picture and what draws it, or says why it cannot be drawn."""
    yield "accuracy", lambda: accuracy_figure(study, tickets)
    for task in dict.fromkeys(task for ticket in tickets for task in ticket.transfers):
        there, name = [t.transfers[task] for t in tickets if task in t.transfers], re.sub(r"[^\w.-]+", "-", task)
        yield f"accuracy-on-{name}", lambda there=there: accuracy_figure(study, there)  # type: ignore[misc]
    yield "steps", lambda: steps_figure(study, tickets)
    compared = list(comparable(study, tickets))
    if not compared:
        why = "no masks to compare: a study has several searches, or several trials with a ticket each"
        yield "agreement", lambda: why
        yield "k-of-n", lambda: why
    for each in compared:
        yield f"agreement{each.name}", lambda each=each: agreement_figure(each)  # type: ignore[misc]
        yield f"k-of-n{each.name}", lambda each=each: k_of_n_figure(each)  # type: ignore[misc]
    body, found = look(study), lines(tickets)
    for title, line in found:
        name = f"first-layer-trial-{line[0].trial}" if len(found) > 1 else "first-layer"
        yield name, lambda line=line, title=title: first_layer_figure(study, line, title, body)  # type: ignore[misc]
    yield "stability", lambda: stability_figure(study, tickets)


def panels(tickets: Sequence[Found], value: Callable[[Mapping[str, Any]], float | None]) -> list[Panel]:
    """One panel for each line of tickets, with a measure of every state in it that has one.

    Args:
        tickets: of a study.
        value: the measure of an outcome; None leaves the contender out at this ticket.
    """
    found = []
    for title, group in lines(tickets):
        points: dict[str, list[tuple[float, float, float]]] = {}
        for ticket in group:
            everyone = {"": {seed: [row] for seed, row in ticket.rows.items()}, **ticket.controls}
            for kind, drawn in everyone.items():
                values = [[value(row) for row in rows] for rows in drawn.values()]
                known = [[one for one in each if one is not None] for each in values]
                if all(len(some) == len(each) for some, each in zip(known, values, strict=True)):
                    mean, half_width = interval([sum(each) / len(each) for each in known])
                    point = kept_share(ticket), mean, float("nan") if half_width is None else half_width
                    points.setdefault(kind, []).append(point)
        made = {}
        for kind, reached in points.items():
            left, means, widths = zip(*reached, strict=True)
            made[kind] = Line(left=left, mean=means, half_width=widths)
        found.append(Panel(title=title, lines=made))
    return found


def accuracy_figure(study: Study, tickets: Sequence[Found]) -> Figure | str:
    """Test accuracy, or that on validation where there is no test split, against what is left of the weights.

    All tickets are of one task, the study's own or another.
    """
    task = tickets[0].task
    measure, _ = compared_on(study, task)
    split = "test" if measure == "test_accuracy" else "validation"
    made = panels(tickets, lambda row: None if row[measure] is None else 100 * row[measure])
    if not any(panel.lines for panel in made):
        return "the task does not measure accuracy"
    figure, grid = _contenders(study, made, f"accuracy on {split} (%)", task)
    low, high = grid[0].get_ylim()  # the panels share it
    best = max(mean for panel in made for line in panel.lines.values() for mean in line.mean)
    low, high = max(low, 0.0), min(high, 100 - (100 - best) * LEAST_ERROR)
    grid[0].set_yscale("function", functions=(_by_error, _from_error))
    grid[0].set_yticks(accuracy_ticks(low, high))
    grid[0].yaxis.set_major_formatter("{x:g}")
    grid[0].set_ylim(low, high)
    return figure


def steps_figure(study: Study, tickets: Sequence[Found]) -> Figure | str:
    """The step at which the validation loss was lowest, against what is left of the weights."""
    if not study.spec.train.evaluate_every:
        return "the study took no learning curves; legal: evaluate_every in [train]"
    made = panels(tickets, lambda row: float(steps_to_best(row)) if row["curve"] else None)
    return _contenders(study, made, "steps to the best loss on validation")[0]


def accuracy_ticks(low: float, high: float) -> list[float]:
    """Round numbers of percent between two limits that stand well apart on an axis spaced by the error."""
    start, end = _by_error(np.array([low, high]))
    chosen: list[float] = []
    for tick in sorted(ACCURACY_TICKS, key=lambda tick: (tick % 10 > 0, tick % 5 > 0, tick % 1 > 0, -tick)):
        places = _by_error(np.array([tick, *chosen]))
        if low <= tick <= high and (np.abs(places[1:] - places[0]) > LEAST_GAP * (end - start)).all():
            chosen.append(tick)
    return sorted(chosen)


def _by_error(accuracy: Floats) -> Floats:
    """Nearly equal steps for equal ratios of the error, so that 99 and 98 % stand as far apart as 80 and 60 %."""
    spaced: Floats = -np.log(100 + NO_ERROR - np.clip(accuracy, None, 100))
    return spaced


def _from_error(spaced: Floats) -> Floats:
    accuracy: Floats = 100 + NO_ERROR - np.exp(-np.asarray(spaced, dtype=np.float64))
    return accuracy


def _contenders(study: Study, made: Sequence[Panel], label: str, task: str = "") -> tuple[Figure, list[Axes]]:
    shown = made[:MOST_PANELS]
    alone = len(shown) == 1
    figure, grid = _grid(len(shown), width=7.4 if alone else 4.6, height=4.6 if alone else 3.6, share=True)
    single = all(len(line.left) == 1 for panel in shown for line in panel.lines.values())
    least = min((min(line.left) for panel in shown for line in panel.lines.values()), default=1.0)
    kinds = list(dict.fromkeys(kind for panel in shown for kind in panel.lines if kind))
    for axes, panel in zip(grid, shown, strict=True):
        if single:
            _draw_side_by_side(axes, panel, kinds)
        else:
            _draw_lines(axes, panel, kinds, least)
        axes.set_title(panel.title, color=DARK, loc="left")
        _plain(axes)
    _label(grid, "" if single else "prunable weights left (%)", label)
    where = f"tickets tried on {task}, " if task else ""
    _head(figure, study, f"{where}mean and 95 % interval over seeds", len(made) - len(shown))
    if not single:
        _legend(figure, grid)
    return figure, grid


def _draw_side_by_side(axes: Axes, panel: Panel, kinds: Sequence[str]) -> None:
    """Tickets of one sparsity: the contenders stand beside one another."""
    names = ["", *kinds]
    for place, kind in enumerate(names):
        line = panel.lines.get(kind)
        if line is not None:
            look = {"markersize": 7, **(LOOKS[kind] if kind else TICKET), "linestyle": "none"}
            widths = None if np.isnan(line.half_width[0]) else line.half_width
            axes.errorbar([place], line.mean, yerr=widths, capsize=3, elinewidth=1.2, **look)
    ticket = panel.lines.get("")
    if ticket is not None:
        axes.axhline(ticket.mean[0], color=DARK, linewidth=0.9, linestyle=(0, (1, 2.5)), zorder=1)
        names[0] = f"ticket,\n{100 * ticket.left[0]:.3g} % left"
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.6, len(names) - 0.4)


def _draw_lines(axes: Axes, panel: Panel, kinds: Sequence[str], least: float) -> None:
    """Over what is left of the weights; lines stand a little beside one another."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    for kind in [*kinds, ""]:
        line = panel.lines.get(kind)
        if line is None:
            continue
        look = {"linewidth": 1.3, "markersize": 5, **(LOOKS[kind] if kind else TICKET)}
        if kind == "dense":  # it keeps all its weights, whatever the ticket that it stands beside
            axes.axhline(line.mean[0], color=look["color"], linestyle=look["linestyle"], label=kind, zorder=2)
            if np.isfinite(line.half_width[0]):
                low, high = line.mean[0] - line.half_width[0], line.mean[0] + line.half_width[0]
                axes.axhspan(low, high, color=look["color"], alpha=0.12, linewidth=0, zorder=1)
            continue
        left = np.array(line.left) * np.exp(DODGE * _step_aside(kind, kinds))
        widths = None if np.isnan(line.half_width).all() else line.half_width
        look |= {"capsize": 2, "elinewidth": 0.9, "zorder": 4 if kind else 5}
        axes.errorbar(left, line.mean, yerr=widths, label=kind or "ticket", **look)
    axes.set_xscale("log")
    axes.set_xlim(1.12, least / 1.25)
    axes.xaxis.set_major_locator(FixedLocator(LEFT_TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}"))


def _step_aside(kind: str, kinds: Sequence[str]) -> int:
    """0 for the ticket, then 1, -1, 2, -2, … for those that do not lie across the picture as the dense model does."""
    if not kind:
        return 0
    place = [each for each in kinds if each != "dense"].index(kind)
    return (place // 2 + 1) * (1 if place % 2 == 0 else -1)


def agreement_figure(compared: Compared) -> Figure:
    """Below the diagonal what each pair shares, above it what chance gives; overall and for each layer."""
    found = mean_agreement(compared)
    count = len(compared.labels)
    side = max(3.0, min(0.62 * count + 1.2, 6.5))
    shown = dict(list(found.items())[:MOST_PANELS])
    figure, grid = _grid(len(shown), width=side + 0.6, height=side + 0.2, share=True)
    below = np.tril(np.ones((count, count), dtype=bool), -1)
    for axes, (layer, each) in zip(grid, shown.items(), strict=True):
        values = np.where(below, each["jaccard"], each["chance_jaccard"])
        values[np.diag_indices(count)] = np.nan
        image = axes.imshow(values, cmap="viridis", vmin=0, vmax=1)
        if count <= MOST_NAMED:
            for row, column in zip(*np.nonzero(~np.eye(count, dtype=bool)), strict=True):
                colour = "black" if values[row, column] > 0.6 else "white"
                look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8, "color": colour}
                axes.text(column, row, f"{values[row, column]:.2f}", **look)
        long = max(map(len, compared.labels)) > 2 and count > 3
        axes.set_xticks(range(count), compared.labels, rotation=90 if long else 0, fontsize=8)
        axes.set_yticks(range(count), compared.labels, fontsize=8)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        excess = each["excess"][below]
        known = excess[np.isfinite(excess)]
        more = f": mean excess {known.mean():.2f}" if known.size else ""
        axes.set_title(f"{layer.removesuffix('.weight') or 'all layers'}{more}", color=DARK, loc="left")
    figure.colorbar(image, ax=grid, shrink=0.8, aspect=30, label="Jaccard similarity")
    over = f", means of {len(compared.by_seed)} seeds" if len(compared.by_seed) > 1 else ""
    more = f"; {len(found) - len(shown)} more layers are not shown" if len(found) > len(shown) else ""
    legend = "below the diagonal: as found; above: by chance\nexcess: 0 as by chance, 1 equal"
    figure.suptitle(f"{compared.title}{over}{more}\n{legend}", x=0.01, ha="left", fontsize=10, color=DARK)
    return figure


def k_of_n_figure(compared: Compared) -> Figure:
    """The share of weights that at least k of the masks keep, for every k, beside chance."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    found = mean_curves(compared)
    shown = dict(list(found.items())[:MOST_PANELS])
    figure, grid = _grid(len(shown), width=3.4, height=3.0)
    for axes, (layer, curve) in zip(grid, shown.items(), strict=True):
        k = range(1, len(curve.share) + 1)
        axes.plot(k, curve.chance, label="by chance", color=GREY, linestyle=(0, (3, 1.5)), marker="s", markersize=4)
        axes.plot(k, curve.share, label="as found", color=_BLUE, marker="o", markersize=5, linewidth=1.6)
        axes.set_ylim(0, None)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}"))
        axes.set_title(layer.removesuffix(".weight") or "all layers", color=DARK, loc="left")
        _plain(axes)
    _label(grid, f"k of {len(compared.labels)}", "weights kept by k or more (%)")
    figure.suptitle(compared.title, x=0.01, ha="left", fontsize=10, color=DARK)
    _legend(figure, grid)
    return figure


def kept_by_input(masks: Sequence[torch.Tensor], geometry: Sequence[int]) -> Floats:
    """How many weights of a first layer read each input, the mean over masks; channels are added up.

    Args:
        masks: bool of shape (units, inputs), one for each seed.
        geometry: (width,), (height, width) or (channels, height, width).

    Returns:
        Of shape (width,) or (height, width).
    """
    counts = torch.stack([mask.sum(dim=0) for mask in masks]).double().mean(dim=0).reshape(tuple(geometry))
    return np.asarray((counts.sum(dim=0) if len(geometry) == 3 else counts).numpy(), dtype=np.float64)


def matched(mask: torch.Tensor, seed: int, number: int = 0) -> torch.Tensor:
    """A random mask that keeps as many weights, anywhere in the layer; another one for each seed and number."""
    generator = torch.Generator().manual_seed(derive(seed, "first layer", number))
    return mask.reshape(-1)[torch.randperm(mask.numel(), generator=generator)].reshape(mask.shape)


def first_layer_figure(study: Study, tickets: Sequence[Found], title: str, body: Body) -> Figure | str:
    """How many kept weights read each input, for up to four of the tickets, above a count-matched random mask."""
    if not body.geometry:
        return body.no_chain or body.not_known
    if prod(body.geometry) != body.shapes[body.first][1]:
        return f"{body.first!r} reads {body.shapes[body.first][1]} inputs, the task has {prod(body.geometry)}"
    chosen = [tickets[round(place)] for place in np.linspace(0, len(tickets) - 1, min(MOST_ROUNDS, len(tickets)))]
    columns = []
    for ticket in chosen:
        states = {seed: masks_of(study, found["key"]) for seed, found in ticket.tickets.items()}
        masks = {seed: each[body.first] for seed, each in states.items() if each and body.first in each}
        if len(masks) < len(states):
            return f"a mask of {body.first!r} is no longer in the store, or the layer is not pruned"
        random = [matched(mask, seed, ticket.round) for seed, mask in masks.items()]
        pair = kept_by_input(list(masks.values()), body.geometry), kept_by_input(random, body.geometry)
        left = 100 * float(np.mean([mask.double().mean() for mask in masks.values()]))
        columns.append((f"round {ticket.round}: {left:.3g} % of {body.first.removesuffix('.weight')} left", pair))
    return _first_layer(study, title, columns, len(body.geometry) == 1)


def _first_layer(study: Study, title: str, columns: Sequence[tuple[str, tuple[Floats, Floats]]], flat: bool) -> Figure:
    from matplotlib.figure import Figure

    count = len(columns)
    figure = Figure(figsize=(max(5.0, 2.7 * count + 1), 4.4 if flat else 5.4), dpi=DOTS_PER_INCH, layout="constrained")
    grid = figure.subplots(1 if flat else 2, count, squeeze=False, sharey=flat)
    for place, (label, pair) in enumerate(columns):
        if flat:
            axes = grid[0][place]
            axes.step(range(len(pair[1])), pair[1], where="mid", color=GREY, label="random mask, as many kept")
            axes.step(range(len(pair[0])), pair[0], where="mid", color=_BLUE, label="ticket", linewidth=1.6)
            axes.set_ylim(0, None)
            axes.set_title(label, color=DARK, loc="left", fontsize=9)
            axes.set_xlabel("input")
            _plain(axes)
            continue
        top = max(map(np.max, pair))
        for axes, values, what in zip(grid[:, place], pair, ("ticket", "random"), strict=True):
            image = axes.imshow(values, cmap="viridis", vmin=0, vmax=top)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            axes.set_title(
                label if what == "ticket" else "random mask, as many kept", color=DARK, loc="left", fontsize=9
            )
        figure.colorbar(image, ax=list(grid[:, place]), shrink=0.7, aspect=25)
    if flat:
        grid[0][0].set_ylabel("kept weights that read it")
        _legend(figure, [grid[0][0]])
    what = "kept weights that read each input, means over seeds"
    figure.suptitle(
        f"{study.spec.name}{': ' + title if title else ''}\n{what}", x=0.01, ha="left", fontsize=10, color=DARK
    )
    return figure


def stability_figure(study: Study, tickets: Sequence[Found]) -> Figure | str:
    """The error on the line between siblings: of the tickets, the dense model, and the reinitialised tickets."""
    measured = [(ticket, found) for ticket in tickets if (found := recorded(study, ticket)) is not None]
    if not measured:
        return "not measured yet; legal: tickets --stability, in a study with 'sibling' among its controls"
    shown = measured[-MOST_PANELS:]
    figure, grid = _grid(len(shown), width=3.6, height=3.0)
    for axes, (ticket, found) in zip(grid, shown, strict=True):
        for kind, each in found.items():
            look = {"linewidth": 1.4, **STABILITY[kind], "marker": ""}
            label = kind if kind != "reinitialised" else "ticket, reinitialised"
            axes.plot(each["alphas"], [100 * error for error in each["errors"]], label=label, **look)
        barriers = ", ".join(f"{kind} {100 * each['barrier']:.1f}" for kind, each in found.items())
        axes.set_title(f"{100 * kept_share(ticket):.3g} % left", color=DARK, loc="left")
        axes.text(0.02, 0.97, f"barriers: {barriers}", transform=axes.transAxes, va="top", fontsize=7.5, color=DARK)
        axes.margins(y=0.25)
        _plain(axes)
    _label(grid, "from a network (0) to its sibling (1)", "error (%)")
    _head(figure, study, f"stable below a barrier of {100 * STABLE:g} points", len(measured) - len(shown))
    _legend(figure, grid)
    return figure


def _columns(count: int) -> int:
    return count if count <= 3 else ceil(count / 2)


def _grid(count: int, *, width: float, height: float, share: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels of so many inches, in one row or two; they may share both axes."""
    from matplotlib.figure import Figure

    columns = _columns(count)
    rows = ceil(count / columns)
    figure = Figure(figsize=(width * columns, height * rows + 0.7), dpi=DOTS_PER_INCH, layout="constrained")
    figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.06)
    axes: list[Axes] = []
    for place in range(count):
        first = axes[0] if share and axes else None
        axes.append(figure.add_subplot(rows, columns, place + 1, sharex=first, sharey=first))
        axes[-1].tick_params(labelleft=not share or place % columns == 0)
        axes[-1].tick_params(labelbottom=not share or place + columns >= count)
    return figure, axes


def _label(grid: Sequence[Axes], across: str, up: str) -> None:
    """Name the axes once for each row and column of panels."""
    columns = _columns(len(grid))
    for place, axes in enumerate(grid):
        if place % columns == 0:
            axes.set_ylabel(up)
        if place + columns >= len(grid):
            axes.set_xlabel(across)


def _head(figure: Figure, study: Study, what: str, more: int) -> None:
    over = f" · {len(study.spec.seeds)} seeds" if len(study.spec.seeds) > 1 else " · one seed"
    hidden = f" · {more} more are not shown" if more > 0 else ""
    figure.suptitle(f"{study.spec.name}: {what}{over}{hidden}", x=0.01, ha="left", fontsize=10.5, color=DARK)


def _legend(figure: Figure, grid: Sequence[Axes]) -> None:
    """Each name once, below everything."""
    named: dict[str, Any] = {}
    for axes in grid:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=min(6, len(named)), frameon=False)


def _plain(axes: Axes) -> None:
    axes.grid(color="#E8E8E8", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(color=GREY)


def _write(figure: Figure, path: Path) -> Path:
    image = BytesIO()
    figure.savefig(image, format="png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image.getvalue())
    except OSError as error:
        raise InputError(f"--plot {path.parent}: cannot write {path.name}: {error.strerror}") from error
    return path
