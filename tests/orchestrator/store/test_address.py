"""What a store's URL may be, and what is never shown of it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.cli import main
from orchestrator.errors import StoreError
from orchestrator.store import Files, Store
from orchestrator.store.address import address, secrets_of, without_credentials, without_secrets

KEY, SECRET = "AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
"""As Amazon's own documentation has them: the secret holds slashes."""


@pytest.mark.parametrize(
    ("url", "kind", "place"),
    [
        ("orchard", "folder", "orchard"),
        ("~/orchard", "folder", "~/orchard"),
        ("a::b", "folder", "a::b"),
        ("file:///data/x", "folder", "/data/x"),
        ("FILE:///data/x", "folder", "/data/x"),
        ("file://localhost/data/x", "folder", "/data/x"),
        ("local:///data/x", "folder", "/data/x"),
        ("C:/data", "folder", "C:/data"),
        ("memory://x", "memory", "memory://x"),
        ("MEMORY://X", "memory", "memory://X"),
        ("S3://Bucket/Folder", "objects", "s3://Bucket/Folder"),
        ("gs://bucket/x", "objects", "gs://bucket/x"),
        ("s3://arn:aws:s3:eu-west-1:123456789012:accesspoint/mine/x@y", "objects", None),
        ("s3://bucket/a@b:c", "objects", None),
        ("abfs://container@account.dfs.core.windows.net/x", "objects", None),
        ("dir::s3://bucket/x", "objects", None),
        ("ftp://user:password@host/x", "objects", None),
    ],
)
def test_where_a_url_leads(url: str, kind: str, place: str | None) -> None:
    found = address(url)
    assert (found.kind, found.place) == (kind, url if place is None else place)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("", "is empty"),
        (" orchard", "begins or ends with a blank"),
        ("s3://bucket/x\n", "holds a line break"),
        ("a\0b", "holds a line break"),
        ("s3:/bucket/x", r"two slashes behind its colon; legal: s3://bucket/x$"),
        ("file:/data/x", r"two slashes behind its colon; legal: file:///data/x$"),
        ("file://", r"names no folder; legal: file:///path$"),
        ("s3://", r"names no bucket; legal: s3://bucket/folder$"),
        ("s3:///x", "names no bucket"),
        ("gs:///x", "names no bucket"),
        ("s3://bucket/../other", "no folder above or beside"),
        ("~nobody-of-that-name/x", r"no user has that name; .*: \./~nobody-of-that-name/x$"),
        ("simplecache::s3://bucket/x", r"nobody sees what others write; legal: s3://bucket/x, without simplecache$"),
        ("filecache::gs://bucket/x", "nobody sees what others write"),
        ("dir::file:///data/x", "a local folder is not chained"),
        ("dir::simplecache::s3://bucket/x", "nobody sees what others write"),
        (f"s3://{KEY}:{SECRET}@bucket/x", r"no place for credentials; legal: s3://bucket/x, .*AWS_SECRET_ACCESS_KEY$"),
        (f"s3a://{KEY}@bucket/x", "no place for credentials"),
        (f"gs://{KEY}:secret@bucket/x", "no place for credentials"),
        (f"simplecache::s3://{KEY}:{SECRET}@bucket/x", "legal: s3://bucket/x"),
        (f"s3://{KEY}:{quote(SECRET, safe='')}%40x@bucket/x", "legal: s3://bucket/x, "),
        (f"s3://{KEY}:{quote(SECRET, safe='')}%40bucket/x", "legal: s3://bucket/x, "),
        (f"s3://{KEY}:a@b,c'{SECRET}@bucket/x", "legal: s3://bucket/x, "),
        (f"s3://{KEY}:{SECRET}", r"store s3://\*\*\*: .*; legal: s3://bucket/folder, "),
        *(
            (f"s3://bucket/x{begin}{name}={SECRET}", "no place for credentials; legal: s3://bucket/x")
            for begin in ("?", "#", "?a=1&")
            for name in ("secret", "sig", "key", "X-Amz-Signature", "pwd", "token")
        ),
    ],
)
def test_what_is_refused_says_what_would_be_legal_and_no_secret(url: str, why: str) -> None:
    with pytest.raises(StoreError, match=why) as caught:
        Files(url)
    said = str(caught.value)
    assert "\n" not in said and KEY not in said and not any(part in said for part in SECRET.split("/"))


