"""Log records for people and for programs: lines on standard error, and a rotating file of JSON lines.

The package logs through ``logging.getLogger("pyllama_wasm")`` and its children and is silent until somebody listens:

=====================  ====================================================================
``pyllama_wasm.guest``  what llama.cpp says inside the sandbox, with its own levels
``pyllama_wasm.model``  models loaded and closed
``pyllama_wasm.engine`` sandboxes that died, and why
``pyllama_wasm.module`` compiling the module
``pyllama_wasm.cache``  the folder of compiled code
=====================  ====================================================================
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import platformdirs

from .errors import HostError, RequestError, printable, reason_of

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["LogSetup", "configure_logging"]

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

_MESSAGE_LIMIT = 8000
_MODEL_WIDTH = 24
_EXCEPTION_LIMIT = 20_000

_logger = logging.getLogger("pyllama_wasm")
_logger.addHandler(logging.NullHandler())  # else Python prints the warnings of a library that nobody configured

_lock = threading.Lock()
_current: LogSetup | None = None


class LogSetup:
    """What ``configure_logging`` has set up; ``undo`` or the end of ``with`` takes it back."""

    file: Path | None
    """Where the JSON lines go, or None."""

    def __init__(self, level: int, handlers: list[logging.Handler], file: Path | None) -> None:
        """Install ``handlers`` on the package's logger; with the lock held."""
        self.file = file
        self._handlers = handlers
        self._level_before = _logger.level
        for handler in handlers:
            _logger.addHandler(handler)
        _logger.setLevel(level)

    def undo(self) -> None:
        """Leave the package's logging as it was before. Again is fine, and so is after another set-up took over."""
        global _current
        with _lock:
            if _current is self:
                _current = None
                self._remove()

    def _remove(self) -> None:
        for handler in self._handlers:
            _logger.removeHandler(handler)
            handler.close()
        _logger.setLevel(self._level_before)

    def __enter__(self) -> LogSetup:
        """Return the set-up itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Undo it."""
        self.undo()


def configure_logging(
    level: str | int = "INFO",
    *,
    stderr: bool = True,
    file: bool | str | os.PathLike[str] | None = None,
    max_bytes: int = 5_000_000,
    backup_count: int = 3,
) -> LogSetup:
    """Show the package's log on standard error, write it to a file, or both; calling it again replaces that.

    ``level`` is the least level that is kept: ``"DEBUG"``, ``"INFO"``, ``"WARNING"``, ``"ERROR"``, ``"CRITICAL"`` or
    a number of the ``logging`` module. On a terminal the lines have colours. ``file`` is a path, or True for
    ``pyllama_wasm.jsonl`` in the user's state folder (``XDG_STATE_HOME``, by default ``~/.local/state/pyllama_wasm``).
    It gets one JSON object per line with ``time`` (UTC, ISO 8601), ``level``, ``logger``, ``message``, ``process`` and
    ``thread``, and where there is one ``model`` (a file name) and ``exception``. Only the user can read it. At about
    ``max_bytes`` it is renamed to ``NAME.1``, the older ones move up, and ``backup_count`` of them are kept.

    In whatever is written, control characters are escaped and lines are bounded: a model file decides much of what is
    logged. Handlers of the root logger still get every record; pass ``stderr=False`` where they already print.

    Raises ``RequestError`` for arguments that make no sense, ``HostError`` when the file cannot be opened; then the
    set-up is as before. A file that cannot be written later costs lines, never an exception.
    """
    number = _check_level(level)
    for name, value in (("max_bytes", max_bytes), ("backup_count", backup_count)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise RequestError("configure logging", f"{name} is {value!r} and not a positive integer")
    path = _log_file(file)
    handlers: list[logging.Handler] = [StderrHandler()] if stderr else []
    if path is not None:
        from ._json_log import JsonFileHandler  # only who writes a file waits for this import: it needs sockets

        handlers.append(JsonFileHandler(path, max_bytes, backup_count))
    return _install(number, handlers, path)


def _install(level: int, handlers: list[logging.Handler], path: Path | None) -> LogSetup:
    global _current
    with _lock:
        if _current is not None:
            _current._remove()
        _current = LogSetup(level, handlers, path)
        return _current


def _check_level(level: str | int) -> int:
    if isinstance(level, str) and level.upper() in LEVELS:
        return int(getattr(logging, level.upper()))
    if isinstance(level, int) and not isinstance(level, bool) and level >= 0:
        return level
    raise RequestError("configure logging", f"level {level!r} is no level", f"one of {', '.join(LEVELS)}")


def _log_file(file: bool | str | os.PathLike[str] | None) -> Path | None:
    """Return the absolute path of the log file; the default one's folder is made."""
    if file is None or file is False:
        return None
    if file is not True:
        return Path(file).absolute()
    folder = platformdirs.user_state_path("pyllama_wasm", appauthor=False)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise HostError(f"make the folder {folder}", reason_of(error)) from error
    return folder / "pyllama_wasm.jsonl"


def one_line(text: str, limit: int = _MESSAGE_LIMIT) -> str:
    """Return ``text`` on one line: control characters and line ends escaped, at most ``limit`` characters."""
    return printable(text[: limit + 1], limit).replace("\n", "\\n")


class JsonFormatter(logging.Formatter):
    r"""One JSON object per line, safe to show: what a terminal would obey is written as ``\uXXXX``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line without its end."""
        fields: dict[str, Any] = {
            "time": _utc(record.created),
            "level": record.levelname,
            "logger": record.name,
            "message": _bounded(record.getMessage(), _MESSAGE_LIMIT),
        }
        if model := getattr(record, "model", ""):
            fields["model"] = str(model)
        fields["process"] = record.process
        fields["thread"] = record.threadName
        if record.exc_info:
            fields["exception"] = _bounded(self.formatException(record.exc_info), _EXCEPTION_LIMIT)
        text = json.dumps(fields, ensure_ascii=False)
        # JSON escapes C0 only. What else is not printable (C1, bidi controls, lone surrogates) can only be in a string.
        return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)


