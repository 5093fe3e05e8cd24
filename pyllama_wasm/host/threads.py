"""Python threads that run guest code, and the guest's own threads among them."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

from .wasi_errno import Errno

MAX_WASM_STACK_BYTES = 4 << 20
"""Stack a guest thread's compiled code may use; beyond it the guest traps."""

_THREAD_STACK_BYTES = 16 << 20
"""Wasmtime does not look at the real stack, so it must hold the guest's share and the host's calls on top of it."""

WAIT_SLICE_S = 0.05 if sys.platform == "win32" else 3600.0
"""Longest wait on a lock: on Windows Ctrl-C does not interrupt one."""

_start_lock = threading.Lock()


def start_thread(target: Callable[[], None], name: str) -> threading.Thread:
    """Start a daemon thread with a stack large enough for guest code. Raises ``RuntimeError`` when there is no room."""
    thread = threading.Thread(target=target, name=name, daemon=True)
    with _start_lock:  # the size is a setting of the whole process
        previous = threading.stack_size(_THREAD_STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(previous)
    return thread


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
            self._ended(0)
            return -Errno.AGAIN
        return tid

    def is_current_thread(self) -> bool:
        """Whether the calling thread is one of these."""
        return threading.get_ident() in self._idents

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
        try:
            self._run(tid, argument)
        finally:
            self._ended(ident)

    def _ended(self, ident: int) -> None:
        with self._changed:
            self._idents.discard(ident)
            self._n_alive -= 1
            self._changed.notify_all()
