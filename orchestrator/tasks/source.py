"""The files that a task, or a user's function, consists of: found without running them, digested, and imported.

A checkpoint is such a file too: its bytes travel with the task's.

A task's own files are those that it imports, directly or not, from its own folder and the study's. They are imported
under a namespace of their own, one for each digest and folder: two versions of `my_task.py` live side by side in one
process, and a module that the digest does not cover cannot be imported by accident.
"""

from __future__ import annotations

import ast
import atexit
import builtins
import fcntl
import importlib
import os
import platform
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from hashlib import file_digest, sha256
from importlib.machinery import ModuleSpec
from importlib.util import decode_source, find_spec
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

from orchestrator.errors import InputError, TaskError
from orchestrator.tasks import BUILTIN

HOUSE = Path(__file__).resolve().parents[2]
OUR_OWN = ("orchestrator", "search")
"""Folders of `HOUSE`: never local, even for a study that lies beside them."""

_MATERIALISED = "orchardist-task-"
_YOUNG_SECONDS = 60.0

LARGEST_SENT = 100_000_000
"""Bytes of a file that are sent to workers; a larger one must lie where they can read it."""


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A user's file, such as a checkpoint, as plain data that can travel to a worker."""

    kind: str
    """What messages call it."""
    name: str
    """As the study file has it, relative to its folder."""
    sha256: str
    data: bytes | None = field(repr=False)
    """None where the file is larger than `LARGEST_SENT`."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The files behind a task or a function, as plain data that can travel to a worker."""

    name: str
    """As the study file has it: "mnist", "my_task.py", "package.module" or "package.module:function"."""
    module: str
    """The module's dotted name: in full for a built-in task, else relative to the folder of the files."""
    files: Mapping[str, str]
    """Text by path, relative to the study's folder, or to the task's where that lies elsewhere."""
    digest: str
    """SHA-256 over the module's name and the files; no absolute path is in it."""
    checkpoint: Sent | None = None
    """What is laid over the task's model. Its tensors enter the task's digest, not this one."""

    @property
    def builtin(self) -> bool:
        """Whether it is one of Orchardist's own tasks."""
        return self.name in BUILTIN


def collect(name: str, root: Path, checkpoint: str = "") -> Source:
    """The files of the task called `name`.

    Args:
        name: a built-in task, a path that ends in `.py` (relative to `root`), or `package.module`.
        root: the folder of the study file.
        checkpoint: a file of weights to lay over the task's model, relative to `root`; empty for none.

    Raises:
        TaskError: no such task or file, or one of its files cannot be read or parsed; the message has path and line.
            Or the checkpoint cannot be read.
    """
    source = _builtin(name) if name in BUILTIN else _collect(name, name, root, kind="task")
    return replace(source, checkpoint=to_send("checkpoint", checkpoint, root)) if checkpoint else source


def sent_bytes(sent: Sent, root: Path | None = None) -> bytes:
    """What a file held when it was collected: as it was sent, else read below `root`.

    Raises:
        TaskError: it was too large to be sent, and the file is not there or is another one.
    """
    if sent.data is not None:
        return sent.data
    path = (root or Path()) / sent.name
    where = f"{sent.kind} {sent.name!r} is too large to be sent to workers, and {path} on {platform.node()}"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TaskError(f"{where} cannot be read: {error.strerror}; put it on a disk that they share") from error
    if sha256(data).hexdigest() != sent.sha256:
        raise TaskError(f"{where} is another file; put it on a disk that they share")
    return data


def function_source(name: str, root: Path) -> Source:
    """The files of a user's function `"package.module:function"` or `"file.py:function"`; as `collect` otherwise."""
    module, colon, function = name.rpartition(":")
    if not colon or not module or not function:
        raise TaskError(f"{name!r} does not name a function: write it as package.module:function")
    return _collect(module, name, root, kind="function")


