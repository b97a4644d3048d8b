"""Who imports whom, read from the source: imports inside functions count too."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What is imported -> the only files that may (a pattern's * crosses folders). What is not named here is free.
ONLY = {
    "optuna": ("search/proposer.py", "search/optuna_study.py"),
    "mlflow": ("orchestrator/trackers/mlflow.py",),
    "transformers": ("orchestrator/export/pretrained.py",),
    "ray": (
        "orchestrator/pools/ray.py",
        "orchestrator/pools/actor.py",
        "orchestrator/pools/shipped.py",
        "orchestrator/jobs/submit.py",
    ),
    "pyarrow": ("orchestrator/store/*",),
    "fsspec": ("orchestrator/store/*",),
    "typer": ("orchestrator/cli.py", "orchestrator/progress.py"),
    "rich": ("orchestrator/cli.py", "orchestrator/progress.py"),
    "search": (
        "search/*",
        "orchestrator/spec.py",
        "orchestrator/study.py",
        "orchestrator/plan.py",
        "orchestrator/retrieve.py",
        "orchestrator/cli.py",
        "orchestrator/front.py",
        "orchestrator/driver.py",
        "orchestrator/judging.py",
        "orchestrator/warm_start.py",
        "orchestrator/history.py",
        "orchestrator/catalogue.py",
        "orchestrator/code.py",
        "orchestrator/jobs/shipping.py",
        "orchestrator/trackers/optuna.py",
        "orchestrator/__init__.py",
    ),
}

# What is imported -> the files that must not.
NEVER = {
    "orchestrator": ("search/*",),
    "torch": (
        "search/*",
        "orchestrator/errors.py",
        "orchestrator/registry.py",
        "orchestrator/outcome.py",
        "orchestrator/ops.py",
        "orchestrator/plan.py",
        "orchestrator/planning/trial.py",
        "orchestrator/planning/builder.py",
        "orchestrator/planning/pruning.py",
        "orchestrator/planning/tickets.py",
        "orchestrator/mixes.py",
        "orchestrator/pruning/schedules.py",
        "orchestrator/graph.py",
        "orchestrator/spec.py",
        "orchestrator/settings.py",
        "orchestrator/study.py",
        "orchestrator/driver.py",
        "orchestrator/history.py",
        "orchestrator/front.py",
        "orchestrator/cli.py",
        "orchestrator/tasks/info.py",
        "orchestrator/tasks/source.py",
        "orchestrator/store/*",
        "orchestrator/pools/protocol.py",
    ),
}

# `orchardist --help` answers at once: these take a second and more to import.
NOT_FOR_HELP = ("torch", "ray", "optuna", "pyarrow", "pydantic")


def imported(source: str) -> Iterator[tuple[int, str]]:
    """Line and top-level name of everything that the source imports from outside its own package.

    Counted wherever it stands: in functions, under TYPE_CHECKING, and by `import_module("…")`.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            modules = [node.module]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).rpartition(".")[2]
            modules = [str(node.args[0].value)] if called in ("import_module", "__import__") else []
        else:
            continue
        for module in modules:
            if not module.startswith("."):
                yield node.lineno, module.partition(".")[0]


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns names the path."""
    return any(fnmatch(path, pattern) for pattern in patterns)


def violations(path: str, source: str) -> list[str]:
    """What the source, standing at this path, imports against the tables."""
    found = []
    for line, name in imported(source):
        if name in ONLY and not matches(path, ONLY[name]):
            found.append(f"{path}:{line} imports {name}, which only {', '.join(ONLY[name])} may")
        if name in NEVER and matches(path, NEVER[name]):
            found.append(f"{path}:{line} imports {name}, which it must not")
    return found


def sources() -> list[str]:
    return sorted(
        path.relative_to(ROOT).as_posix() for top in ("orchestrator", "search") for path in (ROOT / top).rglob("*.py")
    )


@pytest.mark.parametrize("path", sources())
def test_imports_keep_to_the_tables(path: str) -> None:
    assert violations(path, (ROOT / path).read_text()) == []


def test_the_tables_name_files_that_exist() -> None:
    here = sources()
    gone = [name for patterns in NEVER.values() for name in patterns if not any(fnmatch(path, name) for path in here)]
    assert not gone, "a renamed file would slip through"


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("search/space.py", "import torch"),
        ("search/space.py", "from orchestrator.errors import InputError"),
        ("search/pareto.py", "def f():\n    import optuna"),
        ("search/pareto.py", "import pyarrow.compute as pc"),
        ("orchestrator/study.py", "from optuna.samplers import TPESampler"),
        ("orchestrator/graph.py", "if TYPE_CHECKING:\n    from torch import Tensor"),
        ("orchestrator/pools/local.py", "def f():\n    import ray.util"),
        ("orchestrator/retrieve.py", "from importlib import import_module\nimport_module('fsspec.core')"),
        ("orchestrator/store/states.py", "import torch.nn"),
        ("orchestrator/training/loop.py", "from search.query import parse"),
        ("orchestrator/study.py", "import rich.progress"),
    ],
)
def test_canary_a_planted_import_is_caught(path: str, source: str) -> None:
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("search/proposer.py", "import optuna"),
        ("orchestrator/pools/ray.py", "import ray"),
        ("orchestrator/pools/__init__.py", "from .ray import RayPool\nfrom . import ray"),
        ("orchestrator/study.py", "import orchestrator.pools.ray"),
        ("orchestrator/store/ledger.py", "import pyarrow.parquet as pq"),
        ("orchestrator/training/loop.py", "import torch"),
        ("orchestrator/plan.py", "from search.space import Space"),
    ],
)
def test_what_the_tables_allow_passes(path: str, source: str) -> None:
    assert violations(path, source) == []


def test_the_command_line_starts_light() -> None:
    code = f"import sys, orchestrator.cli; print(*sorted(set({NOT_FOR_HELP!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
