"""Deadlines: by when a call must have come back, and the one that holds for the calls of a thread."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

from .errors import DeadlineError, RequestError

__all__ = ["Deadline", "check_seconds", "current_deadline", "deadline", "nearest", "nested", "within"]

_LEAD_SHARE = 0.1
_LEAD_S = 0.1  # with the grace about as long as a cancelled call has to end by itself
_GRACE_S, _ENOUGH_S = 0.01, 0.05  # a little longer where there is not enough time before the deadline


class Deadline:
    """A moment by which a call must have come back.

    A little before it, :attr:`due_at`, the guest is asked to end, which leaves the model usable. A guest that computes
    on for :attr:`grace_s` from then, which is until that moment or, of a short deadline, until a little after, is
    stopped for good. Times are those of ``time.monotonic``.
    """

    __slots__ = ("due_at", "grace_s", "seconds")

    def __init__(self, seconds: float) -> None:
        """Begin now. Raises ``RequestError`` for what is no positive number of seconds."""
        check_seconds(seconds, "set a deadline")
        self.seconds = float(seconds)
        lead_s = min(_LEAD_S, _LEAD_SHARE * self.seconds)
        self.due_at = time.monotonic() + self.seconds - lead_s
        self.grace_s = max(lead_s, min(lead_s + _GRACE_S, _ENOUGH_S))

    @property
    def is_due(self) -> bool:
        """Whether a call must end now."""
        return time.monotonic() >= self.due_at

    @property
    def left_s(self) -> float:
        """How many seconds are left until it is due; 0 when it is."""
        return max(self.due_at - time.monotonic(), 0.0)

    def check(self, operation: str) -> None:
        """Raise ``DeadlineError`` when it is due."""
        if self.is_due:
            raise self.error(operation)

    def error(self, operation: str, has_died: bool = False) -> DeadlineError:
        """Return the exception for a call that it ended; ``has_died``: together with its sandbox."""
        reason = f"it did not end within {self.seconds:g} s"
        return DeadlineError(operation, reason, "it had to be stopped: load the model again" if has_died else "")


def check_seconds(seconds: object, operation: str) -> None:
    """Raise ``RequestError`` for what is no positive, finite number of seconds."""
    is_number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if not is_number or not math.isfinite(seconds) or seconds <= 0:  # type: ignore[arg-type, operator]
        raise RequestError(operation, f"{seconds!r} is not a positive number of seconds")


_scope: ContextVar[Deadline | None] = ContextVar("deadline", default=None)
"""Each thread has its own, and each task of an event loop."""


def current_deadline() -> Deadline | None:
    """Return the deadline that holds for the calls of this thread, or task of an event loop, now."""
    return _scope.get()


@contextmanager
def within(own: Deadline | None) -> Iterator[Deadline | None]:
    """Have ``own``, ``None`` for none, hold for the calls of this thread in the block, whatever holds around it."""
    outer = _scope.get()
    _scope.set(own)
    try:
        yield own
    finally:
        _scope.set(outer)  # not by its token: a generator may end in another context than it began in


def nearest(own: Deadline | None) -> Deadline | None:
    """Return which comes first, ``own`` or the deadline that holds already."""
    outer = _scope.get()
    if own is None or (outer is not None and outer.due_at <= own.due_at):
        return outer
    return own


def nested(seconds: float | None) -> AbstractContextManager[Deadline | None]:
    """Have a deadline of a call's own hold in a block, besides the one that holds already; ``None``: only that."""
    return within(nearest(None if seconds is None else Deadline(seconds)))


@contextmanager
def deadline(seconds: float) -> Iterator[Deadline]:
    """Have everything this thread asks of any model in the block come back within ``seconds``, all of it together.

    It holds for every call that enters a sandbox: loading, tokenizing, decoding, sampling, states, adapters. A call
    that does not end is ended as by ``Model.cancel``, and raises ``DeadlineError``, as do the calls that come after it
    in the block; closing still works. Of blocks inside each other the first to end counts. A ``deadline_s`` of a call
    is the same for that call alone.

    It does not interrupt Python: a callback or a logits processor of your own, or the compilation of the module, which
    happens once per machine (``runtime.prepare``).
    """
    own = Deadline(seconds)
    with within(nearest(own)):
        yield own
