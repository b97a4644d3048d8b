"""`make figures`: what the papers on lottery tickets found, measured here on data that ship inside packages.

    python -m tests.figures [FIGURE…] [--store DIR] [--workers N] [--seeds N]      the figures are the modules beside this

One Markdown table after the other; an hour in all on one core that is free. Every result is kept in the store, so
that a second call only prints. Without --workers everything runs in this process, on one thread.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from orchestrator import Study, StudySpec
from orchestrator.pools.local import LocalPool
from tests.figures import consensus, consensus_50, lenet, mnist1d, transfer, two_tasks

FIGURES = {
    "lenet": lenet,
    "mnist1d": mnist1d,
    "consensus": consensus,
    "consensus_50": consensus_50,
    "two_tasks": two_tasks,
    "transfer": transfer,
}


def finished(spec: StudySpec, store: Path, workers: int) -> Study:
    """The study, run to its end."""
    study = Study(spec, store)
    standing = study.run(workers=workers) if workers else study.run(LocalPool())
    assert not standing.failed, standing.last_failure
    return study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help=f"of {', '.join(FIGURES)}; default: all")
    parser.add_argument("--store", type=Path, default=Path("orchard/figures"))
    parser.add_argument("--workers", type=int, default=0, help="on Ray; default: this process")
    parser.add_argument("--seeds", type=int, help="fewer, or more, than the figure's own")
    options = parser.parse_args()
    unknown = set(options.figures) - FIGURES.keys()
    if unknown:
        parser.error(f"no figure is called {', '.join(sorted(unknown))}; there are {', '.join(FIGURES)}")
    for name in options.figures or FIGURES:
        figure = FIGURES[name]
        study = finished(figure.study(options.seeds or figure.SEEDS), options.store, options.workers)
        print(figure.told(study), flush=True)
        print()


if __name__ == "__main__":
    main()
