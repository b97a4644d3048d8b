"""A ticket of MNIST-5k on other digits (Morcos et al., 2019): examples/transfer.toml, with its table on either task."""

from __future__ import annotations

from typing import Any

from orchestrator import Study, StudySpec
from tests.figures.markdown import compared, header, table

SEEDS = 5
EXAMPLE = "examples/transfer.toml"
FOLDER = "examples/"


def study(seeds: int) -> StudySpec:
    plain = StudySpec.load(EXAMPLE).model_dump(exclude_defaults=True)
    plain |= {"name": f"transfer-{seeds}", "seeds": list(range(seeds)), "task": FOLDER + plain["task"]}
    for task in plain["tickets"]["tasks"]:
        task["task"] = FOLDER + task["task"]
    return StudySpec(**plain)


def told(study: Study) -> str:
    ticket = study.tickets(structure=False)["tickets"][-1]
    lines = [f"### A ticket of MNIST-5k on other digits, {ticket['n']} seeds (Morcos et al., 2019)", "", _recipe(study)]
    where: list[tuple[str, dict[str, Any]]] = [("At home", ticket)]
    where += [(f"On {moved['task']}", moved) for moved in ticket["transfers"]]
    for name, found in where:
        lines += [
            "",
            f"{name}, {1 - found['sparsity']:.1%} of the weights left:",
            "",
            table(header(found), compared(found)),
        ]
    return "\n".join(lines)


def _recipe(study: Study) -> str:
    train, rounds = study.spec.train, study.spec.space["rounds"]
    return (
        f"784-128-64-10; {train.optimizer} at {train.lr:g}, batches of {train.batch_size}, {train.epochs:g} epochs; "
        f"{rounds} rounds of magnitude pruning over all layers, back to init after each; the weights that the ticket "
        "starts from go along."
    )
