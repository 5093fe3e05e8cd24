"""The only caller of guest exports."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from .. import _abi
from ..errors import ClosedError, GuestException, HostError, OutOfMemoryError, PyllamaError, RequestError
from ..host import Engine
from .binding import bind
from .callback import Callback, Interface, signatures
from .frame import Frame
from .structs import Struct

_MASK = 0xFFFFFFFF
_ERROR_TEXT_OFFSET = 4
_ERROR_TEXT_BYTES = 2044
_OUT_OF_MEMORY = 2
_HOST_REFUSED = 4


PIECE_BYTES = 4 << 20
"""What is copied at once, a few milliseconds: between two pieces a deadline ends the call."""

OWN_TEXT_BYTES = 1 << 20
"""A model's own texts, its template and metadata, may be so long whatever the limit of output is."""


class Native:
    """Calls of llama.cpp's C functions in one engine, by their own names: ``native.llama_n_ctx(ctx)``.

    Arguments are int, float and bool; None is the null pointer; ``const char *`` takes str or bytes (copied in for the
    call) or an address; a struct by value takes a :class:`Struct`; a function pointer takes a :class:`Callback` or its
    index. Results are int (pointers and C strings are unsigned addresses), float, bool, None, or a :class:`Struct`.
    Arrays go through :meth:`array`.

    A C++ exception in the call raises ``GuestException``, or ``OutOfMemoryError`` when memory ran out; an argument that
    does not fit its C type raises ``RequestError``; a trap or an abort raises as :meth:`Engine.call` says.

    Every method may be called from any thread; each call is then one job of the engine. Group several with
    ``engine.run``.
    """

    def __init__(self, engine: Engine) -> None:
        """Attach to ``engine``, which stays the caller's to close."""
        self.engine = engine
        self.thread = engine.run(threading.get_ident, "attach to the engine")
        """Identity of the engine's thread."""
        self.frame = Frame(engine.memory, self.alloc, self.free)
        self.bound_callbacks: set[int] = set()
        """Callback kinds whose one target is taken."""
        self._error = int(engine.call("pw_error_address") or 0) & _MASK
        self.error_code: npt.NDArray[np.uint32] = engine.memory.view(self._error, 1, np.uint32)
        """The guest's error code after a call, a view."""
        engine.callback_signatures = signatures()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Return the callable of a C function and keep it. AttributeError for one that is not exported."""
        try:
            function = _abi.FUNCTIONS[name]
        except KeyError:
            raise AttributeError(f"llama.cpp exports no function {name}") from None
        invoke = bind(self, function)
        self.__dict__[name] = invoke
        return invoke

    def __dir__(self) -> list[str]:
        """List the C functions too."""
        return sorted({*super().__dir__(), *_abi.FUNCTIONS})

    def call(self, export: str, *args: int | float | str | bytes | None) -> int | None:
        """Call an export that is not in the table (``pw_…``); str and bytes become C strings for the call.

        The result is unsigned. Raises as the typed calls do.
        """
        return self.engine.run(lambda: self._call(export, args), export)

    def _call(self, export: str, args: tuple[int | float | str | bytes | None, ...]) -> int | None:
        mark = self.frame.mark()
        try:
            result = self.engine.call(export, *(self._number(export, value) for value in args))
            if self.error_code[0]:
                raise self.fail(export)
            return None if result is None else int(result) & _MASK
        finally:
            self.frame.release(mark)

    def _number(self, export: str, value: int | float | str | bytes | None) -> int | float:
        if isinstance(value, str):
            value = value.encode()
        if isinstance(value, bytes):
            if b"\0" in value:
                raise RequestError(export, "a C string cannot hold a NUL")
            return self.frame.push(value + b"\0")
        return 0 if value is None else value

    def fail(self, operation: str) -> PyllamaError:
        """Take the error the guest has recorded and return it as an exception. On the engine's thread."""
        memory, code = self.engine.memory, int(self.error_code[0])
        text = memory.read_cstr(self._error + _ERROR_TEXT_OFFSET, _ERROR_TEXT_BYTES).decode("utf-8", errors="replace")
        memory.set_u32(self._error, 0)
        if code == _OUT_OF_MEMORY or text.endswith("std::bad_alloc"):  # caught on the way and thrown as another
            return out_of_memory(operation, text)
        if code == _HOST_REFUSED:
            return HostError(operation, text)
        return GuestException(operation, text)

    # -- structs ------------------------------------------------------------------------------------------------------

    def struct(self, name: str, /, **fields: Any) -> Struct:
        """Return a zeroed struct with ``fields`` set."""
        value = Struct(name)
        for field, item in fields.items():
            value[field] = item
        return value

    def read_struct(self, name: str, ptr: int) -> Struct:
        """Return a copy of the struct at ``ptr``."""
        return Struct(name, self.engine.memory.read(ptr, _abi.STRUCTS[name].size))

    def write_struct(self, ptr: int, value: Struct) -> None:
        """Write a struct to ``ptr``."""
        self.engine.memory.write(ptr, bytes(value))

    # -- strings ------------------------------------------------------------------------------------------------------

    def string(self, ptr: int, least: int = OWN_TEXT_BYTES) -> str:
        """Return the C string at ``ptr``, which stays the guest's; null gives ``""``, what is not UTF-8 U+FFFD.

        It may have ``least`` bytes whatever the limit of output is.
        """
        memory, limit = self.engine.memory, self.engine.output_bytes
        if not ptr:
            return ""
        data = memory.read_cstr(ptr, memory.max_bytes if limit is None else max(limit, least) + 1)
        self.engine.check_output(len(data), "read a text", least)
        return data.decode("utf-8", errors="replace")

    def take_string(self, ptr: int) -> str:
        """Return the C string at ``ptr``, the result of a call, and free it."""
        try:
            return self.string(ptr, least=0)
        finally:
            self.free(ptr)

    # -- guest memory -------------------------------------------------------------------------------------------------

    def alloc(self, n: int) -> int:
        """Allocate ``n`` bytes, aligned to 16, until :meth:`free`. Raises ``OutOfMemoryError``."""
        if not 0 <= n <= _MASK:
            raise RequestError("allocate guest memory", f"{n} bytes")
        ptr = int(self.engine.call("pw_alloc", max(n, 1)) or 0) & _MASK
        if not ptr:
            raise out_of_memory(f"allocate {n} bytes of guest memory", "none left")
        return ptr

    def free(self, ptr: int) -> None:
        """Free what :meth:`alloc` or the guest's ``malloc`` gave; null, and any address of an ended engine, is fine."""
        if ptr and not self.engine.is_dead:
            with suppress(ClosedError):
                self.engine.call("pw_free", ptr)

    @contextmanager
    def scratch(self, n: int) -> Iterator[int]:
        """Allocate ``n`` bytes for the block."""
        ptr = self.alloc(n)
        try:
            yield ptr
        finally:
            self.free(ptr)

    @contextmanager
    def array(self, values: npt.NDArray[Any] | bytes | bytearray) -> Iterator[int]:
        """Copy an array, as it is laid out in C order, or bytes into the guest for the block.

        Raises what ``Engine.check_time`` raises while that takes long.
        """
        data = np.ascontiguousarray(values).tobytes() if isinstance(values, np.ndarray) else bytes(values)
        with self.scratch(len(data)) as ptr:
            if len(data) <= PIECE_BYTES:
                self.engine.memory.write(ptr, data)
            else:
                self.write(ptr, data, "copy into the sandbox")
            yield ptr

    def write(self, ptr: int, data: bytes | bytearray | memoryview, operation: str) -> None:
        """Copy ``data`` in, piece by piece; between two of them ``Engine.check_time`` may end it."""
        with memoryview(data) as view:
            for at in range(0, len(view), PIECE_BYTES):
                self.engine.check_time(operation)
                self.engine.memory.write(ptr + at, view[at : at + PIECE_BYTES])

    def read_into(self, ptr: int, n: int, out: IO[bytes], operation: str) -> None:
        """Write ``n`` bytes of guest memory to a file in memory, piece by piece, as ``write``."""
        for at in range(0, n, PIECE_BYTES):
            self.engine.check_time(operation)
            with self.engine.memory.readable_buffer(ptr + at, min(PIECE_BYTES, n - at)) as piece:
                out.write(piece)

    # -- callbacks ----------------------------------------------------------------------------------------------------

    def callback(self, type_name: str, func: Callable[..., Any]) -> Callback:
        """Make ``func`` callable by the guest as the C function pointer type ``type_name``."""
        return Callback(self, type_name, func)

    def interface(self, name: str, /, **functions: Callable[..., Any]) -> Interface:
        """Implement a C struct of function pointers, such as ``llama_sampler_i``, by functions named as its fields."""
        return Interface(self, name, functions)


def out_of_memory(operation: str, reason: str) -> OutOfMemoryError:
    """Return the exception for guest memory that ran out."""
    return OutOfMemoryError(operation, f"the sandbox is out of memory: {reason}", "raise memory_limit_bytes")
