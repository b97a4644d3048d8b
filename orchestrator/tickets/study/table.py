"""What a study's tickets are worth: each beside its controls at its own sparsity, with what may be claimed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

from orchestrator.errors import QueryError
from orchestrator.tickets import verdict
from orchestrator.tickets.verdict import Comparison, Contender, Pair, Scale

if TYPE_CHECKING:
    from orchestrator.study import Study

NAMES = {
    "dense": "the dense model",
    "dense-long": "the dense model trained as long",
    "dense-transferred": "its weights without the mask",
    "one-shot": "one-shot magnitude pruning",
    "imp": "iterative magnitude pruning",
    "shuffled": "the shuffled mask",
    "random": "a random mask",
    "random-layer": "a random mask of the same layer shares",
    "inverted": "the inverted mask",
    "reinitialised": "the reinitialised ticket",
    "sign-kept": "new magnitudes under its signs",
    "sign-constant": "constants under its signs",
}
"""The controls as a sentence calls them."""
DENSE = ("dense", "dense-long", "dense-transferred")
CLAIMS = {
    "beats": "beats",
    "loses to": "loses to",
    "matches": "matches",
    "not distinguishable from": "not distinguishable from",
    "too few": "too few seeds to say against",
}

UNKNOWN = "nothing is recorded of it"
SPEED = ("steps to best", "sooner by", "speed")
"""The columns of learning speed."""

Rows = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Found:
    """One ticket over all seeds: the same trial and round.

    Args:
        trial: which proposal it belongs to, and its parameters.
        round: how many prunings lie behind it.
        tickets: by seed, as the driver recorded them.
        rows: the outcomes of its trained states by seed.
        controls: the outcomes of each control's trained states by kind and seed, one for each draw.
        failed: what has no outcome, by the control's kind or the other task's name: the reasons by seed.
        task: where it was trained: the name of another task, or the study's own.
        transfers: what became of it on other tasks, by their names.
    """

    trial: int
    params: Mapping[str, Any]
    round: int
    tickets: Mapping[int, Mapping[str, Any]]
    rows: Mapping[int, Mapping[str, Any]]
    controls: Mapping[str, Mapping[int, Sequence[Mapping[str, Any]]]]
    failed: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    task: str = ""
    transfers: Mapping[str, Found] = field(default_factory=dict)


def ticket_table(study: Study, *, structure: bool = True) -> dict[str, Any]:
    """The document that `orchardist tickets --format json` prints.

    Every comparison in it is judged as one family, those of accuracy and those of learning speed: both are printed side
    by side, and whoever looks for a difference looks at all of them. The p-values are adjusted for their number (Holm,
    1979): a table in which nothing differs claims a difference somewhere in one of twenty cases at most.

    Args:
        study: an opened study.
        structure: look for structure in the masks too, for which the study's task is loaded.

    Raises:
        QueryError: the study has found no ticket, or its task does not measure accuracy.
    """
    found = list(read(study))
    if not found:
        raise QueryError(
            f"the study {study.spec.name!r} has no ticket yet: a ticket is a finished trial with retrain = 'rewind' or "
            "phase = 'before'"
        )
    tested, examples = compared_on(study)
    if any(row[tested] is None for ticket in found for row in ticket.rows.values()):
        raise QueryError(f"tickets are compared by accuracy, which the task {study.spec.task!r} does not measure")
    pairs: list[tuple[int, str, str, Pair]] = []
    everywhere = [each for ticket in found for each in (ticket, *ticket.transfers.values())]
    for place, ticket in enumerate(everywhere):
        measure, count = compared_on(study, ticket.task)
        for kind in ticket.controls:
            pairs.append((place, kind, "accuracy", _pair(ticket, kind, measure, verdict.ACCURACY, count)))
            speed = _speed(ticket, kind, study.spec.train.evaluate_every)
            if speed is not None:
                pairs.append((place, kind, "steps", speed))
    judged = verdict.decide([pair for *_, pair in pairs])
    by_ticket: dict[int, dict[str, dict[str, Comparison]]] = {}
    for (place, kind, what, _), comparison in zip(pairs, judged, strict=True):
        by_ticket.setdefault(place, {}).setdefault(kind, {})[what] = comparison
    described: list[dict[str, Any]] = []
    for place, ticket in enumerate(everywhere):
        comparisons = by_ticket.get(place, {})
        if ticket.task:
            described[-1]["transfers"].append(_described_there(study, ticket, comparisons))
        else:
            described.append(_described(study, ticket, comparisons, tested) | {"transfers": []})
    if structure:
        for told, each in zip(described, _structures(study, found), strict=True):
            told["structure"] = each
    return {
        "study": study.spec.name,
        "compared_on": tested,
        "examples": examples,
        "comparisons": len(pairs),
        "tickets": described,
    }


def rows(document: Mapping[str, Any]) -> list[dict[str, str]]:
    """The document as a table: a row for each ticket, followed by one for each of its controls.

    Learning speed has columns where the study took learning curves.
    """
    speed = any("steps" in control for ticket in document["tickets"] for control in ticket["controls"].values())
    told = []
    for ticket in document["tickets"]:
        told.append(_row_of_ticket(ticket, document["compared_on"], speed=speed))
        told += _rows_against(ticket, document["compared_on"], speed=speed)
        for moved in ticket["transfers"]:
            told.append(_row_of_transfer(moved, speed=speed))
            told += _rows_against(moved, moved["compared_on"], speed=speed)
    return told


def says(document: Mapping[str, Any]) -> list[str]:
    """What may be claimed of each ticket that was compared with anything, a line for each; then how to read it."""
    tickets = document["tickets"]
    everywhere = [each for ticket in tickets for each in (ticket, *ticket["transfers"])]
    lines = [f"{each['key'][:12]}: {each['says']}" for each in everywhere if each["says"]]
    if any(each["failed"] for each in everywhere):
        lines.append("What failed is tried again when the study is run again.")
    if not document["comparisons"]:
        return [*lines, "The tickets were compared with nothing: [tickets] controls says with what."]
    seeds = sorted({each["n"] for each in everywhere if each["controls"]})
    if seeds[-1] > 1:
        many = " or ".join(map(str, seeds))
        lines.append(f"± is half the width of a 95 % interval over {many} seeds.{_together(document)}")
    if not all(ticket["controls"] or ticket["failed"] for ticket in tickets):
        lines.append("Tickets of other rounds were compared with nothing: [tickets] rounds says which are.")
    return lines


def _together(document: Mapping[str, Any]) -> str:
    count = document["comparisons"]
    enough = "for which an interval without zero may not be enough"
    return f" Claims hold for all {count} comparisons together, {enough}." if count > 1 else ""


def _rows_against(ticket: Mapping[str, Any], measure: str, *, speed: bool) -> Iterator[dict[str, str]]:
    """What a ticket was compared with, and what it could not be."""
    for kind, control in ticket["controls"].items():
        yield _row_of_control(kind, control, measure, speed=speed)
    columns = ("ticket", "trial", "round", "sparsity", "against", measure, "ticket leads by", "claim")
    for kind, reasons in ticket["failed"].items():
        seeds = f"seed{'s' if len(reasons) > 1 else ''} {', '.join(reasons)}"
        told = {"against": kind, "claim": f"failed under {seeds}: {'; '.join(dict.fromkeys(reasons.values()))}"}
        yield dict.fromkeys((*columns, *(SPEED if speed else ())), "") | told


def _row_of_ticket(ticket: Mapping[str, Any], measure: str, *, speed: bool) -> dict[str, str]:
    overlap = ticket["overlap"]
    agree = f", searches agree {overlap['jaccard']:.2f} (chance {overlap['chance']:.2f})" if overlap else ""
    mended = sum(ticket["repaired"].values())
    repaired = f", {mended} weights put back where a layer was cut off" if mended else ""
    steps = {"steps to best": _count(ticket["steps_to_best"]), "sooner by": "", "speed": ""} if speed else {}
    return {
        "ticket": ticket["key"][:12],
        "trial": str(ticket["trial"]),
        "round": str(ticket["round"]),
        "sparsity": f"{ticket['sparsity']:.4f}",
        "against": f"({ticket['rule']})",
        measure: f"{ticket[measure]:.4f}",
        "ticket leads by": "",
        "claim": f"{_effort(ticket)}{agree}{repaired}",
        **steps,
    }


def _effort(ticket: Mapping[str, Any]) -> str:
    """What it took to find a ticket: no number of workers shortens the trainings that follow one another."""
    trainings, depth = ticket["trainings"], ticket["depth"]
    if ticket["rule"] == "from a file":
        return "found elsewhere"
    if not trainings:
        return "found without training"
    if trainings == 1:
        return "found in 1 training"
    order = {1: "side by side", trainings: "one after another"}.get(depth, f"{depth} of them in a row")
    return f"found in {trainings} trainings, {order}"


def _row_of_transfer(moved: Mapping[str, Any], *, speed: bool) -> dict[str, str]:
    steps = {"steps to best": _count(moved["steps_to_best"]), "sooner by": "", "speed": ""} if speed else {}
    return {
        "ticket": moved["key"][:12],
        "trial": "",
        "round": "",
        "sparsity": f"{moved['sparsity']:.4f}",
        "against": f"(on {moved['task']})",
        moved["compared_on"]: f"{moved[moved['compared_on']]:.4f}",
        "ticket leads by": "",
        "claim": "the same ticket on another task, its weights with it",
        **steps,
    }


def _row_of_control(kind: str, control: Mapping[str, Any], measure: str, *, speed: bool) -> dict[str, str]:
    steps: dict[str, str] = {}
    if speed:
        found = control.get("steps")
        steps = {"steps to best": _count(control["steps_to_best"]), "sooner by": "", "speed": ""}
        if found:
            width = "" if found["half_width"] is None else f" ± {found['half_width']:,.0f}"
            steps |= {"sooner by": f"{-found['difference']:+,.0f}{width} steps", "speed": found["claim"]}
    width = "" if control["half_width"] is None else f" ± {control['half_width']:.1f}"
    return {
        **dict.fromkeys(("ticket", "trial", "round", "sparsity"), ""),
        "against": kind,
        measure: f"{control[measure]:.4f}",
        "ticket leads by": f"{control['difference']:+.1f}{width} points",
        "claim": control["claim"],
        **steps,
    }


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def read(study: Study) -> Iterator[Found]:
    """The study's tickets of which every seed is there, by trial and round.

    Equal ones come once, under the first trial, with the controls and the other tasks of all their trials.
    """
    rows = {row["key"]: row for row in study.table().to_pylist()}
    events: dict[int, dict[str, Any]] = {}
    reasons: dict[str, str] = {}
    for row in study.store.table(study.spec.name, "events").to_pylist():
        if row["event"] == "tickets":
            events[row["trial"]] = json.loads(row["detail"])
        elif row["event"] == "control failed":
            reasons[row["key"]] = json.loads(row["detail"])["reason"]
    found: dict[tuple[str, ...], tuple[int, dict[str, Any], dict[int, dict[str, Any]]]] = {}
    for trial, detail in sorted(events.items()):
        by_round: dict[int, dict[int, dict[str, Any]]] = {}
        for ticket in detail["tickets"]:
            by_round.setdefault(ticket["round"], {})[ticket["seed"]] = ticket
        for tickets in by_round.values():
            keys = tuple(tickets[seed]["key"] for seed in sorted(tickets))
            _, _, known = found.setdefault(keys, (trial, detail["params"], tickets))
            for seed, ticket in tickets.items():
                _add_to(known[seed], ticket)
    for keys, (trial, params, tickets) in found.items():
        if all(key in rows for key in keys):
            first = next(iter(tickets.values()))
            moved, failed = _transfers(trial, params, tickets, rows, reasons)
            yield Found(
                trial=trial,
                params=params,
                round=first["round"],
                tickets=tickets,
                rows={seed: rows[ticket["key"]] for seed, ticket in tickets.items()},
                controls=dict(_controls(tickets, rows)),
                failed=_failed(tickets, rows, reasons) | failed,
                transfers=moved,
            )


def _add_to(known: dict[str, Any], ticket: Mapping[str, Any]) -> None:
    """Add the controls and the other tasks of an equal ticket that another trial recorded."""
    known["controls"] += [control for control in ticket["controls"] if control not in known["controls"]]
    elsewhere = {moved["task"]: moved for moved in known.setdefault("transfers", [])}
    for moved in ticket.get("transfers", ()):
        if moved["task"] not in elsewhere:
            known["transfers"] = [*known["transfers"], moved]
        elif moved is not elsewhere[moved["task"]]:
            _add_to(elsewhere[moved["task"]], moved)


def _transfers(
    trial: int,
    params: Mapping[str, Any],
    tickets: Mapping[int, Mapping[str, Any]],
    rows: Rows,
    reasons: Mapping[str, str],
) -> tuple[dict[str, Found], dict[str, dict[int, str]]]:
    """The tasks on which every seed's ticket was tried, with what came of it; and those where it failed, with why."""
    by_task: dict[str, dict[int, Mapping[str, Any]]] = {}
    for seed, ticket in tickets.items():
        for moved in ticket.get("transfers", ()):
            by_task.setdefault(moved["task"], {})[seed] = moved
    tried, failed = {}, {}
    for task, there in by_task.items():
        lacking = {seed: moved["key"] for seed, moved in there.items() if moved["key"] not in rows}
        if lacking:
            failed[f"(on {task})"] = {seed: reasons.get(key, UNKNOWN) for seed, key in lacking.items()}
        elif there.keys() == tickets.keys():
            tried[task] = Found(
                trial=trial,
                params=params,
                round=next(iter(tickets.values()))["round"],
                tickets=there,
                rows={seed: rows[moved["key"]] for seed, moved in there.items()},
                controls=dict(_controls(there, rows)),
                failed=_failed(there, rows, reasons),
                task=task,
            )
    return tried, failed


