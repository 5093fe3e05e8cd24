"""Between event loops and threads: waiting for a generation without a thread, and for what only a thread can do."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, TypeVar

from .scheduler import MAX_SLOTS

if TYPE_CHECKING:
    from .generate import Generation

__all__ = ["Signal", "callers", "in_thread", "outcome", "ready", "workers"]

T = TypeVar("T")


class Signal:
    """Something a task of an event loop waits for, and any thread gives, once."""

    def __init__(self) -> None:
        """Belong to the loop that runs in this thread."""
        self._loop = asyncio.get_running_loop()
        self.is_lost = self._loop.is_closed
        """Whether nobody waits, since the loop is closed; it refers to nothing but the loop."""

        self._given = self._loop.create_future()

    def give(self) -> None:
        """Wake who waits; from any thread. Raises ``RuntimeError`` when the loop is closed."""
        self._loop.call_soon_threadsafe(self._give)

    def _give(self) -> None:
        if not self._given.done():
            self._given.set_result(None)

    async def wait(self) -> None:
        """Return when it was given."""
        await self._given


async def ready(generation: Generation[Any]) -> None:
    """Return when a generation has text to read, or its end; raises what ended what computes it.

    It has begun, and goes on only while somebody waits for it. Where the task is cancelled it is up to the caller to
    end it.
    """
    while not generation.is_ready:
        signal = Signal()
        generation.listen(signal.give, signal.is_lost)
        try:
            await signal.wait()
            generation.heard()
        except GeneratorExit:
            # The task is being collected, perhaps in a thread that is in the midst of the scheduler.
            generation.forget()
            raise
        except BaseException:
            generation.unlisten()
            raise
        generation.unlisten()


_pools: dict[str, ThreadPoolExecutor] = {}
_lock = threading.Lock()


def workers() -> ThreadPoolExecutor:
    """Return the threads for what blocks for a moment: tokenizing, templates, loading. As many as requests run."""
    return _pool("pyllama-async")


def callers() -> ThreadPoolExecutor:
    """Return the threads for calls that block until they have their answer. As many as requests run."""
    return _pool("pyllama-calls")


def _pool(name: str) -> ThreadPoolExecutor:
    with _lock:
        if name not in _pools:
            _pools[name] = ThreadPoolExecutor(MAX_SLOTS, name)
        return _pools[name]


async def outcome(future: Future[T]) -> T:
    """Wait for what a thread does and return its result."""
    signal = Signal()

    def give(_: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            signal.give()

    future.add_done_callback(give)
    await signal.wait()
    return future.result()


async def in_thread(
    func: Callable[[], T], lost: Callable[[T], object] | None = None, pool: ThreadPoolExecutor | None = None
) -> T:
    """Run ``func`` in a thread of our own, with the caller's context variables, and return its result.

    When the task is cancelled it is not begun, or its result is given to ``lost``, in that thread.
    """
    future = (pool or workers()).submit(copy_context().run, func)
    try:
        return await outcome(future)
    except BaseException:
        if not future.cancel() and lost is not None:
            future.add_done_callback(lambda done: done.exception() or lost(done.result()))
        raise


def _forget() -> None:
    global _lock
    _pools.clear()
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
