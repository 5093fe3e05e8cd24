"""Python types as JSON schemas, and JSON values as objects of those types: for tools and for answers."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime, time
from typing import Any
from uuid import UUID

from .errors import RequestError

__all__ = ["check_value", "is_model", "model_schema", "root_schema", "type_hints", "type_schema"]

Json = Any
Defs = dict[str, Json]

_OPERATION = "describe a type"

_PLAIN: dict[object, dict[str, Json]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
    None: {"type": "null"},
    Any: {},
    object: {},
    date: {"type": "string", "format": "date"},
    time: {"type": "string", "format": "time"},
    datetime: {"type": "string", "format": "date-time"},
    UUID: {"type": "string", "format": "uuid"},
    list: {"type": "array"},
    tuple: {"type": "array"},
    dict: {"type": "object"},
}
_LISTS = (list, tuple, Sequence)
_TABLES = (dict, Mapping)


def is_model(kind: object) -> bool:
    """Whether it is a pydantic model class; pydantic itself is not needed to tell."""
    return isinstance(kind, type) and hasattr(kind, "model_json_schema") and hasattr(kind, "model_validate")


def type_hints(kind: Any, what: str) -> dict[str, Any]:
    """Return the resolved annotations of a function or class; ``RequestError`` for what cannot be resolved."""
    try:
        return typing.get_type_hints(kind, include_extras=True)
    except Exception as error:  # annotations are expressions: they may raise anything
        raise RequestError(_OPERATION, f"the annotations of {what} cannot be read: {error}") from error


def model_schema(kind: Any) -> dict[str, Json]:
    """Return the schema of a pydantic model; ``RequestError`` for one that has none."""
    try:
        return dict(kind.model_json_schema())
    except Exception as error:  # pydantic's, or of the class's own code
        raise RequestError(_OPERATION, f"{kind.__name__} has no JSON schema: {error}") from error


def root_schema(kind: Any) -> dict[str, Json]:
    """Return the schema of a type by itself, the classes it mentions under ``$defs``."""
    defs: Defs = {}
    schema = type_schema(kind, defs)
    return {**schema, "$defs": defs} if defs else schema


def type_schema(kind: Any, defs: Defs) -> dict[str, Json]:
    """Return the schema of an annotation; classes are described in ``defs``. ``RequestError`` for one that has none."""
    if isinstance(kind, typing.Hashable) and kind in _PLAIN:
        return dict(_PLAIN[kind])
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        schema = type_schema(arguments[0], defs)
        description = next((note for note in arguments[1:] if isinstance(note, str)), None)
        return schema if description is None else {**schema, "description": description}
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [type_schema(argument, defs) for argument in arguments]}
    if origin is tuple and not (len(arguments) == 2 and arguments[1] is Ellipsis):
        items = [type_schema(argument, defs) for argument in arguments]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items), "maxItems": len(items)}
    if origin in _LISTS:
        return {"type": "array", "items": type_schema(arguments[0], defs)}
    if origin in _TABLES and arguments[0] is str:
        return {"type": "object", "additionalProperties": type_schema(arguments[1], defs)}
    if isinstance(kind, type):
        return _class_schema(kind, defs)
    raise RequestError(_OPERATION, f"{kind!r} has no JSON schema")


def _class_schema(kind: type, defs: Defs) -> dict[str, Json]:
    if issubclass(kind, enum.Enum):
        return {"enum": [member.value for member in kind]}
    if is_model(kind):
        schema = model_schema(kind)
        for name, found in schema.pop("$defs", {}).items():
            _define(defs, name, found)
    elif dataclasses.is_dataclass(kind) or _is_typed_dict(kind):
        before = defs.get(kind.__name__)
        if before is kind:  # being described: it mentions itself
            return {"$ref": f"#/$defs/{kind.__name__}"}
        defs[kind.__name__] = kind
        schema = _fields_schema(kind, defs)
        del defs[kind.__name__]
        if before is not None:  # of the same name: `_define` tells whether it is the same
            defs[kind.__name__] = before
    else:
        raise RequestError(_OPERATION, f"{kind.__name__} has no JSON schema", "use a dataclass or a pydantic model")
    _define(defs, kind.__name__, schema)
    return {"$ref": f"#/$defs/{kind.__name__}"}


def _define(defs: Defs, name: str, schema: Json) -> None:
    if defs.setdefault(name, schema) != schema:
        raise RequestError(_OPERATION, f"two classes are called {name}")


def _is_typed_dict(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, dict) and hasattr(kind, "__required_keys__")


def _fields_schema(kind: Any, defs: Defs) -> dict[str, Json]:
    hints = type_hints(kind, kind.__name__)
    if _is_typed_dict(kind):
        names, required = list(hints), [name for name in hints if name in kind.__required_keys__]
    else:
        fields = [field for field in dataclasses.fields(kind) if field.init]
        names = [field.name for field in fields]
        required = [field.name for field in fields if not _has_default(field)]
    schema: dict[str, Json] = {"type": "object", "properties": {name: type_schema(hints[name], defs) for name in names}}
    doc = inspect.getdoc(kind)
    if doc and not doc.startswith(f"{kind.__name__}("):  # what dataclasses write by themselves
        schema["description"] = doc.split("\n\n")[0]
    return {**schema, "required": required, "additionalProperties": False}


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


# -- and back ---------------------------------------------------------------------------------------------------------


def check_value(kind: Any, value: Json) -> Any:
    """Return a JSON value as an object of a type; ``TypeError`` or ``ValueError`` for one that is none."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return check_value(arguments[0], value)
    if kind in (Any, object, inspect.Parameter.empty):
        return value
    if origin is typing.Literal:
        for found in arguments:
            if type(found) is type(value) and found == value:
                return found
        raise ValueError(f"{value!r} is none of {', '.join(map(repr, arguments))}")
    if origin in (typing.Union, types.UnionType):
        return _first_that_fits(arguments, value)
    if origin in _LISTS or kind in (list, tuple):
        return _list(origin or kind, arguments, value)
    if origin in _TABLES or kind is dict:
        found = _expect(dict, value)
        return {name: check_value(arguments[1] if arguments else Any, item) for name, item in found.items()}
    return _plain(kind, value)


