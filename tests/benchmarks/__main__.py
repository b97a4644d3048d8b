"""`make bench`: every figure in one run, printed as one Markdown table, and each removal in a second. About fifteen
minutes on two cores.

    python -m tests.benchmarks [--limit N]        with --limit, a quick look: only the first N of the 40 proposals, …

Every script runs in a process of its own, one after the other; what each one is doing goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

HERE = Path(__file__).parent
COMMAND = Path(sys.executable).with_name("orchardist")
CRITERIA = {"l1": "magnitude", "random": "random"}


def measure(script: str, *arguments: object) -> dict[str, Any]:
    """The JSON line that a script prints, with `wall`: the seconds of its whole process."""
    words = [str(argument) for argument in arguments]
    print(f"{script} {' '.join(words)}".rstrip(), file=sys.stderr, flush=True)
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "RAY_AUTH_MODE": "disabled"}
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, HERE / script, *words], stdout=subprocess.PIPE, text=True, check=True, env=environment
    )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found | {"wall": time.perf_counter() - began}


def outcomes(store: str) -> list[dict[str, Any]]:
    """What was measured of the proposals."""
    columns = ["round", "params", "test_accuracy", "seconds"]
    rows: list[dict[str, Any]] = pq.read_table(
        Path(store, "studies", "proposals", "outcomes.parquet"), columns=columns
    ).to_pylist()
    return rows


def last_accuracies(rows: list[dict[str, Any]], proposals: list[dict[str, Any]]) -> list[float]:
    """Test accuracy of each proposal's last round; proposals that share a chain find it under the first of them."""
    reached = {}
    for row in rows:
        params = json.loads(row["params"])
        if params:
            reached[params["criterion"], params["rate"], params["retrain"], row["round"]] = row["test_accuracy"]
    return [
        reached[CRITERIA[wanted["criterion"]], wanted["amount"], wanted["strategy"], wanted["rounds"]]
        for wanted in proposals
    ]


def same_proposals(limit: int | None) -> list[tuple[str, ...]]:
    """The same 40 proposals here and under Ray Tune, and the bare loop beside them."""
    proposals = json.loads((HERE / "proposals.json").read_text())[:limit]
    some = ("--limit", len(proposals))
    with tempfile.TemporaryDirectory() as store:
        ours = measure("shared_prefixes.py", *some, "--store", store)
        measured = outcomes(store)
    accuracies = last_accuracies(measured, proposals)
    tuned = measure("ray_tune_baseline.py", "--variant", "tuned", *some)
    plain = measure("ray_tune_baseline.py", "--variant", "plain", *some)
    bare = measure("bare_loop.py")["epochs_per_second"]
    rows: list[tuple[str, ...]] = []
    for variant, theirs, goal in (("plain", plain, 10.0), ("tuned", tuned, 5.5)):
        other = [trial["test_accuracy"] for trial in theirs["trials"]]
        apart = [a - b for a, b in zip(accuracies, other, strict=True)]
        error = statistics.stdev(apart) / len(apart) ** 0.5 if len(apart) > 1 else float("nan")
        rows += [
            (
                f"{len(proposals)} proposals, seconds; beside Ray Tune, {variant}",
                f"{ours['wall']:.1f}",
                f"{theirs['wall']:.1f}",
                f"{theirs['wall'] / ours['wall']:.1f}×",
                f"{goal:g}×",
            ),
            (
                f"their mean test accuracy; beside Ray Tune, {variant}",
                f"{statistics.mean(accuracies):.3f}",
                f"{statistics.mean(other):.3f}",
                f"{statistics.mean(apart):+.3f} ± {error:.3f}",
                "within seed noise",
            ),
        ]
    speed = ours["epochs_run"] / sum(row["seconds"] for row in measured)
    overall = ours["epochs_run"] / ours["wall"] / 2
    rows += [
        (
            "their epochs run; beside those asked for",
            f"{ours['epochs_run']:.0f}",
            f"{ours['epochs_asked']:.0f}",
            "",
            "",
        ),
        (
            "epochs a second in a worker; beside the bare loop",
            f"{speed:.1f}",
            f"{bare:.1f}",
            f"{speed / bare:.0%}",
            "85%",
        ),
        ("the same over the whole command, per core", f"{overall:.1f}", f"{bare:.1f}", f"{overall / bare:.0%}", ""),
    ]
    return rows


def overhead(trials: int) -> list[tuple[str, ...]]:
    """Trials that do nothing."""
    theirs = measure("ray_tune_overhead.py", "--trials", min(trials, 200))
    rows: list[tuple[str, ...]] = []
    for sampler, count in (("random", trials), ("tpe", min(trials, 2000))):
        ours = measure("overhead.py", "--trials", count, "--sampler", sampler)
        rows.append(
            (
                f"empty trials a second, sampler {sampler}; beside Ray Tune, random",
                f"{ours['per_s']:.0f}",
                f"{theirs['trials_per_second']:.1f}",
                f"{ours['per_s'] / theirs['trials_per_second']:.0f}×",
                "200" if sampler == "random" else "",
            )
        )
        if sampler == "random" and "kb_per_trial" in ours:
            growth = f"{ours['kb_per_trial']:.1f}"
            rows.append((f"driver memory, KB a trial up to {count:,} trials", growth, "", "", "< 10"))
    return rows


