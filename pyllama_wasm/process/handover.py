"""Open files from a program to a model's process, after its start too: descriptors, which it may only read.

On POSIX they go through a socket of their own beside the pipes (``SCM_RIGHTS``), in the order of the requests that they
belong to; nothing else does, and nothing comes back. On Windows a handle is duplicated into the process. Which files is
the program's to say alone: the process has no way to ask for one.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from .wire import WireError

__all__ = ["FileReceiver", "FileSender"]

_AT_A_TIME = 64  # the kernel takes 253


class FileSender:
    """The program's end."""

    def __init__(self) -> None:
        """Make what the process is to inherit. Raises ``OSError``."""
        self._ours: Any = None
        self._theirs: Any = None
        self._process: Any = None
        if sys.platform != "win32":
            self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            self._ours.shutdown(socket.SHUT_RD)

    @property
    def inherited(self) -> int:
        """The number of the descriptor that the process inherits; -1 where it needs none."""
        return -1 if self._theirs is None else self._theirs.fileno()

    def started(self, process: Any) -> None:
        """Note that the process has its end, or, with None, that it was not started."""
        self._process = process
        if self._theirs is not None:
            self._theirs.close()
        if process is None:
            self.close()

    def announce(self, files: Sequence[int]) -> list[int]:
        """Return what a request says of its files: their numbers in the process, where these are known before."""
        if sys.platform != "win32":
            return [0] * len(files)
        import _winapi
        import msvcrt

        own, its = _winapi.GetCurrentProcess(), int(self._process._handle)
        same = _winapi.DUPLICATE_SAME_ACCESS
        return [_winapi.DuplicateHandle(own, msvcrt.get_osfhandle(fd), its, 0, False, same) for fd in files]

    def send(self, files: Sequence[int]) -> None:
        """Send the files of the request that comes next. Raises ``OSError``."""
        if sys.platform != "win32":
            for at in range(0, len(files), _AT_A_TIME):
                socket.send_fds(self._ours, [b"f"], list(files[at : at + _AT_A_TIME]))

    def close(self) -> None:
        """Send no more; in a forked child of the program too."""
        if self._ours is not None:
            self._ours.close()


class FileReceiver:
    """The end of the process."""

    def __init__(self, inherited: int) -> None:
        """Take the descriptor over; before the process confines itself."""
        self._socket: Any = None
        if sys.platform != "win32":
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, inherited)

    def take(self, announced: Sequence[int]) -> list[int]:
        """Return descriptors of the files of a request. Raises ``WireError`` when the process can have no more."""
        if sys.platform == "win32":
            import msvcrt

            return [msvcrt.open_osfhandle(number, os.O_RDONLY) for number in announced]
        found: list[int] = []
        n_missing = 0
        for at in range(0, len(announced), _AT_A_TIME):
            n = min(_AT_A_TIME, len(announced) - at)
            _, files, _, _ = socket.recv_fds(self._socket, 1, n)  # the kernel leaves out what there is no room for
            found += files
            n_missing += n - len(files)
        if n_missing:
            for fd in found:
                with suppress(OSError):
                    os.close(fd)
            raise WireError(f"{n_missing} of its {len(announced)} files could not be taken: too many are open")
        return found
