from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import StoreError
from orchestrator.store import Files, States
from tests.contracts.store import KEY, safetensors


@pytest.mark.parametrize("key", ["", "ab", "../" + "a" * 61, "A" * 64, "g" * 64, "a" * 64 + "\n"])
def test_a_key_is_64_hex_digits(tmp_path: Path, key: str) -> None:
    with pytest.raises(StoreError, match="64 hex digits"):
        States(Files(tmp_path)).has(key)


def test_the_layout_is_the_documented_one(tmp_path: Path) -> None:
    States(Files(tmp_path)).commit(KEY, safetensors())
    assert (tmp_path / "states" / "ab" / f"{KEY}.safetensors").exists()


def test_a_header_longer_than_the_first_read(tmp_path: Path) -> None:
    states = States(Files(tmp_path))
    metadata = {"outcome": "x" * 200_000}
    states.commit(KEY, safetensors(metadata, size=100_000))
    assert states.header(KEY) == metadata


def test_a_header_of_exactly_the_first_read(tmp_path: Path) -> None:
    states = States(Files(tmp_path))
    for length in range(65_300, 65_600):
        states.replace(KEY, safetensors({"x": "y" * length}, size=1))
        assert states.header(KEY) == {"x": "y" * length}
        if length == 65_302:
            break
    for total in (65_535, 65_536, 65_537):
        data = safetensors({}, size=total - len(safetensors({}, size=10_000)) + 10_000)
        states.replace(KEY, data)
        assert len(data) == total and states.header(KEY) == {}


def test_the_safetensors_library_agrees(tmp_path: Path) -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    import numpy as np

    data = numpy.save({"a": np.zeros((3, 4), "f4"), "b": np.ones(5, "u1")}, metadata={"outcome": "{}"})
    states = States(Files(tmp_path))
    states.commit(KEY, data)
    assert states.header(KEY) == {"outcome": "{}"}
    assert numpy.load(states.read(KEY)).keys() == {"a", "b"}


@given(st.binary(max_size=200))
def test_foreign_bytes_are_no_state(data: bytes) -> None:
    states = States(Files(f"memory://{uuid4().hex}"))
    states.files.write(f"states/ab/{KEY}.safetensors", data)
    assert states.header(KEY) is None or data.endswith(b"}")


@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_foreign_json_is_no_header(value: object) -> None:
    header = json.dumps(value).encode()
    states = States(Files(f"memory://{uuid4().hex}"))
    states.files.write(f"states/ab/{KEY}.safetensors", len(header).to_bytes(8, "little") + header)
    assert states.header(KEY) in (None, {})


def test_a_torn_state_is_reported_and_kept_for_a_look(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    states = States(Files(tmp_path))
    path = f"states/ab/{KEY}.safetensors"
    states.files.write(path, b"torn")
    with caplog.at_level(logging.WARNING, "orchardist.store"):
        assert states.header(KEY) is None
    assert path in caplog.text and "copied to set-aside/" in caplog.text
    (aside,) = (tmp_path / "set-aside" / "states" / "ab").iterdir()
    assert aside.read_bytes() == b"torn"


def test_a_torn_state_in_a_store_that_may_only_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class ReadOnly(Files):
        def write(self, path: str, data: object) -> None:
            raise StoreError("cannot write: Permission denied")

    Files(tmp_path).write(f"states/ab/{KEY}.safetensors", b"torn")
    with caplog.at_level(logging.WARNING, "orchardist.store"):
        assert States(ReadOnly(tmp_path)).header(KEY) is None
    assert "left where it is" in caplog.text


def test_a_whole_state_that_took_a_torn_ones_place_stays(tmp_path: Path) -> None:
    class Meanwhile(Files):
        """Another writer commits between the look into the header and the move."""

        then: Callable[[], None]

        def set_aside(self, path: str, why: str, torn: Callable[[bytes], bool], *, stays: bool = False) -> bool:
            self.then()
            return super().set_aside(path, why, torn, stays=stays)

    files = Meanwhile(tmp_path)
    path = f"states/ab/{KEY}.safetensors"
    files.write(path, b"torn")
    files.then = lambda: files.write(path, safetensors({"by": "other"}))
    states = States(files)
    assert states.header(KEY) is None
    assert states.header(KEY) == {"by": "other"}


def test_keys_leaves_out_what_is_no_state(tmp_path: Path) -> None:
    states = States(Files(tmp_path))
    assert list(states.keys()) == []
    keys = sorted(f"{number:02x}" * 32 for number in (3, 1, 171))
    for key in keys:
        states.commit(key, safetensors())
    for foreign in ("states/README", f"states/01/{keys[1]}.safetensors", "states/01/x.safetensors"):
        states.files.write(foreign, b"")
    assert list(states.keys()) == keys
