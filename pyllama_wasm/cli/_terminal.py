"""What the commands write, and where: answers to standard output, everything else to standard error.

A model's words, a GGUF's metadata and a guest's messages are other people's text. On a terminal they may not contain
control sequences (which could retitle the window, answer queries or hide text), and they are never read as Rich markup.
"""

from __future__ import annotations

import sys
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

PLAIN_WIDTH = 10_000
"""Columns assumed when the output is a file or a pipe, so that no line is cut or wrapped."""

_BIDI_CONTROLS = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def escape_controls(text: str) -> str:
    r"""Return ``text`` with everything a terminal would obey written as ``\x1b``; newline and tab stay."""
    return "".join(_escape(char) if _is_control(char) else char for char in text)


def _is_control(char: str) -> bool:
    """Tell whether a terminal acts on this character instead of showing it (C0, C1, bidi, lone surrogates)."""
    code = ord(char)
    return (
        (code < 0x20 and char not in "\n\t")
        or 0x7F <= code <= 0x9F
        or 0xD800 <= code <= 0xDFFF
        or char in _BIDI_CONTROLS
    )


def _escape(char: str) -> str:
    """Return the visible spelling of one control character."""
    return char.encode("unicode_escape").decode("ascii")


def write_model_text(text: str) -> None:
    """Write a model's words to standard output at once: raw into a file or pipe, harmless on a terminal."""
    stream = sys.stdout
    stream.write(escape_controls(text) if stream.isatty() else text)
    stream.flush()


def note(text: str, style: str = "dim") -> None:
    """Write one line to standard error."""
    errors().print(Text(escape_controls(text), style=style))


def report_error(message: str) -> None:
    """Write ``error: …`` to standard error, on one line whatever the message holds."""
    line = " ".join(part.strip() for part in message.splitlines() if part.strip())
    errors().print(Text("error: ", style="bold red").append(escape_controls(line), style="default"))


def show(*parts: str | Table) -> None:
    """Write lines and tables to standard output, without the blanks that pad a table's last column."""
    console = _console(sys.stdout)
    with console.capture() as capture:
        for part in parts:
            console.print(part)
    sys.stdout.writelines(line.rstrip() + "\n" for line in capture.get().removesuffix("\n").split("\n"))


def errors() -> Console:
    """Return a Rich console on the current standard error."""
    return _console(sys.stderr)


def _console(stream: TextIO) -> Console:
    # Made anew each time: the streams are replaced under test runners, and a console keeps the one it was born with.
    width = None if stream.isatty() else PLAIN_WIDTH
    return Console(file=stream, width=width, markup=False, highlight=False, emoji=False, soft_wrap=not stream.isatty())


def table(*columns: str, numeric: frozenset[str] = frozenset()) -> Table:
    """Return an empty table in the house look; columns in ``numeric`` are right-aligned."""
    result = Table(box=None, pad_edge=False, header_style="bold", show_header=any(columns))
    for column in columns:
        result.add_column(column, justify="right" if column in numeric else "left", overflow="fold")
    return result


def cells(*values: object) -> list[Text]:
    """Return table cells that show ``values`` literally."""
    return [Text(escape_controls(str(value))) for value in values]


def size(n_bytes: int) -> str:
    """Return a number of bytes for people: ``98.4 MB``, in powers of 1000 as file managers count."""
    return _scaled(n_bytes, ("B", "kB", "MB", "GB", "TB"))


def count(number: int) -> str:
    """Return a large number for people: ``134.5 M``."""
    return _scaled(number, ("", "K", "M", "B", "T")).rstrip()


def _scaled(number: int, units: tuple[str, ...]) -> str:
    value, index = float(number), 0
    while value >= 999.95 and index < len(units) - 1:
        value, index = value / 1000, index + 1
    return f"{value:.1f} {units[index]}" if index else f"{number} {units[0]}"
