"""The engine: one sandbox and the thread it lives on."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TypeVar

from ..deadline import Deadline, current_deadline
from ..errors import CancelledError, HostError, OutputLimitError, RequestError, printable
from .blas import uses_blas
from .callbacks import Signature
from .ffi import Number
from .files import FileTable
from .jobs import JobThread, close_all
from .memory import Memory
from .module import CompiledModule, load_module
from .sandbox import Sandbox
from .watchdog import Watch, watchdog

T = TypeVar("T")

_GIVES_BACK = ("free", "close")  # such calls are let through when a deadline has come


class Engine:
    """One sandbox with one linear memory: a model and everything that must share its memory.

    Guest calls happen on a thread of the engine's own, one at a time, in order of arrival. Every method may be called
    from any thread. An engine dies of any trap in any of its threads, and never takes the process with it; then
    :attr:`is_dead` is true, calls raise ``GuestDiedError``, and :meth:`close` still frees everything.
    """

    uses_blas: bool
    """Whether numpy's BLAS does large matrix products."""

    def __init__(
        self,
        *,
        memory_limit_bytes: int | None = None,
        n_threads: int | None = None,
        load: str = "map",
        blas: bool | None = None,
        deterministic: bool = False,
        module: CompiledModule | None = None,
    ) -> None:
        """Make an instance of ``module`` (default: the package's ``llama.wasm``) and run its constructors.

        ``memory_limit_bytes`` bounds the guest's memory, mapped model files included (default and most: 4 GiB).
        ``n_threads`` bounds the guest threads that run at a time (default: the CPUs this process may use).
        ``load`` is ``"map"`` (files are mapped where the platform can) or ``"copy"``; copy files that somebody may
        truncate meanwhile, since touching a mapped page that the file has lost ends the process (SIGBUS).
        ``blas`` says whether numpy's BLAS does large matrix products; ``None``: where it is known to be fast.
        ``deterministic`` code gives the same bits on every processor; BLAS, which does not, is then off.
        """
        if deterministic and blas:
            raise RequestError("create an engine", "deterministic=True and blas=True contradict each other")
        if load not in ("map", "copy"):
            raise RequestError("create an engine", f"load={load!r} is neither 'map' nor 'copy'")
        self.n_threads = default_n_threads() if n_threads is None else n_threads
        if self.n_threads < 1:
            raise RequestError("create an engine", f"n_threads={n_threads} is less than 1")
        compiled = module if module is not None else load_module(deterministic=deterministic)
        if deterministic and not compiled.is_deterministic:
            raise RequestError("create an engine", "the module was not compiled with deterministic=True")
        self.is_deterministic = compiled.is_deterministic
        self.module_digest = compiled.digest
        """Names the content of the module."""

        self.uses_blas = uses_blas(False if deterministic else blas)
        sandbox = Sandbox(compiled, memory_limit_bytes, self.n_threads, load, self.uses_blas)
        self._sandbox = sandbox
        self.load, self.memory_limit_bytes = load, sandbox.memory.max_bytes
        self.imports = tuple(sorted(f"{item.module}.{item.name}" for item in compiled.module.imports))
        """Everything the module can reach outside itself, its memory among it."""

        self.deadline_s: float | None = None
        """How long a job may take, in seconds, where no deadline holds for the calls of its thread."""

        self.output_bytes: int | None = None
        """Most bytes that :meth:`check_output` lets through."""

        try:
            self._jobs = JobThread(sandbox, "pyllama-engine")
        except HostError:  # there is no thread that could do it
            sandbox.shut()
            raise
        # The thread does not refer to this object, so a forgotten engine is closed when it is collected.
        self._finalizer = weakref.finalize(self, self._jobs.request_close)
        self._finalizer.atexit = False
        self._call = sandbox.call
        try:
            self._jobs.run(sandbox.open, "start the module")
        except BaseException:
            self._jobs.close()
            raise

    @property
    def is_closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._jobs.is_closed

    @property
    def is_dead(self) -> bool:
        """Whether the guest has trapped, aborted or been stopped."""
        return self._sandbox.failures.death is not None

    @property
    def memory(self) -> Memory:
        """The guest's memory."""
        return self._sandbox.memory

    @property
    def files(self) -> FileTable:
        """The files the guest may open."""
        return self._sandbox.files

    @property
    def callback_signatures(self) -> Mapping[int, Signature]:
        """The types of Python callbacks by kind; set once by the layer that knows the generated table."""
        return self._sandbox.callbacks.signatures

    @callback_signatures.setter
    def callback_signatures(self, signatures: Mapping[int, Signature]) -> None:
        self._sandbox.callbacks.signatures = dict(signatures)

    @property
    def cancel_requested(self) -> bool:
        """Whether the running job has been cancelled; long jobs look at it between guest calls."""
        return self._jobs.cancel_requested

    def check_time(self, operation: str) -> None:
        """Raise when the call is to end: between two pieces of long work of the host, on whatever thread.

        On the engine's thread ``CancelledError``, which becomes ``DeadlineError`` where it was a deadline that ended
        the job; on others ``DeadlineError``.
        """
        if threading.get_ident() == self._jobs.ident:
            if self._jobs.cancel_requested:
                raise CancelledError(operation, "it was cancelled")
        elif (deadline := current_deadline()) is not None:
            deadline.check(operation)

    def run(self, func: Callable[[], T], operation: str = "call") -> T:
        """Run ``func`` on the engine's thread and return its result; its exceptions pass through.

        Jobs of all callers take turns in order of arrival; a job that is already on the engine's thread runs ``func``
        at once. When the waiting caller is interrupted (Ctrl-C), a job not yet begun is withdrawn, and a running one
        is cancelled as by :meth:`cancel`; the interrupt is raised again when it has ended.

        The deadline that holds for the calling thread holds for the job too: ``DeadlineError``.
        """
        deadline = current_deadline()
        if deadline is None and self.deadline_s is not None and threading.get_ident() != self._jobs.ident:
            deadline = Deadline(self.deadline_s)
        return self._jobs.run(func, operation, deadline)

    def run_unbounded(self, func: Callable[[], T], operation: str = "call", turn: Deadline | None = None) -> T:
        """Run ``func`` as :meth:`run` does, whatever deadline holds: to free something, or for several callers.

        It is withdrawn if its turn has not come by ``turn``: ``DeadlineError``.
        """
        return self._jobs.run(func, operation, turn, is_shared=True)

    def watch(self, at: float, look: Callable[[], float | None]) -> Watch:
        """Call ``look`` at a time of ``time.monotonic``, on the watchdog's thread; it returns when to look again."""
        return watchdog.watch(at, look)

    def post(self, func: Callable[[], None], operation: str = "call") -> None:
        """Run ``func`` on the engine's thread in its turn, with nobody waiting for it; from any thread.

        Its exceptions are lost, and when the engine is closed first it never runs. Raises ``ClosedError``.
        """
        self._jobs.post(func, operation)

    @property
    def none_waits(self) -> Callable[[], bool]:
        """Return the function that tells whether no job waits for the running one; a long one should let others."""
        return self._jobs.none_waits

    def call(self, export: str, *args: Number) -> Number | None:
        """Call one guest export with plain numbers; integers wrap to their width.

        An i32 or i64 result is signed: mask a pointer by ``& 0xFFFFFFFF``. Raises ``GuestAbortError``,
        ``GuestTrapError`` or ``GuestStoppedError`` when the guest dies in it, ``GuestDiedError`` when it died before,
        ``ClosedError`` after :meth:`close`, and whatever a Python callback raised in it.
        """
        jobs = self._jobs
        if threading.get_ident() == jobs.ident:
            if jobs.overdue is not None and not export.endswith(_GIVES_BACK):
                jobs.refuse()
            return self._call(export, *args)
        return self.run(lambda: self._call(export, *args), export)

    def cancel(self, grace_s: float | None = None, patience_s: float = 0.0) -> None:
        """End the running job, if any: cleanly when it ends in time, else by stopping the guest for good.

        In time is within 0.1 s, or within ``grace_s``, which is longer where others have the processor.

        With ``patience_s`` only if the guest call that runs now is not over by then.
        """
        self._jobs.cancel(grace_s, patience_s)

    def check_output(self, n_bytes: int, operation: str, least: int = 0) -> None:
        """Raise ``OutputLimitError`` for more bytes than a call may bring out of the sandbox and than ``least``."""
        if self.output_bytes is not None and n_bytes > max(self.output_bytes, least):
            reason = f"the result has {n_bytes} bytes or more, and may have {max(self.output_bytes, least)}"
            raise OutputLimitError(operation, reason, "raise output_bytes")

    def register(self, func: Callable[..., object]) -> int:
        """Make a Python function callable by the guest; return the id to pass as its ``user_data``."""
        return self._sandbox.callbacks.register(func)

    def unregister(self, func_id: int) -> None:
        """Take back :meth:`register`; a guest that still calls the id traps."""
        self._sandbox.callbacks.unregister(func_id)

    @property
    def name(self) -> str:
        """What runs in the sandbox, for log records (their ``model``); empty until somebody sets it."""
        return self._sandbox.log.name

    @name.setter
    def name(self, name: str) -> None:
        self._sandbox.log.name = printable(name)

    def add_log_handler(self, handler: Callable[[int, str], None]) -> None:
        """Call ``handler(level, line)`` for each line the guest logs, on the guest's thread; warnings are 3, errors 4.

        All lines also go to ``logging.getLogger("pyllama_wasm.guest")``.
        """
        self._sandbox.log.handlers.append(handler)

    def close(self) -> None:
        """End what runs, refuse what waits, and free memory, threads and files. Again is fine; from any thread.

        From a job on the engine's own thread it takes effect when that job has ended. Raises ``HostError`` if a guest
        thread does not end (a module without safepoints); its memory is then kept.
        """
        self._finalizer.detach()
        self._jobs.close()

    def __enter__(self) -> Engine:
        """Return the engine."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the engine."""
        self.close()


def default_n_threads() -> int:
    """Return the number of CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


atexit.register(close_all)
