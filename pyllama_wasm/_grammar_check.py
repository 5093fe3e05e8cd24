"""Whether a GBNF grammar is one that the guest's parser survives: it recurses into groups and rules without a bound."""

from __future__ import annotations

import re

from .errors import RequestError

__all__ = ["check_grammar_text"]

# Strings, character classes and comments, in which nothing counts; repetitions; what begins a rule or a group. What is
# not closed goes on to the end: looking for the end again at the next quote would take quadratic time.
_PARTS = re.compile(
    r'"(?:\\.|[^"\\])*"?|\[(?:\\.|[^\]\\])*\]?|#[^\n]*|(\{\s*(\d+)\s*,\s*(\d+)\s*\})|(::=)|([()])', re.DOTALL
)

_MAX_LENGTH = 1 << 20

MAX_GROUPS = 2000
"""Groups inside groups; the guest's stack ends at some 8,000."""

MAX_DEPTH = 10_000
"""Rules, each with its groups twice since their repetitions are rules as well: the search for left recursion may go
through all of them. The guest's stack ends at some 19,000."""


def check_grammar_text(text: str) -> None:
    """Raise ``RequestError`` for repetitions that end before they begin and for nesting beyond the guest's stack.

    Looked at are the first million characters, so that it takes a bounded time; what comes later the guest may trap on.
    """
    total = depth = deepest = 0
    for found in _PARTS.finditer(text, 0, _MAX_LENGTH):
        repetition, least, most, rule, bracket = found.groups()
        if repetition:
            # The parser counts from most - least down to 0, unsigned, and takes all the memory there is.
            if int(least[-20:]) > int(most[-20:]):
                raise RequestError("set grammar", f"the repetition {repetition} ends before it begins")
        elif rule:
            total, depth, deepest = total + 1 + 2 * deepest, 0, 0
        elif bracket:
            depth += 1 if bracket == "(" else -1
            deepest = max(deepest, depth)
            if deepest > MAX_GROUPS:
                raise RequestError("set grammar", f"its groups are nested more than {MAX_GROUPS} deep")
    if total + 2 * deepest > MAX_DEPTH:
        raise RequestError("set grammar", f"its rules and groups could nest more than {MAX_DEPTH} deep", "use fewer")