def install(source: Source, root: Path | None = None) -> ModuleType:
    """The module of `source`, imported into this process once for each digest and folder.

    It is read from `root` where the same texts lie there, else from a temporary folder that is filled for it. What the
    module raises while it is being imported is raised as it is.

    Raises:
        TaskError: a built-in task that differs from the one that `source` was collected from.
    """
    if source.builtin:
        if _builtin(source.name).digest != source.digest:
            raise TaskError(
                f"task {source.name!r} is not the same here as where the study was read: install one version"
            )
        return importlib.import_module(source.module)
    folder = _folder_with(source, root)
    place = sha256(str(folder or "").encode()).hexdigest()
    namespace = f"orchardist_{source.digest[:16]}_{place[:8]}"
    if not any(isinstance(finder, _LocalModules) and finder.namespace == namespace for finder in sys.meta_path):
        sys.meta_path.append(_LocalModules(namespace, source, folder or _materialise(source)))
    return importlib.import_module(f"{namespace}.{source.module}")


def install_function(source: Source, root: Path | None = None) -> Callable[..., Any]:
    """The function of a source from `function_source`.

    Raises:
        TaskError: the module has no such function, or it raised while it was being imported.
    """
    module, _, function = source.name.rpartition(":")
    with blamed(f"function {source.name!r} failed", source):
        found = getattr(install(source, root), function, None)
    if not callable(found):
        raise TaskError(f"function {source.name!r}: {module!r} has no function {function!r}")
    return found  # type: ignore[no-any-return]


@contextmanager
def blamed(what: str, source: Source) -> Iterator[None]:
    """Turns what the user's code raises into one line: what failed, where in the user's files, and with which words."""
    try:
        yield
    except (InputError, KeyboardInterrupt):
        raise
    except BaseException as error:
        where = _place(error, source)
        said = str(error).strip().partition("\n")[0]
        raise TaskError(f"{what}{where}: {type(error).__name__}{': ' if said else ''}{said}") from error


