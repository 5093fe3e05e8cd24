"""How the process of a model has ended, and that none outlives the program or lives on in a forked child of it."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING

from ..errors import printable
from .launch import Process

if TYPE_CHECKING:
    from .connection import Connection

__all__ = ["how", "last_words", "live"]

_LAST_BYTES, _LAST_CHARS = 1 << 16, 300

live: weakref.WeakSet[Connection] = weakref.WeakSet()
"""The connections whose process runs."""


def last_words(process: Process) -> str:
    """Return the last line that the process has left on its standard error."""
    if process.stderr is None or sys.platform == "win32":
        return ""
    os.set_blocking(process.stderr.fileno(), False)
    with suppress(OSError):
        lines = os.read(process.stderr.fileno(), _LAST_BYTES).decode(errors="replace").split("\n")
        return printable(next((line.strip() for line in reversed(lines) if line.strip()), ""), _LAST_CHARS)
    return ""


def how(code: int, words: str) -> str:
    """Return how the process ended, by its exit status."""
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        ended = f"it was ended by {name}"
    else:
        ended = f"it ended with status {code}"
    return f"{ended}: {words}" if words else ended


def close_all() -> None:
    """End every process before the interpreter goes."""
    for connection in list(live):
        with suppress(Exception):
            connection.close()


def _after_fork() -> None:
    for connection in list(live):
        connection.after_fork()
    live.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

atexit.register(close_all)
