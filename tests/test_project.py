"""What the project says of itself is true: its version, its README's file tree, links and commands."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)[^)]*\)|<(?:img|source|a)\b[^>]*\b(?:src|srcset|href)=\"([^\"]+)\"")


def tree_paths(block: str) -> Iterator[str]:
    """Every path that a file tree names: indentation nests, and two spaces end a name.

    A folder ends with a slash. Several names of one folder may share a line, separated by `, ` or ` · `.
    """
    folders: list[tuple[int, str]] = []
    for line in block.splitlines():
        if not line.strip():
            continue
        indent = len(line) - len(line.lstrip())
        while folders and folders[-1][0] >= indent:
            folders.pop()
        parent = folders[-1][1] if folders else ""
        names = [name for name in re.split(r", | · ", re.split(r"\s{2,}", line.strip())[0]) if name]
        for name in names:
            yield parent + name
        if len(names) == 1 and names[0].endswith("/"):
            folders.append((indent, parent + names[0]))


def is_tree(block: str) -> bool:
    """Whether a fenced block is the file tree: it names this project's packages as folders."""
    return all(re.search(rf"^\s*{name}/", block, re.MULTILINE) for name in ("orchestrator", "search"))


def commands(block: str) -> Iterator[list[str]]:
    """The words of every command in a shell block: prompts, comments and continued lines are seen through."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words = words[1:]
        if words:
            yield words


def test_a_tree_is_read_as_it_is_drawn() -> None:
    block = "search/              no torch\n  space.py           parameters\norchestrator/\n  pools/    where\n"
    block += "    ray.py  local.py\n  cli.py\nMakefile, LICENSE\n"
    assert list(tree_paths(block)) == [
        "search/",
        "search/space.py",
        "orchestrator/",
        "orchestrator/pools/",
        "orchestrator/pools/ray.py",
        "orchestrator/cli.py",
        "Makefile",
        "LICENSE",
    ]
    assert is_tree(block)


def test_commands_are_read_through_prompts_and_comments() -> None:
    block = "# first\n$ make demo   # ninety seconds\nFOO=1 orchardist front x \\\n  --where 'accuracy >= 0.9'\n"
    assert list(commands(block)) == [
        ["make", "demo"],
        ["orchardist", "front", "x", "--where", "accuracy >= 0.9"],
    ]


@pytest.fixture(scope="module")
def project() -> dict[str, str]:
    loaded: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return loaded


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "README.md").read_text()


def test_the_changelog_begins_with_the_version(project: dict[str, str]) -> None:
    headings = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    versions = [heading for heading in headings if heading != "Unreleased"]
    assert versions[0] == project["version"]


def test_the_constraints_pin_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    pinned = set(re.findall(r"^([a-z0-9-]+)==\S+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert {re.split(r"[\[<>=]", name)[0] for name in wanted} <= pinned


def test_the_readme_tree_is_on_the_disk(readme: str) -> None:
    trees = [block for _, block in FENCE.findall(readme) if is_tree(block)]
    assert len(trees) == 1, "one fenced block shows the file tree"
    named = list(tree_paths(trees[0]))
    assert [path for path in named if not (ROOT / path).exists()] == []
    assert [path for path in named if path.endswith("/") != (ROOT / path).is_dir()] == []


def test_the_readme_links_lead_somewhere(readme: str) -> None:
    prose = FENCE.sub("", readme)
    links = [first or second for first, second in LINK.findall(prose)]
    local = [link.partition("#")[0] for link in links if not re.match(r"[a-z]+:", link)]
    assert [link for link in local if link and not (ROOT / link).exists()] == []


def test_the_readme_commands_are_real(readme: str) -> None:
    found = [words for language, block in FENCE.findall(readme) if language == "sh" for words in commands(block)]
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    made = {word for words in found if words[0] == "make" for word in words[1:] if re.fullmatch(r"[a-z]+", word)}
    assert {"demo", "test"} <= made, "the two commands that a newcomer needs"
    assert made <= targets
    used = {words[1] for words in found if words[0] == "orchardist" and not words[1].startswith("-")}
    assert used, "the README shows the command line"
    assert used <= subcommands()


def subcommands() -> set[str]:
    """The names that `orchardist --help` lists."""
    from typer.main import get_command

    from orchestrator import cli

    command = get_command(cli.app)
    return set(getattr(command, "commands", {}))
