"""What the scheduler needs of lanes and of the engine's thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from .slots import LaneKey, Slot

__all__ = ["Jobs", "Lane"]


class Lane(Protocol):
    """What the scheduler needs of ``lane.Lane``."""

    key: LaneKey
    n_ctx_seq: int
    slots: list[Slot]
    may_trim: bool

    @property
    def n_running(self) -> int:
        """How many requests have a slot."""
        ...

    def step(self) -> None:
        """Advance every runnable request; raises ``CancelledError``, ``ClosedError`` and ``GuestDiedError`` only."""
        ...

    def close(self) -> None:
        """Free it."""
        ...


class Jobs(Protocol):
    """The engine's thread, as the scheduler uses it."""

    @property
    def none_waits(self) -> Callable[[], bool]:
        """Return the function that tells whether no other job waits for the thread."""
        ...

    def run(self, job: Callable[[], None]) -> None:
        """Run a job there in its turn and wait for its end; an interrupt of the waiting thread ends the job.

        Raises ``CancelledError`` when it was withdrawn before its turn.
        """
        ...

    def post(self, job: Callable[[], None]) -> None:
        """Have a job run there in its turn. Raises ``ClosedError``."""
        ...

    def cancel(self) -> None:
        """End the job of these two that runs now, if one does: its lane raises ``CancelledError``."""
        ...

    def cancel_overdue(self, grace_s: float, patience_s: float) -> None:
        """Do as ``cancel`` if what the sandbox computes now still goes on after ``patience_s``.

        What does not end within ``grace_s`` then is stopped, and the sandbox with it.
        """
        ...

    def check(self) -> None:
        """Raise ``ClosedError`` when posted jobs do not run any more."""
        ...
