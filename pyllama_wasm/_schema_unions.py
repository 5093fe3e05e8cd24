"""Alternatives that exclude each other, and objects that are several things at once."""

from __future__ import annotations

import json
from itertools import combinations
from typing import Any

from ._schema_nodes import ClosedObject
from ._schema_values import fail

__all__ = ["are_disjoint", "merged"]

Json = Any
Node = dict[str, Json]


def are_disjoint(nodes: list[Node]) -> bool:
    """Whether no value can match two of the nodes, as far as that can be told: by type, by values, or by a property."""
    return all(_exclude(one, other) for one, other in combinations(nodes, 2))


def _exclude(one: Node, other: Node) -> bool:
    if "enum" in one and "enum" in other:
        return not {_key(value) for value in one["enum"]} & {_key(value) for value in other["enum"]}
    types = _types(one), _types(other)
    if None not in types and not types[0] & types[1]:  # type: ignore[operator]
        return True
    common = set(one.get("required", ())) & set(other.get("required", ()))
    of_both = [(one["properties"][name], other["properties"][name]) for name in sorted(common)]
    return any("enum" in a and "enum" in b and _exclude(a, b) for a, b in of_both)


def _key(value: Json) -> str:
    return json.dumps(float(value) if type(value) is int else value, sort_keys=True)


def _types(node: Node) -> set[str] | None:
    """Return the types of a node's values, integers as numbers; ``None`` when they are not known."""
    if "enum" in node:
        names = {type(None): "null", bool: "boolean", int: "number", float: "number", str: "string", list: "array"}
        return {names.get(type(value), "object") for value in node["enum"]}
    if "anyOf" in node:
        found: set[str] = set()
        for member in node["anyOf"]:
            types = _types(member)
            if types is None:
                return None
            found |= types
        return found
    if "type" not in node:
        return None
    return {"number" if node["type"] == "integer" else node["type"]}


def merged(nodes: list[Node], path: str) -> Node:
    """Return one object that is all of the nodes; ``RequestError`` for other nodes, and for ones that contradict."""
    properties: dict[str, Node] = {}
    required: set[str] = set()
    is_closed = False
    for node in nodes:
        if not node:
            continue
        if node.get("type") != "object":
            fail(path, "allOf can be kept of objects only")
        for name, schema in node.get("properties", {}).items():
            if properties.setdefault(name, schema) != schema:
                fail(path, f"allOf describes {name} twice")
        required |= set(node.get("required", ()))
        if isinstance(node.get("additionalProperties"), dict):
            fail(path, "additionalProperties in allOf cannot be kept")
        is_closed = is_closed or isinstance(node, ClosedObject)
    for node in nodes:
        if isinstance(node, ClosedObject) and not set(properties) <= set(node.get("properties", ())):
            fail(path, "allOf has an object that allows no properties but its own")
    found: Node = {"type": "object", "additionalProperties": not is_closed}
    if properties:
        found = {
            "type": "object",
            "properties": properties,
            "required": sorted(required),
            "additionalProperties": False,
        }
    return ClosedObject(found) if is_closed else found
