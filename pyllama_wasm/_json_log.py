"""A log file of JSON lines that rotates, for several processes at once."""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import os
import sys
from pathlib import Path
from typing import Any

from .errors import HostError, reason_of
from .logs import JsonFormatter

if sys.platform != "win32":
    import fcntl

__all__ = ["JsonFileHandler"]

_logger = logging.getLogger("pyllama_wasm")


class JsonFileHandler(logging.handlers.RotatingFileHandler):
    """Appends JSON lines to a file of the user's own; several processes may share it, and somebody may move it away."""

    stream: Any  # unbuffered and binary: one write per line, so that the lines of two processes do not mix

    def __init__(self, path: Path, max_bytes: int, backup_count: int) -> None:
        """Open the file. Raises ``HostError``."""
        self._is_failing = self._is_closed = False
        try:
            if path.exists() and not path.is_file():
                raise OSError(None, "it is not a regular file")
            super().__init__(path, maxBytes=max_bytes, backupCount=backup_count)
        except OSError as error:
            raise HostError(f"open the log file {path}", reason_of(error)) from error
        self.setFormatter(JsonFormatter())

    def _open(self) -> Any:
        """Open for appending; a new file is the user's alone."""
        return open(self.baseFilename, "ab", buffering=0, opener=_open_private)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record. When that fails the other handlers are told, once until it works again."""
        if self._is_closed:  # removed while this thread was on its way here
            return
        try:
            line = self.format(record).encode() + b"\n"
            while (size := self._follow()) > 0 and size + len(line) > self.maxBytes:
                self._rotate()
            if self.stream.write(line) != len(line):
                raise OSError("the disk is full")
            self._is_failing = False
        except OSError as error:
            if not self._is_failing:
                self._is_failing = True
                _logger.error("log lines are lost: cannot write %s: %s", self.baseFilename, error)
        except Exception:  # noqa: BLE001  logging must not break what it tells about
            self.handleError(record)

    def close(self) -> None:
        """Close the file; no further record opens it again."""
        self._is_closed = True
        super().close()

    def _rotate(self) -> None:
        """Rotate, unless another process has done so just now."""
        lock = os.dup(self.stream.fileno())  # held beyond doRollover's close
        try:
            if sys.platform != "win32":  # which does not let a file be renamed that another process has open
                fcntl.flock(lock, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(self.baseFilename), os.fstat(lock)):  # noqa: PTH116  compared with fstat
                    self.doRollover()
        finally:
            os.close(lock)

    def _follow(self) -> int:
        """Open the file anew when that path leads elsewhere: rotated by another process, or moved; return its size."""
        try:
            there = os.stat(self.baseFilename)  # noqa: PTH116  compared with fstat
            if self.stream and os.path.samestat(there, os.fstat(self.stream.fileno())):
                return there.st_size
        except FileNotFoundError:
            pass
        if self.stream:
            self.stream.close()
        self.stream = self._open()
        return os.fstat(self.stream.fileno()).st_size


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
