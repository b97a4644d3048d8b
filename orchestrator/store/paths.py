"""Every name on storage, and nowhere else. All paths are relative to the store's root, with forward slashes.

states/ab/<key>.safetensors                       a state under its content address
checkpoints/<key>.<position>.safetensors          a stage's training in the middle; see `checkpoints`
studies/NAME/study.toml, study.json               what was asked, and what is known about it
studies/NAME/outcomes.parquet                     the merged outcomes
studies/NAME/ledger/<epoch>-<seq>-<kind>.parquet  one flush of one kind of row
studies/NAME/ledger/<epoch>-<seq>-<kind>.all.parquet   everything of this kind up to (epoch, seq)
studies/NAME/lease/<epoch>.json, .beat, .released      who drives the study
barriers/ab/<name>.json                           what was measured between two states; see `ticket_stability`
handshake/<token>                                 written by a driver, read and answered by its workers
set-aside/…                                       torn and foreign files, under the path where they lay
.probe-<token>                                    written and deleted to see that the store can be written
"""

from __future__ import annotations

import re
from typing import NamedTuple

from orchestrator.errors import StoreError

DEFAULT_STORE = "./orchard"
"""Where studies are kept when nobody says where."""

STATES = "states"
CHECKPOINTS = "checkpoints"
STUDIES = "studies"
BARRIERS = "barriers"
SET_ASIDE = "set-aside"
HANDSHAKE = "handshake"

_STUDY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_KEY = re.compile(r"[0-9a-f]{64}")
_PART = re.compile(r"(\d{6,})-(\d{8,})-([a-z]+)(\.all)?\.parquet")
_CHECKPOINT = re.compile(r"([0-9a-f]{64})\.(\d{12})\.safetensors")
_PROBE = re.compile(r"\.probe-[0-9a-f]{16}")
_LEASE = re.compile(r"(\d{6,})\.(json|beat|released)")


class Part(NamedTuple):
    """A ledger file's name, taken apart. Sorts by (epoch, seq)."""

    epoch: int
    seq: int
    kind: str
    merged: bool

    @property
    def position(self) -> tuple[int, int]:
        return self.epoch, self.seq

    @property
    def name(self) -> str:
        return f"{self.epoch:06d}-{self.seq:08d}-{self.kind}{'.all' if self.merged else ''}.parquet"


def is_study(name: str) -> bool:
    return _STUDY.fullmatch(name) is not None


def is_key(text: str) -> bool:
    return _KEY.fullmatch(text) is not None


def state(key: str) -> str:
    """Raises `StoreError` unless `key` is 64 lower-case hex digits."""
    if not is_key(key):
        raise StoreError(f"{key!r} is not a state's key: a key is 64 hex digits, 0-9 and a-f")
    return f"{STATES}/{key[:2]}/{key}.safetensors"


def state_key(name: str) -> str | None:
    """The key in a file name of a states folder; None for a name that is not a state's."""
    key, dot, suffix = name.partition(".")
    return key if dot and suffix == "safetensors" and is_key(key) else None


def checkpoint(key: str, position: int) -> str:
    """A stage's training at a position in optimizer steps; the names sort by both."""
    assert is_key(key) and 0 <= position < 10**12, (key, position)
    return f"{CHECKPOINTS}/{key}.{position:012d}.safetensors"


def parse_checkpoint(name: str) -> tuple[str, int] | None:
    """(key, position), or None for a name that is no checkpoint's."""
    match = _CHECKPOINT.fullmatch(name)
    return (match[1], int(match[2])) if match else None


def barrier(name: str) -> str:
    """`name` is the digest of the pair of states and of how the barrier between them is measured."""
    assert is_key(name), name
    return f"{BARRIERS}/{name[:2]}/{name}.json"


def study(name: str) -> str:
    """The study's folder. Raises `StoreError` for a name that could leave the root or that some storage cannot hold."""
    if not is_study(name):
        raise StoreError(
            f"{name!r} is not a study name: use 1 to 100 of the characters A-Z, a-z, 0-9, '.', '_' and '-', "
            "the first one a letter or a digit"
        )
    return f"{STUDIES}/{name}"


def study_toml(name: str) -> str:
    return f"{study(name)}/study.toml"


def study_meta(name: str) -> str:
    return f"{study(name)}/study.json"


def outcomes(name: str) -> str:
    return f"{study(name)}/outcomes.parquet"


def ledger(name: str) -> str:
    return f"{study(name)}/ledger"


def part(study_name: str, part: Part) -> str:
    return f"{ledger(study_name)}/{part.name}"


def parse_part(name: str) -> Part | None:
    """None for a name that no ledger writes."""
    match = _PART.fullmatch(name)
    if match is None:
        return None
    part = Part(int(match[1]), int(match[2]), match[3], match[4] is not None)
    return part if part.name == name else None


def lease(name: str) -> str:
    return f"{study(name)}/lease"


def lease_file(name: str, epoch: int, suffix: str) -> str:
    """`suffix` is json (who), beat (the holder's counter) or released."""
    assert suffix in ("json", "beat", "released"), suffix
    return f"{lease(name)}/{epoch:06d}.{suffix}"


def parse_lease(name: str) -> tuple[int, str] | None:
    """(epoch, suffix), or None for a name that no lease writes."""
    match = _LEASE.fullmatch(name)
    return (int(match[1]), match[2]) if match else None


def handshake(token: str) -> str:
    """What a driver writes for its workers, and what the name of a worker's answer begins with."""
    return f"{HANDSHAKE}/{token}"


def probe(token: str) -> str:
    return f".probe-{token}"


def is_probe(name: str) -> bool:
    return _PROBE.fullmatch(name) is not None


def set_aside(path: str, token: str) -> str:
    """Where a torn file goes; the token, which comes from its bytes, keeps an earlier one of the same name."""
    return f"{SET_ASIDE}/{path}.{token}"
