"""Read the header of a GGUF file: metadata and tensor table, never the weights.

The file is untrusted. Every count is checked against what is left of the file before anything is allocated,
the number of entries and the bytes read are bounded, and long arrays are skipped and read only on demand. The
file is read, not mapped: a file truncated by someone else meanwhile ends in an error and not in a signal.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, cast, overload

from .errors import ModelFileError, ModelFormatError, UnsupportedModelError

__all__ = ["GGML_TYPES", "GGUFArray", "GGUFReader", "GGUFTensor", "GGUFValue", "TensorType"]

Scalar = int | float | bool | str


@dataclass(frozen=True)
class TensorType:
    """A ``ggml_type``: its name, and how many elements a block of how many bytes holds."""

    name: str
    block_size: int
    block_bytes: int


GGML_TYPES: Final[dict[int, TensorType]] = {
    number: TensorType(name, block_size, block_bytes)
    for number, name, block_size, block_bytes in (
        (0, "f32", 1, 4),
        (1, "f16", 1, 2),
        (2, "q4_0", 32, 18),
        (3, "q4_1", 32, 20),
        (6, "q5_0", 32, 22),
        (7, "q5_1", 32, 24),
        (8, "q8_0", 32, 34),
        (9, "q8_1", 32, 36),
        (10, "q2_K", 256, 84),
        (11, "q3_K", 256, 110),
        (12, "q4_K", 256, 144),
        (13, "q5_K", 256, 176),
        (14, "q6_K", 256, 210),
        (15, "q8_K", 256, 292),
        (16, "iq2_xxs", 256, 66),
        (17, "iq2_xs", 256, 74),
        (18, "iq3_xxs", 256, 98),
        (19, "iq1_s", 256, 50),
        (20, "iq4_nl", 32, 18),
        (21, "iq3_s", 256, 110),
        (22, "iq2_s", 256, 82),
        (23, "iq4_xs", 256, 136),
        (24, "i8", 1, 1),
        (25, "i16", 1, 2),
        (26, "i32", 1, 4),
        (27, "i64", 1, 8),
        (28, "f64", 1, 8),
        (29, "iq1_m", 256, 56),
        (30, "bf16", 1, 2),
        (34, "tq1_0", 256, 54),
        (35, "tq2_0", 256, 66),
        (39, "mxfp4", 32, 17),
        (40, "nvfp4", 64, 36),
        (41, "q1_0", 128, 18),
        (42, "q2_0", 64, 18),
    )
}
"""Every tensor type of this llama.cpp build by its number in the file."""

_SCALARS: Final[dict[int, tuple[str, struct.Struct]]] = {
    0: ("uint8", struct.Struct("<B")),
    1: ("int8", struct.Struct("<b")),
    2: ("uint16", struct.Struct("<H")),
    3: ("int16", struct.Struct("<h")),
    4: ("uint32", struct.Struct("<I")),
    5: ("int32", struct.Struct("<i")),
    6: ("float32", struct.Struct("<f")),
    7: ("bool", struct.Struct("<?")),
    10: ("uint64", struct.Struct("<Q")),
    11: ("int64", struct.Struct("<q")),
    12: ("float64", struct.Struct("<d")),
}
_STRING: Final = 8
_ARRAY: Final = 9

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

EAGER_ARRAY = 64
"""Arrays up to this length are read at once, longer ones on demand."""

MAX_KV = 100_000
MAX_TENSORS = 200_000
MAX_STRINGS = 8_000_000
MAX_STRING_BYTES = 64 << 20
_ITEMS_PER_READ = 1 << 16
_MAGIC = b"GGUF"
_MIN_KV_BYTES = 8 + 1 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 4 + 4 + 8
_MAX_DIMS = 4
_MAX_NAME = 64
_CHUNK = 1 << 20


class _Cursor:
    """A position in the file; reads through one buffer and never beyond the end."""

    def __init__(self, file: BinaryIO, size: int, operation: str) -> None:
        self._file, self.size, self.operation = file, size, operation
        self._buffer, self._start, self._pos = b"", 0, 0

    @property
    def offset(self) -> int:
        return self._start + self._pos

    @property
    def remaining(self) -> int:
        return self.size - self.offset

    def fail(self, reason: str, hint: str = "") -> ModelFormatError:
        return ModelFormatError(self.operation, reason, hint)

    def need(self, n: int, what: str) -> None:
        """Raise unless ``n`` more bytes are in the file."""
        if n > self.remaining:
            raise self.fail(f"{what} ends beyond the file", "truncated download?")

    def fill(self, n: int, what: str) -> None:
        """Make the next ``n`` bytes available in the buffer."""
        if self._pos + n <= len(self._buffer):
            return
        self.need(n, what)
        rest = self._buffer[self._pos :]
        self._start, self._pos = self.offset, 0
        try:
            self._file.seek(self._start + len(rest))
            self._buffer = rest + self._file.read(max(n - len(rest), _CHUNK))
        except OSError as error:
            raise ModelFileError(self.operation, error.strerror or str(error)) from error
        if len(self._buffer) < n:
            raise self.fail(f"{what} ends beyond the file", "truncated download?")

    def unpack(self, form: struct.Struct, what: str) -> Scalar:
        self.fill(form.size, what)
        value: Scalar = form.unpack_from(self._buffer, self._pos)[0]
        self._pos += form.size
        return value

    def unpack_many(self, form: struct.Struct, n: int, what: str) -> list[Scalar]:
        many = struct.Struct(f"<{n}{form.format[1:]}")
        self.fill(many.size, what)
        values: list[Scalar] = list(many.unpack_from(self._buffer, self._pos))
        self._pos += many.size
        return values

    def u32(self, what: str) -> int:
        return cast(int, self.unpack(_U32, what))

    def u64(self, what: str) -> int:
        return cast(int, self.unpack(_U64, what))

    def string(self, what: str) -> str:
        n = self.u64(what)
        self.need(n, what)
        if n > MAX_STRING_BYTES:
            raise self.fail(f"{what} is a string of {n} bytes", f"at most {MAX_STRING_BYTES} are accepted")
        self.fill(n, what)
        text = self._buffer[self._pos : self._pos + n].decode("utf-8", errors="replace")
        self._pos += n
        return text

    def skip(self, n: int, what: str) -> None:
        self.need(n, what)
        if self._pos + n <= len(self._buffer):
            self._pos += n
        else:
            self._buffer, self._start, self._pos = b"", self.offset + n, 0

    def skip_strings(self, n: int, what: str) -> None:
        """Step over ``n`` strings; the inner loop is what decides how long a large vocabulary takes."""
        unpack_from, remaining = _U64.unpack_from, n
        while remaining:
            buffer, pos, last = self._buffer, self._pos, len(self._buffer) - 8
            while remaining and pos <= last:
                end = pos + 8 + int(unpack_from(buffer, pos)[0])
                if end > len(buffer):
                    break
                pos, remaining = end, remaining - 1
            self._pos = pos
            if remaining:
                length = self.u64(what)
                self.skip(length, what)
                remaining -= 1
                if remaining:
                    self.fill(min(8, self.remaining), what)


class GGUFArray(Sequence[Scalar]):
    """A long array of a GGUF file; its elements are read from the file when first asked for."""

    def __init__(self, path: Path, offset: int, type_number: int, length: int) -> None:
        """Note where the array lies; nothing is read."""
        self._path, self._offset, self._type, self._length = path, offset, type_number, length
        self._items: list[Scalar] | None = None

    @property
    def type(self) -> str:
        """Return the type of the elements: ``string``, ``int32`` and so on."""
        return "string" if self._type == _STRING else _SCALARS[self._type][0]

    def head(self, n: int = 8) -> list[Scalar]:
        """Return the first ``n`` elements, reading no more than these."""
        return self._read(min(n, self._length)) if self._items is None else self._items[:n]

    def __len__(self) -> int:
        """Return the number of elements."""
        return self._length

    @overload
    def __getitem__(self, index: int) -> Scalar: ...

    @overload
    def __getitem__(self, index: slice) -> list[Scalar]: ...

    def __getitem__(self, index: int | slice) -> Scalar | list[Scalar]:
        """Return one element or a list of them."""
        return self._all()[index]

    def __iter__(self) -> Iterator[Scalar]:
        """Iterate over the elements."""
        return iter(self._all())

    def __repr__(self) -> str:
        """Summarise: type and length."""
        return f"<{self.type} array of {self._length}>"

    def _all(self) -> list[Scalar]:
        if self._items is None:
            self._items = self._read(self._length)
        return self._items

    def _read(self, n: int) -> list[Scalar]:
        operation = f"read {self._path.name}"
        with _OpenFile(self._path, operation) as (file, size):
            cursor = _Cursor(file, size, operation)
            cursor.skip(self._offset, "an array")
            return _read_items(cursor, self._type, n, "an array")


GGUFValue = Scalar | list[Scalar] | GGUFArray


@dataclass(frozen=True)
class GGUFTensor:
    """One row of the tensor table."""

    name: str
    shape: tuple[int, ...]
    """Elements per dimension, the fastest-varying one first, as ggml counts (``ne``)."""

    type_name: str
    """``q4_K``, ``f32`` and so on."""

    offset: int
    """Where the data starts, in bytes from the start of the file."""

    n_bytes: int

    @property
    def n_elements(self) -> int:
        """Return the number of elements."""
        product = 1
        for n in self.shape:
            product *= n
        return product


class _OpenFile:
    """Open a regular file for reading, as ``(file, size)``."""

    def __init__(self, path: Path, operation: str) -> None:
        self._path, self._operation = path, operation

    def __enter__(self) -> tuple[BinaryIO, int]:
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        try:
            # Not blocking: opening a FIFO would otherwise wait for a writer.
            fd = os.open(self._path, flags | getattr(os, "O_NONBLOCK", 0))
        except (OSError, ValueError) as error:  # ValueError: a zero character in the path
            reason = error.strerror if isinstance(error, OSError) else None
            raise ModelFileError(self._operation, reason or str(error), "check the path") from error
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise ModelFileError(self._operation, "it is not a regular file", "give the path of a GGUF file")
        except BaseException:
            os.close(fd)
            raise
        self._file = os.fdopen(fd, "rb", buffering=0)
        return cast(BinaryIO, self._file), info.st_size

    def __exit__(self, *exc: object) -> None:
        self._file.close()


class GGUFReader:
    """The header of a GGUF file.

    Raises ``ModelFileError`` when the file cannot be read, ``ModelFormatError`` when it is not a GGUF, truncated or
    inconsistent, ``UnsupportedModelError`` for a version or tensor type this build does not have. The file is
    closed when the constructor returns.
    """

    version: int
    """Version of the format, 2 or 3."""

    alignment: int
    """Alignment of the tensor data in bytes."""

    metadata: dict[str, GGUFValue]
    """Key to value; arrays over 64 elements are read lazily (``GGUFArray``)."""

    tensors: list[GGUFTensor]
    data_offset: int
    """Where the tensor data starts, in bytes from the start of the file."""

    def __init__(self, path: str | os.PathLike[str], operation: str = "") -> None:
        """Read and check the whole header of ``path``; ``operation`` begins the messages of its errors."""
        self.path = Path(path)
        operation = operation or f"read {self.path.name}"
        with _OpenFile(self.path, operation) as (file, self.size_bytes):
            cursor = _Cursor(file, self.size_bytes, operation)
            n_tensors, n_kv = self._read_counts(cursor)
            self.metadata = {}
            self._n_strings = 0
            for i in range(n_kv):
                self._read_kv(cursor, i)
            self.alignment = self._read_alignment(cursor)
            infos = [self._read_tensor_info(cursor, i) for i in range(n_tensors)]
            self.data_offset = -(-cursor.offset // self.alignment) * self.alignment
            self.tensors = self._place_tensors(cursor, infos)

    @property
    def architecture(self) -> str:
        """Return ``general.architecture``, or an empty string."""
        value = self.metadata.get("general.architecture", "")
        return value if isinstance(value, str) else ""

    @property
    def n_parameters(self) -> int:
        """Return the number of weights."""
        return sum(tensor.n_elements for tensor in self.tensors)

    def _read_counts(self, cursor: _Cursor) -> tuple[int, int]:
        _read_magic(cursor)
        self.version = cursor.u32("the version")
        if self.version and not self.version & 0xFFFF:
            raise UnsupportedModelError(cursor.operation, "the file is big-endian", "convert it to little-endian")
        if self.version not in (2, 3):
            hint = "convert the model again" if self.version < 2 else "a newer llama.cpp wrote it"
            raise UnsupportedModelError(cursor.operation, f"GGUF version {self.version} is not 2 or 3", hint)
        n_tensors, n_kv = cursor.u64("the tensor count"), cursor.u64("the metadata count")
        for n, limit, least, what in (
            (n_kv, MAX_KV, _MIN_KV_BYTES, "metadata entries"),
            (n_tensors, MAX_TENSORS, _MIN_TENSOR_BYTES, "tensors"),
        ):
            if n > cursor.remaining // least:
                raise cursor.fail(f"the header claims {n} {what}, more than the file can hold", "truncated download?")
            if n > limit:
                raise cursor.fail(f"the header claims {n} {what}", f"at most {limit} are accepted")
        return n_tensors, n_kv

    def _read_kv(self, cursor: _Cursor, index: int) -> None:
        key = cursor.string(f"metadata key {index}")
        if not key or key in self.metadata:
            raise cursor.fail(f"metadata key {index} {key!r} is empty or a duplicate")
        what = f"metadata {key!r}"
        number = cursor.u32(what)
        if number == _ARRAY:
            self.metadata[key] = self._read_array(cursor, what)
        elif number == _STRING:
            self.metadata[key] = cursor.string(what)
        elif number in _SCALARS:
            self.metadata[key] = cursor.unpack(_SCALARS[number][1], what)
        else:
            raise cursor.fail(f"{what} has the unknown type {number}")

    def _read_array(self, cursor: _Cursor, what: str) -> list[Scalar] | GGUFArray:
        number, n = cursor.u32(what), cursor.u64(what)
        if number != _STRING and number not in _SCALARS:
            raise cursor.fail(f"{what} is an array of the unknown type {number}")
        item_bytes = 8 if number == _STRING else _SCALARS[number][1].size
        if n > cursor.remaining // item_bytes:
            raise cursor.fail(f"{what} claims {n} elements and ends beyond the file", "truncated download?")
        if n <= EAGER_ARRAY:
            return _read_items(cursor, number, n, what)
        offset = cursor.offset
        if number == _STRING:
            self._n_strings += n
            if self._n_strings > MAX_STRINGS:
                raise cursor.fail(f"{what} claims {n} strings", f"at most {MAX_STRINGS} are accepted in all")
            cursor.skip_strings(n, what)
        else:
            cursor.skip(n * item_bytes, what)
        return GGUFArray(self.path, offset, number, n)

    def _read_alignment(self, cursor: _Cursor) -> int:
        value = self.metadata.get("general.alignment", 32)
        if not isinstance(value, int) or value <= 0 or value & (value - 1):
            raise cursor.fail(f"general.alignment is {value!r} and not a power of 2")
        return value

    def _read_tensor_info(self, cursor: _Cursor, index: int) -> tuple[str, tuple[int, ...], TensorType, int]:
        name = cursor.string(f"the name of tensor {index}")
        what = f"the table entry of tensor {name!r}"
        if len(name.encode()) >= _MAX_NAME:
            raise cursor.fail(f"the name of tensor {index} is longer than {_MAX_NAME - 1} bytes")
        n_dims = cursor.u32(what)
        if n_dims > _MAX_DIMS:
            raise cursor.fail(f"tensor {name!r} has {n_dims} dimensions", f"at most {_MAX_DIMS} are possible")
        shape = tuple(cursor.u64(what) for _ in range(n_dims)) or (1,)
        number, offset = cursor.u32(what), cursor.u64(what)
        if number not in GGML_TYPES:
            raise UnsupportedModelError(
                cursor.operation,
                f"tensor {name!r} has the unknown type {number}",
                "a newer or older llama.cpp wrote it",
            )
        kind = GGML_TYPES[number]
        if shape[0] % kind.block_size:
            raise cursor.fail(f"tensor {name!r} has rows of {shape[0]} elements, not whole {kind.name} blocks")
        return name, shape, kind, offset

    def _place_tensors(
        self, cursor: _Cursor, infos: list[tuple[str, tuple[int, ...], TensorType, int]]
    ) -> list[GGUFTensor]:
        tensors: list[GGUFTensor] = []
        names: set[str] = set()
        expected = 0
        for name, shape, kind, offset in infos:
            if name in names:
                raise cursor.fail(f"tensor {name!r} is there twice")
            names.add(name)
            tensor = GGUFTensor(name, shape, kind.name, self.data_offset + offset, 0)
            n_bytes = tensor.n_elements // kind.block_size * kind.block_bytes
            if offset != expected:
                raise cursor.fail(f"tensor {name!r} starts at {offset} instead of {expected}")
            if tensor.offset + n_bytes > self.size_bytes:
                raise cursor.fail(f"tensor {name!r} ends beyond the file", "truncated download?")
            tensors.append(GGUFTensor(name, shape, kind.name, tensor.offset, n_bytes))
            expected += -(-n_bytes // self.alignment) * self.alignment
        return tensors


def check_magic(path: Path, operation: str) -> None:
    """Raise ``ModelFileError`` or ``ModelFormatError`` unless ``path`` can be read and starts like a GGUF."""
    with _OpenFile(path, operation) as (file, size):
        _read_magic(_Cursor(file, size, operation))


def _read_magic(cursor: _Cursor) -> None:
    hint = "give the path of a GGUF file"
    if cursor.size < len(_MAGIC):
        raise cursor.fail(f"{cursor.size} bytes are too few for a GGUF", hint)
    magic = cursor.u32("the magic number").to_bytes(4, "little")
    if magic != _MAGIC:
        raise cursor.fail(f"it starts with {magic.decode('latin-1')!r} instead of 'GGUF'", hint)


def _read_items(cursor: _Cursor, number: int, n: int, what: str) -> list[Scalar]:
    if number == _STRING:
        return [cursor.string(what) for _ in range(n)]
    form, items = _SCALARS[number][1], []
    for start in range(0, n, _ITEMS_PER_READ):
        items += cursor.unpack_many(form, min(_ITEMS_PER_READ, n - start), what)
    return items
