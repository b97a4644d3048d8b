"""Tables in Markdown, and the comparisons of a ticket as their rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COMPARED = ("compared with", "test accuracy", "ticket leads by (points)", "claim")
SPEED = ("steps to best validation loss", "ticket is sooner by (steps)", "claim")


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def signed(found: Mapping[str, Any], digits: int = 1, sign: int = 1) -> str:
    """A difference with its 95 % interval."""
    width = "" if found["half_width"] is None else f" ± {found['half_width']:,.{digits}f}"
    return f"{sign * found['difference']:+,.{digits}f}{width}"


def compared(ticket: Mapping[str, Any]) -> list[list[str]]:
    """A row for the ticket and one for each control, with learning speed where it was measured."""
    speed = any("steps" in control for control in ticket["controls"].values())
    rows = [["(the ticket)", f"{100 * ticket['test_accuracy']:.2f} %", "", ""]]
    if speed:
        rows[0] += [f"{ticket['steps_to_best']:,.0f}", "", ""]
    for kind, control in ticket["controls"].items():
        row = [kind, f"{100 * control['test_accuracy']:.2f} %", signed(control), control["claim"]]
        if speed:
            steps = control["steps"]
            row += [f"{control['steps_to_best']:,.0f}", signed(steps, 0, -1), steps["claim"]]
        rows.append(row)
    return rows


def header(ticket: Mapping[str, Any]) -> tuple[str, ...]:
    speed = any("steps" in control for control in ticket["controls"].values())
    return COMPARED + (SPEED if speed else ())


def held(text: str, true: bool) -> str:
    """A line that says whether a landmark came out."""
    return f"- {'yes' if true else 'NO'}: {text}"
