"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from orchestrator.errors import InputError, OrchardistError, WorkersUnusable
from orchestrator.interrupts import heard
from orchestrator.pools.shipped import AGAIN_VARIABLE
from orchestrator.printing import Format, cell, front_rows, hypervolume_line, print_json, print_rows, print_table
from orchestrator.store.address import without_credentials, without_secrets
from orchestrator.store.paths import DEFAULT_STORE

if TYPE_CHECKING:
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
GpusPerWorker = Annotated[
    float | None, typer.Option(min=0, help="share of a GPU for each worker; 0: the CPU; default: 1 where there are any")
]
Resource = Annotated[
    list[str], typer.Option(metavar="NAME=AMOUNT", help="a custom resource that each worker takes; repeatable")
]
LabelSelector = Annotated[
    list[str], typer.Option(metavar="KEY=VALUE", help="workers only on nodes with this label; repeatable")
]
CacheGb = Annotated[
    float | None,
    typer.Option(metavar="F", help="each worker's memory for recent states; default: 1/8 of its part of the machine's"),
]


@app.command()
def run(
    study: StudyFile,
    store: StoreUrl = DEFAULT_STORE,
    workers: Annotated[int | None, typer.Option(min=1, help="worker processes; default: all there is room for")] = None,
    address: Annotated[str | None, typer.Option(help="join a running Ray cluster from one of its nodes")] = None,
    gpus_per_worker: GpusPerWorker = None,
    resource: Resource = [],  # noqa: B006 typer wants a list
    label_selector: LabelSelector = [],  # noqa: B006 typer wants a list
    cache_gb: CacheGb = None,
    local: Annotated[bool, typer.Option("--local", help="run in this process, without Ray")] = False,
    log: Annotated[
        str | None, typer.Option(metavar="FILE", help="add a JSON line for each thing that happens; -: on stderr")
    ] = None,
    accept_task_change: Annotated[
        bool, typer.Option("--accept-task-change", help="go on although the task's code or data changed")
    ] = False,
) -> None:
    """Run a study, or go on where it stopped."""
    from orchestrator.joblog import lines_to
    from orchestrator.pools.cache import asked_bytes
    from orchestrator.pools.share import share
    from orchestrator.progress import Silent, progress

    taken, cache = share(gpus_per_worker, resource, label_selector), asked_bytes(cache_gb)
    opened = _from_file(study, store)
    if not local and store.startswith("memory://"):
        raise InputError(f"--store {store}: memory lives in one process; legal with workers: a folder or another URL")
    if local and (workers or address or taken != share(None, [], [])):
        raise InputError("--local runs in this process: legal without --workers, --address and what workers take")

    def pool() -> Pool:
        if local:
            from orchestrator.pools.local import LocalPool

            return LocalPool(cache=cache)
        from orchestrator.pools.ray import RayPool

        return RayPool(workers, address=address, share=taken, cache=cache)

    with lines_to(log):
        shown = Silent() if log == "-" else progress()
        standing = opened.run(pool, progress=shown, accept_task_change=accept_task_change)
    for line in opened.noted().get("warm_start", {}).get("says", ()):
        print(line, file=sys.stderr)
    if standing.failed:
        print(f"{standing.failed} trials failed; the last: {standing.last_failure}", file=sys.stderr)
    if not standing.done:
        if standing.failed or standing.dense_failure:
            print(standing.dense_failure or "every trial failed", file=sys.stderr)
            raise typer.Exit(1)
        return
    if few := opened.spec.too_few():
        print(f"{study}: {few}", file=sys.stderr)
    found = opened.front()
    print_table(front_rows(found))
    if not found.points:
        bounds = ", ".join(f"{name} {bound}" for name, bound in opened.spec.constraints.items())
        print(f"no point keeps the study's constraints ({bounds})", file=sys.stderr)
    if found.knee is not None:
        key = found.points[found.knee]["key"]
        where = "" if store == DEFAULT_STORE else f" --store {shlex.quote(opened.store.name)}"
        print(f"\nThe knee of the front is {key[:12]}. To take it home:")
        print(f"  {_program()} fetch {opened.spec.name} {key[:12]} -o {opened.spec.name}-pruned{where}")


