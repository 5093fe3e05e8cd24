"""Whether a chat template is one that the guest's engine survives: its parser recurses without a bound."""

from __future__ import annotations

import re
from functools import lru_cache

from .errors import RequestError

__all__ = ["check_template"]

OPERATION = "apply the chat template"

MAX_BRACKETS, MAX_BLOCKS, MAX_BRANCHES, MAX_OPERATORS = 300, 500, 1000, 2000
"""Brackets inside brackets, blocks inside blocks, ``elif`` in all, and operators in one tag, each of which may be a
level. The guest's stack ends at some 1,600, 3,100, 8,800 and 6,300: all four at once are below it."""

MAX_LENGTH = 1 << 18
"""Most characters: the longest template that llama.cpp knows has 51,000; at a million the guest is for minutes."""

# A string that is not closed goes on to the end: looking for it again at the next quote would take quadratic time.
_TOKEN = re.compile(r"'(?:\\.|[^'\\])*'?|\"(?:\\.|[^\"\\])*\"?|%\}|[\[({\])}]|\w+|\S", re.DOTALL)
_TAG = re.compile(r"\{\{|\{%|\{#")
_OPERATORS = frozenset({"not", "if", "else", "and", "or", "is", "in"})
_BLOCKS = frozenset({"if", "for", "macro", "call", "filter", "set"})


def check_template(text: str) -> None:
    """Raise ``RequestError`` for length, and for nesting beyond the guest's stack.

    What no parser would take is left to the guest.
    """
    if len(text) > MAX_LENGTH:
        raise RequestError(OPERATION, f"it has more than {MAX_LENGTH} characters")
    _check(text)


@lru_cache(maxsize=16)
def _check(text: str) -> None:
    at = blocks = branches = 0
    while (tag := _TAG.search(text, at)) is not None:
        if tag.group() == "{#":
            end = text.find("#}", tag.end())
            at = len(text) if end < 0 else end + 2
            continue
        words, at = _read_tag(text, tag.end())
        if tag.group() == "{{":
            continue
        name = words[0] if words else ""
        branches += name == "elif"
        if name in _BLOCKS and not (name == "set" and "=" in words):
            blocks += 1
        elif name.startswith("end") and name[3:] in _BLOCKS:
            blocks = max(blocks - 1, 0)
        if blocks > MAX_BLOCKS or branches > MAX_BRANCHES:
            raise RequestError(
                OPERATION, f"its blocks are nested more than {MAX_BLOCKS} deep, or have too many branches"
            )


def _read_tag(text: str, at: int) -> tuple[list[str], int]:
    """Return the first tokens of a tag, enough to tell what it is, and where it ends."""
    words: list[str] = []
    depth = curly = n_operators = 0
    while (found := _TOKEN.search(text, at)) is not None:
        token, at = found.group(), found.end()
        if token == "%}" or (token == "}" and not curly and text[at : at + 1] == "}"):
            return words, at + (token == "}")
        if len(words) < 16 and token != "-":
            words.append(token)
        if token in ("(", "[", "{"):
            depth, curly = depth + 1, curly + (token == "{")
        elif token in (")", "]", "}"):
            depth, curly = depth - 1, curly - (token == "}" and curly > 0)
        elif token in _OPERATORS or not (token[0].isalnum() or token[0] in "_'\",:"):
            n_operators += 1
        if depth > MAX_BRACKETS or n_operators > MAX_OPERATORS:
            reason = f"a tag nests more than {MAX_BRACKETS} brackets or has more than {MAX_OPERATORS} operators"
            raise RequestError(OPERATION, reason)
    return words, len(text)
