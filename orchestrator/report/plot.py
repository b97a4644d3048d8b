"""The front of a study, or the sensitivity of its layers, as a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from orchestrator import history
from orchestrator.errors import InputError
from orchestrator.front import Front, Points, read_points
from orchestrator.objectives import OBJECTIVES, Objective
from orchestrator.tasks.info import matches

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from orchestrator.store.tables import Outcomes
    from orchestrator.study import Study

Floats = NDArray[np.float64]
Criteria = NDArray[np.object_]
Styles = dict[str, tuple[str, str]]

ENDINGS = (".png", ".svg", ".pdf")
WIDTH_INCHES, HEIGHT_INCHES, DOTS_PER_INCH = 7.4, 4.6, 150

# Okabe & Ito (2008): told apart with every kind of colour vision; the shapes say the same once more.
STYLES = (("#0072B2", "o"), ("#D55E00", "^"), ("#009E73", "s"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"))
GREY, DARK = "#8A8A8A", "#1A1A1A"
OTHERS = "others"

FRACTIONS = ("accuracy", "sparsity")
"""Measures whose names end so lie in 0..1 and are shown in percent."""
NAMES = {
    "accuracy": "accuracy on validation (%)",
    "worst_class_accuracy": "accuracy of the worst class on validation (%)",
    "loss": "loss on validation",
    "sparsity": "sparsity: prunable weights removed (%; equal steps halve the rest)",
    "nonzero_params": "non-zero parameters",
    "flops_effective": "effective FLOPs",
    "bytes": "bytes",
    "latency_ms": "latency (ms)",
}
SIZES = ("nonzero_params", "flops_effective", "bytes")
SPARSITY_TICKS = (0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)
MOST_SPARSE = 1 - 1e-6
LEGEND_CHARACTERS = 110
LABEL_WIDTH, LABEL_HEIGHT = 0.22, 0.1
"""What the knee's label takes of the axes."""
MOST_MARKED = 60
"""A front of more points is a line only."""
CROWD = 2000
"""From so many points on they are drawn smaller and lighter."""
MOST_OUTSIDE = 0.1
"""At most this share of the points, those far worse than the front, is marked at the edge of the axes."""


def plot_front(study: Study, found: Front, path: Path) -> None:
    """Draw every measured point of a study in its first two objectives, its front, the knee and the dense model.

    With one objective, the other axis is sparsity. Nothing of the user's code is imported.

    Args:
        study: an opened study.
        found: its front, of which the points are joined where the study has two objectives, and the knee is ringed.
        path: a PNG, SVG or PDF file; one that is there is replaced.

    Raises:
        InputError: no finished trial, an unknown file ending, a folder that cannot be written, or no matplotlib.
    """
    with _picture(path) as axes:
        up, across = _axes_of(found)
        outcomes = study.store.outcomes(study.spec.name)
        points = read_points(outcomes, [up.column, across.column], len(study.spec.seeds))
        if not len(points.trials):
            raise InputError(f"the study {study.spec.name!r} has no finished trial yet: there is nothing to draw")
        _scale(axes, across, points.columns[across.column], _dense(found, across.column), "x")
        _scale(axes, up, points.columns[up.column], _dense(found, up.column), "y")
        criteria = _criteria(study, outcomes, points)
        styles = _styles(criteria)
        _draw_points(axes, points, criteria, styles, across, up, _edge(points.columns[up.column], found, up))
        _draw_dense(axes, found, across, up)
        _draw_front(axes, found, styles, across, up)
        axes.set_title(_title(study, found, points), loc="left", fontsize=10.5, color=DARK)


def plot_sensitivity(study: Study, path: str | Path) -> None:
    """Draw what each layer costs when it is pruned alone: the first objective over the pruned part of that layer.

    One line for each value of `only` in the study's space, and for each criterion where there are several. Colours run
    from the first layer that the space names to the last.

    Args:
        study: an opened study whose space says `only`.
        path: a PNG, SVG or PDF file; one that is there is replaced.

    Raises:
        InputError: no finished trial that pruned some layers only, an unknown file ending, a folder that cannot be
            written, or no matplotlib.
    """
    with _picture(Path(path)) as axes:
        from matplotlib import colormaps
        from matplotlib.ticker import FuncFormatter

        up = _axes_of(study.front())[0]
        lines, dense = _sensitivities(study, up)
        heights = np.array([y for line in lines.values() for _, y in line])
        _scale(axes, up, heights, dense, "y")
        if dense is not None:
            axes.axhline(dense, color=DARK, linewidth=0.9, linestyle=(0, (1, 2.5)), label="dense model")
        colours = colormaps["viridis"](np.linspace(0, 0.88, len(lines)))
        for number, (label, line) in enumerate(lines.items()):
            look: dict[str, Any] = {"color": colours[number], "marker": STYLES[number % len(STYLES)][1]}
            axes.plot(*zip(*line, strict=True), label=label, markersize=4.5, linewidth=1.3, **look)
        axes.set_xlabel("pruned part of the layer (%), all others dense")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}"))
        axes.set_title(f"{study.spec.name}: each layer pruned alone", loc="left", fontsize=10.5, color=DARK)


