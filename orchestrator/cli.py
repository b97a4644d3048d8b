"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from orchestrator.canonical import finite
from orchestrator.errors import InputError, OrchardistError, WorkersUnusable

if TYPE_CHECKING:
    from orchestrator.front import Front
    from orchestrator.pools.protocol import Pool
    from orchestrator.study import Study

app = typer.Typer(
    name="orchardist",
    help="Prune many neural networks side by side, and take home the ones worth keeping.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


USAGE_ERROR: Any = typer.BadParameter.__base__
"""What the words of a command line are refused with."""


class Format(StrEnum):
    """How results are printed."""

    table = "table"
    json = "json"
    csv = "csv"


StudyFile = Annotated[Path, typer.Argument(metavar="STUDY", help="the study file (TOML)")]
StudyName = Annotated[str, typer.Argument(metavar="STUDY|NAME", help="a study file, or a study's name")]
StoreUrl = Annotated[
    str, typer.Option("--store", metavar="URL", envvar="ORCHARDIST_STORE", help="a folder or any fsspec URL")
]
Formatted = Annotated[Format, typer.Option("--format", help="json prints one document on stdout, nothing else")]
Where = Annotated[list[str], typer.Option("--where", metavar="BOUND", help='such as "accuracy >= 0.95"; repeatable')]
Minimise = Annotated[
    str | None, typer.Option("--minimise", metavar="MEASURE", help="then the one with the least of it")
]
DEFAULT_STORE = "./orchard"
_LONGEST_WAIT_SECONDS = 5.0


@app.command()
def run(
    study: StudyFile,
    store: StoreUrl = DEFAULT_STORE,
    workers: Annotated[int | None, typer.Option(min=1, help="worker processes; default: all there is room for")] = None,
    address: Annotated[str | None, typer.Option(help="join a running Ray cluster from one of its nodes")] = None,
    gpus_per_worker: Annotated[
        float | None, typer.Option(min=0, help="share of a GPU for each worker; 0 forces the CPU")
    ] = None,
    local: Annotated[bool, typer.Option("--local", help="run in this process, without Ray")] = False,
    accept_task_change: Annotated[
        bool, typer.Option("--accept-task-change", help="go on although the task's code or data changed")
    ] = False,
) -> None:
    """Run a study, or go on where it stopped."""
    from orchestrator.progress import progress

    opened = _from_file(study, store)
    if not local and store.startswith("memory://"):
        raise InputError(f"--store {store}: memory lives in one process; legal with workers: a folder or another URL")
    if local and (workers or address or gpus_per_worker):
        raise InputError("--local runs in this process: legal without --workers, --address and --gpus-per-worker")

    def pool() -> Pool:
        if local:
            from orchestrator.pools.local import LocalPool

            return LocalPool()
        from orchestrator.pools.ray import RayPool

        return RayPool(workers, address=address, gpus_per_worker=gpus_per_worker)

    standing = opened.run(pool, progress=progress(), accept_task_change=accept_task_change)
    if standing.failed:
        print(f"{standing.failed} trials failed; the last: {standing.last_failure}", file=sys.stderr)
    if not standing.done:
        if standing.failed or standing.dense_failure:
            print(standing.dense_failure or "every trial failed", file=sys.stderr)
            raise typer.Exit(1)
        return
    if standing.ended < opened.spec.trials:
        print(f"the {opened.spec.sampler} sampler has no more than {standing.ended} proposals", file=sys.stderr)
    found = opened.front()
    _print_table(_front_rows(found))
    if not found.points:
        bounds = ", ".join(f"{name} {bound}" for name, bound in opened.spec.constraints.items())
        print(f"no point keeps the study's constraints ({bounds})", file=sys.stderr)
    if found.knee is not None:
        key = found.points[found.knee]["key"]
        where = "" if store == DEFAULT_STORE else f" --store {shlex.quote(store)}"
        print(f"\nThe knee of the front is {key[:12]}. To take it home:")
        print(f"  {_program()} fetch {opened.spec.name} {key[:12]} -o {opened.spec.name}-pruned{where}")


@app.command()
def status(study: StudyName, store: StoreUrl = DEFAULT_STORE, format: Formatted = Format.table) -> None:
    """How a study stands: trials, epochs asked for and run, failures."""
    found = _open(study, store).status()
    if format is Format.json:
        _print_json(found)
        return
    flat = [
        {"what": f"{what} {name}" if name else what, "value": value}
        for what, values in found.items()
        if what != "failures"
        for name, value in (values.items() if isinstance(values, Mapping) else [("", values)])
    ]
    flat += [{"what": f"failure of trial {number}", "value": reason} for number, reason in found["failures"].items()]
    _print_rows(flat, format)


@app.command()
def front(
    study: StudyName,
    store: StoreUrl = DEFAULT_STORE,
    where: Where = [],  # noqa: B006 typer wants a list
    minimise: Minimise = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="draw the front and the dense model")] = None,
    format: Formatted = Format.table,
) -> None:
    """The models that no other model beats in every objective."""
    opened = _open(study, store)
    found = opened.front(where, minimise)
    if plot is not None:
        from orchestrator.report.plot import plot_front

        plot_front(opened, found, plot)
        print(f"drawn in {plot}", file=sys.stderr)
    if format is Format.json:
        _print_json(found.as_json())
    else:
        _print_rows(_front_rows(found, whole=format is Format.csv), format)


