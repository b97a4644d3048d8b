"""The account in words and as a table, for people: what matters most comes first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan
from typing import Any

MOST_NAMED = 12
"""Groups that one sentence names."""

MOST_DISAGREEMENTS = 10
"""Examples that are shown of those on which dense and pruned differ."""


def leads(account: Mapping[str, Any]) -> list[str]:
    """The account in a few sentences: first what the mean shows beside what it hides."""
    chosen, rows = account["chosen"], of_chosen(account)
    some = [row for row in rows if row["support"]]
    worst = min(
        [row for row in some if row["verdict"] != "too few"] or some, key=lambda row: (row["change"], row["group"])
    )
    mean = chosen["pruned"] - chosen["dense"]
    said = [
        f"At {chosen['sparsity']:.1%} sparse the mean accuracy {_moves(mean)} ({chosen['dense']:.1%} to "
        f"{chosen['pruned']:.1%}), and {_kind(worst)} {worst['group']!r} {_moves(worst['change'])} "
        f"({worst['dense']:.1%} to {worst['pruned']:.1%}). "
        f"{account['split'].capitalize()} split, {account['examples']:,} examples."
    ]
    said += _by_verdict(rows)
    if len(chosen["keys"]) > 1:
        said.append(_over_seeds(account))
    if account["minority"] is not None:
        said.append(_minority(account["minority"]))
    said.append(_disagreements(account))
    return [*said, *(f"Note: {note}." for note in account["notes"])]


def of_chosen(account: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows of the model that is looked at, the group that loses most first, those without examples last."""
    rows = [row for row in account["rows"] if row["key"] == account["chosen"]["key"]]
    return sorted(rows, key=lambda row: (not row["support"], row["change"], row["group"]))


def table(account: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the model that is looked at as a person reads them; shares in percent, changes in points."""
    several = len(account["chosen"]["keys"]) > 1
    across = {row["group"]: row for row in account["across_seeds"]}
    return [
        {
            "group": row["group"],
            "support": row["support"],
            "dense %": _percent(row["dense"]),
            "pruned %": _percent(row["pruned"]),
            "change": _points(row["change"]),
            "95 % interval": f"{_points(row['low'])} to {_points(row['high'])}" if row["support"] else "-",
            "verdict": row["verdict"],
            **({"over seeds": _spread(across.get(row["group"]))} if several else {}),
        }
        for row in of_chosen(account)
    ]


def disagreement_rows(account: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The first of the examples on which dense and pruned differ, without what is the same for all."""
    shown = account["disagreements"][:MOST_DISAGREEMENTS]
    several = len(account["chosen"]["keys"]) > 1
    hidden = {"modal"} if several else {"modal", "seeds"}
    return [{name: value for name, value in row.items() if name not in hidden} for row in shown]


def model_rows(model: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The coefficients of the class-accuracy model."""
    return [
        {
            "term": term["name"],
            "coefficient": f"{term['coefficient']:+.3g}",
            "95 % interval": "-" if term["error"] is None else f"{term['low']:+.3g} to {term['high']:+.3g}",
        }
        for term in model["terms"]
    ]


def _by_verdict(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    found = []
    by = {verdict: [row for row in rows if row["verdict"] == verdict] for verdict in {row["verdict"] for row in rows}}
    lost = by.get("lost by pruning", [])
    tests = f"exact McNemar, Holm over {sum(row['support'] > 0 for row in rows)}"
    if lost:
        found.append(f"Lost by pruning: {_named(lost)} ({tests}).")
    else:
        found.append(f"Of no group is it shown that pruning lost it ({tests}).")
    for verdict, word in (("gained", "Gained"), ("never learnt", "Never learnt, by the dense model neither")):
        if by.get(verdict):
            found.append(f"{word}: {_named(by[verdict])}.")
    if by.get("too few"):
        few = [f"{row['group']} ({row['support']})" for row in by["too few"]]
        found.append(f"Too few examples to tell: {_listed(few)}.")
    return found


def _over_seeds(account: Mapping[str, Any]) -> str:
    across, n = account["across_seeds"], len(account["chosen"]["keys"])
    lost = [row for row in across if row["verdict"] == "lost by pruning"]
    if any(row["verdict"] == "too few seeds" for row in across):
        return f"{n} seeds are too few to say what holds over seeds."
    if not lost:
        return f"Over {n} seeds no group is shown to lose."
    named = [f"{row['group']} {_spread(row)}" for row in sorted(lost, key=lambda row: row["mean"])]
    return f"Over {n} seeds these lose: {_listed(named)} points."


def _minority(found: Mapping[str, Any]) -> str:
    difference = found["difference"]
    spread = "" if difference["half_width"] is None else f" ± {100 * difference['half_width']:.1f}"
    figures = (
        f"the rare classes ({_listed(found['classes'])}) change by {_mean(found['change'], found['std'])}, the others "
        f"by {_mean(found['change_of_others'], found['std_of_others'])} points: a difference of "
        f"{_points(difference['mean'])}{spread}"
    )
    if found["claim"] == "too few seeds":
        return f"{difference['n']} seeds are too few to say whether rare classes pay: {figures}."
    if found["claim"] == "no evidence":
        return f"No evidence that rare classes pay more than classes differ: {figures} over {difference['n']} seeds."
    return f"{found['claim'].capitalize()}: {figures} over {difference['n']} seeds."


def _disagreements(account: Mapping[str, Any]) -> str:
    count = len(account["disagreements"])
    return f"Dense and pruned answer differently on {count:,} of {account['examples']:,} examples."


def _kind(row: Mapping[str, Any]) -> str:
    return "class" if row["of"] == "class" else "group"


def _moves(change: float) -> str:
    if round(100 * change, 1) == 0:
        return "stays as it is"
    return f"{'falls' if change < 0 else 'rises'} by {abs(100 * change):.1f} points"


def _named(rows: Sequence[Mapping[str, Any]]) -> str:
    return _listed(
        [
            f"{row['group']} {_points(row['change'])} ({_points(row['low'])} to {_points(row['high'])}, "
            f"p = {row['p_holm']:.2g})"
            for row in rows
        ]
    )


def _listed(parts: Sequence[str]) -> str:
    more = len(parts) - MOST_NAMED
    return ", ".join(parts[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _spread(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    return _points(row["mean"]) + ("" if row["half_width"] is None else f" ± {100 * row['half_width']:.1f}")


def _mean(change: float, std: float | None) -> str:
    return _points(change) + ("" if std is None else f" (sd {100 * std:.1f})")


def _points(share: float) -> str:
    return "-" if isnan(share) else f"{100 * share:+.1f}"


def _percent(share: float) -> str:
    return "-" if isnan(share) else f"{100 * share:.1f}"
