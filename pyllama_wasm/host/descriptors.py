"""The guest's file descriptors: numbers of the guest's own, never those of this process."""

from __future__ import annotations

import threading

from .files import FileTable, GrantedFile
from .wasi_errno import Errno, WasiError

PREOPEN = 3
"""The one folder: ``/``."""

_FIRST = 4
_LIMIT = 256


class OpenFile:
    """One guest descriptor: a granted file and an offset of its own."""

    def __init__(self, file: GrantedFile, inode: int, is_writable: bool) -> None:
        """Start at the beginning of ``file``."""
        self.file, self.inode, self.is_writable = file, inode, is_writable
        self.offset = 0
        self.lock = threading.Lock()
        """Held while the offset is read and moved on: guest threads may share a descriptor."""


class Descriptors:
    """The descriptors above the preopened folder. May be used by several guest threads."""

    def __init__(self, files: FileTable) -> None:
        """Open from ``files`` only."""
        self._files = files
        self._open: dict[int, OpenFile] = {}
        self._lock = threading.Lock()
        self._n_opened = 0

    def open(self, guest_path: str, is_writable: bool) -> int:
        """Open the granted file of exactly that path; return the lowest free number."""
        file = self._files.find(guest_path)
        if file is None:
            raise WasiError(Errno.NOENT)
        if is_writable and not file.is_writable:
            raise WasiError(Errno.ACCES)
        with self._lock:
            fd = next((n for n in range(_FIRST, _FIRST + _LIMIT) if n not in self._open), None)
            if fd is None:
                raise WasiError(Errno.MFILE)
            self._n_opened += 1
            self._open[fd] = OpenFile(file, self._n_opened, is_writable)
            return fd

    def get(self, fd: int) -> OpenFile:
        """Return the open file of that number; ``WasiError(BADF)`` when there is none."""
        with self._lock:
            found = self._open.get(fd)
        if found is None:
            raise WasiError(Errno.BADF)
        return found

    def close(self, fd: int) -> None:
        """Forget the number; the host's file stays open for as long as it is granted."""
        with self._lock:
            if self._open.pop(fd, None) is None:
                raise WasiError(Errno.BADF)
