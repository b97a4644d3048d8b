"""Frankle & Carbin's landmarks (2019, section 2) on 5,000 digits of MNIST: LeNet-300-100, batch 60, Adam 1.2e-3, 5,000
steps, 20 % a round layer by layer, half of that in the output layer, rewound to init; three reinits for each ticket."""

from __future__ import annotations

import json
from statistics import fmean
from typing import Any

from orchestrator import Study, StudySpec
from tests.figures.markdown import compared, header, held, table

SEEDS = 5
STEPS = 5000
PER_EPOCH = 67
"""Batches of 60 in 4,000 examples."""
ROUNDS = (7, 11)
"""Those that leave about 21 % and 9 %."""
WEIGHTS = {"fc1.weight": 784 * 300, "fc2.weight": 300 * 100, "out.weight": 100 * 10}


def study(seeds: int) -> StudySpec:
    return StudySpec(
        name=f"lenet-landmarks-{seeds}",
        task="mnist",
        trials=1,
        seeds=list(range(seeds)),
        sampler="random",
        train={
            "epochs": STEPS / PER_EPOCH,
            "optimizer": "adam",
            "lr": 1.2e-3,
            "batch_size": 60,
            "evaluate_every": 100 / PER_EPOCH,
        },
        prune={"layer_factors": {"out": 0.5}},
        tickets={"controls": ["dense", "one-shot", "reinitialised"], "draws": 3, "rounds": list(ROUNDS)},
        space={"criterion": "magnitude", "scope": "layer", "rate": 0.2, "rounds": max(ROUNDS), "retrain": "rewind"},
    )


def told(study: Study) -> str:
    tickets = {ticket["round"]: ticket for ticket in study.tickets()["tickets"]}
    lines = [f"### LeNet-300-100 on MNIST-5k, {len(study.spec.seeds)} seeds (Frankle & Carbin, 2019)"]
    for number in ROUNDS:
        ticket = tickets[number]
        against = ticket["controls"]
        lines += ["", f"Round {number}: {1 - ticket['sparsity']:.1%} of the weights left."]
        lines += ["", table(header(ticket), compared(ticket)), ""]
        lead = -against["dense"]["difference"]
        lines.append(held(f"the mean ticket is no more than a point below dense ({-lead:+.2f})", lead <= 1))
        sooner = -against["reinitialised"]["steps"]["difference"]
        lines.append(
            held(f"it reaches its best validation loss before the reinit (by {sooner:,.0f} steps)", sooner > 0)
        )
        least = against["reinitialised"]["difference"] - against["reinitialised"]["half_width"]
        lines.append(held(f"it is better than the reinit, interval above 0 (from {least:+.2f})", least > 0))
    rows = study.table().to_pylist()
    right = {number: exact(rows, number) for number in range(1, max(ROUNDS) + 1)}
    lines.append(held(f"exact kept counts in each of {len(right)} rounds and layers, every seed", all(right.values())))
    curve = [
        [number, f"{1 - t['sparsity']:.1%}", f"{t['test_accuracy']:.2%}", f"{t['steps_to_best']:,.0f}"]
        for number, t in sorted(tickets.items())
    ]
    dense = [row for row in rows if row["trial"] == -1]
    curve.insert(0, ["0", "100.0%", f"{fmean(row['test_accuracy'] for row in dense):.2%}", ""])
    lines += ["", table(("round", "weights left", "test accuracy", "steps to best validation loss"), curve)]
    return "\n".join(lines)


def exact(rows: list[dict[str, Any]], number: int) -> bool:
    """Whether every seed's layers keep what the rule says after so many rounds."""
    found = [json.loads(row["layers"]) for row in rows if row["trial"] == 0 and row["round"] == number]
    wanted = {name: [kept(size, 10 if name == "out.weight" else 5, number), size] for name, size in WEIGHTS.items()}
    return bool(found) and all(layers == wanted for layers in found)


def kept(size: int, part: int, rounds: int) -> int:
    """What is left when a `part`-th of what is left, rounded half up, goes in each round."""
    for _ in range(rounds):
        size -= (2 * size + part) // (2 * part)
    return size
