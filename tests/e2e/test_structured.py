"""Answers in a format, from a model of random weights at temperature 1: every one is what was asked for.

``PYLLAMA_WASM_SCHEMAS=2000`` tries that many schemas.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pydantic
import pytest

import pyllama_wasm as pw

from ..conftest import TinyModel
from ..json_schemas import collect, schemas

UPSTREAM = Path(__file__).resolve().parents[2] / "build/sources/llama.cpp/tests/test-json-schema-to-grammar.cpp"
QUESTION = [{"role": "user", "content": "x"}]
QUOTE = {3 + ord('"'): 2.0}  # so that texts come to an end
N_SCHEMAS = int(os.environ.get("PYLLAMA_WASM_SCHEMAS", "200"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pw.Model]:
    path = TinyModel(n_ctx=8192).write(tmp_path_factory.mktemp("structured") / "tiny.gguf")
    with pw.Model(path, n_threads=1) as model:
        yield model


def format_of(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}


def answered(model: pw.Model, schema: dict[str, Any], seed: int, max_tokens: int = 3000) -> pw.ChatCompletion:
    wanted = format_of(schema)
    options: dict[str, Any] = {"temperature": 1, "seed": seed, "max_tokens": max_tokens, "logit_bias": QUOTE}
    answer: pw.ChatCompletion = model.chat(QUESTION, response_format=wanted, **options)
    return answer


def check(schema: dict[str, Any], answer: pw.ChatCompletion) -> None:
    assert answer.finish_reason == "stop", answer.text[:200]
    value = json.loads(answer.text)
    # Older drafts write tuples as lists of items.
    draft = jsonschema.Draft201909Validator if '"items": [' in json.dumps(schema) else jsonschema.Draft202012Validator
    draft(schema, format_checker=draft.FORMAT_CHECKER).validate(value)
    assert answer.parsed == value
    answer.text.encode()
    json.dumps(value, allow_nan=False, ensure_ascii=False).encode()  # no half characters, no infinity


def check_all(model: pw.Model, wanted: list[dict[str, Any]], max_tokens: int = 3000) -> int:
    """Return how many answers there were; one that comes to no end within ``max_tokens`` fails as any other fault."""
    n_checked = 0
    with ThreadPoolExecutor(16) as pool:
        answers = pool.map(lambda item: answered(model, item[1], item[0], max_tokens), enumerate(wanted))
        for schema, answer in zip(wanted, answers, strict=True):
            check(schema, answer)
            n_checked += 1
    return n_checked


def test_every_answer_to_a_made_up_schema_is_valid(model: pw.Model) -> None:
    wanted = collect(N_SCHEMAS, schemas())
    assert len({json.dumps(schema, sort_keys=True) for schema in wanted}) == N_SCHEMAS
    assert check_all(model, wanted) == N_SCHEMAS


def upstream_schemas() -> list[tuple[str, str, dict[str, Any]]]:
    """Return llama.cpp's own list: what it expects of each, its name, and the schema."""
    source = UPSTREAM.read_text(encoding="utf-8")
    form = r'(SUCCESS|FAILURE),\s*\n\s*"([^"]*)",\s*\n(?:\s*//.*\n)*\s*R"""\(?(.*?)\)?"""'
    found = re.findall(form, source, re.DOTALL)
    return [(status, name, json.loads(text)) for status, name, text in found]


REFUSED = {
    "unknown type", "invalid type", "string array", "nullable string array", "array with empty items and prefixItems",
    "anyOf", "mix of allOf, anyOf and $ref (similar to https://json.schemastore.org/tsconfig.json)",
    "allOf with multiple enum schemas", "regexp with unbalanced parentheses", "unsupported regexp in a property",
}  # fmt: skip
"""Of upstream's list: schemas that are none, and those of which upstream keeps only a part."""


def test_every_answer_to_upstream_s_schemas_is_valid_or_the_schema_is_refused(model: pw.Model) -> None:
    wanted, refused = [], set()
    listed = upstream_schemas()
    assert len(listed) >= 80
    for _, name, schema in listed:
        try:
            model.chat_prompt(QUESTION, response_format=format_of(schema))
            wanted.append(schema)
        except pw.RequestError:
            refused.add(name)
    assert refused == REFUSED
    assert check_all(model, [schema for schema in wanted if schema], max_tokens=6000) >= len(listed) - len(REFUSED) - 2


def test_further_properties_cannot_spell_a_described_one(model: pw.Model) -> None:
    """As llama.cpp writes the rule, a name may end in a backslash, hold line feeds, or spell ``ab`` as ``\\u0061b``."""
    schema = {"properties": {"ab": {"type": "integer"}}, "additionalProperties": {"type": "null"}, "type": "object"}
    for seed in range(20):
        check(schema, answered(model, schema, seed))


def test_bytes_that_are_no_characters_do_not_count(model: pw.Model) -> None:
    schema = {"type": "string", "minLength": 3, "maxLength": 3}
    for seed in range(20):
        check(schema, answered(model, schema, seed))


@pytest.mark.parametrize("low", [-1234, -99, -10, -1, 0, 1, 9, 10, 99, 100, 1234])
def test_bounds_of_integers_hold(model: pw.Model, low: int) -> None:
    bounds: list[dict[str, int]] = [{"minimum": low, "maximum": low + n} for n in (0, 1, 9, 90, 12345)]
    for more in ({"minimum": low}, {"maximum": low}, *bounds):
        schema = {"type": "integer", **more}
        for seed in range(3):
            check(schema, answered(model, schema, seed))


class Animal(pydantic.BaseModel):
    name: str = pydantic.Field(min_length=1, max_length=12)
    legs: int = pydantic.Field(ge=0, le=8)
    tags: list[str] = pydantic.Field(max_length=2)


@dataclass
class Shape:
    corners: int
    label: str | None = None


def test_models_and_dataclasses_come_back_as_objects(model: pw.Model) -> None:
    animal = model.chat(QUESTION, response_format=Animal, temperature=1, seed=1).parsed
    assert isinstance(animal, Animal) and 0 <= animal.legs <= 8
    with model.chat(QUESTION, response_format=Shape, temperature=1, seed=2, stream=True) as stream:
        text = "".join(stream)
    answer = stream.completion
    assert isinstance(answer, pw.ChatCompletion) and isinstance(answer.parsed, Shape)
    assert json.loads(text)["corners"] == answer.parsed.corners


def test_an_answer_that_was_cut_short_is_no_object(model: pw.Model) -> None:
    answer = model.chat(QUESTION, response_format=Animal, temperature=1, seed=1, max_tokens=3)
    assert answer.finish_reason == "length" and answer.parsed is None


def test_json_mode_gives_objects(model: pw.Model) -> None:
    answer = model.chat(QUESTION, response_format={"type": "json_object"}, temperature=1, seed=4, max_tokens=3000)
    assert isinstance(answer.parsed, dict)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "^((a{1,900}){1,900}){1,900}$"},
        {"type": "array", "items": {"type": "array", "minItems": 1000}, "minItems": 1000, "maxItems": 1000},
        {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}}},
        {"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(100)}},
    ],
)
def test_schemas_that_are_too_much_are_typed_errors(model: pw.Model, schema: dict[str, Any]) -> None:
    with contextlib.suppress(pw.RequestError, pw.GuestException):
        answered(model, schema, 1, max_tokens=20)
    assert model.generate("a", max_tokens=1).usage.completion_tokens == 1