@app.command()
def submit(
    context: typer.Context,
    study: StudyFile,
    address: Annotated[str, typer.Option(metavar="http://HEAD:8265", help="the dashboard of a Ray cluster")],
    store: StoreUrl = DEFAULT_STORE,
    follow: Annotated[bool, typer.Option("--follow", help="show what the driver writes until the study ends")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="worker processes; default: all there is room for")] = None,
    gpus_per_worker: GpusPerWorker = None,
    resource: Resource = [],  # noqa: B006 typer wants a list
    label_selector: LabelSelector = [],  # noqa: B006 typer wants a list
    cache_gb: CacheGb = None,
    include: Annotated[
        list[Path],
        typer.Option("--include", metavar="PATH", help="a file or folder below the study's to send too; repeatable"),
    ] = [],  # noqa: B006 typer wants a list
    log: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="add a JSON line for each thing that happens; -: in the job's log"),
    ] = None,
    accept_task_change: Annotated[
        bool, typer.Option("--accept-task-change", help="go on although the task's code or data changed")
    ] = False,
) -> None:
    """Run a study as a job on a Ray cluster. It goes on when this machine is switched off."""
    from orchestrator.jobs import submit as jobs
    from orchestrator.jobs.shipping import shipment
    from orchestrator.pools.cache import asked_bytes
    from orchestrator.pools.share import share
    from orchestrator.spec import StudySpec

    jobs.refuse_store(store)
    jobs.refuse_log(log)
    share(gpus_per_worker, resource, label_selector)
    asked_bytes(cache_gb)
    shipped = shipment(study, include)
    name = StudySpec.load(study).name
    client, token = jobs.connect(address), jobs.wants_token(address)
    command = jobs.entrypoint(shipped, jobs.options_of(context))
    again = shlex.join([_program(), *sys.argv[1:]])
    found = jobs.submit(client, shipped, name=name, store=store, command=command, again=again)
    stop = jobs.by_hand(address, "stop", found.id, token=token)

    def told(line: str) -> None:
        print(line, file=sys.stderr)

    if found.joined:
        told(f"{name} runs already, as the job {found.id}; this command joins it")
        if found.differs:
            other = " and ".join(found.differs)
            told(f"it was started with other {other} than these; for these: {stop}, then submit again")
    else:
        for row in shipped.rows():
            told(f"sent {row['file']}: {row['bytes']:,} bytes")
        for path in shipped.left:
            told(f"not sent, every node must have it: {path}")
        for path in shipped.withheld:
            told(f"not sent, it may hold credentials: {path} (to send it all the same: --include {path})")
        told(f"submitted as the job {found.id}")
    try:
        if follow:
            code = jobs.follow(client, found.id, lambda text: print(text, end="", flush=True), told)
            raise typer.Exit(code)
        begun = jobs.wait_until_begun(client, found.id)
    except KeyboardInterrupt:
        told(f"the job {found.id} goes on; the same command joins it again. To stop it: {stop}")
        raise _Left(130) from None
    told(f"to follow it: the same command with --follow; to stop it: {stop}")
    look = f"{_program()} status {name} --store {shlex.quote(without_credentials(store))}"
    if begun:
        told(f"to look at it: {look}")
    else:
        told(f"it has not begun yet; what it says: {jobs.by_hand(address, 'logs', found.id, token=token)}")
        told(f"to look at it once it has: {look}")


@app.command()
def status(
    study: StudyName,
    store: StoreUrl = DEFAULT_STORE,
    watch: Annotated[
        bool, typer.Option("--watch", help="show it anew until the study ends; Ctrl-C ends the look, not the study")
    ] = False,
    format: Formatted = Format.table,
) -> None:
    """How a study stands: trials, epochs, failures. A driver elsewhere is watched for up to 15 s."""
    pulse = _open(study, store).pulse() if watch else None
    if watch:
        from orchestrator import watching

        if format is not Format.table:
            raise InputError("--watch shows lines: legal without --format")
        try:
            state = watching.watch(lambda: _open(study, store).status(pulse))
        except KeyboardInterrupt:
            raise _Left(130) from None
        print(f"the study is {state}", file=sys.stderr)
    found = _open(study, store).status(pulse)
    if format is Format.json:
        print_json(found)
        return
    flat = [
        {"what": f"{what} {name}" if name else what, "value": value}
        for what, values in found.items()
        if what != "failures" and values is not None
        for name, value in (values.items() if isinstance(values, Mapping) else [("", values)])
    ]
    flat += [{"what": f"failure of trial {number}", "value": reason} for number, reason in found["failures"].items()]
    print_rows(flat, format)


