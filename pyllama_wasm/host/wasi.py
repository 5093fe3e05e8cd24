"""The few WASI preview-1 calls that libc needs, over the table of granted files.

There are no folders to list, no sockets, no environment and no arguments; a path is found only when it equals a granted
one character by character. Function names and arguments are those of the WASI text; pointers are unsigned and checked.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Iterator

from .descriptors import PREOPEN, Descriptors, OpenFile
from .log import GuestLog
from .memory import Memory
from .wasi_errno import Errno, WasiError

_FILETYPE_CHARACTER_DEVICE, _FILETYPE_DIRECTORY, _FILETYPE_REGULAR = 2, 3, 4
_RIGHT_FD_SEEK, _RIGHT_FD_WRITE, _RIGHT_FD_TELL = 1 << 2, 1 << 6, 1 << 5
_RIGHTS_ALL = (1 << 29) - 1
_OFLAG_CREATE, _OFLAG_DIRECTORY, _OFLAG_EXCLUSIVE, _OFLAG_TRUNCATE = 1, 2, 4, 8
_SEEK_SET, _SEEK_CUR, _SEEK_END = 0, 1, 2

_IOVS_LIMIT = 1024
_PATH_LIMIT = 4096
_RANDOM_LIMIT = 1 << 16
_TRANSFER_CHUNK = 8 << 20
"""Most bytes of one read or write under the memory lock, so that other threads get their turn."""

_IOVEC = struct.Struct("<II")
_FDSTAT = struct.Struct("<BxHxxxxQQ")
_FILESTAT = struct.Struct("<QQBxxxxxxxQQQQQ")
_PRESTAT = struct.Struct("<BxxxI")

_CLOCKS: dict[int, Callable[[], int]] = {
    0: time.time_ns,
    1: time.monotonic_ns,
    2: time.process_time_ns,
    3: time.thread_time_ns,
}


class Wasi:
    """The calls of one sandbox; every public method is one import and returns 0, or raises ``WasiError``."""

    def __init__(
        self, memory: Memory, descriptors: Descriptors, log: GuestLog, check_stop: Callable[[], None] = lambda: None
    ) -> None:
        """Answer from these; nothing else of the host is reachable. ``check_stop`` raises when a call is to end."""
        self._memory, self._descriptors, self._log, self._check_stop = memory, descriptors, log, check_stop

    # -- clock and random ---------------------------------------------------------------------------------------------

    def clock_time_get(self, clock: int, _precision: int, out: int) -> int:
        """Write nanoseconds of the real-time, monotonic, process or thread clock."""
        if clock not in _CLOCKS:
            raise WasiError(Errno.INVAL)
        self._memory.write(out, struct.pack("<Q", _CLOCKS[clock]()))
        return 0

    def random_get(self, out: int, size: int) -> int:
        """Fill a buffer of at most 64 KiB from the system's random source, which takes seconds for a large one."""
        self._memory.check(out, size, writable=True)
        if size > _RANDOM_LIMIT:
            raise WasiError(Errno.INVAL)
        self._memory.write(out, os.urandom(size))
        return 0

    # -- descriptors --------------------------------------------------------------------------------------------------

    def fd_close(self, fd: int) -> int:
        """Close a guest descriptor."""
        self._descriptors.close(fd)
        return 0

    def fd_fdstat_get(self, fd: int, out: int) -> int:
        """Write the kind of a descriptor and what may be done with it."""
        kind, rights = _FILETYPE_REGULAR, _RIGHTS_ALL
        if fd < PREOPEN:  # a terminal to libc (no seeking), so that it writes line by line
            kind, rights = _FILETYPE_CHARACTER_DEVICE, _RIGHTS_ALL & ~(_RIGHT_FD_SEEK | _RIGHT_FD_TELL)
        elif fd == PREOPEN:
            kind = _FILETYPE_DIRECTORY
        elif not self._descriptors.get(fd).is_writable:
            rights &= ~_RIGHT_FD_WRITE
        self._memory.write(out, _FDSTAT.pack(kind, 0, rights, rights))
        return 0

    def fd_fdstat_set_flags(self, fd: int, _flags: int) -> int:
        """Accept and ignore: no flag means anything for these files."""
        if fd > PREOPEN:
            self._descriptors.get(fd)
        return 0

    def fd_prestat_get(self, fd: int, out: int) -> int:
        """Describe the one preopened folder."""
        if fd != PREOPEN:
            raise WasiError(Errno.BADF)
        self._memory.write(out, _PRESTAT.pack(0, 1))
        return 0

    def fd_prestat_dir_name(self, fd: int, out: int, size: int) -> int:
        """Name the one preopened folder: ``/``."""
        if fd != PREOPEN:
            raise WasiError(Errno.BADF)
        if size < 1:
            raise WasiError(Errno.INVAL)
        self._memory.write(out, b"/")
        return 0

    # -- reading and writing ------------------------------------------------------------------------------------------

    def fd_read(self, fd: int, iovs: int, n_iovs: int, out: int) -> int:
        """Read from the descriptor's offset on, straight into guest memory. Standard input is at its end."""
        buffers = self._iovecs(iovs, n_iovs, writable=True)
        self._memory.check(out, 4, writable=True)
        total = 0
        if fd != 0:
            open_file = self._descriptors.get(fd)
            with open_file.lock:
                total = self._read(open_file, buffers)
        self._memory.set_u32(out, total)
        return 0

    def _read(self, open_file: OpenFile, buffers: list[tuple[int, int]]) -> int:
        total = 0
        for start, size in self._chunks(buffers):
            with self._memory.writable_buffer(start, size) as buffer:
                n = open_file.file.read_at(buffer, open_file.offset)
            open_file.offset += n
            total += n
            if n < size:
                break
        return total

    def fd_write(self, fd: int, iovs: int, n_iovs: int, out: int) -> int:
        """Write to a file granted for writing; standard output and error go to the log line by line."""
        buffers = self._iovecs(iovs, n_iovs)
        self._memory.check(out, 4, writable=True)
        total = 0
        if fd in (1, 2):
            for start, size in self._chunks(buffers):
                self._log.write_stream(fd, self._memory.read(start, size))
                total += size
        else:
            open_file = self._descriptors.get(fd)
            if not open_file.is_writable:
                raise WasiError(Errno.BADF)
            with open_file.lock:
                for start, size in self._chunks(buffers):
                    with self._memory.readable_buffer(start, size) as buffer:
                        n = open_file.file.write_at(buffer, open_file.offset)
                    open_file.offset += n
                    total += n
        self._memory.set_u32(out, total)
        return 0

    def fd_seek(self, fd: int, offset: int, whence: int, out: int) -> int:
        """Move the descriptor's offset and write the new one."""
        self._memory.check(out, 8, writable=True)
        if fd <= PREOPEN:
            raise WasiError(Errno.SPIPE)
        open_file = self._descriptors.get(fd)
        if whence not in (_SEEK_SET, _SEEK_CUR, _SEEK_END):
            raise WasiError(Errno.INVAL)
        with open_file.lock:
            origin = {_SEEK_SET: 0, _SEEK_CUR: open_file.offset}.get(whence)
            target = offset + (open_file.file.size_bytes() if origin is None else origin)
            if not 0 <= target < 1 << 63:
                raise WasiError(Errno.INVAL)
            open_file.offset = target
        self._memory.write(out, struct.pack("<Q", target))
        return 0

    # -- paths --------------------------------------------------------------------------------------------------------

    def path_open(
        self,
        fd: int,
        _dirflags: int,
        path: int,
        path_size: int,
        oflags: int,
        rights: int,
        _rights_inheriting: int,
        _fdflags: int,
        out: int,
    ) -> int:
        """Open a granted file. Nothing is looked up on the host's disk."""
        guest_path = self._path(fd, path, path_size)
        self._memory.check(out, 4, writable=True)
        is_writable = bool(rights & _RIGHT_FD_WRITE or oflags & (_OFLAG_CREATE | _OFLAG_TRUNCATE))
        opened = self._descriptors.open(guest_path, is_writable)
        try:
            if oflags & _OFLAG_DIRECTORY:
                raise WasiError(Errno.NOTDIR)
            if oflags & _OFLAG_EXCLUSIVE:
                raise WasiError(Errno.EXIST)
            if oflags & _OFLAG_TRUNCATE:
                self._descriptors.get(opened).file.truncate()
            self._memory.set_u32(out, opened)
        except BaseException:
            self._descriptors.close(opened)
            raise
        return 0

    def path_filestat_get(self, fd: int, _flags: int, path: int, path_size: int, out: int) -> int:
        """Write kind and size of a granted file."""
        opened = self._descriptors.open(self._path(fd, path, path_size), is_writable=False)
        try:
            found = self._descriptors.get(opened)
            self._memory.write(out, _regular_stat(found.inode, found.file.size_bytes()))
            return 0
        finally:
            self._descriptors.close(opened)

    def _path(self, fd: int, path: int, size: int) -> str:
        """Return the path as it was granted: libc hands it over relative to the folder."""
        if fd != PREOPEN:
            raise WasiError(Errno.BADF)
        if size > _PATH_LIMIT:
            raise WasiError(Errno.NOENT)
        try:
            return "/" + self._memory.read(path, size).decode()
        except UnicodeDecodeError:
            raise WasiError(Errno.ILSEQ) from None

    def _iovecs(self, iovs: int, n_iovs: int, writable: bool = False) -> list[tuple[int, int]]:
        """Copy a list of buffers out of guest memory and check every one of them."""
        if n_iovs > _IOVS_LIMIT:
            raise WasiError(Errno.INVAL)
        buffers = list(_IOVEC.iter_unpack(self._memory.read(iovs, n_iovs * _IOVEC.size)))
        for start, size in buffers:
            self._memory.check(start, size, writable)
        if sum(size for _, size in buffers) >= 1 << 32:
            raise WasiError(Errno.INVAL)
        return [(start, size) for start, size in buffers]

    def _chunks(self, buffers: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """Go through the buffers in pieces, and no further when the guest is to stop: a disk may be slow."""
        for start, size in buffers:
            for at in range(0, size, _TRANSFER_CHUNK):
                self._check_stop()
                yield start + at, min(_TRANSFER_CHUNK, size - at)


def _regular_stat(inode: int, size_bytes: int) -> bytes:
    return _FILESTAT.pack(0, inode, _FILETYPE_REGULAR, 1, size_bytes, 0, 0, 0)
