"""Copies of files that nobody outside can change: a page of such a copy never goes away under a mapping (SIGBUS)."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ._atomic_file import close
from .deadline import current_deadline
from .errors import ModelFileError, OutOfMemoryError, PyllamaError, RequestError, reason_of

__all__ = ["LIMIT_BYTES", "Snapshot", "open_regular", "too_large", "unnamed_copy"]

LIMIT_BYTES = 1 << 32
"""What a sandbox can hold at most."""

_COPY_BYTES = 4 << 20
_CHANGED = "the file changed while it was read"


class Snapshot:
    """What a file held at one moment, in an unnamed file that is sealed in memory on Linux.

    All snapshots of one unchanged file in this process are the same one: sandboxes then share its pages. It goes with
    the last that refers to it; what is mapped of it stays.
    """

    def __init__(self) -> None:
        """Be empty; ``of`` makes the ones with a file."""
        self.fd = -1
        """Descriptor of the copy, or -1 while there is none."""
        self.size_bytes = 0
        self._lock = threading.Lock()

    @classmethod
    def of(cls, fd: int, limit_bytes: int, operation: str) -> Snapshot:
        """Return the snapshot of a regular file open at ``fd``, which stays the caller's.

        Raises ``ModelFileError`` when it cannot be read or changes meanwhile, ``OutOfMemoryError`` when it has more
        than ``limit_bytes`` or the system has no memory for it, and ``DeadlineError``.
        """
        try:
            info = os.fstat(fd)
            if info.st_size > limit_bytes:
                raise too_large(limit_bytes, operation)
            # The time of the last change of any kind (ctime) is the one that a writer cannot set.
            key = (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
            with _lock:
                snapshot = _known.get(key)
                if snapshot is None:
                    snapshot = _known[key] = cls()
            snapshot._acquire(operation)  # others that want the same file wait for the one copy
            try:
                if snapshot.fd < 0:
                    snapshot._take(fd, info, operation)
            finally:
                snapshot._lock.release()
        except OSError as error:
            if isinstance(error, PyllamaError):
                raise
            raise ModelFileError(operation, reason_of(error)) from error
        return snapshot

    def _acquire(self, operation: str) -> None:
        deadline = current_deadline()
        timeout_s = -1 if deadline is None else min(deadline.left_s, threading.TIMEOUT_MAX)
        if not self._lock.acquire(timeout=timeout_s) and deadline is not None:
            raise deadline.error(operation)

    def _take(self, fd: int, before: os.stat_result, operation: str) -> None:
        offset = 0

        def read(n: int) -> bytes:
            nonlocal offset
            piece = _read_at(fd, min(n, before.st_size - offset), offset)
            offset += len(piece)
            return piece

        copy = unnamed_copy(read, before.st_size, operation)
        try:
            after = os.fstat(fd)
            times = [(info.st_size, info.st_mtime_ns, info.st_ctime_ns) for info in (before, after)]
            if offset != before.st_size or times[0] != times[1]:
                raise ModelFileError(operation, _CHANGED, "load it when it is whole")
        except BaseException:
            close(copy)
            raise
        self.fd, self.size_bytes = copy, offset
        weakref.finalize(self, close, copy).atexit = False


_known: weakref.WeakValueDictionary[tuple[int, ...], Snapshot] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def _after_fork() -> None:
    """Start over in a forked child, where who held a lock is gone; what it inherited of snapshots stays usable."""
    global _lock
    _lock = threading.Lock()
    _known.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def open_regular(path: Path, operation: str) -> int:
    """Return a descriptor for reading a regular file. Raises ``ModelFileError``."""
    flags = os.O_RDONLY
    # Not blocking: opening a FIFO would otherwise wait for a writer.
    for name in ("O_CLOEXEC", "O_NONBLOCK", "O_NOCTTY", "O_BINARY", "O_NOINHERIT"):
        flags |= getattr(os, name, 0)
    try:
        fd = os.open(path, flags)
    except (OSError, ValueError) as error:  # ValueError: a zero character in the path
        raise ModelFileError(operation, reason_of(error), "check the path") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ModelFileError(operation, "it is not a regular file", "give the path of a GGUF file")
    return fd


def unnamed_copy(read: Callable[[int], Any], limit_bytes: int, operation: str) -> int:
    """Return the descriptor of a new file without a name that holds all that ``read`` gives, sealed on Linux.

    In memory there, else in the temporary folder. Raises ``ModelFileError`` for what cannot be read or stored,
    ``RequestError`` when ``read`` does not give bytes, ``OutOfMemoryError`` and, between two pieces, ``DeadlineError``.
    """
    try:
        fd, reader = _unnamed_file()
    except OSError as error:
        raise ModelFileError(operation, f"no place for a copy of it: {reason_of(error)}") from error
    try:
        with open(fd, "wb", buffering=0, closefd=reader != fd) as target:
            _copy(read, target, limit_bytes, operation)
        _seal(reader)
    except BaseException:
        close(reader)
        raise
    return reader


def _copy(read: Callable[[int], Any], target: Any, limit_bytes: int, operation: str) -> None:
    total, deadline = 0, current_deadline()
    while True:
        if deadline is not None:
            deadline.check(operation)
        try:
            piece = read(_COPY_BYTES)
        except (OSError, ValueError) as error:  # ValueError: the file object is closed
            raise ModelFileError(operation, reason_of(error)) from error
        if piece is None or isinstance(piece, str):
            raise RequestError(operation, "the file object does not read bytes", "open it with mode 'rb'")
        if not piece:
            return
        view = memoryview(piece).cast("B")
        total += len(view)
        if total > limit_bytes:
            raise too_large(limit_bytes, operation)
        try:
            while len(view):
                view = view[target.write(view) :]
        except OSError as error:
            raise OutOfMemoryError(operation, f"no room for a copy of it: {reason_of(error)}") from error


def too_large(limit_bytes: int, operation: str) -> OutOfMemoryError:
    """Return the error for a file of more than ``limit_bytes``."""
    hint = "raise memory_limit_bytes" if limit_bytes < LIMIT_BYTES else "use a smaller model"
    return OutOfMemoryError(operation, f"it has more than {limit_bytes / 2**20:.0f} MiB", hint)


def _read_at(fd: int, n: int, offset: int) -> bytes:
    if hasattr(os, "pread"):
        data: bytes = os.pread(fd, n, offset)
        return data
    with open(fd, "rb", buffering=0, closefd=False) as file:
        file.seek(offset)
        return file.read(n)


def _unnamed_file() -> tuple[int, int]:
    """Return descriptors of a new file, to write to and to keep: the same one where it can be sealed, and on Windows.

    What is kept may go to another process, which is not to change the file.
    """
    if sys.platform == "linux" and hasattr(os, "memfd_create"):  # some builds of Python are for a C library without it
        fd = os.memfd_create("pyllama_wasm", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        return fd, fd
    if sys.platform == "win32":  # where a file that is open for writing cannot be opened otherwise
        with tempfile.TemporaryFile(prefix="pyllama_wasm-") as file:
            fd = os.dup(file.fileno())
            return fd, fd
    fd, name = tempfile.mkstemp(prefix="pyllama_wasm-")
    try:
        return fd, os.open(name, os.O_RDONLY | os.O_CLOEXEC)
    except BaseException:
        os.close(fd)
        raise
    finally:
        Path(name).unlink()


def _seal(fd: int) -> None:
    """Make a file in memory unchangeable: then a mapping of it can never lose its pages."""
    if sys.platform == "linux" and hasattr(os, "memfd_create"):
        import fcntl

        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
