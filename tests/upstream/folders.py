"""WASI over real folders: what upstream's tests need and the product never gives.

Adds arguments, folders and everything one does with them to the product's own WASI calls, whose memory checks, reads,
writes and seeks it keeps. The guest is our own build of upstream's tests, so a path is only kept from leaving its
folder, nothing more.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR

from pyllama_wasm.host.descriptors import OpenFile
from pyllama_wasm.host.ffi import GuestTrap
from pyllama_wasm.host.files import GrantedFile
from pyllama_wasm.host.log import GuestLog
from pyllama_wasm.host.memory import Memory
from pyllama_wasm.host.wasi import Wasi
from pyllama_wasm.host.wasi_errno import Errno, WasiError

FIRST_PREOPEN = 3
CHARACTER_DEVICE, DIRECTORY, REGULAR = 2, 3, 4
CREATE, ONLY_DIRECTORY, EXCLUSIVE, TRUNCATE = 1, 2, 4, 8
APPEND = 1
RIGHT_WRITE = 1 << 6
ALL_RIGHTS = (1 << 29) - 1

_FDSTAT = struct.Struct("<BxHxxxxQQ")
_FILESTAT = struct.Struct("<QQBxxxxxxxQQQQQ")
_PRESTAT = struct.Struct("<BxxxI")
_DIRENT = struct.Struct("<QQIBxxx")
_SUBSCRIPTION = struct.Struct("<QBxxxxxxxI4xQQHxxxxxx")
_EVENT = struct.Struct("<QHBxxxxxQHxxxxxx")
_CLOCK_EVENT = 0


@dataclass(frozen=True)
class Folder:
    """A host folder under the name the guest knows it by."""

    name: str
    path: Path
    is_writable: bool = False

    def resolve(self, relative: str) -> Path:
        """Return the host path of a guest path in this folder; ``WasiError(ACCES)`` when it leaves the folder."""
        path = (self.path / relative.lstrip("/")).resolve()
        if not path.is_relative_to(self.path.resolve()):
            raise WasiError(Errno.ACCES)
        return path


class OpenFolder:
    """A guest descriptor of a folder."""

    def __init__(self, folder: Folder, relative: str) -> None:
        self.folder, self.relative = folder, relative

    def child(self, name: str) -> str:
        """Return a name in this folder relative to the granted one."""
        return f"{self.relative}/{name}" if self.relative else name


class FolderDescriptors:
    """Descriptors of files and folders; a stand-in for the product's table of granted files."""

    def __init__(self, folders: Sequence[Folder]) -> None:
        self.n_preopens = len(folders)
        self._open: dict[int, OpenFile | OpenFolder] = {
            FIRST_PREOPEN + i: OpenFolder(folder, "") for i, folder in enumerate(folders)
        }
        self._next = FIRST_PREOPEN + len(folders)

    def add(self, item: OpenFile | OpenFolder) -> int:
        """Give a number to an open file or folder."""
        fd, self._next = self._next, self._next + 1
        self._open[fd] = item
        return fd

    def get(self, fd: int) -> OpenFile:
        """Return the open file of that number."""
        item = self._open.get(fd)
        if not isinstance(item, OpenFile):
            raise WasiError(Errno.BADF)
        return item

    def folder(self, fd: int) -> OpenFolder:
        """Return the open folder of that number."""
        item = self._open.get(fd)
        if not isinstance(item, OpenFolder):
            raise WasiError(Errno.BADF)
        return item

    def is_folder(self, fd: int) -> bool:
        """Whether the number is that of a folder."""
        return isinstance(self._open.get(fd), OpenFolder)

    def close(self, fd: int) -> None:
        """Close a file or forget a folder."""
        item = self._open.pop(fd, None)
        if item is None:
            raise WasiError(Errno.BADF)
        if isinstance(item, OpenFile):
            item.file.revoke()

    def close_all(self) -> None:
        """Close what the guest left open."""
        for fd in list(self._open):
            self.close(fd)


