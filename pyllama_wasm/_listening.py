"""Requests that no thread waits for, as those of an event loop: the engine's own thread computes them.

A function is called when there is something for them. They share slots, lanes and steps with the requests of threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from .errors import CancelledError, ClosedError
from .scheduler import _ENGINE, Scheduler
from .slots import Request

__all__ = ["ListeningScheduler"]

_GRACE_S = 1.0
"""How long a step may go on that is asked to end because nobody wants what it gives."""


class _Ring:
    """Stands where a request's bell is while no thread sleeps on it: the first ring calls a function."""

    __slots__ = ("_call", "_lost", "is_lost")

    def __init__(self, call: Callable[[], None], lost: Callable[[], None], is_lost: Callable[[], bool]) -> None:
        self._call: Callable[[], None] | None = call
        self._lost, self.is_lost = lost, is_lost

    def release(self) -> None:
        call, self._call = self._call, None
        if call is None:
            return
        try:
            call()
        except RuntimeError:  # its event loop is closed: nobody will come for it
            self.give_up()

    def give_up(self) -> None:
        """Call nobody: what would be called keeps alive who waits."""
        self._call = None
        self._lost()


class ListeningScheduler(Scheduler):
    """A scheduler with listeners beside the threads that wait. Every method may be called from any thread."""

    def listen(self, request: Request, ring: Callable[[], None], is_lost: Callable[[], bool] = lambda: False) -> None:
        """Have a submitted request computed, and ``ring`` called once when it is ready or must look what is wrong.

        Never waits for a step. ``ring`` is called in any thread, perhaps in this one before this returns; it must not
        block, and ``RuntimeError`` from it gives the request up. So does ``is_lost``, which is asked between steps:
        whether nobody will come for it. Each call of it ends with ``unlisten``.
        """
        with self._lock:
            request.bell = cast(Any, _Ring(ring, partial(self.abandon, request), is_lost))
            request.is_waited_for = True
            if request.is_ready or self._failure is not None:
                request.bell.release()
                return
            self._sleeping.add(request)
            if self._leader is None:
                self._nudge()

    def heard(self, request: Request) -> None:
        """Raise what has ended the engine's own steps, for one who was rung and finds nothing."""
        request.check()
        with self._lock:
            if not request.is_ready:
                self._jobs.check()
                if self._failure is not None:
                    self._raise_failure()

    def unlisten(self, request: Request) -> None:
        """Take ``listen`` back; what others wait for goes on."""
        with self._lock:
            request.is_waited_for = False
            request.bell = threading.Lock()
            request.bell.acquire()
            self._sleeping.discard(request)
            if self._sleeping and self._leader is None:
                self._wake_another()

    def interrupt(self, request: Request) -> None:
        """End the step that is computed for ``request``, which is about to be released, unless it is for others too."""
        with self._lock:
            is_computed = self._leader is not None and request.slot is not None
            others = [run for run in self._runs() if run is not request]
            is_shared = any(run.is_wanted and not run.is_given_up for run in others)
        if is_computed and not is_shared:
            self._jobs.cancel_overdue(_GRACE_S, 0.0)

    def ring(self) -> None:
        """Have all who listen look what has become of their requests."""
        with self._lock:
            self._ring_all()

    def abandon(self, request: Request) -> None:
        """Do as ``Scheduler.abandon``; those who listen may have been waiting for its slot."""
        super().abandon(request)
        if self._has_listener():
            self._nudge()

    # -- inside -------------------------------------------------------------------------------------------------------

    def _wake_ready(self) -> None:
        super()._wake_ready()
        for request in tuple(self._sleeping):
            if isinstance(request.bell, _Ring) and request.bell.is_lost():
                self._sleeping.discard(request)
                request.bell.give_up()

    def _wake_another(self) -> None:
        """Have somebody lead: the engine where somebody listens, since it leads for all; under the lock."""
        if self._failure is None and self._has_listener():
            self._nudge()
        else:
            super()._wake_another()

    def _has_listener(self) -> bool:
        """Whether somebody listens who has nothing yet; without the lock it may be late by a moment."""
        return any(isinstance(run.bell, _Ring) and not run.is_ready for run in tuple(self._sleeping))

    def _nudge(self) -> None:
        """Have the engine's thread lead, if nobody does when its turn comes. Needs no lock, and may be too many."""
        try:
            self._jobs.post(self._lead)
        except ClosedError:
            self._ring_all()

    def _ring_all(self) -> None:
        for request in tuple(self._sleeping):
            if isinstance(request.bell, _Ring):
                self._sleeping.discard(request)
                request.bell.release()

    def _lead(self) -> None:
        """Open lanes where they are wanted, then step for as long as somebody waits; as a job of the engine's own."""
        with self._lock:
            if self._leader is not None:
                return
            self._leader = _ENGINE
        error: BaseException | None = None
        try:
            while True:
                with self._lock:
                    self._collect()
                    self._free_ended()
                    self._place()
                    growth = self._growth() if self._queue else None
                    lane = self._next_lane() if growth is None else None
                    if growth is None and lane is None:
                        self._end_job()
                        return
                if growth is None:
                    break
                growth()
        except CancelledError:
            pass  # whose end was meant finds out by its check; the others go on
        except BaseException as failure:  # noqa: BLE001  raised again to who waits
            error = failure
        else:
            if lane is not None:
                self._run_on(lane)
            return
        with self._lock:
            self._failure = error or self._failure
            self._end_job()
            self._wake_another()
