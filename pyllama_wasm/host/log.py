"""What the guest says, as records of ``logging.getLogger("pyllama_wasm.guest")``."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from ..errors import printable

logger = logging.getLogger("pyllama_wasm.guest")

MESSAGE_LIMIT_BYTES = 1 << 16
"""Most bytes of one guest message that are looked at."""

_LINE_LIMIT = 4000
_RECORD_CHARS = 100  # what a record weighs beside its text: many empty-ish lines are a flood too
_MAX_HELD = 64
_BURST_CHARS = 1 << 20
_CHARS_PER_S = 1 << 16

_CONT = 5
_INFO, _WARN = 2, 3
_LEVELS = {0: logging.INFO, 1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}

LineHandler = Callable[[int, str], None]


class GuestLog:
    """Turns pieces of text into one record per line: continued pieces joined, text printable, the amount bounded.

    Guest threads log at the same time: each has a line of its own, so that pieces of two are never joined.

    A model file decides much of what is logged, so a burst of 1 MiB and then 64 KiB a second are passed on; what is
    above that is counted and dropped.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start with nothing held back."""
        self._clock = clock
        self._lock = threading.Lock()
        self._held: dict[object, tuple[int, str]] = {}
        self._budget, self._budget_at = float(_BURST_CHARS), clock()
        self._n_dropped = 0
        self.name = ""
        """What the sandbox runs, as the record's attribute ``model``; set once it is known."""
        self.handlers: list[LineHandler] = []
        """Called with every line and its ggml level (warnings are 3, errors 4), on the thread that logs it."""

    def write(self, level: int, text: bytes) -> None:
        """Take one message of ``ggml_log``; level 5 (``CONT``) goes on with the line before, of the same thread."""
        source = threading.get_ident()
        with self._lock:
            held_level, held = self._held.get(source, (_INFO, ""))
            if level == _CONT:
                lines = self._feed(source, held_level, text)
            else:
                lines = [(held_level, held)] if held else []
                self._held.pop(source, None)
                lines += self._feed(source, level if level in _LEVELS else _INFO, text)
        self._emit(lines)

    def write_stream(self, fd: int, text: bytes) -> None:
        """Take bytes that the guest wrote to its standard output (1) or error (2)."""
        with self._lock:
            lines = self._feed(f"fd{fd}", _WARN if fd == 2 else _INFO, text)
        self._emit(lines)

    def close(self) -> None:
        """Pass on what is still held back."""
        with self._lock:
            lines = list(self._held.values())
            self._held.clear()
        self._emit(lines)
        self.handlers.clear()

    def _feed(self, source: object, level: int, text: bytes) -> list[tuple[int, str]]:
        """Add to what one source has begun; return the lines that are ready. With the lock held."""
        _, held = self._held.pop(source, (level, ""))
        *lines, rest = (held + text[:MESSAGE_LIMIT_BYTES].decode(errors="replace")).split("\n")
        if len(rest) > _LINE_LIMIT:
            lines.append(rest)
            rest = ""
        ready = [(level, line) for line in lines]
        self._held[source] = (level, rest)
        if len(self._held) > _MAX_HELD:  # threads come and go: the oldest has nothing to add any more
            ready.append(self._held.pop(next(iter(self._held))))
        return ready

    def _emit(self, lines: list[tuple[int, str]]) -> None:
        """Hand lines on, without the lock: a handler may take its time, or log."""
        for level, line in lines:
            if line:
                self._emit_line(level, line)

    def _emit_line(self, level: int, line: str) -> None:
        extra = {"model": self.name}
        for handler in self.handlers:
            handler(level, printable(line, _LINE_LIMIT))
        if not logger.isEnabledFor(_LEVELS[level]):
            return
        n_dropped = self._spend(min(len(line), _LINE_LIMIT) + _RECORD_CHARS)
        if n_dropped is None:
            return
        if n_dropped:
            logger.warning("%d log lines dropped: the guest logs too much", n_dropped, extra=extra)
        logger.log(_LEVELS[level], "%s", printable(line, _LINE_LIMIT), extra=extra)

    def _spend(self, n_chars: int) -> int | None:
        """Take from the budget; return how many lines were dropped since the last one, or None to drop this one."""
        with self._lock:
            now = self._clock()
            self._budget = min(_BURST_CHARS, self._budget + (now - self._budget_at) * _CHARS_PER_S)
            self._budget_at = now
            if self._budget < n_chars:
                self._n_dropped += 1
                return None
            self._budget -= n_chars
            n_dropped, self._n_dropped = self._n_dropped, 0
            return n_dropped
