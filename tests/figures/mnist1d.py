"""MNIST-1D (Greydanus & Kobak, 2024): a 40-500-500-10 network, Adam 2e-2, 1,500 steps of 100, magnitude layer by layer to
92 % in 12 rounds, rewound to init; beside random masks, and with the neighbourhoods of its first layer counted."""

from __future__ import annotations

from statistics import fmean

from orchestrator import Study, StudySpec
from orchestrator.state import from_bytes
from orchestrator.tickets.emergence import Found, adjacent_pairs
from tests.figures.markdown import compared, header, held, table

SEEDS = 6
STEPS = 1500
PER_EPOCH = 32
"""Batches of 100 in 3,200 examples."""
ROUNDS = 12
CONTROLS = ("dense", "one-shot", "random", "random-layer", "shuffled", "reinitialised")


def study(seeds: int) -> StudySpec:
    return StudySpec(
        name=f"mnist1d-tickets-{seeds}",
        task="mnist1d",
        task_params={"hidden": 500, "hidden2": 500},
        trials=1,
        seeds=list(range(seeds)),
        sampler="random",
        train={"epochs": STEPS / PER_EPOCH, "optimizer": "adam", "lr": 2e-2, "batch_size": 100},
        tickets={"controls": list(CONTROLS)},
        space={"criterion": "magnitude", "scope": "layer", "sparsity": 0.92, "rounds": ROUNDS, "retrain": "rewind"},
    )


def told(study: Study) -> str:
    ticket = next(ticket for ticket in study.tickets()["tickets"] if ticket["round"] == ROUNDS)
    random = ticket["controls"]["random"]
    least = random["difference"] - random["half_width"]
    ours = [neighbours(study, key) for key in ticket["keys"]]
    drawn = [neighbours(study, row["key"]) for row in controls(study, "random-layer")]
    lines = [f"### MNIST-1D at {ticket['sparsity']:.1%} sparse, {ticket['n']} seeds (Greydanus & Kobak, 2024)", ""]
    lines += [table(header(ticket), compared(ticket)), ""]
    lines.append(
        held(f"ticket - random mask is 3 points or more ({random['difference']:+.2f})", random["difference"] >= 3)
    )
    lines.append(held(f"its interval is above 0 (from {least:+.2f})", least > 0))
    more = all(found.value > found.chance for found in ours)
    lines.append(
        held("the first layer keeps more neighbouring inputs together than a random mask would, each seed", more)
    )
    rows = [
        [
            name,
            f"{fmean(f.value for f in found):,.0f}",
            f"{fmean(f.chance for f in found):,.0f}",
            f"{fmean(f.z for f in found):+.1f}",
        ]
        for name, found in (("the ticket", ours), ("a drawn mask of the same layer shares", drawn))
    ]
    lines += ["", table(("first-layer mask", "adjacent kept pairs", "by chance", "z"), rows)]
    return "\n".join(lines)


def neighbours(study: Study, key: str) -> Found:
    """The pairs of neighbouring samples that the units of the first layer keep, beside chance."""
    data = study.store.states.read(key)
    assert data is not None
    return adjacent_pairs(from_bytes(data).masks["fc1.weight"], (40,))


def controls(study: Study, kind: str) -> list[dict[str, str]]:
    """The trained controls of one kind by key."""
    from orchestrator.tickets.study.table import read

    return [dict(row) for found in read(study) for drawn in found.controls.get(kind, {}).values() for row in drawn]
