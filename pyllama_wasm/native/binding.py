"""Turns an entry of the function table into a Python callable."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .. import _abi
from ..errors import RequestError
from .codes import from_result, struct_name, to_number
from .structs import Struct

if TYPE_CHECKING:
    from .native import Native

Converter = Callable[[Any], "int | float"]


def bind(native: Native, function: _abi.Function) -> Callable[..., Any]:
    """Return the callable of one C function. Everything that does not depend on the arguments is decided here."""
    is_plain = not any(
        code == "cstr" or struct_name(code) for code in (function.result, *(code for _, code in function.params))
    )
    converters = [_converter(native, code) for _, code in function.params]
    call = _plain_call(native, function, converters) if is_plain else _framed_call(native, function, converters)
    name, run, thread = function.name, native.engine.run, native.thread

    def invoke(*args: Any) -> Any:
        if threading.get_ident() == thread:
            return call(args)
        return run(lambda: call(args), name)

    invoke.__name__ = invoke.__qualname__ = name
    invoke.__doc__ = documentation(function)
    return invoke


def documentation(function: _abi.Function) -> str:
    """Return the C function's signature by type codes and the first sentence of its comment."""
    params = ", ".join(f"{name}: {code}" for name, code in function.params)
    head = f"{function.name}({params}) -> {function.result}"
    return (
        f"{head}\n\n{function.doc}\n\nFrom {function.header}." if function.doc else f"{head}\n\nFrom {function.header}."
    )


def _plain_call(
    native: Native, function: _abi.Function, converters: list[Converter]
) -> Callable[[tuple[Any, ...]], Any]:
    """Numbers in, a number out: no guest memory needed."""
    name = function.name
    guest_call, error_code, fail = native.engine.call, native.error_code, native.fail
    back = from_result(function.result)

    def call(args: tuple[Any, ...]) -> Any:
        try:
            numbers = [convert(value) for convert, value in zip(converters, args, strict=True)]
        except (TypeError, ValueError, OverflowError):
            raise _bad_argument(function, converters, args) from None
        result = guest_call(name, *numbers)
        if error_code[0]:
            raise fail(name)
        return result if back is None else back(result)

    return call


def _framed_call(
    native: Native, function: _abi.Function, converters: list[Converter]
) -> Callable[[tuple[Any, ...]], Any]:
    """Strings and structs travel through a frame in guest memory, which is given back after the call."""
    name, frame = function.name, native.frame
    guest_call, error_code, fail, read_struct = native.engine.call, native.error_code, native.fail, native.read_struct
    back, result_struct = from_result(function.result), struct_name(function.result)
    result_size = _abi.STRUCTS[result_struct].size if result_struct else 0

    def call(args: tuple[Any, ...]) -> Any:
        mark = frame.mark()
        try:
            try:
                numbers = [convert(value) for convert, value in zip(converters, args, strict=True)]
            except (TypeError, ValueError, OverflowError):
                raise _bad_argument(function, converters, args) from None
            if result_struct:
                numbers.insert(0, frame.take(result_size))
            result = guest_call(name, *numbers)
            if error_code[0]:
                raise fail(name)
            if result_struct:
                return read_struct(result_struct, int(numbers[0]))
            return result if back is None else back(result)
        finally:
            frame.release(mark)

    return call


def _converter(native: Native, code: str) -> Converter:
    if code == "cstr":
        return lambda value: _push_string(native, value)
    name = struct_name(code)
    if name is None:
        return to_number(code)
    return lambda value: _push_struct(native, name, value)


def _push_string(native: Native, value: Any) -> int:
    """Copy a string in; addresses and None pass through."""
    if isinstance(value, str):
        value = value.encode()
    if not isinstance(value, bytes | bytearray):
        return int(_to_address(value))
    if b"\0" in value:
        raise ValueError("a C string cannot hold a NUL")
    return native.frame.push(bytes(value) + b"\0")


_to_address = to_number("ptr")


def _push_struct(native: Native, name: str, value: Any) -> int:
    if not isinstance(value, Struct) or value.name != name:
        raise TypeError(f"expected a struct {name}, got {type(value).__name__}")
    return native.frame.push(bytes(value))


def _bad_argument(function: _abi.Function, converters: list[Converter], args: tuple[Any, ...]) -> Exception:
    """Return the exception that names the argument at fault."""
    if len(args) != len(converters):
        names = ", ".join(name for name, _ in function.params)
        return TypeError(f"{function.name}({names}) takes {len(converters)} arguments, got {len(args)}")
    for (name, _), convert, value in zip(function.params, converters, args, strict=True):
        try:
            convert(value)
        except TypeError as error:
            return TypeError(f"{function.name}: {name}: {error}")
        except (ValueError, OverflowError) as error:
            return RequestError(function.name, f"{name}: {error}")
    raise AssertionError("no argument is at fault")
