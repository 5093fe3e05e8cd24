"""Thin typed wrappers over ``wasmtime._ffi``, the C API as wasmtime-py binds it.

Why not wasmtime-py's own classes: its host functions go through a table without locks and hand exceptions over in one
module-wide variable (its issue 254), and ``Func.__call__`` asks for the function's type on every call. The C API itself
is thread-safe. What is dynamically typed about it ends in this file.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import wasmtime
from wasmtime import _ffi

from ..errors import HostError, printable

_SLOT_BYTES = ctypes.sizeof(_ffi.wasmtime_val_raw_t)
"""One ``wasmtime_val_raw_t``: 16 bytes, wide enough for a v128."""

_CELLS: dict[str, Any] = {"i": ctypes.c_int32, "I": ctypes.c_int64, "f": ctypes.c_float, "F": ctypes.c_double}
_UNPACK = {"i": "I", "I": "q", "f": "f", "F": "d"}
_VALTYPES = {
    "i": wasmtime.ValType.i32,
    "I": wasmtime.ValType.i64,
    "f": wasmtime.ValType.f32,
    "F": wasmtime.ValType.f64,
}
_NAMES = {"i": "i32", "I": "i64", "f": "f32", "F": "f64"}
_KINDS = {code: kind() for code, kind in _VALTYPES.items()}

_HOST_FUNCTION = ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_NO_FINALIZER: Any = ctypes.CFUNCTYPE(None, ctypes.c_void_p)()  # null

# A prototype of our own: with plain addresses as arguments ctypes converts nothing on the way, which halves the cost of
# a call. CFUNCTYPE functions release the GIL while the guest runs.
_call_unchecked: Any = ctypes.CFUNCTYPE(
    ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p
)(("wasmtime_func_call_unchecked", _ffi.dll))

Number = int | float
HostFunction = Callable[..., "int | None"]


@dataclass(frozen=True)
class FuncSig:
    """A wasm function type; each letter is one value: ``i`` i32, ``I`` i64, ``f`` f32, ``F`` f64."""

    params: str
    result: str = ""

    def __str__(self) -> str:
        """Return the type as ``(i32, i64) -> i32``."""
        params = ", ".join(_NAMES[code] for code in self.params)
        return f"({params})" + (f" -> {_NAMES[self.result]}" if self.result else "")


class GuestTrap(Exception):
    """The guest trapped; carries what wasmtime knows about it."""

    def __init__(self, reason: str, is_unreachable: bool, backtrace: str) -> None:
        """Keep the plain reason, whether it was an ``unreachable`` or an interruption, and the wasm backtrace."""
        super().__init__(reason)
        self.reason, self.is_unreachable, self.backtrace = reason, is_unreachable, backtrace


class HostStop(GuestTrap):
    """Raised by a host function that the guest is to end in, because the host has begun to stop it."""

    def __init__(self) -> None:
        """Trap as wasmtime's own interruption does."""
        super().__init__(_TRAP_REASONS["INTERRUPT"], True, "")


def func_sig(ty: wasmtime.FuncType) -> FuncSig | None:
    """Return a wasmtime function type as a :class:`FuncSig`, or None when it has values no host call can carry."""
    params = [_kind_code(kind) for kind in ty.params]
    results = [_kind_code(kind) for kind in ty.results]
    if "" in params + results or len(results) > 1:
        return None
    return FuncSig("".join(params), "".join(results))


def _kind_code(kind: wasmtime.ValType) -> str:
    """Return the letter of a type of value, or nothing for others.

    By comparing: to ask wasmtime for the kind ends the process where it is a vector or an exception.
    """
    for code, known in _KINDS.items():
        if _ffi.wasmtime_wasm_valtype_equal(kind.ptr(), known.ptr()):
            return code
    return ""


class FuncExports(Mapping[str, FuncSig]):
    """The exported functions that a host call can carry, by name; a type is looked at when it is asked for first."""

    def __init__(self, module: wasmtime.Module) -> None:
        """Note the names. Usable from any thread."""
        self._exports = {export.name: export for export in module.exports}
        self._sigs: dict[str, FuncSig | None] = {}

    def __getitem__(self, name: str) -> FuncSig:
        """Return the type of an exported function; ``KeyError`` when there is none that can be called."""
        try:
            sig = self._sigs[name]
        except KeyError:
            ty = self._exports[name].type
            sig = self._sigs[name] = func_sig(ty) if isinstance(ty, wasmtime.FuncType) else None
        if sig is None:
            raise KeyError(name)
        return sig

    def __iter__(self) -> Iterator[str]:
        """Return the names."""
        return (name for name in self._exports if name in self)

    def __len__(self) -> int:
        """Return how many there are."""
        return sum(1 for _ in self)


