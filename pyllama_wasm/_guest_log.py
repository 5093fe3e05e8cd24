"""The last complaints of one guest: the reason behind a call that only answers "failed"."""

from __future__ import annotations

import re
import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ._abi import GGML_LOG_LEVEL_ERROR, GGML_LOG_LEVEL_WARN

if TYPE_CHECKING:
    from .host import Engine

__all__ = ["LogExcerpt", "RecentLog"]

_N_LINES = 200

# "llama_model_load: error loading model: missing tensor 'x'" -> "missing tensor 'x'"
_PREFIX = re.compile(r"^(?:\w*_\w*: |error loading (?:model|vocab\w*)(?: \w+)?: )+")
# Lines that only say that the line before them was fatal.
_HOLLOW = re.compile(
    r"failed to load model|failed to read (?:header|key-value pairs|tensor (?:info|data))|failed to initialize batch"
    r"|failed to create the context|failed to load GGUF|failed to initialize the context: $"
    r"|failed to (?:de|en)code, ret = "
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


class RecentLog:
    """Keeps the last warnings and errors of one engine."""

    def __init__(self, engine: Engine) -> None:
        """Listen to the engine."""
        self._lines: deque[tuple[int, str]] = deque(maxlen=_N_LINES)
        self._count = 0
        self._lock = threading.Lock()  # guest threads log too
        engine.add_log_handler(self.add)

    def mark(self) -> int:
        """Return the place in the log where a call begins."""
        return self._count

    def since(self, mark: int, with_warnings: bool = False) -> LogExcerpt:
        """Return errors, or warnings when there is no error or they are wanted too, that came after ``mark``."""
        with self._lock:
            lines, n_new = tuple(self._lines), self._count - mark
        new = lines[max(0, len(lines) - n_new) :] if n_new > 0 else ()
        errors = () if with_warnings else tuple(text for level, text in new if level >= GGML_LOG_LEVEL_ERROR)
        return LogExcerpt(errors or tuple(text for _, text in new))

    def add(self, level: int, text: str) -> None:
        """Take one line of the guest's log; what is no warning is not kept."""
        if level >= GGML_LOG_LEVEL_WARN and text.strip():
            with self._lock:
                self._lines.append((level, text.strip()))
                self._count += 1
