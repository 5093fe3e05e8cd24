"""JSON schemas, rewritten into what llama.cpp's converter keeps to the letter; what it would ignore is refused.

The converter looks at some keywords of a node and at no others: of ``{"$ref": ..., "minLength": 1}`` it reads the
reference alone, of a number it knows no bounds, and a pattern it cannot convert becomes any text. Here every node is
taken apart, and put together again with one meaning. What comes out may allow less than what went in, never more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn
from urllib.parse import unquote

from ._schema_nodes import (
    ANNOTATIONS,
    ASSERTIONS,
    array_node,
    integer_node,
    number_node,
    object_node,
    string_node,
)
from ._schema_unions import are_disjoint, merged
from ._schema_values import fail

__all__ = ["check_depth", "normalized"]

Json = Any

MAX_DEPTH, MAX_NODES = 64, 20_000
"""How deep a schema may be nested, references apart, and how large it may be: the guest recurses into it."""

_TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
_MAX_CHARACTERS = 1 << 18
_UNIONS = ("anyOf", "oneOf", "allOf", "$ref")
_BY_KEYWORD = {keyword: kind for kind, keywords in ASSERTIONS.items() for keyword in keywords}


def check_depth(schema: Json) -> None:
    """Raise ``RequestError`` for JSON nested deeper, or larger, than the guest takes."""
    level, n_nodes, depth = [schema], 0, 0
    while level:
        depth, n_nodes = depth + 1, n_nodes + len(level)
        if depth > 2 * MAX_DEPTH or n_nodes > MAX_NODES:
            fail("", f"it is nested more than {2 * MAX_DEPTH} deep, or has more than {MAX_NODES} values")
        level = [
            child
            for node in level
            if isinstance(node, (Mapping, list, tuple))
            for child in (node.values() if isinstance(node, Mapping) else node)
        ]


def normalized(schema: Mapping[str, Json]) -> dict[str, Json]:
    """Return a schema for the converter that allows only what ``schema`` does; ``RequestError`` for what it cannot."""
    if not isinstance(schema, Mapping):
        fail("", f"it is {type(schema).__name__} and no object")
    check_depth(schema)
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        fail("", f"it cannot be written as JSON: {error}")
    if len(text) > _MAX_CHARACTERS:
        fail("", f"it has more than {_MAX_CHARACTERS} characters")
    try:
        return _Normalizer(json.loads(text), text).run()
    except RecursionError:
        fail("", "it is nested too deep")


class _Normalizer:
    def __init__(self, root: dict[str, Json], text: str) -> None:
        self.root = root
        # Names of the converter's rules come from those of properties and references: ours must be none of theirs.
        self.salt = next((salt for n in range(1 << 10) if (salt := f"r{n}x") not in text), "")
        if not self.salt:
            fail("", "it has every name that rules of its own could get")
        self.depth = 0
        self.names: dict[str, str] = {}
        self.defs: dict[str, Json] = {}

    def run(self) -> dict[str, Json]:
        found = self.node(self.root, "#")
        if not found:  # the converter takes an empty schema for none at all
            found = {"anyOf": [{}]}
        return {**found, "$defs": self.defs} if self.defs else found

    def node(self, schema: Json, path: str) -> dict[str, Json]:
        """Return one node without annotations, all its keywords kept."""
        if schema is True:
            return {}
        if not isinstance(schema, dict):
            fail(
                path, "nothing is allowed there" if schema is False else f"it is {type(schema).__name__} and no schema"
            )
        self.check_keywords(schema, path)
        given = {key: value for key, value in schema.items() if not _is_annotation(key)}
        for union in _UNIONS:
            if union in given:
                return self.union(union, given, path)
        if "const" in given or "enum" in given:
            return self.values(given, path)
        return self.typed(given, path)

    def check_keywords(self, schema: dict[str, Json], path: str) -> None:
        for keyword in schema:
            if keyword in ("$id", "$schema") and path != "#":
                fail(path, f"{keyword} has a meaning only at the root")
            is_known = keyword in (*_UNIONS, "type", "const", "enum") or keyword in _BY_KEYWORD
            if not is_known and not _is_annotation(keyword):
                fail(path, f"{keyword} cannot be kept")

    # -- alternatives, conjunctions and references ------------------------------------------------------------------

    def union(self, union: str, given: dict[str, Json], path: str) -> dict[str, Json]:
        beside = sorted(set(given) - {union})
        if union == "allOf":
            return self.all_of(given, path)
        if beside == ["type"] and union == "anyOf" and isinstance(given["type"], str):
            members = given["anyOf"] if isinstance(given["anyOf"], list) else []
            if all(isinstance(member, dict) and member.get("type") == given["type"] for member in members):
                beside = []
        if beside:
            fail(path, f"{beside[0]} beside {union} cannot be kept")
        if union == "$ref":
            return {"$ref": "#/$defs/" + self.reference(given["$ref"], path)}
        members = given[union]
        if not isinstance(members, list) or not members:
            fail(path, f"{union} is no list of schemas")
        found = [self.node(member, f"{path}/{union}/{i}") for i, member in enumerate(members)]
        if union == "oneOf" and not are_disjoint([self.resolved(node) for node in found]):
            fail(path, "a value could match several of oneOf, and it cannot be kept that it matches one: use anyOf")
        return {"anyOf": found}

    def all_of(self, given: dict[str, Json], path: str) -> dict[str, Json]:
        members = given["allOf"]
        if not isinstance(members, list) or not members:
            fail(path, "allOf is no list of schemas")
        found = [self.node(member, f"{path}/allOf/{i}") for i, member in enumerate(members)]
        own = {key: value for key, value in given.items() if key != "allOf"}
        if own:
            found.append(self.node(own, path))
        if len(found) == 1:
            return found[0]
        return merged([self.resolved(node) for node in found], path)

    def reference(self, ref: Json, path: str) -> str:
        """Return the name of the definition that a reference becomes."""
        if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
            fail(path, f"$ref is {ref!r}, and only references into the schema itself can be kept")
        if ref not in self.names:
            target = self.target(ref, path)
            self.names[ref] = name = f"{self.salt}{len(self.names)}"
            self.defs[name] = None  # until it is known: it may refer to itself
            self.depth += 1
            if self.depth > MAX_DEPTH:
                fail(path, f"references lead more than {MAX_DEPTH} deep")
            self.defs[name] = self.node(target, ref)
            self.depth -= 1
            self.resolved({"$ref": f"#/$defs/{name}"})
        return self.names[ref]

    def target(self, ref: str, path: str) -> Json:
        found: Json = self.root
        for part in ref.split("/")[1:]:
            key = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(found, dict) and key in found:
                found = found[key]
            elif isinstance(found, list) and key.isascii() and key.isdigit() and int(key[:9]) < len(found):
                found = found[int(key[:9])]
            else:
                fail(path, f"$ref {ref} refers to nothing")
        return found

    def resolved(self, node: dict[str, Json]) -> dict[str, Json]:
        """Return what a node is behind its references; ``RequestError`` when it is nothing but references."""
        seen = set()
        while "$ref" in node:
            name = node["$ref"].rpartition("/")[2]
            target = self.defs[name]
            if name in seen:
                fail("", "a $ref refers to itself and nothing else")
            if target is None:  # being read further up, where it is no mere reference
                return node
            seen.add(name)
            node = target
        return node

    # -- values and types -------------------------------------------------------------------------------------------

    def values(self, given: dict[str, Json], path: str) -> dict[str, Json]:
        beside = sorted(set(given) - {"const", "enum", "type"})
        if beside:
            fail(path, f"{beside[0]} beside enum or const cannot be kept")
        values = given.get("enum", [given.get("const")])
        if not isinstance(values, list):
            fail(path, "enum is no list")
        types = self.types(given, path)
        kept = [v for v in values if types is None or any(_is_of(v, kind) for kind in types)]
        if "enum" in given and "const" in given:
            kept = [value for value in kept if json.dumps(value) == json.dumps(given["const"])]
        if not kept:
            fail(path, "none of its values is allowed")
        for value in kept:
            _check_numbers(value, path)
        return {"enum": kept}

    def types(self, given: dict[str, Json], path: str) -> list[str] | None:
        if "type" not in given:
            return None
        types = given["type"] if isinstance(given["type"], list) else [given["type"]]
        if not types or not all(isinstance(kind, str) and kind in _TYPES for kind in types):
            fail(path, f"its type is {given['type']!r}")
        return types

    def typed(self, given: dict[str, Json], path: str) -> dict[str, Json]:
        types = self.types(given, path)
        if types is None:
            kinds = sorted({_BY_KEYWORD[keyword] for keyword in given})
            if not kinds:
                return {}
            if len(kinds) > 1 or kinds == ["number"]:
                fail(path, f"it says {' and '.join(sorted(given))} and no type")
            types = kinds
        nodes = [self.of_type(kind, given, path) for kind in types]
        return nodes[0] if len(nodes) == 1 else {"anyOf": nodes}

    def of_type(self, kind: str, given: dict[str, Json], path: str) -> dict[str, Json]:
        """Return the node of one type; keywords of other types say nothing about it."""
        keywords = ASSERTIONS.get("number" if kind == "integer" else kind, ())
        own = {key: value for key, value in given.items() if key in keywords}
        if kind == "object":
            return object_node(own, path, self.node)
        if kind == "array":
            return array_node(own, path, self.node, self.resolved)
        if kind == "string":
            return string_node(own, path)
        if kind == "integer":
            return integer_node(own, path)
        if kind == "number":
            return number_node(own, path)
        return {"type": kind}


def _is_annotation(keyword: str) -> bool:
    return keyword in ANNOTATIONS or keyword.startswith("x-")


def _is_of(value: Json, kind: str) -> bool:
    if kind == "integer":
        return type(value) is int or (type(value) is float and value.is_integer())
    if kind == "number":
        return type(value) in (int, float)
    kinds = {"null": type(None), "boolean": bool, "string": str, "array": list, "object": dict}
    return type(value) is kinds[kind]


def _check_numbers(value: Json, path: str) -> None:
    """Refuse numbers that the guest would write differently."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            _check_numbers(item, path)
    elif (type(value) is int and abs(value) >= 1 << 63) or (type(value) is float and not math.isfinite(value)):
        _refuse_number(value, path)


def _refuse_number(value: float, path: str) -> NoReturn:
    fail(path, f"{value} does not fit 64 bits")