def set_max_stack(config: wasmtime.Config, size_bytes: int) -> None:
    """Set how much stack guest code may use.

    wasmtime aborts the process when that is more than its stack for async calls (2 MiB), whose setter wasmtime-py does
    not bind, although nothing here is async.
    """
    set_async_stack: Any = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64)(
        ("wasmtime_config_async_stack_size_set", _ffi.dll)
    )
    set_async_stack(ctypes.cast(config.ptr(), ctypes.c_void_p), size_bytes)
    config.max_wasm_stack = size_bytes


# -- host functions ---------------------------------------------------------------------------------------------------


def host_function(sig: FuncSig, func: HostFunction, on_error: Callable[[BaseException], int]) -> Any:
    """Return a C callback that calls ``func`` with plain numbers: i32 unsigned, i64 signed.

    Whatever ``func`` raises goes to ``on_error``, whose result the guest gets. ``func`` may raise :class:`GuestTrap`
    to end the guest there and then. The caller keeps the object for as long as a guest may call it.

    Nothing must leave the callback itself: ctypes would return what happens to lie on the stack, and wasmtime take that
    for the address of a trap. So guests are called only with :func:`require_room` for it.
    """
    unpack = struct.Struct("<" + "".join(_UNPACK[c] + f"{_SLOT_BYTES - _width(c)}x" for c in sig.params)).unpack
    size = _SLOT_BYTES * len(sig.params)
    cell = _CELLS[sig.result] if sig.result else None
    string_at = ctypes.string_at

    def entry(_env: int, _caller: int, values: int, _count: int) -> int:
        try:
            try:
                result = func(*unpack(string_at(values, size)))
            except GuestTrap as trap:
                return _new_trap(trap)
            except BaseException as error:
                result = on_error(error)
            if cell is not None:
                cell.from_address(values).value = result
            return 0
        except BaseException:
            return _new_trap(_unanswered)

    return _HOST_FUNCTION(entry)


def require_room(n_frames: int = 16) -> None:
    """Raise ``RecursionError`` unless the calling thread may still nest so many Python functions."""
    if n_frames:
        require_room(n_frames - 1)


def _width(code: str) -> int:
    return 4 if code in "if" else 8


def _new_trap(trap: GuestTrap) -> int:
    if isinstance(trap, HostStop):
        return _address(_ffi.wasmtime_trap_new_code(wasmtime.TrapCode.INTERRUPT.value))
    text = trap.reason.encode()
    return _address(_ffi.wasmtime_trap_new(ctypes.create_string_buffer(text), len(text)))


def _address(pointer: Any) -> int:
    return ctypes.cast(pointer, ctypes.c_void_p).value or 0


_unanswered = GuestTrap("a host function failed twice", False, "")


# -- linking ----------------------------------------------------------------------------------------------------------


def define_function(linker: wasmtime.Linker, module: str, name: str, sig: FuncSig, callback: Any) -> None:
    """Define one host function in ``linker``; ``callback`` comes from :func:`host_function`."""
    ty = wasmtime.FuncType([_VALTYPES[c]() for c in sig.params], [_VALTYPES[c]() for c in sig.result])
    mod, nam = module.encode(), name.encode()
    function = ctypes.cast(callback, _ffi.wasmtime_func_unchecked_callback_t)
    error = _ffi.wasmtime_linker_define_func_unchecked(
        linker.ptr(), mod, len(mod), nam, len(nam), ty.ptr(), function, None, _NO_FINALIZER
    )
    ty.close()
    _check(f"link {module}.{name}", error)


def define_shared_memory(linker: wasmtime.Linker, store: wasmtime.Store, module: str, name: str, memory: Any) -> None:
    """Define a shared memory in ``linker``; ``memory`` is the C pointer of :mod:`.shared_memory`."""
    # wasmtime-py's SharedMemory._as_extern wraps the pointer once too often (its issue 318).
    extern = _ffi.wasmtime_extern(_ffi.WASMTIME_EXTERN_SHAREDMEMORY, _ffi.wasmtime_extern_union(sharedmemory=memory))
    mod, nam = module.encode(), name.encode()
    error = _ffi.wasmtime_linker_define(
        linker.ptr(), store._context(), mod, len(mod), nam, len(nam), ctypes.byref(extern)
    )
    _check(f"link {module}.{name}", error)


def _check(operation: str, error: Any) -> None:
    if error:
        reason = _take_error(error)
        raise HostError(operation, reason)


