"""Parts of JSON schemas that a grammar can keep where there are few values: each of them is written down."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from itertools import combinations, permutations
from typing import Any, NoReturn

from .errors import RequestError

__all__ = ["fail", "multiples_node", "unique_array"]

Json = Any

_MOST_MULTIPLES = 1000
_MOST_ARRAYS = 1100


def fail(path: str, reason: str) -> NoReturn:
    """Raise ``RequestError`` for the schema at a path."""
    raise RequestError("use the schema", f"{path}: {reason}" if path else reason)


def multiples_node(
    low: Fraction | int | None, high: Fraction | int | None, step: Fraction, path: str, *, is_integer: bool = False
) -> dict[str, Json]:
    """Return the multiples of ``step`` from ``low`` to ``high``, of which there may be a thousand."""
    if low is None or high is None:
        fail(path, "multipleOf cannot be kept without bounds")
    first, last = math.ceil(low / step), math.floor(high / step)
    if first > last:
        fail(path, "no multiple is within its bounds")
    if last - first >= _MOST_MULTIPLES:
        fail(path, f"multipleOf allows more than {_MOST_MULTIPLES} values, of which each would be a rule")
    found = [number for n in range(first, last + 1) if (number := _number(n * step, is_integer)) is not None]
    if not found:
        fail(path, "no multiple is within its bounds")
    return {"enum": found}


def _number(value: Fraction, is_integer: bool) -> int | float | None:
    """Return a number that JSON writes exactly so; ``None`` where there is none, or it is no integer and has to be."""
    if value.denominator == 1:
        return int(value)
    return None if is_integer or Fraction(repr(float(value))) != value else float(value)


def unique_array(item: dict[str, Json], least: int, most: int | None, path: str) -> dict[str, Json]:
    """Return the arrays of different items out of few values.

    In any order where there are few of these, else in the order in which the values are described.
    """
    if isinstance(item.get("enum"), list) and len(item["enum"]) > _MOST_ARRAYS:  # before each is looked at
        fail(path, f"uniqueItems of more than {_MOST_ARRAYS} values cannot be kept")
    values = _values_of(item)
    if values is None:
        fail(path, "uniqueItems can be kept of enum, const and booleans only")
    most = len(values) if most is None else min(most, len(values))
    if least > most:
        fail(path, f"there are no {least} different items")
    sizes = range(least, most + 1)
    arrange = permutations
    if _exceeds(math.perm, len(values), sizes):
        if _exceeds(math.comb, len(values), sizes):
            fail(path, f"uniqueItems allows more than {_MOST_ARRAYS} arrays, of which each would be a rule")
        arrange = combinations  # type: ignore[assignment]
    members = [_tuple(chosen) for n in sizes for chosen in arrange(values, n)]
    return members[0] if len(members) == 1 else {"anyOf": members}


def _tuple(values: tuple[Json, ...]) -> dict[str, Json]:
    if not values:
        return {"type": "array", "items": {"type": "null"}, "maxItems": 0}
    return {"type": "array", "prefixItems": [{"enum": [value]} for value in values]}


def _values_of(item: dict[str, Json]) -> list[Json] | None:
    """Return the different values that an item may have, where they are known."""
    if item == {"type": "boolean"}:
        return [True, False]
    if item == {"type": "null"}:
        return [None]
    if "enum" not in item:
        return None
    found: dict[object, Json] = {}
    for value in item["enum"]:
        found.setdefault(_key(value), value)
    return list(found.values())


def _key(value: Json) -> object:
    """Return what tells values apart as JSON does: ``1`` and ``1.0`` are the same, ``1`` and ``true`` are not."""
    if isinstance(value, dict):
        return dict, frozenset((key, _key(each)) for key, each in value.items())
    if isinstance(value, list):
        return list, tuple(map(_key, value))
    return isinstance(value, bool), value


def _exceeds(count: Callable[[int, int], int], n: int, sizes: range) -> bool:
    """Whether there are too many arrays of these sizes out of ``n`` values; they are counted no further."""
    total = 0
    for size in sizes:
        total += count(n, size)
        if total > _MOST_ARRAYS:
            return True
    return False