@app.command()
def fetch(
    study: StudyName,
    key: Annotated[str | None, typer.Argument(metavar="[KEY]", help="as `front` shows it; default: the knee")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="the folder to write into")] = ...,  # type: ignore[assignment]
    store: StoreUrl = DEFAULT_STORE,
    where: Where = [],  # noqa: B006 typer wants a list
    minimise: Minimise = None,
    format: Annotated[
        str,
        typer.Option("--format", metavar="LIST", help="files to write: safetensors; json: the card on stdout"),
    ] = "safetensors",
) -> None:
    """Write one model: weights, masks, and a card that says what it is."""
    formats = format.split(",")
    for name in formats:
        if name not in ("safetensors", "table", "json"):
            there = "is not written yet" if name in ("onnx", "pt2") else "is unknown"
            raise InputError(f"--format {name} {there}; legal: safetensors, json")
    if key is not None and (where or minimise):
        raise InputError("a KEY names one model: legal without --where and --minimise")
    with redirect_stdout(sys.stderr):  # the user's task, which is run to prove the model, may print
        folder = _open(study, store).fetch(key, output, where=where, minimise=minimise)
    card = json.loads((folder / "card.json").read_text())
    if "json" in formats:
        _print_json(card)
        return
    print(f"{folder}: {', '.join(sorted(card['files']))}, card.json")
    measures = ("accuracy", "test_accuracy", "sparsity", "nonzero_params")
    print(", ".join(f"{name} {_cell(card['measures'][name])}" for name in measures if name in card["measures"]))
    print(card["says"])
    task = "" if card["task"] in _builtin_tasks() else f", task={card['task']!r}"
    print(f"In Python: orchestrator.load({str(folder)!r}{task})")


@app.command(name="list")
def list_(
    what: Annotated[str | None, typer.Argument(metavar="WHAT", help="criteria, scopes, structures, …")] = None,
    format: Formatted = Format.table,
) -> None:
    """Every choice of a kind, with a line of what it is; without WHAT, the kinds."""
    from orchestrator.catalogue import KINDS, catalogue

    _print_rows(catalogue(what) if what else [{"kind": kind} for kind in KINDS], format)


@app.command()
def check(
    study: Annotated[Path | None, typer.Argument(metavar="STUDY", help="the study file (TOML)")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="print the JSON schema of study files")] = False,
) -> None:
    """Find out what is wrong with a study and its task without running it."""
    from orchestrator.spec import StudySpec

    if schema:
        _print_json(StudySpec.model_json_schema())
        return
    if study is None:
        raise InputError("check wants a STUDY file, or --schema")
    opened = _from_file(study, "memory://check")
    info = opened.check()
    weights = sum(layer.size for layer in info.layers)
    print(
        f"{study}: a good study. {opened.spec.trials} trials x {len(opened.spec.seeds)} seeds of "
        f"{opened.spec.task!r}: {len(info.layers)} prunable layers, {weights:,} weights, "
        f"{info.train_examples:,} training examples"
    )


