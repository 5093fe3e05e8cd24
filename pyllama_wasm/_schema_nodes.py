"""The nodes of a JSON schema by their type: what of their keywords can be kept, and how it is said."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from ._schema_pattern import json_pattern
from ._schema_values import fail, multiples_node, unique_array

__all__ = [
    "ANNOTATIONS",
    "ASSERTIONS",
    "ClosedObject",
    "array_node",
    "integer_node",
    "number_node",
    "object_node",
    "string_node",
]

Json = Any
Read = Callable[[Json, str], dict[str, Json]]
Resolve = Callable[[dict[str, Json]], dict[str, Json]]

ANNOTATIONS = frozenset(
    {
        "$schema", "$id", "$comment", "$defs", "definitions", "$anchor", "title", "description", "default", "examples",
        "example", "deprecated", "readOnly", "writeOnly", "discriminator",
    }
)  # fmt: skip
"""Keywords that say nothing about values. ``discriminator`` is OpenAPI's, beside a ``oneOf`` that says the same."""

ASSERTIONS: dict[str, tuple[str, ...]] = {
    "object": ("properties", "required", "additionalProperties", "minProperties"),
    "array": ("items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems"),
    "string": ("pattern", "format", "minLength", "maxLength"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
"""The keywords that can be kept at all, by what they are about."""

_MOST = 1000
"""Largest count of characters, items or properties: the grammar has a rule for each."""

MAX_OPTIONAL = 100

_UNBOUNDED = 10**17
"""The converter's integers have fewer digits: bounds beyond say nothing."""

_LARGEST = 10**15

_FARTHEST = 2**62
"""Numbers up to here are integers of 64 bits, as the converter reads them."""

_YEAR = "([0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_LEAP = "([0-9]{2}(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)"
_DAY = (
    f"({_YEAR}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))"
    f"|{_LEAP}-02-29)"
)
_TIME = "([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\\.[0-9]{3})?(Z|(\\+|-)([01][0-9]|2[0-3]):[0-5][0-9])"
_OCTET = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"


def _uuid(version: str, variant: str) -> str:
    rest = f"{version}[0-9a-f]{{3}}-{variant}[0-9a-f]{{3}}-[0-9a-f]{{12}}"
    return f"[0-9a-f]{{8}}-[0-9a-f]{{4}}-{rest}"


FORMATS = {
    "date": _DAY,
    "time": _TIME,
    "date-time": f"{_DAY}T{_TIME}",
    "ipv4": f"{_OCTET}\\.{_OCTET}\\.{_OCTET}\\.{_OCTET}",
    "uuid": _uuid("[0-9a-f]", "[0-9a-f]"),
    **{f"uuid{version}": _uuid(str(version), "[89ab]") for version in range(1, 6)},
}
"""As patterns of the whole text. The converter knows some, but its February has 31 days."""


def _count(own: dict[str, Json], keyword: str, default: int, path: str) -> int:
    value = own.get(keyword, default)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        fail(path, f"{keyword} is {value!r} and no count")
    if value > _MOST:
        fail(path, f"{keyword} is {value}, and a grammar counts no further than {_MOST}")
    return int(value)


class ClosedObject(dict[str, Json]):
    """An object that allows no further properties because its schema says so."""


def object_node(own: dict[str, Json], path: str, read: Read) -> dict[str, Json]:
    """Return an object. Properties that are required and not described get the schema of further ones."""
    properties, required = own.get("properties", {}), own.get("required", [])
    more = own.get("additionalProperties", True)
    if not isinstance(properties, dict):
        fail(path, "properties is no object")
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        fail(path, "required is no list of names")
    found = {name: read(node, f"{path}/properties/{name}") for name, node in properties.items() if node is not False}
    for name in required:
        if name not in found:
            if more is False or properties.get(name) is False:
                fail(path, f"{name} is required, and not allowed")
            found[name] = read(more, f"{path}/additionalProperties")
    if len(found) - len(set(required)) > MAX_OPTIONAL:
        fail(path, f"it has more than {MAX_OPTIONAL} optional properties, and the grammar grows with their square")
    if _count(own, "minProperties", 0, path) > len(set(required)):
        fail(path, "minProperties cannot be kept: say which are required")
    # Written in the order in which they are described, as the converter has it: a model writes what it has read.
    node: dict[str, Json] = {"type": "object", "properties": found, "required": sorted(set(required))}
    # Beside described properties the converter takes none as a rule, and a name like theirs could spell one of them.
    closed = more is False or (bool(found) and ("additionalProperties" not in own or not _are_plain(found)))
    closed = closed or any(node is False for node in properties.values())
    node["additionalProperties"] = False if closed else read(more, f"{path}/additionalProperties") or True
    if not found:
        del node["properties"], node["required"]
    is_forbidding = any(each is False for each in properties.values())
    return ClosedObject(node) if more is False or is_forbidding else node


def _are_plain(names: dict[str, Json]) -> bool:
    return all(name and all(char.isalnum() or char in "_ $.@:/" for char in name) for name in names)


def array_node(own: dict[str, Json], path: str, read: Read, resolve: Resolve) -> dict[str, Json]:
    """Return an array, or a tuple of the items that are described one by one."""
    least, most = _count(own, "minItems", 0, path), _count(own, "maxItems", _MOST, path)
    if least > most:
        fail(path, "minItems is more than maxItems")
    items, first = own.get("items", True), own.get("prefixItems")
    if isinstance(items, list):
        if first is not None:
            fail(path, "items is a list beside prefixItems")
        items, first = own.get("additionalItems", True), items
    elif own.get("additionalItems", True) is not True:
        fail(path, "additionalItems cannot be kept without a list of items")
    if first:
        if not isinstance(first, list):
            fail(path, "prefixItems is no list")
        if own.get("uniqueItems", False) is not False and len(first) > 1:
            fail(path, "uniqueItems of a tuple cannot be kept")
        if not least <= len(first) <= most:
            fail(path, f"a tuple of {len(first)} items cannot have as many as minItems and maxItems say")
        return {"type": "array", "prefixItems": [read(node, f"{path}/items/{i}") for i, node in enumerate(first)]}
    if items is False:
        if least:
            fail(path, "it must have items, and may have none")
        return {"type": "array", "items": {"type": "null"}, "maxItems": 0}
    found = read(items, f"{path}/items")
    if own.get("uniqueItems", False) is not False and most > 1:
        return unique_array(resolve(found), least, most if "maxItems" in own else None, path)
    node: dict[str, Json] = {"type": "array", "items": found, "minItems": least}
    if "maxItems" in own:
        node["maxItems"] = most
    return node


def string_node(own: dict[str, Json], path: str) -> dict[str, Json]:
    """Return a string, of a pattern, a format or a length; not of several, which no grammar could keep at once."""
    own = {key: value for key, value in own.items() if value not in ("", 0) or key == "maxLength"}
    kinds = sorted({"length" if key in ("minLength", "maxLength") else key for key in own})
    if len(kinds) > 1:
        fail(path, f"{' and '.join(kinds)} cannot be kept together")
    if "pattern" in own:
        if not isinstance(own["pattern"], str):
            fail(path, "its pattern is no text")
        return {"type": "string", "pattern": json_pattern(own["pattern"])}
    if "format" in own:
        if not isinstance(own["format"], str) or own["format"] not in FORMATS:
            fail(path, f"the format {own['format']!r} cannot be kept, but those of {', '.join(FORMATS)}")
        return {"type": "string", "pattern": json_pattern(f"^({FORMATS[own['format']]})$")}
    least, most = _count(own, "minLength", 0, path), _count(own, "maxLength", _MOST, path)
    if least > most:
        fail(path, "minLength is more than maxLength")
    node: dict[str, Json] = {"type": "string"}
    if least:
        node["minLength"] = least
    if "maxLength" in own:
        node["maxLength"] = most
    return node


def integer_node(own: dict[str, Json], path: str) -> dict[str, Json]:
    """Return an integer within bounds, both included."""
    step = _step(own, path)
    lows = [_bound(own, "minimum", path, math.ceil, 0), _bound(own, "exclusiveMinimum", path, math.floor, 1)]
    highs = [_bound(own, "maximum", path, math.floor, 0), _bound(own, "exclusiveMaximum", path, math.ceil, -1)]
    low = max((bound for bound in lows if bound is not None and bound > -_UNBOUNDED), default=None)
    high = min((bound for bound in highs if bound is not None and bound < _UNBOUNDED), default=None)
    if low is not None and high is not None and low > high:
        fail(path, "no integer is within its bounds")
    if step != 1:
        return multiples_node(low, high, step, path, is_integer=True)
    if high is not None and high < 0 and low is None:
        low = -_LARGEST  # the converter's rule for the negative ones without it begins with zeros
    node: dict[str, Json] = {"type": "integer"}
    for keyword, bound in (("minimum", low), ("maximum", high)):
        if bound is not None:
            if abs(bound) > _LARGEST:
                fail(path, f"{keyword} is {bound}, and a grammar has no bounds so large")
            node[keyword] = bound
    return node


def _bound(own: dict[str, Json], keyword: str, path: str, rounded: Callable[[float], int], step: int) -> int | None:
    if keyword not in own:
        return None
    value = _number_of(own, keyword, path)
    return rounded(value) + step


def _number_of(own: dict[str, Json], keyword: str, path: str) -> int | float:
    value = own[keyword]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        fail(path, f"{keyword} is {value!r} and no number")
    return value


def number_node(own: dict[str, Json], path: str) -> dict[str, Json]:
    """Return a number, which has no bounds unless it is one of few multiples."""
    step = _step(own, path) if "multipleOf" in own else None
    if step is not None and step.denominator == 1:  # an integer, though it could be written otherwise
        return integer_node(own, path)
    if step is not None:
        low = _edge(own, "minimum", "exclusiveMinimum", path, step, 1)
        return multiples_node(low, _edge(own, "maximum", "exclusiveMaximum", path, step, -1), step, path)
    if own:
        fail(path, f"{sorted(own)[0]} of a number cannot be kept: only integers and multiples have bounds")
    return {"type": "number"}


def _step(own: dict[str, Json], path: str) -> Fraction:
    """Return what numbers are multiples of: of a number in JSON what it says, not the nearest binary one."""
    value = own.get("multipleOf", 1)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < _UNBOUNDED:
        fail(path, f"multipleOf is {value!r}")
    return Fraction(repr(value))


def _edge(own: dict[str, Json], closed: str, opened: str, path: str, step: Fraction, sign: int) -> Fraction | None:
    """Return the outermost multiple of ``step`` within one of the two bounds; ``sign`` is the way inwards."""
    edges = []
    for keyword in (closed, opened):
        if keyword in own:
            value = _number_of(own, keyword, path)
            if abs(value) > _FARTHEST:
                fail(path, f"{keyword} is {value!r:.80}, and a grammar has no numbers so large")
            count = Fraction(repr(value)) / step * sign
            n = math.ceil(count)
            edges.append((n + (keyword == opened and n == count)) * sign * step)
    return max(edges, key=lambda edge: edge * sign, default=None)
