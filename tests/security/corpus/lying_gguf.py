"""A GGUF file taken apart so that each field can be made to lie, and put together again as it then stands."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import gguf

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
"""``gguf_type``."""

_FORMATS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q", F64: "d"}
_BYTES = {kind: struct.calcsize(f"<{code}") for kind, code in _FORMATS.items()}

# Bytes of a block and weights in it.
_BLOCKS = {int(kind): (block_bytes, block) for kind, (block, block_bytes) in gguf.GGML_QUANT_SIZES.items()}


def text(value: bytes | str, n: int | None = None) -> bytes:
    """Return a string as GGUF holds it; ``n`` is the length it claims, by default its own."""
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data) if n is None else n) + data


def scalar(kind: int, value: float) -> bytes:
    """Return a number as GGUF holds it."""
    return struct.pack(f"<{_FORMATS[kind]}", value)


def array(kind: int, items: Sequence[bytes | str] | Sequence[float], n: int | None = None) -> bytes:
    """Return an array as GGUF holds it; ``n`` is the count it claims, by default its own."""
    head = struct.pack("<IQ", kind, len(items) if n is None else n)
    return head + b"".join(text(item) if isinstance(item, (bytes, str)) else scalar(kind, item) for item in items)


@dataclass
class Tensor:
    """One row of the tensor table with its data."""

    name: bytes
    dims: tuple[int, ...]
    """As the file counts: the fastest-varying one first."""

    kind: int = 0
    data: bytes = b""
    offset: int | None = None
    """What the table says, by default the truth."""

    n_dims: int | None = None
    """What the table says, by default the truth."""

    name_length: int | None = None

    def info(self, offset: int) -> bytes:
        """Return the row; ``offset`` is where the data really is."""
        n_dims = len(self.dims) if self.n_dims is None else self.n_dims
        dims = struct.pack(f"<{len(self.dims)}Q", *(n % 2**64 for n in self.dims))
        place = (offset if self.offset is None else self.offset) % 2**64
        return (
            text(self.name, self.name_length) + struct.pack("<I", n_dims) + dims + struct.pack("<iQ", self.kind, place)
        )


@dataclass
class LyingGguf:
    """The parts of a GGUF file. What is ``None`` is written as it is; everything else as it was set."""

    magic: bytes = b"GGUF"
    version: int = 3
    n_tensors: int | None = None
    n_kv: int | None = None
    kv: list[tuple[bytes, int, bytes]] = field(default_factory=list)
    """Key, ``gguf_type`` and the bytes of the value."""

    tensors: list[Tensor] = field(default_factory=list)
    alignment: int = 32

    @classmethod
    def parse(cls, data: bytes) -> LyingGguf:
        """Take a good file apart."""
        _, version, n_tensors, n_kv = struct.unpack_from("<4sIQQ", data)
        parser = _Parser(data, 24)
        made = cls(version=version)
        for _ in range(n_kv):
            key, kind = parser.string(), parser.number("I")
            made.kv.append((key, kind, parser.value(kind)))
        places = []
        for _ in range(n_tensors):
            name = parser.string()
            dims = tuple(parser.number("Q") for _ in range(parser.number("I")))
            kind, offset = parser.number("i"), parser.number("Q")
            made.tensors.append(Tensor(name, dims, kind))
            places.append(offset)
        begin = _padded(parser.at, made.alignment)
        for tensor, place in zip(made.tensors, places, strict=True):
            tensor.data = data[begin + place : begin + place + _n_bytes(tensor)]
        return made

    def set(self, key: str, kind: int, value: bytes) -> LyingGguf:
        """Put a value in the place of the key's own, or add it at the end."""
        new = (key.encode(), kind, value)
        places = [i for i, entry in enumerate(self.kv) if entry[0] == new[0]]
        if places:
            self.kv[places[0]] = new
        else:
            self.kv.append(new)
        return self

    def number(self, key: str, value: float, kind: int = U32) -> LyingGguf:
        """Set a number."""
        return self.set(key, kind, scalar(kind, value))

    def string(self, key: str, value: bytes | str) -> LyingGguf:
        """Set a string."""
        return self.set(key, STRING, text(value))

    def array(self, key: str, kind: int, items: Sequence[bytes | str] | Sequence[float]) -> LyingGguf:
        """Set an array."""
        return self.set(key, ARRAY, array(kind, items))

    def remove(self, key: str) -> LyingGguf:
        """Leave a key out."""
        self.kv = [entry for entry in self.kv if entry[0] != key.encode()]
        return self

    def strings(self, key: str) -> list[bytes]:
        """Return an array of strings."""
        value = next(value for name, _, value in self.kv if name == key.encode())
        parser = _Parser(value, 12)
        return [parser.string() for _ in range(struct.unpack_from("<Q", value, 4)[0])]

    def tensor(self, name: str) -> Tensor:
        """Return the tensor of that name."""
        return next(tensor for tensor in self.tensors if tensor.name == name.encode())

    def header(self) -> bytes:
        """Return everything before the padding in front of the data."""
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        n_kv = len(self.kv) if self.n_kv is None else self.n_kv
        parts = [self.magic, struct.pack("<IQQ", self.version, n_tensors % 2**64, n_kv % 2**64)]
        parts += [text(key) + struct.pack("<I", kind) + value for key, kind, value in self.kv]
        offset = 0
        for tensor in self.tensors:
            parts.append(tensor.info(offset))
            offset += _padded(len(tensor.data), self.alignment)
        return b"".join(parts)

    def write(self) -> bytes:
        """Return the file."""
        parts = [self.header()]
        parts.append(bytes(-len(parts[0]) % self.alignment))
        for tensor in self.tensors:
            parts += [tensor.data, bytes(-len(tensor.data) % self.alignment)]
        return b"".join(parts)


class _Parser:
    def __init__(self, data: bytes, at: int) -> None:
        self._data, self.at = data, at

    def number(self, code: str) -> int:
        (value,) = struct.unpack_from(f"<{code}", self._data, self.at)
        self.at += struct.calcsize(f"<{code}")
        return int(value)

    def string(self) -> bytes:
        n = self.number("Q")
        self.at += n
        return self._data[self.at - n : self.at]

    def value(self, kind: int) -> bytes:
        begin = self.at
        if kind == ARRAY:
            item, n = self.number("I"), self.number("Q")
            if item in _BYTES:
                self.at += n * _BYTES[item]
            else:
                for _ in range(n):
                    self.value(item)
        elif kind == STRING:
            self.string()
        else:
            self.at += _BYTES[kind]
        if self.at > len(self._data):
            raise ValueError("a value ends beyond the file")
        return self._data[begin : self.at]


def _padded(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment


def _n_bytes(tensor: Tensor) -> int:
    n = 1
    for dim in tensor.dims:
        n *= dim
    block_bytes, block = _BLOCKS[tensor.kind]
    return n // block * block_bytes