def _controls(
    tickets: Mapping[int, Mapping[str, Any]], rows: Rows
) -> Iterator[tuple[str, dict[int, list[Mapping[str, Any]]]]]:
    """The kinds of control that every seed has, with the outcomes of their draws."""
    controls = [control for ticket in tickets.values() for control in ticket["controls"]]
    kinds = dict.fromkeys(each["kind"] for each in controls if not each["kind"].startswith("sibling/"))
    for kind in kinds:
        drawn = {
            seed: [rows[each["key"]] for each in ticket["controls"] if each["kind"] == kind and each["key"] in rows]
            for seed, ticket in tickets.items()
        }
        if all(drawn.values()):
            yield kind, drawn


def _failed(
    tickets: Mapping[int, Mapping[str, Any]], rows: Rows, reasons: Mapping[str, str]
) -> dict[str, dict[int, str]]:
    """The controls without an outcome, by kind: why, by seed."""
    found: dict[str, dict[int, str]] = {}
    for seed, ticket in tickets.items():
        for control in ticket["controls"]:
            if control["key"] not in rows:
                found.setdefault(control["kind"], {})[seed] = reasons.get(control["key"], UNKNOWN)
    return found


def compared_on(study: Study, task: str = "") -> tuple[str, int]:
    """The measure that tickets are compared by on a task, the study's own or another, and on how many examples."""
    noted = study.noted()["others"][task] if task else study.noted()
    tested = noted.get("test_examples", 0)
    return ("test_accuracy", tested) if tested else ("accuracy", noted.get("valid_examples", 0))


