"""What becomes of the limits a model is given: merged with its other arguments, and compared with what it needs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace

from .deadline import Deadline, current_deadline, nested
from .errors import ModelError, OutOfMemoryError, RequestError
from .estimate import estimate_source
from .limits import MAX_MEMORY_BYTES, Limits
from .params import ContextParams, ModelParams
from .source import ModelSource
from .threadpool import usable_cpus

__all__ = ["bounded", "check_fits", "merged_limits"]

_SMALLEST_CTX = 256
_ACCURACY = 0.9  # the estimate is right within 10 %: what may fit is tried


def merged_limits(limits: Limits | None, n_threads: int | None, memory_limit_bytes: int | None) -> tuple[Limits, int]:
    """Return the limits that hold, the arguments among them, and the number of threads to use.

    Raises ``RequestError`` for a number of threads that is none.
    """
    if limits is not None and not isinstance(limits, Limits):
        raise RequestError("load a model", f"limits is {type(limits).__name__} and not Limits")
    limits = limits or Limits()
    if n_threads is not None and (isinstance(n_threads, bool) or not isinstance(n_threads, int) or n_threads < 1):
        raise RequestError("load a model", f"n_threads is {n_threads!r} and not a positive integer")
    n_threads = usable_cpus() if n_threads is None else n_threads
    if limits.threads is not None:
        n_threads = min(n_threads, limits.threads)
    given = [n for n in (limits.memory_bytes, memory_limit_bytes) if n is not None]
    return replace(limits, memory_bytes=min(given) if given else None), n_threads


def check_fits(source: ModelSource, limits: Limits, params: ModelParams, context_params: ContextParams) -> None:
    """Raise ``OutOfMemoryError`` for a model that cannot fit ``memory_bytes``, going by its header alone.

    What is compared is the model with one context of the size asked for, else of a few tokens. Files whose header
    does not tell are let through: loading them says what is wrong, and the memory does not grow beyond its limit.
    """
    if limits.memory_bytes is None or params.vocab_only or params.no_alloc:
        return
    n_ctx = context_params.n_ctx or _SMALLEST_CTX
    n_batch = min(context_params.n_batch, n_ctx)
    try:
        smallest = replace(context_params, n_ctx=n_ctx, n_batch=n_batch, n_seq_max=1, n_outputs_max=1)
        estimate = estimate_source(source, smallest)
    except (ModelError, RequestError):
        return
    limit = min(limits.memory_bytes, MAX_MEMORY_BYTES)
    if estimate.total_bytes * _ACCURACY > limit:
        needed, has = (f"{n / 2**20:.0f} MiB" for n in (estimate.total_bytes, limit))
        reason = f"with a context of {n_ctx} tokens it takes about {needed} of memory, and may have {has}"
        raise OutOfMemoryError(source.operation, reason, "raise memory_limit_bytes or Limits.memory_bytes")


def bounded(limits: Limits, deadline_s: float | None) -> AbstractContextManager[Deadline | None]:
    """Have a deadline hold in the block: ``deadline_s``, else the one that holds already, else that of ``limits``."""
    if deadline_s is None and current_deadline() is None:
        deadline_s = limits.deadline_s
    return nested(deadline_s)
