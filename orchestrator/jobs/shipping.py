"""What of a study travels to a cluster: Orchardist itself, the study file, and the files that its task is made of."""

from __future__ import annotations

import io
import os
import re
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from orchestrator import __version__
from orchestrator.errors import InputError
from orchestrator.spec import StudySpec
from orchestrator.tasks.source import HOUSE, OUR_OWN, Sent, Source, collect, function_source, to_send

FOLDER = "orchardist-study"
"""Where the user's files lie below a job's folder: no module can have this name, so none hides one of ours."""

LARGEST = 500_000_000
"""Bytes that Ray keeps in its head for a job, a little less."""

_NOT_CODE = ("__pycache__",)
_MAY_BE_SECRET = re.compile(
    r".*\.(pem|key|p12|pfx|jks|keystore|ppk|kdbx|gpg|asc|env)|id_(rsa|dsa|ecdsa|ed25519).*|_?netrc|\.?htpasswd"
    r"|(.*[-_.])?(credentials?|secrets?|passwords?|kubeconfig|auth_?token|service[-_]account)([-_.].*)?",
    re.IGNORECASE,
)
"""Names under which credentials are usually kept."""
_LARGEST_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Shipment:
    """Everything that a job is given, by its path below the job's folder; nothing else is sent."""

    study: str
    """The path of the study file."""
    house: Mapping[str, bytes]
    """Orchardist's two packages, as its wheel holds them."""
    yours: Mapping[str, bytes | Path]
    """The user's files: their content, or where they lie."""
    left: tuple[str, ...]
    """Files that the study names by an absolute path: every node must have them there."""
    withheld: tuple[str, ...] = ()
    """Files of an included folder that go by a name of credentials, relative to the study's: sent only if they are
    named themselves."""

    @property
    def digest(self) -> str:
        """SHA-256 of the user's files: what tells one version of a study from another."""
        found = sha256()
        for path, content in sorted(self.yours.items()):
            data = content if isinstance(content, bytes) else content.read_bytes()
            found.update(f"\0{path}\0{len(data)}\0".encode() + data)
        return found.hexdigest()

    def rows(self) -> list[dict[str, Any]]:
        """A row for Orchardist, and one for each of the user's files: `file` and `bytes`."""
        house = f"orchardist {__version__} ({len(self.house)} files)"
        rows = [{"file": house, "bytes": sum(map(len, self.house.values()))}]
        return rows + [
            {"file": path.removeprefix(f"{FOLDER}/"), "bytes": _size(content)}
            for path, content in sorted(self.yours.items())
        ]

    def write(self, folder: Path) -> None:
        """Lay everything out below `folder`."""
        for path, content in {**self.house, **self.yours}.items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content if isinstance(content, bytes) else content.read_bytes())


def shipment(study: Path, include: Sequence[Path] = ()) -> Shipment:
    """What the study file at `study` needs on a cluster.

    That is the study file, the task files and the local modules that they import, the files of the user's own
    criteria, checkpoints and tickets, and whatever `include` names below the study's folder. Hidden files, such as
    `.env`, are never among them, under whatever name a link gives them; files of an included folder that look by their
    names like credentials, such as `id_rsa` or `credentials.json`, only where they are included by their own names.

    Raises:
        InputError: the study or a file of it is wrong, or cannot travel.
    """
    spec = StudySpec.load(study)
    root = study.parent.resolve()
    found = _Found(root)
    found.yours[root / study.name] = study
    for name in [spec.task, *(task.task for task in spec.tickets.tasks)]:
        found.add_source(name, name, lambda name: collect(name, root))
    for name in spec.functions():
        found.add_source(name.rpartition(":")[0], name, lambda name: function_source(name, root))
    for checkpoint in [spec.checkpoint, *(task.checkpoint for task in spec.tickets.tasks)]:
        found.add_file("checkpoint", checkpoint)
    found.add_file("ticket", spec.tickets.ticket)
    for path in include:
        found.add_included(path)
    anchor = Path(os.path.commonpath([root, *(path.parent for path in found.yours)]))
    shipped = Shipment(
        study=_below(anchor, root / study.name),
        house=house(),
        yours={_below(anchor, path): content for path, content in sorted(found.yours.items())},
        left=tuple(dict.fromkeys(found.left)),
        withheld=tuple(sorted(found.withheld - {path.relative_to(root).as_posix() for path in found.named})),
    )
    _refuse_too_much(shipped)
    return shipped


