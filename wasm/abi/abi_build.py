"""Builds the interface model: selection, type translation, constants."""

from __future__ import annotations

import ast
import hashlib
import operator
import re
from collections.abc import Mapping
from pathlib import Path

import abi_config as config
from abi_clang import Declarations, Node, dump, read
from abi_model import Abi, AbiError, Function, Param
from abi_types import Types, c_spelling, enum_values, parm_nodes

POINTER_SIZE = 4

_INT_SUFFIX = re.compile(r"\b(0[xX][0-9a-fA-F]+|\d+)[uUlL]+\b")
_LLAMA_API = re.compile(r"\bLLAMA_API\b(?!\s*\n?#)[^;{]*?\b(llama_\w+)\s*\(")
_OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.LShift: operator.lshift,
    ast.RShift: operator.rshift, ast.BitOr: operator.or_, ast.BitAnd: operator.and_,
}  # fmt: skip


def build(llama_cpp: Path, zig: Path) -> Abi:
    """Read the headers below ``llama_cpp`` and return everything that is to be generated."""
    include_dirs = [llama_cpp / folder for folder in config.INCLUDE_DIRS]
    declarations = read(dump(zig, include_dirs, config.HEADERS), include_dirs, config.HEADERS)
    abi = Abi(POINTER_SIZE, config.BUILD, source_hash(llama_cpp))
    translate(abi, declarations, config.WHOLE_HEADERS, config.SELECTED, config.EXCLUDED)
    check_complete(abi, llama_api_names(llama_cpp))
    return abi


def check_complete(abi: Abi, names: list[str]) -> None:
    """Raise AbiError unless every function that ``llama.h`` exports is in the table or excluded with a reason."""
    missing = sorted(set(names) - set(abi.functions) - set(config.EXCLUDED))
    if missing:
        raise AbiError(f"compare llama.h with the table: {', '.join(missing)} missing")


def translate(
    abi: Abi,
    declarations: Declarations,
    whole_headers: tuple[str, ...],
    selected: Mapping[str, frozenset[str]],
    excluded: Mapping[str, str],
) -> None:
    """Fill ``abi`` from the declarations. Raises AbiError for a selected name that no header declares."""
    types = Types(declarations, abi.pointer_size)
    names = {name for name in declarations.functions if declarations.headers[name] in whole_headers}
    for header, chosen in selected.items():
        absent = sorted(name for name in chosen if declarations.headers.get(name) != header)
        if absent:
            raise AbiError(f"select from {header}: {', '.join(absent)} not declared there (renamed upstream?)")
        names |= chosen
    stale = sorted(set(excluded) - names)
    if stale:
        raise AbiError(f"exclude {', '.join(stale)}: no such function")
    for name in sorted(names - set(excluded)):
        abi.functions[name] = _function(types, declarations.functions[name], declarations.headers[name])
    for name in sorted(declarations.records):
        if declarations.headers[f"struct {name}"] in whole_headers:
            types.struct(name)
    abi.structs = dict(sorted(types.structs.items()))
    abi.callbacks = types.callbacks()
    abi.constants = _constants(declarations)


def _function(types: Types, node: Node, header: str) -> Function:
    name, qual_type = node["name"], node["type"]["qualType"]
    if node.get("variadic"):
        raise AbiError(f"export {name}: variadic functions cannot be called from the host")
    c_result = qual_type[: _params_start(qual_type)].strip()
    params = tuple(
        Param(
            inner.get("name", f"arg{i}"), c_spelling(inner["type"]["qualType"]), types.code(inner["type"]["qualType"])
        )
        for i, inner in enumerate(parm_nodes(node))
    )
    return Function(name, c_spelling(c_result), types.code(c_result), params, header, node.get("doc", ""))


def _params_start(qual_type: str) -> int:
    """Return where the parameter list starts in a function type such as ``float *(int)``."""
    depth = 0
    for i in range(len(qual_type) - 1, -1, -1):
        depth += {")": 1, "(": -1}.get(qual_type[i], 0)
        if depth == 0:
            return i
    raise AbiError(f"read function type {qual_type}: unbalanced parentheses")


def _constants(declarations: Declarations) -> dict[str, int | str]:
    found: dict[str, int | str] = {}
    for node in declarations.enums:
        found.update(enum_values(node))
    for name in declarations.macros:
        value = _evaluate(name, declarations.macros, found)
        if value is not None:
            found[name] = value
    return {name: found[name] for name in sorted(found) if name.startswith(config.CONSTANT_PREFIXES)}


def _evaluate(name: str, macros: dict[str, str], enums: dict[str, int | str], depth: int = 0) -> int | str | None:
    """Return the value of a macro that is an integer or string expression, else None."""
    if name in enums:
        return enums[name]
    if name not in macros or depth > 20:
        return None
    try:
        tree = ast.parse(_INT_SUFFIX.sub(r"\1", macros[name].strip()), mode="eval").body
    except SyntaxError:
        return None

    def value(node: ast.expr) -> int | str | None:
        if isinstance(node, ast.Constant) and isinstance(node.value, int | str):
            return node.value
        if isinstance(node, ast.Name):
            return _evaluate(node.id, macros, enums, depth + 1)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            inner = value(node.operand)
            return -inner if isinstance(inner, int) else None
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            left, right = value(node.left), value(node.right)
            if isinstance(left, int) and isinstance(right, int):
                return int(_OPERATORS[type(node.op)](left, right))
        return None

    return value(tree)


def source_hash(llama_cpp: Path) -> str:
    """Return the SHA-256 over the headers that are read, independent of where they lie."""
    digest = hashlib.sha256()
    for header in sorted(config.HEADERS):
        path = next(p for folder in config.INCLUDE_DIRS if (p := llama_cpp / folder / header).is_file())
        digest.update(f"{header}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def llama_api_names(llama_cpp: Path) -> list[str]:
    """Return every function that ``llama.h`` marks ``LLAMA_API``, found in the text and not in clang's tree."""
    text = (llama_cpp / "include" / "llama.h").read_text(encoding="utf-8")
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    text = re.sub(r"^[ \t]*#.*$", "", text, flags=re.MULTILINE)
    return sorted(set(_LLAMA_API.findall(text)))
