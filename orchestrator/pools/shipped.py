"""What was shipped with a job, in a folder of its own that nobody takes away.

Ray lays a job's files into its session's folder, and each raylet that sees the job lays them there anew: where two on
one machine share the session, the second deletes them under the processes of the first. So a job's first process copies
them, and its driver asks Ray for no files at all: every worker goes to the same copy, or makes one of the package that
Ray's head holds. Restarted drivers and late workers have the shipped code, never an installed one.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import OrchardistError

AGAIN = "orchardist-again"
"""Under this name a job's metadata hold the user's own command."""

AGAIN_VARIABLE = "ORCHARDIST_AGAIN"
"""Under this one a job's driver finds it."""

_SHIPPED_VARIABLE = "ORCHARDIST_SHIPPED"
_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_PREFIX = "orchardist-job-"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a job's processes work, and with which environment."""

    folder: Path
    environment: dict[str, str]


@contextmanager
def own_copy() -> Iterator[Place]:
    """Within the block there is a copy of what was shipped with the job that this process is of, and it works there.

    Without such a job it is the folder and the environment as they are.

    Raises:
        OrchardistError: the files are gone already.
    """
    environment = dict(os.environ)
    job = json.loads(environment.get(_JOB_VARIABLE) or "{}")
    if again := (job.get("metadata") or {}).get(AGAIN):
        environment[AGAIN_VARIABLE] = again
    package = (job.get("runtime_env") or {}).pop("working_dir", None)
    if package is None:
        yield Place(folder=Path.cwd(), environment=environment)
        return
    folder = Path(os.path.realpath(tempfile.mkdtemp(prefix=_PREFIX)))
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_SH)
        try:
            shipped = Path.cwd()
            shutil.copytree(shipped, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        except (OSError, shutil.Error) as error:
            raise OrchardistError(f"what was shipped with the job is gone: submit it again ({error})") from error
        environment[_JOB_VARIABLE] = json.dumps(job)
        environment[_SHIPPED_VARIABLE] = f"{package} {folder}"
        others = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
        environment["PYTHONPATH"] = os.pathsep.join([str(folder), *(path for path in others if Path(path) != shipped)])
        sys.path[:] = [str(folder) if Path(path or ".") == shipped else path for path in sys.path]
        os.chdir(folder)
        yield Place(folder=folder, environment=environment)
    finally:
        os.chdir(folder.parent)
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


def for_workers() -> dict[str, Any]:
    """What `ray.init` is told besides: in a job's driver, that every worker begins in the shipped files."""
    package, _, folder = os.environ.get(_SHIPPED_VARIABLE, "").partition(" ")
    return {"runtime_env": {"worker_process_setup_hook": arriving(package, folder)}} if package else {}


def arriving(package: str, folder: str) -> Callable[[], None]:
    """What a worker does before anything else: it goes to `folder`, which it unpacks where its machine has none.

    Nothing but Ray need be installed there: the function travels whole, and imports what it needs by itself. A folder
    is held with a lock while a process works in it; those of at least an hour that nobody holds are removed by whoever
    comes.
    """
    prefix, unused_seconds = _PREFIX, 3600.0

    def arrive() -> None:
        import fcntl
        import glob
        import importlib
        import io
        import os
        import shutil
        import sys
        import tempfile
        import time
        import zipfile

        from ray.experimental.internal_kv import _internal_kv_get

        parent = os.path.dirname(folder)
        for other in glob.glob(os.path.join(parent, f"{prefix}*")):
            try:
                if other == folder or time.time() - os.stat(other).st_mtime < unused_seconds:
                    continue
                held = os.open(other, os.O_RDONLY)
                try:
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(other, ignore_errors=True)
                finally:
                    os.close(held)
            except OSError:
                continue  # it is in use, somebody else's, or gone
        if not os.path.isdir(folder):
            data = _internal_kv_get(package)
            if data is None:
                raise RuntimeError(f"Ray's head has lost what was shipped with the job: {package}")
            unpacked = tempfile.mkdtemp(prefix=prefix, dir=parent)
            try:
                with zipfile.ZipFile(io.BytesIO(data)) as archive:
                    archive.extractall(unpacked)
                os.rename(unpacked, folder)
            except OSError:
                shutil.rmtree(unpacked, ignore_errors=True)
                if not os.path.isdir(folder):  # else another worker was faster
                    raise
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_SH)  # until this process ends
        others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != folder]
        os.environ["PYTHONPATH"] = os.pathsep.join([folder, *others])
        sys.path.insert(0, folder)
        os.chdir(folder)
        importlib.invalidate_caches()

    return arrive