def _sensitivities(study: Study, up: Objective) -> tuple[dict[str, list[tuple[float, float]]], float | None]:
    """For each layer pruned alone its points in order, (pruned fraction, measure), and the dense model's measure."""
    outcomes = study.store.outcomes(study.spec.name)
    points = read_points(outcomes, [up.column], len(study.spec.seeds))
    table = outcomes.table(["params", "layers"])
    params, layers = (table[name].to_pylist() for name in ("params", "layers"))
    space = study.spec.search_space()
    several = len(space.possible("criterion") or ()) > 1
    found: dict[tuple[int, str], list[tuple[float, float]]] = {}
    order = [str(value) for value in space.possible("only") or ()]
    for rows, y in zip(points.rows, points.columns[up.column], strict=True):
        first = int(np.atleast_1d(rows)[0])
        said = json.loads(params[first] or "{}")
        if "only" in said:
            own = [n for name, n in json.loads(layers[first] or "{}").items() if _matches(said["only"], name)]
            pruned = 1 - sum(kept for kept, _ in own) / max(1, sum(of for _, of in own))
            label = f"{said['only']}, {said.get('criterion', 'default')}" if several else str(said["only"])
            found.setdefault((order.index(said["only"]), label), []).append((pruned, float(y)))
    if not found:
        raise InputError(
            f"the study {study.spec.name!r} has no finished trial that pruned some layers only; "
            "a sensitivity scan says `only` in [space]"
        )
    dense = _dense(study.front(), up.column)
    return {label: sorted(line) for (_, label), line in sorted(found.items())}, dense


def _matches(pattern: str, name: str) -> bool:
    return matches(pattern, name) or matches(pattern, name.removesuffix(".weight"))


