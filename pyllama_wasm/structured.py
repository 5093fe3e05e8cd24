"""Answers in a format: OpenAI's ``response_format`` or a Python type in, a schema that is kept out, objects back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ._schema import normalized
from ._type_schema import check_value, is_model, model_schema, root_schema
from .errors import AnswerError, RequestError

__all__ = ["ResponseFormat"]

Json = Any


@dataclass(frozen=True)
class ResponseFormat:
    """What an answer is made of, and how it is read."""

    schema: Mapping[str, Json]
    """What the converter is given."""

    make: Callable[[str], Any]
    asked: Mapping[str, Json]
    """The schema as it was asked for."""

    @classmethod
    def of(cls, asked: Any) -> ResponseFormat | None:
        """Read OpenAI's dict, or a type; ``None`` for plain text. ``RequestError`` for what cannot be kept."""
        if isinstance(asked, Mapping):
            schema = _asked_schema(asked)
            return None if schema is None else cls(normalized(schema), json.loads, schema)
        if is_model(asked):
            schema = model_schema(asked)
            return cls(normalized(schema), asked.model_validate_json, schema)
        schema = root_schema(asked)
        return cls(normalized(schema), lambda text: check_value(asked, json.loads(text)), schema)

    @property
    def wire(self) -> dict[str, Json]:
        """Return it as OpenAI's dict."""
        return {"type": "json_schema", "json_schema": {"name": "answer", "schema": dict(self.asked)}}

    def read(self, text: str) -> Any:
        """Return the object that an answer is; ``AnswerError`` for one that it is not."""
        try:
            return self.make(text)
        except Exception as error:  # a class's own code may raise anything
            failure = AnswerError("read the answer", str(error) or type(error).__name__)
            failure.text = text
            raise failure from error


def _asked_schema(asked: Mapping[str, Json]) -> Mapping[str, Json] | None:
    """Return the schema of a ``response_format``; an object of any kind for one that gives none."""
    kind = asked.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        schema = asked.get("schema")  # llama-cpp-python's and llama.cpp's way
    elif kind == "json_schema":
        wrapper = asked.get("json_schema")
        if not isinstance(wrapper, Mapping) or "schema" not in wrapper:
            raise RequestError("chat", "response_format has no schema", '{"type": "json_schema", "json_schema": …}')
        schema = wrapper["schema"]
    else:
        raise RequestError("chat", f"response_format is {kind!r}", "text, json_object, json_schema, or a class")
    if schema is None:
        return {"type": "object"}
    if not isinstance(schema, Mapping):
        raise RequestError("chat", f"the schema of response_format is {type(schema).__name__} and no object")
    return schema
