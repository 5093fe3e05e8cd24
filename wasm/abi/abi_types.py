"""Turns C types into type codes and lays structs out for the target.

Type codes: ``void bool i8 u8 i16 u16 i32 u32 i64 u64 f32 f64``, ``ptr``, ``cstr`` (``const char *``), ``fn:NAME`` (a
function pointer that Python can implement), ``struct:NAME`` (by value) and ``CODE[n]`` (an array inside a struct, text
being ``char[n]``).
"""

from __future__ import annotations

import re

from abi_clang import Declarations, Node
from abi_config import CALLBACK_IDENTITY, GUEST_FUNCTION_TYPES, USER_DATA_NAMES
from abi_model import AbiError, Callback, Field, Param, Struct

SCALAR_SIZES = {
    "bool": 1,
    "char": 1,
    "i8": 1,
    "u8": 1,
    "i16": 2,
    "u16": 2,
    "i32": 4,
    "u32": 4,
    "i64": 8,
    "u64": 8,
    "f32": 4,
    "f64": 8,
}

_QUALIFIERS = re.compile(r"\b(const|volatile|restrict)\b")
_ARRAY = re.compile(r"^(.*?)\s*\[(\d+)\](.*)$")
_FUNCTION_POINTER = re.compile(r"^(.*?)\(\*(?:const)?\)\((.*)\)$")


def c_spelling(qual_type: str) -> str:
    """Return the C++ spelling of a type that clang printed for C."""
    return re.sub(r"\brestrict\b", "", qual_type).replace("_Bool", "bool").strip()


def split_params(text: str) -> list[str]:
    """Split the parameter list of a function type at its top-level commas."""
    parts, depth, current = [], 0, ""
    for char in text:
        depth += {"(": 1, ")": -1}.get(char, 0)
        if char == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += char
    return [part for part in [*parts, current.strip()] if part and part != "void"]


