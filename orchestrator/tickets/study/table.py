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
        task: where it was trained: the name of another task, or the study's own.
        transfers: what became of it on other tasks, by their names.
    """

    trial: int
    params: Mapping[str, Any]
    round: int
    tickets: Mapping[int, Mapping[str, Any]]
    rows: Mapping[int, Mapping[str, Any]]
    controls: Mapping[str, Mapping[int, Sequence[Mapping[str, Any]]]]
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
    tested, examples = _split(study)
    if any(row[tested] is None for ticket in found for row in ticket.rows.values()):
        raise QueryError(f"tickets are compared by accuracy, which the task {study.spec.task!r} does not measure")
    pairs: list[tuple[int, str, str, Pair]] = []
    everywhere = [each for ticket in found for each in (ticket, *ticket.transfers.values())]
    for place, ticket in enumerate(everywhere):
        measure, count = _split(study, ticket.task)
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
    return {"study": study.spec.name, "compared_on": tested, "examples": examples, "tickets": described}


def rows(document: Mapping[str, Any]) -> list[dict[str, str]]:
    """The document as a table: a row for each ticket, followed by one for each of its controls.

    Learning speed has columns where the study took learning curves.
    """
    speed = any("steps" in control for ticket in document["tickets"] for control in ticket["controls"].values())
    told = []
    for ticket in document["tickets"]:
        told.append(_row_of_ticket(ticket, document["compared_on"], speed=speed))
        for kind, control in ticket["controls"].items():
            told.append(_row_of_control(kind, control, document["compared_on"], speed=speed))
        for moved in ticket["transfers"]:
            told.append(_row_of_transfer(moved, speed=speed))
            for kind, control in moved["controls"].items():
                told.append(_row_of_control(kind, control, moved["compared_on"], speed=speed))
    return told


def _row_of_ticket(ticket: Mapping[str, Any], measure: str, *, speed: bool) -> dict[str, str]:
    overlap = ticket["overlap"]
    agree = f", searches agree {overlap['jaccard']:.2f} (chance {overlap['chance']:.2f})" if overlap else ""
    mended = sum(ticket["repaired"].values())
    repaired = f", {mended} weights put back where a layer was cut off" if mended else ""
    trainings = "1 training" if ticket["trainings"] == 1 else f"{ticket['trainings']} trainings"
    steps = {"steps to best": _count(ticket["steps_to_best"]), "sooner by": "", "speed": ""} if speed else {}
    return {
        "ticket": ticket["key"][:12],
        "trial": str(ticket["trial"]),
        "round": str(ticket["round"]),
        "sparsity": f"{ticket['sparsity']:.4f}",
        "against": f"({ticket['rule']})",
        measure: f"{ticket[measure]:.4f}",
        "ticket leads by": "",
        "claim": f"found in {trainings}, {ticket['depth']} of them in a row{agree}{repaired}",
        **steps,
    }


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

    Equal ones come once, under the first trial, with the controls that any of their trials ran.
    """
    rows = {row["key"]: row for row in study.table().to_pylist()}
    events: dict[int, dict[str, Any]] = {}
    for row in study.store.table(study.spec.name, "events").to_pylist():
        if row["event"] == "tickets":
            events[row["trial"]] = json.loads(row["detail"])
    found: dict[tuple[str, ...], tuple[int, dict[str, Any], dict[int, dict[str, Any]]]] = {}
    for trial, detail in sorted(events.items()):
        by_round: dict[int, dict[int, dict[str, Any]]] = {}
        for ticket in detail["tickets"]:
            by_round.setdefault(ticket["round"], {})[ticket["seed"]] = ticket
        for tickets in by_round.values():
            keys = tuple(tickets[seed]["key"] for seed in sorted(tickets))
            _, _, known = found.setdefault(keys, (trial, detail["params"], tickets))
            for seed, ticket in tickets.items():
                more = [control for control in ticket["controls"] if control not in known[seed]["controls"]]
                known[seed]["controls"] += more
    for keys, (trial, params, tickets) in found.items():
        if all(key in rows for key in keys):
            yield Found(
                trial=trial,
                params=params,
                round=next(iter(tickets.values()))["round"],
                tickets=tickets,
                rows={seed: rows[ticket["key"]] for seed, ticket in tickets.items()},
                controls=dict(_controls(tickets, rows)),
                transfers=dict(_transfers(trial, params, tickets, rows)),
            )


def _transfers(
    trial: int, params: Mapping[str, Any], tickets: Mapping[int, Mapping[str, Any]], rows: Rows
) -> Iterator[tuple[str, Found]]:
    """The tasks on which every seed's ticket was tried, with what came of it."""
    by_task: dict[str, dict[int, Mapping[str, Any]]] = {}
    for seed, ticket in tickets.items():
        for moved in ticket.get("transfers", ()):
            by_task.setdefault(moved["task"], {})[seed] = moved
    for task, there in by_task.items():
        if there.keys() == tickets.keys() and all(moved["key"] in rows for moved in there.values()):
            yield (
                task,
                Found(
                    trial=trial,
                    params=params,
                    round=next(iter(tickets.values()))["round"],
                    tickets=there,
                    rows={seed: rows[moved["key"]] for seed, moved in there.items()},
                    controls=dict(_controls(there, rows)),
                    task=task,
                ),
            )


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


def _split(study: Study, task: str = "") -> tuple[str, int]:
    """The measure that tickets are compared by on a task, and on how many examples it was taken."""
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
        "overlap": _overlap(study, ticket),
        "stability": _stability(study, ticket),
        "says": _says([found["accuracy"] for found in comparisons.values()], sparsity),
    }


def _described_there(
    study: Study, ticket: Found, comparisons: Mapping[str, Mapping[str, Comparison]]
) -> dict[str, Any]:
    """What became of a ticket on another task."""
    rows = list(ticket.rows.values())
    measure, examples = _split(study, ticket.task)
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
        "says": f"On {ticket.task}, {says[:1].lower()}{says[1:]}",
    }


def _says(comparisons: Sequence[Comparison], sparsity: float) -> str:
    """The claims on accuracy in a sentence: what it beats first, alike ones together."""
    by_claim: dict[str, list[str]] = {}
    for found in comparisons:
        width = "" if found.half_width is None else f" ± {found.half_width:.1f}"
        by_claim.setdefault(found.claim, []).append(f"{found.against} ({found.difference:+.1f}{width} points)")
    told = "; ".join(f"{words} {', '.join(by_claim[claim])}" for claim, words in CLAIMS.items() if claim in by_claim)
    return f"At {sparsity:.1%} sparse: {told}." if told else "It was compared with nothing."


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
