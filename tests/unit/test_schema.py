"""Schemas are rewritten into what can be kept to the letter, or refused."""

from __future__ import annotations

import re
from typing import Any

import pytest

from pyllama_wasm import RequestError
from pyllama_wasm._schema import normalized
from pyllama_wasm._schema_pattern import json_pattern


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"not": {}}, "not cannot be kept"),
        ({"if": {}, "then": {}}, "if cannot be kept"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems can be kept of enum, const and booleans only"),
        ({"type": "array", "items": {"enum": list(range(11))}, "uniqueItems": True}, "allows more than 1100 arrays"),
        ({"type": "array", "items": {"enum": [1, 1.0]}, "uniqueItems": True, "minItems": 2}, "no 2 different items"),
        ({"type": "array", "items": {"enum": [*range(19_000)]}, "uniqueItems": True}, "uniqueItems of more than 1100"),
        ({"type": "array", "items": {"enum": [*range(1100)]}, "uniqueItems": True}, "allows more than 1100 arrays"),
        ({"type": "array", "prefixItems": [{}, {}], "uniqueItems": True}, "uniqueItems of a tuple"),
        (
            {"type": "number", "multipleOf": 0.5, "minimum": 1e300, "maximum": 1e300},
            "minimum is 1e\\+300, and a grammar",
        ),
        ({"type": "number", "multipleOf": 0.3, "minimum": 10**400, "maximum": 10**400 + 1}, "no numbers so large"),
        ({"type": "number", "multipleOf": 0.5, "minimum": 2**63, "maximum": 2**63 + 1}, "has no numbers so large"),
        ({"type": "array", "contains": {}}, "contains cannot be kept"),
        ({"type": "integer", "multipleOf": 3}, "multipleOf cannot be kept without bounds"),
        ({"type": "integer", "multipleOf": 0}, "multipleOf is 0"),
        ({"type": "integer", "multipleOf": True}, "multipleOf is True"),
        ({"type": "integer", "multipleOf": 3, "minimum": 1, "maximum": 2}, "no multiple is within its bounds"),
        ({"type": "number", "multipleOf": 0.01, "minimum": 0, "maximum": 100}, "allows more than 1000 values"),
        ({"type": "number", "multipleOf": 0.5, "minimum": "0", "maximum": 1}, "minimum is '0' and no number"),
        ({"type": "integer", "multipleOf": 2.5, "minimum": 1, "maximum": 4}, "no multiple is within its bounds"),
        ({"type": "number", "minimum": 0}, "minimum of a number cannot be kept"),
        ({"type": "object", "patternProperties": {}}, "patternProperties cannot be kept"),
        ({"type": "object", "propertyNames": {}}, "propertyNames cannot be kept"),
        ({"type": "object", "maxProperties": 1}, "maxProperties cannot be kept"),
        ({"type": "object", "minProperties": 1}, "minProperties cannot be kept"),
        ({"type": "object", "dependentRequired": {}}, "dependentRequired cannot be kept"),
        ({"type": "string", "format": "email"}, "the format 'email' cannot be kept"),
        ({"type": "string", "pattern": "a", "minLength": 1}, "length and pattern cannot be kept together"),
        ({"type": "string", "minLength": 2, "maxLength": 1}, "minLength is more than maxLength"),
        ({"type": "string", "maxLength": 10**6}, "counts no further"),
        ({"type": "string", "minLength": "1"}, "minLength is '1' and no count"),
        ({"type": "integer", "minimum": 2, "exclusiveMaximum": 2}, "no integer is within its bounds"),
        ({"type": "integer", "exclusiveMinimum": True}, "exclusiveMinimum is True and no number"),
        ({"type": "integer", "maximum": 10**16}, "no bounds so large"),
        ({"minimum": 1}, "no type"),
        ({"minLength": 1, "minItems": 1}, "no type"),
        ({"type": "kaboom"}, "its type is 'kaboom'"),
        ({"enum": []}, "none of its values is allowed"),
        ({"enum": ["a"], "type": "integer"}, "none of its values is allowed"),
        ({"enum": ["a"], "minLength": 1}, "minLength beside enum or const cannot be kept"),
        ({"const": 2**70}, "does not fit 64 bits"),
        ({"$ref": "#/$defs/no"}, "refers to nothing"),
        ({"$ref": "https://example.org/"}, "only references into the schema itself"),
        ({"$ref": "#/$defs/a", "minLength": 1, "$defs": {"a": {}}}, r"minLength beside \$ref cannot be kept"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "refers to itself"),
        ({"anyOf": [{"type": "null"}], "minLength": 1}, "minLength beside anyOf cannot be kept"),
        ({"anyOf": []}, "anyOf is no list of schemas"),
        ({"anyOf": [False]}, "nothing is allowed there"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "several of oneOf"),
        ({"oneOf": [{}, {"type": "null"}]}, "several of oneOf"),
        ({"allOf": [{"type": "string"}, {"minLength": 1}]}, "allOf can be kept of objects only"),
        (
            {"allOf": [{"properties": {"a": {}}, "additionalProperties": False}, {"properties": {"b": {}}}]},
            "allows no properties but its own",
        ),
        ({"allOf": [{"properties": {"a": {}}}, {"properties": {"a": {"type": "null"}}}]}, "describes a twice"),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "a is required, and not allowed"),
        ({"type": "array", "items": False, "minItems": 1}, "must have items, and may have none"),
        ({"type": "array", "prefixItems": [{}], "minItems": 2}, "a tuple of 1 items"),
        ({"type": "array", "minItems": 2, "maxItems": 1}, "minItems is more than maxItems"),
        ({"properties": {"a": {"$id": "x"}}}, "has a meaning only at the root"),
        ({"type": "object", "properties": []}, "properties is no object"),
        ({"type": "object", "required": "a"}, "required is no list of names"),
        ({"properties": {f"p{i}": {} for i in range(101)}}, "more than 100 optional properties"),
        ({"type": "object", "titel": "a"}, "titel cannot be kept"),
        ({"const": float("nan")}, "cannot be written as JSON"),
        ({"const": "\ud800"}, "cannot be written as JSON"),
        ([], "it is list and no object"),
    ],
)
def test_what_cannot_be_kept_is_refused(schema: Any, reason: str) -> None:
    with pytest.raises(RequestError, match=f"use the schema: .*{reason}"):
        normalized(schema)


