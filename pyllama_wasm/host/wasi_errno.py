"""WASI preview-1 error numbers, and how host failures become one of them."""

from __future__ import annotations

import errno
from enum import IntEnum

from .memory import MemoryFault


class Errno(IntEnum):
    """The numbers guest libc knows; only those this host answers with."""

    SUCCESS = 0
    ACCES = 2
    AGAIN = 6
    BADF = 8
    EXIST = 20
    FAULT = 21
    FBIG = 22
    ILSEQ = 25
    INVAL = 28
    IO = 29
    MFILE = 33
    NOENT = 44
    NOMEM = 48
    NOSPC = 51
    NOTDIR = 54
    SPIPE = 70


_FROM_HOST = {
    errno.EACCES: Errno.ACCES,
    errno.EAGAIN: Errno.AGAIN,
    errno.EBADF: Errno.BADF,
    errno.EFAULT: Errno.FAULT,
    errno.EFBIG: Errno.FBIG,
    errno.EINVAL: Errno.INVAL,
    errno.ENOMEM: Errno.NOMEM,
    errno.ENOSPC: Errno.NOSPC,
    getattr(errno, "EDQUOT", errno.ENOSPC): Errno.NOSPC,  # not on Windows
}


class WasiError(Exception):
    """A refusal the guest is told about by its number: an ordinary answer, not a failure of the host."""

    def __init__(self, code: Errno) -> None:
        """Keep the number."""
        super().__init__(code.name)
        self.code = code


def expected_errno(error: BaseException) -> Errno | None:
    """Return the number for an error that the guest can cause or a disk can have; None for anything else."""
    if isinstance(error, WasiError):
        return error.code
    if isinstance(error, MemoryFault):
        return Errno.FAULT
    if isinstance(error, OSError):
        return _FROM_HOST.get(error.errno or 0, Errno.IO)
    return None