@app.command()
def front(
    studies: Annotated[
        list[str], typer.Argument(metavar="STUDY|NAME...", help="study files or names; several: of one task")
    ],
    store: StoreUrl = DEFAULT_STORE,
    where: Where = [],  # noqa: B006 typer wants a list
    minimise: Minimise = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="draw the front and the dense model")] = None,
    format: Formatted = Format.table,
) -> None:
    """The models that no other model beats in every objective."""
    from orchestrator.front import column_of
    from search.query import parse

    if plot is not None and len(studies) > 1:
        raise InputError("--plot draws one study: legal with one name")
    opened = [_open(study, store) for study in dict.fromkeys(studies)]
    if len(opened) == 1:
        found = opened[0].front(where, minimise)
    else:
        from orchestrator.study import front_of

        found = front_of(opened, where, minimise)
    if plot is not None:
        from orchestrator.report.plot import plot_front

        plot_front(opened[0], found, plot)
        print(f"drawn in {plot}", file=sys.stderr)
    if format is Format.json:
        print_json(found.as_json())
    else:
        asked = [column_of(name) for name in (*(parse(bound).measure for bound in where), minimise) if name]
        print_rows(front_rows(found, whole=format is Format.csv, also=asked), format)
        if format is Format.table and (line := hypervolume_line(found)):
            print(f"\n{line}")


