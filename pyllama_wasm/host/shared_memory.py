"""The linear memory that all threads of one sandbox share.

wasmtime-py's own ``SharedMemory`` passes a pointer to a pointer in two places (its issue 318, open), so this is a class
of our own over the same four C functions.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import wasmtime
from wasmtime import _ffi

from ..errors import HostError

PAGE_BYTES = 65536
"""Size of a wasm page."""

MAX_PAGES = 65535
"""Most pages of a wasm32 memory that this package uses: 4 GiB less one page, so that every end fits 32 bits."""


class SharedMemory:
    """One reservation of address space, growing in place: its base address never changes.

    The reservation is held by a small object that numpy views of it also hold (through their base array). So a view
    that outlives the sandbox can never point at memory that belongs to somebody else.
    """

    def __init__(self, engine: wasmtime.Engine, min_pages: int, max_pages: int) -> None:
        """Reserve ``max_pages`` and commit ``min_pages``. Raises ``HostError`` when the system refuses."""
        self.max_bytes = max_pages * PAGE_BYTES
        ty = wasmtime.MemoryType(wasmtime.Limits(min_pages, max_pages), shared=True)
        self.pointer: Any = ctypes.POINTER(_ffi.wasmtime_sharedmemory_t)()
        error = _ffi.wasmtime_sharedmemory_new(engine.ptr(), ty.ptr(), ctypes.byref(self.pointer))
        ty.close()
        if error:
            failed = wasmtime.WasmtimeError._from_ptr(error)
            reason = str(failed).splitlines()[0]
            failed.close()
            raise HostError("reserve the sandbox's memory", reason, "is address space limited, as by ulimit -v?")
        data = _ffi.wasmtime_sharedmemory_data(self.pointer)
        self.base: int = ctypes.cast(data, ctypes.c_void_p).value or 0
        lease = _Lease(self.base, self.max_bytes)
        # Runs when the last reference is gone: ours, or that of the last numpy view.
        weakref.finalize(lease, _ffi.wasmtime_sharedmemory_delete, self.pointer).atexit = False
        self._lease = weakref.ref(lease)
        self.whole: npt.NDArray[np.uint8] = np.asarray(lease)

    @property
    def size_bytes(self) -> int:
        """Bytes the guest can use now."""
        return int(_ffi.wasmtime_sharedmemory_data_size(self.pointer))

    def grow(self, n_pages: int) -> int | None:
        """Grow by ``n_pages`` and return the old size in pages, or None when the ceiling is reached."""
        previous = ctypes.c_uint64()
        error = _ffi.wasmtime_sharedmemory_grow(self.pointer, n_pages, ctypes.byref(previous))
        if error:
            _ffi.wasmtime_error_delete(error)
            return None
        return previous.value

    def close(self, discard: Callable[[int, int], None]) -> None:
        """Give up the reservation; it is unmapped now, or with the last numpy view of it.

        With views left, ``discard(address, size)`` is asked to give the pages behind them back to the system.
        """
        size_bytes = self.size_bytes
        self.whole = np.empty(0, np.uint8)
        self.pointer = None
        lease = self._lease()  # holds the reservation while its pages are replaced
        if lease is not None:
            discard(self.base, size_bytes)


class _Lease:
    """What keeps the reservation: the base object of every numpy view of guest memory."""

    def __init__(self, address: int, size_bytes: int) -> None:
        self.__array_interface__ = {"data": (address, False), "shape": (size_bytes,), "typestr": "|u1", "version": 3}
