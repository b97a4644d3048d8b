from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import StoreError
from orchestrator.jobs.doctor import (
    LARGEST_SKEW_SECONDS,
    examine,
    look,
    node_findings,
    store_advice,
    store_findings,
)
from orchestrator.store.files import Files
from tests.orchestrator.test_cli import Shell, shell

__all__ = ["shell"]

MINE = {
    "host": "here",
    "orchardist": "abc",
    "python": "3.11.7",
    "ray": "2.60.0",
    "torch": "2.13.0+cpu",
    "machine": "x86_64",
    "token": True,
    "gpus_seen": 0,
    "gpu_trouble": "",
}


def node(**more: Any) -> dict[str, Any]:
    told = {"host": "there", "head": False, "gpus": 0.0, "skew_seconds": 0.1, "skew_within": 0.01, "store_trouble": ""}
    return MINE | told | more


def states(**more: Any) -> dict[str, str]:
    return {finding.what: finding.state for finding in node_findings([node(**more)], MINE)}


def test_a_healthy_node_is_well() -> None:
    assert states() == {"versions": "ok", "clock": "ok", "gpu": "ok", "store": "ok"}


@pytest.mark.parametrize(
    ("name", "version", "state"),
    [
        ("orchardist", "abd", "wrong"),
        ("ray", "2.59.0", "wrong"),
        ("torch", "2.12.0+cpu", "wrong"),
        ("torch", "2.13.0+cu130", "ok"),
        ("python", "3.12.1", "wrong"),
        ("python", "3.11.9", "ok"),
        ("machine", "aarch64", "doubtful"),
    ],
)
def test_versions_must_agree_where_it_matters(name: str, version: str, state: str) -> None:
    assert states(**{name: version})["versions"] == state


def test_other_versions_are_named_with_what_to_do() -> None:
    found = node_findings([node(torch="2.12.0", ray="2.59.0")], MINE)[0]
    assert found.found == "ray 2.59.0, here 2.60.0; torch 2.12.0, here 2.13.0+cpu"
    assert "constraints.txt" in found.advice


@pytest.mark.parametrize(
    ("skew", "within", "state"),
    [
        (-1.9, 0.0, "ok"),
        (10.0, 9.0, "ok"),
        (-10.0, 0.1, "doubtful"),
        (3600.0, 0.1, "wrong"),
        (-(LARGEST_SKEW_SECONDS + 1), 0.5, "wrong"),
    ],
)
def test_clocks_are_judged_by_what_is_certain(skew: float, within: float, state: str) -> None:
    assert states(skew_seconds=skew, skew_within=within)["clock"] == state


@pytest.mark.parametrize(
    ("counted", "seen", "trouble", "state"),
    [
        (1.0, 1, "", "ok"),
        (4.0, 0, "", "wrong"),
        (0.0, 2, "", "doubtful"),
        (1.0, 1, "no kernel image is available", "wrong"),
    ],
)
def test_gpus_that_ray_counts_must_be_seen_and_work(counted: float, seen: int, trouble: str, state: str) -> None:
    assert states(gpus=counted, gpus_seen=seen, gpu_trouble=trouble)["gpu"] == state


def test_a_node_that_does_not_answer_is_wrong() -> None:
    silent = {"host": "there", "head": False, "gpus": 0.0, "trouble": "No module named 'orchestrator'"}
    found = node_findings([node(), silent], MINE)[-1]
    assert (found.what, found.state) == ("node", "wrong")
    assert "No module named" in found.found and "install" in found.advice


def test_a_private_disk_on_a_node_is_wrong() -> None:
    assert states(store_trouble="does not see what was just written")["store"] == "wrong"


def test_a_cluster_of_a_head_alone_is_doubtful() -> None:
    assert states(head=True)["nodes"] == "doubtful"


def test_a_good_store_says_what_it_promises_and_stays_clean(tmp_path: Path) -> None:
    (found,) = store_findings(str(tmp_path / "store"))
    assert found.state == "ok" and "two drivers cannot both run" in found.found
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file()]


