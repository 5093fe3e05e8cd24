"""Read bytes of an untrusted GGUF in order: bounded, never beyond the end, through one buffer."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, cast

import numpy as np

from .deadline import current_deadline
from .errors import ModelFileError, ModelFormatError, reason_of

__all__ = ["SCALARS", "STRING", "Cursor", "Data", "Scalar", "check_magic", "open_data", "read_items", "read_magic"]

Scalar = int | float | bool | str
Data = Path | int | bytes | bytearray | memoryview
"""Where the bytes are: a path, a file descriptor (which stays the caller's), or memory."""

ReadAt = Callable[[int, int], bytes]
"""Takes an offset and a length; returns fewer bytes only at the end."""

SCALARS: Final[dict[int, tuple[str, struct.Struct]]] = {
    0: ("uint8", struct.Struct("<B")),
    1: ("int8", struct.Struct("<b")),
    2: ("uint16", struct.Struct("<H")),
    3: ("int16", struct.Struct("<h")),
    4: ("uint32", struct.Struct("<I")),
    5: ("int32", struct.Struct("<i")),
    6: ("float32", struct.Struct("<f")),
    7: ("bool", struct.Struct("<?")),
    10: ("uint64", struct.Struct("<Q")),
    11: ("int64", struct.Struct("<q")),
    12: ("float64", struct.Struct("<d")),
}
STRING: Final = 8

MAX_STRING_BYTES = 64 << 20
"""Most bytes of all strings that are read at once: keys, values and tensor names, or the elements of one array."""

MAX_ARRAY_BYTES = 256 << 20
"""Most bytes of one array of numbers that is read whole."""

_MAGIC = b"GGUF"
_CHUNK = 1 << 20
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class Cursor:
    """A position in the bytes; reads through one buffer and never beyond the end."""

    def __init__(self, read_at: ReadAt, size: int, operation: str, offset: int = 0) -> None:
        """Start at ``offset`` of ``size`` bytes; ``operation`` begins the messages of errors.

        The deadline that holds now ends the reading: ``DeadlineError``.
        """
        self._read_at, self.size, self.operation = read_at, size, operation
        self._buffer, self._start, self._pos = b"", offset, 0
        self._string_bytes = 0
        self._deadline = current_deadline()

    @property
    def offset(self) -> int:
        """Return where the next byte is read."""
        return self._start + self._pos

    @property
    def remaining(self) -> int:
        """Return how many bytes are left."""
        return self.size - self.offset

    def fail(self, reason: str, hint: str = "") -> ModelFormatError:
        """Return the exception for bytes that are no GGUF."""
        return ModelFormatError(self.operation, reason, hint)

    def check_time(self) -> None:
        """Raise ``DeadlineError`` when the time is up: between entries, of which there may be many."""
        if self._deadline is not None:
            self._deadline.check(self.operation)

    def need(self, n: int, what: str) -> None:
        """Raise unless ``n`` more bytes are there."""
        if n > self.remaining:
            raise self.fail(f"{what} ends beyond the file", "truncated download?")

    def fill(self, n: int, what: str) -> None:
        """Make the next ``n`` bytes available in the buffer."""
        if self._pos + n <= len(self._buffer):
            return
        self.need(n, what)
        self.check_time()
        rest = self._buffer[self._pos :]
        self._start, self._pos = self.offset, 0
        try:
            self._buffer = rest + self._read_at(self._start + len(rest), max(n - len(rest), _CHUNK))
        except OSError as error:
            raise ModelFileError(self.operation, reason_of(error)) from error
        if len(self._buffer) < n:
            raise self.fail(f"{what} ends beyond the file", "truncated download?")

    def take(self, n: int, what: str) -> bytes:
        """Return the next ``n`` bytes."""
        self.fill(n, what)
        data = self._buffer[self._pos : self._pos + n]
        self._pos += n
        return data

    def unpack(self, form: struct.Struct, what: str) -> Scalar:
        """Return the next value."""
        self.fill(form.size, what)
        value: Scalar = form.unpack_from(self._buffer, self._pos)[0]
        self._pos += form.size
        return value

    def u32(self, what: str) -> int:
        """Return the next 32-bit count."""
        return cast(int, self.unpack(_U32, what))

    def u64(self, what: str) -> int:
        """Return the next 64-bit count."""
        return cast(int, self.unpack(_U64, what))

    def string(self, what: str, limit: int = MAX_STRING_BYTES) -> str:
        """Return the next string; what is not UTF-8 becomes U+FFFD."""
        n = self.u64(what)
        self.need(n, what)
        if n > limit:
            raise self.fail(f"{what} is a string of {n} bytes", f"at most {limit} are accepted")
        self._string_bytes += n
        if self._string_bytes > MAX_STRING_BYTES:
            raise self.fail(f"up to {what} the strings take more than {MAX_STRING_BYTES >> 20} MiB")
        return self.take(n, what).decode("utf-8", errors="replace")

    def skip(self, n: int, what: str) -> None:
        """Step over ``n`` bytes without reading them."""
        self.need(n, what)
        if self._pos + n <= len(self._buffer):
            self._pos += n
        else:
            self._buffer, self._start, self._pos = b"", self.offset + n, 0

    def skip_strings(self, n: int, what: str) -> None:
        """Step over ``n`` strings."""
        remaining = n
        while remaining:
            self._pos, remaining = _skip_whole(self._buffer, self._pos, remaining)
            if remaining:
                length = self.u64(what)
                self.skip(length, what)
                remaining -= 1
                if remaining:
                    self.fill(min(8, self.remaining), what)


def _skip_whole(buffer: bytes, pos: int, n: int) -> tuple[int, int]:
    """Return where those of ``n`` strings end that lie whole in the buffer, and how many do not.

    The loop is what decides how long a large vocabulary takes.
    """
    unpack_from, size, left = _U64.unpack_from, len(buffer), n
    with suppress(struct.error):  # the buffer ends within a length
        for left in range(n, 0, -1):
            (length,) = unpack_from(buffer, pos)
            end = pos + 8 + length
            if end > size:
                return pos, left
            pos = end
        return pos, 0
    return pos, left


def read_items(cursor: Cursor, number: int, n: int, what: str) -> list[Scalar]:
    """Return ``n`` array elements of GGUF type ``number``."""
    if number == STRING:
        return [cursor.string(what) for _ in range(n)]
    form = SCALARS[number][1]
    if n * form.size > MAX_ARRAY_BYTES:
        raise cursor.fail(f"{what} has {n} elements", f"at most {MAX_ARRAY_BYTES >> 20} MiB are read at once")
    if number == 7:
        return [bool(byte) for byte in cursor.take(n, what)]
    items: list[Any] = np.frombuffer(cursor.take(n * form.size, what), np.dtype(form.format)).tolist()
    return items


def check_magic(data: Data, operation: str) -> None:
    """Raise ``ModelFileError`` or ``ModelFormatError`` unless ``data`` can be read and starts like a GGUF."""
    with open_data(data, operation) as (read_at, size):
        read_magic(Cursor(read_at, size, operation))


def read_magic(cursor: Cursor) -> None:
    """Read the first four bytes; raise ``ModelFormatError`` unless they are a GGUF's."""
    hint = "give the path of a GGUF file"
    if cursor.size < len(_MAGIC):
        raise cursor.fail(f"{cursor.size} bytes are too few for a GGUF", hint)
    magic = cursor.u32("the magic number").to_bytes(4, "little")
    if magic != _MAGIC:
        raise cursor.fail(f"it starts with {magic.decode('latin-1')!r} instead of 'GGUF'", hint)


@contextmanager
def open_data(data: Data, operation: str) -> Iterator[tuple[ReadAt, int]]:
    """Give a reader of ``data`` and its size. A path must be a regular file; it is open inside the block only."""
    if isinstance(data, (bytes, bytearray, memoryview)):
        view = memoryview(data).cast("B")
        yield lambda offset, n: bytes(view[offset : offset + n]), len(view)
        return
    fd = data if isinstance(data, int) else _open(data, operation)
    try:
        try:
            info = os.fstat(fd)
        except OSError as error:
            raise ModelFileError(operation, reason_of(error)) from error
        if not stat.S_ISREG(info.st_mode):
            raise ModelFileError(operation, "it is not a regular file", "give the path of a GGUF file")
        yield lambda offset, n: _read_at(fd, offset, n), info.st_size
    finally:
        if fd is not data:
            os.close(fd)


def _open(path: Path, operation: str) -> int:
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        # Not blocking: opening a FIFO would otherwise wait for a writer.
        return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:  # ValueError: a zero character in the path
        raise ModelFileError(operation, reason_of(error), "check the path") from error


def _read_at(fd: int, offset: int, n: int) -> bytes:
    if hasattr(os, "pread"):
        parts = []
        while n > 0 and (part := os.pread(fd, n, offset)):  # one call reads at most 2 GiB, and signals cut it short
            parts.append(part)
            offset, n = offset + len(part), n - len(part)
        return b"".join(parts)
    with open(fd, "rb", buffering=0, closefd=False) as file:
        file.seek(offset)
        return file.read(n)
