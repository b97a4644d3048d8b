"""`make chaos`: a small study is disturbed in every way that is known, and compared with the undisturbed one.

    python -m tests.chaos [SCENARIO…] [--seed S] [--runs N] [--minutes M]

Prints a Markdown table and ends by itself: after so many runs of each scenario, and no run begins after M minutes.
Exits with 1 when a scenario was not run, or anything differs: a finished stage that is lost or run again, a row that
counts twice, other keys, measures, weights or points of the front, or more training that was done twice than lies
between two stored states.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.chaos import processes, storage
from tests.chaos.judge import Reference, Verdict
from tests.chaos.place import Place
from tests.chaos.study import STEPS, STEPS_PER_EPOCH, steps, undisturbed, write
from tests.faulty import FAULTS

Scenario = Callable[[Place], Verdict]

SCENARIOS: dict[str, tuple[Scenario, int]] = {
    "driver killed": (processes.driver, 20),
    "driver killed between checkpoints": (processes.driver_between_checkpoints, 3),
    "driver of two Ray workers killed": (processes.driver_with_workers, 2),
    "Ray workers killed": (processes.workers, 2),
    "raylet killed": (processes.raylet, 2),
    "S3 server killed": (processes.server, 3),
    "clocks an hour apart, the driver killed or asleep": (processes.clocks, 4),
    "two drivers at once": (processes.at_once, 50),
    "two studies at once": (processes.side_by_side, 4),
    "files cut off, foreign files": (storage.planted, 12),
    "disk full": (storage.full_disk, 3),
    **{f"the n-th call {fault}": (storage.call(fault), 8) for fault in FAULTS},
}
"""What is done to the study, and how often if nobody says otherwise."""

HEADER = (
    *("scenario", "runs", "faults", "stages lost", "rows doubled", "keys equal", "weights equal", "epochs re-run"),
    "seconds",
)


def main() -> int:
    """Disturb, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help="words of their names; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=int, help="of each scenario; by default each has its own number")
    parser.add_argument("--minutes", type=float, default=20.0, help="no run begins later than this")
    options = parser.parse_args()
    names = [name for name in SCENARIOS if not options.scenarios or any(word in name for word in options.scenarios)]
    if not names:
        parser.error(f"no scenario has such a name; there are: {'; '.join(SCENARIOS)}")
    quiet()
    deadline = time.monotonic() + 60 * options.minutes
    print(f"| {' | '.join(HEADER)} |\n| {' | '.join(['---'] * len(HEADER))} |", flush=True)
    complaints: list[str] = []
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        root, reference = prepared(Path(folder))
        for name in names:
            began = time.monotonic()
            found = list(disturbed(name, Path(folder), root, reference, options.seed, options.runs, deadline))
            print(f"| {' | '.join(row(name, found, time.monotonic() - began))} |", flush=True)
            complaints += [] if found else [f"{name}: there was no time left for it"]
            complaints += [f"{name}, run {n}: {line}" for n, verdict in enumerate(found) for line in verdict.says]
    if complaints:
        print(*complaints, sep="\n", file=sys.stderr)
    return 1 if complaints else 0


def quiet() -> None:
    """What every process of a soak has in its environment, as under the tests."""
    os.environ.update({"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"})
    os.environ.pop("ORCHARDIST_STORE", None)
    logging.getLogger("orchardist").setLevel(logging.CRITICAL)  # of damage there is much to say here


def prepared(folder: Path) -> tuple[Path, Reference]:
    """The folder of the task, and what the study comes to undisturbed."""
    root = write(folder / "root")
    counted = folder / "undisturbed-steps"
    os.environ[STEPS] = str(counted)
    try:
        study = undisturbed(folder / "undisturbed", root)
    finally:
        del os.environ[STEPS]
    return root, Reference.of(study, steps(counted))


def disturbed(
    name: str, folder: Path, root: Path, reference: Reference, seed: int, runs: int | None, deadline: float
) -> Iterator[Verdict]:
    """The verdicts on the runs of a scenario, one after the other."""
    scenario, of = SCENARIOS[name]
    for number in range(runs or of):
        if time.monotonic() > deadline:
            return
        draw = random.Random(f"{seed} {name} {number}")
        with tempfile.TemporaryDirectory(prefix=f"run{number}-", dir=folder, ignore_cleanup_errors=True) as place:
            here = Place(folder=Path(place), root=root, reference=reference, draw=draw, number=number, of=runs or of)
            try:
                yield scenario(here)
            except Exception as error:  # a study that cannot even be looked at is a finding, too
                yield Verdict(
                    faults=1,
                    lost=0,
                    doubled=0,
                    keys=False,
                    weights=False,
                    steps_again=0,
                    says=(*here.must(None), repr(error)),
                )


def row(name: str, found: list[Verdict], seconds: float) -> list[str]:
    """A scenario's line of the table; one that never ran proves nothing."""
    if not found:
        return [name, "0", *[""] * (len(HEADER) - 3), f"{seconds:.0f}"]
    return [
        name,
        str(len(found)),
        str(sum(verdict.faults for verdict in found)),
        str(sum(verdict.lost for verdict in found)),
        str(sum(verdict.doubled for verdict in found)),
        "yes" if all(verdict.keys for verdict in found) else "NO",
        "yes" if all(verdict.weights for verdict in found) else "NO",
        f"{sum(verdict.steps_again for verdict in found) / STEPS_PER_EPOCH:.2f}",
        f"{seconds:.0f}",
    ]


if __name__ == "__main__":
    sys.exit(main())
