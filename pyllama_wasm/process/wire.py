"""Messages between a program and the process of one of its models: plain values, and nothing that could do anything.

A message is a header of 12 bytes, a JSON text and raw bytes. Longer texts, bytes and arrays lie in the raw part; the
JSON has their place and kind. Whoever reads says how much it takes: the process of a model is not trusted, so its
messages are never unpickled, are bounded, and what they hold is checked again by who uses it.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["CHILD_LIMITS", "PARENT_LIMITS", "Value", "WireError", "WireLimits", "pack", "read_message"]

Value = Any
"""None, bool, int, float, str, bytes, an array of one of ``_DTYPES``, or a list or dict of such."""

_MAGIC = b"pwp1"
_HEADER = struct.Struct("<4sII")
_INLINE_CHARS = 256
_READ_BYTES = 1 << 20
_MAX_DEPTH = 64
_DTYPES = {"<f4": np.dtype("<f4"), "<i4": np.dtype("<i4")}
_REFERENCE, _PAIRS = "$ref", "$pairs"


class WireError(Exception):
    """A message is malformed, too large, or not what was expected."""


@dataclass(frozen=True)
class WireLimits:
    """Most bytes of the two parts of a message."""

    json_bytes: int
    data_bytes: int


CHILD_LIMITS = WireLimits(4 << 20, 256 << 20)
"""What a program takes from the process of a model."""

PARENT_LIMITS = WireLimits(256 << 20, 1 << 30)
"""What the process takes from the program."""


def pack(value: Value, limits: WireLimits) -> bytes:
    """Return the bytes of a message. Raises ``WireError`` for what is no plain value, or more than who reads takes."""
    buffers: list[bytes] = []
    kinds: list[list[Any]] = []
    try:
        tree = _lowered(value, buffers, kinds, 0)
        text = json.dumps([tree, kinds], separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise WireError(f"{error}") from error
    n_data = sum(map(len, buffers))
    if len(text) > limits.json_bytes or n_data > limits.data_bytes:
        raise WireError(f"a message of {len(text) + n_data} bytes is too large for one between two processes")
    return b"".join([_HEADER.pack(_MAGIC, len(text), n_data), text, *buffers])


def read_message(read: Callable[[int], bytes], limits: WireLimits) -> Value:
    """Return the next message of ``read``, which returns fewer bytes than it is asked for only at the end.

    Raises ``EOFError`` at the end, ``WireError`` for anything that is no message within ``limits``. No more memory is
    taken than bytes have come.
    """
    header = read(_HEADER.size)
    if not header:
        raise EOFError
    if len(header) < _HEADER.size:
        raise WireError("it ended inside a message")
    magic, n_text, n_data = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise WireError("it sent something that is no message")
    if n_text > limits.json_bytes or n_data > limits.data_bytes:
        raise WireError(f"it sent a message of {n_text + n_data} bytes")
    text, data = _read_whole(read, n_text), memoryview(_read_whole(read, n_data))
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WireError("it sent a message that is no JSON") from error
    if not isinstance(parsed, list) or len(parsed) != 2 or not isinstance(parsed[1], list):
        raise WireError("it sent a message of another form")
    return _raised(parsed[0], _buffers(parsed[1], data), 0)


def _read_whole(read: Callable[[int], bytes], n: int) -> bytearray:
    whole = bytearray()
    while len(whole) < n:
        piece = read(min(n - len(whole), _READ_BYTES))
        if not piece:
            raise WireError("it ended inside a message")
        whole += piece
    return whole


def _lowered(value: Value, buffers: list[bytes], kinds: list[list[Any]], depth: int) -> Value:
    """Return ``value`` as JSON has it, its large parts appended to ``buffers``."""
    if depth > _MAX_DEPTH:
        raise WireError("the value is nested too deeply")
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        if len(value) <= _INLINE_CHARS:
            return value
        return _reference(value.encode("utf-8", "surrogatepass"), ["s"], buffers, kinds)
    if isinstance(value, (bytes, bytearray)):
        return _reference(bytes(value), ["b"], buffers, kinds)
    if isinstance(value, np.ndarray):
        if value.dtype.str not in _DTYPES:
            raise WireError(f"an array of {value.dtype} is none of {', '.join(_DTYPES)}")
        return _reference(value.tobytes(), [value.dtype.str, *value.shape], buffers, kinds)
    if isinstance(value, Mapping):
        pairs = [[key, _lowered(item, buffers, kinds, depth + 1)] for key, item in value.items()]
        if any(not isinstance(key, str) or key.startswith("$") for key, _ in pairs):
            return {_PAIRS: pairs}
        return dict(pairs)
    if isinstance(value, Sequence):
        return [_lowered(item, buffers, kinds, depth + 1) for item in value]
    raise WireError(f"{type(value).__name__} is no plain value")


def _reference(data: bytes, kind: list[Any], buffers: list[bytes], kinds: list[list[Any]]) -> Value:
    buffers.append(data)
    kinds.append([len(data), *kind])
    return {_REFERENCE: len(kinds) - 1}


def _buffers(kinds: list[Any], data: memoryview) -> list[Value]:
    """Return the values of the raw part, which they fill to its end."""
    values, at = [], 0
    for kind in kinds:
        if not isinstance(kind, list) or len(kind) < 2 or not _is_size(kind[0]) or kind[0] > len(data) - at:
            raise WireError("it sent a buffer beyond the end of its message")
        values.append(_buffer(bytes(data[at : at + kind[0]]), kind[1], kind[2:]))
        at += kind[0]
    if at != len(data):
        raise WireError("it sent bytes that belong to nothing")
    return values


def _buffer(data: bytes, kind: object, shape: list[Any]) -> Value:
    if kind == "b" and not shape:
        return data
    if kind == "s" and not shape:
        return _text(data)
    dtype = _DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None or len(shape) > 2 or not all(_is_size(n) for n in shape):
        raise WireError("it sent a buffer of an unknown kind")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise WireError("it sent an array whose shape is not that of its bytes")
    return np.frombuffer(data, dtype).reshape(shape).copy()


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise WireError("it sent a text that is not UTF-8") from error


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 40


_TAKEN = object()
"""In the place of a buffer that a value has already: else few bytes could stand for very many."""


def _raised(value: Value, buffers: list[Value], depth: int) -> Value:
    """Return the value that JSON ``value`` stands for: the inverse of ``_lowered``."""
    if depth > 2 * _MAX_DEPTH:
        raise WireError("it sent a value that is nested too deeply")
    if isinstance(value, list):
        return [_raised(item, buffers, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    if _REFERENCE in value:
        index = value[_REFERENCE]
        if not _is_size(index) or index >= len(buffers):
            raise WireError("it sent a reference to nothing")
        found, buffers[index] = buffers[index], _TAKEN
        if found is _TAKEN:
            raise WireError("it sent a reference twice")
        return found
    if _PAIRS in value:
        pairs = value[_PAIRS]
        if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            raise WireError("it sent pairs that are none")
        if not all(isinstance(key, (str, int, float)) for key, _ in pairs):
            raise WireError("it sent a key that is none")
        return {key: _raised(item, buffers, depth + 1) for key, item in pairs}
    return {key: _raised(item, buffers, depth + 1) for key, item in value.items()}
