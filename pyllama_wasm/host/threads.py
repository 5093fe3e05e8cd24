"""Python threads that run guest code, and the guest's own threads among them."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

from .wasi_errno import Errno

MAX_WASM_STACK_BYTES = 4 << 20
"""Stack a guest thread's compiled code may use; beyond it the guest traps."""

_THREAD_STACK_BYTES = 16 << 20
"""Wasmtime does not look at the real stack, so it must hold the guest's share and the host's calls on top of it."""

WAIT_SLICE_S = 0.05 if sys.platform == "win32" else 3600.0
"""Longest wait on a lock: on Windows Ctrl-C does not interrupt one."""

_START_TRIES = 3

_start_lock = threading.Lock()


def _after_fork() -> None:
    global _start_lock
    _start_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def start_thread(target: Callable[[], None], name: str) -> threading.Thread:
    """Start a daemon thread with a stack large enough for guest code. Raises ``RuntimeError`` when there is no room."""
    for _ in range(_START_TRIES):
        may_run: SimpleQueue[bool] = SimpleQueue()

        def main(may_run: SimpleQueue[bool] = may_run) -> None:
            if may_run.get():
                target()

        thread = threading.Thread(target=main, name=name, daemon=True)
        with _start_lock:  # the size is a setting of the whole process, which others may change at any moment
            previous = threading.stack_size(_THREAD_STACK_BYTES)
            size = 0
            try:
                thread.start()
            finally:
                size = threading.stack_size(previous)
                may_run.put(size == _THREAD_STACK_BYTES)
        if size == _THREAD_STACK_BYTES:
            return thread
        threading.stack_size(size)  # it is what somebody else has asked for meanwhile
    raise RuntimeError("another thread keeps changing threading.stack_size")


def thread_clock() -> Callable[[], float]:
    """Return a clock of the processor time that the calling thread has used, for any thread to read, in seconds.

    Where the system has none it is the time of day; so it is when the thread has ended.
    """
    if not hasattr(time, "pthread_getcpuclockid"):
        return time.monotonic
    clock = time.pthread_getcpuclockid(threading.get_ident())
    gettime: Callable[[int], float] = getattr(time, "clock_gettime", lambda _: time.monotonic())

    def read() -> float:
        try:
            return gettime(clock)
        except OSError:
            return time.monotonic()

    return read


class Workers:
    """The guest threads of one sandbox, at most ``limit`` at a time."""

    def __init__(self, limit: int, run: Callable[[int, int], None]) -> None:
        """``run(tid, argument)`` is the body of a thread; it must not raise."""
        self.limit = limit
        self._run = run
        self._changed = threading.Condition()
        self._n_alive = 0
        self._last_tid = 0
        self._idents: set[int] = set()
        self._clocks: dict[int, Callable[[], float]] = {}
        self._is_closed = False

    def spawn(self, argument: int) -> int:
        """Start a thread and return its number, or minus ``EAGAIN``."""
        with self._changed:
            if self._is_closed or self._n_alive >= self.limit:
                return -Errno.AGAIN
            self._n_alive += 1
            self._last_tid += 1
            tid = self._last_tid
        try:
            start_thread(lambda: self._main(tid, argument), f"pyllama-guest-{tid}")
        except RuntimeError:
            self._ended(0, tid)
            return -Errno.AGAIN
        return tid

    def is_current_thread(self) -> bool:
        """Whether the calling thread is one of these."""
        return threading.get_ident() in self._idents

    def cpu_times(self) -> dict[int, float]:
        """Return the processor time that each of these has used, in seconds, by its number."""
        with self._changed:
            return {tid: cpu_s() for tid, cpu_s in self._clocks.items()}

    def wait_until_none(self, timeout_s: float, nudge: Callable[[], None]) -> bool:
        """Wait for all threads to end, calling ``nudge`` every few milliseconds; False when the time is up."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while self._n_alive:
                nudge()
                if time.monotonic() >= deadline:
                    return False
                self._changed.wait(0.01)
        return True

    def close(self) -> None:
        """Refuse further threads."""
        with self._changed:
            self._is_closed = True

    def _main(self, tid: int, argument: int) -> None:
        ident = threading.get_ident()
        self._idents.add(ident)
        with self._changed:
            self._clocks[tid] = thread_clock()
        try:
            self._run(tid, argument)
        finally:
            self._ended(ident, tid)

    def _ended(self, ident: int, tid: int) -> None:
        with self._changed:
            self._idents.discard(ident)
            self._clocks.pop(tid, None)
            self._n_alive -= 1
            self._changed.notify_all()
