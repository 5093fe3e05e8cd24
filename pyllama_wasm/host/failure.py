"""The one way a sandbox dies: the first failure of any of its threads, kept and told."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import GuestAbortError, GuestDiedError, GuestStoppedError, GuestTrapError
from .ffi import GuestTrap, HostStop

_HINT = "load the model again"


def described(error: BaseException) -> str:
    """Return class and text of an exception that may be anybody's, and whose text may fail to come."""
    try:
        return f"{type(error).__name__}: {error}"
    except BaseException:
        return type(error).__name__


@dataclass(frozen=True)
class Death:
    """Why a sandbox died. Not the exception itself, whose traceback would hold on to the frames it passed."""

    kind: type[GuestDiedError]
    reason: str
    backtrace: str = ""

    def error(self, operation: str) -> GuestDiedError:
        """Return a new exception that tells it, for the operation that met it: another thread may have died first."""
        error = self.kind(operation, self.reason, _HINT if self.kind is GuestStoppedError else "")
        error.backtrace = self.backtrace
        return error


class Failures:
    """What went wrong in one sandbox. Recorded from any thread; only the first death counts, others follow from it."""

    def __init__(self, on_death: Callable[[Death], None] | None = None) -> None:
        """Start alive; ``on_death`` is told the first death, once, on the thread that met it."""
        self._on_death = on_death
        self._lock = threading.Lock()
        self._abort_text: str | None = None
        self._stop_reason: str | None = None
        self._raised: BaseException | None = None
        self.death: Death | None = None
        """What killed the sandbox, or None."""

    @property
    def is_quiet(self) -> bool:
        """Whether nothing at all has happened: the answer after nearly every guest call."""
        return self.death is None and self._raised is None and self._stop_reason is None

    def check_stop(self) -> None:
        """Raise what makes the guest trap, if the host has begun to stop it: for calls of the guest that take long."""
        if self.is_stopping:
            raise HostStop

    @property
    def is_stopping(self) -> bool:
        """Whether the guest is to end: it was told to, or one of its threads has died."""
        return self._stop_reason is not None or self.death is not None

    def abort_text(self, text: str) -> None:
        """Remember why a guest thread is about to abort; its trap follows."""
        with self._lock:
            self._abort_text = self._abort_text or text or "abort"

    def stopping(self, reason: str) -> None:
        """Say that the host is about to stop the guest, so that the trap is understood."""
        with self._lock:
            self._stop_reason = self._stop_reason or reason

    def raised(self, error: BaseException) -> None:
        """Keep an exception that a host function could not let through the guest."""
        with self._lock:
            self._raised = self._raised or error

    def take_raised(self) -> BaseException | None:
        """Return the exception kept by :meth:`raised`, once."""
        with self._lock:
            error, self._raised = self._raised, None
            return error

    def record(self, death: Death) -> Death:
        """Keep ``death`` if it is the first; return the first."""
        with self._lock:
            if self.death is not None:
                return self.death
            self.death = death
        if self._on_death is not None:
            self._on_death(death)
        return death

    def record_trap(self, trap: GuestTrap) -> Death:
        """Record a trap under the class that tells best why it happened; return the first death."""
        kind: type[GuestDiedError] = GuestTrapError
        reason = trap.reason
        if self._abort_text is not None:
            kind, reason = GuestAbortError, self._abort_text
        elif self._raised is not None and trap.is_unreachable:
            reason = f"a Python callback raised {described(self._raised)}"
        elif self._stop_reason is not None and trap.is_unreachable:
            kind, reason = GuestStoppedError, self._stop_reason
        return self.record(Death(kind, reason, trap.backtrace))

    def record_stop(self) -> Death | None:
        """Record the death of a guest whose call ended although the host had begun to stop it."""
        if self._stop_reason is None:
            return self.death
        return self.record(Death(GuestStoppedError, self._stop_reason))

    def died_earlier(self, operation: str) -> GuestDiedError:
        """Return the error for a call that comes after the death."""
        death = self.death
        error = GuestDiedError(operation, f"the sandbox died earlier: {death.reason if death else 'unknown'}", _HINT)
        error.backtrace = death.backtrace if death else ""
        return error
