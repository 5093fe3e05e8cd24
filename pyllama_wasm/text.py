"""Text as it streams: bytes to valid UTF-8 across token borders, and stop strings held back."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from .errors import RequestError

__all__ = ["StopMatcher", "TextAssembler", "Utf8Decoder", "check_stops", "parse_count"]

_MAX_DIGITS = 20  # of the largest uint64


def parse_count(text: str) -> int | None:
    """Return the number from 0 on that a metadata value reads as; ``None`` for other text.

    A file may have a string where a number belongs, with digits of other scripts or more of them than ``int`` takes.
    """
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS else None


def check_stops(stop: str | Iterable[str] | None) -> tuple[str, ...]:
    """Return the stop strings as a tuple; raise ``RequestError`` for an empty or non-string one."""
    stops = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    for item in stops:
        if not isinstance(item, str) or not item:
            raise RequestError("set stop", f"{item!r} is not a non-empty string")
    return stops


class Utf8Decoder:
    """Turn pieces of bytes into text, keeping an unfinished character until its last byte arrives.

    Bytes that can never become a character turn into U+FFFD, as ``bytes.decode(errors="replace")`` has it.
    """

    def __init__(self) -> None:
        """Start with nothing held back."""
        self._held = b""

    def feed(self, piece: bytes) -> str:
        """Return the characters that ``piece`` completes."""
        # What codecs.getincrementaldecoder("utf-8") does, less its two calls for every token.
        data = self._held + piece if self._held else piece
        text, n = codecs.utf_8_decode(data, "replace")
        self._held = data[n:]
        return text

    def finish(self) -> str:
        """Return what is left: U+FFFD when the bytes ended inside a character."""
        held, self._held = self._held, b""
        return codecs.utf_8_decode(held, "replace", True)[0]


class StopMatcher:
    """Let text through up to the earliest stop string, holding back a tail that may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Watch for ``stops``; none of them may be empty."""
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None
        """The stop string that ended the text."""

    def feed(self, text: str) -> str:
        """Return the text that is certainly not part of a stop string; after a match always ``""``."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return text
        buffer = self._held + text
        # The earliest start wins; of two that start together the one completed first (the shorter) does, which
        # is also what a matcher fed character by character would answer.
        found = min(
            ((at, len(s), s) for s in self._stops if (at := buffer.find(s)) >= 0),
            default=None,
        )
        if found is not None:
            self._held, self.matched = "", found[2]
            return buffer[: found[0]]
        cut = len(buffer) - self._tail_length(buffer)
        self._held = buffer[cut:]
        return buffer[:cut]

    def finish(self) -> str:
        """Return the tail that was held back and did not become a stop string."""
        held, self._held = self._held, ""
        return held

    def _tail_length(self, buffer: str) -> int:
        """Length of the longest tail of ``buffer`` that a stop string starts with."""
        longest = min(len(buffer), max(len(s) for s in self._stops) - 1)
        for n in range(longest, 0, -1):
            tail = buffer[len(buffer) - n :]
            if any(s.startswith(tail) for s in self._stops):
                return n
        return 0


class TextAssembler:
    """Pieces of bytes in, releasable text out: a ``Utf8Decoder`` followed by a ``StopMatcher``."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        """Start with nothing held back."""
        self._decoder = Utf8Decoder()
        self._matcher, self._has_stops = StopMatcher(stops), bool(stops)

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string was completed."""
        return self._matcher.matched is not None

    def feed(self, piece: bytes) -> str:
        """Return the text that ``piece`` releases, possibly none."""
        text = self._decoder.feed(piece)
        return self._matcher.feed(text) if self._has_stops else text

    def finish(self) -> str:
        """Return what was held back at the end of the generation."""
        if self.is_stopped:
            return ""
        return self._matcher.feed(self._decoder.finish()) + self._matcher.finish()
