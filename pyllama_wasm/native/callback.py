"""Python functions as C function pointers, one by one or as a struct of them."""

from __future__ import annotations

import struct as packing
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .. import _abi
from ..errors import RequestError
from ..host import Signature
from .codes import struct_name

if TYPE_CHECKING:
    from .native import Native


class Callback:
    """A Python function that the guest can call, until :meth:`close`.

    Pass :attr:`function` (or the object itself) where C takes the function pointer, and :attr:`user_data` where it
    takes the user data that goes with it. The Python function gets the C arguments: pointers and C strings as
    addresses, the user data as the id. It returns a number, or a ``Struct`` where C returns one; None is 0 and false.
    What it raises comes out of the guest call it interrupts, and the sandbox is dead then.
    """

    def __init__(self, native: Native, type_name: str, func: Callable[..., Any]) -> None:
        """Register ``func``. KeyError for an unknown type; RequestError when the type allows one at a time."""
        callback = _entry(type_name)
        if callback.identity == "table":
            struct = type_name.partition(".")[0]
            raise RequestError(f"register a {type_name}", f"the functions of {struct} go together", "use interface()")
        self.type_name = type_name
        self._native, self._callback = native, callback
        self._is_closed = False
        self.function = trampoline(native, callback)
        """Function table index of the guest's trampoline."""
        self.user_data = register(native, callback, func)
        """The id by which the guest names the Python function."""
        if callback.identity == "bound":
            self._bind()

    def _bind(self) -> None:
        """Set the id for the whole type, whose C functions receive no user data."""
        bound = self._native.bound_callbacks
        if self._callback.kind in bound:
            self._native.engine.unregister(self.user_data)
            raise RequestError(f"register a {self.type_name}", "this type allows one at a time", "close the other one")
        self._native.call("pw_callback_bind", self._callback.kind, self.user_data)
        bound.add(self._callback.kind)

    def close(self) -> None:
        """Forget the Python function; a guest that still calls it traps. Again is fine."""
        if self._is_closed:
            return
        self._is_closed = True
        engine = self._native.engine
        engine.unregister(self.user_data)
        if self._callback.identity == "bound":
            self._native.bound_callbacks.discard(self._callback.kind)
            if not (engine.is_closed or engine.is_dead):
                self._native.call("pw_callback_bind", self._callback.kind, 0)

    def __enter__(self) -> Callback:
        """Return the callback."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the callback."""
        self.close()


class Interface:
    """A C struct of function pointers implemented in Python, until :meth:`close`.

    Pass :attr:`ptr` where C takes the address of the struct and :attr:`user_data` where it takes the context that all
    its functions receive. Functions that are not given are null. As for :class:`Callback` otherwise.
    """

    def __init__(self, native: Native, name: str, functions: Mapping[str, Callable[..., Any]]) -> None:
        """Register ``functions`` by field name. KeyError for a name that is no function of the struct."""
        self._native = native
        self._is_closed = False
        entries = {field: _entry(f"{name}.{field}") for field in functions}
        n_slots = sum(type_name.startswith(f"{name}.") for type_name in _abi.CALLBACKS)
        table = [0] * n_slots
        struct = native.struct(name)
        self._ids = []
        for field, callback in entries.items():
            struct[field] = trampoline(native, callback)
            table[callback.slot] = register(native, callback, functions[field])
            self._ids.append(table[callback.slot])
        self.ptr = native.alloc(len(struct))
        """Address of the struct."""
        self.user_data = native.alloc(4 * n_slots)
        """Address of the table of ids, by which the guest names the Python functions."""
        native.write_struct(self.ptr, struct)
        native.engine.memory.write(self.user_data, packing.pack(f"<{n_slots}i", *table))

    def close(self) -> None:
        """Forget the Python functions; a guest that still calls one of them traps. Again is fine."""
        if self._is_closed:
            return
        self._is_closed = True
        for func_id in self._ids:
            self._native.engine.unregister(func_id)
        self._native.free(self.ptr)
        self._native.free(self.user_data)

    def __enter__(self) -> Interface:
        """Return the interface."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the interface."""
        self.close()


def trampoline(native: Native, callback: _abi.Callback) -> int:
    """Return the function table index of the guest function that calls Python for this type."""
    return native.call("pw_trampoline", callback.kind) or 0


def register(native: Native, callback: _abi.Callback, func: Callable[..., Any]) -> int:
    """Make ``func`` known to the host and return its id."""
    if struct_name(callback.result) is None:
        return native.engine.register(func)

    def target(result: int, *args: Any) -> None:
        native.write_struct(result, func(*args))

    return native.engine.register(target)


def signatures() -> dict[int, Signature]:
    """Return the C types of all callbacks by kind, as the host decodes them.

    As for functions, a struct result is written to an address that comes before the arguments.
    """
    found = {}
    for callback in _abi.CALLBACKS.values():
        params = tuple(code for _, code in callback.params)
        if struct_name(callback.result) is None:
            found[callback.kind] = Signature(callback.result, params)
        else:
            found[callback.kind] = Signature("void", ("ptr", *params))
    return found


def _entry(type_name: str) -> _abi.Callback:
    try:
        return _abi.CALLBACKS[type_name]
    except KeyError:
        raise KeyError(f"there is no callback type {type_name}") from None
