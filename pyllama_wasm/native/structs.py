"""C structs as Python values: named fields over the bytes the guest sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

from .. import _abi
from ..errors import RequestError
from .codes import array, from_result, packer, struct_name, to_number


class _Field(NamedTuple):
    """How one field is read from and written to the struct's bytes."""

    get: Callable[[bytearray], Any]
    set: Callable[[bytearray, Any], None]


class Struct:
    """A copy of one C struct, by value.

    ``s["n_ctx"] = 4096`` sets a field and ``s["n_ctx"]`` reads it. Nested fields have dotted names
    (``s["video_params.fps_target"]``), a nested struct as a whole is a :class:`Struct`, an array is a tuple, and an
    array of ``char`` is a string. Pointers are addresses (None is 0); function pointers also take a ``Callback``.
    ``bytes(s)`` is what lies in guest memory. An unknown field raises KeyError, a value that does not fit RequestError.
    """

    __slots__ = ("_data", "_fields", "name")

    def __init__(self, name: str, data: bytes | None = None) -> None:
        """Make a zeroed struct, or one from exactly as many bytes as C says. KeyError for an unknown name."""
        size = layout(name).size
        if data is not None and len(data) != size:
            raise RequestError(f"read struct {name}", f"{len(data)} bytes instead of {size}")
        self.name = name
        self._data = bytearray(size if data is None else data)
        self._fields = _fields(name)

    def __getitem__(self, field: str) -> Any:
        return self._field(field).get(self._data)

    def __setitem__(self, field: str, value: Any) -> None:
        try:
            self._field(field).set(self._data, value)
        except (OverflowError, ValueError) as error:
            raise RequestError(f"set {self.name}.{field}", str(error)) from error
        except TypeError as error:
            raise TypeError(f"set {self.name}.{field}: {error}") from error

    def _field(self, name: str) -> _Field:
        try:
            return self._fields[name]
        except KeyError:
            raise KeyError(f"struct {self.name} has no field {name}") from None

    def __bytes__(self) -> bytes:
        return bytes(self._data)

    def __len__(self) -> int:
        """Return the size in bytes."""
        return len(self._data)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the field names, in memory order."""
        return iter(self._fields)

    def __contains__(self, field: object) -> bool:
        return field in self._fields

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Struct):
            return NotImplemented
        return self.name == other.name and self._data == other._data

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={self[name]!r}" for name in self)
        return f"Struct({self.name}: {fields})"


def layout(name: str) -> _abi.Struct:
    """Return the table's entry of a struct. Raises KeyError naming it."""
    try:
        return _abi.STRUCTS[name]
    except KeyError:
        raise KeyError(f"there is no struct {name}") from None


@cache
def _fields(name: str) -> dict[str, _Field]:
    return {field: _access(offset, code) for field, (offset, code) in layout(name).fields.items()}


def _access(offset: int, code: str) -> _Field:
    if (items := array(code)) is not None:
        return _text(offset, items.n) if items.element == "char" else _items(offset, items.element, items.n)
    if (name := struct_name(code)) is not None:
        return _nested(offset, name)
    pack = packer(code)
    convert, back = to_number(code), from_result(code) or (lambda value: value)

    def get(data: bytearray) -> Any:
        return back(pack.unpack_from(data, offset)[0])

    def put(data: bytearray, value: Any) -> None:
        pack.pack_into(data, offset, convert(value))

    return _Field(get, put)


def _nested(offset: int, name: str) -> _Field:
    size = layout(name).size

    def get(data: bytearray) -> Struct:
        return Struct(name, bytes(data[offset : offset + size]))

    def put(data: bytearray, value: Any) -> None:
        if not isinstance(value, Struct) or value.name != name:
            raise TypeError(f"expected a struct {name}")
        data[offset : offset + size] = bytes(value)

    return _Field(get, put)


def _items(offset: int, element: str, n: int) -> _Field:
    name = struct_name(element)
    size = layout(name).size if name else packer(element).size
    fields = [_access(offset + i * size, element) for i in range(n)]

    def get(data: bytearray) -> tuple[Any, ...]:
        return tuple(field.get(data) for field in fields)

    def put(data: bytearray, value: Any) -> None:
        values = tuple(value)
        if len(values) != n:
            raise ValueError(f"expected {n} values, got {len(values)}")
        changed = bytearray(data)  # all of them or none
        for field, item in zip(fields, values, strict=True):
            field.set(changed, item)
        data[:] = changed

    return _Field(get, put)


def _text(offset: int, n: int) -> _Field:
    def get(data: bytearray) -> str:
        return bytes(data[offset : offset + n]).partition(b"\0")[0].decode("utf-8", errors="replace")

    def put(data: bytearray, value: Any) -> None:
        if not isinstance(value, str | bytes):
            raise TypeError("expected str or bytes")
        text = value.encode() if isinstance(value, str) else value
        if len(text) >= n or b"\0" in text:
            raise ValueError(f"expected at most {n - 1} bytes without a NUL")
        data[offset : offset + n] = text.ljust(n, b"\0")

    return _Field(get, put)