@contextmanager
def _picture(path: Path) -> Iterator[Axes]:
    """Axes to draw on, which are dressed and written to `path` in the end."""
    if path.suffix.lower() not in ENDINGS:
        raise InputError(
            f"--plot {path}: cannot draw a {path.suffix or 'file without an ending'}; legal: {', '.join(ENDINGS)}"
        )
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError('--plot needs matplotlib: pip install "orchardist[report]"') from error
    image = BytesIO()
    with rc_context({"font.size": 9.5, "axes.edgecolor": GREY, "svg.hashsalt": "orchardist"}):
        # A Figure of its own: no window system, and no state that pyplot would keep.
        figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), dpi=DOTS_PER_INCH, layout="constrained")
        axes = figure.add_subplot()
        yield axes
        axes.grid(color="#E8E8E8", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(color=GREY)
        handles, labels = axes.get_legend_handles_labels()
        if labels:
            look: dict[str, Any] = {"frameon": False, "handletextpad": 0.5, "columnspacing": 1.4}
            figure.legend(handles, labels, loc="outside lower center", ncols=_columns(labels), **look)
        figure.savefig(image, format=path.suffix[1:].lower())
    try:
        path.write_bytes(image.getvalue())
    except OSError as error:
        raise InputError(f"--plot {path}: cannot write it: {error.strerror}") from error


def _axes_of(found: Front) -> tuple[Objective, Objective]:
    """What goes up and what goes across: the first two objectives, or the only one over sparsity."""
    first, *others = found.objectives
    if others:
        return first, others[0]
    return (OBJECTIVES["loss"], first) if first.column == "sparsity" else (first, OBJECTIVES["sparsity"])


def _columns(labels: Sequence[str]) -> int:
    """How many labels of the legend stand side by side."""
    in_a_row = sum(len(label) + 6 for label in labels) <= LEGEND_CHARACTERS
    return len(labels) if in_a_row else max(1, LEGEND_CHARACTERS // (max(map(len, labels)) + 6))


def _title(study: Study, found: Front, points: Points) -> str:
    # Not the trials among the points: one that another trial passed through is recorded under that one.
    endings = history.read(study.store, study.spec.name).endings.values()
    trials, seeds = sum(ending.state != "failed" for ending in endings), len(study.spec.seeds)
    on_it = f"{len(found.points):,} on the front"
    if len(found.objectives) > 2:
        on_it += f" of {', '.join(objective.name for objective in found.objectives)}"
    counts = [f"{trials:,} trials", f"{len(points.trials):,} pruned models", on_it]
    counts += [f"means of {seeds} seeds"] if seeds > 1 else []
    return f"{study.spec.name}: " + " · ".join(counts)


def _scale(axes: Axes, objective: Objective, values: Floats, dense: float | None, which: str) -> None:
    """Name an axis, say what is better, and space it: sparsity by what is left, sizes by ratio, the rest evenly."""
    from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, LogLocator, NullLocator

    axis = axes.xaxis if which == "x" else axes.yaxis
    set_scale: Any = axes.set_xscale if which == "x" else axes.set_yscale
    name = NAMES.get(objective.column, objective.name).replace("$", r"\$")
    axis.set_label_text(f"{name}, {'more' if objective.direction == 'maximise' else 'less'} is better")
    known = values[np.isfinite(values)]
    known = known if dense is None else np.append(known, dense)
    if objective.column == "sparsity":
        set_scale("function", functions=(_spread, _gathered))
        ticks = [tick for tick in SPARSITY_TICKS if tick <= min(known.max(initial=0.0) + 0.01, MOST_SPARSE)]
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_minor_locator(NullLocator())
    elif objective.column in SIZES and known.size and known.min() > 0:
        if known.max() / known.min() > 5:
            set_scale("log")
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(EngFormatter(sep=""))
    if objective.column.endswith(FRACTIONS):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}"))


def _spread(sparsity: Floats) -> Floats:
    """Equal steps for equal ratios of what is left."""
    left: Floats = np.log2(1 - np.clip(sparsity, None, MOST_SPARSE))
    return -left


def _gathered(steps: Floats) -> Floats:
    sparsity: Floats = 1 - np.exp2(-np.asarray(steps, dtype=np.float64))
    return sparsity


def _draw_points(
    axes: Axes, points: Points, criteria: Criteria, styles: Styles, across: Objective, up: Objective, edge: float
) -> None:
    """All points, small, in a light colour for each criterion; what lies beyond `edge` is marked there."""
    from matplotlib.transforms import blended_transform_factory

    x, y = points.columns[across.column], points.columns[up.column]
    upwards = up.direction == "maximise"
    outside = np.isfinite(x) & (y < edge if upwards else y > edge)
    crowded = len(x) > CROWD
    for name, (colour, marker) in styles.items():
        shown = (criteria == name) & ~outside
        look: dict[str, Any] = {"marker": marker, "color": colour, "linewidths": 0, "zorder": 2}
        axes.scatter(x[shown], y[shown], s=8 if crowded else 18, alpha=0.25 if crowded else 0.4, **look)
        if len(styles) > 1:
            axes.scatter([], [], s=24, alpha=0.8, label=name, **look)
    if outside.any():
        axes.set_ylim(*((edge, None) if upwards else (None, edge)))
        axes.scatter(
            x[outside],
            np.full(outside.sum(), 0.013 if upwards else 0.987),
            s=22,
            marker="v" if upwards else "^",
            color=GREY,
            alpha=0.6,
            linewidths=0,
            transform=blended_transform_factory(axes.transData, axes.transAxes),
            zorder=2,
            label=f"{outside.sum():,} {'below' if upwards else 'above'} the axis",
        )


def _criteria(study: Study, outcomes: Outcomes, points: Points) -> Criteria:
    """The criterion of each point where the study varies it, else one empty name for all."""
    found = np.full(len(points.trials), "", dtype=object)
    if len(study.spec.search_space().possible("criterion") or ()) < 2:
        return found
    texts = outcomes.table(["params"])["params"].to_pylist()
    known: dict[str, str] = {}
    for place, rows in enumerate(points.rows):
        text = texts[int(np.atleast_1d(rows)[0])] or "{}"
        if text not in known:
            known[text] = str(json.loads(text).get("criterion", ""))
        found[place] = known[text]
    return found


def _styles(criteria: Criteria) -> Styles:
    """A colour and a shape for each criterion, in order of the name; those beyond the palette are merged in place."""
    names = sorted(set(criteria))
    if len(names) < 2:
        return dict.fromkeys(names, (GREY, "o"))
    if len(names) > len(STYLES):
        counted = sorted(names, key=lambda name: (-int((criteria == name).sum()), name))
        criteria[np.isin(criteria, counted[len(STYLES) :])] = OTHERS
        names = sorted(counted[: len(STYLES)])
        return dict(zip(names, STYLES, strict=True)) | {OTHERS: (GREY, "o")}
    return dict(zip(names, STYLES, strict=False))


def _edge(y: Floats, found: Front, up: Objective) -> float:
    """Where the picture ends on the bad side: as far as the points go, but not too far from the front."""
    sign = 1.0 if up.direction == "maximise" else -1.0
    goods = sign * y[np.isfinite(y)]
    shown = [sign * point[up.column] for point in found.points if up.column in point]
    dense = _dense(found, up.column)
    shown += [sign * dense] if dense is not None else []
    if not shown or not goods.size:
        return sign * float("-inf")
    height = max(shown) - min(shown) or 0.05 * abs(max(shown)) or 1.0
    lowest = min(min(shown) - height, float(np.quantile(goods, MOST_OUTSIDE)))
    return sign * (lowest if goods.min() < lowest - height else float("-inf"))


def _dense(found: Front, column: str) -> float | None:
    value = None if found.dense is None else found.dense.get(column)
    return None if value is None else float(value)


def _draw_dense(axes: Axes, found: Front, across: Objective, up: Objective) -> None:
    x, y = _dense(found, across.column), _dense(found, up.column)
    if y is None:
        return
    axes.axhline(y, color=DARK, linewidth=0.9, linestyle=(0, (1, 2.5)), zorder=1.5)
    look: dict[str, Any] = {"marker": "*", "markersize": 14, "markeredgecolor": "white", "markeredgewidth": 0.8}
    if x is not None:
        axes.plot([x], [y], color=DARK, linestyle="none", label="dense model", zorder=5, clip_on=False, **look)


def _draw_front(axes: Axes, found: Front, styles: Styles, across: Objective, up: Objective) -> None:
    """The front as the steps that bound what was reached, and its knee with the key to fetch it by."""
    points: Sequence[Mapping[str, Any]] = sorted(found.points, key=lambda point: _value(point, across))
    if not points:
        return
    x, y = ([_value(point, objective) for point in points] for objective in (across, up))
    if len(found.objectives) == 2:
        # To get more of x than one point has, the next must do.
        steps = "steps-pre" if across.direction == "maximise" else "steps-post"
        axes.plot(x, y, drawstyle=steps, color=DARK, linewidth=1.4, zorder=3)
    if len(points) <= MOST_MARKED:
        names = np.array([str(point["params"].get("criterion", "")) for point in points], dtype=object)
        for name in sorted(set(names)):
            colour, marker = styles.get(name) or styles.get(OTHERS) or (GREY, "o")
            own = names == name
            edges: dict[str, Any] = {"edgecolors": DARK, "linewidths": 1.2}
            axes.scatter(np.array(x)[own], np.array(y)[own], s=38, marker=marker, color=colour, zorder=4, **edges)
    look: dict[str, Any] = {
        "markersize": 6,
        "markerfacecolor": "white",
        "markeredgecolor": DARK,
        "markeredgewidth": 1.2,
    }
    joined = "-" if len(found.objectives) == 2 else "none"
    axes.plot([], [], marker="o", color=DARK, linestyle=joined, linewidth=1.4, label="front", **look)
    if found.knee is not None:
        _draw_knee(axes, found.points[found.knee], "knee" if len(points) > 1 else "best", across, up)


def _draw_knee(axes: Axes, knee: Mapping[str, Any], what: str, across: Objective, up: Objective) -> None:
    place = _value(knee, across), _value(knee, up)
    axes.scatter(*place, s=170, marker="o", facecolors="none", edgecolors=DARK, linewidths=1.6, zorder=6)
    # Towards the ideal nothing else is drawn; but the label stays inside the axes.
    right, above = (1 if objective.direction == "maximise" else -1 for objective in (across, up))
    axes.autoscale_view()
    to_axes = axes.transData + axes.transAxes.inverted()
    left_of_it, below_it = to_axes.transform(place)
    right = 1 if left_of_it < LABEL_WIDTH else -1 if left_of_it > 1 - LABEL_WIDTH else right
    above = 1 if below_it < LABEL_HEIGHT else -1 if below_it > 1 - LABEL_HEIGHT else above
    axes.annotate(
        f"{what} {str(knee['key'])[:12]}",
        place,
        xytext=(9 * right, 9 * above),
        textcoords="offset points",
        ha="left" if right > 0 else "right",
        va="bottom" if above > 0 else "top",
        color=DARK,
        bbox={"boxstyle": "square,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
        zorder=7,
    )


def _value(point: Mapping[str, Any], objective: Objective) -> float:
    return float(point.get(objective.column, "nan"))
