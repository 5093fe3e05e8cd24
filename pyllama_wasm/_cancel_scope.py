"""Calls that somebody else may end: what is begun in a scope ends with it, and nothing else does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["CancelScope", "current_scope"]


_MANY = 64  # so many are kept before it is looked which of them are over


class CancelScope:
    """The calls that one thread makes for somebody who may lose interest."""

    def __init__(self) -> None:
        """Start without calls."""
        self.is_cancelled = False
        """Whoever waits for a call of the scope looks at it. To set it needs no lock, so it is safe at any moment."""

        self._lock = threading.Lock()
        self._ends: list[tuple[Callable[[], object], Callable[[], bool]]] = []
        self._n_many = _MANY

    def add(self, end: Callable[[], object], is_over: Callable[[], bool] = lambda: False) -> None:
        """Have ``end`` called, in any thread, when the scope is cancelled, or at once if it has been.

        ``is_over`` says when there is nothing to end any more: it may then be forgotten.
        """
        with self._lock:
            if len(self._ends) >= self._n_many:
                self._ends = [entry for entry in self._ends if not entry[1]()]
                self._n_many = 2 * len(self._ends) + _MANY
            self._ends.append((end, is_over))
        if self.is_cancelled:
            end()

    def cancel(self) -> None:
        """End what was begun in it; from any thread."""
        self.is_cancelled = True
        with self._lock:
            ends, self._ends = self._ends, []
        for end, _ in ends:
            end()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Have the calls of this thread in the block belong to the scope."""
        outer = _scope.get()
        _scope.set(self)
        try:
            yield
        finally:
            _scope.set(outer)


_scope: ContextVar[CancelScope | None] = ContextVar("cancel_scope", default=None)


def current_scope() -> CancelScope | None:
    """Return the scope that calls of this thread belong to now."""
    return _scope.get()
