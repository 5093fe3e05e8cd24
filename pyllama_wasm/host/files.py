"""The files a sandbox may use: each granted by name, opened by the host at that moment."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import PurePath

from ..errors import LimitError, ModelFileError, RequestError, printable, reason_of

StrPath = str | os.PathLike[str]

_NAME_LIMIT = 200


class GrantedFile:
    """One file opened by the host, shared by every guest descriptor of it. Reads and writes carry their own offset."""

    def __init__(self, fd: int, guest_path: str, is_writable: bool) -> None:
        """Own ``fd``."""
        self.guest_path, self.is_writable = guest_path, is_writable
        self.info = os.fstat(fd)
        """What the system said of it when it was granted."""
        self._fd: int | None = fd
        self._users = 0
        self._is_revoked = False
        self._lock = threading.Lock()
        self.read_error: OSError | None = None
        """What the system last answered to a read that failed: the guest only knows that it did."""

    def acquire(self) -> int:
        """Return the host descriptor and keep it open until :meth:`release`. Raises ``OSError`` after revocation."""
        with self._lock:
            if self._fd is None or self._is_revoked:
                raise OSError(9, "the grant of this file was taken back")
            self._users += 1
            return self._fd

    def release(self) -> None:
        """End what :meth:`acquire` began."""
        with self._lock:
            self._users -= 1
            self._close_if_idle()

    def revoke(self) -> None:
        """Close the file, now or when the read that is under way ends."""
        with self._lock:
            self._is_revoked = True
            self._close_if_idle()

    def status(self) -> os.stat_result:
        """Return what the system says of the file now."""
        fd = self.acquire()
        try:
            return os.fstat(fd)
        finally:
            self.release()

    def size_bytes(self) -> int:
        """Return the size of the file now."""
        return self.status().st_size

    def read_at(self, buffer: memoryview, offset: int) -> int:
        """Fill ``buffer`` from ``offset``; fewer bytes only at the end of the file."""
        fd = self.acquire()
        try:
            done = 0
            while done < len(buffer):
                n = _read_once(fd, buffer[done:], offset + done)
                if n == 0:
                    break
                done += n
            return done
        except OSError as error:
            self.read_error = error
            raise
        finally:
            self.release()

    def write_at(self, data: memoryview, offset: int) -> int:
        """Write all of ``data`` at ``offset``."""
        if not self.is_writable:
            raise OSError(9, "the file was granted for reading only")
        fd = self.acquire()
        try:
            done = 0
            while done < len(data):
                done += _write_once(fd, data[done:], offset + done)
            return done
        finally:
            self.release()

    def truncate(self) -> None:
        """Cut the file to nothing, as opening for writing does."""
        fd = self.acquire()
        try:
            _empty(fd)
        finally:
            self.release()

    def _close_if_idle(self) -> None:
        if self._is_revoked and self._users == 0 and self._fd is not None:
            fd, self._fd = self._fd, None
            os.close(fd)


class FileTable:
    """What the guest finds in its one folder, ``/``: exactly the granted files. May be used from any thread."""

    def __init__(self) -> None:
        """Start with no file."""
        self._lock = threading.Lock()
        self._files: dict[str, GrantedFile] = {}
        self.limit: int | None = None
        """Most files granted at a time; ``LimitError`` beyond it."""

        self._n_granted = 0
        self._is_closed = False

    def grant(self, path: StrPath, mode: str = "r", beside: str | None = None) -> str:
        """Open a file for the guest and return the path under which the guest, and only it, finds it.

        ``mode`` is ``"r"``, or ``"w"`` for a file to be created or overwritten. ``beside`` is a guest path granted
        earlier: the new file goes into the same guest folder (the parts of a split model look for each other there).
        Raises ``ModelFileError`` when the path is no regular file or cannot be opened, ``RequestError`` when it is
        granted the other way: what the guest has mapped must not change under it.
        """
        if mode not in ("r", "w"):
            raise RequestError(f"grant {path}", f"mode {mode!r} is neither 'r' nor 'w'")
        fd = _open_regular(path, mode)
        guest_path = self._add(fd, path, mode == "w", beside)
        if mode == "w":
            try:
                _empty(fd)  # not before: the guest may have the file mapped
            except OSError as error:
                self.revoke(guest_path)
                raise ModelFileError(f"grant {path}", reason_of(error)) from error
        return guest_path

    def grant_fd(self, fd: int, name: str, mode: str = "r", beside: str | None = None) -> str:
        """Grant a regular file that is already open, under ``name``; otherwise as :meth:`grant`.

        ``fd`` stays the caller's: a duplicate is kept. Nothing is truncated. Raises ``ModelFileError`` when the
        descriptor is closed or no regular file's.
        """
        operation = f"grant {name}"
        if mode not in ("r", "w"):
            raise RequestError(operation, f"mode {mode!r} is neither 'r' nor 'w'")
        try:
            own = os.dup(fd)
        except OSError as error:
            raise ModelFileError(operation, reason_of(error)) from error
        try:
            _require_regular(operation, os.fstat(own))
        except BaseException:
            os.close(own)
            raise
        return self._add(own, name, mode == "w", beside)

    def _add(self, fd: int, name: StrPath, is_writable: bool, beside: str | None) -> str:
        """Own ``fd`` from here on; return the guest path."""
        with self._lock:
            if self._is_closed:
                os.close(fd)
                raise ModelFileError(f"grant {name}", "the engine is closed")
            if self.limit is not None and len(self._files) >= self.limit:
                os.close(fd)
                raise LimitError(f"grant {name}", f"the sandbox may have {self.limit} files", "raise open_files")
            folder = beside.rpartition("/")[0] if beside else f"/model/{self._n_granted}"
            guest_path = f"{folder}/{_guest_name(name)}"
            if guest_path in self._files:
                os.close(fd)
                raise RequestError(f"grant {name}", "a file of that name is already granted beside it")
            granted = GrantedFile(fd, guest_path, is_writable)
            others = (file for file in self._files.values() if file.is_writable != is_writable)
            if any(os.path.samestat(granted.info, file.info) for file in others):
                granted.revoke()
                raise RequestError(f"grant {name}", "a file cannot be granted for reading and for writing at a time")
            self._n_granted += 1
            self._files[guest_path] = granted
            return guest_path

    def revoke(self, guest_path: str) -> None:
        """Take a grant back and close the file. What is mapped of it stays mapped. Unknown paths are ignored."""
        with self._lock:
            file = self._files.pop(guest_path, None)
        if file is not None:
            file.revoke()

    def granted(self) -> list[tuple[str, str, int]]:
        """Return guest path, mode and size in bytes of every file that is granted now."""
        with self._lock:  # which ``revoke`` of a grant waits for: all are open
            files = list(self._files.values())
            return [(file.guest_path, "w" if file.is_writable else "r", file.size_bytes()) for file in files]

    def find(self, guest_path: str) -> GrantedFile | None:
        """Return the granted file of exactly that path, or None."""
        with self._lock:
            return self._files.get(guest_path)

    def close(self) -> None:
        """Take back every grant."""
        with self._lock:
            self._is_closed = True
            files, self._files = list(self._files.values()), {}
        for file in files:
            file.revoke()


def _open_regular(path: StrPath, mode: str) -> int:
    operation = f"open {path}"
    flags = os.O_RDONLY if mode == "r" else os.O_RDWR | os.O_CREAT
    # O_NONBLOCK so that a FIFO put there after the check below cannot block us; it means nothing for regular files.
    for name in ("O_CLOEXEC", "O_NONBLOCK", "O_NOCTTY", "O_BINARY", "O_NOINHERIT"):
        flags |= getattr(os, name, 0)
    try:
        try:
            # Looked at before it is opened: opening a device or a FIFO can itself have an effect.
            _require_regular(operation, os.stat(path))
        except FileNotFoundError:
            if mode == "r":
                raise
        fd = os.open(path, flags, 0o666)
        try:
            _require_regular(operation, os.fstat(fd))
        except BaseException:
            os.close(fd)
            raise
    except ModelFileError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = reason_of(error)
        raise ModelFileError(operation, reason) from error
    return fd


def _empty(fd: int) -> None:
    """Cut a file to nothing. One that is empty is left alone: ext4 writes one that was cut to the disk when closed."""
    if os.fstat(fd).st_size:
        os.ftruncate(fd, 0)


_KERNEL_FOLDERS = ("/proc", "/sys")
"""Linux shows the memory of this process, its environment and its devices as regular files there."""


def _require_regular(operation: str, info: os.stat_result) -> None:
    if stat.S_ISDIR(info.st_mode):
        raise ModelFileError(operation, "it is a folder", "give the path of the .gguf file itself")
    if not stat.S_ISREG(info.st_mode):
        raise ModelFileError(operation, "not a regular file")
    if info.st_dev in [os.stat(folder).st_dev for folder in _KERNEL_FOLDERS if os.path.ismount(folder)]:
        raise ModelFileError(operation, "not a file on a disk, but the kernel's")


def _guest_name(path: StrPath) -> str:
    """Return the file's own name as the guest sees it: printable, one path component, not ``.`` or ``..``."""
    name = printable(PurePath(path).name, limit=10**6)
    clean = "".join(c if c not in "/\\\n" and not 0xD800 <= ord(c) < 0xE000 else "_" for c in name)[-_NAME_LIMIT:]
    return clean if clean.strip(".") else "file"


_seek_lock = threading.Lock()
"""Windows has no ``pread``: seeking and reading are two steps there."""


def _read_once(fd: int, buffer: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        n_read: int = os.preadv(fd, [buffer], offset)
        return n_read
    with _seek_lock, open(fd, "rb", buffering=0, closefd=False) as file:
        file.seek(offset)
        return file.readinto(buffer) or 0


def _write_once(fd: int, data: memoryview, offset: int) -> int:
    if hasattr(os, "pwrite"):
        n_written: int = os.pwrite(fd, data, offset)
        return n_written
    with _seek_lock:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, data)
