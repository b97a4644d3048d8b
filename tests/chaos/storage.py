"""Storage that fails, delays, duplicates and tears, is full, and holds what nobody of ours has written."""

from __future__ import annotations

import os
import pickle
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from orchestrator import Study
from orchestrator.errors import StoreError, StoreFailed
from orchestrator.pools.local import LocalPool
from tests.chaos.drive import DONE, REFUSED, start
from tests.chaos.judge import Verdict, Witness
from tests.chaos.place import PATIENCE_SECONDS, Place
from tests.chaos.study import STEPS, spec
from tests.faulty import FAULTS, Faulty, Killed

CALLS = 150
"""About as many calls as the study makes of its store."""

_MOST_DRIVERS = 20


def call(fault: str) -> Callable[[Place], Verdict]:
    """The n-th call of a store goes wrong in this way; from run to run n goes from the first call to the last."""
    assert fault in FAULTS, fault

    def run(place: Place) -> Verdict:
        stride = max(1, CALLS // place.of)
        at = 1 + place.number * CALLS // place.of + place.draw.randrange(stride)
        return _on_faulty(place, Faulty(uuid4().hex, {at: fault}, late_by=place.draw.randrange(1, 12)))

    run.__doc__ = f"The n-th call of the store {fault}; n goes from the first call to the last."
    return run


def full_disk(place: Place) -> Verdict:
    """A disk of some dozen kilobytes that is full again and again, and gets some more room each time."""
    disk = place.folder / "disk"
    disk.mkdir()
    if not _mount(disk, place.draw.randrange(40, 80)):
        # Without the right to mount: a store that has no room from some call on, until the next driver starts.
        faults = dict.fromkeys(range(place.draw.randrange(20, 100), 10_000), "finds the disk full")
        return _on_faulty(place, Faulty(uuid4().hex, faults))
    try:
        return _on_disk(place, disk)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def planted(place: Place) -> Verdict:
    """A driver is killed; files of its store are cut off, and foreign ones laid beside them; another one goes on."""
    witness = Witness()
    process = start(place.drive(pace=0.01))
    place.await_steps(process, place.draw.randint(0, place.reference.steps))
    if process.exitcode is None:
        process.kill()
        process.join()
    witness.look(place.url)
    store = Path(place.url)
    spoilt = set()
    files = sorted(path for path in store.rglob("*") if path.is_file() and "lease" not in path.parts)
    for path in place.draw.sample(files, min(len(files), place.draw.randint(1, 5))):
        data = path.read_bytes()
        path.write_bytes(data[: place.draw.randrange(len(data) + 1)] if data else b"")
        if path.suffix == ".safetensors":
            spoilt.add(path.stem)
    for name, data in _foreign(place):
        path = store / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    second = start(place.drive())
    second.join(PATIENCE_SECONDS)
    # A state that was cut off may be needed again, with all the training before it.
    most_again = place.reference.steps if spoilt else None
    return place.judge(
        witness,
        faults=1,
        most_again=most_again,
        spoilt=frozenset(spoilt),
        ended_again=True,
        says=place.must(second.exitcode, DONE),
    )


def _foreign(place: Place) -> list[tuple[str, bytes]]:
    """Names and bytes of files that no driver writes, or that one was killed over."""
    token = f"{place.draw.randrange(16**16):016x}"
    data = place.draw.choice([b"", b"{}", b"PAR1", place.draw.randbytes(300), pickle.dumps([1])])
    names = [
        f"states/{token[:2]}/{token * 4}.safetensors",
        f"states/{token[:2]}/{token}.pkl",
        f"states/{token[:2]}/.{token}.tmp",
        "states/notes.txt",
        f"studies/small/ledger/000001-0000{token[:4]}-events.parquet",
        "studies/small/ledger/000001-00009999-outcomes.parquet",
        "studies/small/ledger/000001-00009998-proposals.parquet",
        "studies/small/ledger/part.parquet",
        "studies/small/lease/000001.json~",
        "studies/small/model.pkl",
        "studies/other/study.json",
        "handshake/x",
        "stray.bin",
    ]
    return [(name, data) for name in place.draw.sample(names, 5)]


def _on_faulty(place: Place, server: Faulty) -> Verdict:
    """The study on a store in this process, run again and again until it has ended."""
    witness, before, ends = Witness(), dict(os.environ), 0
    os.environ[STEPS] = str(place.steps)
    try:
        for _ in range(_MOST_DRIVERS):
            study = Study(spec(), server.url, root=place.root)
            try:
                if study.run(LocalPool()).done == spec().trials:
                    break
            except (StoreError, StoreFailed, Killed):
                ends += 1
            server.down = ""
            server.faults = {number: fault for number, fault in server.faults.items() if number > server.calls + 40}
            witness.look(server.url)
    finally:
        os.environ.clear()
        os.environ.update(before)
    server.faults.clear()
    return place.judge(witness, faults=max(1, ends), url=server.url)


def _on_disk(place: Place, disk: Path) -> Verdict:
    witness, kilobytes, ends = Witness(), 80, 0
    says: tuple[str, ...] = ()
    url = str(disk / "store")
    for _ in range(_MOST_DRIVERS):
        process = start(place.drive(url=url))
        process.join(PATIENCE_SECONDS)
        if process.exitcode != REFUSED:
            break
        ends += 1
        if "No space left on device; free some room" not in place.log.read_text().splitlines()[-1]:
            says += place.must(process.exitcode, DONE)
        with suppress(StoreError):  # even a look may find no room
            witness.look(url)
        kilobytes += place.draw.randrange(16, 64)
        subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(disk)], check=True)
    says += place.must(process.exitcode, DONE)
    return place.judge(witness, faults=ends, url=url, says=says)


def _mount(disk: Path, kilobytes: int) -> bool:
    """A file system in memory of so many kilobytes; False where this process may not mount one."""
    words = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk)]
    try:
        return subprocess.run(words, stderr=subprocess.DEVNULL, check=False).returncode == 0
    except FileNotFoundError:
        return False
