"""The engine's own thread: jobs in order of arrival, each waited for interruptibly and ended when asked."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from functools import partial
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

from ..deadline import Deadline
from ..errors import CancelledError, ClosedError, DeadlineError, GuestStoppedError, HostError
from .threads import WAIT_SLICE_S, start_thread, thread_clock
from .watchdog import watchdog

T = TypeVar("T")

GRACE_S = 0.1
"""How long a cancelled guest call may take to end by itself before it is stopped, which kills the sandbox."""

_BUSY_S = 0.02  # what a guest may need longer where others have the processor: stopping it costs more
_JOB_GRACE_S = 1.0  # the same for a job that goes on making short guest calls
_ABANDON_S = 2.0  # longest wait of an interrupted caller for its job to end
_CLOSE_S = 20.0
_POLL_S = 0.005

_NO_THREAD = -1  # identifiers of ended threads are given to new ones, so they must not be kept


class Guest(Protocol):
    """What the job thread needs to know of the sandbox it runs."""

    busy_call: int
    """A number that is different for each outermost guest call, 0 while none runs."""

    def set_cancel(self, value: bool) -> None:
        """Ask the guest to end its call cleanly, or take that back."""
        ...

    def stop(self, reason: str) -> None:
        """Make every guest thread trap as soon as it can."""
        ...

    def is_guest_thread(self) -> bool:
        """Whether the calling thread is one the guest started."""
        ...

    def cpu_times(self) -> dict[int, float]:
        """Return the processor time that each guest thread has used, in seconds, by its number."""
        ...

    def shut(self) -> None:
        """End all guest threads and free everything; on the engine's thread, once."""
        ...

    def abandon(self) -> None:
        """Forget everything without freeing it: in a forked child, where the threads do not exist."""
        ...


class _State(Enum):
    QUEUED = 1
    RUNNING = 2
    DONE = 3
    WITHDRAWN = 4


class _Job:
    """One call of a Python function on the engine's thread."""

    __slots__ = (
        "_error", "_func", "_latch", "_result", "deadline", "is_cancelled", "is_overdue", "is_shared", "operation",
        "state",
    )  # fmt: skip

    def __init__(
        self, func: Callable[[], Any], operation: str, deadline: Deadline | None = None, is_shared: bool = False
    ) -> None:
        self.operation, self._func, self.deadline, self.is_shared = operation, func, deadline, is_shared
        self.state = _State.QUEUED
        self.is_cancelled = self.is_overdue = False
        self._result: Any = None
        self._error: BaseException | None = None
        self._latch = threading.Lock()
        self._latch.acquire()

    def execute(self) -> None:
        try:
            self._result = self._func()
        except BaseException as error:
            self._error = error

    def fail(self, error: BaseException) -> None:
        self._error = error
        self.finish()

    def overdue_error(self, has_died: bool = False) -> DeadlineError:
        if self.deadline is None:
            raise AssertionError("a job without a deadline is never overdue")
        return self.deadline.error(self.operation, has_died)

    def tell_overdue(self) -> None:
        """Say that it was the deadline that ended the job, where it did."""
        error = self._error
        if isinstance(error, (CancelledError, GuestStoppedError)) and not isinstance(error, DeadlineError):
            self._error = self.overdue_error(isinstance(error, GuestStoppedError))
            self._error.__cause__ = error

    def finish(self) -> None:
        self.state = _State.DONE
        self._latch.release()

    def wait(self) -> None:
        """Wait until :meth:`finish`; only the submitter may, as the latch opens once."""
        while not self._latch.acquire(timeout=WAIT_SLICE_S):
            pass

    def outcome(self) -> Any:
        error, self._error = self._error, None
        if error is None:
            return self._result
        try:
            raise error
        finally:
            del error  # its traceback refers to this frame


