"""Whether a GBNF grammar is one that the guest's parser survives: it recurses into groups and rules without a bound."""

from __future__ import annotations

import re

from .errors import RequestError

__all__ = ["check_grammar_text"]

# Strings, character classes and comments, in which nothing counts; repetitions; what begins a rule or a group. What is
# not closed goes on to the end: looking for the end again at the next quote would take quadratic time.
_PARTS = re.compile(
    r'"[^"\\]*(?:\\.[^"\\]*)*"?|\[[^\]\\]*(?:\\.[^\]\\]*)*\]?|#[^\n]*|(\{\s*(\d+)\s*,\s*(\d+)\s*\})|([\w-]+)\s*::=|([\w-]+)|([()])',
    re.DOTALL,
)

_MAX_LENGTH = 1 << 20

MAX_GROUPS = 2000
"""Groups inside groups; the guest's stack ends at some 8,000."""

MAX_DEPTH = 10_000
"""Rules that follow from each other, each with its groups twice since their repetitions are rules as well: the search
for left recursion may go through all of them. The guest's stack ends at some 19,000."""


def check_grammar_text(text: str) -> None:
    """Raise ``RequestError`` for repetitions that end before they begin and for nesting beyond the guest's stack.

    Looked at are the first million characters, so that it takes a bounded time; what comes later the guest may trap on.
    """
    depths, references = _read_rules(text)
    if sum(depths.values()) > MAX_DEPTH and _longest_chain(depths, references) > MAX_DEPTH:
        raise RequestError("set grammar", f"its rules and groups could nest more than {MAX_DEPTH} deep", "use fewer")


def _read_rules(text: str) -> tuple[dict[str, int], dict[str, set[str]]]:
    """Return how deep each rule may nest by itself, and which rules it names."""
    depths: dict[str, int] = {"": 0}
    references: dict[str, set[str]] = {"": set()}
    rule, depth = "", 0
    for found in _PARTS.finditer(text, 0, _MAX_LENGTH):
        repetition, least, most, begun, name, bracket = found.groups()
        if repetition:
            # The parser counts from most - least down to 0, unsigned, and takes all the memory there is.
            if int(least[-20:]) > int(most[-20:]):
                raise RequestError("set grammar", f"the repetition {repetition} ends before it begins")
        elif begun:
            rule, depth = begun, 0
            depths[rule] = max(depths.get(rule, 0), 1)
            references.setdefault(rule, set())
        elif name:
            references[rule].add(name)
        elif bracket:
            depth += 1 if bracket == "(" else -1
            depths[rule] = max(depths[rule], 1 + 2 * depth)
            if depth > MAX_GROUPS:
                raise RequestError("set grammar", f"its groups are nested more than {MAX_GROUPS} deep")
    return depths, references


def _longest_chain(depths: dict[str, int], references: dict[str, set[str]]) -> int:
    """Return the most that rules following from each other add up to; rules that name each other in a ring count all.

    Tarjan's search for such rings (https://doi.org/10.1137/0201010), without recursion; it ends them in the order in
    which what they name is known already.
    """
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    total: dict[str, int] = {}  # of the chain from a rule on, once its ring is known
    open_rules: list[str] = []
    for start in depths:
        work = [] if start in order else [(start, iter(sorted(references[start])))]
        while work:
            rule, names = work[-1]
            if rule not in order:
                order[rule] = lowest[rule] = len(order)
                open_rules.append(rule)
            name = next((name for name in names if name in depths), None)
            if name is None:
                work.pop()
                if work:
                    lowest[work[-1][0]] = min(lowest[work[-1][0]], lowest[rule])
                if lowest[rule] == order[rule]:
                    _end_ring(rule, open_rules, depths, references, total)
            elif name not in order:
                work.append((name, iter(sorted(references[name]))))
            elif name not in total:
                lowest[rule] = min(lowest[rule], order[name])
    return max(total.values())


def _end_ring(
    first: str, open_rules: list[str], depths: dict[str, int], references: dict[str, set[str]], total: dict[str, int]
) -> None:
    ring = open_rules[open_rules.index(first) :] if open_rules[-1] != first else [first]
    del open_rules[-len(ring) :]
    beyond = max((total.get(name, 0) for rule in ring for name in references[rule]), default=0)
    length = sum(depths[rule] for rule in ring) + beyond
    total.update(dict.fromkeys(ring, length))