def _place(error: BaseException, source: Source) -> str:
    """` in my_task.py:12`: the innermost line of the user's own files, if the error passed through one."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename).as_posix()
        for relative in source.files:
            if path.endswith("/" + relative):
                return f" in {relative}:{frame.lineno}"
    return ""


def to_send(kind: str, name: str, root: Path) -> Sent:
    """The file called `name`, relative to `root`, with its content where that is small enough.

    Raises:
        TaskError: it cannot be read; messages call it a `kind`.
    """
    path = root.resolve() / name
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_SENT + 1)
            if len(data) <= LARGEST_SENT:
                return Sent(kind=kind, name=name, sha256=sha256(data).hexdigest(), data=data)
            file.seek(0)
            return Sent(kind=kind, name=name, sha256=file_digest(file, "sha256").hexdigest(), data=None)
    except OSError as error:
        raise TaskError(f"{kind} {name!r}: cannot read {path}: {error.strerror}") from error


def _builtin(name: str) -> Source:
    folder, module = Path(__file__).parent, name.replace("-", "_")
    files = {
        f"orchestrator/tasks/{file}": _read(folder / file, file)
        for file in (f"{module}.py", "models.py", "packaged.py")
    }
    return _source(name, f"orchestrator.tasks.{module}", files)


def _source(name: str, module: str, files: Mapping[str, str]) -> Source:
    digest = sha256(module.encode())
    for path in sorted(files):
        digest.update(f"\0{path}\0{len(files[path])}\0{files[path]}".encode())
    return Source(
        name=name, module=module, files={path: files[path] for path in sorted(files)}, digest=digest.hexdigest()
    )


# --- Finding the files ---


def _collect(target: str, name: str, root: Path, kind: str) -> Source:
    root = root.resolve()
    if target.endswith(".py"):
        path = (root / target).resolve()
        if not path.is_file():
            raise TaskError(f"{kind} {name!r}: there is no file {path}")
        base = root if path.is_relative_to(root) else path.parent
        homes: Sequence[Path] = (path.parent, base)
        only = None
    else:
        base, path, only = _find_module(target, name, root, kind)
        homes = (base,)
    found = _Tree(base, homes, only)
    found.add(path)
    return _source(name, _dotted(path.relative_to(base).as_posix()), found.files)


def _find_module(target: str, name: str, root: Path, kind: str) -> tuple[Path, Path, str | None]:
    """The folder that holds the top-level package, the module's file, and that package's name if it is installed."""
    parts = target.split(".")
    if all(part.isidentifier() for part in parts):
        folders = [root, *(Path(entry or ".").resolve() for entry in sys.path)]
        for folder in (*folders, *_declared(parts[0])):
            path = _file_of(folder, parts)
            if path is not None and not _ours(path):
                installed = {"site-packages", "dist-packages"} & set(folder.parts)
                return folder, path, parts[0] if installed else None
    close = get_close_matches(target, BUILTIN, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    known = f" Built in: {', '.join(sorted(BUILTIN))}; your own: my_task.py or package.module" if kind == "task" else ""
    raise TaskError(f"{kind} {name!r}: no module of that name in {root} or on the Python path{hint}{known}")


def _declared(package: str) -> Iterator[Path]:
    # A package installed in editable mode may be known to a finder only.
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        return
    if spec is not None and spec.origin and spec.origin.endswith(".py"):
        file = Path(spec.origin)
        yield file.parents[1] if file.name == "__init__.py" else file.parent


def _file_of(folder: Path, parts: Sequence[str]) -> Path | None:
    """The file of the module `parts` under `folder`, if it has one."""
    package = folder.joinpath(*parts, "__init__.py")
    if package.is_file():
        return package
    if not parts:
        return None
    module = folder.joinpath(*parts[:-1], parts[-1] + ".py")
    return module if module.is_file() else None


def _ours(path: Path) -> bool:
    resolved = path.resolve()
    return any(resolved.is_relative_to(HOUSE / package) for package in OUR_OWN)


class _Tree:
    """Local files by relative path, growing with what each of them imports."""

    def __init__(self, base: Path, homes: Sequence[Path], only: str | None) -> None:
        self.base = base
        self.homes = homes
        self.only = only
        self.files: dict[str, str] = {}

    def add(self, path: Path) -> None:
        """Enters `path` and every local file that it imports, transitively."""
        waiting = [path]
        while waiting:
            path = waiting.pop()
            relative = path.relative_to(self.base).as_posix()
            if relative in self.files:
                continue
            text = _read(path, relative)
            self.files[relative] = text
            waiting += self._packages_of(path)
            for folder, parts in self._imports(path, relative, text):
                waiting += self._along(folder, parts)

    def _packages_of(self, path: Path) -> Iterator[Path]:
        # Importing a.b.c runs the __init__ of a and of a.b first.
        for folder in path.relative_to(self.base).parents:
            init = self.base / folder / "__init__.py"
            if folder != Path() and init.is_file():
                yield init

    def _imports(self, path: Path, relative: str, text: str) -> Iterator[tuple[Path | None, list[str]]]:
        """(folder, parts) of every imported name; the folder is None for absolute imports."""
        for node in ast.walk(_parse(text, relative)):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield None, alias.name.split(".")
            elif isinstance(node, ast.ImportFrom):
                above = path.parents[node.level - 1] if 0 < node.level <= len(path.parents) else None
                if above is not None and not above.is_relative_to(self.base):
                    continue
                parts = node.module.split(".") if node.module else []
                yield above, parts
                # The imported name may itself be a module.
                yield from ((above, [*parts, alias.name]) for alias in node.names if alias.name != "*")

    def _along(self, folder: Path | None, parts: list[str]) -> list[Path]:
        if folder is None and self.only is not None and parts[0] != self.only:
            return []
        for home in (folder,) if folder is not None else self.homes:
            path = _file_of(home, parts)
            if path is not None and not _ours(path):
                between = (_file_of(home, parts[:depth]) for depth in range(1, len(parts)))
                return [path, *(file for file in between if file is not None)]
        return []


def _read(path: Path, shown: str) -> str:
    try:
        return decode_source(path.read_bytes())
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise TaskError(f"{shown} cannot be read: {error}") from error


def _parse(text: str, shown: str) -> ast.Module:
    try:
        return ast.parse(text, filename=shown)
    except SyntaxError as error:
        line = f": {error.text.strip()}" if error.text else ""
        raise TaskError(f"{shown}:{error.lineno}: {error.msg}{line}") from error
    except ValueError as error:
        raise TaskError(f"{shown} cannot be parsed: {error}") from error


def _dotted(relative: str) -> str:
    """The module name of a file: `a/b.py` -> `a.b`, `a/__init__.py` -> `a`; dots within a folder's name become `_`."""
    parts = [part.replace(".", "_") for part in PurePosixPath(relative).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# --- Importing them ---


def _folder_with(source: Source, root: Path | None) -> Path | None:
    """The folder that holds exactly the texts of `source`: the study's, the task's own, or one on the Python path."""
    for folder in _candidates(source, root):
        try:
            if all(decode_source((folder / path).read_bytes()) == text for path, text in source.files.items()):
                return folder
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue
    return None


def _candidates(source: Source, root: Path | None) -> Iterator[Path]:
    target = source.name.partition(".py:")[0] + ".py" if ".py:" in source.name else source.name
    if root is not None:
        yield root.resolve()
        if target.endswith(".py"):
            yield (root / target).resolve().parent
    if not target.endswith(".py"):
        yield from (Path(entry or ".").resolve() for entry in sys.path)
        yield from _declared(source.module.partition(".")[0])


def _materialise(source: Source) -> Path:
    # Kept until the process ends: tracebacks, inspect and torch.jit read the files again.
    folder = Path(tempfile.mkdtemp(prefix=_MATERIALISED))
    fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_SH)  # however the process ends
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _sweep_materialised(folder.parent)
    for relative, text in source.files.items():
        path = folder / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def _sweep_materialised(parent: Path) -> None:
    """Remove what killed processes have left. A young folder may be one that is about to be locked."""
    for folder in parent.glob(f"{_MATERIALISED}*"):
        with suppress(OSError):  # in use, somebody else's, or gone meanwhile
            if time.time() - folder.stat().st_mtime < _YOUNG_SECONDS:
                continue
            held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(held)


