"""One sandbox: a module instance, its memory and everything it can reach."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NoReturn

from ..errors import ClosedError, GuestDiedError, GuestStoppedError, HostError, OutOfMemoryError, RequestError
from ..logs import one_line
from .blas import Blas
from .callbacks import Callbacks
from .descriptors import Descriptors
from .failure import Death, Failures, described
from .ffi import GuestTrap, Instance, Number, require_room
from .files import FileTable
from .host_calls import HostCalls
from .imports import LinkedModule
from .log import GuestLog
from .mapping import FileMapping
from .memory import Flag, Memory
from .module import CompiledModule
from .pages import platform_pages
from .shared_memory import PAGE_BYTES, SharedMemory
from .signals import trap_signals
from .threads import Workers
from .waker import Waker
from .wasi import Wasi

logger = logging.getLogger("pyllama_wasm.engine")

_WORKERS_END_S = 2.0  # waits in the guest are sliced, so its threads look at the stop flag often
_SHUT_S = 10.0
_START_BYTES = 1 << 20  # the guest's heap grows by so much at a time, and begins while it starts


class Sandbox:
    """The state of one engine. Guest calls happen on the engine's thread, apart from those of guest threads."""

    def __init__(
        self, module: CompiledModule, memory_limit_bytes: int | None, n_threads: int, load: str, blas: bool
    ) -> None:
        """Reserve the memory and link the module; nothing runs yet."""
        self.busy_call = 0
        self.failures = Failures(self._tell_death)
        self.callbacks = Callbacks()
        self.files = FileTable()
        self.workers = Workers(n_threads, self._run_worker)
        self._module = module
        self.log = GuestLog()
        self._stop, self._cancel = Flag(), Flag()
        self._n_calls = 0
        self._is_shutting = False
        self._main: Instance | None = None
        self._exports: dict[str, Callable[..., Number | None]] = {}
        pages = platform_pages(may_map=load == "map")
        self._discard = pages.release
        shared = SharedMemory(module.engine, module.min_pages, _max_pages(module, memory_limit_bytes))
        self.memory = Memory(shared)
        self.blas = Blas(self.memory, blas)
        try:
            descriptors = Descriptors(self.files)
            mapping = FileMapping(self.memory, pages, self.failures.check_stop)
            calls = HostCalls(
                self.memory, mapping, descriptors, self.workers, self.callbacks, self.log, self.failures, self.blas
            )
            wasi = Wasi(self.memory, descriptors, self.log, self.failures.check_stop)
            self._linked = LinkedModule(module.engine, module.module, shared, calls, wasi)
            self._waker = Waker(module.engine, shared) if module.is_interruptible else None
        except BaseException:
            self.memory.close(self._discard)
            raise

    def open(self) -> None:
        """Make the main instance and run its constructors. On the engine's thread."""
        trap_signals.restore()
        self.busy_call = self._n_calls = 1  # a module may have a start function
        try:
            self._main = self._instantiate()
        except GuestTrap as trap:
            self._die("start the module", trap)
        finally:
            self.busy_call = 0
        for flag, name in ((self._stop, "pw_stop"), (self._cancel, "pw_cancel")):
            address = self._main.global_i32(name)
            if address is not None:
                flag.attach(self.memory, address)
        if "_initialize" in self._module.exports:
            self._initialize()
        if "pw_set_n_threads" in self._module.exports:
            self.call("pw_set_n_threads", self.workers.limit)
        if "pw_set_blas" in self._module.exports:
            self.call("pw_set_blas", self.blas.kind)

    def _initialize(self) -> None:
        """Run the constructors, which take memory."""
        try:
            self.call("_initialize")
        except GuestDiedError as error:
            room = self.memory.max_bytes - self.memory.size_bytes
            if room >= _START_BYTES:
                raise
            reason = f"its memory starts with {self.memory.size_bytes} bytes and may grow by {room}"
            hint = f"memory_limit_bytes of at least {self.memory.size_bytes + _START_BYTES}"
            raise OutOfMemoryError("start the module", reason, hint) from error

    def call(self, export: str, *args: Number) -> Number | None:
        """Call an export of the main instance. On the engine's thread only."""
        if self.failures.death is not None:
            raise self.failures.died_earlier(export)
        func = self._exports.get(export) or self._bind(export)
        require_room()
        is_outermost = not self.busy_call
        if is_outermost:
            trap_signals.keep()
            self._n_calls += 1
            self.busy_call = self._n_calls
        try:
            result = func(*args)
        except GuestTrap as trap:
            self._die(export, trap)
        finally:
            if is_outermost:
                self.busy_call = 0
                self.blas.release()
        if not self.failures.is_quiet:
            self._raise_what_happened(export)
        return result

    def set_cancel(self, value: bool) -> None:
        """Set or clear the flag that asks the guest to end its call cleanly."""
        self._cancel.set(value)

    def stop(self, reason: str) -> None:
        """Make every guest thread trap at its next safepoint. The sandbox is dead then."""
        self.failures.stopping(reason)
        self._halt()

    def is_guest_thread(self) -> bool:
        """Whether the calling thread is one the guest started."""
        return self.workers.is_current_thread()

    def cpu_times(self) -> dict[int, float]:
        """Return the processor time that each guest thread has used, in seconds, by its number."""
        return self.workers.cpu_times()

    def shut(self) -> None:
        """End the guest threads and free everything. On the engine's thread, once."""
        self._is_shutting = True
        self.workers.close()
        self.stop("the engine was closed")
        if not self.workers.wait_until_none(_SHUT_S, self._halt):
            # Its code may run on for ever in this memory: keeping it is the only safe thing.
            self.blas.close()
            raise HostError("close the engine", "a guest thread does not end, its memory is not freed")
        self._stop.detach()
        self._cancel.detach()
        self.blas.close()
        self._exports.clear()
        self.callbacks.clear()
        if self._main is not None:
            self._main.close()
            self._main = None
        self._linked.close()
        if self._waker is not None:
            self._waker.close()
        self.memory.close(self._discard)
        self.files.close()
        self.log.close()

    def abandon(self) -> None:
        """Forget the flags and files in a forked child; its copies of them and of the memory go when it ends."""
        self._stop, self._cancel = Flag(), Flag()
        self.files = FileTable()
        self.blas.abandon()

    def _instantiate(self) -> Instance:
        return self._linked.instantiate((lambda: self.failures.is_stopping) if self._waker is not None else None)

    def _halt(self) -> None:
        """Make every guest thread end as soon as it can; again and again, as the flag lies in the guest's memory."""
        self._stop.set(1)
        if self._waker is not None:
            self._module.engine.increment_epoch()
            self._waker.step()

    def _bind(self, export: str) -> Callable[..., Number | None]:
        if self._main is None:
            raise ClosedError(export, "the engine is closed")
        sig = self._module.exports.get(export)
        if sig is None:
            raise HostError(f"call {export}", "the module exports no such function", "is the module up to date?")
        func = self._exports[export] = self._main.bind(export, sig)
        return func

    def _tell_death(self, death: Death) -> None:
        if self._is_shutting:
            return
        level = logging.WARNING if death.kind is GuestStoppedError else logging.ERROR
        extra = {"model": self.log.name}
        logger.log(level, "the sandbox died: %s: %s", death.kind.__name__, one_line(death.reason), extra=extra)
        if death.backtrace:
            logger.debug("wasm backtrace: %s", one_line(death.backtrace), extra=extra)

    def _die(self, operation: str, trap: GuestTrap) -> NoReturn:
        """Record a trap of the engine's thread, end the other threads, raise the typed error."""
        death = self.failures.record_trap(trap)
        raised = self.failures.take_raised()
        self._halt()
        self.workers.wait_until_none(_WORKERS_END_S, self._halt)
        raise death.error(operation) from raised

    def _raise_what_happened(self, operation: str) -> None:
        """After a call that ended well: raise what another thread, a host function or a stop has left behind."""
        death = self.failures.record_stop()
        raised = self.failures.take_raised()
        if death is not None:
            self._halt()
            self.workers.wait_until_none(_WORKERS_END_S, self._halt)
            raise death.error(operation) from raised
        if raised is not None:
            raise raised

    def _run_worker(self, tid: int, argument: int) -> None:
        """Be one guest thread: an instance of its own over the same memory."""
        try:
            instance = self._instantiate()
            try:
                sig = self._module.exports.get("pw_thread_start")
                if sig is None:
                    raise HostError("start a guest thread", "the module exports no pw_thread_start")
                instance.bind("pw_thread_start", sig)(tid, argument)
            finally:
                instance.close()
        except GuestTrap as trap:
            self.failures.record_trap(trap)
            self._halt()
        except BaseException as error:
            self.failures.raised(error)
            self.failures.record_trap(GuestTrap(described(error), False, ""))
            self._halt()


def _max_pages(module: CompiledModule, memory_limit_bytes: int | None) -> int:
    if memory_limit_bytes is None:
        return module.max_pages
    pages = memory_limit_bytes // PAGE_BYTES
    if pages < module.min_pages:
        reason = f"memory_limit_bytes={memory_limit_bytes} is below what the module starts with"
        raise RequestError("create a sandbox", reason, f"at least {module.min_pages * PAGE_BYTES}")
    return min(pages, module.max_pages)