class PlainFormatter(logging.Formatter):
    """``12:30:01 WARNING guest[model.gguf]: text``; the message on one line, a traceback below it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record without its last line end."""
        where = record.name.removeprefix(f"{_logger.name}.")
        if model := str(getattr(record, "model", "")):
            where += f"[{one_line(model if len(model) <= _MODEL_WIDTH else model[: _MODEL_WIDTH - 1] + '…')}]"
        time = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")
        text = f"{time} {record.levelname:<7} {where}: {one_line(record.getMessage())}"
        if record.exc_info:
            text += "\n" + printable(self.formatException(record.exc_info), _EXCEPTION_LIMIT)
        return text


class StderrHandler(logging.Handler):
    """Writes to whatever standard error is at the moment: with colours on a terminal, else plain."""

    _STYLES: tuple[tuple[int, str], ...] = ((logging.ERROR, "bold red"), (logging.WARNING, "yellow"), (0, "dim"))

    def __init__(self) -> None:
        """Take every level; the logger decides."""
        super().__init__()
        self.setFormatter(PlainFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; a standard error that is closed or gone costs the line."""
        stream = sys.stderr
        if stream is None:  # a program without a console
            return
        try:
            text = self.format(record)
            stream.write((self._coloured(stream, record, text) if stream.isatty() else text) + "\n")
            stream.flush()
        except (OSError, ValueError):
            return
        except Exception:  # noqa: BLE001  logging must not break what it tells about
            self.handleError(record)

    def _coloured(self, stream: TextIO, record: logging.LogRecord, text: str) -> str:
        from rich.text import Text  # only who looks at a terminal waits for this import

        style = next(style for level, style in self._STYLES if record.levelno >= level)
        console = _console(stream)
        with console.capture() as capture:  # not printed by Rich, so that a progress bar's own standard error sees it
            console.print(Text(text, style=style), end="")
        return capture.get()


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    return Console(file=stream, markup=False, highlight=False, emoji=False, soft_wrap=True)


def _bounded(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[:limit] + " …"


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
