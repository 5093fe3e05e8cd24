"""The one thread that looks at guests whose time is up. It sleeps while there is nothing to look at."""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress

logger = logging.getLogger("pyllama_wasm.engine")

Look = Callable[[], "float | None"]
"""Called when its time has come; returns the ``time.monotonic`` of the next look, or None when it is done."""

_MANY = 64  # at each multiple of so many entries the cancelled ones among them are thrown away


class Watch:
    """One thing the watchdog will look at; :meth:`cancel` when there is no need any more."""

    __slots__ = ("look",)

    def __init__(self, look: Look) -> None:
        """Not in the queue yet."""
        self.look: Look | None = look

    def cancel(self) -> None:
        """Look no more. A look that goes on now is not waited for. Doing it twice is fine."""
        self.look = None


class Watchdog:
    """Calls functions at their times, on a daemon thread of its own that begins with the first one."""

    def __init__(self) -> None:
        """Start without a thread."""
        self._changed = threading.Condition()  # a signal's handler may cancel what the thread it interrupts watches
        self._queue: list[tuple[float, int, Watch]] = []
        self._count = itertools.count()
        self._thread: threading.Thread | None = None

    def watch(self, at: float, look: Look) -> Watch:
        """Call ``look`` at ``at``, a time of ``time.monotonic``. Without room for a thread it never happens."""
        watch = Watch(look)
        with self._changed:
            self._push(at, watch)
            if self._queue[0][2] is watch:
                self._changed.notify()
            if self._thread is None:
                thread = threading.Thread(target=self._main, name="pyllama-watchdog", daemon=True)
                with suppress(RuntimeError):
                    thread.start()
                    self._thread = thread
        return watch

    @property
    def n_watched(self) -> int:
        """How many things it will look at."""
        with self._changed:
            return sum(watch.look is not None for _, _, watch in self._queue)

    def after_fork(self) -> None:
        """Start anew in a forked child, where the thread does not exist."""
        self.__init__()  # type: ignore[misc]

    def _push(self, at: float, watch: Watch) -> None:
        if self._queue and len(self._queue) % _MANY == 0:
            self._queue = [entry for entry in self._queue if entry[2].look is not None]
            heapq.heapify(self._queue)
        heapq.heappush(self._queue, (at, next(self._count), watch))

    def _main(self) -> None:
        while True:
            watch = self._next()
            look = watch.look
            if look is None:
                continue
            try:
                again = look()
            except Exception:  # the others' looks must go on
                logger.exception("the watchdog failed")
                again = None
            if again is None:
                watch.look = None
            elif watch.look is not None:
                with self._changed:
                    self._push(again, watch)
            del look

    def _next(self) -> Watch:
        """Wait for the first one whose time has come, and take it out."""
        with self._changed:
            while True:
                while self._queue and self._queue[0][2].look is None:
                    heapq.heappop(self._queue)
                if not self._queue:
                    self._changed.wait()
                    continue
                left_s = self._queue[0][0] - time.monotonic()
                if left_s <= 0:
                    return heapq.heappop(self._queue)[2]
                self._changed.wait(min(left_s, threading.TIMEOUT_MAX))


watchdog = Watchdog()
"""For all engines of the process."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=watchdog.after_fork)