class JobThread:
    """Runs jobs for one sandbox, one after the other, on a thread with a stack that guest code can use."""

    def __init__(self, guest: Guest, name: str) -> None:
        """Start the thread."""
        self._guest = guest
        self._queue: SimpleQueue[_Job | None] = SimpleQueue()
        self.none_waits: Callable[[], bool] = self._queue.empty
        """Whether no other job waits for the running one to end. The queue's own method: it is asked for each token."""

        self._lock = threading.RLock()
        self._current: _Job | None = None
        self.overdue: _Job | None = None
        """The running job, when its deadline has come and its next guest call is to be refused: ``refuse``."""

        self._is_closing = False
        self._ended = threading.Event()
        self._close_error: BaseException | None = None
        self.ident = _NO_THREAD
        self._cpu_s: Callable[[], float] = time.monotonic
        self.is_forked = False
        with _live_lock:
            _live.add(self)
        try:
            start_thread(self._main, name)
        except RuntimeError as error:
            _live.discard(self)
            raise HostError("start the engine's thread", str(error)) from error
        except BaseException:
            self.request_close()  # Ctrl-C while it started: it runs, and frees the sandbox itself
            raise

    @property
    def is_closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._is_closing

    @property
    def busy_call(self) -> int:
        """A number that is different for each guest call, 0 while none runs."""
        return self._guest.busy_call

    def cpu_times(self) -> dict[int, float]:
        """Return the processor time that its thread and each guest thread has used, in seconds; its own number is 0."""
        return {0: self._cpu_s(), **self._guest.cpu_times()}

    @property
    def cancel_requested(self) -> bool:
        """Whether the running job has been cancelled."""
        job = self._current
        return job is not None and job.is_cancelled

    def run(
        self, func: Callable[[], T], operation: str, deadline: Deadline | None = None, is_shared: bool = False
    ) -> T:
        """Run ``func`` after all jobs submitted earlier; inline when already on this thread.

        When the deadline comes, a job that waits is withdrawn, and one that runs is ended: ``DeadlineError``. One that
        ``is_shared`` goes on then, as others need what it does.
        """
        if threading.get_ident() == self.ident:
            return func()
        if self._guest.is_guest_thread():
            raise HostError(operation, "a guest thread cannot call its own engine", "only the engine's thread can")
        if deadline is not None:
            deadline.check(operation)
        job = _Job(func, operation, deadline, is_shared)
        watch = None
        try:
            with self._lock:
                if self._is_closing:
                    raise ClosedError(operation, "the engine is closed" + (" (forked process)" * self.is_forked))
                self._queue.put(job)
            if deadline is not None:
                watch = watchdog.watch(deadline.due_at, partial(self._look_at_deadline, job))
            job.wait()
        except BaseException:
            self._abandon(job)
            raise
        finally:
            if watch is not None:
                watch.cancel()
        result: T = job.outcome()
        return result

    def post(self, func: Callable[[], None], operation: str) -> None:
        """Run ``func`` after all jobs submitted earlier, with nobody waiting for it.

        Its exceptions are lost, and an engine that is closed before its turn never runs it. Raises ``ClosedError``.
        """
        job = _Job(func, operation)
        with self._lock:
            if self._is_closing:
                raise ClosedError(operation, "the engine is closed" + (" (forked process)" * self.is_forked))
            self._queue.put(job)

    def cancel(self, grace_s: float | None = None, patience_s: float = 0.0) -> None:
        """End the running job: ask it first, stop it after ``grace_s``. Without one nothing happens.

        The grace of a deadline is processor time, within bounds; by default it is :data:`GRACE_S` of real time.
        With ``patience_s`` it is only ended if the guest call that runs now still runs after that time.
        """
        with self._lock:
            job, call = self._current, self._guest.busy_call
            if job is None:
                return
            if not patience_s:
                self._cancel(job, grace_s)
                return

        def look() -> None:
            with self._lock:
                if job is self._current and call and self._guest.busy_call == call:
                    self._cancel(job, grace_s)

        watchdog.watch(time.monotonic() + patience_s, look)

    def refuse(self) -> None:
        """Refuse the guest call that an overdue job is about to make, once: its cleaning up may need some."""
        with self._lock:
            job, self.overdue = self.overdue, None
        if job is not None:
            raise job.overdue_error()

    def request_close(self) -> None:
        """Close later, on the engine's thread; may be called by the garbage collector, so it takes no lock."""
        self._queue.put(None)

    def close(self) -> None:
        """End the running job, refuse queued ones, free the sandbox; ``HostError`` if a guest thread does not end."""
        with self._lock:
            is_first = not self._is_closing
            self._is_closing = True
            if is_first:
                self._queue.put(None)
            if self._current is not None:
                self._current.is_cancelled = True
                self._guest.set_cancel(True)
        if threading.get_ident() == self.ident:
            return  # the thread frees everything when this job has ended
        try:
            self._wait_ended()
        except BaseException:
            self.stop_current("the engine was closed")
            raise
        if is_first and self._close_error is not None:
            raise self._close_error

    def after_fork(self) -> None:
        """Mark a copy of this object in a forked child, where its thread does not exist, as closed."""
        self._lock = threading.RLock()
        self._is_closing = self.is_forked = True
        self.ident = _NO_THREAD
        self._guest.abandon()
        self._ended.set()

    # -- the engine's thread ------------------------------------------------------------------------------------------

    def _main(self) -> None:
        self.ident, self._cpu_s = threading.get_ident(), thread_clock()
        try:
            while True:
                job = self._queue.get()
                if job is None:
                    break
                self._execute(job)
                del job  # or an idle engine would keep alive what the last job refers to
        finally:
            self._finish()

    def _execute(self, job: _Job) -> None:
        with self._lock:
            if job.state is not _State.QUEUED:
                return
            if self._is_closing:
                job.fail(ClosedError(job.operation, "the engine was closed"))
                return
            job.state = _State.RUNNING
            self._current = job
        job.execute()
        with self._lock:
            self._current = self.overdue = None
            if job.is_cancelled:
                self._guest.set_cancel(False)
            if job.is_overdue:
                job.tell_overdue()
        job.finish()

    def _finish(self) -> None:
        with self._lock:
            self._is_closing = True
            while not self._queue.empty():
                job = self._queue.get()
                if job is not None and job.state is _State.QUEUED:
                    job.fail(ClosedError(job.operation, "the engine was closed"))
        try:
            self._guest.shut()
        except BaseException as error:
            self._close_error = error
        finally:
            _live.discard(self)
            self.ident = _NO_THREAD
            self._ended.set()

    # -- ending a job -------------------------------------------------------------------------------------------------

    def _abandon(self, job: _Job) -> None:
        """Withdraw or end a job nobody waits for any more, after an interrupt of its caller."""
        with self._lock:
            if job.state is _State.QUEUED:
                job.state = _State.WITHDRAWN
                return
            if job is self._current:
                self._cancel(job)
        deadline = time.monotonic() + _ABANDON_S
        while job.state is not _State.DONE and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def _look_at_deadline(self, job: _Job) -> None:
        """Withdraw or end a job whose deadline has come; on the watchdog's thread."""
        with self._lock:
            if job.state is _State.QUEUED:
                job.fail(job.overdue_error())
            elif job is self._current and job.deadline is not None and not job.is_shared:
                job.is_overdue = True
                self.overdue = job
                self._cancel(job, job.deadline.grace_s)

    def _cancel(self, job: _Job, grace_s: float | None = None) -> None:
        """Ask a job to end, and have the watchdog stop it when it does not; under the lock."""
        if not job.is_cancelled:
            job.is_cancelled = True
            self._guest.set_cancel(True)
            watchdog.watch(time.monotonic() + _POLL_S, _Press(self, job, grace_s).look)

    def stop_current(self, reason: str, job: _Job | None = None, call: int | None = None) -> None:
        """Stop the guest for good if ``job``, or whatever job, runs, and in it that guest call, or any."""
        with self._lock:
            if self._current is None or (job is not None and self._current is not job):
                return
            if call is None or self._guest.busy_call == call:
                self._guest.stop(reason)

    def _wait_ended(self) -> None:
        started = time.monotonic()
        while not self._ended.wait(_POLL_S):
            waited = time.monotonic() - started
            if waited >= GRACE_S:
                self.stop_current("the engine was closed")
            if waited >= _CLOSE_S:
                raise HostError("close the engine", "its thread does not end")


