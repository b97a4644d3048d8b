"""A lineage as a picture: down at each pruning, up again by retraining, over what is left of the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element, tostring

from orchestrator.report.page import element

HEIGHT, TOP, BOTTOM, LEFT, RIGHT = 320, 34, 70, 64, 20
STEP, NARROWEST = 78, 6
WIDEST = 1400

Place = tuple[float, float]


def picture(history: Mapping[str, Any], title: str) -> bytes:
    """The prunings of `export.lineage.prunings` as an SVG file that stands alone."""
    drawn = drawing(history, title)
    drawn.set("xmlns", "http://www.w3.org/2000/svg")
    drawn.set("style", "background:#fff;color:#1d2733")
    drawn.set("font-family", "sans-serif")
    return bytes(tostring(drawn, encoding="utf-8")) + b"\n"


def drawing(history: Mapping[str, Any], title: str) -> Element:
    """The prunings as an SVG element: one line through before, pruned and retrained, as far as they were measured, and
    a bar for what each pruning left. Without anything measured it says so."""
    prunings: Sequence[Mapping[str, Any]] = history["prunings"]
    step = max(NARROWEST, min(STEP, (WIDEST - LEFT - RIGHT) / max(1, len(prunings))))
    width = max(560, LEFT + RIGHT + step * (len(prunings) + 0.5))
    drawn = element("svg", viewBox=f"0 0 {width:.0f} {HEIGHT}", role="img", aria_label=title, font_size=12)
    drawn.append(element("title", title))
    drawn.append(element("text", title, x=LEFT, y=18, font_weight="600", fill="currentColor"))
    values = [one[name] for one in prunings for name in ("before", "pruned", "retrained") if one[name] is not None]
    if not values:
        drawn.append(element("text", "nothing on the way was measured", x=LEFT, y=HEIGHT / 2, fill="currentColor"))
        return drawn
    low, high = min(values), max(values)
    span = (high - low) or 1.0

    def height(value: float) -> float:
        return float(HEIGHT - BOTTOM - (value - low) / span * (HEIGHT - TOP - BOTTOM - 16))

    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        value = low + share * span
        y = height(value)
        drawn.append(element("line", x1=LEFT, x2=width - RIGHT, y1=y, y2=y, stroke="currentColor", opacity=0.12))
        drawn.append(element("text", f"{value:.3f}", x=LEFT - 8, y=y + 4, text_anchor="end", fill="currentColor"))
    places: list[Place] = []
    for number, one in enumerate(prunings):
        x = LEFT + step * (number + 0.5)
        _bar(drawn, one, x, step)
        own = [
            (x + step * offset, one[name]) for offset, name in ((-0.3, "before"), (0.0, "pruned"), (0.3, "retrained"))
        ]
        for (at, value), colour in zip(own, ("#1d2733", "#c0392b", "#1e7d4f"), strict=True):
            if value is not None:
                places.append((at, height(value)))
                drawn.append(element("circle", cx=at, cy=height(value), r=min(3.5, step / 5), fill=colour))
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    drawn.append(element("polyline", points=path, fill="none", stroke="currentColor", stroke_width=1.2, opacity=0.6))
    told = (
        f"{history['metric']} ({history['split']}): before (black), pruned (red), retrained (green); bars: weights left"
    )
    drawn.append(element("text", told, x=LEFT, y=HEIGHT - 8, fill="currentColor", font_size=11))
    return drawn


def _bar(drawn: Element, one: Mapping[str, Any], x: float, step: float) -> None:
    """What the pruning left of the weights, below the line, with its sparsity in words where there is room."""
    if one["sparsity"] is None:
        return
    left = 1 - one["sparsity"]
    tall = 24 * left
    base = HEIGHT - BOTTOM + 34
    drawn.append(
        element("rect", x=x - step * 0.3, y=base - tall, width=step * 0.6, height=tall, fill="#4a78a8", opacity=0.7)
    )
    if step > STEP / 2:
        label = f"{one['sparsity']:.1%}"
        drawn.append(element("text", label, x=x, y=base + 13, text_anchor="middle", fill="currentColor", font_size=10))