def test_nesting_has_a_bound() -> None:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(500):
        schema = {"type": "array", "items": schema}
    with pytest.raises(RequestError, match="nested more than"):
        normalized(schema)


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({}, {"anyOf": [{}]}),
        ({"title": "T", "type": "null", "x-mine": 1}, {"type": "null"}),
        ({"type": ["integer", "null"], "minimum": 1}, {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]}),
        ({"type": "integer", "minimum": 0.5, "exclusiveMinimum": 3}, {"type": "integer", "minimum": 4}),
        ({"type": "integer", "maximum": 1e30}, {"type": "integer"}),
        ({"type": "integer", "maximum": -5}, {"type": "integer", "minimum": -(10**15), "maximum": -5}),
        ({"type": "integer", "multipleOf": 5, "exclusiveMinimum": 5, "maximum": 20}, {"enum": [10, 15, 20]}),
        ({"type": "integer", "multipleOf": 1.5, "minimum": 1, "maximum": 7}, {"enum": [3, 6]}),
        ({"type": "integer", "multipleOf": 1, "minimum": 2}, {"type": "integer", "minimum": 2}),
        ({"type": "number", "multipleOf": 2.0, "minimum": -3, "maximum": 2}, {"enum": [-2, 0, 2]}),
        (
            {"type": "number", "multipleOf": 0.1, "exclusiveMinimum": 0, "minimum": -1, "exclusiveMaximum": 0.4},
            {"enum": [0.1, 0.2, 0.3]},
        ),
        (
            {"type": "array", "items": {"$ref": "#/$defs/b"}, "uniqueItems": True, "$defs": {"b": {"type": "boolean"}}},
            {
                "anyOf": [
                    {"type": "array", "items": {"type": "null"}, "maxItems": 0},
                    *(
                        {"type": "array", "prefixItems": [{"enum": [value]} for value in values]}
                        for values in ([True], [False], [True, False], [False, True])
                    ),
                ],
                "$defs": {"r0x0": {"type": "boolean"}},
            },
        ),
        (
            {"type": "array", "items": {"enum": ["a", "a"]}, "uniqueItems": True, "minItems": 1},
            {"type": "array", "prefixItems": [{"enum": ["a"]}]},
        ),
        (
            {"type": "array", "items": {"type": "string"}, "uniqueItems": True, "maxItems": 1},
            {"type": "array", "items": {"type": "string"}, "minItems": 0, "maxItems": 1},
        ),
        ({"type": ["string", "null"], "enum": ["a", 1, None]}, {"enum": ["a", None]}),
        ({"const": 1}, {"enum": [1]}),
        ({"allOf": [{"type": "null"}], "description": "d"}, {"type": "null"}),
        ({"type": "string", "pattern": "", "minLength": 0}, {"type": "string"}),
        ({"type": "boolean", "minLength": 3}, {"type": "boolean"}),
        ({"items": {"type": "null"}}, {"type": "array", "items": {"type": "null"}, "minItems": 0}),
        (
            {"required": ["b"], "properties": {"a": {"type": "null"}}},
            {
                "type": "object",
                "properties": {"a": {"type": "null"}, "b": {}},
                "required": ["b"],
                "additionalProperties": False,
            },
        ),
        (
            {"allOf": [{"properties": {"a": {}}, "required": ["a"]}, {"properties": {"b": {}}}]},
            {"type": "object", "properties": {"a": {}, "b": {}}, "required": ["a"], "additionalProperties": False},
        ),
        (
            {"oneOf": [{"type": "string"}, {"type": "null"}]},
            {"anyOf": [{"type": "string"}, {"type": "null"}]},
        ),
    ],
)
def test_what_can_be_kept_is_said_in_one_way(schema: dict[str, Any], expected: dict[str, Any]) -> None:
    assert normalized(schema) == expected


