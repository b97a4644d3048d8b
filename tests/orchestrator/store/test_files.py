from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest

from orchestrator.errors import StoreError
from orchestrator.store import Files
from tests.contracts.store import CHECKS


@pytest.fixture(params=["folder", "odd folder", "file URL", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return {
        "folder": str(tmp_path / "store"),
        "odd folder": str(tmp_path / "an 'odd' \"one\" #1 100% ünïcödé 果樹園"),
        "file URL": f"file://{tmp_path}/store",
        "memory": f"memory://{uuid4().hex}",
    }[request.param]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Callable[[str], None], url: str) -> None:
    check(url)


def test_contract_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    for number, check in enumerate(CHECKS):
        check(str(tmp_path / str(number)))


def test_contract_of_object_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code path of every other fsspec URL, on fsspec's memory; its create alone is not atomic there."""
    from orchestrator.store import files as module

    monkeypatch.setattr(module, "Memory", module.Objects)
    for check in CHECKS:
        if "one_of_many" not in check.__name__:
            check(f"memory://{uuid4().hex}")


def test_the_kit_catches_a_create_that_looks_first_and_writes_then(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem  # type: ignore[import-untyped,unused-ignore]

    from orchestrator.store import files as module

    class Racy(module.Memory):
        def create(self, path: str, data: module.Data) -> bool:
            if self.fs.isfile(self._full(path)):
                return False
            os.sched_yield()
            MemoryFileSystem.pipe_file(self.fs, self._full(path), bytes(data))
            return True

    monkeypatch.setattr(module, "Memory", Racy)
    check = next(check for check in CHECKS if "one_of_many" in check.__name__)
    with pytest.raises(AssertionError):
        for _ in range(200):
            check(f"memory://{uuid4().hex}")


def test_a_killed_writers_leftovers_are_neither_seen_nor_in_the_way(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from orchestrator.store import Files\n"
        "os.link = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "Files(sys.argv[1]).create('folder/file', b'lost')\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert killed.returncode == -9
    assert len(os.listdir(tmp_path / "folder")) == 1, "the leftover is there"
    files = Files(tmp_path)
    assert files.list("folder") == []
    assert files.create("folder/file", b"kept") and files.read("folder/file") == b"kept"


def test_a_lost_create_leaves_nothing_behind(tmp_path: Path) -> None:
    files = Files(tmp_path)
    assert files.create("folder/file", b"1") and not files.create("folder/file", b"2")
    assert os.listdir(tmp_path / "folder") == ["file"]


@pytest.mark.parametrize("error", [FileExistsError("lost"), OSError(errno.EINVAL, "lost, as SeaweedFS says it")])
def test_a_create_with_an_unclear_answer_reads_back(error: OSError) -> None:
    from orchestrator.store.objects import Objects

    class Unclear:
        """A store's driver that reports a conflict; `stored` is what lies there then."""

        stored: bytes | None = None

        def pipe_file(self, *_: object, **__: object) -> None:
            raise error

        def info(self, path: str) -> dict[str, object]:
            return {"type": "file", "size": len(self.cat_file(path))}

        def cat_file(self, path: str) -> bytes:
            if self.stored is None:
                raise FileNotFoundError(path)
            return self.stored

    objects = Objects("memory://unclear")
    objects.fs = driver = Unclear()
    with pytest.raises(OSError, match="lost"):
        objects.create("file", b"mine")
    driver.stored = b"other's"
    assert not objects.create("file", b"mine")
    driver.stored = b"mine"
    assert objects.create("file", b"mine")


def test_a_relative_folder_is_resolved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = Files("./orchard")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    files.write("file", b"1")
    pickle.loads(pickle.dumps(files)).write("other", b"2")
    assert sorted(os.listdir(tmp_path / "orchard")) == ["file", "other"]


def test_home_expands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Files("~/orchard").write("file", b"1")
    assert (tmp_path / "orchard" / "file").read_bytes() == b"1"


def test_nothing_is_made_before_the_first_write(tmp_path: Path) -> None:
    files = Files(tmp_path / "store")
    assert files.list("") == [] and not files.exists("file")
    assert not (tmp_path / "store").exists()


def test_memory_is_shared_in_the_process() -> None:
    url = f"memory://{uuid4().hex}"
    Files(url).write("file", b"1")
    assert Files(url).read("file") == b"1"


@pytest.mark.parametrize("url", ["", "nonsense://x", "s4://bucket/x"])
def test_a_url_that_cannot_be_opened_is_one_line(url: str) -> None:
    with pytest.raises(StoreError) as caught:
        Files(url)
    assert "\n" not in str(caught.value) and url in str(caught.value)


def test_a_file_in_the_roots_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match=r"cannot open the store .*/file"):
        Files(tmp_path / "file")
    with pytest.raises(StoreError, match=r"cannot write .* in the store .*/file/below"):
        Files(tmp_path / "file" / "below").probe()


def test_an_unwritable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)  # root may write anywhere, so that a mode alone proves nothing
    with pytest.raises(StoreError, match=r"^cannot write \.probe-\w+ in the store .*: Permission denied$"):
        Files(tmp_path).probe()


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    files = Files(tmp_path)
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StoreError, match="No space left"):
        files.write("file", b"1")
    assert os.listdir(tmp_path) == []


def test_credentials_are_in_no_message() -> None:
    files = Files("memory://user:secret@bucket/x")
    assert files.name == "memory://bucket/x"
    with pytest.raises(StoreError) as caught:
        Files("nonsense://user:secret@host/x")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("path", ["../file", "/file", "a/../../file"])
def test_no_path_leaves_the_root(tmp_path: Path, path: str) -> None:
    with pytest.raises(AssertionError):
        Files(tmp_path).write(path, b"")
