"""The parts that a page is made of: elements whose text cannot become code, the style, and the script for hovering."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element, tostring

FRACTIONS = ("accuracy", "sparsity")
"""Measures whose names end so lie in 0..1 and are shown in percent."""

# What a table becomes where it would be broader than the page: each row a paragraph, each cell after its name.
_CARDS = """  TABLE, TABLE tbody { display: block; width: auto; } TABLE thead { display: none; }
  TABLE tr { display: block; padding: .4rem 0; border-bottom: 1px solid var(--line); }
  TABLE td { display: inline-block; border: 0; padding: .1rem .9rem .1rem 0; max-width: 100%; }
  TABLE td:empty { display: none; }
  TABLE td::before { content: attr(data-name) " "; color: var(--soft); font-weight: 400; }
"""

STYLE = (
    """
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #5c6066; --line: #d5d8dc; --paper: #fff; --panel: #f5f6f7;
  --blue: #0072b2; --red: #d55e00; --green: #00795a; --pink: #b05a8c; --orange: #a86f00; --sky: #2f86b5; --cloud: .55; }
@media screen and (prefers-color-scheme: dark) { :root { --ink: #e9eaec; --soft: #a3a9b1; --line: #3c4249;
  --paper: #15181c; --panel: #1e2227; --blue: #56a8e0; --red: #f08a45; --green: #3cc49a; --pink: #e09cc4;
  --orange: #e6b13c; --sky: #8fd0f5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
p { max-width: 46rem; margin: .5rem 0; }
.note { color: var(--soft); font-size: .9rem; }
.lead { font-size: 1.08rem; }
nav { font-size: .9rem; margin: 1rem 0; }
nav a { margin-right: .9rem; display: inline-block; padding: .15rem 0; }
a { color: var(--blue); }
.wide { overflow-x: auto; margin: .75rem 0; }
.wide:focus-visible, [data-tip]:focus-visible { outline: 2px solid var(--blue); }
table { border-collapse: collapse; width: max-content; font-size: .85rem;
  font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .3rem .6rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top;
  max-width: min(26rem, 62vw); overflow-wrap: break-word; }
thead th { border-bottom: 2px solid var(--line); vertical-align: bottom; }
td.number { text-align: right; white-space: nowrap; }
tr.knee { background: var(--panel); font-weight: 600; }
table.heat td { text-align: center; min-width: 3.2rem; border: 1px solid var(--paper); white-space: nowrap; }
table.heat th { white-space: nowrap; max-width: none; }
table.heat th[scope=row] { position: sticky; left: 0; background: var(--paper); }
code, pre { font: .85em/1.45 ui-monospace, monospace; }
pre { background: var(--panel); padding: .75rem; overflow-x: auto; white-space: pre-wrap; }
figure { margin: .75rem 0; }
svg { display: block; width: 100%; height: auto; color: var(--ink); font: 12px system-ui, sans-serif; }
svg.scatter, svg.bars { min-width: 36rem; }
svg text { fill: currentColor; }
svg .axis { stroke: var(--line); fill: none; }
svg .faint { fill: var(--soft); }
svg .cloud { opacity: var(--cloud); }
svg .halo { stroke: var(--paper); stroke-width: 4px; paint-order: stroke; }
svg .trial { fill: none; stroke-width: 1.2; opacity: .4; }
svg .trial.front { stroke-width: 2.4; opacity: 1; }
svg .trial:hover { stroke-width: 4; opacity: 1; }
svg .trial.off { display: none; }
svg .range { fill: var(--soft); fill-opacity: .12; cursor: ns-resize; touch-action: pan-x; }
svg .chosen { fill: var(--blue); fill-opacity: .3; pointer-events: none; }
.s0 { --c: var(--blue); } .s1 { --c: var(--red); } .s2 { --c: var(--green); } .s3 { --c: var(--pink); }
.s4 { --c: var(--orange); } .s5 { --c: var(--sky); } .s6 { --c: var(--soft); }
.dot { fill: var(--c); stroke: var(--paper); stroke-width: .6; } .edge { fill: none; stroke: var(--c); }
.trial.s0, .trial.s1, .trial.s6 { stroke: var(--c); }
.bar { fill: var(--blue); } .rest { fill: var(--line); }
.met { color: var(--green); } .missing { color: var(--red); } .open { color: var(--orange); }
#tip { position: fixed; z-index: 9; pointer-events: none; max-width: min(24rem, 90vw); padding: .4rem .6rem;
  background: var(--ink); color: var(--paper); font: 13px/1.4 system-ui, sans-serif; border-radius: 4px;
  white-space: pre-line; }
@media screen and (max-width: 40rem) {
  body { padding: .6rem; } h1 { font-size: 1.35rem; }
  table.heat th[scope=row] { white-space: normal; max-width: 9rem; }
"""
    + _CARDS.replace("TABLE", "table:not(.heat)")
    + """}
@media print {
  body { max-width: none; font-size: 10pt; padding: 0; }
  nav, #tip { display: none; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .wide { overflow: visible; } table { font-size: 7pt; } th, td { padding: .12rem .25rem; }
  table { width: auto; } td, th { max-width: none; }
  table.heat td { min-width: 0; } svg { min-width: 0 !important; }
  table.heat th[scope=row] { position: static; }
  h2, h3, .note { break-after: avoid; } tr, figure, p { break-inside: avoid; }
  table:not(.cards) thead { display: table-header-group; }
"""
    + _CARDS.replace("TABLE", "table.cards")
    + "}\n"
)

SCRIPT = """
"use strict";
(() => {
  const tip = document.createElement("div");
  tip.id = "tip"; tip.hidden = true; tip.setAttribute("role", "status");
  document.body.append(tip);
  const show = (mark, x, y) => {
    tip.textContent = mark.dataset.tip;
    tip.hidden = false;
    tip.style.left = Math.max(4, Math.min(x + 14, innerWidth - tip.offsetWidth - 4)) + "px";
    tip.style.top = (y + 18 + tip.offsetHeight > innerHeight ? Math.max(4, y - tip.offsetHeight - 12) : y + 18) + "px";
  };
  const marked = (event) => event.target.closest ? event.target.closest("[data-tip]") : null;
  for (const kind of ["pointermove", "pointerdown"]) document.addEventListener(kind, (event) => {
    const mark = marked(event);
    if (mark) show(mark, event.clientX, event.clientY); else tip.hidden = true;
  });
  document.addEventListener("focusin", (event) => {
    const mark = marked(event);
    if (mark) { const box = mark.getBoundingClientRect(); show(mark, box.right, box.bottom); }
  });
  document.addEventListener("focusout", () => { tip.hidden = true; });
  addEventListener("scroll", () => { tip.hidden = true; }, true);
  for (const chart of document.querySelectorAll("svg.parallel")) {
    const lines = [...chart.querySelectorAll(".trial")].map(
      (line) => [line, line.dataset.at.split(" ").map(Number)]);
    const ranges = new Map();
    const said = chart.closest("figure").querySelector(".count");
    const filter = () => {
      let left = 0;
      for (const [line, at] of lines) {
        const kept = [...ranges].every(([axis, [low, high]]) => at[axis] >= low && at[axis] <= high);
        line.classList.toggle("off", !kept);
        left += kept;
      }
      if (said) said.textContent = ranges.size ? left + " of " + lines.length + " trials are shown." : "";
    };
    for (const strip of chart.querySelectorAll(".range")) {
      const axis = Number(strip.dataset.axis), chosen = strip.nextElementSibling;
      const top = Number(strip.getAttribute("y")), height = Number(strip.getAttribute("height"));
      const share = (event) => {
        const box = strip.getBoundingClientRect();
        return Math.max(0, Math.min(1, 1 - (event.clientY - box.top) / box.height));
      };
      let from = null;
      strip.addEventListener("pointerdown", (event) => {
        from = share(event);
        strip.setPointerCapture(event.pointerId);
      });
      strip.addEventListener("pointermove", (event) => {
        if (from === null) return;
        const to = share(event), low = Math.min(from, to), high = Math.max(from, to);
        const small = high - low < 0.02;
        if (small) ranges.delete(axis); else ranges.set(axis, [low, high]);
        chosen.setAttribute("y", top + (1 - high) * height);
        chosen.setAttribute("height", small ? 0 : (high - low) * height);
        filter();
      });
      for (const end of ["pointerup", "pointercancel"]) strip.addEventListener(end, () => { from = null; });
      strip.addEventListener("dblclick", () => { ranges.delete(axis); chosen.setAttribute("height", 0); filter(); });
    }
  }
})();
"""

Child = Element | str | None


def element(tag: str, /, *children: Child, **attributes: Any) -> Element:
    """An element; strings in it are text and never markup, None is passed over.

    Attributes are written with their underscores as hyphens, `class_` as `class`; one that is None is left out.
    """
    made = Element(tag)
    for name, value in attributes.items():
        if value is not None:
            made.set(name.rstrip("_").replace("_", "-"), f"{value:.6g}" if isinstance(value, float) else str(value))
    return extended(made, children)


def extended(parent: Element, children: Iterable[Child]) -> Element:
    """`parent` with more in it."""
    for child in children:
        if isinstance(child, str):
            if len(parent):
                parent[-1].tail = (parent[-1].tail or "") + child
            else:
                parent.text = (parent.text or "") + child
        elif child is not None:
            parent.append(child)
    return parent


def page(title: str, body: Sequence[Element]) -> str:
    """One whole HTML file that fetches nothing. Its policy lets a browser run this module's script alone."""
    allowed = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'; base-uri 'none'"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", STYLE),
    )
    whole = element("html", head, element("body", *body, element("script", SCRIPT)), lang="en")
    return "<!DOCTYPE html>\n" + tostring(whole, encoding="unicode", method="html") + "\n"


def section(name: str, title: str, *children: Child) -> Element:
    """A part of the page under its heading, which links go to by `name`."""
    return element("section", element("h2", title), *children, id=name)


def note(text: str) -> Element:
    """A remark in small print."""
    return element("p", text, class_="note")


def table(rows: Sequence[Mapping[str, Any]], *, knee: int | None = None, cards: bool = False) -> Element:
    """Rows under their names, in the order in which names first come; elements are taken as they are.

    Args:
        rows: by name.
        knee: the position of the row to mark.
        cards: on paper each row is a paragraph, as on a phone it always is: for tables that are broader than a page.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    body = element("tbody")
    for place, row in enumerate(rows):
        cells = (_cell(name, row.get(name, "")) for name in names)
        body.append(element("tr", *cells, class_="knee" if place == knee else None))
    head = element("thead", element("tr", *(element("th", _named(name), scope="col") for name in names)))
    return scrolled(element("table", head, body, class_="cards" if cards else None), "table")


def heat(corner: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[tuple[str, str, str]]]]) -> Element:
    """A table of coloured numbers.

    Args:
        corner: what the rows are.
        columns: their names.
        rows: a name, and for each column (text, background as "#rrggbb" or "", hover text).
    """
    body = element("tbody")
    for name, cells in rows:
        made = []
        for text, colour, tip in cells:
            look = f"background:{colour};color:{_readable(colour)}" if colour else None
            made.append(element("td", text, style=look, data_tip=tip))
        body.append(element("tr", element("th", name, scope="row"), *made))
    head = element("thead", element("tr", *(element("th", name, scope="col") for name in (corner, *columns))))
    return scrolled(element("table", head, body, class_="heat"), "heat map")


def scrolled(made: Element, what: str) -> Element:
    """Something that may be broader than a phone: it scrolls sideways, with the keyboard too."""
    return element("div", made, class_="wide", tabindex=0, role="region", aria_label=what)


def shown(name: str, value: Any) -> str:
    """A value of a measure or a parameter as people read it; fractions in percent."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ", ".join(_listed(each) for each in value) if isinstance(value, list | tuple) else str(value)
    if name.endswith(FRACTIONS):
        return f"{100 * value:.2f} %"
    if isinstance(value, int) or abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def mixed(low: str, high: str, share: float) -> str:
    """The colour between two, each "#rrggbb", at a share from 0 to 1."""
    ends = ([int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in (low, high))
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(*ends, strict=True))


def _cell(name: str, value: Any) -> Element:
    if isinstance(value, Element):
        return element("td", value, data_name=_named(name))
    number = isinstance(value, int | float) and not isinstance(value, bool)
    text = shown(name, value)
    return element("td", text, class_="number" if number or "±" in text else None, data_name=_named(name))


def _listed(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _named(name: str) -> str:
    return name.replace("_", " ")


def _readable(background: str) -> str:
    """Black or white, whichever stands out more (WCAG 2.1's luminance)."""
    shares = [int(background[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.179 else "#ffffff"
