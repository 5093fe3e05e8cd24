"""Python functions the guest can call, by number."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import HostError
from .memory import Memory

SLOT_BYTES = 8

_FORMATS = {
    "bool": "?7x",
    "i8": "b7x",
    "u8": "B7x",
    "i16": "h6x",
    "u16": "H6x",
    "i32": "i4x",
    "u32": "I4x",
    "i64": "q",
    "u64": "Q",
    "f32": "f4x",
    "f64": "d",
    "ptr": "I4x",
    "cstr": "I4x",
}
_INTEGER_BITS = {"i8": 8, "u8": 8, "i16": 16, "u16": 16, "i32": 32, "u32": 32, "i64": 64, "u64": 64, "ptr": 32}


@dataclass(frozen=True)
class Signature:
    """The C type of a callback by type codes: ``void bool i8 … u64 f32 f64 ptr cstr fn:NAME``."""

    result: str
    params: tuple[str, ...]

    def unpack(self, slots: bytes) -> tuple[Any, ...]:
        """Return the arguments; pointers as unsigned addresses."""
        return struct.unpack("<" + "".join(_FORMATS[_plain(code)] for code in self.params), slots)

    def pack(self, value: Any) -> bytes:
        """Return the result slot, widened to 8 bytes; integers wrap, None is 0."""
        code = _plain(self.result)
        if code == "void":
            return bytes(SLOT_BYTES)
        if code == "bool":
            return int(bool(value)).to_bytes(SLOT_BYTES, "little")
        if code in ("f32", "f64"):
            return struct.pack("<" + _FORMATS[code], float(value or 0.0))
        number = int(value or 0) & (1 << _INTEGER_BITS[code]) - 1
        if code.startswith("i") and number >> (_INTEGER_BITS[code] - 1):
            number -= 1 << _INTEGER_BITS[code]
        return (number & (1 << 64) - 1).to_bytes(SLOT_BYTES, "little")


def _plain(code: str) -> str:
    """Return the code to decode by: function pointers and C strings are addresses here."""
    return "ptr" if code.startswith("fn:") or code == "cstr" else code


class Callbacks:
    """The functions registered with one engine. May be used from any thread."""

    def __init__(self) -> None:
        """Start empty; ids begin at 1, so that 0 (a null ``user_data``) is never one."""
        self.signatures: Mapping[int, Signature] = {}
        self._functions: dict[int, Callable[..., object]] = {}
        self._lock = threading.Lock()
        self._last_id = 0

    def register(self, func: Callable[..., object]) -> int:
        """Keep ``func`` and return its id."""
        with self._lock:
            self._last_id += 1
            self._functions[self._last_id] = func
            return self._last_id

    def unregister(self, func_id: int) -> None:
        """Forget a function; a guest that still calls it traps. Unknown ids are ignored."""
        with self._lock:
            self._functions.pop(func_id, None)

    def call(self, memory: Memory, kind: int, func_id: int, slots: int) -> None:
        """Call the function ``func_id`` with the arguments in the guest's slots, and store its result there."""
        func, signature = self._functions.get(func_id), self.signatures.get(kind)
        if func is None or signature is None:
            what = f"callback {func_id}" if func is None else f"callback kind {kind}"
            raise HostError("call back from the guest", f"{what} is not registered")
        arguments = memory.read(slots + SLOT_BYTES, SLOT_BYTES * len(signature.params))
        result = func(*signature.unpack(arguments))
        memory.write(slots, signature.pack(result))

    def clear(self) -> None:
        """Forget every function."""
        with self._lock:
            self._functions.clear()
