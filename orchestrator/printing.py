"""How the command line prints what it found: tables, JSON, CSV."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from orchestrator.canonical import finite

if TYPE_CHECKING:
    from orchestrator.front import Front


class Format(StrEnum):
    """How results are printed."""

    table = "table"
    json = "json"
    csv = "csv"


def print_json(document: Any) -> None:
    """One document on stdout; what is not a number becomes null."""
    print(json.dumps(finite(document), indent=2, default=str, allow_nan=False))


def print_rows(rows: Sequence[Mapping[str, Any]], format: Format) -> None:
    """Rows as the format asks; the columns are all names that occur, in the order of their first row."""
    if format is Format.json:
        print_json(rows)
    elif format is Format.csv:
        writer = csv.DictWriter(sys.stdout, fieldnames=_names(rows), restval="")
        writer.writeheader()
        writer.writerows(rows)
    else:
        print_table(rows)


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Columns under their names, as wide as they must be; the same on a terminal and in a file."""
    names = _names(rows)
    cells = [names, *([cell(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(names))]
    for row in cells:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def front_rows(found: Front, *, whole: bool = False, also: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The front as rows, the dense model last; every objective and its test twin, then the size.

    Args:
        found: the front.
        whole: keys in full, and numbers alone; else means over several seeds have half their interval beside them.
        also: columns to show besides.
    """
    names = list(dict.fromkeys([*(objective.column for objective in found.objectives), *also]))
    shown = list(dict.fromkeys([n for name in names for n in (name, f"test_{name}")] + ["sparsity", "nonzero_params"]))
    length = None if whole else 12
    constant = _constant([point["params"] for point in found.points])
    rows = []
    for index, point in enumerate(found.points):
        params = ", ".join(_said(name, value) for name, value in point["params"].items() if name not in constant)
        knee = index == found.knee and len(found.points) > 1
        rows.append(
            ({"study": point["study"]} if "study" in point else {})
            | {"key": point["key"][:length], "trial": point["trial"], "round": point["round"], "n": point["n"]}
            | {name: point[name] if whole else _with_interval(point, name) for name in shown if name in point}
            | (point["params"] | {"knee": knee} if whole else {"params": params + (" <- knee" if knee else "")})
        )
    if found.dense is not None:
        rows.append(
            {"key": found.dense["key"][:length], "trial": "dense", "round": 0, "n": found.dense["n"]}
            | {n: found.dense[n] if whole else _with_interval(found.dense, n) for n in shown if n in found.dense}
            | ({} if whole else {"params": "the unpruned model"})
        )
    return rows


def hypervolume_line(found: Front) -> str:
    """The hypervolume of a front and what it is measured from; empty where it has none."""
    if found.hypervolume is None or not found.points:
        return ""
    reference = ", ".join(f"{name} {cell(value)}" for name, value in found.hypervolume["reference"].items())
    return f"hypervolume {found.hypervolume['value']:.6g}, from {reference}"


def _with_interval(point: Mapping[str, Any], name: str) -> Any:
    half_width = point["half_width"].get(name)
    return f"{cell(point[name])} ± {cell(half_width)}" if half_width else point[name]


def cell(value: Any) -> str:
    """A value as a table shows it."""
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)


def _constant(params: Sequence[Mapping[str, Any]]) -> set[str]:
    """Names of parameters with one value for all: they tell no row from another."""
    names = {name for row in params for name in row}
    return {name for name in names if len(params) > 1 and len({repr(row.get(name)) for row in params}) == 1}


def _said(name: str, value: Any) -> str:
    """A parameter in few words: a name speaks for itself, a number needs its own."""
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    return shown if isinstance(value, str) else f"{name}={shown}"


def _names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))