def reading(count: int) -> list[tuple[str, ...]]:
    """The front of many outcomes, and Optuna's of 10,000 trials."""
    ours = measure("reading.py", "--rows", count)
    theirs = measure("optuna_best_trials.py")
    per_row, their_row = ours["front_s"] / ours["rows"], theirs["seconds"] / theirs["trials"]
    return [
        (
            f"front of {count:,} outcomes, seconds beyond start-up; beside the bare scan",
            f"{ours['front_s']:.2f}",
            f"{ours['scan_s']:.2f}",
            "",
            "< 1",
        ),
        (
            f"microseconds a row; beside Optuna's best_trials at {theirs['trials']:,}",
            f"{1e6 * per_row:.2f}",
            f"{1e6 * their_row:.1f}",
            f"{their_row / per_row:.0f}×",
            "30×",
        ),
    ]


def masking(weights: int) -> list[tuple[str, ...]]:
    """One global pruning of many weights, with few and with many of them equal."""
    rows: list[tuple[str, ...]] = []
    for tied in (10, 3):
        ours = measure("masking.py", "--weights", weights, "--tied", tied)
        assert ours["exact"], ours
        what = f"{ours['weights']:,} weights masked globally, {ours['at_threshold']:.0%} of them equal at the threshold"
        rows += [
            (f"{what}: seconds on one core", f"{ours['seconds']:.1f}", "", "", "< 10"),
            (f"{what}: peak memory over the weights'", f"{ours['memory']:.1f}×", "", "", "3×"),
        ]
    return rows


def updates(repeats: int) -> list[tuple[str, ...]]:
    """A new mask in the middle of training."""
    return [
        (
            f"milliseconds for a mask update while training {row['model']}; beside a step",
            f"{row['update_ms']:.2f}",
            f"{row['step_ms']:.2f}",
            f"{row['steps']:.2f}×",
            "2×",
        )
        for row in measure("updates.py", "--repeats", repeats)["rows"]
    ]


def removal(repeats: int) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """What is removed from every model: rows of the first table that say it in short, and a table of its own."""
    found = measure("removal.py", "--repeats", repeats)["rows"]
    short: list[tuple[str, ...]] = []
    for batch in ("1", "64"):
        over, noise = ([row[what][batch] for row in found] for what in ("over_limit", "noise"))
        what = f"latency at batch {batch} after {len(found)} removals, over that of the same built so narrow"
        for which, function in (("median", statistics.median), ("the worst", max)):
            ours, theirs = f"{function(over):.2f}×", f"{function(noise):.2f}×"
            short.append((f"{what}; beside the latter twice: {which}", ours, theirs, "", "1.05×"))
    largest = f"{max(row['bytes'] for row in found):.0%}"
    short.append(("the largest file after removal, of the dense one's", largest, "", "", "100%"))
    header = (
        "removed, of all such units in each layer",
        "FLOPs",
        "file",
        "latency at batch 1",
        "at 64",
        "over built so narrow, 1",
        "at 64",
        "masked to shrunk",
        "Torch-Pruning: file",
        "latency at batch 1",
        "at 64",
        "",
    )
    full = [header, ("---", *["---:"] * (len(header) - 2), "---")]
    for row in found:
        multiple = "" if row["multiple"] == 1 else f", rounded to {row['multiple']}"
        theirs = row["beside"]
        latency = theirs.get("latency", {})
        full.append(
            (
                f"{row['model']}: {row['share']:.0%} of {row['structure']}s{multiple}",
                f"{row['flops']:.0%}",
                f"{row['bytes']:.0%}",
                f"{row['latency']['1']:.0%}",
                f"{row['latency']['64']:.0%}",
                f"{row['over_limit']['1']:.2f}×",
                f"{row['over_limit']['64']:.2f}×",
                f"{row['difference']:.0e}",
                f"{theirs['bytes']:.0%}" if "bytes" in theirs else "",
                f"{latency['1']:.0%}" if latency else "",
                f"{latency['64']:.0%}" if latency else "",
                theirs["fault"] or "",
            )
        )
    return short, full


def help_page() -> list[tuple[str, ...]]:
    """The shortest of five times of `orchardist --help`."""
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([COMMAND, "--help"], stdout=subprocess.DEVNULL, check=True)
        best = min(best, time.perf_counter() - began)
    return [("`orchardist --help`, seconds", f"{best:.2f}", "", "", "< 0.5")]


def main() -> None:
    """Measure everything and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, help="a quick look: N proposals, 100·N empty trials, 10,000·N outcomes")
    limit = parser.parse_args().limit
    removed, removals = removal(10 * limit if limit else 150)
    rows = [
        *help_page(),
        *same_proposals(limit),
        *overhead(100 * limit if limit else 20_000),
        *reading(10_000 * limit if limit else 1_000_000),
        *masking(1_000_000 * limit if limit else 100_000_000),
        *updates(limit or 15),
        *removed,
    ]
    versions = ", ".join(f"{name} {version(name)}" for name in ("orchardist", "torch", "ray", "optuna"))
    header = (
        f"{os.cpu_count()} cores, Python {platform.python_version()}, {versions}",
        "Orchardist",
        "beside",
        "",
        "goal",
    )
    lines = [header, ("---", "---:", "---:", "---:", "---:"), *rows]
    for table in (lines, removals):
        print("\n".join(f"| {' | '.join(line)} |" for line in table), end="\n\n")


if __name__ == "__main__":
    main()