def _first_that_fits(kinds: Sequence[Any], value: Json) -> Any:
    reasons = []
    for kind in kinds:
        try:
            return check_value(kind, value)
        except (TypeError, ValueError) as error:
            reasons.append(str(error))
    raise ValueError("; ".join(reasons))


def _list(origin: Any, arguments: tuple[Any, ...], value: Json) -> Any:
    found = _expect(list, value)
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        if len(found) != len(arguments):
            raise ValueError(f"{len(found)} items in the place of {len(arguments)}")
        return tuple(check_value(kind, item) for kind, item in zip(arguments, found, strict=True))
    items = [check_value(arguments[0] if arguments else Any, item) for item in found]
    return tuple(items) if origin is tuple else items


def _plain(kind: Any, value: Json) -> Any:
    if kind is None or kind is type(None):
        return _expect(type(None), value)
    if kind is float and type(value) is int:
        return float(value)
    if kind in (str, int, float, bool):
        return _expect(kind, value)
    readers: dict[Any, Callable[[str], Any]] = {
        date: date.fromisoformat, time: lambda text: time.fromisoformat(_offset(text)),
        datetime: lambda text: datetime.fromisoformat(_offset(text)), UUID: UUID,
    }  # fmt: skip
    if kind in readers:
        return readers[kind](_expect(str, value))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return kind(value)
    if is_model(kind):
        return kind.model_validate(value)
    return _object(kind, _expect(dict, value))


def _object(kind: Any, value: dict[str, Json]) -> Any:
    hints = type_hints(kind, kind.__name__)
    if unknown := sorted(set(value) - set(hints)):
        raise ValueError(f"{kind.__name__} has no {unknown[0]!r}")
    fields = {name: check_value(hints[name], item) for name, item in value.items()}
    if _is_typed_dict(kind) and (missing := sorted(kind.__required_keys__ - set(fields))):
        raise ValueError(f"{kind.__name__} misses {missing[0]!r}")
    return kind(**fields)


def _expect(kind: type, value: Json) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def _offset(text: str) -> str:
    """Write ``Z`` as Python 3.10 reads it."""
    return text[:-1] + "+00:00" if text.endswith("Z") else text
