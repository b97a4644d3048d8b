from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle

from orchestrator.pools import shipped
from orchestrator.pools.shipped import arriving

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = "gcs://_ray_pkg_0123.zip"
JOB = {
    "runtime_env": {"working_dir": PACKAGE, "env_vars": {"A": "1"}},
    "metadata": {shipped.AGAIN: "orchardist submit study.toml"},
}
COPIES = """
import json, os, shutil, sys
from orchestrator.pools.shipped import for_workers, own_copy
shipped = os.getcwd()
with own_copy() as place:
    shutil.rmtree(shipped)
    os.environ.update(place.environment)
    import late
    job = json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"])
    print(json.dumps([os.getcwd(), late.__file__, os.environ["PYTHONPATH"], job["runtime_env"], bool(for_workers())]))
print(os.path.exists(place.folder))
"""
ARRIVES = """
import os, sys
from ray import cloudpickle
from ray.experimental import internal_kv
package = open(sys.argv[2], "rb").read() if sys.argv[2] else None
internal_kv._internal_kv_get = lambda name: package
arrive = cloudpickle.loads(open(sys.argv[1], "rb").read())
assert not any(name.startswith("orchestrator") for name in sys.modules)
arrive()
import module
print(module.WHAT, module.__file__, os.getcwd(), os.environ["PYTHONPATH"])
"""


def environment(tmp: Path, **more: str) -> dict[str, str]:
    (tmp / "tmp").mkdir(exist_ok=True)
    return os.environ | {"TMPDIR": str(tmp / "tmp"), **more}


def test_a_job_s_first_process_works_in_a_copy_that_outlives_what_ray_laid_there(tmp_path: Path) -> None:
    there = tmp_path / "ray"
    there.mkdir()
    (there / "late.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-c", COPIES],
        cwd=there,
        env=environment(
            tmp_path,
            PYTHONPATH=os.pathsep.join([str(there), str(ROOT)]),
            RAY_JOB_CONFIG_JSON_ENV_VAR=json.dumps(JOB),
        ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said, left = done.stdout.splitlines()
    folder, module, path, runtime_env, hooked = json.loads(said)
    assert Path(folder).parent == tmp_path / "tmp" and module == f"{folder}/late.py"
    assert path == os.pathsep.join([folder, str(ROOT)])
    assert runtime_env == {"env_vars": {"A": "1"}} and hooked, "Ray lays no files anywhere, and workers find them"
    assert left == "False"


def test_without_a_job_all_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    with shipped.own_copy() as place:
        assert (place.folder, place.environment) == (tmp_path, dict(os.environ))
    assert tmp_path.exists() and shipped.for_workers() == {}


def packed(folder: Path) -> Path:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("module.py", "WHAT = 'shipped'\n")
        archive.writestr("orchardist-study/data.csv", "1\n")
    (folder / "package.zip").write_bytes(data.getvalue())
    return folder / "package.zip"


def arrives(tmp: Path, folder: Path, package: Path | None) -> subprocess.CompletedProcess[str]:
    dumps: Any = cloudpickle.dumps
    (tmp / "hook").write_bytes(dumps(arriving(PACKAGE, str(folder))))
    installed = tmp / "installed"
    installed.mkdir(exist_ok=True)
    (installed / "module.py").write_text("WHAT = 'installed'\n")
    return subprocess.run(
        [sys.executable, "-c", ARRIVES, str(tmp / "hook"), str(package or "")],
        cwd=tmp,
        env=environment(tmp, PYTHONPATH=str(installed)),
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_worker_elsewhere_unpacks_what_was_shipped_where_the_driver_has_it(tmp_path: Path) -> None:
    folder = tmp_path / "orchardist-job-1"
    for package in (packed(tmp_path), None):  # the second worker of the machine finds it
        done = arrives(tmp_path, folder, package)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [
            *("shipped", str(folder / "module.py"), str(folder)),
            os.pathsep.join([str(folder), str(tmp_path / "installed")]),
        ]
    assert (folder / "orchardist-study" / "data.csv").exists()
    assert [path.name for path in tmp_path.glob("orchardist-job-*")] == [folder.name]


def test_a_package_that_is_gone_ends_the_worker(tmp_path: Path) -> None:
    done = arrives(tmp_path, tmp_path / "orchardist-job-1", None)
    assert done.returncode != 0 and f"lost what was shipped with the job: {PACKAGE}" in done.stderr


def test_old_copies_that_nobody_works_in_are_removed(tmp_path: Path) -> None:
    for name in ("old", "held", "new"):
        (tmp_path / f"orchardist-job-{name}").mkdir()
        if name != "new":
            os.utime(tmp_path / f"orchardist-job-{name}", (0, 0))
    held = os.open(tmp_path / "orchardist-job-held", os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_SH)
        done = arrives(tmp_path, tmp_path / "orchardist-job-mine", packed(tmp_path))
    finally:
        os.close(held)
    assert done.returncode == 0, done.stderr
    assert {path.name[15:] for path in tmp_path.glob("orchardist-job-*")} == {"held", "new", "mine"}
    shutil.rmtree(tmp_path / "orchardist-job-mine")