def test_a_store_that_cannot_be_written_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (found,) = store_findings(str(tmp_path / "file"))
    assert found.state == "wrong" and "it is not a folder" in found.found


@pytest.mark.parametrize(
    ("place", "advice"),
    [
        ("file", "file is no folder: give another path, or move it away"),
        ("file/below", "file is no folder: give another path, or move it away"),
        ("nowhere", "nowhere is a link that leads nowhere"),
        ("/dev/null", "/dev is the kernel's"),
        ("/proc/x", "/proc is the kernel's"),
        ("s3:/bucket/a", "correct the URL"),
    ],
)
def test_what_is_wrong_with_a_place_comes_with_what_to_do(tmp_path: Path, place: str, advice: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone" / "deeper")
    (found,) = store_findings(place if ":" in place else str(tmp_path / place))
    assert found.state == "wrong" and advice in found.advice


@pytest.mark.parametrize(
    ("says", "advice"),
    [
        ("The specified bucket does not exist", "make the bucket"),
        ('Could not connect to the endpoint URL: "http://127.0.0.1:1/" (waited 9 s)', "nothing answers there"),
        ("Unable to locate credentials; check the credentials", "there are no credentials here"),
        ("The request signature we calculated does not match; check the credentials", "the credentials are wrong"),
        ("The AWS Access Key Id you provided does not exist in our records.", "the credentials are wrong"),
        ("Forbidden; check the credentials and what they may do there", "may not do this there"),
        ("s3fs is not installed: pip install 'orchardist[s3]'", "install what the message names"),
        ("something new", "check the URL, the network and the credentials"),
    ],
)
def test_what_object_stores_say_comes_with_what_to_do(says: str, advice: str) -> None:
    assert advice in store_advice(
        "s3://bucket/a", StoreError(f"cannot write .probe in the store s3://bucket/a: {says}")
    )


def test_a_folder_of_others_comes_with_whom_to_ask(tmp_path: Path) -> None:
    said = store_advice(str(tmp_path), StoreError("cannot write .probe in the store: Permission denied"))
    assert f"may not write to {tmp_path}" in said
    assert "free some room" in store_advice(str(tmp_path), StoreError("cannot write: No space left on device"))
    assert "for reading only" in store_advice(str(tmp_path), StoreError("cannot write: Read-only file system"))


def test_a_store_that_lets_many_win_is_doubtful(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Files, "probe", lambda files: setattr(files, "creates_once", False))
    (found,) = store_findings(str(tmp_path))
    assert found.state == "doubtful" and "If-None-Match" in found.advice


def test_a_store_that_lists_an_old_state_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Files, "list", lambda files, folder: [])
    (found,) = store_findings(str(tmp_path))
    assert found.state == "wrong" and "does not list" in found.found


def test_a_node_reads_the_driver_s_note_and_answers(tmp_path: Path) -> None:
    files = Files(tmp_path)
    files.write("handshake/abc", b"handshake/abc")
    seen = look(str(tmp_path), "handshake/abc")
    assert seen["store_trouble"] == ""
    assert files.list("handshake") == ["abc", f"abc-{seen['note']}"]
    assert "another disk" in look(str(tmp_path / "other"), "handshake/abc")["store_trouble"]


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "127.0.0.1:1"])
def test_a_cluster_that_does_not_answer_is_a_finding(address: str) -> None:
    found = examine(None, address)
    assert [(one.what, one.state) for one in found] == [("cluster", "wrong")]
    assert "127.0.0.1:1" in found[0].found


def test_the_command_ends_with_1_when_something_is_wrong(tmp_path: Path, shell: Shell) -> None:
    well = shell("doctor", "--store", str(tmp_path / "store"))
    assert well.code == 0, well.err
    assert "versions" in well.out and "store" in well.out
    (tmp_path / "file").write_text("")
    ill = shell("doctor", "--store", str(tmp_path / "file"), "--format", "json")
    assert ill.code == 1
    assert {row["state"] for row in json.loads(ill.out)} == {"ok", "wrong"}


def test_no_store_is_made_when_none_was_named(tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shell("doctor").code == 0
    assert os.listdir(tmp_path) == []
