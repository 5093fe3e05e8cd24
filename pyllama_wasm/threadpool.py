"""The persistent ggml threadpool that all contexts of one engine share."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from .errors import OutOfMemoryError

if TYPE_CHECKING:
    from .native import Native

__all__ = ["Threadpool", "usable_cpus"]

# Workers sleep at once between two graphs instead of spinning: a sandbox shares its machine with others.
POLL = 0


def usable_cpus() -> int:
    """Return how many CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1


class Threadpool:
    """``ggml_threadpool`` with ``n_threads`` threads, the calling one included.

    Without it ggml would start and join its threads for every token. One pool serves all contexts of an engine,
    because only one of them computes at a time. Methods run on the engine thread.
    """

    def __init__(self, native: Native, n_threads: int) -> None:
        """Start the threads: ``ggml_threadpool_new``; nothing to start for one thread."""
        self._native, self._ptr = native, 0
        self.n_threads = n_threads
        if n_threads > 1:
            params = native.ggml_threadpool_params_default(n_threads)
            params["poll"] = POLL
            with native.array(bytes(params)) as ptr:
                self._ptr = int(native.ggml_threadpool_new(ptr))
            if not self._ptr:
                raise OutOfMemoryError("start the threads", "the sandbox could not start them", "use fewer threads")

    def attach(self, context_ptr: int) -> None:
        """Let the context compute on this pool: ``llama_attach_threadpool``."""
        if self._ptr:
            self._native.llama_attach_threadpool(context_ptr, self._ptr, self._ptr)