@app.command()
def tickets(
    study: StudyName,
    store: StoreUrl = DEFAULT_STORE,
    plot: Annotated[Path | None, typer.Option(metavar="DIR", help="draw them as PNG files in this folder")] = None,
    structure: Annotated[bool, typer.Option("--structure", help="show what the masks leave empty and full")] = False,
    agreement: Annotated[
        bool, typer.Option("--agreement", help="show where searches and tickets agree, beside chance")
    ] = False,
    stability: Annotated[
        bool, typer.Option("--stability", help="measure the error between siblings, where it was not yet")
    ] = False,
    format: Formatted = Format.table,
) -> None:
    """A study's lottery tickets beside their controls. All at equal sparsity, with what may be claimed."""
    from orchestrator.tickets.study.table import rows, says

    if format is Format.csv and (structure or agreement or stability):
        more = "--structure, --agreement, --stability"
        raise InputError(f"--format csv is the table of tickets alone: legal with {more}: table, json")
    opened = _open(study, store)
    with redirect_stdout(sys.stderr):  # the user's task, which may be run, may print
        if stability:
            from orchestrator.tickets.study.stability import measure

            measure(opened, told=lambda line: print(line, file=sys.stderr))
        found = opened.tickets(structure=structure or format is Format.json)
        if agreement:
            from orchestrator.tickets.study import agreement as ticket_agreement

            found["agreement"] = ticket_agreement.agreements(opened)
        if plot is not None:
            from orchestrator.report.ticket_plots import plot_tickets

            drawn = plot_tickets(opened, plot)
            print(*(f"drawn: {path}" for path in drawn.files), sep="\n")
            print(*(f"not drawn: {line}" for line in drawn.left_out), sep="\n")
    if format is Format.json:
        print_json(found)
        return
    print_rows(rows(found), format)
    if format is Format.table:
        print("", *says(found), sep="\n")
    if structure:
        from orchestrator.tickets.study import structure as ticket_structure

        print("\nShares of empty and full groups, beside count-matched random masks:")
        print_table(ticket_structure.rows(found))
        print("", *ticket_structure.says(found), sep="\n")
    if agreement:
        print("\nAgreement of masks, beside chance:")
        print_table(ticket_agreement.rows(found["agreement"]))
        print("", *ticket_agreement.says(found["agreement"]), sep="\n")
    if stability:
        from orchestrator.tickets.study import stability as ticket_stability

        print("\nError barriers between siblings:")
        print_table(ticket_stability.rows(found))


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
        typer.Option(
            "--format", metavar="LIST", help="any of safetensors (always written), pt2, onnx; json: the card on stdout"
        ),
    ] = "safetensors",
    ticket: Annotated[
        bool, typer.Option("--ticket", help="write the lottery ticket alone, a small file to try elsewhere")
    ] = False,
    recipe: Annotated[
        bool, typer.Option("--recipe", help="with --ticket: how its weights are made, in the place of the weights")
    ] = False,
) -> None:
    """Write one model: weights, masks and card. The card says what it is, with the proof and its speed here."""
    from orchestrator.export import FORMATS

    formats = format.split(",")
    for name in formats:
        if name not in (*FORMATS, "table", "json"):
            raise InputError(f"--format {name} is unknown; legal: {', '.join(FORMATS)}, json")
    if key is not None and (where or minimise):
        raise InputError("a KEY names one model: legal without --where and --minimise")
    if recipe and not ticket:
        raise InputError("--recipe is of a ticket: legal with --ticket")
    if ticket:
        if formats != ["safetensors"]:
            raise InputError("--ticket writes one file: legal without --format")
        with redirect_stdout(sys.stderr):  # the user's task, which may be run for the weights, may print
            file = _open(study, store).fetch_ticket(key, output, where=where, minimise=minimise, recipe=recipe)
        print(f"{file}: {file.stat().st_size:,} bytes")
        return
    written = [name for name in formats if name in FORMATS]
    with redirect_stdout(sys.stderr):  # the user's task, which is run to prove the model, may print
        folder = _open(study, store).fetch(key, output, where=where, minimise=minimise, formats=written)
    card = json.loads((folder / "card.json").read_text())
    for name in written:
        if name in card["refused"]:
            print(f"not written as {name}: {card['refused'][name]}", file=sys.stderr)
    if "json" in formats:
        print_json(card)
        return
    print(f"{folder}: {', '.join(sorted(card['files']))}, card.json")
    measures = ("accuracy", "test_accuracy", "sparsity", "nonzero_params")
    print(", ".join(f"{name} {cell(card['measures'][name])}" for name in measures if name in card["measures"]))
    print(card["says"])
    if card["prunings"] and card["prunings"]["prunings"]:
        from orchestrator.export.lineage import rows as pruning_rows

        print()
        print_table(pruning_rows(card["prunings"]))
        print()
    alone = card["task"] in _builtin_tasks() or "model.pt2" in card["files"]
    task = "" if alone else f", task={card['task']!r}"
    print(f"In Python: orchestrator.load({str(folder)!r}{task})")


@app.command()
def measure(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="what `fetch` wrote")],
    task: Annotated[str | None, typer.Option(metavar="FILE", help="the model's task, where it is your own")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU where there is one")] = None,
    threads: Annotated[int, typer.Option(min=1, help="of a CPU")] = 1,
    format: Formatted = Format.table,
) -> None:
    """Prove and time a fetched model on this device. That is added to its card."""
    from orchestrator.export.certificate import latency_rows
    from orchestrator.export.certificate import measure as certified

    with redirect_stdout(sys.stderr):  # the user's task, which is run, may print
        card = certified(folder, task, device=device, threads=threads)
    if format is Format.json:
        print_json(card["measured"])
        return
    print_rows(latency_rows(card["measured"]["latency"]), format)
    if format is Format.table:
        print(f"\n{card['measured']['says']}\nAdded to {folder / 'card.json'}.")


