"""States by their key: safetensors files, each written once, shared by every study of the store."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.header import header_end, read_header
from orchestrator.store import paths
from orchestrator.store.files import Files

_FIRST_READ = 64 * 1024


class States:
    """The states of one store. A torn or foreign file under a state's name is reported, copied aside and absent."""

    def __init__(self, files: Files) -> None:
        self.files = files

    def has(self, key: str) -> bool:
        """Whether a file stands under the key's name; only `header` and `read` look into it."""
        return self.files.exists(paths.state(key))

    def size(self, key: str) -> int:
        """In bytes. Raises `FileNotFoundError` when the state is absent."""
        return self.files.size(paths.state(key))

    def header(self, key: str) -> dict[str, str] | None:
        """The `__metadata__` that was saved with the state, no tensor read; None when the state is absent."""
        path = paths.state(key)
        try:
            metadata = metadata_of(self.files, path)
        except FileNotFoundError:
            return None
        if metadata is None:
            self._set_aside(path)
        return metadata

    def read(self, key: str) -> bytes | None:
        """The whole file; None when the state is absent."""
        path = paths.state(key)
        try:
            data = self.files.read(path)
        except FileNotFoundError:
            return None
        if _metadata(data, len(data)) is None:
            self._set_aside(path)
            return None
        return data

    def commit(self, key: str, data: bytes) -> bool:
        """True when `data` is now the key's state; False when one was committed before, which the caller adopts."""
        assert _metadata(data, len(data)) is not None, f"not a whole safetensors file: {key}"
        path = paths.state(key)
        if self.files.create(path, data):
            return True
        if self.read(key) is not None:  # a header alone does not tell whether the tensors are whole
            return False
        self.files.write(path, data)  # over a torn one
        return True

    def replace(self, key: str, data: bytes) -> None:
        """Puts a better file, such as one with the optimizer kept, in the place of the key's state."""
        assert _metadata(data, len(data)) is not None, f"not a whole safetensors file: {key}"
        self.files.write(paths.state(key), data)

    def delete(self, key: str) -> None:
        """Nothing happens when the state is absent."""
        self.files.delete(paths.state(key))

    def keys(self) -> Iterator[str]:
        """Every key with a file, in order; states that come or go meanwhile may be missed."""
        for folder in self.files.list(paths.STATES):
            for name in self.files.list(f"{paths.STATES}/{folder}"):
                key = paths.state_key(name)
                if key is not None and key[:2] == folder:
                    yield key

    def _set_aside(self, path: str) -> None:
        torn = "is no whole safetensors file"
        self.files.set_aside(path, torn, lambda data: _metadata(data, len(data)) is None, stays=True)


def metadata_of(files: Files, path: str) -> dict[str, str] | None:
    """The metadata of a safetensors file, no tensor read; None where it is no whole one.

    Raises:
        FileNotFoundError: it is absent.
    """
    start = files.read_range(path, 0, _FIRST_READ)
    size = len(start) if len(start) < _FIRST_READ else files.size(path)
    needed = header_end(start)
    if len(start) < needed <= size:
        start += files.read_range(path, len(start), needed)
    return _metadata(start, size)


def _metadata(data: bytes, size: int) -> dict[str, str] | None:
    """The metadata in the first bytes of a file of `size` bytes; None where that is no whole safetensors file."""
    try:
        return read_header(data, size)
    except ValueError:
        return None
