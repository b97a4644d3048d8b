"""`orchardist tickets` with its options, as it is called."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator import Study
from orchestrator.pools.local import LocalPool
from tests.orchestrator.pools import small
from tests.orchestrator.test_cli import Shell


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One trial under two seeds, with a control and siblings."""
    root = small.write_task(tmp_path_factory.mktemp("root"))
    space = {"criterion": "magnitude", "rate": 0.5, "rounds": 1, "retrain": "rewind"}
    spec = small.spec(trials=1, seeds=(0, 1), space=space, tickets={"controls": ["shuffled", "sibling"]})
    Study(spec, root / "store", root=root).run(LocalPool())
    return str(root / "store")


def test_the_table_tells_of_neither_structure_nor_stability_unasked(shell: Shell, store: str) -> None:
    done = shell("tickets", "small", "--store", store)
    assert done.code == 0 and "shuffled" in done.out
    assert "barrier" not in done.out and "neighbouring" not in done.out and "sibling" not in done.out


def test_structure_has_a_table_of_its_own(shell: Shell, store: str) -> None:
    done = shell("tickets", "small", "--store", store, "--structure")
    assert "Shares of empty and full groups" in done.out
    assert "pairs of neighbouring inputs kept" in done.out and "effectively" in done.out


def test_stability_is_measured_with_a_line_for_each_pair_and_kept(shell: Shell, store: str) -> None:
    done = shell("tickets", "small", "--store", store, "--stability")
    assert "Error barriers between siblings:" in done.out and "reinitialised" in done.out
    assert done.err.count("pair ") == 6
    assert shell("tickets", "small", "--store", store, "--stability").err == ""
    (ticket,) = shell.json("tickets", "small", "--store", store)["tickets"]
    assert list(ticket["stability"]) == ["ticket", "dense", "reinitialised"]
    assert ticket["structure"]["effective_sparsity"] >= ticket["sparsity"]


def test_pictures_are_listed_on_stderr_and_json_stays_alone_on_stdout(shell: Shell, store: str, tmp_path: Path) -> None:
    done = shell("tickets", "small", "--store", store, "--plot", str(tmp_path / "made"), "--format", "json")
    assert done.out.startswith("{") and done.out.rstrip().endswith("}")
    drawn = [line.removeprefix("drawn: ") for line in done.err.splitlines() if line.startswith("drawn: ")]
    assert drawn and all(Path(path).is_file() for path in drawn)
    assert any(line.startswith("not drawn: steps.png: ") for line in done.err.splitlines())


def test_agreement_has_a_table_of_its_own_and_a_place_in_the_document(shell: Shell, store: str) -> None:
    done = shell("tickets", "small", "--store", store, "--agreement")
    assert "Agreement of masks, beside chance:" in done.out and "There are no masks to compare" in done.out
    assert shell.json("tickets", "small", "--store", store, "--agreement")["agreement"]["sets"] == []
    assert "agreement" not in shell.json("tickets", "small", "--store", store)


def test_a_ticket_may_be_fetched_with_a_recipe_for_its_weights(shell: Shell, store: str, tmp_path: Path) -> None:
    sizes = []
    for more in ([], ["--recipe"]):
        done = shell("fetch", "small", "-o", str(tmp_path), "--ticket", *more, "--store", store)
        assert done.code == 0, done.err
        sizes.append((tmp_path / "ticket.safetensors").stat().st_size)
    assert sizes[1] < sizes[0]
    done = shell("fetch", "small", "-o", str(tmp_path), "--recipe", "--store", store)
    assert done.code == 2 and "--recipe is of a ticket: legal with --ticket" in done.err


def test_csv_is_one_table(shell: Shell, store: str) -> None:
    for option in ("--structure", "--agreement", "--stability"):
        done = shell("tickets", "small", "--store", store, option, "--format", "csv")
        assert done.code == 2 and "legal with --structure, --agreement, --stability: table, json" in done.err
