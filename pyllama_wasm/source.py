"""What a model is loaded from: a path, the paths of its parts, bytes, or a binary file object."""

from __future__ import annotations

import io
import os
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from . import _atomic_file
from ._gguf_cursor import check_magic
from ._snapshot import LIMIT_BYTES, Snapshot, open_regular, too_large, unnamed_copy
from .errors import ModelFileError, RequestError, reason_of
from .gguf import GGUFReader

if TYPE_CHECKING:
    from .host import Engine
    from .host.files import GrantedFile

__all__ = ["ModelSource", "OpenedFiles", "Readable", "Source", "split_parts"]


class Readable(Protocol):
    """A binary file object, of which only ``read`` is used."""

    def read(self, size: int, /) -> bytes:
        """Return the next bytes, at most ``size``; none at the end."""
        ...


@dataclass(frozen=True)
class OpenedFiles:
    """The files of one model, open for reading, the first one first; they stay whose they are."""

    names: tuple[str, ...]
    descriptors: tuple[int, ...]
    is_listed: bool = False
    """As in ``ModelSource``."""

    repacks: bool = False
    """Whether weights are to be repacked: it is who opened the files that decides."""

    weights: int | None = None
    """A file with the repacked weights of an earlier load."""


Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | bytes | bytearray | memoryview | Readable
"""A path, the paths of all parts of a split model in order, the bytes of a file, or a binary file object."""