def main() -> None:
    """The `orchardist` command. Wrong input ends with exit code 2, an interrupt with 130."""
    try:
        with _imports_uninterrupted():
            sys.exit(app(sys.argv[1:] or ["--help"], standalone_mode=False))
    except USAGE_ERROR as error:
        context = getattr(error, "ctx", None)
        _end(f"{error.format_message()}\nsee {context.command_path if context else 'orchardist'} --help", 2)
    except (InputError, WorkersUnusable) as error:
        _end(str(error), 2)
    except OrchardistError as error:
        _end(str(error), 1)
    except KeyboardInterrupt:
        _interrupted()
    except SystemExit as end:
        if end.code == 130:  # what typer makes of an interrupt within a command
            _interrupted()
        raise
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


@contextmanager
def _imports_uninterrupted() -> Iterator[None]:
    """Within the block Ctrl-C waits for the end of an import, though not for long.

    An interrupted import can leave its module locked for good, and a thread that imports it too, such as the one
    that starts Ray, would never end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[float] = []

    def handle(number: int, frame: FrameType | None) -> None:
        asked.append(time.monotonic())
        if _importing(frame) and asked[-1] - asked[0] < _LONGEST_WAIT_SECONDS:
            again = threading.Timer(0.02, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
        else:
            asked.clear()
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handle)
    # Batch systems end a job with SIGTERM: it stops as cleanly as with Ctrl-C.
    term = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGTERM, term)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _interrupted() -> NoReturn:
    again = shlex.join([_program(), *sys.argv[1:]])
    _end(f"stopped; nothing finished is lost. To go on:\n  {again}", 130)


def _end(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(code)


def _from_file(path: Path, store: str) -> Study:
    from orchestrator.study import Study

    return Study.load(path, store)


def _open(study: str, store: str) -> Study:
    from orchestrator.spec import StudySpec
    from orchestrator.study import Study

    name = StudySpec.load(study).name if study.endswith(".toml") else study
    return Study.open(store, name)


def _builtin_tasks() -> Sequence[str]:
    from orchestrator.tasks import BUILTIN

    return list(BUILTIN)


def _front_rows(found: Front, *, whole: bool = False) -> list[dict[str, Any]]:
    """The front as rows, the dense model last; every objective and its test twin, then the size. `whole` keys."""
    names = list(dict.fromkeys(objective.column for objective in found.objectives))
    shown = list(dict.fromkeys([n for name in names for n in (name, f"test_{name}")] + ["sparsity", "nonzero_params"]))
    length = None if whole else 12
    constant = _constant([point["params"] for point in found.points])
    rows = []
    for index, point in enumerate(found.points):
        params = ", ".join(_said(name, value) for name, value in point["params"].items() if name not in constant)
        knee = index == found.knee and len(found.points) > 1
        rows.append(
            {"key": point["key"][:length], "trial": point["trial"], "round": point["round"], "n": point["n"]}
            | {name: point[name] for name in shown if name in point}
            | (point["params"] | {"knee": knee} if whole else {"params": params + (" <- knee" if knee else "")})
        )
    if found.dense is not None:
        rows.append(
            {"key": found.dense["key"][:length], "trial": "dense", "round": 0, "n": found.dense["n"]}
            | {name: found.dense[name] for name in shown if name in found.dense}
            | ({} if whole else {"params": "the unpruned model"})
        )
    return rows


def _program() -> str:
    """The command as it was called, where its folder is not on the path."""
    return "orchardist" if shutil.which("orchardist") == os.path.abspath(sys.argv[0]) else shlex.quote(sys.argv[0])


def _constant(params: Sequence[Mapping[str, Any]]) -> set[str]:
    """Names of parameters with one value for all: they tell no row from another."""
    names = {name for row in params for name in row}
    return {name for name in names if len(params) > 1 and len({repr(row.get(name)) for row in params}) == 1}


def _said(name: str, value: Any) -> str:
    """A parameter in few words: a name speaks for itself, a number needs its own."""
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    return shown if isinstance(value, str) else f"{name}={shown}"


def _print_json(document: Any) -> None:
    print(json.dumps(finite(document), indent=2, default=str, allow_nan=False))


def _print_rows(rows: Sequence[Mapping[str, Any]], format: Format) -> None:
    if format is Format.json:
        _print_json(rows)
    elif format is Format.csv:
        import csv

        writer = csv.DictWriter(sys.stdout, fieldnames=_names(rows), restval="")
        writer.writeheader()
        writer.writerows(rows)
    else:
        _print_table(rows)


def _print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Columns under their names, as wide as they must be; the same on a terminal and in a file."""
    names = _names(rows)
    cells = [names, *([_cell(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(names))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)
