"""Checked access to guest memory: the one door between guest addresses and host bytes."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ClosedError, HostError
from .ranges import RangeSet
from .shared_memory import PAGE_BYTES, SharedMemory

ADDRESS_MASK = 0xFFFFFFFF
"""Guest addresses are unsigned 32-bit; as i32 results they arrive signed."""

_STRING_LIMIT = 1 << 20
_CHUNK_BYTES = 4096


class MemoryFault(HostError):
    """A guest address range is out of bounds, or a write touches a read-only mapped file."""


class Memory:
    """The memory of one sandbox. All methods may be called from any thread, and check before they touch.

    Other guest threads may change the bytes at any time: copy first, then validate the copy.
    """

    def __init__(self, shared: SharedMemory) -> None:
        """Wrap ``shared``; the engine owns and closes this object."""
        self.lock = threading.RLock()
        """Held by everything that touches guest memory, so that no range is mapped or freed beneath it."""
        self.mapped = RangeSet()
        """Ranges with a file mapped read-only. A host write to one would kill the process (SIGSEGV)."""
        self.for_files = RangeSet()
        """Ranges that files are mapped into, mapped now or at any moment."""
        self._shared: SharedMemory | None = shared
        self._bytes = shared.whole.data
        self._size = shared.size_bytes

    @property
    def size_bytes(self) -> int:
        """Bytes of guest memory now, mapped files included. Grows, never shrinks."""
        with self.lock:
            self._size = self._open().size_bytes
            return self._size

    @property
    def max_bytes(self) -> int:
        """The ceiling: bytes the memory can grow to."""
        return self._open().max_bytes

    def read(self, ptr: int, n: int) -> bytes:
        """Copy ``n`` bytes out."""
        with self.lock:
            start = self.check(ptr, n)
            return bytes(self._bytes[start : start + n])

    def write(self, ptr: int, data: bytes | bytearray | memoryview) -> None:
        """Copy ``data`` in. Raises :class:`MemoryFault`, and writes nothing, when any of it does not fit."""
        view = data.cast("B") if isinstance(data, memoryview) else data
        with self.lock:
            start = self.check(ptr, len(view), writable=True)
            self._bytes[start : start + len(view)] = view

    def read_cstr(self, ptr: int, limit: int = _STRING_LIMIT) -> bytes:
        """Copy a NUL-terminated string out, without the NUL; cut at ``limit`` bytes."""
        with self.lock:
            start = self.check(ptr, 1)
            end = min(start + limit, self.size_bytes)
            parts = []
            for at in range(start, end, _CHUNK_BYTES):
                part, nul, _ = bytes(self._bytes[at : min(at + _CHUNK_BYTES, end)]).partition(b"\0")
                parts.append(part)
                if nul:
                    return b"".join(parts)
            if end - start < limit:
                raise MemoryFault(f"read a string at {start:#x}", "it runs beyond the end of guest memory")
            return b"".join(parts)

    def view(
        self, ptr: int, shape: int | tuple[int, ...], dtype: npt.DTypeLike, writable: bool = False
    ) -> npt.NDArray[Any]:
        """Return a numpy array over guest memory, without a copy; read-only unless ``writable``.

        A writable one is refused where a file may be mapped meanwhile, as it is written to without the lock. It is
        valid for as long as the guest keeps that memory. After the engine is closed it reads as zeros (or as
        what it was, where the system has no ``mmap``); it can never reach memory of anybody else.
        """
        kind = np.dtype(dtype)
        if kind.hasobject:
            raise TypeError("a view of guest memory cannot hold Python objects")
        dims = (shape,) if isinstance(shape, int) else tuple(shape)
        n = kind.itemsize
        for dim in dims:
            if dim < 0:
                raise ValueError(f"negative dimension in {dims}")
            n *= dim
        with self.lock:
            start = self.check(ptr, n, writable)
            if writable:
                self._require_no_files(start, n)
            array = self._open().whole[start : start + n].view(kind).reshape(dims)
        array.flags.writeable = writable
        return array

    def matrix(self, ptr: int, n_rows: int, width: int, stride: int, writable: bool = False) -> npt.NDArray[np.float32]:
        """Return a float32 matrix over guest memory whose rows lie ``stride`` numbers apart, without a copy.

        To be written to without the lock it asks for ``writable``, and is then refused where a file may be mapped
        meanwhile. Sizes are positive. For host functions: it is not read-only otherwise. Raises :class:`MemoryFault`.
        """
        n = 4 * ((n_rows - 1) * stride + width)
        with self.lock:
            start = self.check(ptr, n)
            if start % 4:
                raise MemoryFault(f"use a matrix at {start:#x}", "not aligned to 4 bytes")
            if writable:
                self._require_no_files(start, n)
            array: npt.NDArray[np.float32] = np.ndarray(
                (n_rows, width), np.float32, self._open().whole, start, (4 * stride, 4)
            )
            return array

    def u32(self, ptr: int) -> int:
        """Read an unsigned 32-bit integer."""
        return int.from_bytes(self.read(ptr, 4), "little")

    def set_u32(self, ptr: int, value: int) -> None:
        """Write an unsigned 32-bit integer."""
        self.write(ptr, (value & ADDRESS_MASK).to_bytes(4, "little"))

    def check(self, ptr: int, n: int, writable: bool = False) -> int:
        """Return ``ptr`` as an unsigned address after checking ``n`` bytes there; raise :class:`MemoryFault`."""
        start = ptr & ADDRESS_MASK
        end = start + n
        if n < 0 or (end > self._size and end > self.size_bytes):
            raise MemoryFault(f"access {n} bytes at {start:#x}", f"out of bounds of {self._size} bytes")
        if self._shared is None:
            raise ClosedError("access guest memory", "the engine is closed")
        if writable and n and self.mapped.overlaps(start, end):
            raise MemoryFault(f"write {n} bytes at {start:#x}", "a model file is mapped there read-only")
        return start

    @contextmanager
    def writable_buffer(self, ptr: int, n: int) -> Iterator[memoryview]:
        """Hold the lock and give a checked writable buffer, to read a file straight into guest memory."""
        with self.lock:
            start = self.check(ptr, n, writable=True)
            with self._bytes[start : start + n] as buffer:
                yield buffer

    @contextmanager
    def readable_buffer(self, ptr: int, n: int) -> Iterator[memoryview]:
        """Hold the lock and give a checked read-only buffer, to write guest memory straight to a file."""
        with self.lock:
            start = self.check(ptr, n)
            with self._bytes[start : start + n].toreadonly() as buffer:
                yield buffer

    def grow(self, n_pages: int) -> int | None:
        """Grow by ``n_pages`` of 64 KiB; return the address of the first, or None at the ceiling."""
        with self.lock:
            previous = self._open().grow(n_pages)
            return None if previous is None else previous * PAGE_BYTES

    def host_address(self, ptr: int) -> int:
        """Return the address in this process of a guest address; for :mod:`.mapping` and :class:`Flag` only."""
        return self._open().base + (ptr & ADDRESS_MASK)

    def close(self, discard: Callable[[int, int], None]) -> None:
        """Give the memory back. Only after every guest thread has ended; ``discard`` as in :mod:`.shared_memory`."""
        with self.lock:
            if self._shared is not None:
                shared, self._shared = self._shared, None
                self._size = 0
                self._bytes.release()
                self._bytes = memoryview(b"")
                self.mapped, self.for_files = RangeSet(), RangeSet()
                shared.close(discard)

    def _require_no_files(self, start: int, n: int) -> None:
        if n and self.for_files.overlaps(start, start + n):
            raise MemoryFault(f"write {n} bytes at {start:#x}", "model files are mapped there")

    def _open(self) -> SharedMemory:
        if self._shared is None:
            raise ClosedError("access guest memory", "the engine is closed")
        return self._shared


class Flag:
    """A 32-bit word of guest memory that the host may set at any moment, without waiting for the memory lock.

    The lock of its own makes sure that nobody writes to it after :meth:`detach`.
    """

    def __init__(self) -> None:
        """Start without a word: setting does nothing until :meth:`attach`."""
        self._lock = threading.Lock()
        self._cell: ctypes.c_uint32 | None = None

    def attach(self, memory: Memory, ptr: int) -> None:
        """Use the word at ``ptr``, which must be aligned and in bounds."""
        memory.view(ptr, 1, np.uint32, writable=True)  # where it may be written to at any time
        start = ptr & ADDRESS_MASK
        if start % 4:
            raise MemoryFault(f"use a flag at {start:#x}", "not aligned to 4 bytes")
        with self._lock:
            self._cell = ctypes.c_uint32.from_address(memory.host_address(start))

    def set(self, value: int) -> None:
        """Write the word; does nothing when there is none."""
        with self._lock:
            if self._cell is not None:
                self._cell.value = value

    def detach(self) -> None:
        """Forget the word, before its memory goes."""
        with self._lock:
            self._cell = None