def _pair(ticket: Found, kind: str, measure: str, scale: Scale, examples: int) -> Pair:
    return verdict.pair(
        _contender("the ticket", {seed: [row] for seed, row in ticket.rows.items()}, measure),
        _contender(NAMES[kind], ticket.controls[kind], measure, counted=kind not in DENSE),
        n_test=max(1, examples),
        prunable=_prunable(ticket),
        scale=scale,
    )


def _contender(
    name: str, rows: Mapping[int, Sequence[Mapping[str, Any]]], measure: str, *, counted: bool = True
) -> Contender:
    return Contender(
        name=name,
        test={seed: [row[measure] for row in drawn] for seed, drawn in rows.items()},
        kept={seed: [_kept(row) for row in drawn] for seed, drawn in rows.items()} if counted else None,
    )


def _speed(ticket: Found, kind: str, evaluate_every: float) -> Pair | None:
    """How much sooner the best validation loss is reached; None where no learning curve was taken."""
    everyone = [*ticket.rows.values(), *(row for drawn in ticket.controls[kind].values() for row in drawn)]
    if not evaluate_every or not all(row["curve"] for row in everyone):
        return None
    curve = json.loads(everyone[0]["curve"])
    every = curve[1][0] - curve[0][0] if len(curve) > 1 else curve[0][0]
    mine = {seed: [{**row, "steps": steps_to_best(row)}] for seed, row in ticket.rows.items()}
    theirs = {s: [{**row, "steps": steps_to_best(row)} for row in drawn] for s, drawn in ticket.controls[kind].items()}
    return verdict.pair(
        _contender("the ticket", mine, "steps"),
        _contender(NAMES[kind], theirs, "steps", counted=kind not in DENSE),
        n_test=1,
        prunable=_prunable(ticket),
        scale=verdict.steps(int(every)),
    )


