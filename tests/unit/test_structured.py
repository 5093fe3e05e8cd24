"""Answers in a format: what is asked for, and what is read back."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date, datetime, timezone
from typing import Any, Literal
from uuid import UUID

import pydantic
import pytest

import pyllama_wasm as pw
from pyllama_wasm.structured import ResponseFormat


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Leaf:
    colour: Colour
    seen: date


@dataclass
class Tree:
    name: str
    height: float
    leaves: list[Leaf] = field(default_factory=list)
    sub: Tree | None = None
    kind: Literal["oak", 3] = "oak"


class Person(pydantic.BaseModel):
    name: str
    age: int = pydantic.Field(ge=0, lt=150)

    @pydantic.field_validator("name")
    @classmethod
    def no_nobody(cls, name: str) -> str:
        if name == "Nobody":
            raise ValueError("nobody is a person")
        return name


def make(asked: Any) -> ResponseFormat:
    found = ResponseFormat.of(asked)
    assert found is not None
    return found


def test_dataclasses_come_back_as_objects() -> None:
    text = '{"name": "A", "height": 3, "leaves": [{"colour": "red", "seen": "2024-02-29"}], "sub": null, "kind": 3}'
    tree = make(Tree).read(text)
    assert tree == Tree("A", 3.0, [Leaf(Colour.RED, date(2024, 2, 29))], None, 3)
    assert isinstance(tree.height, float)


def test_pydantic_models_come_back_as_models() -> None:
    wanted = make(Person)
    assert wanted.schema["properties"]["age"] == {"type": "integer", "minimum": 0, "maximum": 149}
    assert wanted.read('{"name": "Ann", "age": 3}') == Person(name="Ann", age=3)
    with pytest.raises(pw.AnswerError, match="nobody is a person") as caught:
        wanted.read('{"name": "Nobody", "age": 3}')
    assert caught.value.text == '{"name": "Nobody", "age": 3}'
    assert isinstance(caught.value.__cause__, pydantic.ValidationError)


def test_other_types_are_formats_as_well() -> None:
    assert make(list[int]).read("[1, 2]") == [1, 2]
    assert make(int | None).read("null") is None
    assert make(UUID).read('"00000000-0000-0000-0000-000000000001"') == UUID(int=1)
    assert make(datetime).read('"2024-01-01T00:00:00Z"') == datetime(2024, 1, 1, tzinfo=timezone.utc)
    assert make(tuple[int, str]).read('[1, "a"]') == (1, "a")


@pytest.mark.parametrize("text", ["", "{", '{"name": "A"}', '{"name": 3, "height": 1}', "[" * 100_000])
def test_answers_that_are_no_such_object_are_typed(text: str) -> None:
    with pytest.raises(pw.AnswerError, match="read the answer"):
        make(Tree).read(text)


@dataclass
class Picky:
    size: int

    def __post_init__(self) -> None:
        raise {1: KeyError("size"), 2: ZeroDivisionError(), 3: RuntimeError("no")}[self.size]


class Callback(pydantic.BaseModel):
    call: Callable[[int], int]


class Own(pydantic.BaseModel):
    @classmethod
    def model_json_schema(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        raise KeyError("mine")


@pytest.mark.parametrize("size", [1, 2, 3])
def test_whatever_a_class_raises_of_an_answer_is_typed(size: int) -> None:
    with pytest.raises(pw.AnswerError, match="read the answer") as caught:
        make(Picky).read(f'{{"size": {size}}}')
    assert caught.value.text == f'{{"size": {size}}}'


@pytest.mark.parametrize("kind", [Callback, Own, list[Callback], "Annotated"])
def test_classes_without_a_schema_are_typed(kind: Any) -> None:
    if kind == "Annotated":
        kind = dataclass(type("Broken", (), {"__annotations__": {"a": "1 / 0"}}))
    with pytest.raises(pw.RequestError, match="describe a type"):
        ResponseFormat.of(kind)


def test_openai_s_formats_are_read() -> None:
    assert ResponseFormat.of({"type": "text"}) is None
    assert make({"type": "json_object"}).schema == {"type": "object", "additionalProperties": True}
    schema = {"type": "integer"}
    for asked in (
        {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}},
        {"type": "json_object", "schema": schema},
        make({"type": "json_object", "schema": schema}).wire,
    ):
        wanted = make(asked)
        assert wanted.schema == schema and wanted.read("3") == 3


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({}, "response_format is None"),
        ({"type": "yaml"}, "response_format is 'yaml'"),
        ({"type": "json_schema"}, "has no schema"),
        ({"type": "json_schema", "json_schema": {"schema": 3}}, "is int and no object"),
        ({"type": "json_object", "schema": {"not": {}}}, "not cannot be kept"),
        (bytes, "bytes has no JSON schema"),
        ("json", "has no JSON schema"),
    ],
)
def test_formats_that_cannot_be_kept_are_refused(asked: Any, reason: str) -> None:
    with pytest.raises(pw.RequestError, match=reason):
        ResponseFormat.of(asked)
