"""What every store must do, whatever it lies on: each check takes the URL of an empty root and asserts."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from orchestrator.store import Files, States

KEY = "ab" + "0" * 62
WRITERS = 16


def safetensors(metadata: dict[str, str] | None = None, size: int = 16) -> bytes:
    """A whole file with one tensor of `size` bytes."""
    tensor = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    header = json.dumps({**({"__metadata__": metadata} if metadata is not None else {}), "w": tensor}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(size)


def check_what_is_written_is_read(url: str) -> None:
    files = Files(url)
    files.probe()
    assert files.list("") == []
    files.write("a/b/c", b"0123456789")
    files.write("a/b/c", b"9876543210")
    assert files.read("a/b/c") == b"9876543210"
    assert files.read_range("a/b/c", 2, 4) == b"76"
    assert files.read_range("a/b/c", 8, 99) == b"10"
    assert files.read_range("a/b/c", 10, 99) == b""
    assert bytes(files.map("a/b/c")) == b"9876543210"
    assert files.size("a/b/c") == 10
    files.write("a/empty", b"")
    assert files.read("a/empty") == bytes(files.map("a/empty")) == files.read_range("a/empty", 0, 8) == b""
    assert files.list("a") == ["b", "empty"] and files.list("a/b") == ["c"]


def check_absent_files(url: str) -> None:
    files = Files(url)
    files.write("there", b"")
    for act in (files.read, files.size, files.map, lambda path: files.read_range(path, 0, 1)):
        try:
            act("folder/absent")
        except FileNotFoundError:
            continue
        raise AssertionError("an absent file was read")
    assert not files.exists("folder/absent") and not files.exists("absent")
    assert files.list("folder") == []
    files.delete("folder/absent")
    files.delete("there")
    files.delete("there")
    assert not files.exists("there")


def check_a_replaced_file_is_never_half_there(url: str) -> None:
    files = Files(url)
    versions = [bytes([number]) * 300_000 for number in (1, 2)]
    files.write("file", versions[0])
    done = threading.Event()

    def write() -> None:
        for turn in range(40):
            files.write("file", versions[turn % 2])
        done.set()

    with ThreadPoolExecutor() as threads:
        writing = threads.submit(write)
        while not done.is_set() and not writing.done():
            assert files.read("file") in versions
            assert bytes(files.map("file")) in versions
        writing.result()
    assert files.list("") == ["file"]


def check_one_of_many_creates_a_file(url: str) -> None:
    start = threading.Barrier(WRITERS)

    def create(number: int) -> bool:
        files = Files(url)
        start.wait()
        return files.create("once/file", str(number).encode() * 1000)

    with ThreadPoolExecutor(WRITERS) as threads:
        won = list(threads.map(create, range(WRITERS)))
    assert sum(won) == 1
    files = Files(url)
    assert files.read("once/file") == str(won.index(True)).encode() * 1000
    assert not files.create("once/file", b"too late")
    assert files.list("once") == ["file"]


def check_a_listing_is_fresh(url: str) -> None:
    one, other = Files(url), Files(url)
    for number in range(3):
        assert one.list("folder") == [str(earlier) for earlier in range(number)]
        other.write(f"folder/{number}", b"")
    other.delete("folder/1")
    assert one.list("folder") == ["0", "2"]


def check_the_first_state_wins(url: str) -> None:
    states = States(Files(url))
    first, second = safetensors({"by": "first"}), safetensors({"by": "second"})
    assert not states.has(KEY) and states.header(KEY) is None and states.read(KEY) is None
    assert states.commit(KEY, first) and not states.commit(KEY, second)
    assert states.has(KEY) and states.header(KEY) == {"by": "first"} and states.read(KEY) == first
    states.replace(KEY, second)
    assert states.header(KEY) == {"by": "second"} and list(states.keys()) == [KEY]
    states.delete(KEY)
    assert not states.has(KEY) and list(states.keys()) == []


def check_a_torn_state_is_set_aside(url: str) -> None:
    files = Files(url)
    states = States(files)
    whole = safetensors({"by": "whole"}, size=1000)
    path = f"states/ab/{KEY}.safetensors"
    logging.getLogger("orchardist.store").setLevel(logging.ERROR)
    try:
        looks: list[Callable[[str], object]] = [states.header, states.read]
        for torn in (b"", b"foreign", whole[:20], whole[:-1], whole + b"x"):
            for look in looks:
                files.write(path, torn)
                assert look(KEY) is None, torn
                assert states.commit(KEY, whole) and states.read(KEY) == whole
            files.write(path, torn)
            assert states.commit(KEY, whole) and states.read(KEY) == whole
        assert len(files.list("set-aside/states/ab")) == 5
    finally:
        logging.getLogger("orchardist.store").setLevel(logging.NOTSET)


CHECKS: list[Callable[[str], None]] = [
    check_what_is_written_is_read,
    check_absent_files,
    check_a_replaced_file_is_never_half_there,
    check_one_of_many_creates_a_file,
    check_a_listing_is_fresh,
    check_the_first_state_wins,
    check_a_torn_state_is_set_aside,
]