def steps_to_best(row: Mapping[str, Any]) -> int:
    """The training step at which the validation loss was lowest; the first of equals."""
    curve = json.loads(row["curve"])
    return int(min(curve, key=lambda point: (point[1], point[0]))[0])


def _described(
    study: Study, ticket: Found, comparisons: Mapping[str, Mapping[str, Comparison]], measure: str
) -> dict[str, Any]:
    rows = list(ticket.rows.values())
    first = next(iter(ticket.tickets.values()))
    sparsity = fmean(1 - _kept(row) / _prunable(ticket) for row in rows)
    accuracy = fmean(row[measure] for row in rows)
    nearest = min(rows, key=lambda row: abs(row[measure] - accuracy))
    return {
        "key": nearest["key"],
        "keys": [row["key"] for row in rows],
        "trial": ticket.trial,
        "round": ticket.round,
        "n": len(rows),
        "params": dict(ticket.params),
        "rule": first["rule"] or "single search",
        "sparsity": sparsity,
        "accuracy": fmean(row["accuracy"] for row in rows),
        "test_accuracy": _mean(row["test_accuracy"] for row in rows),
        "steps_to_best": _mean(steps_to_best(row) if row["curve"] else None for row in rows),
        "depth": first["depth"],
        "trainings": first["trainings"],
        "repaired": _repaired(study, ticket),
        "controls": {kind: _judged(ticket.controls[kind], found) for kind, found in comparisons.items()},
        "failed": _by_seed(ticket.failed),
        "overlap": _overlap(study, ticket),
        "stability": _stability(study, ticket),
        "says": _says([found["accuracy"] for found in comparisons.values()], sparsity),
    }


