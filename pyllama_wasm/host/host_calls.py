"""The ``host.*`` imports: files in memory, threads, the log, aborts and Python callbacks."""

from __future__ import annotations

from dataclasses import dataclass

from .blas import Blas
from .callbacks import Callbacks
from .descriptors import Descriptors
from .failure import Failures
from .log import MESSAGE_LIMIT_BYTES, GuestLog
from .mapping import FileMapping
from .memory import Memory, MemoryFault
from .shared_memory import PAGE_BYTES
from .threads import Workers
from .wasi_errno import Errno, WasiError

_ABORT_LIMIT_BYTES = 4096


@dataclass(frozen=True)
class HostCalls:
    """The calls of one sandbox; every public method is one import."""

    memory: Memory
    mapping: FileMapping
    descriptors: Descriptors
    workers: Workers
    callbacks: Callbacks
    log_sink: GuestLog
    failures: Failures
    blas: Blas

    def map_file(self, fd: int, offset: int, size_bytes: int, out: int) -> int:
        """Bring an open file into guest memory and write its address to ``out``."""
        open_file = self.descriptors.get(fd)
        self.memory.check(out, 4, writable=True)
        file_bytes = open_file.file.size_bytes()
        if size_bytes <= 0 or offset % PAGE_BYTES or not 0 <= offset < file_bytes:
            raise WasiError(Errno.INVAL)
        if size_bytes > self.memory.max_bytes:
            raise WasiError(Errno.NOMEM)
        host_fd = open_file.file.acquire()
        # What the guest may write it may also cut, and touching a mapped page that the file has lost ends the process.
        mappable_fd = None if open_file.file.is_writable else host_fd
        try:
            address = self.mapping.map(mappable_fd, offset, size_bytes, file_bytes, open_file.file.read_at)
        finally:
            open_file.file.release()
        if address is None:
            raise WasiError(Errno.NOMEM)
        self.memory.set_u32(out, address)
        return 0

    def unmap_file(self, address: int, size_bytes: int) -> int:
        """Give back part of what :meth:`map_file` brought in."""
        if not self.mapping.unmap(address, size_bytes):
            raise WasiError(Errno.INVAL)
        return 0

    def sgemm(self, *arguments: int) -> None:
        """Multiply two matrices; the guest traps where the arguments are bad."""
        self.blas.sgemm(*arguments)

    def thread_spawn(self, argument: int) -> int:
        """Start a guest thread; its number, or minus ``EAGAIN`` while all granted slots are busy."""
        return self.workers.spawn(argument)

    def log(self, level: int, text: int, size: int) -> None:
        """Take a message of ``ggml_log``."""
        self.log_sink.write(level, self.memory.read(text, min(size, MESSAGE_LIMIT_BYTES)))

    def abort(self, text: int, size: int) -> None:
        """Keep the text of a failed assertion; the guest stops its threads and traps right after."""
        try:
            reason = self.memory.read(text, min(size, _ABORT_LIMIT_BYTES)).decode(errors="replace").strip()
        except MemoryFault:
            reason = "abort (its text lies out of bounds)"
        self.failures.abort_text(reason)

    def callback(self, kind: int, func_id: int, slots: int) -> int:
        """Call a registered Python function; 1, and the guest traps, when it raises."""
        try:
            self.callbacks.call(self.memory, kind, func_id, slots)
        except BaseException as error:
            self.failures.raised(error)
            return 1
        return 0