class _LocalModules:
    """Finds and runs the modules of one source under its namespace (a finder and loader for `sys.meta_path`)."""

    def __init__(self, namespace: str, source: Source, folder: Path) -> None:
        self.namespace = namespace
        self.folder = folder
        self.texts = {_dotted(path): text for path, text in source.files.items()}
        self.paths = {_dotted(path): path for path in source.files}
        # Packages without an __init__.py, the namespace itself among them.
        self.folders = {
            ".".join(name.split(".")[:depth]) for name in self.texts for depth in range(name.count(".") + 1)
        }
        target = source.name.rpartition(":")[0] or source.name
        inside = source.module.rpartition(".")[0] if target.endswith(".py") else ""
        self.homes = (f"{inside}.", "") if inside else ("",)

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """The spec of a module of this namespace; None leaves the name to other finders."""
        if fullname != self.namespace and not fullname.startswith(self.namespace + "."):
            return None
        name = fullname.removeprefix(self.namespace).removeprefix(".")
        if name not in self.texts and name not in self.folders and name:
            return None
        file = self.paths.get(name)
        package = file is None or file.endswith("__init__.py")
        spec = ModuleSpec(fullname, self, origin=str(self.folder / file) if file else None, is_package=package)  # type: ignore[arg-type]
        spec.has_location = file is not None
        return spec

    def create_module(self, spec: ModuleSpec) -> None:
        """Leaves the making of the module to Python."""

    def exec_module(self, module: ModuleType) -> None:
        """Runs the text that the digest covers: a cached .pyc may be older than an edit within the same second."""
        name = module.__name__.removeprefix(self.namespace).removeprefix(".")
        if name in self.texts:
            code = compile(self.texts[name], str(self.folder / self.paths[name]), "exec", dont_inherit=True)
            module.__dict__["__builtins__"] = {**vars(builtins), "__import__": self.import_local}
            exec(code, module.__dict__)

    def import_local(
        self,
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        """The `__import__` of the user's modules: an absolute name of a local file means the one of this namespace."""
        home = self._home_of(name, fromlist or ()) if level == 0 else None
        if home is None:
            return builtins.__import__(name, globals, locals, fromlist or (), level)
        full = f"{self.namespace}.{home}{name}"
        if fromlist:
            return builtins.__import__(full, globals, locals, fromlist, 0)
        importlib.import_module(full)
        return sys.modules[f"{self.namespace}.{home}{name.partition('.')[0]}"]

    def _home_of(self, name: str, fromlist: Sequence[str]) -> str | None:
        for home in self.homes:
            if home + name in self.texts or any(f"{home}{name}.{item}" in self.texts for item in fromlist):
                return home
        return None
