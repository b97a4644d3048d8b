"""Charts as inline SVG: every mark says what it is when pointed at, and shapes say what colours say."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree.ElementTree import Element

from orchestrator.report.page import FRACTIONS, element, extended, shown

WIDTH, HEIGHT = 720, 430
LEFT, RIGHT, TOP, BOTTOM = 76, 18, 14, 52
SHAPES = ("circle", "triangle", "square", "diamond", "wedge", "plus")
"""As many as there are colours in the page's style."""
SPARSITY_TICKS = (0, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)
MOST_SPARSE = 1 - 1e-6
MOST_OUTSIDE = 0.1
"""At most this share of the points, those far worse than the front, stands at the edge."""
MOST_CATEGORIES = 12
"""So many values of a parameter that is no number have a place of their own."""
_GOLDEN = 0.618034


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One point: where, what it says, which of the styles it has (-1: none of them) and whether it is of the front."""

    x: float
    y: float
    tip: str
    style: int = 0
    front: bool = False


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A measure along one side, and whether more of it is better."""

    name: str
    label: str
    maximise: bool


@dataclass(frozen=True, kw_only=True)
class Scale:
    """From a value to a place between 0 and 1, and the ticks on the way."""

    place: Callable[[float], float]
    ticks: Sequence[float]


def scatter(
    marks: Sequence[Mark], across: Axis, up: Axis, *, dense: Mark | None, knee: Mark | None, joined: bool, says: str
) -> tuple[Element, int]:
    """Points in two measures, with the dense model as a star and lines through it, and the knee ringed.

    Args:
        marks: one or more points.
        across: what x is.
        up: what y is.
        dense: the dense model.
        knee: one of the marks.
        joined: draw the front as a line, which has a meaning in two objectives only.
        says: the picture in one sentence, for those who do not see it.

    Returns:
        The chart, and how many points, far worse than the front, stand at its edge.
    """
    sure = [mark for mark in marks if mark.front] + ([dense] if dense is not None else [])
    xs, x_cut = _limits([m.x for m in marks], [m.x for m in sure], across.maximise)
    ys, y_cut = _limits([m.y for m in marks], [m.y for m in sure], up.maximise)
    x_scale, y_scale = scale(across.name, *xs), scale(up.name, *ys)

    def at(mark: Mark) -> tuple[float, float]:
        x, y = (min(1.0, max(0.0, s.place(v))) for s, v in ((x_scale, mark.x), (y_scale, mark.y)))
        return LEFT + x * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - y * (HEIGHT - TOP - BOTTOM)

    chart = element("svg", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=says, class_="scatter")
    _frame(chart, across, up, x_scale, y_scale)
    if dense is not None:
        x, y = at(dense)
        dashes: dict[str, Any] = {"class_": "axis", "stroke_dasharray": "3 4"}
        chart.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, **dashes))
        chart.append(element("line", x1=x, x2=x, y1=TOP, y2=HEIGHT - BOTTOM, **dashes))
    outside = [m for m in marks if (x_cut is not None and x_cut(m.x)) or (y_cut is not None and y_cut(m.y))]
    beyond = set(map(id, outside))
    cloud, front = element("g", class_="cloud"), element("g")
    for mark in marks:
        if not mark.front:
            cloud.append(_dot(at(mark), mark, 3.2, hollow=id(mark) in beyond))
    fronts = sorted((mark for mark in marks if mark.front), key=lambda mark: mark.x)
    if joined and len(fronts) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, fronts))
        front.append(element("polyline", points=path, fill="none", stroke="currentColor", stroke_width=1.3))
    for mark in fronts:
        dot = _dot(at(mark), mark, 5.5)
        dot.set("tabindex", "0")
        front.append(dot)
    chart.extend((cloud, front))
    if knee is not None:
        x, y = at(knee)
        chart.append(element("circle", cx=x, cy=y, r=10, fill="none", stroke="currentColor", stroke_width=1.8))
        chart.append(_label("knee", x, y, -14))
    if dense is not None:
        x, y = at(dense)
        star = element("path", d=_star(x, y, 9), fill="currentColor", data_tip=dense.tip, tabindex=0)
        chart.extend((star, _label("dense", x, y, 22)))
    return chart, len(outside)


def legend(names: Sequence[str]) -> Element:
    """What the colours and shapes of a scatter mean."""
    made = element("p", class_="note")
    for style, name in enumerate(names):
        key = element("svg", viewBox="0 0 14 14", style="display:inline;width:.9em;height:.9em", aria_hidden="true")
        key.append(_dot((7, 7), Mark(x=0, y=0, tip="", style=style), 5.5))
        extended(made, (key, f" {name}   "))
    return made