def _take_error(error: Any) -> str:
    """Return the message of a ``wasmtime_error_t`` and free it."""
    wrapped = wasmtime.WasmtimeError._from_ptr(error)
    try:
        return str(wrapped)
    finally:
        wrapped.close()


# -- epochs -----------------------------------------------------------------------------------------------------------

_EPOCH_CALLBACK: Any = ctypes.CFUNCTYPE(
    ctypes.c_size_t,
    ctypes.POINTER(_ffi.wasmtime_context_t),
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_uint64),
    ctypes.POINTER(_ffi.wasmtime_update_deadline_kind_t),
)
_GO_ON = 0  # WASMTIME_UPDATE_DEADLINE_CONTINUE


def _epoch_callback(is_stopping: Callable[[], bool]) -> Any:
    """Return the C callback of a new epoch, which all stores of an engine meet: this one's guest may go on."""

    def on_epoch(_context: Any, _data: Any, delta: Any, kind: Any) -> int:
        if is_stopping():
            return _address(_ffi.wasmtime_error_new(_INTERRUPTED))
        delta[0], kind[0] = 1, _GO_ON
        return 0

    return _EPOCH_CALLBACK(on_epoch)


# -- instances --------------------------------------------------------------------------------------------------------


class Instance:
    """One instance in a store of its own: what one guest thread runs on. Used and closed by one thread."""

    def __init__(
        self, engine: wasmtime.Engine, pre: wasmtime.InstancePre, is_stopping: Callable[[], bool] | None = None
    ) -> None:
        """Instantiate. Raises :class:`GuestTrap` or :class:`~pyllama_wasm.errors.HostError`.

        With ``is_stopping``, for an engine with epochs, the guest traps at an epoch for which that is true.
        """
        self._store = wasmtime.Store(engine)
        # What the instance may have beside the shared memory, whose own ceiling holds.
        self._store.set_limits(_OWN_BYTES, _TABLE_ELEMENTS, 1, _TABLES, 0)
        self._on_epoch = None if is_stopping is None else _epoch_callback(is_stopping)
        if self._on_epoch is not None:
            self._store.set_epoch_deadline(1)
            _ffi.wasmtime_store_epoch_deadline_callback(self._store.ptr(), self._on_epoch, None, _NO_FINALIZER)
        self._instance = _ffi.wasmtime_instance_t()
        self._trap: Any = ctypes.c_void_p()
        try:
            error = _ffi.wasmtime_instance_pre_instantiate(
                pre.ptr(),
                self._store._context(),
                ctypes.byref(self._instance),
                ctypes.cast(ctypes.byref(self._trap), ctypes.POINTER(ctypes.POINTER(_ffi.wasm_trap_t))),
            )
            if self._trap.value:
                raise _take_trap(self._trap)
            if error:
                failure = _failure(ctypes.cast(error, ctypes.c_void_p).value, self._trap)
                raise failure if failure.is_unreachable else HostError("instantiate the module", failure.reason)
        except BaseException:
            self._store.close()
            raise

    def close(self) -> None:
        """Free the store and with it the instance."""
        self._store.close()

    def global_i32(self, name: str) -> int | None:
        """Return the value of an exported i32 global, unsigned, or None when there is none of that name."""
        extern = self._export(name, _ffi.WASMTIME_EXTERN_GLOBAL)
        if extern is None:
            return None
        raw: Any = _ffi.wasmtime_val_t()
        _ffi.wasmtime_global_get(self._store._context(), ctypes.byref(extern.of.global_), ctypes.byref(raw))
        is_i32 = raw.kind == _ffi.WASMTIME_I32.value
        return raw.of.i32 & 0xFFFFFFFF if is_i32 else None

    def bind(self, name: str, sig: FuncSig) -> Callable[..., Number | None]:
        """Return a fast callable of an exported function: numbers in (integers wrap), one number or None out.

        The callable raises :class:`GuestTrap`. It must be used by one thread only, as the store must.
        """
        extern = self._export(name, _ffi.WASMTIME_EXTERN_FUNC)
        if extern is None:
            raise HostError(f"call {name}", "the module exports no such function", "is the module up to date?")
        func = _ffi.wasmtime_func_t.from_buffer_copy(extern.of.func)
        n_slots = max(len(sig.params), len(sig.result), 1)
        buffer: Any = (ctypes.c_uint8 * (n_slots * _SLOT_BYTES))()
        cells = tuple(_CELLS[code].from_buffer(buffer, i * _SLOT_BYTES) for i, code in enumerate(sig.params))
        result: Any = _CELLS[sig.result].from_buffer(buffer) if sig.result else None
        trap = self._trap
        context = ctypes.cast(self._store._context(), ctypes.c_void_p).value
        # Addresses of objects that this closure keeps alive. Nested calls may share the buffer: the guest takes its
        # arguments out before it runs, and puts its result in after every nested call has returned.
        addresses = (context, ctypes.addressof(func), ctypes.addressof(buffer), n_slots, ctypes.addressof(trap))
        n_params = len(cells)

        def call(*args: Number) -> Number | None:
            if len(args) != n_params:
                raise TypeError(f"{name} takes {n_params} arguments, got {len(args)}")
            for cell, arg in zip(cells, args, strict=True):
                cell.value = arg
            error = _call_unchecked(*addresses)
            if error is not None or trap.value is not None:
                raise _failure(error, trap)
            return None if result is None else result.value

        call.__keep__ = (func, buffer)  # type: ignore[attr-defined]
        return call

    def _export(self, name: str, kind: Any) -> Any:
        """Return the export of that name and kind, or None."""
        item = _ffi.wasmtime_extern_t()
        text = name.encode()
        found = _ffi.wasmtime_instance_export_get(
            self._store._context(), ctypes.byref(self._instance), text, len(text), ctypes.byref(item)
        )
        if not found:
            return None
        if item.kind != kind.value:
            _ffi.wasmtime_extern_delete(ctypes.byref(item))
            return None
        return item