class ModelSource:
    """The file or files of one model, ready to be granted to a sandbox; ``close`` it when the load has ended.

    Bytes and what a file object reads, from its position to its end, are kept in an unnamed file: in memory where
    the system can (Linux), so that they are mapped like any other file, else in the temporary folder.
    """

    path: Path
    """The first file, or just a name when there is none."""

    def __init__(self, source: Source | OpenedFiles, limit_bytes: int | None = None, *, snapshot: bool = False) -> None:
        """Look at ``source``; nothing is granted yet.

        With ``snapshot`` every file is copied now, as bytes are: whoever writes to it or cuts it short later changes
        nothing here. Raises ``ModelFileError`` or ``ModelFormatError`` when it cannot be read or does not start like a
        GGUF, ``OutOfMemoryError`` when what is copied has more than ``limit_bytes``, ``RequestError`` when it is none
        of the kinds of ``Source`` or a part of a split model that is not the first.
        """
        self._limit = min(limit_bytes, LIMIT_BYTES) if isinstance(limit_bytes, int) else LIMIT_BYTES
        self._fd: int | None = None
        self.parts: list[Path] = []
        """The further parts, by the naming of a split model or as they were given."""
        self.is_listed = False
        """Whether the parts were given one by one."""
        self._granted: list[tuple[GrantedFile, int]] = []
        self._headers: dict[int, tuple[tuple[int, ...], GGUFReader]] = {}
        self.opened_files: OpenedFiles | None = None
        """What it was given, if that is files that somebody else has opened."""
        self.snapshots: tuple[Snapshot, ...] = ()
        """The copies, one for each file. Whoever keeps them lets later loads of the unchanged file share them."""
        if isinstance(source, (str, os.PathLike)):
            self.path = Path(source)
            self._find_parts()
        elif isinstance(source, (bytes, bytearray, memoryview)):
            self.path = Path("bytes")
            self._fd = unnamed_copy(_reader(source), self._limit, self.operation)
        elif isinstance(source, OpenedFiles):
            self._take_opened(source)
        elif isinstance(source, Sequence):
            self._take_list(source)
        elif callable(getattr(source, "read", None)):
            self.path = Path(_name_of(source))
            self._take_file(source, snapshot)
        else:
            raise RequestError("load a model", f"{type(source).__name__} is no path, no bytes and no binary file")
        try:
            check_magic(self._data, self.operation)
            if snapshot and self._fd is None:
                self._take_snapshots()
        except BaseException:
            self.close()
            raise

    @property
    def operation(self) -> str:
        """Return how messages begin: ``load model.gguf``."""
        return f"load {self.path.name}"

    @property
    def is_named(self) -> bool:
        """Return whether the files are used as they lie in their folders, and no copies."""
        return self._fd is None and not self.snapshots

    @property
    def size_bytes(self) -> int:
        """Return the size of the first file, 0 when it is gone."""
        data = self._data
        try:
            return (os.fstat(data) if isinstance(data, int) else data.stat()).st_size
        except OSError:
            return 0

    def header(self) -> GGUFReader:
        """Read the header of the first file; raises as ``GGUFReader`` does. Again only when the file has changed."""
        return self._header(0, self._data, self.operation)

    def part_headers(self) -> Iterator[GGUFReader]:
        """Read the headers of the further parts, one by one; raises as ``GGUFReader`` does."""
        for number, part in enumerate(self.parts, 1):
            data = self.snapshots[number].fd if self.snapshots else part
            yield self._header(number, data, f"{self.operation}: part {part.name}")

    def _header(self, number: int, data: Path | int, operation: str) -> GGUFReader:
        """Return the header of a file; of a large vocabulary reading it takes longer than all other checks."""
        try:
            info = os.fstat(data) if isinstance(data, int) else data.stat()
            # The time of the last change of any kind (ctime) is the one that a writer cannot set.
            state = (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
        except (OSError, ValueError):  # the reader says what is wrong
            return GGUFReader(data, operation)
        known = self._headers.get(number)
        if known is None or known[0] != state:
            known = self._headers[number] = (state, GGUFReader(data, operation))
        return known[1]

    def grant(self, engine: Engine) -> list[str]:
        """Let ``engine`` read the files; return their guest paths, the first one first."""
        if self._fd is not None:
            return [engine.files.grant_fd(self._fd, self.path.name)]
        guest_paths: list[str] = []
        self._granted = []  # it may be the second engine, in place of one that was closed
        for number, path in enumerate((self.path, *self.parts)):
            beside = None if self.is_listed or not guest_paths else guest_paths[0]
            try:
                if self.snapshots:
                    guest_path = engine.files.grant_fd(self.snapshots[number].fd, path.name, beside=beside)
                else:
                    guest_path = engine.files.grant(path, beside=beside)
            except ModelFileError as error:
                if number == 0:
                    raise
                raise self._part_error(number, error) from error
            guest_paths.append(guest_path)
            if granted := engine.files.find(guest_path):
                self._granted.append((granted, granted.size_bytes()))
        return guest_paths

    @contextmanager
    def opened(self) -> Iterator[OpenedFiles]:
        """Have the files open for a block, the copies where there are any. Raises ``ModelFileError``."""
        if self._fd is not None:
            yield OpenedFiles((self.path.name,), (self._fd,))
            return
        names = tuple(path.name for path in (self.path, *self.parts))
        with ExitStack() as stack:
            descriptors = [snapshot.fd for snapshot in self.snapshots]
            for number, path in enumerate(() if descriptors else (self.path, *self.parts)):
                try:
                    descriptors.append(open_regular(path, self.operation))
                except ModelFileError as error:
                    raise error if number == 0 else self._part_error(number, error) from error
                stack.callback(os.close, descriptors[-1])
            yield OpenedFiles(names, tuple(descriptors), self.is_listed)

    @property
    def read_error(self) -> OSError | None:
        """Return what the system answered to a read of the guest that failed, if any did."""
        return next((file.read_error for file, _ in self._granted if file.read_error is not None), None)

    def check_whole(self) -> None:
        """Raise ``ModelFileError`` when a granted file has lost its end since: what was missing is read as zeros."""
        for file, size_bytes in self._granted:
            try:
                is_cut = file.size_bytes() < size_bytes
            except OSError as error:
                raise ModelFileError(self.operation, reason_of(error)) from error
            if is_cut:
                reason = "the file became shorter while it was read"
                raise ModelFileError(self.operation, reason, "load it when it is whole")

    def close(self) -> None:
        """Forget the unnamed files and the headers; what is granted or mapped of them stays. Again is fine."""
        self.snapshots, self._granted = (), []
        self._headers.clear()  # with the texts of all tokens
        if self._fd is not None:
            fd, self._fd = self._fd, None
            _atomic_file.close(fd)

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

    def _take_opened(self, files: OpenedFiles) -> None:
        self.opened_files = files
        self.path, *self.parts = (Path(name) for name in files.names)
        self.is_listed = files.is_listed
        # They are what copies are: descriptors to grant. Who made them has seen to it that they are the right kind.
        snapshots = [Snapshot() for _ in files.descriptors]
        for snapshot, fd in zip(snapshots, files.descriptors, strict=True):
            snapshot.fd, snapshot.size_bytes = fd, os.fstat(fd).st_size
        self.snapshots = tuple(snapshots)

    def _take_file(self, file: Any, is_copied: bool) -> None:
        fd = _whole_file(file)
        if fd is None:
            self._fd = unnamed_copy(file.read, self._limit, self.operation)
        elif is_copied:
            self.snapshots = (Snapshot.of(fd, self._limit, self.operation),)
        else:
            self._fd = _reopened(fd)

    def _take_snapshots(self) -> None:
        """Copy the files that were given by name; together they have at most the limit."""
        if self.snapshots:
            return
        snapshots: list[Snapshot] = []
        for number, path in enumerate((self.path, *self.parts)):
            try:
                fd = open_regular(path, self.operation)
                try:
                    snapshots.append(Snapshot.of(fd, self._limit, self.operation))
                finally:
                    os.close(fd)
            except ModelFileError as error:
                if number == 0:
                    raise
                raise self._part_error(number, error) from error
            if sum(snapshot.size_bytes for snapshot in snapshots) > self._limit:
                raise too_large(self._limit, self.operation)
        self.snapshots = tuple(snapshots)
        check_magic(self._data, self.operation)  # of the file that was copied; it may be another one by now

    @property
    def _data(self) -> Path | int:
        """Where the bytes of the first file are."""
        if self._fd is not None:
            return self._fd
        return self.snapshots[0].fd if self.snapshots else self.path

    def _part_error(self, number: int, error: ModelFileError) -> ModelFileError:
        """Return ``error`` of a further part, told of the model."""
        hint = "" if self.is_listed else "all parts of a split model lie in one folder"
        return ModelFileError(self.operation, f"part {self.parts[number - 1].name}: {error.reason}", hint)


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


def _reopened(fd: int) -> int:
    """Return a descriptor of the same file with a position of its own, since it may go to another process.

    Where the system cannot, or does not let it be opened again, one that shares the position.
    """
    if sys.platform == "linux" and stat.S_ISREG(os.fstat(fd).st_mode):
        with suppress(OSError):
            return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    return os.dup(fd)


def _whole_file(file: object) -> int | None:
    """Return the descriptor of a plain file at its beginning: only then are its bytes what ``read`` gives.

    None for one that can be written to: the descriptor may go to another process.
    """
    raw = getattr(file, "raw", file) if isinstance(file, (io.BufferedReader, io.BufferedRandom)) else file
    if type(raw) is not io.FileIO or raw.closed or not raw.readable() or raw.writable():
        return None
    try:
        return raw.fileno() if isinstance(file, io.IOBase) and file.tell() == 0 else None
    except OSError:  # a pipe has no position
        return None
