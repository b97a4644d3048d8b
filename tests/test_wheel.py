"""The wheel holds the two packages and nothing else, and works beside a user's own folder called `search`."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run it without the paths that this process was given."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "ORCHARDIST_"))}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=bare, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    done = run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of a fresh environment that holds the wheel, and borrows its dependencies from this one.

    A `.pth` puts this environment's packages behind the fresh ones and leaves its own `.pth` files unread, so that an
    editable install of this checkout is out of reach.
    """
    folder = tmp_path_factory.mktemp("fresh") / "environment"
    venv.create(folder, with_pip=False, symlinks=True)
    binaries = folder / "bin"
    done = run(
        *(
            sys.executable,
            "-m",
            "pip",
            "--python",
            binaries / "python",
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
        ),
        *("--no-compile", wheel),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return binaries


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A user's folder with a package of its own that is called `search`."""
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "__init__.py").write_text('"""Finds things."""\nFOREIGN = True\n')
    return tmp_path


def test_the_wheel_holds_exactly_the_two_packages(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    info = f"{PROJECT['name']}-{PROJECT['version']}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"orchestrator", "search", info}
    assert f"{info}/licenses/LICENSE" in names
    on_disk = {
        path.relative_to(ROOT).as_posix() for top in ("orchestrator", "search") for path in (ROOT / top).rglob("*.py")
    }
    assert on_disk == {name for name in names if name.endswith(".py")}


def test_the_fresh_environment_has_its_own_copy(scripts: Path, tmp_path: Path) -> None:
    done = run(scripts / "python", "-c", "import orchestrator, search; print(orchestrator.__file__)", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(scripts.parent)


def test_the_command_works_in_a_folder_with_its_own_search(scripts: Path, foreign: Path) -> None:
    done = run(scripts / "orchardist", "list", "criteria", cwd=foreign)
    assert done.returncode == 0, done.stderr
    assert "magnitude" in done.stdout


def test_python_started_in_a_folder_with_its_own_search_works_or_says_so(scripts: Path, foreign: Path) -> None:
    """`python -c` puts the current folder first, so `search` is the user's: the message must name it."""
    done = run(scripts / "python", "-c", "from orchestrator import StudySpec; print(StudySpec.__name__)", cwd=foreign)
    if done.returncode == 0:
        assert done.stdout.strip() == "StudySpec"
    else:
        assert str(foreign / "search") in done.stderr.strip().splitlines()[-1]
