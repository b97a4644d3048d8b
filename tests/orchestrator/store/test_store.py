from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import StoreError
from orchestrator.store import Store, paths
from orchestrator.store.paths import Part


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(tmp_path if request.param == "folder" else f"memory://{uuid4().hex}")


def test_a_study_comes_back(store: Store) -> None:
    assert store.studies() == [] and store.read_study("mnist") is None and not store.study_exists("mnist")
    store.write_study("mnist", 'name = "ünï"\n', {"digest": "d"})
    store.write_study("a.b-c_1", "", {})
    assert store.study_exists("mnist") and store.studies() == ["a.b-c_1", "mnist"]
    assert store.read_study("mnist") == ('name = "ünï"\n', {"digest": "d"})


def test_what_is_half_there_or_foreign_is_no_study(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    store.files.write("studies/half/study.toml", b"")
    store.files.write("studies/file", b"")
    store.files.write("studies/an odd name/study.json", b"{}")
    assert store.studies() == [] and store.read_study("half") is None
    store.write_study("torn", "", {})
    for foreign in (b"{", b"[]"):
        store.files.write("studies/torn/study.json", foreign)
        with caplog.at_level(logging.WARNING, "orchardist.store"):
            assert store.read_study("torn") is None
        assert "studies/torn" in caplog.text


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", ".a", "-a", "a b", "a\n", "ä", "a" * 101, "a\\b"])
def test_a_wrong_name_is_refused_with_the_rule(store: Store, name: str) -> None:
    for act in (store.study_exists, store.read_study, lambda name: store.table(name, "events")):
        with pytest.raises(StoreError, match="1 to 100 of the characters") as caught:
            act(name)
        assert repr(name) in str(caught.value)


@given(st.text(max_size=5) | st.from_regex(r"[A-Za-z0-9._/-]+"))
def test_no_study_name_leaves_the_root(name: str) -> None:
    try:
        path = paths.study(name)
    except StoreError:
        return
    assert path == f"studies/{name}" and "/" not in name and name not in ("", ".", "..")


@given(st.integers(0, 10**8), st.integers(0, 10**10), st.sampled_from(["outcomes", "events"]), st.booleans())
def test_a_parts_name_can_be_taken_apart(epoch: int, seq: int, kind: str, merged: bool) -> None:
    part = Part(epoch, seq, kind, merged)
    assert paths.parse_part(part.name) == part


def test_ledger_and_table(store: Store) -> None:
    ledger = store.ledger("mnist", 1)
    ledger.append("events", [{"event": "started", "detail": {"workers": 2}}])
    ledger.flush()
    assert store.table("mnist", "events", ["event", "detail"]).to_pylist() == [
        {"event": "started", "detail": '{"workers": 2}'}
    ]


def test_the_url_as_given_and_the_name_to_show() -> None:
    store = Store("memory://user:secret@bucket/x")
    assert store.url == "memory://user:secret@bucket/x" and store.name == "memory://bucket/x"


def test_a_worker_imports_neither_pyarrow_nor_fsspec_for_a_folder(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from orchestrator.store import Store\n"
        "store = Store(sys.argv[1])\n"
        "store.files.probe()\n"
        "assert store.states.header('0' * 64) is None\n"
        "print({'pyarrow', 'fsspec', 'torch', 'ray', 'numpy'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True)
    assert done.stdout == "set()\n"
