"""One HTML file that shows a study and needs nothing else: what it found, what that cost, and what it does not say."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree.ElementTree import Element

import numpy as np

from orchestrator import __version__, history
from orchestrator.errors import InputError, QueryError
from orchestrator.front import Front, read_points
from orchestrator.objectives import Objective
from orchestrator.outcome import MEASURES
from orchestrator.report.charts import Axis, Mark, bars, legend, parallel, scatter
from orchestrator.report.checklist import Facts, Item, State, checklist
from orchestrator.report.importance import METHOD, importances
from orchestrator.report.lineage import drawing
from orchestrator.report.page import FRACTIONS, element, heat, mixed, note, page, scrolled, section, shown, table
from orchestrator.settings import Choices
from orchestrator.tasks import BUILTIN

if TYPE_CHECKING:
    from orchestrator.study import Study

SHORT = 12
"""Characters of a key that are shown; `fetch` takes them."""
MOST_POINTS = 6000
"""More points than these are thinned evenly; those of the front all stay."""
MOST_ROWS = 200
MOST_HEAT_ROWS = 24
MOST_AXES = 12
MOST_STYLES = 6
MOST_FAILURES = 10
MOST_LINEAGES = 12
"""So many models of the front have their files' headers read."""

WHITE, BLUE, RED = "#f4f4f4", "#0b4f86", "#b34700"