def _described_there(
    study: Study, ticket: Found, comparisons: Mapping[str, Mapping[str, Comparison]]
) -> dict[str, Any]:
    """What became of a ticket on another task."""
    rows = list(ticket.rows.values())
    measure, examples = compared_on(study, ticket.task)
    sparsity = fmean(1 - _kept(row) / _prunable(ticket) for row in rows)
    accuracy = fmean(row[measure] for row in rows)
    says = _says([found["accuracy"] for found in comparisons.values()], sparsity)
    return {
        "task": ticket.task,
        "compared_on": measure,
        "examples": examples,
        "key": min(rows, key=lambda row: abs(row[measure] - accuracy))["key"],
        "keys": [row["key"] for row in rows],
        "n": len(rows),
        "sparsity": sparsity,
        "accuracy": fmean(row["accuracy"] for row in rows),
        "test_accuracy": _mean(row["test_accuracy"] for row in rows),
        "steps_to_best": _mean(steps_to_best(row) if row["curve"] else None for row in rows),
        "controls": {kind: _judged(ticket.controls[kind], found) for kind, found in comparisons.items()},
        "failed": _by_seed(ticket.failed),
        "says": f"On {ticket.task}, {says[:1].lower()}{says[1:]}" if says else "",
    }


def _says(comparisons: Sequence[Comparison], sparsity: float) -> str:
    """The claims on accuracy in a sentence: what it beats first, alike ones together; nothing where there are none."""
    by_claim: dict[str, list[str]] = {}
    for found in comparisons:
        width = "" if found.half_width is None else f" ± {found.half_width:.1f}"
        by_claim.setdefault(found.claim, []).append(
            f"{found.against} ({found.difference:+.1f}{width} points{_counted(found)})"
        )
    told = "; ".join(f"{words} {', '.join(by_claim[claim])}" for claim, words in CLAIMS.items() if claim in by_claim)
    return f"At {sparsity:.1%} sparse: {told}." if told else ""


