"""Log records of a model's process, as records of the program's own loggers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from ..errors import printable
from .values import integer, items, text
from .wire import Value, WireError

__all__ = ["LogRelay", "LogSender", "levels"]

_NAMES = ("pyllama_wasm.guest", "pyllama_wasm.engine", "pyllama_wasm.module", "pyllama_wasm.cache")
"""The loggers whose records are passed on: what is said of the load itself the program knows."""

_LINE_LIMIT = 4000
_RECORD_CHARS = 100
_BURST_CHARS = 1 << 20
_CHARS_PER_S = 1 << 16
_FLOOD_BYTES, _FLOOD_BYTES_PER_S = 64 << 20, 4 << 20
"""What is read to be dropped: a process as it was started sends about as much as is logged."""

logger = logging.getLogger("pyllama_wasm.engine")


def levels() -> dict[str, int]:
    """Return the level from which each logger listens now."""
    return {name: logging.getLogger(name).getEffectiveLevel() for name in _NAMES}


class LogRelay:
    """Logs what a process says, as much as a sandbox in the program itself could say."""

    def __init__(self, model: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Name the model in the records."""
        self._extra = {"model": printable(model)}
        self._clock = clock
        self._budget, self._budget_at = float(_BURST_CHARS), clock()
        self._flood = float(_FLOOD_BYTES)
        self._n_dropped = 0

    def emit(self, value: Value, n_bytes: int) -> None:
        """Log one record of the process, of ``n_bytes``. Raises ``WireError`` for what is none, and for a flood."""
        now = self._clock()
        seconds, self._budget_at = now - self._budget_at, now
        self._flood = min(_FLOOD_BYTES, self._flood + seconds * _FLOOD_BYTES_PER_S) - n_bytes
        if self._flood < 0:
            raise WireError("it logs without end")
        self._budget = min(_BURST_CHARS, self._budget + seconds * _CHARS_PER_S)
        name, level, message = items(value, 3)
        if name not in _NAMES:
            return
        line = printable(text(message), _LINE_LIMIT).replace("\n", "\\n")
        if self._budget < len(line) + _RECORD_CHARS:
            self._n_dropped += 1
            return
        self._budget -= len(line) + _RECORD_CHARS
        if self._n_dropped:
            logger.warning(
                "%d log lines dropped: the model's process logs too much", self._n_dropped, extra=self._extra
            )
            self._n_dropped = 0
        logging.getLogger(name).log(integer(level, 0, logging.CRITICAL), "%s", line, extra=self._extra)


class LogSender(logging.Handler):
    """Sends the records of the package to the program; in the model's process."""

    def __init__(self, send: Callable[[Value], None]) -> None:
        """Send messages by ``send``."""
        super().__init__()
        self._send = send

    def install(self, wanted: dict[str, int]) -> None:
        """Pass on what the program's loggers would take."""
        package = logging.getLogger("pyllama_wasm")
        package.addHandler(self)
        package.propagate = False
        for name in _NAMES:
            logging.getLogger(name).setLevel(max(wanted.get(name, logging.WARNING), 1))

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record of one of the loggers that are passed on."""
        if record.name in _NAMES:
            self._send(
                {
                    "log": [
                        record.name,
                        min(record.levelno, logging.CRITICAL),
                        printable(record.getMessage(), _LINE_LIMIT),
                    ]
                }
            )