class Types:
    """Type lookup over one set of declarations; collects the structs and callbacks that it meets."""

    def __init__(self, declarations: Declarations, pointer_size: int) -> None:
        """Prepare lookups; ``pointer_size`` is in bytes."""
        self.declarations, self.pointer_size = declarations, pointer_size
        word = 8 * pointer_size
        self._builtins = {
            "void": "void", "_Bool": "bool", "bool": "bool", "char": "i8", "signed char": "i8", "unsigned char": "u8",
            "short": "i16", "unsigned short": "u16", "int": "i32", "unsigned int": "u32", "long": f"i{word}",
            "unsigned long": f"u{word}", "long long": "i64", "unsigned long long": "u64", "float": "f32",
            "double": "f64",
        }  # fmt: skip
        self._enums = {node["name"]: enum_code(node) for node in declarations.enums if "name" in node}
        self.structs: dict[str, Struct] = {}
        self._callbacks: dict[str, tuple[str, str, tuple[Param, ...], str]] = {}

    def code(self, qual_type: str) -> str:
        """Return the type code of a C type."""
        if _FUNCTION_POINTER.match(qual_type):
            raise AbiError(f"translate {qual_type}: function pointer without a name")
        array = _ARRAY.match(qual_type)
        if array:
            element = array.group(1) + array.group(3)
            return f"{'char' if element == 'char' else self.code(element)}[{array.group(2)}]"
        plain = " ".join(_QUALIFIERS.sub(" ", qual_type).split())
        if plain.endswith("*"):
            self._reach(plain)
            pointee = qual_type.rstrip().removesuffix("const").rstrip()
            return "cstr" if pointee in ("const char *", "char const *") else "ptr"
        return self._named(plain)

    def _named(self, plain: str) -> str:
        if plain in self._builtins:
            return self._builtins[plain]
        tag, _, name = plain.partition(" ")
        if tag == "enum":
            return self._enums[name]
        if tag in ("struct", "union") or plain in self.declarations.untagged:
            return f"struct:{self.struct(name or plain).name}"
        node = self.declarations.typedefs.get(plain)
        if node is None:
            raise AbiError(f"translate {plain}: unknown type")
        underlying = node["type"]["qualType"]
        if _FUNCTION_POINTER.match(underlying):
            if plain in GUEST_FUNCTION_TYPES:
                return "ptr"
            return self._function_pointer(plain, underlying, node["text"])
        return self.code(underlying)

    def _reach(self, plain: str) -> None:
        """Lay out the struct that a pointer leads to, when the headers define it."""
        name, before = plain.rstrip("* "), ""
        while name != before and not name.startswith("struct ") and name in self.declarations.typedefs:
            name, before = self.declarations.typedefs[name]["type"]["qualType"].rstrip("* "), name
        name = name.removeprefix("struct ")
        if name in self.declarations.records:
            self.struct(name)

    def _function_pointer(self, name: str, qual_type: str, text: str) -> str:
        if name not in self._callbacks:
            match = _FUNCTION_POINTER.match(qual_type)
            assert match
            self._callbacks[name] = ("", "", (), "")  # a callback may mention itself through a struct
            types = split_params(match.group(2))
            params = tuple(
                Param(n, c_spelling(t), self.code(t)) for n, t in zip(declared_names(text), types, strict=True)
            )
            result = match.group(1).strip()
            self._callbacks[name] = (c_spelling(result), self.code(result), params, callback_identity(name, params))
        return f"fn:{name}"

    def callbacks(self) -> dict[str, Callback]:
        """Return every callback type met so far, numbered in the order of their names."""
        found = {}
        tables: dict[str, int] = {}
        for kind, name in enumerate(sorted(self._callbacks)):
            struct, _, field = name.partition(".")
            c_result, result, params, identity = self._callbacks[name]
            is_in_table = bool(field) and identity.endswith("->ctx")
            tables[struct] = tables.get(struct, -1) + 1
            slot = tables[struct] if is_in_table else -1
            found[name] = Callback(name, kind, c_result, result, params, identity, slot)
        return found

    def size_align(self, code: str) -> tuple[int, int]:
        """Return the size and alignment of a type code in bytes."""
        array = _ARRAY.match(code)
        if array:
            size, align = self.size_align(array.group(1))
            return size * int(array.group(2)), align
        if code in ("ptr", "cstr") or code.startswith("fn:"):
            return self.pointer_size, self.pointer_size
        if code.startswith("struct:"):
            struct = self.structs[code.removeprefix("struct:")]
            return struct.size, struct.align
        return SCALAR_SIZES[code], SCALAR_SIZES[code]

    def struct(self, name: str) -> Struct:
        """Return the layout of a struct. Raises AbiError for opaque structs and bit fields."""
        if name in self.structs:
            return self.structs[name]
        node = self.declarations.records.get(name)
        if node is None:
            raise AbiError(f"lay out struct {name}: it has no definition here (by value?)")
        c_type = name if name in self.declarations.untagged else f"struct {name}"
        self.structs[name] = Struct(name, c_type, 0, 1, ())  # pointers to itself must find an entry
        fields, size, align = self._layout(name, node)
        self.structs[name] = Struct(name, c_type, size, align, tuple(fields))
        return self.structs[name]

    def _layout(self, owner: str, record: Node) -> tuple[list[Field], int, int]:
        """Lay out one record by the rules of the C ABI: natural alignment, unions share offset 0."""
        fields: list[Field] = []
        offset, size, align, unnamed = 0, 0, 1, None
        for node in record["inner"]:
            if node["kind"] == "RecordDecl" and "name" not in node:
                unnamed = node
            if node["kind"] != "FieldDecl":
                continue
            name = node.get("name", "")
            if node.get("isBitfield"):
                raise AbiError(f"lay out struct {owner}: bit field {name} has no portable layout")
            code, inner, field_size, field_align = self._field(owner, node, unnamed)
            align = max(align, field_align)
            offset = -(-offset // field_align) * field_align
            if code:
                fields.append(Field(name, offset, code))
            prefix = f"{name}." if name else ""
            fields += [Field(prefix + item.name, offset + item.offset, item.code) for item in inner]
            size = max(size, offset + field_size)
            offset = 0 if record["tagUsed"] == "union" else offset + field_size
        return fields, -(-size // align) * align, align

    def _field(self, owner: str, node: Node, unnamed: Node | None) -> tuple[str, list[Field], int, int]:
        """Return (code, nested fields, size, alignment); the code of a field of unnamed type is empty."""
        qual_type = node["type"]["qualType"]
        if "(unnamed" in qual_type or "(anonymous" in qual_type:
            assert unnamed is not None
            return "", *self._layout(owner, unnamed)
        if _FUNCTION_POINTER.match(qual_type):
            code = self._function_pointer(f"{owner}.{node['name']}", qual_type, node["text"])
        else:
            code = self.code(qual_type)
        inner: list[Field] = []
        if code.startswith("struct:") and not code.endswith("]"):
            inner = list(self.structs[code.removeprefix("struct:")].fields)
        return code, inner, *self.size_align(code)


def enum_code(node: Node) -> str:
    """Return ``i32`` for an enum with a negative constant, else ``u32``, as clang chooses for C."""
    values = enum_values(node).values()
    if any(not -(2**31) <= value < 2**32 for value in values):
        raise AbiError(f"translate enum {node.get('name')}: a constant needs more than 32 bits")
    return "i32" if any(value < 0 for value in values) else "u32"


def enum_values(node: Node) -> dict[str, int]:
    """Return the constants of one enum; clang gives a value only where the source does."""
    values: dict[str, int] = {}
    following = 0
    for constant in node["inner"]:
        if constant["kind"] != "EnumConstantDecl":
            continue
        explicit = [inner["value"] for inner in constant.get("inner", ()) if "value" in inner]
        value = int(explicit[0]) if explicit else following
        values[constant["name"]] = value
        following = value + 1
    return values


def declared_names(text: str) -> list[str]:
    """Return the parameter names in the source text of a function pointer; clang's tree does not keep them."""
    match = re.search(r"\(\s*\*\s*\w+\s*\)\s*\((.*)\)$", text)
    if not match:
        raise AbiError(f"read parameter names of {text}: not a plain function pointer")
    names = [re.search(r"(\w+)$", part) for part in split_params(match.group(1))]
    return [name.group(1) if name else f"arg{i}" for i, name in enumerate(names)]


def parm_nodes(node: Node) -> list[Node]:
    """Return the parameter declarations directly below a declaration."""
    return [inner for inner in node.get("inner", ()) if inner["kind"] == "ParmVarDecl"]


def callback_identity(name: str, params: tuple[Param, ...]) -> str:
    """Return the C expression that holds the id of the Python target."""
    for key in (name, f"{name.partition('.')[0]}.*"):
        if key in CALLBACK_IDENTITY:
            return CALLBACK_IDENTITY[key]
    carriers = [param.name for param in params if param.name in USER_DATA_NAMES and param.c_type == "void *"]
    if len(carriers) != 1:
        raise AbiError(f"translate callback {name}: no user data parameter (add it to CALLBACK_IDENTITY)")
    return carriers[0]
