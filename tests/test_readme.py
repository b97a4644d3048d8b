"""The README's commands, study file and Python do what it says, on a small study of the same name."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from typer.main import get_command
from typer.testing import CliRunner

from orchestrator import Study, StudySpec, cli
from orchestrator.pools.local import LocalPool
from tests.test_project import FENCE, commands, is_tree, tree_paths

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()

RUNS = {"front", "fetch", "status", "list", "check"}
"""Subcommands that are run; of `run`, only what stays in this process is."""


def blocks(language: str) -> list[str]:
    return [block for found, block in FENCE.findall(README) if found == language]


def shell() -> list[list[str]]:
    return [words for block in blocks("sh") for words in commands(block) if words[0] == "orchardist"]


def is_cheap(words: list[str]) -> bool:
    return words[1] in RUNS or "--local" in words


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current folder: the examples, and a store in which the demo's study has run with a few short trials."""
    folder = tmp_path_factory.mktemp("desk")
    shutil.copytree(ROOT / "examples", folder / "examples")
    spec = StudySpec.load(ROOT / "examples" / "mnist.toml").model_dump(exclude_defaults=True)
    spec["train"] |= {"epochs": 3, "retrain_epochs": 1}
    # One that surely stays near the dense model, for the bounds that the README shows.
    first = {"criterion": "magnitude", "rate": 0.1, "rounds": 1, "retrain": "lr-rewind"}
    study = Study(StudySpec(**{**spec, "trials": 3, "enqueue": [first]}), folder / "orchard", root=folder / "examples")
    assert study.run(LocalPool()).done == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("ORCHARDIST_STORE", raising=False)
        yield folder


@pytest.mark.parametrize("words", shell(), ids=" ".join)
def test_a_command_is_spelt_right(words: list[str]) -> None:
    command: Any = get_command(cli.app)
    subcommand = command.commands[words[1]]
    subcommand.make_context(words[1], words[2:])


@pytest.mark.parametrize("words", [words for words in shell() if is_cheap(words)], ids=" ".join)
def test_a_command_works(words: list[str], desk: Path) -> None:
    pytest.importorskip("matplotlib")
    result = CliRunner().invoke(cli.app, words[1:], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip()
    for option, made in pairwise(words):
        if option in ("-o", "--plot"):
            assert (desk / made).exists()


def test_studies_are_called_by_the_names_that_they_have() -> None:
    names = {StudySpec.load(path).name for path in (ROOT / "examples").glob("*.toml")}
    asked = {"front", "report", "fetch", "status", "techniques", "tickets", "responsible"}
    assert {words[2] for words in shell() if words[1] in asked} <= names


def test_most_commands_are_run() -> None:
    assert {words[1] for words in shell() if is_cheap(words)} == {*RUNS, "run"}


def test_the_fetched_model_loads_as_shown(desk: Path) -> None:
    (code,) = [block for block in blocks("python") if "orchestrator.load" in block]
    folder = re.findall(r'load\("([^"]+)"\)', code)[0]
    if not (desk / folder).exists():
        Study.open(desk / "orchard", "mnist-lenet").fetch(None, desk / folder)
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert isinstance(names["model"], nn.Module) and not names["model"].training


def test_the_results_read_as_shown(desk: Path) -> None:
    (block,) = [block for block in blocks("python") if "outcomes.parquet" in block]
    ran = 0
    for line in block.splitlines():
        library = line.partition(".")[0]
        if importlib.util.find_spec(library):
            assert len(eval(line, {library: importlib.import_module(library)})) == 5
            ran += 1
    assert ran, "pandas comes with the built-in tasks' data"


def test_the_study_file_is_a_good_one() -> None:
    block, *_ = blocks("toml")
    spec = StudySpec.parse(block, "README.md")
    assert Study(spec, "memory://readme").check().layers


@pytest.mark.parametrize("part", blocks("toml")[1:], ids=lambda part: part.partition("\n")[0])
def test_the_parts_of_study_files_are_good_ones(part: str) -> None:
    spec = StudySpec.parse(f'name = "part"\ntask = "digits"\n{part}')
    assert spec.check_mixes()


def test_the_task_file_is_a_good_one(tmp_path: Path) -> None:
    (code,) = [block for block in blocks("python") if "def task" in block]
    (tmp_path / "my_task.py").write_text(code)
    spec = StudySpec(
        name="own",
        task="my_task.py",
        trials=1,
        objectives=("missed", "sparsity"),
        train={"epochs": 2, "retrain_epochs": 1},
        space={"rate": 0.3},
    )
    study = Study(spec, tmp_path / "orchard", root=tmp_path)
    assert study.run(LocalPool()).done == 1
    assert {"missed", "test_missed", "worst_class_accuracy"} <= study.front().points[0].keys()


def test_the_tree_has_every_room_and_every_module_outside_one() -> None:
    (block,) = [block for _, block in FENCE.findall(README) if is_tree(block)]
    named = {path.rstrip("/") for path in tree_paths(block)}
    for package in ("orchestrator", "search"):
        modules = {path for path in (ROOT / package).glob("*.py") if path.name != "__init__.py"}
        rooms = {path.parent for path in (ROOT / package).glob("*/__init__.py")}
        assert {path.relative_to(ROOT).as_posix() for path in modules | rooms} - named == set()


def test_the_picture_is_small_and_whole() -> None:
    picture = (ROOT / "examples" / "front.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and picture.rstrip().endswith(b"IEND\xaeB`\x82")
    assert len(picture) < 100_000


def test_what_is_shown_is_what_the_demo_prints(desk: Path) -> None:
    """The columns of the table that the README shows are those of today's front."""
    (shown,) = [block for block in blocks("") if "<- knee" in block]
    header = next(line for line in shown.splitlines() if line.startswith("key "))
    printed = CliRunner().invoke(cli.app, ["front", "mnist-lenet", "--store", str(desk / "orchard")]).stdout
    assert header.split() == printed.splitlines()[0].split()
