"""A study, from Python: run it, look at it, take a model home."""

from __future__ import annotations

import json
import logging
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import history
from orchestrator.code import code_digest
from orchestrator.errors import InputError, QueryError, SpecError, StoreError, StoreFailed, StoreFull, UnknownName
from orchestrator.front import Front, NothingMeets, column_of, front, joined, known_measures
from orchestrator.mixes import warnings
from orchestrator.objectives import NOT_MEASURED, OBJECTIVES, Objective, objectives
from orchestrator.planning.trial import trial_plan
from orchestrator.progress import Progress, Standing
from orchestrator.spec import OPEN, StudySpec, mix_refused, read_text
from orchestrator.store import paths
from orchestrator.store.files import NoRoom
from orchestrator.store.lease import Lease, Pulse, acquire, beating, decided, this_process
from orchestrator.store.paths import DEFAULT_STORE
from orchestrator.store.store import Store
from search.proposer import preload

if TYPE_CHECKING:
    from orchestrator.driver import Setting
    from orchestrator.pools.protocol import Job, Pool
    from orchestrator.retention import Swept
    from orchestrator.settings import OtherTask
    from orchestrator.tasks.info import TaskInfo
    from orchestrator.warm_start import WarmStart

_LOG = logging.getLogger("orchardist.study")

_CHANGES_SHOWN = 2
_LONGEST_VALUE = 60