def _counted(found: Comparison) -> str:
    """Why nothing is claimed although the interval excludes zero: it counts no other comparison."""
    if found.claim != "not distinguishable from" or found.half_width is None or found.p_holm is None:
        return ""
    return f", p = {found.p_holm:.2f} among all" if abs(found.difference) > found.half_width else ""


def _by_seed(failed: Mapping[str, Mapping[int, str]]) -> dict[str, dict[str, str]]:
    return {what: {str(seed): reason for seed, reason in reasons.items()} for what, reasons in failed.items()}


def _judged(rows: Mapping[int, Sequence[Mapping[str, Any]]], comparisons: Mapping[str, Comparison]) -> dict[str, Any]:
    accuracy = comparisons["accuracy"]
    told: dict[str, Any] = {
        "accuracy": _mean_of_draws(rows, "accuracy"),
        "test_accuracy": _mean_of_draws(rows, "test_accuracy"),
        "difference": accuracy.difference,
        "half_width": accuracy.half_width,
        "n": accuracy.n,
        "p_holm": accuracy.p_holm,
        "claim": accuracy.claim,
        "sentence": accuracy.sentence,
        "steps_to_best": _mean(
            _mean(steps_to_best(row) if row["curve"] else None for row in drawn) for drawn in rows.values()
        ),
    }
    if "steps" in comparisons:
        steps = comparisons["steps"]
        names = ("difference", "half_width", "n", "p_holm", "claim", "sentence")
        told["steps"] = {name: getattr(steps, name) for name in names}
    return told


def _mean_of_draws(rows: Mapping[int, Sequence[Mapping[str, Any]]], measure: str) -> float | None:
    """The mean over seeds of the means over draws."""
    return _mean(_mean(row[measure] for row in drawn) for drawn in rows.values())


def _repaired(study: Study, ticket: Found) -> dict[str, int]:
    """How many weights were put back into layers that the combination cut off, by layer: the most of any seed."""
    most: dict[str, int] = {}
    for each in ticket.tickets.values():
        header = study.store.states.header(each["start"]) if each["searches"] else None
        lineage = json.loads((header or {}).get("lineage", "[]"))
        added = lineage[-1].get("remarks", {}).get("repaired", {}) if lineage else {}
        for name, count in added.items():
            most[name] = max(count, most.get(name, 0))
    return most


def _overlap(study: Study, ticket: Found) -> dict[str, float] | None:
    """How much the searches agree, beside what chance gives: means over their pairs and the seeds."""
    from orchestrator.state import from_bytes
    from orchestrator.tickets.packed import in_common, pack
    from orchestrator.tickets.similarity import agreement

    jaccard, chance, excess = [], [], []
    for each in ticket.tickets.values():
        data = [study.store.states.read(key) for key in each["searches"]]
        if len(data) < 2 or any(content is None for content in data):
            return None
        masks = in_common([from_bytes(content).masks for content in data if content is not None])
        found = agreement([pack(each) for each in masks]).overall
        pairs = [(one, other) for one in range(len(data)) for other in range(one)]
        jaccard += [float(found.jaccard[pair]) for pair in pairs]
        chance += [float(found.chance_jaccard[pair]) for pair in pairs]
        excess += [float(found.excess[pair]) for pair in pairs]
    return {"jaccard": fmean(jaccard), "chance": fmean(chance), "excess": fmean(excess)} if jaccard else None


def _structures(study: Study, tickets: Sequence[Found]) -> list[dict[str, Any] | None]:
    from orchestrator.tickets.study.structure import look, structure

    body = look(study)
    return [structure(study, ticket, body) for ticket in tickets]


def _stability(study: Study, ticket: Found) -> dict[str, Any] | None:
    from orchestrator.tickets.study.stability import recorded  # torch takes a second to import

    return recorded(study, ticket)


def _kept(row: Mapping[str, Any]) -> int:
    return sum(kept for kept, _ in json.loads(row["layers"]).values())


def _prunable(ticket: Found) -> int:
    row = next(iter(ticket.rows.values()))
    return sum(of for _, of in json.loads(row["layers"]).values())


def _mean(values: Iterable[float | None]) -> float | None:
    found = list(values)
    known = [value for value in found if value is not None]
    return fmean(known) if len(known) == len(found) else None
