"""What the type codes of ``_abi`` mean: how a Python value becomes a wasm number or struct bytes, and back."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from operator import index
from typing import Any, NamedTuple

from .._abi import POINTER_SIZE

POINTER_MASK = (1 << 8 * POINTER_SIZE) - 1

_INTEGERS = {f"{sign}{bits}": (sign == "i", bits) for sign in "iu" for bits in (8, 16, 32, 64)}
_FORMATS = {
    "bool": "?", "char": "b", "i8": "b", "u8": "B", "i16": "h", "u16": "H", "i32": "i", "u32": "I", "i64": "q",
    "u64": "Q", "f32": "f", "f64": "d", "ptr": "I" if POINTER_SIZE == 4 else "Q",
}  # fmt: skip
_ARRAY = re.compile(r"(.+)\[(\d+)\]$")


class ArrayCode(NamedTuple):
    """An array code taken apart."""

    element: str
    n: int


def scalar(code: str) -> str:
    """Return the code without what only matters to a reader: C strings and function pointers are addresses."""
    return "ptr" if code == "cstr" or code.startswith("fn:") else code


def array(code: str) -> ArrayCode | None:
    """Return the element code and length of ``CODE[n]``, or None for anything else."""
    match = _ARRAY.match(code)
    return ArrayCode(match.group(1), int(match.group(2))) if match else None


def struct_name(code: str) -> str | None:
    """Return the name in ``struct:NAME``, or None for anything else."""
    return code.removeprefix("struct:") if code.startswith("struct:") else None


def packer(code: str) -> struct.Struct:
    """Return how one scalar lies in memory."""
    return struct.Struct("<" + _FORMATS[scalar(code)])


def to_number(code: str) -> Callable[[Any], int | float]:
    """Return the conversion of a Python value to the number a wasm parameter or a struct field takes.

    The conversion raises TypeError for a value of the wrong kind and OverflowError for one that does not fit.
    """
    code = scalar(code)
    if code in ("f32", "f64"):
        return float
    if code == "bool":
        return _to_bool
    if code == "ptr":
        return _to_pointer
    return _to_integer(code)


def from_result(code: str) -> Callable[[Any], Any] | None:
    """Return the conversion of a wasm result, where i32 and i64 arrive signed; None where there is none to do."""
    code = scalar(code)
    if code == "bool":
        return bool
    if code in ("ptr", "u32"):
        return POINTER_MASK.__and__ if code == "ptr" else 0xFFFFFFFF.__and__
    if code == "u64":
        return 0xFFFFFFFFFFFFFFFF.__and__
    return None


def _to_bool(value: Any) -> int:
    return 1 if value else 0


def _to_pointer(value: Any) -> int:
    if value is None:
        return 0
    value = value if type(value) is int else index(getattr(value, "function", value))
    if 0 <= value <= POINTER_MASK:
        return int(value)
    raise OverflowError(f"{value} is no address")


def _to_integer(code: str) -> Callable[[Any], int]:
    is_signed, bits = _INTEGERS[code]
    low = -(1 << bits - 1) if is_signed else 0
    high = (1 << bits - is_signed) - 1

    def convert(value: Any) -> int:
        if type(value) is not int:
            value = index(value)
        if low <= value <= high:
            return int(value)
        raise OverflowError(f"{value} does not fit {code}")

    return convert
