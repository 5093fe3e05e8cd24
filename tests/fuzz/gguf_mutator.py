"""What can be done to a GGUF file by who knows its parts: counts, keys, values, the tensor table and the data."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

import gguf

from ..security.corpus.lying_gguf import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    STRING,
    U8,
    U16,
    U32,
    U64,
    LyingGguf,
    Tensor,
    array,
    scalar,
    text,
)  # fmt: skip
from .mutators import FLOATS, TEXTS, mutate_bytes, number

_INTEGERS = {U8: 8, I8: 8, U16: 16, I16: 16, U32: 32, I32: 32, U64: 64, I64: 64}
_SIGNED = (I8, I16, I32, I64)
_NAMES = tuple(
    name.encode()
    for name in (
        "llama",
        "gpt2",
        "bert",
        "t5",
        "mamba",
        "cohere2",
        "rwkv6",
        "gemma3",
        "qwen2moe",
        "clip",
        "no_vocab",
        "plamo2",
        "rwkv",
    )
)
_KINDS = tuple(int(kind) for kind in gguf.GGMLQuantizationType)

Part = Callable[[LyingGguf, random.Random], None]


def mutate_gguf(data: bytes, rng: random.Random, parts: tuple[Part, ...] = ()) -> bytes:
    """Return the file after changes to some of its ``parts`` (default: all); one that is none by now as mere bytes."""
    made = _parsed(data) if rng.random() < 0.92 else None
    if made is None:
        return mutate_bytes(data, rng)
    try:
        for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
            rng.choice(parts or ALL_PARTS)(made, rng)
        return made.write()
    except (struct.error, OverflowError):  # two lies of which no file can hold both, or of which one hides the other
        return mutate_bytes(data, rng)


def _parsed(data: bytes) -> LyingGguf | None:
    if struct.unpack_from("<QQ", data.ljust(24, b"\0"), 8) > (10_000, 10_000):
        return None
    try:
        return LyingGguf.parse(data)
    except (struct.error, KeyError, RecursionError, ZeroDivisionError, ValueError, OverflowError, MemoryError):
        return None


def a_number(kind: int, rng: random.Random) -> bytes:
    """Return a number of a type as GGUF holds it."""
    if kind in (F32, F64):
        return scalar(kind, rng.choice(FLOATS))
    if kind == BOOL:
        return bytes([rng.choice((0, 1, 2, 255))])
    bits = _INTEGERS[kind]
    value = number(rng) % (1 << bits)
    return scalar(kind, value - (1 << bits) if kind in _SIGNED and value >> (bits - 1) else value)


def a_text(rng: random.Random) -> bytes:
    """Return a string, mostly a short one."""
    return rng.choice((rng.choice(TEXTS), rng.choice(_NAMES), rng.randbytes(rng.randint(0, 12))))


def _header(made: LyingGguf, rng: random.Random) -> None:
    field = rng.choice(("magic", "version", "n_kv", "n_tensors", "n_kv", "n_tensors"))
    if field == "magic":
        made.magic = rng.choice((b"GGUF"[::-1], b"GGUg", b"\0\0\0\0", b"PK\3\4", b"GGML"))
    elif field == "version":
        made.version = rng.choice((0, 1, 2, 3, 4, 2**24 * 3, 2**32 - 1))
    else:
        real = len(made.kv if field == "n_kv" else made.tensors)
        setattr(made, field, rng.choice((real + 1, max(real - 1, 0), number(rng))))


def kv(made: LyingGguf, rng: random.Random) -> None:
    """Change one value: by another of its type, of another type, or of an array one element or the count."""
    if not made.kv:
        return
    i = rng.randrange(len(made.kv))
    key, kind, value = made.kv[i]
    if kind == ARRAY and rng.random() < 0.85:
        made.kv[i] = (key, kind, _array(value, rng))
    elif kind in (STRING, ARRAY) or rng.random() < 0.3:
        made.kv[i] = (key, *_value(rng, kind if rng.random() < 0.6 else None))
    else:
        made.kv[i] = (key, kind, a_number(kind, rng))


def _value(rng: random.Random, kind: int | None) -> tuple[int, bytes]:
    """Return a new value and its type."""
    kind = kind if kind is not None else rng.choice((*_INTEGERS, F32, F64, BOOL, STRING, ARRAY))
    if kind == STRING:
        string = a_text(rng)
        return kind, text(string, number(rng) % 2**64 if rng.random() < 0.1 else None)
    if kind == ARRAY:
        item = rng.choice((U8, I32, U32, F32, STRING, BOOL, ARRAY, 77))
        items = [b"a", b"b"] if item == STRING else [1, 2] if item < STRING else []
        return kind, array(item, items, number(rng) % 2**64 if rng.random() < 0.3 else None)
    return kind, a_number(kind, rng)


def _array(value: bytes, rng: random.Random) -> bytes:
    """Return an array's bytes with one element, or the count, or the element type changed."""
    item, n = struct.unpack_from("<IQ", value)
    choice = rng.random()
    if choice < 0.12:
        return struct.pack("<IQ", item, rng.choice((n + 1, max(n - 1, 0), number(rng) % 2**64))) + value[12:]
    if choice < 0.2:
        return struct.pack("<IQ", rng.choice((*_INTEGERS, F32, STRING, ARRAY)), n) + value[12:]
    if item == STRING:
        strings = _strings(value, n)
        for _ in range(rng.choice((1, 1, 4, 32))):
            if strings:
                strings[rng.randrange(len(strings))] = rng.choice((a_text(rng), rng.choice(strings)))
        keep = rng.choice((len(strings), len(strings), len(strings) // 2, 0, 1))
        return array(STRING, strings[:keep])
    body = bytearray(value[12:])
    width = max(len(body) // n, 1) if n else 1
    for _ in range(rng.choice((1, 1, 4, 32))):
        if body and (item in _INTEGERS or item in (F32, F64, BOOL)):
            at = rng.randrange(len(body) // width) * width
            body[at : at + width] = a_number(item, rng)[:width].ljust(width, b"\0")
    if rng.random() < 0.2:
        n = rng.choice((0, 1, n // 2))
        del body[n * width :]
    return struct.pack("<IQ", item, n) + bytes(body)


def _strings(value: bytes, n: int) -> list[bytes]:
    found, at = [], 12
    for _ in range(min(n, 100_000)):
        (length,) = struct.unpack_from("<Q", value, at)
        found.append(value[at + 8 : at + 8 + length])
        at += 8 + length
    return found


def _keys(made: LyingGguf, rng: random.Random) -> None:
    """Lose a key, double it, rename it, or add one that llama.cpp asks for."""
    choice = rng.random()
    if choice < 0.3 and made.kv:
        del made.kv[rng.randrange(len(made.kv))]
    elif choice < 0.5 and made.kv:
        key, kind, value = rng.choice(made.kv)
        made.kv.append((rng.choice((key, key + b"\0", b"", a_text(rng))), kind, value))
    else:
        prefix = next((value[8:] for key, _, value in made.kv if key == b"general.architecture"), b"llama")
        key = rng.choice(_KEYS).replace(b"{arch}", prefix)
        made.kv.append((key, *_value(rng, rng.choice((None, U32, U32, F32, BOOL, STRING, ARRAY)))))


def _all_keys() -> tuple[bytes, ...]:
    """Return the names of all metadata that llama.cpp's Python package knows."""
    groups = [group for group in vars(gguf.Keys).values() if isinstance(group, type)]
    names = [name for group in groups for name in vars(group).values() if isinstance(name, str) and "." in name]
    return tuple(sorted({name.encode() for name in names if " " not in name}))


_KEYS = _all_keys()


def table(made: LyingGguf, rng: random.Random) -> None:
    """Change a row of the tensor table: what it says, or that it is there."""
    if not made.tensors:
        return
    i = rng.randrange(len(made.tensors))
    tensor = made.tensors[i]
    field = rng.choice(
        ("dims", "dims", "kind", "kind", "offset", "name", "n_dims", "name_length", "lose", "double", "swap")
    )
    if field == "dims":
        _dims(tensor, rng)
    elif field == "kind":
        tensor.kind = rng.choice((*_KINDS, rng.choice(_KINDS), -1, 4, 99, 2**31 - 1))
    elif field == "offset":
        tensor.offset = rng.choice((0, 1, 32, 64, number(rng)))
    elif field == "name":
        tensor.name = rng.choice((a_text(rng), rng.choice(made.tensors).name, tensor.name + b"x", b"n" * 64))
    elif field == "n_dims":
        tensor.n_dims = rng.choice((0, 1, 2, 3, 4, 5, 2**32 - 1))
    elif field == "name_length":
        tensor.name_length = number(rng) % 2**64
    elif field == "lose":
        del made.tensors[i]
    elif field == "double":
        made.tensors.append(tensor)
    else:
        other = rng.choice(made.tensors)
        tensor.name, other.name = other.name, tensor.name


def _dims(tensor: Tensor, rng: random.Random) -> None:
    dims = list(tensor.dims) or [1]
    choice = rng.random()
    if choice < 0.25:
        dims.reverse()
    elif choice < 0.4:
        dims.append(rng.choice((1, 2, number(rng))))
    elif choice < 0.5 and len(dims) > 1:
        dims.pop()
    else:
        i = rng.randrange(len(dims))
        dims[i] = rng.choice((number(rng), dims[i] + 1, max(dims[i] - 1, 0), dims[i] * 2, dims[i] // 2))
    tensor.dims = tuple(dims)
    if rng.random() < 0.5:  # with data to it, so that it comes further than to the check of sizes
        fit_data(tensor)


def fit_data(tensor: Tensor) -> None:
    """Give the tensor as much data as its type and dimensions want, unless that is a great deal."""
    try:
        block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.kind)]
    except ValueError:
        return
    n = 1
    for dim in tensor.dims:
        n *= dim
    n_bytes = n // block * block_bytes
    if 0 <= n_bytes <= 1 << 19:
        tensor.data = (tensor.data or b"\0")[:n_bytes].ljust(n_bytes, b"\x11")


def _retype(made: LyingGguf, rng: random.Random) -> None:
    """Give a tensor another type with data of the right size: operations see types that they do not take."""
    if made.tensors:
        tensor = rng.choice(made.tensors)
        tensor.kind = rng.choice(_KINDS)
        fit_data(tensor)


def _weights(made: LyingGguf, rng: random.Random) -> None:
    if not made.tensors:
        return
    tensor = rng.choice(made.tensors)
    if rng.random() < 0.5:
        value = struct.pack("<f", rng.choice(FLOATS))
        tensor.data = (value * (len(tensor.data) // 4 + 1))[: len(tensor.data)]
    else:
        tensor.data = mutate_bytes(tensor.data, rng)[: len(tensor.data)].ljust(len(tensor.data), b"\0")


def _tail(made: LyingGguf, rng: random.Random) -> None:
    """Let the data end early, or late."""
    if made.tensors:
        tensor = made.tensors[-1]
        tensor.data = rng.choice((b"", tensor.data[:-1], tensor.data[: len(tensor.data) // 2], tensor.data + bytes(64)))


def vocabulary(made: LyingGguf, rng: random.Random) -> None:
    """Change what the tokenizer is made of."""
    places = [i for i, (key, _, _) in enumerate(made.kv) if key.startswith(b"tokenizer.")]
    if not places or rng.random() < 0.15:
        key = rng.choice([key for key in _KEYS if key.startswith(b"tokenizer.")])
        made.kv.append((key, *_value(rng, rng.choice((None, U32, BOOL, STRING, ARRAY)))))
        return
    only = LyingGguf(kv=[made.kv[i] for i in places])
    rng.choice((kv, kv, kv, _keys))(only, rng)
    made.kv = [entry for i, entry in enumerate(made.kv) if i not in places] + only.kv


ALL_PARTS: tuple[Part, ...] = (
    _header,
    kv,
    kv,
    kv,
    _keys,
    _keys,
    table,
    table,
    table,
    _retype,
    _weights,
    _tail,
    vocabulary,
)