@given(
    st.sampled_from(["s3", "ftp", "sftp", "https", "gs", "webdav+https"]),
    st.from_regex(r"[A-Za-z0-9+/=_.-]{8,40}", fullmatch=True),
    st.from_regex(r"[a-z][a-z0-9.-]{0,20}", fullmatch=True),
)
def test_no_password_is_ever_shown(scheme: str, password: str, host: str) -> None:
    url = f"{scheme}://user:{password}@{host}/x"
    assert without_credentials(url) == f"{scheme}://{host}/x"
    assert without_credentials(f'see "{url}", or {url}') == f'see "{scheme}://{host}/x", or {scheme}://{host}/x'
    assert password in secrets_of(url)


def test_a_text_of_somebody_else_shows_no_secret() -> None:
    environ = {
        "DATABASE_URL": "postgres://bob:DBPASS99@db/x",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "MYSQL_PWD": "hunter2hunter2",
        "PWD": "/work/here",
        "HOME": "/root",
    }
    text = f"""cannot connect to postgres://bob:DBPASS99@db/x with DBPASS99, {SECRET} or {quote(SECRET, safe="")};
    hunter2hunter2 in /work/here of /root: http://h:1/b/x%3Fa%3D1%26X-Amz-Signature%3Dabc%26v%3D2/y and http://h?pwd=abc"""
    expected = """cannot connect to postgres://db/x with ***, *** or ***;
    *** in /work/here of /root: http://h:1/b/x%3Fa%3D1%26X-Amz-Signature%3D***%26v%3D2/y and http://h?pwd=***"""
    assert without_secrets(text, environ) == expected


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:8265 and a@b",
        '{"url": "http://127.0.0.1:8265", "to": "a@b"}',
        "abfs://container@account.dfs.core.windows.net/x",
        "s3://bucket/x",
    ],
)
def test_what_is_no_secret_is_shown(text: str) -> None:
    assert without_credentials(text) == text


def test_credentials_given_to_a_command_are_in_nothing_that_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tmp_path / "study.toml"
    study.write_text('name = "s"\ntask = "digits"\n[space]\nrate = [0.5]\n')
    url = f"s3://{KEY}:{SECRET}@bucket/x"
    for words in (["run", str(study), "--local"], ["status", "s"], ["gc", "s"], ["doctor"]):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(sys, "argv", ["orchardist", *words, "--store", url])
            main()
        assert ended.value.code in (1, 2)
        said = "".join(capsys.readouterr())
        assert "no place for credentials" in said.replace("\n", " ") or words == ["doctor"]
        assert KEY not in said and not any(part in said for part in SECRET.split("/")), said


def test_a_folder_behind_a_link_is_one_store(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    Store(tmp_path / "link").write_study("s", "", {})
    assert Store(f"file://{tmp_path}/real/").studies() == ["s"]
    # Parts of a store may lie on another disk.
    (tmp_path / "disk").mkdir()
    (tmp_path / "real" / "states").symlink_to(tmp_path / "disk")
    files = Files(tmp_path / "link")
    files.write("states/ab/x", b"12345")
    (tmp_path / "disk" / "ab" / f".{'0' * 24}.tmp").write_bytes(b"left")
    assert os.listdir(tmp_path / "disk" / "ab") and files.used("states") == 9
    assert [each.path for each in files.leftovers()] == [f"states/ab/.{'0' * 24}.tmp"]


def test_a_store_that_may_only_be_read_can_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.write_study("s", "", {"digest": "d"})
    ledger = store.ledger("s", 1)
    ledger.append("events", [{"event": "done", "trial": 1}])
    ledger.flush()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    for backend in ("Folder.write", "Folder.create", "Folder.delete"):
        monkeypatch.setattr(f"orchestrator.store.folder.{backend}", refuse)
    assert json.loads(store.files.read("studies/s/study.json"))["digest"] == "d"
    assert store.studies() == ["s"] and store.table("s", "events").num_rows == 1
    with pytest.raises(StoreError, match="Permission denied"):
        store.files.probe()