def parallel(
    columns: Sequence[tuple[str, Sequence[Any]]], styles: Sequence[int], fronts: Sequence[bool], tips: Sequence[str]
) -> Element:
    """One line for each trial through its value on every axis; a drag along an axis leaves the trials in that range.

    Args:
        columns: name and values of each axis; None where a trial has no value, which stands at the foot of the axis.
        styles: each trial's colour.
        fronts: whether it is on the front; those are drawn last and thick.
        tips: what it says.
    """
    height, top, bottom, side = 350, 46, 24, 70
    step = max(110.0, 860 / max(1, len(columns) - 1))
    width = 2 * side + step * (len(columns) - 1)
    look = f"min-width:{max(640, round(width * 0.75))}px"
    label = "one line for each trial through its parameters and objectives"
    chart = element(
        "svg", viewBox=f"0 0 {width:.0f} {height}", class_="parallel", role="img", aria_label=label, style=look
    )
    span = height - top - bottom
    places, strips = [], element("g")
    for number, (name, values) in enumerate(columns):
        x = side + step * number
        where, ticks = _along(name, values)
        places.append(where)
        strips.append(element("line", x1=x, x2=x, y1=top, y2=top + span, class_="axis"))
        title = element("text", name.replace("_", " "), x=x, y=18 + 14 * (number % 2), text_anchor="middle")
        title.set("font-weight", "600")
        strips.append(title)
        for place, text in ticks:
            y = top + (1 - place) * span + 4
            strips.append(element("text", text[:18], x=x + 6, y=y, class_="halo faint"))
        strips.append(element("rect", x=x - 14, y=top, width=28, height=span, class_="range", data_axis=number))
        strips.append(element("rect", x=x - 5, y=top, width=10, height=0, class_="chosen"))
    lines = element("g")
    for trial in sorted(range(len(styles)), key=lambda trial: fronts[trial]):
        shift = ((trial + 1) * _GOLDEN % 1 - 0.5) * 0.03  # so that equal choices do not cover each other
        ats = [where[trial] for where in places]
        points = " ".join(
            f"{side + step * number:.0f},{top + (1 - at - shift * categorical) * span:.1f}"
            for number, (at, categorical) in enumerate(ats)
        )
        kind = f"trial s{styles[trial]}" + (" front" if fronts[trial] else "")
        at_each = " ".join(f"{at:.3f}" for at, _ in ats)
        lines.append(element("polyline", points=points, class_=kind, data_tip=tips[trial], data_at=at_each))
    chart.extend((lines, strips))
    return chart


def bars(rows: Sequence[tuple[str, float, str]]) -> Element:
    """Horizontal bars: name, share of the whole width from 0 to 1, and the number as text."""
    height = 26 * len(rows) + 6
    says = "; ".join(f"{name}: {text}" for name, _, text in rows)
    chart = element("svg", viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=says, class_="bars")
    for number, (name, share, text) in enumerate(rows):
        y, length = 4 + 26 * number, max(1.0, share * 400)
        chart.append(element("text", name[:24], x=170, y=y + 14, text_anchor="end"))
        chart.append(element("rect", x=180, y=y, width=400, height=19, class_="rest", opacity=0.35))
        chart.append(element("rect", x=180, y=y, width=length, height=19, class_="bar", data_tip=f"{name}: {text}"))
        chart.append(element("text", text, x=588, y=y + 14))
    return chart


def scale(name: str, low: float, high: float) -> Scale:
    """Sparsity by what is left of the weights, sizes over more than one power of ten by ratio, the rest evenly."""
    if name.endswith("sparsity") and low >= 0 and high <= 1:
        return _spaced(lambda v: -math.log2(1 - min(v, MOST_SPARSE)), low, high, SPARSITY_TICKS)
    if low > 0 and high / low > 10:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        return _spaced(math.log10, low, high, [m * 10.0**p for p in powers for m in (1, 3)])
    return _spaced(float, low, high, _round_numbers(low, high))


def _spaced(bent: Callable[[float], float], low: float, high: float, ticks: Sequence[float]) -> Scale:
    start, end = bent(low), bent(high)
    if end <= start:
        return Scale(place=lambda value: 0.5, ticks=[low])
    margin = 0.04 * (end - start)
    start, end = start - margin, end + margin

    def place(value: float) -> float:
        return (bent(value) - start) / (end - start)

    chosen: list[float] = []
    for tick in ticks:
        if bent(low) - margin <= bent(tick) <= bent(high) + margin and (
            not chosen or place(tick) - place(chosen[-1]) > 0.055
        ):
            chosen.append(tick)
    return Scale(place=place, ticks=chosen)


def _round_numbers(low: float, high: float) -> list[float]:
    if high <= low:
        return [low]
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(n * step, 12) for n in range(first, last + 1)]


def _limits(
    values: Sequence[float], sure: Sequence[float], maximise: bool
) -> tuple[tuple[float, float], Callable[[float], bool] | None]:
    """The range of an axis, and which values it cuts off; it holds all of `sure` and all but the worst of `values`."""
    ordered = sorted([*values, *sure], reverse=maximise)
    last = ordered[math.ceil(len(ordered) * (1 - MOST_OUTSIDE)) - 1]
    good = [*sure, *(v for v in ordered if (v >= last if maximise else v <= last))]
    low, high = min(good), max(good)
    whole_low, whole_high = min(ordered), max(ordered)
    if whole_high - whole_low <= 2 * (high - low) or high == low:
        return (whole_low, whole_high), None
    return (low, high), (lambda value: value < low) if maximise else (lambda value: value > high)


