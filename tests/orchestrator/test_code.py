from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from orchestrator.code import code_digest

ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, code: str) -> list[str]:
    """What a process prints that finds the packages in `folder`."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout.split()


def test_the_digest_is_that_of_the_code_that_was_imported_and_not_of_what_lies_there_now(tmp_path: Path) -> None:
    for package in ("orchestrator", "search"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    update = (
        "import pathlib; from orchestrator import Study\n"
        "path = pathlib.Path('orchestrator/driver.py'); path.write_text(path.read_text() + '\\n')\n"
        "from orchestrator.code import code_digest; print(code_digest())\n"
    )
    (before,) = run(tmp_path, update)
    (after,) = run(tmp_path, "from orchestrator.code import code_digest; print(code_digest())")
    assert before != after, "workers that are started after an update do not work for a driver from before it"
    assert len(before) == len(code_digest()) == 64
