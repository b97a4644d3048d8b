"""Where a study's tickets agree: the searches behind each, and tickets of different kinds, always beside chance."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.settings import HOW_MUCH
from orchestrator.tickets import emergence
from orchestrator.tickets.packed import Masks, Packed, in_common, pack
from orchestrator.tickets.similarity import ByLayer, Curve, agreement, by_permutation, k_of_n
from orchestrator.tickets.study.structure import Body, look, masks_of
from orchestrator.tickets.study.table import Found, read

if TYPE_CHECKING:
    from orchestrator.study import Study

Floats = NDArray[np.float64]

RULES = ("rounds", "ticket_sparsity", "at_least", *HOW_MUCH)
"""Tickets that differ in these alone lie on one line, each at what it leaves."""
ANALYTIC = (
    *("jaccard", "chance_jaccard", "hamming", "chance_hamming", "overlap", "chance_overlap"),
    *("z", "excess", "excess_error"),
)
"""The fields of `Agreement` that are told of each pair."""
DRAWS = 20
"""How often masks are shuffled to check the chance that is computed."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Masks that are compared, seed by seed.

    Args:
        name: of a picture's file.
        title: what they are.
        labels: of each mask.
        by_seed: each seed's masks in this order.
    """

    name: str
    title: str
    labels: tuple[str, ...]
    by_seed: tuple[tuple[Masks, ...], ...]


def agreements(study: Study) -> dict[str, Any]:
    """How much the study's tickets agree, overall and in each layer: means over the seeds.

    "sets" has, for each set of masks, its "title", "labels", number of "seeds", and by layer, "" being overall, every
    pair with its Jaccard similarity, Hamming distance and overlap, each beside what chance gives and, for the first,
    what shuffling gave; z, excess and its standard error by chance; and the curve of k of N. Weights that read inputs
    which are constant in training are left out: no data decide on these, so that searches from one init agree anyway.

    Args:
        study: an opened study; its task is loaded for the constant inputs.
    """
    body = look(study)
    constant = 0 if body.constant is None else int(body.constant.sum())
    return {
        "constant_inputs": None if body.constant is None else constant,
        "constant_inputs_reason": body.not_known or None,
        "sets": [_told(_varying(each, body)) for each in comparable(study, list(read(study)))],
    }


def rows(document: Mapping[str, Any]) -> list[dict[str, str]]:
    """What `agreements` found as a table: a row for each pair, overall and in each layer."""
    return [
        {
            "masks": f"{pair['one']}, {pair['other']}".replace("\n", " "),
            "of": each["title"],
            "layer": layer.removesuffix(".weight") or "all",
            "jaccard": f"{pair['jaccard']:.3f}",
            "by chance": f"{pair['chance_jaccard']:.3f}",
            "shuffled": f"{pair['shuffled_jaccard']:.3f}",
            "hamming (chance)": f"{pair['hamming']:.3f} ({pair['chance_hamming']:.3f})",
            "overlap (chance)": f"{pair['overlap']:.3f} ({pair['chance_overlap']:.3f})",
            "z": "-" if pair["z"] is None else f"{pair['z']:+.1f}",
            "excess": "-" if pair["excess"] is None else f"{pair['excess']:+.3f}",
        }
        for each in document["sets"]
        for layer, found in each["layers"].items()
        for pair in found["pairs"]
    ]


def says(document: Mapping[str, Any]) -> list[str]:
    """What else there is to say of the agreement, a line for each."""
    if not document["sets"]:
        return ["There are no masks to compare: several searches, or several trials with a ticket each, have some."]
    told = []
    for each in document["sets"]:
        curve = each["layers"][""]["k_of_n"]
        count = len(curve["share"])
        shares = ", ".join(
            f"k = {k} {share:.1%} ({chance:.1%})"
            for k, share, chance in zip(range(1, count + 1), curve["share"], curve["chance"], strict=True)
        )
        told.append(f"Kept by at least k of {count} ({each['title']}), in brackets by chance: {shares}.")
    if document["constant_inputs"] is None:
        told.append(f"Constant inputs were not left out: {document['constant_inputs_reason']}.")
    elif document["constant_inputs"]:
        told.append(
            f"Left out are the weights that read the {document['constant_inputs']} inputs that are constant in "
            "training: no data decide on these, and searches from one init agree on them anyway."
        )
    return [
        *told,
        "z counts standard deviations of chance; the excess is 0 as by chance, and 1 for equal masks alone.",
    ]


def lines(tickets: Sequence[Found]) -> list[tuple[str, list[Found]]]:
    """The tickets that differ in how much they leave alone, densest first; with what tells them from the others."""

    def rest(ticket: Found) -> tuple[tuple[str, str], ...]:
        return tuple(sorted((name, str(value)) for name, value in ticket.params.items() if name not in RULES))

    groups = [(key, list(group)) for key, group in groupby(sorted(tickets, key=lambda t: (rest(t), t.trial)), rest)]
    groups.sort(key=lambda group: group[1][0].trial)
    everywhere = set.intersection(*(set(key) for key, _ in groups))
    found = []
    for key, group in groups:
        group.sort(key=lambda ticket: (-kept_share(ticket), ticket.trial, ticket.round))
        said = [_said(name, value) for name, value in key if (name, value) not in everywhere]
        found.append((", ".join(said), group))
    return found


def kept_share(ticket: Found) -> float:
    """The share of the prunable weights that a ticket keeps, 0 to 1, the mean over its seeds."""
    counts = [list(json.loads(row["layers"]).values()) for row in ticket.rows.values()]
    return fmean(sum(kept for kept, _ in each) / sum(size for _, size in each) for each in counts)


def comparable(study: Study, tickets: Sequence[Found]) -> Iterator[Compared]:
    """What may be compared: the searches of each consensus ticket, and the sparsest tickets of different trials."""
    several = sum(len(_searches(ticket)) > 1 for ticket in tickets) > 1
    for ticket in tickets:
        count = len(_searches(ticket))
        if count > 1:
            masks = [[masks_of(study, key) for key in found["searches"]] for found in ticket.tickets.values()]
            name = f"-trial-{ticket.trial}" if several else ""
            title = f"{count} searches of one ticket"
            yield from _complete(name, title, search_labels(study, ticket), masks, _layers(ticket))
    found = [(title, group[-1]) for title, group in lines(tickets)] if tickets else []
    if len(found) > 1:
        seeds = [seed for seed in found[0][1].tickets if all(seed in ticket.tickets for _, ticket in found)]
        masks = [[masks_of(study, ticket.tickets[seed]["key"]) for _, ticket in found] for seed in seeds]
        labels = tuple(f"{title}\n({100 * kept_share(ticket):.3g} % left)" for title, ticket in found)
        title = "the sparsest ticket of each kind, under the same seed"
        yield from _complete("-of-tickets", title, labels, masks, _layers(found[0][1]))


def search_labels(study: Study, ticket: Found) -> tuple[str, ...]:
    """What tells the searches of a consensus ticket apart: their criteria, their tasks, or their numbers."""
    count, said = len(_searches(ticket)), study.spec.tickets
    match ticket.params.get("vary"):
        case "criterion":
            return said.criteria[:count]
        case "tasks":
            return (study.spec.task, *(task.label for task in said.tasks[: count - 1]))
    return tuple(f"{number}" for number in range(1, count + 1))


def mean_agreement(compared: Compared) -> dict[str, dict[str, Floats]]:
    """The fields `ANALYTIC` of each pair, (N, N), means over the seeds; by layer, "" being overall."""
    by_seed = [agreement(each) for each in _packed(compared)]
    return _means(compared, by_seed, ANALYTIC)


def mean_curves(compared: Compared) -> dict[str, Curve]:
    """The share of weights that at least k of the masks keep, means over the seeds; by layer, "" being overall."""
    found = _means(compared, [k_of_n(each) for each in _packed(compared)], ("share", "chance"))
    return {
        layer: Curve(share=tuple(each["share"].tolist()), chance=tuple(each["chance"].tolist()))
        for layer, each in found.items()
    }


def _told(compared: Compared) -> dict[str, Any]:
    analytic, curves = mean_agreement(compared), mean_curves(compared)
    drawn = [by_permutation(each, DRAWS, seed) for seed, each in enumerate(_packed(compared))]
    shuffled = _means(compared, drawn, ("jaccard", "z"))
    pairs = list(combinations(range(len(compared.labels)), 2))

    def told(layer: str, one: int, other: int) -> dict[str, Any]:
        found = {name: _number(values[one, other]) for name, values in analytic[layer].items()}
        found |= {f"shuffled_{name}": _number(values[one, other]) for name, values in shuffled[layer].items()}
        return {"one": compared.labels[one], "other": compared.labels[other]} | found

    return {
        "title": compared.title,
        "labels": list(compared.labels),
        "seeds": len(compared.by_seed),
        "layers": {
            layer: {
                "pairs": [told(layer, *pair) for pair in pairs],
                "k_of_n": {"share": list(curves[layer].share), "chance": list(curves[layer].chance)},
            }
            for layer in analytic
        },
    }


def _packed(compared: Compared) -> list[list[Packed]]:
    return [[pack(masks) for masks in each] for each in compared.by_seed]


def _means(compared: Compared, by_seed: Sequence[ByLayer[Any]], names: Sequence[str]) -> dict[str, dict[str, Floats]]:
    found = {}
    for layer in ["", *compared.by_seed[0][0]]:
        each = [one.layers[layer] if layer else one.overall for one in by_seed]
        found[layer] = {name: np.mean([getattr(one, name) for one in each], axis=0) for name in names}
    return found


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _varying(compared: Compared, body: Body) -> Compared:
    """Without the weights that read constant inputs."""
    constant = body.constant
    if constant is None or not constant.any():
        return compared

    def without(masks: Masks) -> Masks:
        return {n: emergence.varying(mask, constant) if n == body.first else mask for n, mask in masks.items()}

    by_seed = tuple(tuple(without(masks) for masks in each) for each in compared.by_seed)
    return Compared(name=compared.name, title=compared.title, labels=compared.labels, by_seed=by_seed)


def _complete(
    name: str, title: str, labels: tuple[str, ...], masks: Sequence[Sequence[Masks | None]], layers: Sequence[str]
) -> Iterator[Compared]:
    """The masks of the seeds whose states are all in the store, their layers in the model's order."""
    whole = [
        tuple(in_common([{n: mask[n] for n in layers if n in mask} for mask in seed if mask is not None]))
        for seed in masks
    ]
    by_seed = tuple(each for each in whole if len(each) == len(labels))
    if by_seed:
        yield Compared(name=name, title=title, labels=labels, by_seed=by_seed)


def _searches(ticket: Found) -> Sequence[str]:
    found: Sequence[str] = next(iter(ticket.tickets.values()))["searches"]
    return found


def _layers(ticket: Found) -> list[str]:
    """The prunable tensors in the model's order."""
    return list(json.loads(next(iter(ticket.rows.values()))["layers"]))


def _said(name: str, value: str) -> str:
    """A parameter in a title: its value alone where that says what it is of, as a criterion's name does."""
    if name == "searches":
        return "one search" if value == "1" else f"{value} searches"
    speaks = not value.replace(".", "").isdigit() and value not in ("True", "False", "None")
    return value if speaks else f"{name} {value}"
