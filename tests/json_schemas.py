"""JSON schemas made up by hypothesis: of the kinds that can be kept, and of those that cannot."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

Schema = dict[str, Any]

NAMES = st.sampled_from(
    ["a", "b", "ab", "name", "é", "x-y", 'quo"te', "back\\slash", "with space", "number", "root", "ref", ""]
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**53), 2**53),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
)
PATTERNS = st.sampled_from(
    [
        "^[a-z]{2,5}$", "^\\d{4}-\\d{2}$", "^(foo|ba[rz])+$", "^.{1,3}$", "^[^abc]{2}$", "b+", "^x", "^a{1,3}|b$",
        '^"\\\\/$', "^\\w{1,9}@\\w{1,9}\\.(com|org)$", "^\\s?[\\t\"]{1,2}$", "^(?:ab?c*){0,2}$", "^\\u00e9?\\x41$",
        "^[\\x00-\\x2f]{2}$", "", "^$",
    ]
)  # fmt: skip
FORMATS = st.sampled_from(["date", "time", "date-time", "uuid", "ipv4"])


@st.composite
def bounds(draw: st.DrawFn, low: str, high: str, least: int = 0, most: int = 6) -> Schema:
    """Return none, one or both of two keywords, in order."""
    numbers = sorted(draw(st.lists(st.integers(least, most), min_size=2, max_size=2)))
    chosen = draw(st.sampled_from([(), (low,), (high,), (low, high)]))
    return {keyword: number for keyword, number in zip((low, high), numbers, strict=True) if keyword in chosen}


def strings() -> st.SearchStrategy[Schema]:
    """Return strings of a length, a pattern or a format."""
    patterns: st.SearchStrategy[Schema] = PATTERNS.map(lambda pattern: {"pattern": pattern})
    formats: st.SearchStrategy[Schema] = FORMATS.map(lambda name: {"format": name})
    return st.one_of(bounds("minLength", "maxLength"), patterns, formats).map(lambda more: {"type": "string", **more})


def integers() -> st.SearchStrategy[Schema]:
    """Return integers within bounds."""
    wide, narrow = bounds("minimum", "maximum", -3000, 3000), bounds("exclusiveMinimum", "maximum", -20, 20)
    kinds = st.one_of(wide, narrow).filter(
        lambda more: more.get("exclusiveMinimum", -21) + 1 <= more.get("maximum", 21)
    )
    return kinds.map(lambda more: {"type": "integer", **more})


def multiples() -> st.SearchStrategy[Schema]:
    """Return multiples of what is exact in binary too, within bounds."""
    kinds = st.tuples(st.sampled_from(["integer", "number"]), st.sampled_from([2, 7, 10, 0.5, 0.25, 1.5]))
    return kinds.map(lambda kind: {"type": kind[0], "multipleOf": kind[1], "minimum": -10, "exclusiveMaximum": 30.5})


def sets() -> st.SearchStrategy[Schema]:
    """Return arrays of different items."""
    items: st.SearchStrategy[Schema] = st.one_of(
        st.just({"type": "boolean"}), st.lists(SCALARS, min_size=2, max_size=5).map(lambda values: {"enum": values})
    )
    return st.tuples(items, st.sampled_from([{}, {"minItems": 1}, {"maxItems": 2}])).map(
        lambda parts: {"type": "array", "items": parts[0], "uniqueItems": True, **parts[1]}
    )


@st.composite
def objects(draw: st.DrawFn, inner: st.SearchStrategy[Schema]) -> Schema:
    """Return objects with some properties, some required, some further ones."""
    properties = draw(st.dictionaries(NAMES, inner, max_size=4))
    required = draw(st.lists(st.sampled_from(sorted(properties)), unique=True)) if properties else []
    schema: Schema = {"type": "object", "properties": properties, "required": required}
    more = draw(st.sampled_from(["open", "closed", "true", "schema"]))
    if more != "open":
        schema["additionalProperties"] = {"closed": False, "true": True, "schema": {"type": "integer"}}[more]
    return schema


@st.composite
def arrays(draw: st.DrawFn, inner: st.SearchStrategy[Schema]) -> Schema:
    """Return arrays and tuples."""
    if draw(st.booleans()):
        return {"type": "array", "items": draw(inner), "maxItems": 3, **draw(bounds("minItems", "maxItems", 0, 3))}
    items = draw(st.lists(inner, min_size=1, max_size=3))
    return {"type": "array", "prefixItems": items, "items": False}


def schemas() -> st.SearchStrategy[Schema]:
    """Return schemas whose instances are finite."""
    leaves: Any = st.one_of(
        strings(),
        integers(),
        multiples(),
        sets(),
        st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": "number"}, {"type": ["integer", "null"]}]),
        SCALARS.map(lambda value: {"const": value}),
        st.lists(SCALARS, min_size=1, max_size=4).map(lambda values: {"enum": values}),
    )
    found: st.SearchStrategy[Schema] = st.recursive(
        leaves,
        lambda inner: st.one_of(
            objects(inner),
            arrays(inner),
            st.lists(inner, min_size=1, max_size=3).map(lambda members: {"anyOf": members}),
            inner.map(referenced),
        ),
        max_leaves=6,
    )
    return found.map(hoisted)


def referenced(node: Schema) -> Schema:
    """Return a reference to a schema that stands beside it."""
    return node if "$defs" in node else {"$ref": "#/$defs/it", "$defs": {"it": node}}


def hoisted(schema: Schema) -> Schema:
    """Bring nested definitions to the root, under names of their own."""
    found: Schema = {}

    def walk(node: Any) -> Any:
        if isinstance(node, list):
            return [walk(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$defs" in node and "$ref" in node:
            inner = walk(node["$defs"]["it"])
            name = f"it{len(found)}"
            found[name] = inner
            return {"$ref": f"#/$defs/{name}"}
        return {key: walk(value) for key, value in node.items()}

    root = walk(schema)
    return {**root, "$defs": found} if found else root


def collect(n: int, strategy: st.SearchStrategy[Schema]) -> list[Schema]:
    """Return ``n`` different schemas, the same ones every time."""
    found: dict[str, Schema] = {}

    @settings(
        max_examples=2 * n, derandomize=True, database=None, phases=[Phase.generate], deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def gather(schema: Schema) -> None:
        found.setdefault(json.dumps(schema, sort_keys=True), schema)

    gather()
    return list(found.values())[:n]