def write_report(study: Study, path: str | Path) -> Path:
    """Write the report of a study as one HTML file, which opens offline; one that is there is replaced.

    Nothing of the user's code is imported, so classes go by their numbers.

    Args:
        study: an opened study.
        path: the file to write.

    Raises:
        InputError: the file cannot be written.
        QueryError: there is no such study.
    """
    made, path = report(study), Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(made, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise InputError(f"the report {path} cannot be written: {error.strerror}") from error
    return path


def report(study: Study) -> str:
    """The report of a study as HTML; see `write_report`."""
    record = _Record(study)
    parts = [
        _front(record),
        _chosen(record),
        _search(record),
        _importances(record),
        _layers(record),
        _classes(record),
        _tickets(record),
        _sharing(record),
        _lineage(record),
        _checklist(record),
        _provenance(record),
    ]
    sections = [part for part in parts if part is not None]
    links = (element("a", part.findtext("h2") or "", href=f"#{part.get('id')}") for part in sections)
    return page(f"{study.spec.name}: report", [_head(record), element("nav", *links), *sections])


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """A trial that is done: its parameters, and its objectives' values."""

    number: int
    params: Mapping[str, Any]
    values: tuple[float, ...]


class _Record:
    """What is read of a study, each thing once."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.spec = study.spec
        self.noted = study.noted()
        self.status = study.status()
        self.found: Front = study.front()
        self.objectives: tuple[Objective, ...] = self.found.objectives
        self.outcomes = study.store.outcomes(study.spec.name)

    @cached_property
    def trials(self) -> list[_Trial]:
        """Every trial that is done, from the proposals and endings: a state that two share stands under one only."""
        past = history.read(self.study.store, self.spec.name)
        return [
            _Trial(number=number, params=past.proposals[number][0], values=ending.values)
            for number, ending in sorted(past.endings.items())
            if ending.state == "done" and ending.values is not None and number in past.proposals
        ]

    @cached_property
    def knee(self) -> dict[str, Any] | None:
        return None if self.found.knee is None else self.found.points[self.found.knee]

    @cached_property
    def split(self) -> str:
        """What is put before the name of a measure to have it on the split that results are reported on."""
        return "test_" if any("test_class_accuracy" in point for point in self.found.points) else ""

    def lineage(self, key: str) -> list[dict[str, Any]] | None:
        """The stages behind a state, first to last; None where its file is gone."""
        header = self.study.store.states.header(key)
        return None if header is None else json.loads(header.get("lineage", "[]"))

    def point_name(self, point: Mapping[str, Any]) -> str:
        return f"{str(point['key'])[:SHORT]} ({shown('sparsity', point.get('sparsity'))} sparse)"

    def spread(self) -> list[Mapping[str, Any]]:
        """Points of the front, at most so many as a heat map shows, evenly from all; the knee is among them."""
        points = self.found.points
        if len(points) <= MOST_HEAT_ROWS:
            return list(points)
        places = {round(place) for place in np.linspace(0, len(points) - 1, MOST_HEAT_ROWS)}
        places |= {self.found.knee} if self.found.knee is not None else set()
        return [points[place] for place in sorted(places)]


def _head(record: _Record) -> Element:
    trials, found = record.status["trials"], record.found
    asked = f"{trials['done']:,} of {trials['asked']:,} trials are done"
    others = {"running": "running", "failed": "failed", "stopped": "stopped early"}
    more = "".join(f", {trials[name]:,} {said}" for name, said in others.items() if trials[name])
    points = "1 model" if len(found.points) == 1 else f"{len(found.points):,} models"
    lines: list[Element] = [element("p", f"The study is {record.status['state']}: {asked}{more}. ", class_="note")]
    if record.knee is not None:
        lines.append(element("p", _knee_in_words(record, record.knee), class_="lead"))
        command = f"orchardist fetch {record.spec.name} {str(record.knee['key'])[:SHORT]} -o {record.spec.name}-pruned"
        names = " and ".join(objective.name.replace("_", " ") for objective in record.objectives)
        said = f"is {points}" if len(found.points) == 1 else f"are {points}"
        text = f"The front {said} that no other beats in {names} at once. Its knee is taken home by "
        lines.append(element("p", text, element("code", command), "."))
    elif record.spec.constraints:
        bounds = ", ".join(f"{name} {bound}" for name, bound in record.spec.constraints.items())
        lines.append(element("p", f"No point keeps the study's constraints ({bounds}).", class_="lead"))
    else:
        lines.append(element("p", "Nothing is measured under every seed yet.", class_="lead"))
    return element("header", element("h1", record.spec.name), *lines)


def _knee_in_words(record: _Record, knee: Mapping[str, Any]) -> str:
    dense = record.found.dense or {}
    said = []
    for objective in record.objectives:
        name = objective.column
        for column in (name, f"test_{name}"):
            if column in knee:
                width = knee["half_width"].get(column)
                spread = "" if not width else f" ± {shown(column, width)}"
                before = f" (dense {shown(column, dense[column])})" if column in dense else ""
                said.append(f"{_label(column)} {shown(column, knee[column])}{spread}{before}")
    over = f", means over {knee['n']} seeds with 95 % intervals" if knee["n"] > 1 else ", one seed"
    worst = _worst_class(record, knee)
    return f"At the knee: {'; '.join(said)}{over}. {worst}".strip()


def _worst_class(record: _Record, point: Mapping[str, Any]) -> str:
    changes = _changes(record, point)
    if not changes:
        return ""
    worst = min(range(len(changes)), key=lambda place: changes[place])
    if changes[worst] >= 0:
        return "No class loses accuracy on average over the seeds."
    name = f"{record.split}accuracy"
    mean = (
        f" while the mean moves by {100 * (point[name] - record.found.dense[name]):+.1f}"
        if record.found.dense and name in point and name in record.found.dense
        else ""
    )
    return f"Class {worst} loses most: {100 * changes[worst]:+.1f} points on {_split(record)}{mean}."


def _front(record: _Record) -> Element | None:
    if not len(record.found.points):
        return None
    objectives, found = record.objectives, record.found
    across, up = _first_two(objectives)
    pairs = [(across, up)] + [(more, up) for more in objectives[2:]]
    columns = list(dict.fromkeys(o.column for pair in pairs for o in pair))
    points = read_points(record.outcomes, columns, len(record.spec.seeds))
    told = record.outcomes.table(["key", "params"])
    keys, params = (told[name].to_pylist() for name in ("key", "params"))
    firsts = [int(np.atleast_1d(rows)[0]) for rows in points.rows]
    every = max(1, math.ceil(len(firsts) / MOST_POINTS))
    on_front = {key for point in found.points for key in point["keys"]}
    places = [n for n in range(len(firsts)) if n % every == 0 or keys[firsts[n]] in on_front]
    mixes = {n: json.loads(params[firsts[n]] or "{}") for n in places}
    counted = Counter(str(mix["criterion"]) for mix in mixes.values() if "criterion" in mix)
    criteria = [name for name, _ in counted.most_common(MOST_STYLES)]
    several = len(counted) > 1
    figures: list[Element] = []
    for x, y in pairs:
        marks, knee = [], None
        for n in places:
            key, at = keys[firsts[n]], (points.columns[x.column][n], points.columns[y.column][n])
            if not all(map(math.isfinite, at)):
                continue
            name = str(mixes[n].get("criterion"))
            style = 0 if not several else criteria.index(name) if name in criteria else MOST_STYLES
            where = f"trial {points.trials[n]}, round {points.rounds[n]} · {key[:SHORT]}"
            values = "\n".join(f"{_label(c)}: {shown(c, float(points.columns[c][n]))}" for c in columns)
            chosen = ", ".join(f"{p} {shown(p, v)}" for p, v in mixes[n].items())
            tip = f"{where}\n{values}\n{chosen}"
            mark = Mark(x=float(at[0]), y=float(at[1]), tip=tip, style=style, front=key in on_front)
            marks.append(mark)
            if record.knee is not None and key in record.knee["keys"]:
                knee = mark
        if not marks:
            continue
        chart, outside = scatter(
            marks,
            _axis(x),
            _axis(y),
            dense=_dense_mark(record, x.column, y.column),
            knee=knee if len(found.points) > 1 else None,
            joined=len(objectives) == 2,
            says=f"{_label(y.column)} over {_label(x.column)}: {len(marks)} points, {len(found.points)} of the front",
        )
        figures.append(element("figure", scrolled(chart, "chart")))
        if outside:
            figures.append(note(f"{outside:,} points far worse than the front stand hollow at the edge."))
    keys_of_styles = [*criteria, *(["other criteria"] if len(counted) > MOST_STYLES else [])]
    thinned = f" Of {len(firsts):,} points {len(places):,} are drawn." if every > 1 else ""
    volume = "" if found.hypervolume is None else f" Hypervolume {found.hypervolume['value']:.6g}."
    text = (
        "Every measured model, large where no other beats it. The star and the dotted lines are the unpruned model. "
        f"Selected on validation only.{thinned}{volume}"
    )
    return section("front", "The front", note(text), legend(keys_of_styles) if several else None, *figures)


def _first_two(objectives: Sequence[Objective]) -> tuple[Objective, Objective]:
    """What x and y are: sparsity is across, also where it is no objective but there is one only."""
    if len(objectives) == 1:
        return Objective(name="sparsity", column="sparsity", direction="maximise"), objectives[0]
    first, second = objectives[:2]
    return (first, second) if first.column.endswith("sparsity") else (second, first)


def _chosen(record: _Record) -> Element | None:
    found = record.found
    if not found.points:
        return None
    rows = [_row(record, point) for point in found.points[:MOST_ROWS]]
    if found.dense is not None:
        rows.append(_row(record, found.dense))
    cut = f" The first {MOST_ROWS} of {len(found.points):,} are shown." if len(found.points) > MOST_ROWS else ""
    n = len(record.spec.seeds)
    spread = f"Mean ± standard deviation over {n} seeds." if n > 1 else "One seed: no spread is known."
    text = f"{spread} The dense model stands last; the knee is marked.{cut}"
    return section("chosen", "Chosen models", note(text), table(rows, knee=found.knee, cards=True))


def _row(record: _Record, point: Mapping[str, Any]) -> dict[str, Any]:
    dense, is_dense = record.found.dense, point is record.found.dense
    row: dict[str, Any] = {"key": element("code", str(point["key"])[:SHORT])}
    row |= {"trial": "dense" if is_dense else point["trial"], "round": point["round"], "n": point["n"]}
    metrics = [name for name in point["std"] if name not in MEASURES]
    for name in (*MEASURES, *metrics):
        if any(name in each for each in (*record.found.points, dense or {})):
            deviation = point["std"].get(name)
            spread = f" ± {shown(name, deviation)}" if deviation else ""
            row[name] = shown(name, point.get(name)) + spread
        if name in ("accuracy", "test_accuracy") and dense is not None and name in dense and name in point:
            row[f"{name} against dense"] = f"{100 * (point[name] - dense[name]):+.2f} points"
    row["parameters"] = ", ".join(f"{name} {shown(name, value)}" for name, value in point["params"].items())
    return row


def _search(record: _Record) -> Element | None:
    trials = record.trials
    if len(trials) < 2:
        return None
    names = list(dict.fromkeys(name for trial in trials for name in trial.params))
    varied = [n for n in names if len({repr(trial.params.get(n)) for trial in trials}) > 1]
    shown_names = varied[: MOST_AXES - len(record.objectives)]
    columns: list[tuple[str, list[Any]]] = [(n, [trial.params.get(n) for trial in trials]) for n in shown_names]
    for place, objective in enumerate(record.objectives):
        values = [trial.values[place] for trial in trials]
        axis = f"reached {objective.name}" if objective.name in shown_names else objective.name
        columns.append((axis, [value if math.isfinite(value) else None for value in values]))
    first = record.objectives[0]
    order = np.argsort([t.values[0] if first.direction == "maximise" else -t.values[0] for t in trials], kind="stable")
    ranks = np.empty(len(trials))
    ranks[order] = np.arange(len(trials)) / max(1, len(trials) - 1)
    styles = [0 if rank > 2 / 3 else 6 if rank > 1 / 3 else 1 for rank in ranks]
    on_front = {point["trial"] for point in record.found.points}
    fronts = [trial.number in on_front for trial in trials]
    tips = [_trial_tip(record, trial) for trial in trials]
    left_out = f" {', '.join(varied[len(shown_names) :])}: not drawn." if len(varied) > len(shown_names) else ""
    text = (
        f"Each line is one of {len(trials):,} trials that are done, at its last round. By "
        f"{_label(first.column)}: the best third is blue, the worst orange, the rest grey; trials of the front are "
        "thick. Drag along an axis to see the trials in a range only; "
        f"double-click the axis to see all.{left_out}"
    )
    chart = scrolled(parallel(columns, styles, fronts, tips), "chart")
    count = element("p", class_="note count", aria_live="polite")
    return section("search", "The search", note(text), element("figure", chart, count))


def _trial_tip(record: _Record, trial: _Trial) -> str:
    values = zip(record.objectives, trial.values, strict=True)
    said = [f"{objective.name}: {shown(objective.column, value)}" for objective, value in values]
    chosen = ", ".join(f"{name} {shown(name, value)}" for name, value in trial.params.items())
    return "\n".join([f"trial {trial.number}", *said, chosen])


def _importances(record: _Record) -> Element | None:
    if len(record.trials) < 2:
        return None
    params = [trial.params for trial in record.trials]
    parts: list[Element] = []
    for place, objective in enumerate(record.objectives):
        values = [trial.values[place] for trial in record.trials]
        found = importances(params, values, maximise=objective.direction == "maximise")
        if not found:
            continue
        parts.append(element("h3", objective.name.replace("_", " ")))
        known = [
            (one.parameter, one.eta_squared, f"{one.eta_squared:.2f}") for one in found if one.eta_squared is not None
        ]
        if known:
            parts.append(element("figure", scrolled(bars(known), "chart")))
        rows = [
            {
                "parameter": one.parameter,
                "eta squared": "too few trials to say" if one.eta_squared is None else f"{one.eta_squared:.3f}",
                "p (Holm)": "–" if one.p is None else f"{one.p:.2g}",
                "best group": one.best,
                "trials": one.trials,
            }
            for one in found
        ]
        parts.append(table(rows))
    return section("importance", "Parameter importance", note(METHOD), *parts) if parts else None


def _layers(record: _Record) -> Element | None:
    points = sorted(record.spread(), key=lambda point: point.get("sparsity", 0.0))
    names = list(dict.fromkeys(name for point in points for name in point["layers"]))
    if not names:
        return None
    rows = []
    for point in points:
        cells = []
        for name in names:
            kept, total = point["layers"].get(name, (None, None))
            if not total:
                cells.append(("–", "", f"{name}: not recorded"))
                continue
            gone = 1 - kept / total
            # Even steps of colour for equal ratios of what is left: 99 and 99.9 % are not the same.
            share = min(1.0, math.log2(total / max(kept, 1)) / 7)
            cells.append(
                (f"{100 * gone:.1f}", mixed(WHITE, BLUE, share), f"{name}: {kept:,} of {total:,} weights left")
            )
        rows.append((record.point_name(point), cells))
    text = "Percent of each layer's prunable weights removed, in models of the front, sparsest last"
    which = " (of the seed nearest the mean)." if len(record.spec.seeds) > 1 else "."
    return section("layers", "Sparsity per layer", note(text + which), heat("model", names, rows))


def _classes(record: _Record) -> Element | None:
    points = sorted(record.spread(), key=lambda point: point.get("sparsity", 0.0))
    measured = [(point, _changes(record, point)) for point in points]
    measured = [(point, changes) for point, changes in measured if changes]
    if not measured:
        return None
    most = max(0.01, *(abs(change) for _, changes in measured for change in changes))
    dense = (record.found.dense or {})[f"{record.split}class_accuracy"]
    rows = [("dense, %", [(f"{100 * value:.1f}", "", f"class {n}, dense") for n, value in enumerate(dense)])]
    for point, changes in measured:
        cells = []
        for number, change in enumerate(changes):
            colour = mixed(WHITE, RED if change < 0 else BLUE, abs(change) / most)
            now = point[f"{record.split}class_accuracy"][number]
            tip = f"class {number}: {100 * dense[number]:.1f} % dense, {100 * now:.1f} % pruned"
            cells.append((f"{100 * change:+.1f}", colour, tip))
        rows.append((record.point_name(point), cells))
    text = (
        f"Change of each class's accuracy against the dense model in points, on {_split(record)}, means over "
        f"{len(record.spec.seeds)} seed{'s' if len(record.spec.seeds) > 1 else ''}: orange loses, blue gains. Classes "
        "go by their number, and how many examples each has is not recorded here, so a large change may be chance: "
    )
    command = element("code", f"orchardist responsible {record.spec.name}")
    remark = element("p", text, command, " tests every class and names it.", class_="note")
    return section("classes", "Per class", remark, heat("model", [str(n) for n in range(len(dense))], rows))


def _changes(record: _Record, point: Mapping[str, Any]) -> list[float]:
    """How far each class's accuracy moved from the dense model's; empty where it is not known of both."""
    name = f"{record.split}class_accuracy"
    before, now = (record.found.dense or {}).get(name), point.get(name)
    if not before or not now or len(before) != len(now) or None in before or None in now:
        return []
    return [b - a for a, b in zip(before, now, strict=True)]


def _tickets(record: _Record) -> Element | None:
    from orchestrator.tickets.study.table import read, rows

    if next(read(record.study), None) is None:
        return None
    try:
        found = record.study.tickets(structure=False)
    except QueryError as error:
        return section("tickets", "Tickets", note(str(error)))
    told = [
        element("p", element("code", str(ticket["key"])[:SHORT]), f": {ticket['says']}")
        for ticket in found["tickets"]
        if ticket["controls"]
    ]
    moved = [
        element("p", element("code", str(each["key"])[:SHORT]), f": {each['says']}")
        for ticket in found["tickets"]
        for each in ticket["transfers"]
    ]
    text = f"Each ticket beside its controls at its own sparsity, compared on {found['compared_on'].replace('_', ' ')}."
    return section("tickets", "Tickets", note(text), table(rows(found)), *told, *moved)


def _sharing(record: _Record) -> Element:
    epochs, stages = record.status["epochs"], record.status["stages"]
    rows = []
    for name, counted in (("epochs", epochs), ("stages", stages)):
        asked, ran = counted["asked"], counted["run"]
        if asked:
            rows.append((f"{name} run", min(1.0, ran / asked), f"{ran:,.0f} of {asked:,.0f}"))
    if not rows:
        return section("sharing", "Saved by sharing", note("No trial is done yet."))
    saved = epochs["asked"] - epochs["run"]
    text = (
        f"The finished trials asked for {epochs['asked']:,.0f} epochs of training; {epochs['run']:,.0f} were run, and "
        f"{saved:,.0f} ({saved / epochs['asked']:.0%}) were saved, because equal beginnings were run once."
        if epochs["asked"] and saved > 0
        else f"{epochs['run']:,.0f} epochs were run for {epochs['asked']:,.0f} that the finished trials asked for."
    )
    return section("sharing", "Saved by sharing", element("p", text), element("figure", scrolled(bars(rows), "chart")))


def _lineage(record: _Record) -> Element | None:
    if record.knee is None:
        return None
    key = str(record.knee["key"])
    lineage = record.lineage(key)
    if lineage is None:
        remark = note("Its file is no longer in the store; `fetch` makes it again.")
        return section("lineage", "Lineage of the knee", remark)
    names = ["key", "accuracy", "loss", "sparsity"]
    known = {row["key"]: row for row in history.rows(record.outcomes.table(names))}
    rows, before = [], None
    for step in lineage:
        row = known.get(step["key"], {})
        accuracy = row.get("accuracy")
        moved = "" if accuracy is None or before is None else f"{100 * (accuracy - before):+.2f} points"
        rows.append(
            {
                "stage": step["op"],
                "what": _stage_in_words(step),
                "sparsity": "" if row.get("sparsity") is None else shown("sparsity", row["sparsity"]),
                "accuracy on validation": "not measured" if accuracy is None else shown("accuracy", accuracy),
                "against the last measured": moved,
                "key": element("code", step["key"][:SHORT]),
            }
        )
        before = before if accuracy is None else accuracy
    text = (
        f"How {key[:SHORT]} came about, first stage first. A model right after pruning is not in the record: `fetch` "
        "measures it, and tells what each pruning cost and what retraining gave back."
    )
    drawn = drawing(_prunings(lineage, known), f"The way to {key[:SHORT]}")
    figure = element("figure", scrolled(drawn, "chart"))
    return section("lineage", "Lineage of the knee", note(text), figure, table(rows))


def _prunings(lineage: Sequence[Mapping[str, Any]], known: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the record has of each pruning: the model before it, and the first that was measured after it."""
    found: list[dict[str, Any]] = []
    before, waiting = None, False
    for step in lineage:
        row = known.get(step["key"], {})
        if step["op"] == "Prune":
            found.append({"before": before, "pruned": None, "retrained": None, "sparsity": None})
            waiting = True
        if row.get("accuracy") is not None:
            before = row["accuracy"]
            if waiting:
                found[-1] |= {"retrained": before, "sparsity": row["sparsity"]}
                waiting = False
    return {"metric": "accuracy", "split": "valid", "prunings": found}


def _stage_in_words(step: Mapping[str, Any]) -> str:
    hidden = ("key", "op", "from", "recipe", "remarks")
    said = [
        shown(name, value) if name == "what" else f"{name.replace('_', ' ')} {shown(name, value)}"
        for name, value in step.items()
        if name not in hidden
    ]
    recipe = ", ".join(f"{name} {shown(name, value)}" for name, value in (step.get("recipe") or {}).items())
    return ", ".join(said) + (f" ({recipe})" if recipe else "")


def _checklist(record: _Record) -> Element:
    items = checklist(_facts(record))
    marks = {"met": ("✓ met", "met"), "missing": ("✗ missing", "missing")}
    rows = []
    for item in items:
        text, look = marks.get(item.state, (f"◐ {item.state}", "open"))
        rows.append({"rule": item.rule, "state": element("span", text, class_=look), "what there is": item.says})
    count: Counter[State] = Counter(item.state for item in items)
    text = (
        "What a report on pruning should say, after Blalock et al., “What is the State of Neural Network Pruning?” "
        f"(2020, arXiv 2003.03033). {_counted(items, count)}"
    )
    return section("checklist", "Reporting checklist", note(text), table(rows))


def _counted(items: Sequence[Item], count: Counter[State]) -> str:
    rest = ", ".join(f"{number} {state}" for state, number in count.items() if state != "met")
    return f"{count['met']} of {len(items)} are met" + (f"; {rest}." if rest else ".")


def _facts(record: _Record) -> Facts:
    spec, found = record.spec, record.found
    ratios = record.outcomes.table(["trial", "compression_ratio"])
    versions = {text for text in record.outcomes.table(["versions"])["versions"].to_pylist() if text}
    default = Choices()
    varied = {name for t in record.trials for name in t.params if name.startswith("retrain")}
    varied = {name for name in varied if len({repr(t.params.get(name)) for t in record.trials}) > 1}
    return Facts(
        task=spec.task,
        builtin=BUILTIN.get(spec.task, ""),
        valid_examples=record.noted.get("valid_examples"),
        test_examples=record.noted.get("test_examples"),
        seeds=len(spec.seeds),
        objectives=record.objectives,
        dense=found.dense,
        points=found.points,
        ratios=[
            ratio
            for trial, ratio in zip(ratios["trial"].to_pylist(), ratios["compression_ratio"].to_pylist(), strict=True)
            if trial >= 0 and ratio is not None
        ],
        mixes=sorted(
            {
                (str(t.params.get("criterion", default.criterion)), str(t.params.get("scope", default.scope)))
                for t in record.trials
            }
        ),
        starts=_starts(record),
        retraining=sorted(varied),
        versions=[json.loads(text) for text in sorted(versions)],
    )


def _starts(record: _Record) -> dict[int, frozenset[str]]:
    """By seed, the first states behind the first models of the front."""
    found: dict[int, set[str]] = {}
    for point in record.found.points[:MOST_LINEAGES]:
        for key in point["keys"]:
            for step in record.lineage(key) or ():
                if step["op"] == "Init" and "task" not in step:
                    found.setdefault(step["seed"], set()).add(step["key"])
    return {seed: frozenset(keys) for seed, keys in found.items()}


def _provenance(record: _Record) -> Element:
    spec, noted = record.spec, record.noted
    columns = ["device", "versions", "finished_at", "seconds", "task_digest"]
    told = {name: record.outcomes.table([name])[name].to_pylist() for name in columns}
    times = [time for time in told["finished_at"] if time]
    rows = [
        {"what": "study digest", "value": spec.digest()},
        {"what": "task", "value": spec.task},
        {"what": "task digest", "value": noted.get("task_digest") or "not recorded"},
        *(
            {"what": f"task {name}", "value": other.get("task_digest")}
            for name, other in noted.get("others", {}).items()
        ),
        *({"what": f"function {name}", "value": digest} for name, digest in noted.get("functions", {}).items()),
        *([{"what": "ticket file", "value": noted["ticket"]}] if noted.get("ticket") else []),
        {"what": "seeds", "value": ", ".join(map(str, spec.seeds))},
        {"what": "sampler", "value": f"{spec.sampler}, seed {spec.sampler_seed}"},
        {"what": "outcomes", "value": f"{len(told['device']):,}"},
        *({"what": "measured with", "value": line} for line in _environments(told)),
        {"what": "measured", "value": f"{_when(min(times))} to {_when(max(times))}" if times else "not recorded"},
        {"what": "time of the stages", "value": f"{sum(s for s in told['seconds'] if s):,.1f} s"},
        {"what": "store", "value": record.study.store.name},
        {"what": "this report", "value": f"Orchardist {__version__}, {_when(datetime.now(UTC).timestamp())}"},
    ]
    digests = {digest for digest in told["task_digest"] if digest} - {
        other.get("task_digest") for other in noted.get("others", {}).values()
    }
    mixed_up = (
        note("The task changed while the study ran: outcomes of several tasks are mixed.") if len(digests) > 1 else None
    )
    failures = [
        {"trial": number, "why it failed": str(why).strip().splitlines()[-1] if str(why).strip() else ""}
        for number, why in list(record.status["failures"].items())[:MOST_FAILURES]
    ]
    failed = (element("h3", "Failed trials"), table(failures)) if failures else ()
    stored = record.study.store.read_study(spec.name)
    text = stored[0] if stored else spec.to_toml()
    return section(
        *("provenance", "Provenance"),
        *(table(rows), mixed_up, *failed, element("h3", "The study file"), element("pre", text)),
    )


def _environments(told: Mapping[str, Sequence[Any]]) -> Iterator[str]:
    counted = Counter(zip(told["device"], told["versions"], strict=True))
    for (device, versions), number in sorted(counted.items(), key=lambda each: -each[1]):
        said = ", ".join(f"{name} {value}" for name, value in json.loads(versions or "{}").items())
        yield f"{said or 'versions not recorded'}, on {device or 'a device not recorded'} ({number:,} outcomes)"


def _when(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


def _split(record: _Record) -> str:
    return "the test split" if record.split else "the validation split"


def _axis(objective: Objective) -> Axis:
    maximise = objective.direction == "maximise"
    better = ("→" if maximise else "←") + " better"
    return Axis(name=objective.column, label=f"{_label(objective.column)} ({better})", maximise=maximise)


def _dense_mark(record: _Record, x: str, y: str) -> Mark | None:
    dense = record.found.dense
    if dense is None or x not in dense or y not in dense:
        return None
    tip = f"the unpruned model · {str(dense['key'])[:SHORT]}\n" + "\n".join(
        f"{_label(name)}: {shown(name, dense[name])}" for name in dict.fromkeys((x, y))
    )
    return Mark(x=float(dense[x]), y=float(dense[y]), tip=tip)


def _label(column: str) -> str:
    """A measure in words, with its split where it has one."""
    where = "test " if column.startswith("test_") else ""
    name = column.removeprefix("test_").replace("_", " ")
    if column.endswith(FRACTIONS[0]) or column.endswith("loss"):
        return f"{name} on {'test' if where else 'validation'}"
    return f"{where}{name}"