class Study:
    """One study in one store.

    Args:
        spec: what to search; from `StudySpec.load(path)` or `StudySpec(...)`.
        store: any fsspec URL or a folder.
        root: the folder that a task's path is relative to; by default the current one.
    """

    def __init__(self, spec: StudySpec, store: str | Path = DEFAULT_STORE, *, root: str | Path = ".") -> None:
        self.spec = spec
        self.store = Store(store)
        self.root = Path(root).resolve()
        self._meta: dict[str, Any] | None = None
        self._info: TaskInfo | None = None
        self._text = ""
        self._path = ""

    @classmethod
    def load(cls, path: str | Path, store: str | Path = DEFAULT_STORE) -> Study:
        """The study that a TOML file describes; its task's path is relative to the file's folder."""
        text = read_text(path)
        study = cls(StudySpec.parse(text, str(path)), store, root=Path(path).parent)
        study._text, study._path = text, str(path)
        return study

    @classmethod
    def open(cls, url: str | Path, name: str) -> Study:
        """The study called `name` in the store at `url`, to be looked at; its task is not imported.

        Raises:
            QueryError: there is no such study; the message lists those there are.
        """
        store = Store(url)
        found = store.read_study(name)
        if found is None:
            raise QueryError(f"{UnknownName('study', name, store.studies())} (in the store {store.name})")
        text, meta = found
        study = cls(StudySpec.parse(text, name), url, root=meta.get("root", "."))
        study._meta, study._text = meta, text
        return study

    def run(
        self,
        pool: Pool | Callable[[], Pool] | None = None,
        *,
        workers: int | None = None,
        progress: Progress | None = None,
        accept_task_change: bool = False,
    ) -> Standing:
        """Run the study, or go on where it stopped. Returns how it stands.

        Args:
            pool: where to run; a function makes one when it is needed, which is closed in the end. By default a RayPool
                of `workers` on this machine.
            workers: for the default pool.
            progress: shows how it goes; nothing by default.
            accept_task_change: go on although the task's code or data are not what the study began with.

        Raises:
            InputError: something in the study, its task or the store is wrong, or another driver runs it.
            StoreFailed: the store, which had answered, failed while the study was run: what is finished is kept.
        """
        self._refuse_early()
        lease = acquire(self.store.files, self.spec.name, **this_process())
        try:
            with beating(lease):  # from now on: workers may take their time to come
                return self._run(pool, workers, progress, accept_task_change, lease)
        finally:
            with _at_the_end():
                lease.release()

    def _run(
        self,
        pool: Pool | Callable[[], Pool] | None,
        workers: int | None,
        progress: Progress | None,
        accept_task_change: bool,
        lease: Lease,
    ) -> Standing:
        self._refuse_another_study()  # another driver may have made it before the lease was ours
        # While Ray's processes come up there is nothing else to do but to import what the loop will need.
        importing = threading.Thread(target=_import_ahead, args=[self.spec.sampler], name="imports")
        importing.start()
        ours = pool is None or callable(pool)
        if pool is None:
            from orchestrator.pools.ray import RayPool

            pool = RayPool(workers)
        elif callable(pool):
            pool = pool()
        try:
            importing.join()
            from orchestrator.driver import Driver, Setting
            from orchestrator.store.ledger import GRACE_SECONDS

            with self._nonce() as nonce:
                sources = self._bind_functions()
                info = pool.prepare(self._job(sources, nonce))
                code = {name: source.digest for name, source in sources.items()}
                self._refuse_other_task(info, code, accept_task_change)
                with self._naming_its_file():
                    found = objectives(self.spec.objectives, info)
                    setting = Setting(spec=self.spec, info=info, objectives=found, code=code)
                    self._check(setting)
                    setting = replace(setting, warm=self._warm_start(setting))
                with _going_on(lease):
                    lease.check()  # workers may take so long to come that another driver is there first
                    self._write(setting, lease)
                    # What an older driver still writes from here on decides nothing any more.
                    self.store.ledger(self.spec.name, lease.epoch).compact(GRACE_SECONDS)
                    past = history.read(self.store, self.spec.name)
                    past.ask_for(self.spec.search_space())
                    standing = Driver(setting, self.store, pool, lease, past, progress).run()
                    if self.spec.keep == "front":
                        from orchestrator.retention import sweep

                        sweep(self.store, self.spec.name, self.store.ledger(self.spec.name, lease.epoch))
                    return standing
        finally:
            if ours:
                pool.close()

    def check(self) -> TaskInfo:
        """Everything that `run` refuses, found out in this process without running or writing anything."""
        from orchestrator.driver import Setting
        from orchestrator.pools.worker import Worker

        sources = self._bind_functions()
        info = Worker(self._job(sources, nonce="")).info
        code = {name: source.digest for name, source in sources.items()}
        with self._naming_its_file():
            found = objectives(self.spec.objectives, info)
            self._check(Setting(spec=self.spec, info=info, objectives=found, code=code))
        self._info = info
        return info

    def warnings(self) -> list[str]:
        """What the study may do that is legal, but hardly what was meant; a line for each, after `check` or `run`."""
        from orchestrator.idle import idle

        mixes = self.spec.check_mixes()
        info = self._info or self.check()
        found = [line for settings in mixes for line in warnings(settings, info.train_examples)]
        found += idle(self.spec, mixes, info)
        found += filter(None, [self.spec.too_few()])
        return list(dict.fromkeys(found))

    def front(self, where: Sequence[str] = (), minimise: str | None = None) -> Front:
        """The non-dominated points that keep every bound in `where`; with `minimise`, the best of them."""
        return front(
            self.store,
            self.spec.name,
            self.objectives(),
            seeds=len(self.spec.seeds),
            where=where,
            minimise=minimise,
            constraints=self.spec.constraints,
        )

    def tickets(self, *, structure: bool = True) -> dict[str, Any]:
        """The study's tickets beside their controls: the document that `orchardist tickets --format json` prints.

        Args:
            structure: look for structure in the masks too, for which the study's task is loaded.
        """
        from orchestrator.tickets.study.table import ticket_table

        return ticket_table(self, structure=structure)

    def noted(self) -> dict[str, Any]:
        """What was noted of the study when it was first run: digests, objectives, sizes of the splits."""
        found = self.store.read_study(self.spec.name)
        return found[1] if found else {}

    def table(self) -> Any:
        """Every outcome, as a `pyarrow.Table`."""
        return self.store.table(self.spec.name, "outcomes")

    def to_pandas(self) -> Any:
        """Every outcome, as a `pandas.DataFrame`; parameters and metrics are JSON in the columns of that name."""
        return self.table().to_pandas()

    def pulse(self) -> Pulse:
        """The study's driver, to be observed from look to look."""
        return Pulse(self.store.files, self.spec.name)

    def status(self, pulse: Pulse | None = None) -> dict[str, Any]:
        """How the study stands by its ledger: the document that `orchardist status --format json` prints.

        Args:
            pulse: what was seen of the driver before, from another call's `pulse`: then nothing is waited for, and
                `alive` is None while it is not known. Without it a driver on another machine is watched until it is,
                up to 15 s.
        """
        from orchestrator.pools.protocol import RETRIED

        sign = decided(self.pulse()) if pulse is None else pulse.look()
        alive = sign.alive is not False
        past = history.read(self.store, self.spec.name)
        done = [ending for ending in past.endings.values() if ending.state == "done"]
        failed = {number: e.reason for number, e in past.endings.items() if e.state == "failed"}
        stopped = [ending for ending in past.endings.values() if ending.state == "stopped"]
        ended = past.finished and len(past.endings) >= len(past.proposals)
        best = Standing(asked=self.spec.trials)
        for ending in (*done, *stopped):
            best.note(self.objectives(), ending.best)
        return {
            "study": self.spec.name,
            "state": "running" if alive else "done" if ended else "stopped",
            "trials": {
                "asked": self.spec.trials,
                "done": len(done),
                "running": len(past.proposals) - len(past.endings) if alive else 0,
                "failed": len(failed),
                "stopped": len(stopped),
            },
            "epochs": {"asked": sum(e.epochs for e in past.endings.values()), "run": past.epochs_run},
            "stages": {"asked": sum(e.stages for e in past.endings.values()), "run": past.stages_run},
            "retries": dict.fromkeys(RETRIED, 0) | past.retries,
            "best": best.best,
            "driver": sign.as_json(),
            "failures": failed,
        }

    def fetch(
        self,
        key: str | None,
        folder: str | Path,
        *,
        where: Sequence[str] = (),
        minimise: str | None = None,
        formats: Sequence[str] = ("safetensors",),
    ) -> Path:
        """Write one model with its masks, its card and its certificate into `folder`; see `orchestrator.retrieve`."""
        from orchestrator.retrieve import fetch

        return fetch(self, key, Path(folder), where=where, minimise=minimise, formats=formats)

    def fetch_ticket(
        self,
        key: str | None,
        folder: str | Path,
        *,
        where: Sequence[str] = (),
        minimise: str | None = None,
        recipe: bool = False,
    ) -> Path:
        """Write one ticket into `folder` as a small file, which other studies can start from; returns the file.

        With `recipe` it says how its weights are made instead of holding them: for studies of the same task.
        """
        from orchestrator.tickets.study.export import fetch_ticket

        return fetch_ticket(self, key, Path(folder), where=where, minimise=minimise, recipe=recipe)

    def responsible(
        self,
        key: str | None = None,
        *,
        where: Sequence[str] = (),
        minimise: str | None = None,
        learnt_above: float | None = None,
    ) -> dict[str, Any]:
        """Who pays for the pruning: the document that `orchardist responsible --format json` prints; the task is run.

        Arguments as for `orchestrator.responsible.account.account`.
        """
        from orchestrator.responsible.account import account

        return account(self, key, where=where, minimise=minimise, learnt_above=learnt_above)

    def report(self, path: str | Path) -> Path:
        """Write one HTML file that shows this study and opens offline; returns the file. No code of the user is run."""
        from orchestrator.report.html import write_report

        return write_report(self, path)

    def task_of(self, row: Mapping[str, Any]) -> StudySpec | OtherTask:
        """The task that an outcome was measured on: one of `[[tickets.tasks]]`, or what the study says of its own."""
        others = self.noted().get("others", {})
        for task in self.spec.tickets.tasks:
            if others.get(task.label, {}).get("task_digest") == row["task_digest"]:
                return task
        return self.spec

    def state(self, row: Mapping[str, Any]) -> bytes:
        """The file of an outcome's state. One that was removed is made again, in this process; `row` is the outcome."""
        data = self.store.states.read(row["key"])
        if data is None:
            from orchestrator.retention import remake

            data = remake(self, self._job(self._bind_functions(), nonce=""), row)
        return data

    def sweep(self, *, dry_run: bool = False) -> Swept:
        """Remove this study's states that nobody needs; see `orchestrator.retention`. `dry_run` only counts them.

        Raises:
            StoreError: the study is being run.
        """
        from orchestrator.retention import sweep, sweep_a_full_disk

        if dry_run:
            return sweep(self.store, self.spec.name, None)
        try:
            lease = acquire(self.store.files, self.spec.name, **this_process())
        except NoRoom:
            swept = sweep_a_full_disk(self.store, self.spec.name)
            if swept.bytes:
                return swept
            raise
        try:
            with beating(lease):
                return sweep(self.store, self.spec.name, self.store.ledger(self.spec.name, lease.epoch))
        finally:
            with suppress(NoRoom):  # who has no room for a word more is seen to have ended all the same
                lease.release()

    def objectives(self) -> list[Objective]:
        """What the study optimises: as noted when it was first run, or by what its file says."""
        noted = (self._meta or self.noted()).get("objectives", [])
        return [Objective(**objective) for objective in noted] or [OBJECTIVES[name] for name in self.spec.objectives]

    def _refuse_early(self) -> None:
        """What can be refused before a worker is started for it."""
        self._refuse_another_study()
        self._refuse_a_files_name()
        sources = self._bind_functions()
        with self._naming_its_file():
            self.spec.check_mixes({name: source.digest for name, source in sources.items()})
        job = self._job(sources, nonce="")
        if job.ticket is not None:
            from orchestrator.tickets.given import read_given

            read_given(job.ticket, self.root)
        self.store.files.probe()

    def _refuse_another_study(self) -> None:
        found = self.store.read_study(self.spec.name)
        noted = found[1].get("digest") if found else None
        if found is None or noted is None or noted == self.spec.digest():
            return
        changes = self._changes_since(found[0])
        if not changes:
            return
        more = f"; and {len(changes) - _CHANGES_SHOWN} more" if len(changes) > _CHANGES_SHOWN else ""
        with self._naming_its_file():
            raise SpecError(
                f"the study {self.spec.name!r} in the store {self.store.name} was made from another study file: "
                f"{'; '.join(changes[:_CHANGES_SHOWN])}{more}\n"
                "legal: another name, or change only trials, [[enqueue]] and [stopping], or ask for more rounds"
            )

    def _refuse_a_files_name(self) -> None:
        """Commands take what ends so for a study file."""
        name = self.spec.name
        if name.endswith(".toml") and not self.store.study_exists(name):
            with self._naming_its_file("name"):
                raise SpecError(f"{name!r} is the name of a study file; legal: one without '.toml', as {name[:-5]!r}")

    def _changes_since(self, text: str) -> list[str]:
        """What makes this study another one than the study file of before describes; nothing if it goes on from it."""
        try:
            before = StudySpec.parse(text)
        except SpecError as error:
            return [f"the stored one cannot be read any more ({str(error).splitlines()[0]})"]
        if self.spec.goes_on_from(before):
            return []
        old, new = (spec.model_dump(exclude=set(OPEN), mode="json") for spec in (before, self.spec))
        changes = list(_changes(old, new))
        if not changes and json.dumps(before.space) != json.dumps(self.spec.space):
            changes = ["the order within [space], which decides what proposal n is"]
        return changes or ["by another version of Orchardist, which read it differently"]

    @contextmanager
    def _naming_its_file(self, key: str = "") -> Iterator[None]:
        """What is wrong with the study says in which file it stands, where it came from one, and under which key."""
        try:
            yield
        except InputError as error:
            if not self._path and not key:
                raise
            place = ": ".join(part for part in (self._path, key) if part)
            raise SpecError(f"{place}: {error}") from error

    def _refuse_other_task(self, info: TaskInfo, code: Mapping[str, str], accept: bool) -> None:
        """The study goes on with the code and data that it began with, unless the user accepts the mix."""
        noted = self.noted()
        begun = {f"the task {self.spec.task!r}": noted.get("task_digest")}
        now = {f"the task {self.spec.task!r}": info.digest}
        for name, other in info.others.items():
            begun[f"the task {name!r}"] = noted.get("others", {}).get(name, {}).get("task_digest")
            now[f"the task {name!r}"] = other.digest
        if info.ticket is not None:
            what = f"the ticket {self.spec.tickets.ticket!r}"
            begun[what], now[what] = noted.get("ticket"), info.ticket.sha256
        for name, digest in code.items():
            begun[f"the function {name!r}"], now[f"the function {name!r}"] = (
                noted.get("functions", {}).get(name),
                digest,
            )
        for what, before in begun.items():
            if before is not None and before != now[what] and not accept:
                raise SpecError(
                    f"{what} is not what the study {self.spec.name!r} began with (digest {before[:12]}, now "
                    f"{now[what][:12]}): its code, data or parameters changed\n"
                    "legal: another study name, or --accept-task-change to mix results of both"
                )

    def _bind_functions(self) -> Mapping[str, Any]:
        """Make the user's own functions known in this process; their sources by name."""
        names = self.spec.functions()
        if not names:
            return {}
        from orchestrator.pruning.criteria import CRITERIA, check_signature
        from orchestrator.tasks.source import function_source, install_function

        sources = {}
        for name in names:
            with self._naming_its_file("space.criterion"):
                sources[name] = function_source(name, self.root)
                function = install_function(sources[name], self.root)
                check_signature(name, function)
            CRITERIA.bind(name, function)
        return sources

    def _job(self, sources: Mapping[str, Any], nonce: str) -> Job:
        """What every worker must know of this study."""
        from orchestrator.pools import protocol
        from orchestrator.tasks.source import collect, to_send

        others = {
            task.label: protocol.OtherTask(
                source=collect(task.task, self.root, task.checkpoint), params=task.task_params
            )
            for task in self.spec.tickets.tasks
        }
        ticket = self.spec.tickets.ticket
        return protocol.Job(
            store_url=self.store.files.absolute_url,
            study=self.spec.name,
            task=collect(self.spec.task, self.root, self.spec.checkpoint),
            task_params=self.spec.task_params,
            root=str(self.root),
            others=others,
            ticket=to_send("ticket", ticket, self.root) if ticket else None,
            functions=sources,
            nonce=nonce,
            code=code_digest(),
            evaluate_every=self.spec.train.evaluate_every,
            latency="latency_ms" in {*self.spec.objectives, *self.spec.constraints},
            structures=self.spec.structures(),
            budgets=self.spec.budgeted(),
            checkpoint_minutes=self.spec.checkpoint_minutes,
            timeout_seconds=self.spec.timeout_seconds,
            needs=self.spec.needs(),
        )

    @contextmanager
    def _nonce(self) -> Iterator[str]:
        """An object in the store that every worker reads, and writes a copy of, before it works."""
        nonce = paths.handshake(secrets.token_hex(8))
        files = self.store.files
        files.write(nonce, nonce.encode())
        try:
            yield nonce
        finally:
            with _at_the_end():
                for name in map(paths.handshake, files.list(paths.HANDSHAKE)):
                    if name.startswith(nonce):
                        files.delete(name)

    def _check(self, setting: Setting) -> None:
        """Refuse mixes of choices that do not go together, or not with this task."""
        metrics = dict(setting.info.metrics)
        for name in self.spec.constraints:
            if column_of(name) not in known_measures() and name not in metrics:
                raise UnknownName("measure in [constraints]", name, known_measures(metrics))
            if name in OBJECTIVES and name not in metrics:
                objectives([name], setting.info)  # which refuses what this task does not measure
            elif name in NOT_MEASURED:
                raise SpecError(f"constraint on {name!r}: {NOT_MEASURED[name]}")
        self._refuse_one_task_twice(setting.info)
        self.spec.check_mixes(setting.code)
        for params in self.spec.mixes():
            try:
                trial_plan(self.spec.settings(params, setting.code), self.spec.seeds[0], setting.info)
            except InputError as error:
                raise SpecError(mix_refused(params, error)) from error

    def _refuse_one_task_twice(self, info: TaskInfo) -> None:
        seen: dict[str, str] = {}
        for name, digest in info.digests.items():
            if digest in seen:
                other = f"the task {seen[digest]!r}" if seen[digest] else "the study's own task"
                raise SpecError(f"tickets.tasks: {name!r} has the code, data and parameters of {other}")
            seen[digest] = name

    def _warm_start(self, setting: Setting) -> WarmStart:
        """What earlier studies give this one to begin with: worked out once, and read from its notes ever after."""
        from orchestrator.warm_start import WarmStart, resolve

        if not self.spec.warm_start:
            return WarmStart()
        noted = self.noted().get("warm_start") or resolve(self.store, setting).as_json()
        return WarmStart.from_json(json.loads(json.dumps(noted)))

    def _write(self, setting: Setting, lease: Lease) -> None:
        meta = {
            "digest": self.spec.digest(),
            **_noted(setting.info),
            "others": {name: _noted(other) for name, other in setting.info.others.items()},
            "ticket": None if setting.info.ticket is None else setting.info.ticket.sha256,
            "functions": dict(setting.code),
            "root": str(self.root),
            "objectives": [{"name": o.name, "column": o.column, "direction": o.direction} for o in setting.objectives],
            **({"warm_start": setting.warm.as_json()} if self.spec.warm_start else {}),
        }
        self._meta = meta
        self.store.write_study(self.spec.name, self._text or self.spec.to_toml(), meta, lease.look)