class FolderWasi(Wasi):
    """The WASI calls of one program; every public method is one import."""

    def __init__(self, memory: Memory, log: GuestLog, folders: Sequence[Folder], argv: Sequence[str]) -> None:
        self.table = FolderDescriptors(folders)
        # Only get() is called by what is inherited, and it answers alike.
        super().__init__(memory, self.table, log)  # type: ignore[arg-type]
        self._argv = [argument.encode() + b"\0" for argument in argv]
        self.exit_code: int | None = None

    # -- process ------------------------------------------------------------------------------------------------------

    def args_sizes_get(self, count: int, size: int) -> int:
        """Write how many arguments there are and how many bytes they take."""
        self._memory.set_u32(count, len(self._argv))
        self._memory.set_u32(size, sum(map(len, self._argv)))
        return 0

    def args_get(self, argv: int, buffer: int) -> int:
        """Write the arguments and their addresses."""
        for i, argument in enumerate(self._argv):
            self._memory.set_u32(argv + 4 * i, buffer)
            self._memory.write(buffer, argument)
            buffer += len(argument)
        return 0

    def proc_exit(self, code: int) -> int:
        """End the program."""
        self.exit_code = code
        raise GuestTrap("exit", True, "")

    def environ_sizes_get(self, count: int, size: int) -> int:
        """Answer that the environment is empty."""
        self._memory.set_u32(count, 0)
        self._memory.set_u32(size, 0)
        return 0

    def environ_get(self, _environ: int, _buffer: int) -> int:
        """Write nothing: the environment is empty."""
        return 0

    def clock_res_get(self, _clock: int, out: int) -> int:
        """Answer one nanosecond."""
        self._memory.write(out, struct.pack("<Q", 1))
        return 0

    def poll_oneoff(self, subscriptions: int, events: int, n: int, out: int) -> int:
        """Sleep: the only subscription served is one clock."""
        user_data, kind, _clock, timeout_ns, _precision, flags = _SUBSCRIPTION.unpack(
            self._memory.read(subscriptions, _SUBSCRIPTION.size)
        )
        if n != 1 or kind != _CLOCK_EVENT or flags:
            raise WasiError(Errno.INVAL)
        time.sleep(timeout_ns / 1e9)
        self._memory.write(events, _EVENT.pack(user_data, 0, _CLOCK_EVENT, 0, 0))
        self._memory.set_u32(out, 1)
        return 0

    # -- descriptors --------------------------------------------------------------------------------------------------

    def fd_close(self, fd: int) -> int:
        """Close a guest descriptor."""
        self.table.close(fd)
        return 0

    def fd_fdstat_get(self, fd: int, out: int) -> int:
        """Write the kind of a descriptor."""
        if fd < FIRST_PREOPEN:
            return super().fd_fdstat_get(fd, out)
        kind = DIRECTORY if self.table.is_folder(fd) else REGULAR
        if kind == REGULAR:
            self.table.get(fd)
        self._memory.write(out, _FDSTAT.pack(kind, 0, ALL_RIGHTS, ALL_RIGHTS))
        return 0

    def fd_fdstat_set_flags(self, _fd: int, _flags: int) -> int:
        """Accept and ignore."""
        return 0

    def fd_filestat_get(self, fd: int, out: int) -> int:
        """Write kind and size."""
        if fd < FIRST_PREOPEN:
            self._memory.write(out, _FILESTAT.pack(0, fd, CHARACTER_DEVICE, 1, 0, 0, 0, 0))
            return 0
        if self.table.is_folder(fd):
            opened = self.table.folder(fd)
            return self._write_stat(opened.folder.resolve(opened.relative).stat(), out)
        self._memory.write(out, _FILESTAT.pack(0, fd, REGULAR, 1, self.table.get(fd).file.size_bytes(), 0, 0, 0))
        return 0

    def fd_tell(self, fd: int, out: int) -> int:
        """Write the descriptor's offset."""
        return self.fd_seek(fd, 0, os.SEEK_CUR, out)

    def fd_filestat_set_size(self, fd: int, size: int) -> int:
        """Change the size of a file."""
        file = self.table.get(fd).file
        host_fd = file.acquire()
        try:
            os.ftruncate(host_fd, size)
        finally:
            file.release()
        return 0

    def fd_prestat_get(self, fd: int, out: int) -> int:
        """Describe a granted folder."""
        self._memory.write(out, _PRESTAT.pack(0, len(self._preopen(fd).name.encode())))
        return 0

    def fd_prestat_dir_name(self, fd: int, out: int, size: int) -> int:
        """Name a granted folder."""
        self._memory.write(out, self._preopen(fd).name.encode()[:size])
        return 0

    def fd_sync(self, fd: int) -> int:
        """Do nothing: nobody else looks at these files."""
        self.table.get(fd)
        return 0

    fd_datasync = fd_sync

    def fd_advise(self, fd: int, _offset: int, _size: int, _advice: int) -> int:
        """Do nothing."""
        self.table.get(fd)
        return 0

    def fd_pread(self, fd: int, iovs: int, n_iovs: int, offset: int, out: int) -> int:
        """Read at an offset, without moving the descriptor's own."""
        total = 0
        for start, size in self._iovecs(iovs, n_iovs, writable=True):
            with self._memory.writable_buffer(start, size) as buffer:
                total += self.table.get(fd).file.read_at(buffer, offset + total)
        self._memory.set_u32(out, total)
        return 0

    def fd_pwrite(self, fd: int, iovs: int, n_iovs: int, offset: int, out: int) -> int:
        """Write at an offset, without moving the descriptor's own."""
        total = 0
        for start, size in self._iovecs(iovs, n_iovs):
            with self._memory.readable_buffer(start, size) as buffer:
                total += self.table.get(fd).file.write_at(buffer, offset + total)
        self._memory.set_u32(out, total)
        return 0

    def fd_readdir(self, fd: int, buffer: int, size: int, cookie: int, out: int) -> int:
        """List a folder from the entry number ``cookie`` on; a list that fills the buffer goes on in the next call."""
        opened = self.table.folder(fd)
        path = opened.folder.resolve(opened.relative)
        names = [".", "..", *sorted(os.listdir(path))]
        data = b""
        for i, name in enumerate(names[cookie:], start=cookie + 1):
            kind = DIRECTORY if (path / name).is_dir() else REGULAR
            data += _DIRENT.pack(i, i, len(name.encode()), kind) + name.encode()
            if len(data) >= size:
                break
        self._memory.write(buffer, data[:size])
        self._memory.set_u32(out, min(len(data), size))
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
        _inherit: int,
        fdflags: int,
        out: int,
    ) -> int:
        """Open or create a file, or open a folder."""
        opened, relative, host = self._at(fd, path, path_size)
        if host.is_dir():
            if rights & RIGHT_WRITE and not oflags & ONLY_DIRECTORY:
                raise WasiError(Errno.INVAL)
            self._memory.set_u32(out, self.table.add(OpenFolder(opened.folder, relative)))
            return 0
        if oflags & ONLY_DIRECTORY:
            raise WasiError(Errno.NOTDIR if host.exists() else Errno.NOENT)
        wants_write = bool(rights & RIGHT_WRITE or oflags & (CREATE | TRUNCATE))
        if wants_write and not opened.folder.is_writable:
            # libc asks for every right when it opens "r+": only what changes the folder is refused.
            if oflags & (CREATE | TRUNCATE):
                raise WasiError(Errno.ACCES)
            wants_write = False
        flags = os.O_RDWR if wants_write else os.O_RDONLY
        for bit, flag in ((CREATE, os.O_CREAT), (EXCLUSIVE, os.O_EXCL), (TRUNCATE, os.O_TRUNC)):
            flags |= flag if oflags & bit else 0
        item = OpenFile(GrantedFile(self._open_host(host, flags), relative, wants_write), 0, wants_write)
        if fdflags & APPEND:
            item.offset = item.file.size_bytes()
        self._memory.set_u32(out, self.table.add(item))
        return 0

    def path_filestat_get(self, fd: int, _flags: int, path: int, path_size: int, out: int) -> int:
        """Write kind and size of a file or folder."""
        host = self._at(fd, path, path_size)[2]
        try:
            return self._write_stat(host.stat(), out)
        except (FileNotFoundError, NotADirectoryError):
            raise WasiError(Errno.NOENT) from None

    def path_unlink_file(self, fd: int, path: int, path_size: int) -> int:
        """Remove a file."""
        self._writable_at(fd, path, path_size).unlink()
        return 0

    def path_create_directory(self, fd: int, path: int, path_size: int) -> int:
        """Make a folder."""
        self._writable_at(fd, path, path_size).mkdir()
        return 0

    def path_remove_directory(self, fd: int, path: int, path_size: int) -> int:
        """Remove an empty folder."""
        self._writable_at(fd, path, path_size).rmdir()
        return 0

    def path_rename(self, fd: int, path: int, path_size: int, new_fd: int, new_path: int, new_size: int) -> int:
        """Rename a file or folder."""
        self._writable_at(fd, path, path_size).rename(self._writable_at(new_fd, new_path, new_size))
        return 0

    def path_readlink(self, _fd: int, _path: int, _path_size: int, _buffer: int, _size: int, _out: int) -> int:
        """Answer that it is no link: links are followed on the host."""
        raise WasiError(Errno.INVAL)

    # -- helpers ------------------------------------------------------------------------------------------------------

    def _preopen(self, fd: int) -> Folder:
        if not FIRST_PREOPEN <= fd < FIRST_PREOPEN + self.table.n_preopens:
            raise WasiError(Errno.BADF)
        return self.table.folder(fd).folder

    def _at(self, fd: int, path: int, path_size: int) -> tuple[OpenFolder, str, Path]:
        opened = self.table.folder(fd)
        relative = opened.child(self._memory.read(path, path_size).decode())
        return opened, relative, opened.folder.resolve(relative)

    def _writable_at(self, fd: int, path: int, path_size: int) -> Path:
        opened, _, host = self._at(fd, path, path_size)
        if not opened.folder.is_writable:
            raise WasiError(Errno.ACCES)
        if not host.parent.is_dir():
            raise WasiError(Errno.NOENT)
        return host

    def _open_host(self, host: Path, flags: int) -> int:
        try:
            return os.open(host, flags | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            raise WasiError(Errno.NOENT) from None
        except FileExistsError:
            raise WasiError(Errno.EXIST) from None

    def _write_stat(self, stat: os.stat_result, out: int) -> int:
        kind = DIRECTORY if S_ISDIR(stat.st_mode) else REGULAR
        self._memory.write(out, _FILESTAT.pack(0, stat.st_ino, kind, 1, stat.st_size, 0, 0, 0))
        return 0
