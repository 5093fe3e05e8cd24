"""The last complaints of one guest: the reason behind a call that only answers "failed"."""

from __future__ import annotations

import logging
import re
import threading
from collections import deque
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

if TYPE_CHECKING:
    from .host import Engine

__all__ = ["GuestLog", "LogExcerpt"]

_N_LINES = 200

# "llama_model_load: error loading model: missing tensor 'x'" -> "missing tensor 'x'"
_PREFIX = re.compile(r"^(?:\w*_\w*: |error loading (?:model|vocab\w*)(?: \w+)?: )+")
# Lines that only say that the line before them was fatal.
_HOLLOW = re.compile(
    r"failed to load model|failed to read (?:header|key-value pairs|tensor (?:info|data))|failed to initialize batch"
    r"|failed to create the context|failed to load GGUF|failed to initialize the context: $"
)
_OUT_OF_MEMORY = re.compile(
    r"out of memory|(?:insufficient|not enough) memory|bad_alloc|(?:unable to|cannot) allocate"
    r"|failed to (?:allocate|reserve)",
    re.I,
)


@dataclass(frozen=True)
class LogExcerpt:
    """The warnings and errors of one call, oldest first."""

    lines: tuple[str, ...]

    def reason(self, default: str) -> str:
        """Return the most telling line without its prefix, or ``default``."""
        for line in self.lines:
            if _OUT_OF_MEMORY.search(line):
                return _PREFIX.sub("", line)
        for line in reversed(self.lines):
            if not _HOLLOW.search(line):
                return _PREFIX.sub("", line)
        return default

    @property
    def is_out_of_memory(self) -> bool:
        """Whether an allocation failed."""
        return any(_OUT_OF_MEMORY.search(line) for line in self.lines)


class GuestLog:
    """Keeps the last warnings and errors of one engine; written on the engine thread.

    All guests log to one logger. Whose line it is tells the thread: a guest's calls run on its engine's thread.
    """

    def __init__(self, engine: Engine) -> None:
        """Listen to what is logged on the engine's thread."""
        self._lines: deque[tuple[int, str]] = deque(maxlen=_N_LINES)
        self._count = 0
        _listeners[engine.run(threading.get_ident, "listen to the log")] = self

    def mark(self) -> int:
        """Return the place in the log where a call begins."""
        return self._count

    def since(self, mark: int) -> LogExcerpt:
        """Return errors, or warnings when there is no error, that came after ``mark``."""
        n_new = min(self._count - mark, len(self._lines))
        new = list(islice(self._lines, len(self._lines) - n_new, None))
        errors = tuple(text for level, text in new if level >= logging.ERROR)
        return LogExcerpt(errors or tuple(text for _, text in new))

    def add(self, level: int, text: str) -> None:
        """Take one line."""
        if text.strip():
            self._lines.append((level, text.strip()))
            self._count += 1


class _Router(logging.Handler):
    """Gives each record to the listener of its thread."""

    def emit(self, record: logging.LogRecord) -> None:
        listener = _listeners.get(record.thread or 0)
        if listener is not None:
            listener.add(record.levelno, record.getMessage())


_listeners: WeakValueDictionary[int, GuestLog] = WeakValueDictionary()
logging.getLogger("pyllama_wasm.guest").addHandler(_Router(logging.WARNING))