@app.command()
def responsible(
    study: StudyName,
    key: Annotated[str | None, typer.Argument(metavar="[KEY]", help="as `front` shows it; default: the knee")] = None,
    store: StoreUrl = DEFAULT_STORE,
    where: Where = [],  # noqa: B006 typer wants a list
    minimise: Minimise = None,
    learnt_above: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="dense accuracy up to it means never learnt; default: that of guessing"),
    ] = None,
    format: Formatted = Format.table,
) -> None:
    """Who pays for the pruning. Every class and group before and after, with intervals and a verdict."""
    if key is not None and (where or minimise):
        raise InputError("a KEY names one model: legal without --where and --minimise")
    from orchestrator.responsible import words
    from orchestrator.responsible.account import account

    def told(line: str) -> None:
        print(line, file=sys.stderr)

    with redirect_stdout(sys.stderr):  # the user's task, which is run, may print
        opened = _open(study, store)
        found = account(opened, key, where=where, minimise=minimise, learnt_above=learnt_above, told=told)
    if format is Format.json:
        print_json(found)
    elif format is Format.csv:
        print_rows(found["rows"], format)
    else:
        print("\n".join(words.leads(found)), end="\n\n")
        print_table(words.table(found))
        for title, rows in (
            ("Examples on which dense and pruned differ", words.disagreement_rows(found)),
            ("What the change of a class goes with", words.model_rows(found["model"])),
        ):
            if rows:
                print(f"\n{title}:")
                print_table(rows)
        print("\n".join(f"Note: {note}." for note in found["model"]["notes"]))


@app.command()
def techniques(
    studies: Annotated[list[str], typer.Argument(metavar="STUDY|NAME...", help="study files or names of one store")],
    store: StoreUrl = DEFAULT_STORE,
    format: Formatted = Format.table,
) -> None:
    """Which way of pruning did best at which sparsity. Told from the history of one study or more, where it is sure."""
    from orchestrator import techniques as history_of

    found = history_of.techniques([_open(study, store) for study in dict.fromkeys(studies)])
    if format is Format.json:
        print_json(found)
        return
    print_rows(history_of.rows(found), format)
    if format is Format.table:
        print(f"\nRead as: {found['method']}.", *(f"Note: {note}." for note in found["notes"]), sep="\n")


@app.command()
def report(
    study: StudyName,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE.html", help="the file to write")],
    store: StoreUrl = DEFAULT_STORE,
) -> None:
    """Write one HTML file that shows a study. Its front, its search, who pays, and what is missing. Opens offline."""
    print(f"written: {_open(study, store).report(output)}")


@app.command()
def export_optuna(
    study: StudyName,
    to: Annotated[str, typer.Option(metavar="URL", help="a database, such as sqlite:///study.db")],
    store: StoreUrl = DEFAULT_STORE,
) -> None:
    """Write a study's trials for optuna-dashboard. Asked again, it adds what has come since."""
    from orchestrator.trackers.optuna import export_optuna as exported

    print(f"{exported(_open(study, store), to):,} trials written")


@app.command()
def export_mlflow(
    study: StudyName,
    to: Annotated[str, typer.Option(metavar="URI", help="MLflow's tracking URI, such as sqlite:///mlflow.db")],
    store: StoreUrl = DEFAULT_STORE,
) -> None:
    """Log every measured round as a run of MLflow. Asked again, it adds what has come since."""
    from orchestrator.trackers.mlflow import export_mlflow as exported

    print(f"{exported(_open(study, store), to):,} runs added")


@app.command(name="list")
def list_(
    what: Annotated[str | None, typer.Argument(metavar="WHAT", help="criteria, scopes, structures, …")] = None,
    format: Formatted = Format.table,
) -> None:
    """Every choice of a kind, with a line of what it is. Without WHAT, the kinds."""
    from orchestrator.catalogue import KINDS, catalogue

    print_rows(catalogue(what) if what else [{"kind": kind} for kind in KINDS], format)


@app.command()
def gc(
    study: StudyName,
    store: StoreUrl = DEFAULT_STORE,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say how much it would be")] = False,
    format: Formatted = Format.table,
) -> None:
    """Remove a study's models that nothing needs. No front, ticket or other study; asked for, they are made again."""
    swept = _open(study, store).sweep(dry_run=dry_run)
    found = {"study": swept.study, "removed": not dry_run, "states": swept.states, "bytes": swept.bytes}
    if format is not Format.table:
        found |= {"kept": swept.kept, "checkpoints": swept.checkpoints, "leftovers": swept.leftovers}
        print_rows([found], format)
        return
    would = "would remove" if dry_run else "removed"
    also = [f"{swept.checkpoints:,} checkpoints"] if swept.checkpoints else []
    also += [f"{swept.leftovers:,} leftovers of killed writers"] if swept.leftovers else []
    more = "".join(f" and {what}" for what in also)
    print(f"{would} {swept.states:,} states{more}, {swept.bytes:,} bytes; {swept.kept:,} states are kept")