# -- traps ------------------------------------------------------------------------------------------------------------

_TRAP_REASONS = {
    "STACK_OVERFLOW": "call stack exhausted",
    "MEMORY_OUT_OF_BOUNDS": "out of bounds memory access",
    "HEAP_MISALIGNED": "misaligned atomic memory access",
    "TABLE_OUT_OF_BOUNDS": "out of bounds table access",
    "INDIRECT_CALL_TO_NULL": "call of a null function pointer",
    "BAD_SIGNATURE": "call of a function pointer of another type",
    "INTEGER_OVERFLOW": "integer overflow",
    "INTEGER_DIVISION_BY_ZERO": "integer division by zero",
    "BAD_CONVERSION_TO_INTEGER": "invalid conversion to integer",
    "UNREACHABLE": "unreachable code reached",
    "INTERRUPT": "interrupted by the host",
    "UNCAUGHT_EXCEPTION": "an exception was thrown and never caught",
}
_INTERRUPTED = ctypes.create_string_buffer(_TRAP_REASONS["INTERRUPT"].encode())
_NAME_LIMIT = 500

_OWN_BYTES = 16 << 20  # thrown exceptions lie outside the linear memory
_TABLES, _TABLE_ELEMENTS = 1, 1 << 20


def _failure(error: int | None, trap: Any) -> GuestTrap:
    if trap.value is not None:
        return _take_trap(trap)
    pointer = ctypes.cast(error, ctypes.POINTER(_ffi.wasmtime_error_t))  # type: ignore[arg-type]
    reason = _last_line(_take_error(pointer))
    return GuestTrap(reason, reason == _TRAP_REASONS["INTERRUPT"], "")


def _take_trap(cell: Any) -> GuestTrap:
    """Turn the ``wasm_trap_t`` in ``cell`` into an exception, free it and clear the cell."""
    trap = wasmtime.Trap._from_ptr(ctypes.cast(cell.value, ctypes.POINTER(_ffi.wasm_trap_t)))
    cell.value = None
    try:
        try:
            code = trap.trap_code
        except ValueError:  # a code newer than wasmtime-py's table
            code = None
        name = code.name if code is not None else ""
        frames = _frames(trap)
        reason = _TRAP_REASONS.get(name) or _last_line(trap.message)
        return GuestTrap(reason, name in ("UNREACHABLE", "INTERRUPT"), frames)
    finally:
        trap.close()


def _frames(trap: wasmtime.Trap) -> str:
    frames: Sequence[wasmtime.Frame] = trap.frames  # wasmtime keeps the innermost 20
    lines = [
        f"{i:3}: 0x{frame.module_offset:x} {printable(frame.func_name or f'function {frame.func_index}', _NAME_LIMIT)}"
        for i, frame in enumerate(frames)
    ]
    return "\n".join(lines)


def _last_line(text: str) -> str:
    """Return the cause from a message that has a backtrace above it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = lines[-1] if lines else "trap"
    # An exception that leaves the guest is no trap to wasmtime, and has no code.
    return _TRAP_REASONS["UNCAUGHT_EXCEPTION"] if last == "thrown Wasm exception" else last
