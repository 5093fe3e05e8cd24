"""The C interface as plain values: what the parser hands to the two writers."""

from __future__ import annotations

from dataclasses import dataclass, field


class AbiError(Exception):
    """The headers hold something that the generator cannot or must not translate."""


@dataclass(frozen=True)
class Param:
    """One parameter: its name, its C spelling and its type code."""

    name: str
    c_type: str
    code: str


@dataclass(frozen=True)
class Function:
    """One exported function."""

    name: str
    c_result: str
    result: str
    params: tuple[Param, ...]
    header: str
    doc: str


@dataclass(frozen=True)
class Field:
    """One field of a struct; nested fields carry a dotted name."""

    name: str
    offset: int
    code: str


@dataclass(frozen=True)
class Struct:
    """Memory layout of one struct on the target."""

    name: str
    c_type: str
    size: int
    align: int
    fields: tuple[Field, ...]


@dataclass(frozen=True)
class Callback:
    """One C function pointer type that Python can implement.

    ``identity`` is the C expression that holds the user data: the integer id of the Python target itself, or for a
    function of a struct (``STRUCT.FIELD``) the address of a table with one id for each of its functions. It is empty
    where the type offers no place for one; the id is then bound to the whole type.
    """

    name: str
    kind: int
    c_result: str
    result: str
    params: tuple[Param, ...]
    identity: str
    slot: int = -1
    """Place of the id in the table of ids, or -1 where the user data is the id."""


@dataclass
class Abi:
    """Everything that is generated."""

    pointer_size: int
    build: str
    source_hash: str
    functions: dict[str, Function] = field(default_factory=dict)
    structs: dict[str, Struct] = field(default_factory=dict)
    callbacks: dict[str, Callback] = field(default_factory=dict)
    constants: dict[str, int | str] = field(default_factory=dict)
