"""Files that one process at a time fetches: who waits for another one sees whether that gets on."""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Callable
from typing import IO

if sys.platform != "win32":
    import fcntl

__all__ = ["lock"]

_LOOK_S = 0.1
_PATIENCE_S = 600.0
"""How long what another process fetches may stay as it is; comparing the digest of a large file takes minutes."""

_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP})
"""What file systems answer that have no locks."""


def lock(file: IO[bytes], n_bytes: Callable[[], int]) -> bool:
    """Lock a file until it is closed; while another process has it, ask how many bytes that has fetched.

    Returns ``False`` where there are no locks. Raises ``OSError``, also when the other one does not get on.
    """
    if sys.platform == "win32":
        return False
    size, since = -1, time.monotonic()
    try:
        while not _is_locked(file):
            if (now := n_bytes()) != size:
                size, since = now, time.monotonic()
            elif time.monotonic() - since > _PATIENCE_S:
                raise OSError(errno.EBUSY, "another process that fetches it does not get on")
            time.sleep(_LOOK_S)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def _is_locked(file: IO[bytes]) -> bool:
    if sys.platform != "win32":
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
