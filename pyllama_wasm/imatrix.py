"""Importance matrices: how much each input of a tensor matters, as ``llama-imatrix`` measured it on real text.

Both formats are read, the GGUF one and the older ``.dat``. The file is untrusted: every count is checked against what
is left of the file before anything is allocated.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from .errors import ModelFileError, ModelFormatError, RequestError, reason_of
from .gguf import GGUFArray, GGUFReader, GGUFTensor

__all__ = ["Imatrix", "read_imatrix"]

Floats = npt.NDArray[np.float32]

_SUMS, _COUNTS = ".in_sum2", ".counts"
_REQUIRED = ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")
_I32 = struct.Struct("<i")
_MAX_NAME = 4096


@dataclass(frozen=True)
class Imatrix:
    """Importances by tensor name: what ``quantize`` weighs the error of each weight with."""

    entries: Mapping[str, Floats]
    """Tensor name to ``(n_inputs,)`` float32, for a tensor of experts ``(n_experts * n_inputs,)``."""

    source: str = ""
    """The file it was read from, as it was named; ``llama-quantize`` notes it in the model it writes."""

    datasets: tuple[str, ...] = ()
    """Names of the texts it was measured on."""

    n_chunks: int = -1
    """How many chunks of text; -1 where the file does not say."""

    def __post_init__(self) -> None:
        """Check that every entry is a flat array of finite numbers; raise ``RequestError`` naming the first bad one."""
        clean: dict[str, Floats] = {}
        for name, values in self.entries.items():
            if not isinstance(name, str) or not name or "\0" in name:
                raise RequestError("use an importance matrix", f"{name!r} is not the name of a tensor")
            try:
                array = np.ascontiguousarray(values, dtype=np.float32)
            except (TypeError, ValueError) as error:
                raise RequestError("use an importance matrix", f"the entry {name!r}: {error}") from error
            if array.ndim != 1 or not array.size:
                raise RequestError("use an importance matrix", f"the entry {name!r} is not a list of numbers")
            if not np.isfinite(array).all():
                raise RequestError("use an importance matrix", f"the entry {name!r} has values that are not finite")
            clean[name] = array
        object.__setattr__(self, "entries", clean)


def read_imatrix(path: str | os.PathLike[str]) -> Imatrix:
    """Read an importance matrix, GGUF or ``.dat``, as ``llama-quantize`` does.

    Raises ``ModelFileError`` when the file cannot be read and ``ModelFormatError`` when it is neither, truncated or
    inconsistent.
    """
    operation = f"read {Path(path).name}"
    try:
        with Path(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if file.read(4) != b"GGUF":
                file.seek(0)
                return _read_legacy(_Cursor(file, size, operation), os.fspath(path))
    except OSError as error:
        raise ModelFileError(operation, reason_of(error), "check the path") from error
    return _read_gguf(Path(path), operation)


def _read_gguf(path: Path, operation: str) -> Imatrix:
    reader = GGUFReader(path, operation)
    for key in _REQUIRED:
        if key not in reader.metadata:
            raise ModelFormatError(operation, f"it has no {key}", "is it an importance matrix?")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    names = [name.removesuffix(_SUMS) for name in tensors if name.endswith(_SUMS)]
    orphans = {name.removesuffix(_COUNTS) for name in tensors if name.endswith(_COUNTS)} - set(names)
    if orphans or not names:
        raise ModelFormatError(operation, f"it has no sums of {min(orphans, default='any tensor')!r}")
    entries: dict[str, Floats] = {}
    with path.open("rb") as file:
        for name in names:
            if name + _COUNTS not in tensors:
                raise ModelFormatError(operation, f"it has no counts of {name!r}")
            sums = _values(file, tensors[name + _SUMS], operation)
            entries[name] = _mean(sums, _values(file, tensors[name + _COUNTS], operation), f"{operation}: {name}")
    datasets = reader.metadata["imatrix.datasets"]
    n_chunks = reader.metadata["imatrix.chunk_count"]
    names_of = tuple(str(item) for item in datasets) if isinstance(datasets, (list, GGUFArray)) else ()
    return Imatrix(entries, os.fspath(path), names_of, n_chunks if isinstance(n_chunks, int) else -1)


def _values(file: BinaryIO, tensor: GGUFTensor, operation: str) -> Floats:
    if tensor.type_name != "f32":
        raise ModelFormatError(operation, f"{tensor.name!r} is {tensor.type_name} and not f32")
    file.seek(tensor.offset)
    data = file.read(tensor.n_bytes)
    if len(data) != tensor.n_bytes:
        raise ModelFormatError(operation, f"{tensor.name!r} ends beyond the file", "truncated download?")
    return np.frombuffer(data, "<f4").astype(np.float32)


def _mean(sums: Floats, counts: Floats, operation: str) -> Floats:
    """Divide the sums of each expert by how often it was used; one that never was counts evenly."""
    if not counts.size or sums.size % counts.size:
        raise ModelFormatError(operation, f"{sums.size} sums do not go with {counts.size} counts")
    rows = sums.reshape(counts.size, -1)
    used = np.trunc(counts + np.copysign(np.float32(0.5), counts))  # lround
    with np.errstate(divide="ignore", invalid="ignore"):
        mean: Floats = np.where(used[:, None] > 0, rows / used[:, None], np.float32(1.0)).astype(np.float32)
    if not np.isfinite(mean).all():
        raise ModelFormatError(operation, "it has values that are not finite")
    return mean.reshape(-1)


class _Cursor:
    """Reads numbers and arrays and never beyond the end."""

    def __init__(self, file: BinaryIO, size: int, operation: str) -> None:
        self._file, self._left, self.operation = file, size, operation

    @property
    def is_at_end(self) -> bool:
        return self._left == 0

    def take(self, n: int, what: str) -> bytes:
        if not 0 <= n <= self._left:
            raise ModelFormatError(self.operation, f"{what} ends beyond the file", "is it an importance matrix?")
        data = self._file.read(n)
        if len(data) != n:
            raise ModelFormatError(self.operation, f"{what} ends beyond the file", "truncated meanwhile?")
        self._left -= n
        return data

    def i32(self, what: str) -> int:
        return int(_I32.unpack(self.take(4, what))[0])

    def string(self, what: str) -> str:
        n = self.i32(what)
        if n > _MAX_NAME:
            raise ModelFormatError(self.operation, f"{what} is {n} bytes long", "is it an importance matrix?")
        return self.take(n, what).partition(b"\0")[0].decode("utf-8", errors="replace")


def _read_legacy(cursor: _Cursor, source: str) -> Imatrix:
    """Layout: n, then n times (name, calls, count, float32[count]); then, if at all, chunks and the text's name."""
    n_entries = cursor.i32("the number of entries")
    if n_entries < 1:
        raise ModelFormatError(cursor.operation, f"it has {n_entries} entries", "is it an importance matrix?")
    entries: dict[str, Floats] = {}
    for i in range(n_entries):
        name = cursor.string(f"the name of entry {i}")
        n_calls, n_values = cursor.i32(f"entry {i}"), cursor.i32(f"entry {i}")
        if not name or n_values < 1:
            raise ModelFormatError(cursor.operation, f"entry {i} is empty", "is it an importance matrix?")
        values = np.frombuffer(cursor.take(4 * n_values, f"entry {i}"), "<f4").astype(np.float32)
        mean = values / np.float32(n_calls) if n_calls > 0 else values
        if not np.isfinite(mean).all():
            raise ModelFormatError(cursor.operation, f"the entry {name!r} has values that are not finite")
        entries[name] = mean
    n_chunks = -1
    datasets: tuple[str, ...] = ()
    if not cursor.is_at_end:
        n_chunks = cursor.i32("the number of chunks")
        if not cursor.is_at_end and (dataset := cursor.string("the name of the text")):
            datasets = (dataset,)
    return Imatrix(entries, source, datasets, n_chunks)
