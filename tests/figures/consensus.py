"""Consensus against iterative pruning: five searches of two rounds in five data orders, intersected (Paganini & Forde,
2020), beside every control at the ticket's own sparsity; and what it costs beside iterative pruning to that sparsity."""

from __future__ import annotations

import json
import tempfile
import time
from math import ceil, log
from os import cpu_count, getloadavg
from typing import Any

from orchestrator import Study, StudySpec
from orchestrator.pools.local import LocalPool
from tests.figures.markdown import compared, header, table

SEEDS = 5
CONTROLS = (
    *("dense", "dense-long", "one-shot", "imp", "shuffled", "random", "random-layer", "inverted"),
    *("reinitialised", "sign-kept", "sign-constant"),
)
SEARCHES, ROUNDS = 5, 2
TIMED_WORKERS = 2


def study(seeds: int, rate: float = 0.2, **fields: Any) -> StudySpec:
    consensus = {"rate": rate, "rounds": ROUNDS, "searches": SEARCHES, "vary": "order", "rule": "intersection"}
    plain: dict[str, Any] = {
        "name": f"consensus-{seeds}" if rate == 0.2 else f"consensus-{rate:g}-{seeds}",
        "task": "mnist",
        "trials": 1,
        "seeds": list(range(seeds)),
        "sampler": "random",
        "train": {"epochs": 20, "optimizer": "adam", "lr": 1.2e-3, "batch_size": 60},
        "tickets": {"controls": list(CONTROLS)},
        "space": {"criterion": "magnitude", "scope": "global", "retrain": "rewind"} | consensus,
    }
    return StudySpec(**(plain | fields))


def told(study: Study) -> str:
    (ticket,) = study.tickets()["tickets"]
    rate, sparsity = ticket["params"]["rate"], ticket["sparsity"]
    overlap, left = ticket["overlap"], (1 - sparsity) / (1 - rate) ** (SEARCHES * ROUNDS)
    lines = [
        f"### {SEARCHES} data orders intersected after {ROUNDS} rounds of {rate:.0%}, MNIST-5k, {ticket['n']} seeds "
        "(Paganini & Forde, 2020)",
        "",
        f"{sparsity:.1%} sparse; searches agree {overlap['jaccard']:.3f} (Jaccard), by chance {overlap['chance']:.3f}; "
        f"{left:.1f} times as many weights are left as independent masks would leave.",
        "",
        table(header(ticket), compared(ticket)),
        "",
        timed(rate, sparsity),
    ]
    return "\n".join(lines)


def timed(rate: float, sparsity: float) -> str:
    """Each search alone under one seed in a new store, and its ticket trained: no controls, and nothing shared."""
    space = {"criterion": "magnitude", "scope": "global", "retrain": "rewind", "sparsity": round(sparsity, 6)}
    needed = ceil(log(1 - sparsity) / log(1 - rate))
    by_chance = SEARCHES * ROUNDS
    specs = {
        "consensus": study(1, rate, name="consensus", tickets={}),
        f"IMP, {by_chance} rounds, as chance agreement would stand for": study(
            1, name="imp", tickets={}, space=space | {"rounds": by_chance}
        ),
        f"IMP, {needed} rounds of {rate:.0%} at most": study(
            1, name="imp", tickets={}, space=space | {"rounds": needed}
        ),
    }
    rows = [[name, *_timed(spec)] for name, spec in specs.items()]
    columns = ("trainings in a row", "in all", "CPU time", "wall, 1 worker", f"wall, {TIMED_WORKERS} workers")
    busy = f"Wall times with {getloadavg()[0]:.1f} processes at work on {cpu_count()} cores at the end of it."
    return f"{table(('one seed, its ticket trained', *columns), rows)}\n\n{busy}"


def _timed(spec: StudySpec) -> list[object]:
    with tempfile.TemporaryDirectory() as store:
        began = time.process_time()
        Study(spec, store).run(LocalPool())
        cpu = time.process_time() - began
        alone = elapsed(Study.open(store, spec.name))
        found = Study.open(store, spec.name).tickets()["tickets"][-1]
    with tempfile.TemporaryDirectory() as store:
        Study(spec, store).run(workers=TIMED_WORKERS)
        together = elapsed(Study.open(store, spec.name))
    # The ticket's own training is one more, in a row and in all.
    return [found["depth"] + 1, found["trainings"] + 1, f"{cpu:.0f} s", f"{alone:.0f} s", f"{together:.0f} s"]


def elapsed(study: Study) -> float:
    """Seconds from the first stage's beginning to the last one's end, without the start of the workers."""
    events = study.store.table(study.spec.name, "events").to_pylist()
    work = [event for event in events if event["event"] == "work"]
    began = min(event["at"] - json.loads(event["detail"])["seconds"] for event in work)
    return float(max(event["at"] for event in work) - began)