def _along(name: str, values: Sequence[Any]) -> tuple[list[tuple[float, bool]], list[tuple[float, str]]]:
    """The place of each value on an axis and whether it may be shifted aside; and (place, text) of the ticks."""
    known = [value for value in values if value is not None]
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in known)
    if numbers and known:
        low, high, few = float(min(known)), float(max(known)), sorted(set(known))
        counts = len(few) <= MOST_CATEGORIES and all(isinstance(v, int) for v in few)
        found = _spaced(float, low, high, few) if counts else scale(name, low, high)
        ticks = [(found.place(tick), _tick(name, tick)) for tick in found.ticks]
        return [(0.0 if v is None else found.place(float(v)), len(few) <= MOST_CATEGORIES) for v in values], ticks
    order = sorted({str(value) for value in known})
    own = order[:MOST_CATEGORIES]
    names = own + (["others"] if len(order) > len(own) else [])
    places = {value: (number + 0.5) / len(names) for number, value in enumerate(names)}
    there = [0.0 if v is None else places.get(str(v), places.get("others", 0.0)) for v in values]
    return [(place, True) for place in there], [(place, value) for value, place in places.items()]


def _frame(chart: Element, across: Axis, up: Axis, x_scale: Scale, y_scale: Scale) -> None:
    right, low = WIDTH - RIGHT, HEIGHT - BOTTOM
    for tick in x_scale.ticks:
        x = LEFT + x_scale.place(tick) * (right - LEFT)
        chart.append(element("line", x1=x, x2=x, y1=TOP, y2=low, class_="axis", opacity=0.5))
        chart.append(element("text", _tick(across.name, tick), x=x, y=low + 18, text_anchor="middle", class_="faint"))
    for tick in y_scale.ticks:
        y = low - y_scale.place(tick) * (low - TOP)
        chart.append(element("line", x1=LEFT, x2=right, y1=y, y2=y, class_="axis", opacity=0.5))
        chart.append(element("text", _tick(up.name, tick), x=LEFT - 8, y=y + 4, text_anchor="end", class_="faint"))
    chart.append(element("path", d=f"M{LEFT} {TOP}V{low}H{right}", class_="axis"))
    chart.append(element("text", across.label, x=(LEFT + right) / 2, y=HEIGHT - 10, text_anchor="middle"))
    middle = (TOP + low) / 2
    turned = element("text", up.label, x=16, y=middle, text_anchor="middle", transform=f"rotate(-90 16 {middle:.0f})")
    chart.append(turned)


def _tick(name: str, value: float) -> str:
    if name.endswith(FRACTIONS):
        return f"{100 * value:.4g} %"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return shown(name, round(value, 10))


def _label(text: str, x: float, y: float, below: float) -> Element:
    side = "end" if x > WIDTH - 90 else "start" if x < LEFT + 40 else "middle"
    inside = min(HEIGHT - BOTTOM - 6, y + below) if y + below > TOP + 12 else y + 26
    return element("text", text, x=x, y=inside, text_anchor=side, class_="halo", font_weight=600)


def _dot(at: tuple[float, float], mark: Mark, size: float, *, hollow: bool = False) -> Element:
    x, y = at
    style = mark.style % (len(SHAPES) + 1)
    shape = SHAPES[style] if style < len(SHAPES) else "circle"
    look = f"{'edge' if hollow else 'dot'} s{style}"
    tip = mark.tip or None
    if shape == "circle":
        return element("circle", cx=round(x, 1), cy=round(y, 1), r=size, class_=look, data_tip=tip)
    return element("path", d=_outline(shape, x, y, size * 1.15), class_=look, data_tip=tip)


def _outline(shape: str, x: float, y: float, s: float) -> str:
    corners = {
        "triangle": ((0, -1), (1, 0.8), (-1, 0.8)),
        "square": ((-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)),
        "diamond": ((0, -1.1), (1.1, 0), (0, 1.1), (-1.1, 0)),
        "wedge": ((0, 1), (1, -0.8), (-1, -0.8)),
        "plus": (
            *((-0.35, -1), (0.35, -1), (0.35, -0.35), (1, -0.35), (1, 0.35), (0.35, 0.35)),
            *((0.35, 1), (-0.35, 1), (-0.35, 0.35), (-1, 0.35), (-1, -0.35), (-0.35, -0.35)),
        ),
    }[shape]
    return "M" + "L".join(f"{x + s * dx:.1f} {y + s * dy:.1f}" for dx, dy in corners) + "Z"


def _star(x: float, y: float, size: float) -> str:
    turns = [(size if n % 2 == 0 else size * 0.42, math.pi * (n / 5 - 0.5)) for n in range(10)]
    return "M" + "L".join(f"{x + r * math.cos(a):.1f} {y + r * math.sin(a):.1f}" for r, a in turns) + "Z"
