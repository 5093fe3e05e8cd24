"""Waking a guest that waits for ever: ``memory.atomic.wait`` looks at no epoch, and only another guest can notify.

Our module's waits are short. A module that is not ours may park a thread at any address of its memory without a
timeout, so a guest of our own over the same memory notifies them all, a slice at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import wasmtime

from . import ffi
from .import_table import MEMORY_IMPORT
from .shared_memory import SharedMemory

_SLICE_BYTES = 4 << 20
"""What one step takes: some 10 ms, so that whoever makes it is not held up."""

_TEXT = """(module
  (import "env" "memory" (memory 0 65536 shared))
  (func (export "wake") (param $at i32) (param $n i32)
    (loop $next
      (drop (memory.atomic.notify (local.get $at) (i32.const -1)))
      (local.set $at (i32.add (local.get $at) (i32.const 4)))
      (br_if $next (local.tee $n (i32.sub (local.get $n) (i32.const 1)))))))"""


class Waker:
    """Wakes what waits in one shared memory. Any thread may call it."""

    def __init__(self, engine: wasmtime.Engine, memory: SharedMemory) -> None:
        """Make the guest that notifies."""
        self._lock = threading.Lock()
        self._memory, self._at = memory, 0
        linker = wasmtime.Linker(engine)
        with wasmtime.Store(engine) as store:
            ffi.define_shared_memory(linker, store, *MEMORY_IMPORT, memory.pointer)
        pre = linker.instantiate_pre(wasmtime.Module(engine, _TEXT))
        self._instance = ffi.Instance(engine, pre, lambda: False)
        pre.close()
        linker.close()
        self._wake: Callable[..., object] | None = self._instance.bind("wake", ffi.FuncSig("ii"))

    def step(self) -> None:
        """Wake what waits in the next slice of the memory; nothing while another thread does."""
        if self._lock.acquire(blocking=False):
            try:
                if self._wake is not None:
                    size = self._memory.size_bytes
                    at = self._at if self._at < size else 0
                    self._wake(at, min(_SLICE_BYTES, size - at) // 4)
                    self._at = at + _SLICE_BYTES
            finally:
                self._lock.release()

    def close(self) -> None:
        """Free it; before the memory goes."""
        with self._lock:
            self._wake = None
            self._instance.close()
