"""Links the host's functions to the names a module imports them by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import wasmtime

from ..errors import HostError
from . import ffi
from .failure import Failures, described
from .host_calls import HostCalls
from .import_table import ALLOWED_IMPORTS, MEMORY_IMPORT
from .shared_memory import SharedMemory
from .wasi import Wasi
from .wasi_errno import Errno, expected_errno

__all__ = ["ALLOWED_IMPORTS", "LinkedModule"]


class LinkedModule:
    """A module with every import resolved, from which each guest thread makes its instance."""

    def __init__(
        self, engine: wasmtime.Engine, module: wasmtime.Module, memory: SharedMemory, calls: HostCalls, wasi: Wasi
    ) -> None:
        """Define all imports of the table. Raises ``HostError`` when the module does not fit them."""
        self._engine = engine
        self._callbacks: list[Any] = []  # the C side holds bare pointers to these
        self._linker = wasmtime.Linker(engine)
        self._pre: wasmtime.InstancePre | None = None
        try:
            for (namespace, name), sig in ALLOWED_IMPORTS.items():
                func = getattr(calls if namespace == "host" else wasi, name)
                callback = ffi.host_function(sig, func, _answer(f"{namespace}.{name}", calls.failures))
                self._callbacks.append(callback)
                ffi.define_function(self._linker, namespace, name, sig, callback)
            with wasmtime.Store(engine) as store:
                ffi.define_shared_memory(self._linker, store, *MEMORY_IMPORT, memory.pointer)
            self._pre = self._linker.instantiate_pre(module)
        except wasmtime.WasmtimeError as error:
            self.close()
            raise HostError("link the module", str(error)) from error
        except BaseException:
            self.close()
            raise

    def instantiate(self, is_stopping: Callable[[], bool] | None = None) -> ffi.Instance:
        """Make a store and an instance for the calling thread; ``is_stopping`` as in :class:`~.ffi.Instance`."""
        if self._pre is None:
            raise HostError("instantiate the module", "the engine is closed")
        return ffi.Instance(self._engine, self._pre, is_stopping)

    def close(self) -> None:
        """Free everything. Only after every instance has been closed."""
        if self._pre is not None:
            self._pre.close()
            self._pre = None
        self._linker.close()
        self._callbacks.clear()


def _answer(name: str, failures: Failures) -> Callable[[BaseException], int]:
    """Return what a host function does with an exception: a number for the guest, and a record of what is no answer."""

    def answer(error: BaseException) -> int:
        code = expected_errno(error)
        if code is None:
            failure = HostError(f"answer the guest's call of {name}", described(error))
            failure.__cause__ = error
            failures.raised(failure)
            return int(Errno.IO)
        return int(code)

    return answer