class _Press:
    """Stops a cancelled job that does not end, again and again: the flag lies in the guest's own memory."""

    def __init__(self, jobs: JobThread, job: _Job, grace_s: float | None) -> None:
        """``grace_s`` is how long one guest call may go on; ``None``: :data:`GRACE_S`, and no longer."""
        self._jobs, self._job = jobs, job
        self._grace_s, self._busy_s = (GRACE_S, 0.0) if grace_s is None else (grace_s, _BUSY_S)
        self._started = time.monotonic()
        self._note(jobs.busy_call, self._started)

    def look(self) -> float | None:
        """Stop the guest if it is time to; on the watchdog's thread."""
        if self._job.state is _State.DONE:
            return None
        now, call = time.monotonic(), self._jobs.busy_call
        if call != self._call:
            self._note(call, now)
        if call and (self._is_deaf(now) or now - self._started >= _JOB_GRACE_S):
            why = "its deadline came" if self._job.is_overdue else "it was cancelled"
            self._jobs.stop_current(f"it did not end in time after {why}", self._job, call)
        return now + _POLL_S

    def _note(self, call: int, now: float) -> None:
        self._call, self._since, self._cpu_since = call, now, self._jobs.cpu_times()

    def _is_deaf(self, now: float) -> bool:
        """Whether one of the guest's threads had its time: of the processor, unless others have that for too long."""
        over_s = now - self._since - self._grace_s
        if over_s < 0:
            return False
        used = self._jobs.cpu_times().items()
        return over_s >= self._busy_s or any(
            cpu_s - self._cpu_since.get(thread, 0.0) >= self._grace_s for thread, cpu_s in used
        )


_live: set[JobThread] = set()
_live_lock = threading.Lock()


def close_all() -> None:
    """End every guest before the interpreter goes: a thread that came back into it later would crash the process."""
    with _live_lock:
        live = list(_live)
    for jobs in live:
        with suppress(Exception):
            jobs.close()


def _after_fork() -> None:
    global _live_lock
    _live_lock = threading.Lock()
    for jobs in list(_live):
        jobs.after_fork()
    _live.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