@app.command()
def check(
    study: Annotated[Path | None, typer.Argument(metavar="STUDY", help="the study file (TOML)")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="print the JSON schema of study files")] = False,
    format: Formatted = Format.table,
) -> None:
    """Find what is wrong with a study without running it."""
    from orchestrator.spec import StudySpec

    if schema:
        print_json(StudySpec.model_json_schema())
        return
    if study is None:
        raise InputError("check wants a STUDY file, or --schema")
    opened = _from_file(study, "memory://check")
    info = opened.check()
    warned = opened.warnings()
    for line in warned:
        print(f"{study}: {line}", file=sys.stderr)
    weights = sum(layer.size for layer in info.layers)
    if format is not Format.table:
        facts = {"layers": len(info.layers), "weights": weights, "train_examples": info.train_examples}
        found = {"study": opened.spec.name, "task": opened.spec.task, **facts, "warnings": warned}
        print_rows([found], format) if format is Format.csv else print_json(found)
        return
    runs = f"{_counted(opened.spec.trials, 'trial')} x {_counted(len(opened.spec.seeds), 'seed')}"
    print(
        f"{study}: a good study. {runs} of {opened.spec.task!r}: {len(info.layers)} prunable layers, "
        f"{weights:,} weights, {info.train_examples:,} training examples"
    )


@app.command()
def doctor(
    store: Annotated[
        str | None, typer.Option("--store", metavar="URL", envvar="ORCHARDIST_STORE", help="a store to try out")
    ] = None,
    address: Annotated[
        str | None, typer.Option(metavar="ADDR", help="a cluster: auto, HOST:PORT, or http://HEAD:8265")
    ] = None,
    format: Formatted = Format.table,
) -> None:
    """Find what is wrong with a store or a cluster. It says what to do about it, too."""
    from orchestrator.jobs.doctor import examine

    findings = examine(store, address)
    if format is Format.table:
        print_table([{name: value for name, value in f.as_row().items() if name != "advice"} for f in findings])
        for finding in findings:
            if finding.advice:
                print(f"\n{finding.what} of {finding.where}: {finding.advice}")
    else:
        print_rows([finding.as_row() for finding in findings], format)
    if any(finding.state == "wrong" for finding in findings):
        raise typer.Exit(1)


class _Left(SystemExit):
    """An interrupt after which there is nothing to go on with: the work is done elsewhere."""


def main() -> None:
    """The `orchardist` command. Wrong input ends with exit code 2, an interrupt with 130."""
    with heard(_stopped):
        try:
            sys.exit(app(sys.argv[1:] or ["--help"], standalone_mode=False))
        except USAGE_ERROR as error:
            context = getattr(error, "ctx", None)
            _end(f"{error.format_message()}\nsee {context.command_path if context else 'orchardist'} --help", 2)
        except (InputError, WorkersUnusable) as error:
            _end(str(error), 2)
        except OrchardistError as error:
            _end(str(error), 1)
        except KeyboardInterrupt:
            _end(_stopped(), 130)
        except SystemExit as end:
            if end.code == 130 and not isinstance(end, _Left):  # what typer makes of an interrupt within a command
                _end(_stopped(), 130)
            raise
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)


def _stopped() -> str:
    again = os.environ.get(AGAIN_VARIABLE) or without_credentials(shlex.join([_program(), *sys.argv[1:]]))
    return f"stopped; nothing finished is lost. To go on:\n  {again}"


def _end(message: str, code: int) -> NoReturn:
    print(without_secrets(message, os.environ), file=sys.stderr)
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


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _program() -> str:
    """The command as it was called, where its folder is not on the path."""
    return "orchardist" if shutil.which("orchardist") == os.path.abspath(sys.argv[0]) else shlex.quote(sys.argv[0])
