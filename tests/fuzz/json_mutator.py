"""What can be done to a JSON text by who knows its tree: chat requests and schemas."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

from .mutators import TEXTS, mutate_text, number

_SCALARS: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1.5,
    1e300,
    "",
    "a",
    [],
    {},
    [[]],
    {"": {}},
    2**63,
    2**64,
    -(2**63),
)


def mutate_json(data: bytes, rng: random.Random, words: Sequence[bytes]) -> bytes:
    """Return the text after changes to nodes of its tree, or, one time in five, to the text itself."""
    try:
        tree = json.loads(data) if rng.random() < 0.8 else None
    except (ValueError, RecursionError):
        tree = None
    if tree is None:
        return mutate_text(data, rng, words)
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        tree = _changed(tree, rng, [word.decode() for word in words])
    try:
        return json.dumps(tree).encode()
    except (ValueError, RecursionError):
        return mutate_text(data, rng, words)


def _changed(tree: Any, rng: random.Random, words: list[str]) -> Any:
    """Return the tree with one node replaced."""
    if isinstance(tree, dict) and tree and rng.random() < 0.85:
        key = rng.choice(list(tree))
        made = dict(tree)
        choice = rng.random()
        if choice < 0.1:
            del made[key]
        elif choice < 0.2:
            made[rng.choice(words)] = made.pop(key)
        elif choice < 0.35:
            made[rng.choice(words)] = _new(rng, words, tree)
        else:
            made[key] = _changed(made[key], rng, words)
        return made
    if isinstance(tree, list) and tree and rng.random() < 0.85:
        i = rng.randrange(len(tree))
        choice = rng.random()
        if choice < 0.15:
            return tree[:i] + tree[i + 1 :]
        if choice < 0.3:
            return tree + [tree[i]] * rng.choice((1, 2, 30))
        return [*tree[:i], _changed(tree[i], rng, words), *tree[i + 1 :]]
    return _new(rng, words, tree)


def _new(rng: random.Random, words: list[str], near: Any) -> Any:
    """Return a value: any of a few, a word, a text, a number, or what is near, nested."""
    choice = rng.random()
    if choice < 0.3:
        return rng.choice(_SCALARS)
    if choice < 0.55:
        return rng.choice(words)
    if choice < 0.7:
        return rng.choice(TEXTS).decode("utf-8", errors="replace")
    if choice < 0.85:
        return number(rng)
    for _ in range(rng.choice((1, 1, 3, 60, 300))):
        near = [near] if rng.random() < 0.5 else {rng.choice(words): near}
    return near
