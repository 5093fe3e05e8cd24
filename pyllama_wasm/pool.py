"""The contexts of a model's generations: reused, grown lazily, waited for when memory is short."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from .context import Context
from .errors import OutOfMemoryError

if TYPE_CHECKING:
    from .loaded_model import LoadedModel

__all__ = ["ContextPool", "step_tokens"]

MAX_CONTEXTS = 16
"""Most contexts of one model; further calls wait for one to come free."""

MAX_IDLE = 8
"""Most contexts kept for later calls."""

# A prefill step is one turn among the calls that share a model, and Ctrl-C waits for its current matrix product:
# large models take smaller steps. 4e11 operations are some seconds of one desktop CPU.
_OPERATIONS_PER_STEP = 4e11
_SMALLEST_STEP = 32

_POLL_S = 0.05


def step_tokens(n_params: int) -> int:
    """Return how many prompt tokens of a model with ``n_params`` weights one turn should compute, a power of two."""
    fitting = int(_OPERATIONS_PER_STEP / (2 * max(n_params, 1)))
    return max(_SMALLEST_STEP, 1 << max(fitting, 1).bit_length() - 1)


class ContextPool:
    """Hands a context of its own to every generation. Usable from any thread."""

    def __init__(self, model: LoadedModel) -> None:
        """Start without contexts."""
        self._model = model
        self._lock = threading.Lock()
        self._idle: list[Context] = []
        self._n_contexts = 0
        # Filled without any lock: a generator that is garbage collected gives its context back in whatever thread
        # and at whatever moment that happens.
        self._returned: queue.SimpleQueue[Context] = queue.SimpleQueue()

    def acquire(self, n_ctx: int, check: Callable[[], None]) -> Context:
        """Return a context with room for ``n_ctx`` tokens, empty or to be cleared by the caller.

        Waits while memory or ``MAX_CONTEXTS`` allow no other and somebody else has one; ``check`` is called
        meanwhile and ends the wait by raising. Raises ``OutOfMemoryError`` when waiting cannot help.
        """
        while True:
            check()
            found, surplus, may_grow = self._take(n_ctx)
            for context in surplus:
                self._drop(context)
            if found is not None:
                return found
            if may_grow:
                try:
                    return self._grow(n_ctx)
                except OutOfMemoryError:
                    if not self._make_room():
                        raise
                    continue
            returned = self._wait_returned()
            if returned is not None and returned.n_ctx >= n_ctx:
                return returned
            self._keep(returned)

    def release(self, context: Context) -> None:
        """Give a context back; never blocks and calls no guest code."""
        self._returned.put(context)

    def clear(self) -> None:
        """Forget all contexts of a model that is closed."""
        with self._lock:
            self._collect()
            self._idle.clear()
            self._n_contexts = 0

    def _take(self, n_ctx: int) -> tuple[Context | None, list[Context], bool]:
        """Return the smallest idle context that is large enough, contexts to close, and whether one may be added."""
        with self._lock:
            self._collect()
            fitting = [context for context in self._idle if context.n_ctx >= n_ctx]
            found = min(fitting, key=lambda context: context.n_ctx) if fitting else None
            if found is not None:
                self._idle.remove(found)
            surplus: list[Context] = []
            while len(self._idle) > MAX_IDLE or (
                found is None and self._idle and self._n_contexts - len(surplus) >= MAX_CONTEXTS
            ):
                surplus.append(self._idle.pop(0))
            self._n_contexts -= len(surplus)
            may_grow = found is None and self._n_contexts < MAX_CONTEXTS
            if may_grow:
                self._n_contexts += 1
            return found, surplus, may_grow

    def _grow(self, n_ctx: int) -> Context:
        """Create the context that ``_take`` has counted."""
        model = self._model
        limits = model.context_params
        n_batch = min(step_tokens(model.n_params), limits.n_ubatch, limits.n_batch)
        params = replace(limits, n_ctx=n_ctx, n_batch=n_batch, n_ubatch=n_batch, n_seq_max=1, n_outputs_max=1)
        try:
            return Context(model, params)
        except BaseException:
            with self._lock:
                self._n_contexts -= 1
            raise

    def _make_room(self) -> bool:
        """After a failed growth close an idle context, or wait for one to come back; False: there is none."""
        with self._lock:
            self._collect()
            context = self._idle.pop(0) if self._idle else None
            self._n_contexts -= context is not None
            n_left = self._n_contexts
        if context is not None:
            self._drop(context)
            return True
        if not n_left:
            return False
        self._keep(self._wait_returned())
        return True

    def _wait_returned(self) -> Context | None:
        """Wait a little for a context that somebody gives back.

        Who gets one uses or keeps it: handing it on would have all waiting threads wake each other without end.
        """
        try:
            return self._returned.get(timeout=_POLL_S)
        except queue.Empty:
            return None

    def _keep(self, context: Context | None) -> None:
        """Count a context that does not fit this call among the idle ones."""
        if context is not None:
            with self._lock:
                self._idle.append(context)

    def _collect(self) -> None:
        """Move what was given back to the idle ones; under the lock."""
        while True:
            try:
                self._idle.append(self._returned.get_nowait())
            except queue.Empty:
                return

    def _drop(self, context: Context) -> None:
        context.close()
