"""Read the header of a GGUF file: metadata and tensor table, and views of the weights.

The file is untrusted. Every count is checked against what is left of the file before anything is allocated,
the number of entries and the bytes read are bounded, and long arrays are skipped and read only on demand. The
header is read, not mapped: a file truncated by someone else meanwhile ends in an error and not in a signal. Only
``GGUFReader.tensor_data`` maps.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, overload

import numpy as np
import numpy.typing as npt

from ._gguf_cursor import SCALARS, STRING, Cursor, Data, Scalar, open_data, read_items, read_magic
from .errors import ModelFileError, RequestError, UnsupportedModelError, reason_of
from .ggml_types import GGML_TYPES, TensorType

__all__ = ["GGML_TYPES", "GGUFArray", "GGUFReader", "GGUFTensor", "GGUFValue", "TensorType"]

_ARRAY: Final = 9

EAGER_ARRAY = 64
"""Arrays up to this length are read at once, longer ones on demand."""

MAX_KV = 100_000
MAX_TENSORS = 200_000
MAX_STRINGS = 8_000_000
MAX_KEY_BYTES = 65_535
MAX_ALIGNMENT = 1 << 20
_MIN_KV_BYTES = 8 + 1 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 4 + 4 + 8
_MAX_DIMS = 4
_MAX_NAME_BYTES = 63
_MAX_ELEMENTS = 2**63 - 1
_DTYPES: Final[dict[str, str]] = {
    "f32": "<f4", "f16": "<f2", "f64": "<f8", "i8": "i1", "i16": "<i2", "i32": "<i4", "i64": "<i8", "bf16": "<u2",
}  # fmt: skip


class GGUFArray(Sequence[Scalar]):
    """A long array of a GGUF file; its elements are read from the file when first asked for."""

    def __init__(self, data: Data, operation: str, offset: int, type_number: int, length: int) -> None:
        """Note where the array lies; nothing is read."""
        self._data, self._operation, self._offset = data, operation, offset
        self._type, self._length = type_number, length
        self._items: list[Scalar] | None = None

    @property
    def type(self) -> str:
        """Return the type of the elements: ``string``, ``int32`` and so on."""
        return "string" if self._type == STRING else SCALARS[self._type][0]

    def head(self, n: int = 8) -> list[Scalar]:
        """Return the first ``n`` elements, reading no more than these.

        Raises ``ModelFormatError`` when the file has changed meanwhile or the elements take more than 256 MiB, and
        ``ModelFileError`` when it is gone; so does every other way to the elements.
        """
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
        with open_data(self._data, self._operation) as (read_at, size):
            return read_items(Cursor(read_at, size, self._operation, self._offset), self._type, n, "an array")


GGUFValue = Scalar | list[Scalar] | GGUFArray


@dataclass(frozen=True)
class GGUFTensor:
    """One row of the tensor table."""

    name: str
    shape: tuple[int, ...]
    """Elements per dimension, the fastest-varying one first, as ggml counts (``ne``)."""

    type: TensorType
    """Its ``ggml_type``."""

    offset: int
    """Where the data starts, in bytes from the start of the file."""

    n_bytes: int

    @property
    def type_name(self) -> str:
        """Return the name of its type: ``q4_K``, ``f32`` and so on."""
        return self.type.name

    @property
    def n_elements(self) -> int:
        """Return the number of elements."""
        product = 1
        for n in self.shape:
            product *= n
        return product


class GGUFReader:
    """The header of a GGUF file.

    Raises ``ModelFileError`` when the file cannot be read, ``ModelFormatError`` when it is not a GGUF, truncated or
    inconsistent, ``UnsupportedModelError`` for a version or tensor type this build does not have. The file is
    closed when the constructor returns; long arrays and tensor data open it again.
    """

    version: int
    """Version of the format, 2 or 3."""

    alignment: int
    """Alignment of the tensor data in bytes."""

    metadata: dict[str, GGUFValue]
    """Key to value; arrays over 64 elements are read lazily (``GGUFArray``)."""

    types: dict[str, str]
    """Key to the type of its value: ``uint32``, ``string``, ``array``."""

    tensors: list[GGUFTensor]
    """The tensor table, in file order."""

    data_offset: int
    """Where the tensor data starts, in bytes from the start of the file."""

    size_bytes: int
    """Size of the file."""

    def __init__(
        self, source: str | os.PathLike[str] | int | bytes | bytearray | memoryview, operation: str = ""
    ) -> None:
        """Read and check the whole header of ``source``; ``operation`` begins the messages of its errors.

        ``source`` is a path, the bytes of a whole file, or the descriptor of one, which stays the caller's and must
        stay open for as long as long arrays and tensor data are read.
        """
        self._data: Data = Path(source) if isinstance(source, (str, os.PathLike)) else source
        name = self._data.name if isinstance(self._data, Path) else "a GGUF"
        self._operation = operation or f"read {name}"
        with open_data(self._data, self._operation) as (read_at, self.size_bytes):
            cursor = Cursor(read_at, self.size_bytes, self._operation)
            n_tensors, n_kv = self._read_counts(cursor)
            self.metadata, self.types, self._n_strings = {}, {}, 0
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

    def tensor(self, name: str) -> GGUFTensor:
        """Return the tensor of that name; ``RequestError`` when there is none."""
        for tensor in self.tensors:
            if tensor.name == name:
                return tensor
        raise RequestError(self._operation, f"there is no tensor {name!r}")

    def tensor_data(self, name: str) -> npt.NDArray[Any]:
        """Return a read-only view of a tensor's data, mapped from the file and not copied.

        The slowest-varying dimension comes first, as in numpy: ``GGUFTensor.shape`` reversed. f32, f16, f64 and the
        integers have their own dtype, bf16 is ``uint16``; of a quantized type it is the blocks as ``uint8``, the last
        dimension being the bytes of a row. A file that is truncated while it is mapped ends the process when the view
        is touched (SIGBUS): read what others may change with ``GGUFReader(path.read_bytes())``.

        Raises ``RequestError`` for an unknown name, ``ModelFileError`` when the file cannot be mapped.
        """
        tensor = self.tensor(name)
        kind = tensor.type
        row_bytes = tensor.shape[0] // kind.block_size * kind.block_bytes
        raw = self._map(tensor.offset, tensor.n_bytes)
        if kind.name in _DTYPES:
            return raw.view(_DTYPES[kind.name]).reshape(tensor.shape[::-1])
        return raw.reshape((*tensor.shape[:0:-1], row_bytes))

    def _map(self, offset: int, n_bytes: int) -> npt.NDArray[np.uint8]:
        data = self._data
        if n_bytes == 0:
            return np.zeros(0, np.uint8)
        if isinstance(data, (bytes, bytearray, memoryview)):
            array = np.frombuffer(memoryview(data).cast("B"), np.uint8, n_bytes, offset)
            array.flags.writeable = False
            return array
        try:
            if isinstance(data, Path):
                return np.memmap(data, np.uint8, "r", offset, (n_bytes,))
            with open(data, "rb", closefd=False) as file:
                return np.memmap(file, np.uint8, "r", offset, (n_bytes,))
        except (OSError, ValueError) as error:  # ValueError: the file is shorter by now
            reason = reason_of(error)
            raise ModelFileError(self._operation, f"its tensor data cannot be mapped: {reason}") from error

    def _read_counts(self, cursor: Cursor) -> tuple[int, int]:
        read_magic(cursor)
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

    def _read_kv(self, cursor: Cursor, index: int) -> None:
        cursor.check_time()
        key = cursor.string(f"metadata key {index}", MAX_KEY_BYTES)
        if not key or key in self.metadata:
            raise cursor.fail(f"metadata key {index} {key!r} is empty or a duplicate")
        what = f"metadata {key!r}"
        number = cursor.u32(what)
        if number == _ARRAY:
            self.metadata[key] = self._read_array(cursor, what)
        elif number == STRING:
            self.metadata[key] = cursor.string(what)
        elif number in SCALARS:
            self.metadata[key] = cursor.unpack(SCALARS[number][1], what)
        else:
            raise cursor.fail(f"{what} has the unknown type {number}")
        self.types[key] = "array" if number == _ARRAY else "string" if number == STRING else SCALARS[number][0]

    def _read_array(self, cursor: Cursor, what: str) -> list[Scalar] | GGUFArray:
        number, n = cursor.u32(what), cursor.u64(what)
        if number != STRING and number not in SCALARS:
            raise cursor.fail(f"{what} is an array of the unknown type {number}")
        item_bytes = 8 if number == STRING else SCALARS[number][1].size
        if n > cursor.remaining // item_bytes:
            raise cursor.fail(f"{what} claims {n} elements and ends beyond the file", "truncated download?")
        if n <= EAGER_ARRAY:
            return read_items(cursor, number, n, what)
        offset = cursor.offset
        if number == STRING:
            self._n_strings += n
            if self._n_strings > MAX_STRINGS:
                raise cursor.fail(f"{what} claims {n} strings", f"at most {MAX_STRINGS} are accepted in all")
            cursor.skip_strings(n, what)
        else:
            cursor.skip(n * item_bytes, what)
        return GGUFArray(self._data, self._operation, offset, number, n)

    def _read_alignment(self, cursor: Cursor) -> int:
        value = self.metadata.get("general.alignment", 32)
        kind = self.types.get("general.alignment", "uint32")
        if kind != "uint32" or not isinstance(value, int):
            raise cursor.fail(f"general.alignment is of type {kind} and not uint32")
        if value <= 0 or value & (value - 1):
            raise cursor.fail(f"general.alignment is {value} and not a power of 2")
        if value > MAX_ALIGNMENT:
            raise cursor.fail(f"general.alignment is {value}", f"at most {MAX_ALIGNMENT} is accepted")
        return value

    def _read_tensor_info(self, cursor: Cursor, index: int) -> tuple[str, tuple[int, ...], TensorType, int]:
        cursor.check_time()
        name = cursor.string(f"the name of tensor {index}", _MAX_NAME_BYTES)
        what = f"the table entry of tensor {name!r}"
        n_dims = cursor.u32(what)
        if n_dims > _MAX_DIMS:
            raise cursor.fail(f"tensor {name!r} has {n_dims} dimensions", f"at most {_MAX_DIMS} are possible")
        shape = tuple(cursor.u64(what) for _ in range(n_dims)) or (1,)
        if max(shape) > _MAX_ELEMENTS:
            raise cursor.fail(f"tensor {name!r} has a negative dimension")
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
        self, cursor: Cursor, infos: list[tuple[str, tuple[int, ...], TensorType, int]]
    ) -> list[GGUFTensor]:
        tensors: list[GGUFTensor] = []
        names: set[str] = set()
        expected = 0
        for name, shape, kind, offset in infos:
            cursor.check_time()
            if name in names:
                raise cursor.fail(f"tensor {name!r} is there twice")
            names.add(name)
            tensor = GGUFTensor(name, shape, kind, self.data_offset + offset, 0)
            n_bytes = tensor.n_elements // kind.block_size * kind.block_bytes
            if offset != expected:
                raise cursor.fail(f"tensor {name!r} starts at {offset} instead of {expected}")
            if tensor.offset + n_bytes > self.size_bytes:
                raise cursor.fail(f"tensor {name!r} ends beyond the file", "truncated download?")
            tensors.append(GGUFTensor(name, shape, kind, tensor.offset, n_bytes))
            expected += -(-n_bytes // self.alignment) * self.alignment
        return tensors
