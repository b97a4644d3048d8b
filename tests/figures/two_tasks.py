"""Consensus of searches on two tasks beside that of two data orders: MNIST-5k and other digits, one round each."""

from __future__ import annotations

from orchestrator import Study, StudySpec
from tests.figures.markdown import compared, header, table

SEEDS = 5
TASK = "examples/transfer_task.py"
SPARSITY = 0.8
CONTROLS = ("dense", "dense-long", "one-shot", "imp", "shuffled", "random-layer", "reinitialised")


def study(seeds: int) -> StudySpec:
    return StudySpec(
        name=f"two-tasks-{seeds}",
        task=TASK,
        trials=2,
        seeds=list(range(seeds)),
        sampler="grid",
        train={"epochs": 5, "optimizer": "adam", "lr": 1e-3, "batch_size": 64},
        tickets={
            "controls": list(CONTROLS),
            "tasks": [{"name": "digits", "task": TASK, "task_params": {"data": "digits"}}],
        },
        space={
            "scope": "global",
            "sparsity": SPARSITY,
            "retrain": "rewind",
            "searches": 2,
            "vary": ["order", "tasks"],
            "rule": "intersection",
        },
    )


def told(study: Study) -> str:
    tickets = study.tickets(structure=False)["tickets"]
    lines = [f"### Two searches intersected after one round, MNIST-5k, {tickets[0]['n']} seeds"]
    for ticket in tickets:
        overlap = ticket["overlap"]
        lines += [
            "",
            f"Searches that differ in their {ticket['params']['vary']}: {ticket['sparsity']:.1%} sparse, found in "
            f"{ticket['trainings']} trainings, {ticket['depth']} in a row; they agree {overlap['jaccard']:.3f} (Jaccard), "
            f"by chance {overlap['chance']:.3f}.",
            "",
            table(header(ticket), compared(ticket)),
        ]
    return "\n".join(lines)
