"""One request to a model's process: what the process owes for it, and what has come."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

from ..deadline import Deadline
from ..host.watchdog import Watch
from .wire import Value, WireError

__all__ = ["GRACE_S", "KINDS", "Call", "Reply"]

GRACE_S = 1.0
"""How long after its deadline a call may go on until its process is killed: it should have ended by itself by then."""

CANCEL_GRACE_S = 5.0
"""The same after a ``cancel``, which has no deadline of its own."""

KINDS = frozenset({"result", "error", "made", "item", "piece", "progress"})

Reply = tuple[str, Any]
"""What came, and its value: one of ``KINDS``, or ``died``."""

_MAX_CALL_BYTES, _MAX_PIECE_BYTES = 1 << 30, 16 << 20


class Call:
    """One request on its way; the reading thread takes its replies, and who waits gets them from a queue."""

    def __init__(
        self,
        number: int,
        operation: str,
        *,
        n_items: int = 0,
        read_item: Callable[[Value], object] | None = None,
        is_stream: bool = False,
    ) -> None:
        """Expect a result, before it ``n_items`` items at most, or the pieces of a stream as they are granted.

        ``read_item`` makes of an item what is kept of it, and raises ``WireError`` for what is none: each is checked
        when it comes, so that nothing piles up which turns out at the end not to be what was asked for.
        """
        self.number, self.operation = number, operation
        self.deadline: Deadline | None = None
        self.watch: Watch | None = None
        self.is_sent = False
        """Whether the process has been asked, and so owes an end of it."""

        self.cancelled_at: float | None = None
        self.is_overdue = self.is_ended = self.has_progress = False
        self.progress: Value = None
        self.replies: SimpleQueue[Reply] = SimpleQueue()
        self.ring: Callable[[], None] | None = None
        """Called, once, in the reading thread, when a reply has come: for who waits in no thread."""
        self._n_items_left, self._read_item, self._is_stream = n_items, read_item, is_stream
        self._n_granted = self._n_pieces = self._n_bytes = 0
        self._is_made = False
        self._owed_since = time.monotonic()

    def grant(self, n: int) -> None:
        """Let a stream send so many more pieces."""
        if not self.is_owed:
            self._owed_since = time.monotonic()
        self._n_granted += n

    @property
    def is_owed(self) -> bool:
        """Whether the process must send something, however long it takes."""
        return not (self._is_stream and self._is_made) or self._n_granted > self._n_pieces

    def take(self, kind: str, value: Value, n_bytes: int) -> None:
        """Note what has come; on the reading thread. Raises ``WireError`` for what was not asked for."""
        self.count(kind, n_bytes)
        if kind not in ("result", "error") and self._is_late:
            self.is_overdue = True
            raise WireError("it did not end in time after its deadline came")
        if kind == "item" and self._read_item is not None:
            value = self._read_item(value)
        if kind == "progress":  # only the last one matters
            self.progress, had_progress, self.has_progress = value, self.has_progress, True
            if had_progress:
                return
        self.put((kind, value))

    def count(self, kind: str, n_bytes: int) -> None:
        """Count what has come, whether somebody wants it still or not. Raises ``WireError`` as ``take`` does."""
        self._n_bytes += n_bytes
        if self._n_bytes > _MAX_CALL_BYTES:
            raise WireError("it sent more than a call may have")
        is_odd = kind == "made" and (self._is_made or not self._is_stream)
        if kind == "item":
            self._n_items_left -= 1
        elif kind == "piece":
            is_odd = n_bytes > _MAX_PIECE_BYTES
            self._n_pieces, self._n_bytes = self._n_pieces + 1, 0
        elif kind == "made":
            self._is_made = True
        if is_odd or self._n_items_left < 0 or self._n_pieces > self._n_granted:
            raise WireError("it sent more than it was asked for")

    def put(self, reply: Reply) -> None:
        """Hand a reply to who waits."""
        self.replies.put(reply)
        ring, self.ring = self.ring, None
        if ring is not None:
            with suppress(RuntimeError):  # its event loop is closed
                ring()

    def end(self) -> None:
        """Expect nothing more."""
        self.is_ended = True
        if self.watch is not None:
            self.watch.cancel()

    @property
    def _is_late(self) -> bool:
        """Whether its deadline came so long ago that nothing but its end may come: each answer would put that off."""
        deadline = self.deadline
        return deadline is not None and time.monotonic() > deadline.due_at + deadline.grace_s + GRACE_S

    @property
    def kill_at(self) -> float | None:
        """When the process is to be killed if it has not answered by then; ``None``: not for this."""
        moments = []
        if self.deadline is not None:
            due_at = self.deadline.due_at + self.deadline.grace_s
            moments.append(max(due_at, self._owed_since) + GRACE_S)
        if self.cancelled_at is not None:
            moments.append(max(self.cancelled_at, self._owed_since) + CANCEL_GRACE_S)
        return min(moments) if moments and self.is_owed else None
