"""What a store says when it cannot be reached or trusted, and what it never says."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from orchestrator import Study
from orchestrator.errors import StoreError
from orchestrator.pools.local import LocalPool
from orchestrator.store import Files, acquire
from orchestrator.store.address import without_credentials
from tests.faulty import Faulty
from tests.orchestrator.pools import small
from tests.orchestrator.store.test_lease import Time
from tests.servers import ACCESS_KEY, SECRET_KEY, free_ports

SECRET = "not-to-be-seen-anywhere"


def test_a_bucket_that_is_not_there(s3: str) -> None:
    files = Files("s3://no-such-bucket/x")
    for act in (files.probe, lambda: files.list("studies"), lambda: files.read("file")):
        with pytest.raises(
            StoreError, match=r"^cannot \w+ .*s3://no-such-bucket/x: The specified bucket does not exist$"
        ):
            act()


def test_wrong_credentials(seaweed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from s3fs import S3FileSystem

    for name, hint in (("AWS_ACCESS_KEY_ID", "does not exist"), ("AWS_SECRET_ACCESS_KEY", "signature")):
        with monkeypatch.context() as patch:
            patch.setenv(name, SECRET)
            S3FileSystem.clear_instance_cache()
            with pytest.raises(
                StoreError, match=f"{hint}.*; check the credentials and what they may do there$"
            ) as caught:
                Files(seaweed).probe()
            assert SECRET not in str(caught.value) and SECRET_KEY not in str(caught.value)


def test_no_credentials(seaweed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from s3fs import S3FileSystem

    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    S3FileSystem.clear_instance_cache()
    with pytest.raises(StoreError, match="^cannot write .*: Unable to locate credentials$"):
        Files(seaweed).probe()


def test_an_address_where_nothing_listens(seaweed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from s3fs import S3FileSystem

    with free_ports(1) as (port,):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    S3FileSystem.clear_instance_cache()
    time_ = Time()
    with pytest.raises(
        StoreError, match=rf"Could not connect to the endpoint URL: .*127.0.0.1:{port}/.*\(waited [5-9] s\)"
    ):
        Files(seaweed, clock=time_, sleep=time_.sleep).probe()


def test_without_s3fs_it_says_what_to_install() -> None:
    code = (
        "import sys\n"
        "sys.modules['s3fs'] = None\n"
        "from orchestrator.store import Files\n"
        "try:\n"
        "    Files('s3://bucket/x')\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = "cannot open the store s3://bucket/x: s3fs is not installed: pip install 'orchardist[s3]'\n"
    assert done.stdout == expected


# --- Waiting -------------------------------------------------------------------------------------------------------


def test_a_store_that_has_answered_is_waited_for_longer(caplog: pytest.LogCaptureFixture) -> None:
    server, time_ = Faulty(uuid4().hex), Time()
    files = Files(server.url, clock=time_, sleep=time_.sleep)
    server.down = "fails"
    waits = []
    for _ in range(3):
        server.down, began = "fails", time_.now
        with pytest.raises(StoreError, match=r"the call failed \(waited \d+ s\)$"):
            files.read("file")
        waits.append(time_.now - began)
        if len(waits) == 1:
            server.down = ""
            files.write("file", b"1")
    assert 5 <= waits[0] < 10 and 300 <= waits[1] < 305 and 5 <= waits[2] < 10, "one that was given up is given up soon"


def test_waiting_is_quiet_patient_and_said(caplog: pytest.LogCaptureFixture) -> None:
    server, time_ = Faulty(uuid4().hex), Time()
    files = Files(server.url, clock=time_, sleep=time_.sleep)
    files.write("file", b"1")
    server.down = "fails"
    time_.then = lambda: setattr(server, "down", "fails" if time_.now < 100 else "")
    with caplog.at_level(logging.WARNING, "orchardist.store"):
        assert files.read("file") == b"1"
    assert server.calls < 60, "pauses grow"
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 5 and "waiting for it" in said[0] and "answers again after 10" in said[-1]


def test_pauses_grow_and_no_two_wait_alike() -> None:
    pauses: list[list[float]] = []
    for _ in range(2):
        server, time_ = Faulty(uuid4().hex), Time()
        server.down = "fails"
        slept: list[float] = []

        def sleep(seconds: float, time_: Time = time_, slept: list[float] = slept) -> None:
            slept.append(seconds)
            time_.sleep(seconds)

        with pytest.raises(StoreError):
            Files(server.url, clock=time_, sleep=sleep).read("file")
        pauses.append(slept)
    assert pauses[0] != pauses[1]
    for slept in pauses:
        for number, seconds in enumerate(slept):
            longest = min(0.1 * 2**number, 4.0)
            assert longest / 2 <= seconds <= longest


def test_what_waiting_does_not_help_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    time_ = Time()
    files = Files(tmp_path, clock=time_, sleep=time_.sleep)
    files.write("file", b"1")
    for number in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ENAMETOOLONG):

        def refuse(*_: object, number: int = number) -> int:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", refuse)
            with pytest.raises(StoreError, match=os.strerror(number)):
                files.write("file", b"2")
    assert time_.now == 0


def test_patience_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHARDIST_PATIENCE_SECONDS", "40")
    server, time_ = Faulty(uuid4().hex), Time()
    files = Files(server.url, clock=time_, sleep=time_.sleep)
    files.write("file", b"1")
    server.down = "fails"
    with pytest.raises(StoreError, match=r"\(waited 4\d s\)"):
        files.read("file")


# --- What a store can promise --------------------------------------------------------------------------------------


class Careless(Faulty):
    """Lets every writer win, as stores do that do not know If-None-Match."""

    def call(self, kind: str, act: Callable[[], Any], torn: Callable[[], Any] | None = None) -> Any:
        with suppress(FileExistsError):
            return super().call(kind, act, torn)
        return None


def test_a_store_that_lets_every_writer_win_is_found_out(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = Files(Careless(uuid4().hex).url)
    with caplog.at_level(logging.WARNING, "orchardist.store"):
        files.probe()
    assert not files.creates_once
    assert "lets several writers create the same file" in caplog.text
    good = Files(Faulty(uuid4().hex).url)
    good.probe()
    assert good.creates_once and good.list("") == []


def test_there_the_lease_waits_and_looks_again() -> None:
    files = Files(f"memory://{uuid4().hex}")
    files.creates_once = False
    path = "studies/s/lease/000001.json"
    # Another driver's write lands on top of ours while we wait: it has the study.
    time_ = Time(lambda: files.write(path, b'{"host": "here", "boot_id": "b", "pid": 9}'))
    with pytest.raises(StoreError, match="process 9 on here"):
        acquire(files, "s", host="here", pid=2, boot="b", clock=time_, sleep=time_.sleep, alive={9}.__contains__)
    assert time_.now == 3.0
    calm = Time()
    assert acquire(files, "t", host="here", pid=2, boot="b", clock=calm, sleep=calm.sleep).epoch == 1


def test_real_servers_let_one_writer_win(s3: str) -> None:
    files = Files(s3)
    files.probe()
    assert files.creates_once and files.list("") == []


# --- Secrets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://user:secret@bucket/x", "s3://bucket/x"),
        ("az://c/x?sig=secret&sv=2", "az://c/x?sig=***&sv=2"),
        ("http://h/x?X-Amz-Signature=secret", "http://h/x?X-Amz-Signature=***"),
        ("simplecache::s3://u:p@b/x?token=secret", "simplecache::s3://b/x?token=***"),
        ("s3://monkey/keys", "s3://monkey/keys"),
    ],
)
def test_urls_are_shown_without_credentials(url: str, shown: str) -> None:
    assert without_credentials(url) == shown


def test_a_secret_of_the_environment_or_the_options_is_in_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", SECRET)
    server = Faulty(uuid4().hex)
    files = Files(server.url)
    monkeypatch.setitem(files._backend.fs.storage_options, "client", {"password": "hunter2hunter2"})  # type: ignore[attr-defined]

    def refuse() -> bytes:
        raise RuntimeError(f"the request with {SECRET} and hunter2hunter2 to ftp://u:{SECRET}@h was refused")

    with pytest.raises(StoreError) as caught:
        files._do("read", "file", refuse)
    message = "cannot read file in the store " + files.name + ": the request with *** and *** to ftp://h was refused"
    assert str(caught.value) == message
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


def test_no_credential_is_kept_in_the_store_or_the_log(
    seaweed: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = small.write_task(tmp_path)
    with caplog.at_level(logging.INFO):
        study = Study(small.spec(trials=1), seaweed, root=root)
        study.run(LocalPool())
        folder = study.fetch(None, tmp_path / "fetched")
    kept = list(everything(study.store.files))
    assert len(kept) > 8
    kept += [path.read_bytes() for path in folder.iterdir()]
    for secret in (SECRET_KEY, ACCESS_KEY):
        assert not any(secret.encode() in data for data in kept) and secret not in caplog.text


def everything(files: Files, folder: str = "") -> Iterator[bytes]:
    for name in files.list(folder):
        path = f"{folder}/{name}" if folder else name
        if files.exists(path):
            yield files.read(path)
        else:
            yield from everything(files, path)
