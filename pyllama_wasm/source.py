"""What a model is loaded from: a path, the paths of its parts, bytes, or a binary file object."""

from __future__ import annotations

import io
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ._gguf_cursor import check_magic
from .errors import ModelFileError, OutOfMemoryError, RequestError
from .gguf import GGUFReader

if TYPE_CHECKING:
    from .host import Engine

__all__ = ["ModelSource", "Readable", "Source", "split_parts"]


class Readable(Protocol):
    """A binary file object, of which only ``read`` is used."""

    def read(self, size: int, /) -> bytes:
        """Return the next bytes, at most ``size``; none at the end."""
        ...


Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | bytes | bytearray | memoryview | Readable
"""A path, the paths of all parts of a split model in order, the bytes of a file, or a binary file object."""

_COPY_BYTES = 4 << 20
_LIMIT_BYTES = 1 << 32


class ModelSource:
    """The file or files of one model, ready to be granted to a sandbox; ``close`` it when the load has ended.

    Bytes and what a file object reads, from its position to its end, are kept in an unnamed file: in memory where
    the system can (Linux), so that they are mapped like any other file, else in the temporary folder.
    """

    path: Path
    """The first file, or just a name when there is none."""

    def __init__(self, source: Source, limit_bytes: int | None = None) -> None:
        """Look at ``source``; nothing is granted yet.

        Raises ``ModelFileError`` or ``ModelFormatError`` when it cannot be read or does not start like a GGUF,
        ``RequestError`` when it is none of the kinds of ``Source`` or a part of a split model that is not the first.
        """
        self._limit = min(limit_bytes, _LIMIT_BYTES) if isinstance(limit_bytes, int) else _LIMIT_BYTES
        self._fd: int | None = None
        self.parts: list[Path] = []
        """The further parts, by the naming of a split model or as they were given."""
        self.is_listed = False
        """Whether the parts were given one by one."""
        if isinstance(source, (str, os.PathLike)):
            self.path = Path(source)
            self._find_parts()
        elif isinstance(source, (bytes, bytearray, memoryview)):
            self.path = Path("bytes")
            self._keep(_reader(source))
        elif isinstance(source, Sequence):
            self._take_list(source)
        elif callable(getattr(source, "read", None)):
            self.path = Path(_name_of(source))
            self._take_file(source)
        else:
            raise RequestError("load a model", f"{type(source).__name__} is no path, no bytes and no binary file")
        try:
            check_magic(self.path if self._fd is None else self._fd, self.operation)
        except BaseException:
            self.close()
            raise

    @property
    def operation(self) -> str:
        """Return how messages begin: ``load model.gguf``."""
        return f"load {self.path.name}"

    @property
    def size_bytes(self) -> int:
        """Return the size of the first file, 0 when it is gone."""
        try:
            return os.fstat(self._fd).st_size if self._fd is not None else self.path.stat().st_size
        except OSError:
            return 0

    def header(self) -> GGUFReader:
        """Read the header of the first file; raises as ``GGUFReader`` does."""
        return GGUFReader(self.path if self._fd is None else self._fd, self.operation)

    def grant(self, engine: Engine) -> list[str]:
        """Let ``engine`` read the files; return their guest paths, the first one first."""
        if self._fd is not None:
            return [engine.files.grant_fd(self._fd, self.path.name)]
        guest_paths = [engine.files.grant(self.path)]
        for part in self.parts:
            beside = None if self.is_listed else guest_paths[0]
            try:
                guest_paths.append(engine.files.grant(part, beside=beside))
            except ModelFileError as error:
                hint = "" if self.is_listed else "all parts of a split model lie in one folder"
                raise ModelFileError(self.operation, f"part {part.name}: {error.reason}", hint) from error
        return guest_paths

    def close(self) -> None:
        """Forget the unnamed file; what is granted or mapped of it stays. Again is fine."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            os.close(fd)

    def _find_parts(self) -> None:
        names = split_parts(self.path.name)
        if names and names[0] != self.path.name:
            raise RequestError(
                self.operation, f"it is a further part of a split model of {len(names)}", f"load {names[0]}"
            )
        self.parts = [self.path.with_name(name) for name in names[1:]]

    def _take_list(self, source: Sequence[Any]) -> None:
        if not source or not all(isinstance(item, (str, os.PathLike)) for item in source):
            raise RequestError("load a model", "the list of its parts is empty or has an item that is no path")
        self.path, *self.parts = (Path(item) for item in source)
        self.is_listed = True

    def _take_file(self, file: Any) -> None:
        fd = _whole_file(file)
        if fd is not None:
            self._fd = os.dup(fd)
            return
        self._keep(file.read)

    def _keep(self, read: Callable[[int], Any]) -> None:
        """Copy what ``read`` gives into an unnamed file."""
        fd = _unnamed_file()
        try:
            with open(fd, "wb", buffering=0, closefd=False) as target:
                _copy(read, target, self._limit, self.operation)
            _seal(fd)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd


def split_parts(name: str) -> list[str]:
    """Return the names of all parts of a split model, by llama.cpp's naming: ``m-00001-of-00003.gguf``.

    Empty when ``name`` is not of that form.
    """
    stem, dot, suffix = name.rpartition(".")
    rest, dash, total = stem.rpartition("-of-")
    prefix, separator, number = rest.rpartition("-")
    if not (dot and dash and separator and suffix == "gguf" and len(number) == len(total) == 5):
        return []
    if not (number.isascii() and number.isdigit() and total.isascii() and total.isdigit()):
        return []
    if not 1 <= int(number) <= int(total):
        return []
    return [f"{prefix}-{i:05d}-of-{total}.gguf" for i in range(1, int(total) + 1)]


def _reader(data: bytes | bytearray | memoryview) -> Callable[[int], memoryview]:
    """Return a ``read`` over memory that copies nothing."""
    try:
        rest = memoryview(data).cast("B")
    except TypeError as error:
        raise RequestError("load a model", "the memory is not contiguous") from error

    def read(n: int) -> memoryview:
        nonlocal rest
        piece, rest = rest[:n], rest[n:]
        return piece

    return read


def _name_of(file: object) -> str:
    name = getattr(file, "name", None)
    return Path(name).name or "file" if isinstance(name, str) else "file object"


def _whole_file(file: object) -> int | None:
    """Return the descriptor of a plain file at its beginning: only then are its bytes what ``read`` gives."""
    raw = getattr(file, "raw", file) if isinstance(file, (io.BufferedReader, io.BufferedRandom)) else file
    if type(raw) is not io.FileIO or raw.closed or not raw.readable():
        return None
    try:
        return raw.fileno() if isinstance(file, io.IOBase) and file.tell() == 0 else None
    except OSError:  # a pipe has no position
        return None


def _copy(read: Callable[[int], Any], target: io.FileIO, limit: int, operation: str) -> None:
    total = 0
    while True:
        try:
            piece = read(_COPY_BYTES)
        except (OSError, ValueError) as error:  # ValueError: the file object is closed
            raise ModelFileError(operation, str(error)) from error
        if piece is None or isinstance(piece, str):
            raise RequestError(operation, "the file object does not read bytes", "open it with mode 'rb'")
        if not piece:
            return
        view = memoryview(piece).cast("B")
        total += len(view)
        if total > limit:
            hint = "raise memory_limit_bytes" if limit < _LIMIT_BYTES else "use a smaller model"
            raise OutOfMemoryError(operation, f"it has more than {limit / 2**20:.0f} MiB", hint)
        while len(view):
            view = view[target.write(view) :]


def _unnamed_file() -> int:
    """Return the descriptor of a new file without a name: in memory on Linux, else in the temporary folder."""
    if sys.platform == "linux":
        return os.memfd_create("pyllama_wasm", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with tempfile.TemporaryFile(prefix="pyllama_wasm-") as file:
        return os.dup(file.fileno())


def _seal(fd: int) -> None:
    """Make a file in memory unchangeable: then a mapping of it can never lose its pages."""
    if sys.platform == "linux":
        import fcntl

        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
