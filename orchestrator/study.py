"""A study, from Python: run it, look at it, take a model home."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import history
from orchestrator.errors import InputError, QueryError, SpecError, UnknownName
from orchestrator.front import Front, column_of, front, known_measures
from orchestrator.objectives import NOT_MEASURED, OBJECTIVES, Objective, objectives
from orchestrator.plan import trial_plan
from orchestrator.progress import Progress, Standing
from orchestrator.spec import StudySpec, mix_refused, read_text
from orchestrator.store.lease import Lease, acquire, beating, held, this_process
from orchestrator.store.store import Store
from search.proposer import preload

if TYPE_CHECKING:
    from orchestrator.driver import Setting
    from orchestrator.pools.protocol import Job, Pool
    from orchestrator.tasks.info import TaskInfo

DEFAULT_STORE = "./orchard"


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
        self._text = ""

    @classmethod
    def load(cls, path: str | Path, store: str | Path = DEFAULT_STORE) -> Study:
        """The study that a TOML file describes; its task's path is relative to the file's folder."""
        text = read_text(path)
        study = cls(StudySpec.parse(text, str(path)), store, root=Path(path).parent)
        study._text = text
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
            InputError: something in the study, its task or the store is wrong.
        """
        self._refuse_early()
        lease = acquire(self.store.files, self.spec.name, **this_process())
        try:
            with beating(lease):  # from now on: workers may take their time to come
                return self._run(pool, workers, progress, accept_task_change, lease)
        finally:
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

            with self._nonce() as nonce:
                sources = self._bind_functions()
                info = pool.prepare(self._job(sources, nonce))
                code = {name: source.digest for name, source in sources.items()}
                self._refuse_other_task(info, code, accept_task_change)
                setting = Setting(
                    spec=self.spec,
                    info=info,
                    objectives=objectives(self.spec.objectives, info),
                    code=code,
                )
                self._check(setting)
                self._write(setting)
                # What an older driver still writes from here on decides nothing any more.
                self.store.ledger(self.spec.name, lease.epoch).compact()
                past = history.read(self.store, self.spec.name)
                return Driver(setting, self.store, pool, lease, past, progress).run()
        finally:
            if ours:
                pool.close()

    def check(self) -> TaskInfo:
        """Everything that `run` refuses, found out in this process without running or writing anything."""
        from orchestrator.driver import Setting
        from orchestrator.tasks.load import load
        from orchestrator.tasks.source import collect

        sources = self._bind_functions()
        info = load(collect(self.spec.task, self.root), self.spec.task_params, self.root).info
        code = {name: source.digest for name, source in sources.items()}
        found = objectives(self.spec.objectives, info)
        self._check(Setting(spec=self.spec, info=info, objectives=found, code=code))
        return info

    def front(self, where: Sequence[str] = (), minimise: str | None = None) -> Front:
        """The non-dominated points that keep every bound in `where`; with `minimise`, the best of them."""
        return front(
            self.store,
            self.spec.name,
            self._objectives(),
            seeds=len(self.spec.seeds),
            where=where,
            minimise=minimise,
            constraints=self.spec.constraints,
        )

    def table(self) -> Any:
        """Every outcome, as a `pyarrow.Table`."""
        return self.store.table(self.spec.name, "outcomes")

    def status(self) -> dict[str, Any]:
        """How the study stands by its ledger: the document that `orchardist status --format json` prints."""
        alive = held(self.store.files, self.spec.name)
        past = history.read(self.store, self.spec.name)
        done = [ending for ending in past.endings.values() if ending.state == "done"]
        failed = {number: e.reason for number, e in past.endings.items() if e.state == "failed"}
        ended = past.finished and len(past.endings) >= len(past.proposals)
        return {
            "study": self.spec.name,
            "state": "running" if alive else "done" if ended else "stopped",
            "trials": {
                "asked": self.spec.trials,
                "done": len(done),
                "running": len(past.proposals) - len(past.endings) if alive else 0,
                "failed": len(failed),
                "stopped": 0,
            },
            "epochs": {"asked": sum(e.epochs for e in done), "run": past.epochs_run},
            "stages": {"asked": sum(e.stages for e in done), "run": past.stages_run},
            "failures": failed,
        }

    def fetch(
        self, key: str | None, folder: str | Path, *, where: Sequence[str] = (), minimise: str | None = None
    ) -> Path:
        """Write one model with its masks and its card into `folder`; see `orchestrator.retrieve`."""
        from orchestrator.retrieve import fetch

        return fetch(self, key, Path(folder), where=where, minimise=minimise)

    def _objectives(self) -> list[Objective]:
        noted = (self._meta or self._read_meta()).get("objectives", [])
        return [Objective(**objective) for objective in noted] or [OBJECTIVES[name] for name in self.spec.objectives]

    def _read_meta(self) -> dict[str, Any]:
        found = self.store.read_study(self.spec.name)
        return found[1] if found else {}

    def _refuse_early(self) -> None:
        """What can be refused before a worker is started for it."""
        from orchestrator.tasks.source import collect

        self._refuse_another_study()
        collect(self.spec.task, self.root)
        self.store.files.probe()

    def _refuse_another_study(self) -> None:
        noted = self._read_meta().get("digest")
        if noted is not None and noted != self.spec.digest():
            raise SpecError(
                f"the study {self.spec.name!r} in the store {self.store.name} was made from another study file "
                f"(digest {noted[:12]}, this one has {self.spec.digest()[:12]})\n"
                "legal: another name, or change only trials and [[enqueue]]"
            )

    def _refuse_other_task(self, info: TaskInfo, code: Mapping[str, str], accept: bool) -> None:
        """The study goes on with the code and data that it began with, unless the user accepts the mix."""
        noted = self._read_meta()
        begun = {f"the task {self.spec.task!r}": noted.get("task_digest")}
        now = {f"the task {self.spec.task!r}": info.digest}
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
        from orchestrator.pruning.criteria import CRITERIA
        from orchestrator.tasks.source import function_source, install_function

        sources = {name: function_source(name, self.root) for name in names}
        for name, source in sources.items():
            CRITERIA.bind(name, install_function(source, self.root))
        return sources

    def _job(self, sources: Mapping[str, Any], nonce: str) -> Job:
        """What every worker must know of this study."""
        from orchestrator.code import code_digest
        from orchestrator.pools.protocol import Job
        from orchestrator.tasks.source import collect

        return Job(
            store_url=self.store.files.absolute_url,
            study=self.spec.name,
            task=collect(self.spec.task, self.root),
            task_params=self.spec.task_params,
            root=str(self.root),
            functions=sources,
            nonce=nonce,
            code=code_digest(),
            evaluate_every=self.spec.train.evaluate_every,
            latency="latency_ms" in {*self.spec.objectives, *self.spec.constraints},
        )

    @contextmanager
    def _nonce(self) -> Iterator[str]:
        """An object in the store that every worker reads, and writes a copy of, before it works."""
        nonce = f"handshake/{secrets.token_hex(8)}"
        files = self.store.files
        files.write(nonce, nonce.encode())
        try:
            yield nonce
        finally:
            for name in files.list("handshake"):
                if f"handshake/{name}".startswith(nonce):
                    files.delete(f"handshake/{name}")

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
        self.spec.check_mixes(setting.code)
        for params in self.spec.mixes():
            try:
                trial_plan(self.spec.settings(params, setting.code), self.spec.seeds[0], setting.info)
            except InputError as error:
                raise SpecError(mix_refused(params, error)) from error

    def _write(self, setting: Setting) -> None:
        meta = {
            "digest": self.spec.digest(),
            "task_digest": setting.info.digest,
            "functions": dict(setting.code),
            "root": str(self.root),
            "objectives": [{"name": o.name, "column": o.column, "direction": o.direction} for o in setting.objectives],
        }
        self._meta = meta
        self.store.write_study(self.spec.name, self._text or self.spec.to_toml(), meta)


def _import_ahead(sampler: str) -> None:
    """Import what the loop will need, for a thread of its own."""
    import orchestrator.driver  # noqa: F401
    from orchestrator.store.ledger import SCHEMAS

    SCHEMAS["events"].empty_table()  # the first table has pyarrow import pandas, where there is one
    preload(sampler)