@contextmanager
def _going_on(lease: Lease) -> Iterator[None]:
    """A store that fails now had answered before: no input is wrong, but of a study taken over or grown too large."""
    try:
        yield
    except StoreError as error:
        if lease.lost or isinstance(error, StoreFull):
            raise
        # A full disk says so itself, a worker's too, of which only the message comes here.
        kept = "" if str(error).endswith("is not lost") else "\nwhat is finished is kept: run it again to go on"
        raise StoreFailed(f"{error}{kept}") from error


@contextmanager
def _at_the_end() -> Iterator[None]:
    """What cannot be tidied up must not hide what went wrong before: it waits for the next run."""
    try:
        yield
    except StoreError as error:
        _LOG.warning("left for the next run: %s", error)


def _noted(info: TaskInfo) -> dict[str, Any]:
    """What is noted of a task when a study is run."""
    return {
        "task_digest": info.digest,
        "valid_examples": info.valid_examples,
        "test_examples": info.test_examples,
    }


def front_of(studies: Sequence[Study], where: Sequence[str] = (), minimise: str | None = None) -> Front:
    """The front over several studies of one task; bounds on `dense` mean each study's own.

    Raises:
        QueryError: as for `Study.front`, or the studies are of different tasks or have different objectives.
    """
    tasks = {study.noted().get("task_digest") for study in studies}
    if len(tasks) > 1:
        names = ", ".join(study.spec.name for study in studies)
        raise QueryError(f"the studies {names} are of different tasks, models or data, whose measures do not compare")
    found, missed = [], []
    for study in studies:
        try:
            found.append(study.front(where, minimise))
        except NothingMeets as error:
            missed.append(error)
    if not found:
        raise missed[0]
    return joined(found, minimise)


def _changes(before: Any, now: Any, place: str = "") -> Iterator[str]:
    """Every value that differs between two tables, under its dotted name. 1 and 1.0 differ: they make other ranges."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in dict.fromkeys([*before, *now]):
            yield from _changes(before.get(name), now.get(name), f"{place}.{name}" if place else name)
    elif json.dumps(before) != json.dumps(now):
        yield f"{place} was {_shown(before)} and is now {_shown(now)}"


def _shown(value: Any) -> str:
    text = "not set" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"


def _import_ahead(sampler: str) -> None:
    """Import what the loop will need, for a thread of its own."""
    import orchestrator.driver  # noqa: F401
    from orchestrator.store.rows import SCHEMAS

    SCHEMAS["events"].empty_table()  # the first table has pyarrow import pandas, where there is one
    preload(sampler)