def test_many_different_items_come_in_the_order_in_which_they_are_described() -> None:
    schema = {"type": "array", "items": {"enum": list("abcdefgh")}, "uniqueItems": True}
    members = normalized(schema)["anyOf"]
    assert len(members) == 2**8
    letters = ["".join(item["enum"][0] for item in member.get("prefixItems", ())) for member in members]
    assert len(set(letters)) == 2**8 and all(list(each) == sorted(each) for each in letters)
    assert len(normalized({**schema, "maxItems": 3})["anyOf"]) == 1 + 8 + 8 * 7 + 8 * 7 * 6


def test_a_union_by_a_property_is_kept() -> None:
    members = [{"properties": {"kind": {"const": kind}}, "required": ["kind"]} for kind in "ab"]
    assert len(normalized({"oneOf": members, "discriminator": {"propertyName": "kind"}})["anyOf"]) == 2
    members[1]["required"] = []
    with pytest.raises(RequestError, match="several of oneOf"):
        normalized({"oneOf": members})


def test_references_get_names_that_nothing_else_has() -> None:
    found = normalized(
        {
            "$defs": {"a/b": {"type": "null"}, "r0x": {"type": "boolean"}},
            "prefixItems": [{"$ref": "#/$defs/a~1b"}, {"$ref": "#/$defs/r0x"}, {"$ref": "#/%24defs/a~1b"}],
        }
    )
    assert [node["$ref"] for node in found["prefixItems"]] == ["#/$defs/r1x0", "#/$defs/r1x1", "#/$defs/r1x2"]
    assert list(found["$defs"].values()) == [{"type": "null"}, {"type": "boolean"}, {"type": "null"}]


def test_a_schema_may_refer_to_itself() -> None:
    found = normalized({"type": "object", "properties": {"next": {"$ref": "#"}}})
    (name,) = found["$defs"]
    assert found["$defs"][name]["properties"]["next"] == {"$ref": f"#/$defs/{name}"}


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(?=a)", "only plain groups"),
        ("(?<n>a)", "only plain groups"),
        ("a)", "parentheses"),
        ("(a", "a group does not end"),
        ("[a", "ends in the middle"),
        ("[b-a]", "ends before it begins"),
        ("[]", "a class is empty"),
        (r"[\D]", "a class has"),
        (r"\p{L}", "has no grammar"),
        (r"\1", "has no grammar"),
        (r"\b", "has no grammar"),
        (r"\ud83d", "surrogate"),
        (r"\x4", "is not followed by 2 digits"),
        ("a{2,1}", "less than never"),
        ("a{5000}", "more than 1000"),
        ("a{,3}", "braces that are no count"),
        ("a**", "a count follows a count"),
        ("*a", "where it has no meaning"),
        ("a^", "where it has no meaning"),
        ("a$b", "goes on after"),
        ("(" * 60 + ")" * 60, "nested more than"),
        ("a\\", "ends in the middle"),
    ],
)
def test_patterns_without_a_grammar_are_refused(pattern: str, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        json_pattern(pattern)


def test_quotes_and_backslashes_cannot_end_the_text() -> None:
    for pattern in (".", "[^a]", r"\D", r"\W", r"\S", "^x"):
        classes = re.findall(r"\[\^(.*?)(?<!\\)\]", json_pattern(pattern))
        assert classes
        assert all('"\\\\' in body and "\\x00-\\x1F" in body for body in classes)
    assert json_pattern('^"$') == '^((\\\\"))$'
    assert json_pattern(r"^\\$") == r"^((\\\\))$"
    assert json_pattern(r"^\n$") == r"^((\\n))$"
    assert json_pattern(r"^\x01$") == r"^((\\u0001))$"


def test_different_items_are_told_apart_as_json_does() -> None:
    values = [1, 1.0, True, "1", None, {"a": [1, 2]}, {"a": [1.0, 2]}, {"a": [2, 1]}, [], {}, False, 0]
    schema = {"type": "array", "items": {"enum": values}, "uniqueItems": True, "minItems": 1, "maxItems": 2}
    arrays = normalized(schema)["anyOf"]
    single = [each["prefixItems"][0]["enum"][0] for each in arrays if len(each["prefixItems"]) == 1]
    assert single == [1, True, "1", None, {"a": [1, 2]}, {"a": [2, 1]}, [], {}, False, 0]
    assert [type(each) for each in single[:2]] == [int, bool]