def house() -> dict[str, bytes]:
    """Orchardist's two packages, as its wheel holds them, by their paths."""
    found = {}
    for package in OUR_OWN:
        for path in _visible(HOUSE / package):
            found[path.relative_to(HOUSE).as_posix()] = path.read_bytes()
    return found


class _Found:
    """The user's files by the absolute path at which the study looks for them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.yours: dict[Path, bytes | Path] = {}
        self.left: list[str] = []
        self.named: set[Path] = set()
        """Files that the user included by their own names."""
        self.withheld: set[str] = set()

    def add_source(self, target: str, name: str, collected: Any) -> None:
        """The files of a task or a function; those of a package go where the study looks first, below its folder."""
        if Path(target).is_absolute():
            self.left.append(target)
            return
        source: Source = collected(name)
        if source.builtin:
            return
        base = self.root
        if target.endswith(".py"):
            path = self.root / target
            if path.resolve() != Path(os.path.normpath(path)):
                raise InputError(f"{target!r} is a symbolic link: it cannot be submitted; legal: the file it points to")
            base = self.root if path.resolve().is_relative_to(self.root) else path.resolve().parent
        for relative, text in source.files.items():
            self.yours[base / relative] = _encoded(text)

    def add_file(self, kind: str, name: str) -> None:
        """A checkpoint or a ticket; "" is none."""
        if Path(name).is_absolute():
            self.left.append(name)
        elif name:
            sent: Sent = to_send(kind, name, self.root)
            path = Path(os.path.normpath(self.root / name))
            self.yours[path] = path if sent.data is None else sent.data

    def add_included(self, path: Path) -> None:
        """A file or a folder that the user named."""
        where = f"--include {path}"
        if not path.exists():
            raise InputError(f"{where}: there is no such file or folder")
        real = path.resolve()
        if not real.is_relative_to(self.root):
            raise InputError(f"{where}: legal: files and folders below the study's, {self.root}")
        if any(part.startswith(".") for part in real.relative_to(self.root).parts):
            raise InputError(f"{where}: hidden files are not shipped, for they may hold credentials")
        if not real.is_dir():
            self.named.add(real)
            self.yours.setdefault(real, real)
            return
        for file in _visible(real):
            if any(map(_MAY_BE_SECRET.fullmatch, (file.name, file.resolve().name))):
                self.withheld.add(file.relative_to(self.root).as_posix())
            else:
                self.yours.setdefault(file, file)


def _below(anchor: Path, path: Path) -> str:
    return f"{FOLDER}/{path.relative_to(anchor).as_posix()}"


def _visible(folder: Path) -> Iterator[Path]:
    """The files below a folder, without hidden and compiled ones, and without links that lead elsewhere."""
    for top, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _NOT_CODE)
        for name in sorted(names):
            path = Path(top) / name
            if name.startswith(".") or not path.is_file():
                continue
            real = path.resolve()
            if real.is_relative_to(folder) and not any(part.startswith(".") for part in real.relative_to(folder).parts):
                yield path


def _encoded(text: str) -> bytes:
    """A module's text as its first lines say that it is encoded."""
    encoding, _ = tokenize.detect_encoding(io.BytesIO(text.encode()).readline)
    return text.encode(encoding)


def _size(content: bytes | Path) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _refuse_too_much(shipped: Shipment) -> None:
    rows = sorted(shipped.rows(), key=lambda row: -row["bytes"])
    total = sum(row["bytes"] for row in rows)
    if total > LARGEST:
        largest = ", ".join(f"{row['file']} {row['bytes'] / 1e6:.0f} MB" for row in rows[:_LARGEST_SHOWN])
        raise InputError(
            f"the study's files are {total / 1e6:.0f} MB ({largest}); legal: {LARGEST / 1e6:.0f} MB, and for larger "
            "files absolute paths on a disk that all nodes share"
        )
