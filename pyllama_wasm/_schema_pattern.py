"""Regular expressions of JSON schemas, rewritten so that llama.cpp's converter makes grammars of JSON strings of them.

The converter copies what it knows into the grammar, where a dot or ``[^a]`` would then also be the quote that ends the
string; it takes any text for what it does not know. What comes out of here are anchored patterns of literals, groups,
classes without escapes, and counts.
"""

from __future__ import annotations

from .errors import RequestError

__all__ = ["json_pattern"]

_OPERATION = "use the schema"

MAX_REPEAT = 1000
MAX_DEPTH = 50
_MAX_CHARACTERS = 4096

_ANY = r'[^"\\\x00-\x1F\x7F\u2028\u2029]'
_UNSAFE = frozenset('"\\') | {chr(code) for code in range(32)} | {"\x7f"}
_ESCAPES = {"t": "\t", "n": "\n", "r": "\r", "f": "\f", "v": "\v", "0": "\0"}
_CLASSES = {"d": [("0", "9")], "w": [("0", "9"), ("A", "Z"), ("_", "_"), ("a", "z")], "s": [(" ", " ")]}
_JSON = {"\b": r"\\b", "\t": r"\\t", "\n": r"\\n", "\f": r"\\f", "\r": r"\\r", '"': r'\\"', "\\": r"\\\\"}
"""How JSON spells what it escapes, with the backslash that patterns want before a backslash."""

Range = tuple[str, str]


def json_pattern(pattern: str) -> str:
    """Return the pattern for the converter; ``RequestError`` for what is no pattern or has no grammar.

    Where it is not anchored, any text may stand before or behind what it matches, without characters that JSON escapes.
    """
    if len(pattern) > _MAX_CHARACTERS:
        raise RequestError(_OPERATION, f"a pattern has more than {_MAX_CHARACTERS} characters")
    parser = _Parser(pattern)
    alternatives = [parser.branch()]
    while parser.take("|"):
        alternatives.append(parser.branch())
    if parser.rest():
        parser.fail("its parentheses do not match")
    return "^(" + "|".join(alternatives) + ")$"


class _Parser:
    def __init__(self, pattern: str) -> None:
        self.pattern, self.at, self.depth = pattern, 0, 0

    def fail(self, reason: str) -> None:
        raise RequestError(_OPERATION, f"the pattern {self.pattern!r} cannot be kept: {reason}")

    def rest(self) -> str:
        return self.pattern[self.at :]

    def take(self, text: str) -> bool:
        if self.pattern.startswith(text, self.at):
            self.at += len(text)
            return True
        return False

    def next(self) -> str:
        if self.at >= len(self.pattern):
            self.fail("it ends in the middle")
        self.at += 1
        return self.pattern[self.at - 1]

    # -- what is outside of groups, where anchors may stand ---------------------------------------------------------

    def branch(self) -> str:
        before = "" if self.take("^") else f"{_ANY}*"
        body = self.sequence()
        if self.take("$"):
            if self.rest() and not self.rest().startswith("|"):
                self.fail("it goes on after $")
            return before + body
        return f"{before}{body}{_ANY}*"

    def sequence(self) -> str:
        parts = []
        while self.rest() and self.pattern[self.at] not in "|)$":
            atom = self.atom()
            parts.append(atom + self.count())
        return "".join(parts)

    def atom(self) -> str:
        char = self.next()
        if char == "(":
            return self.group()
        if char == "[":
            return self.char_class()
        if char == ".":
            return _ANY
        if char == "\\":
            return self.escaped()
        if char in "*+?{^":
            self.fail(f"there is a {char} where it has no meaning")
        return _literal(char)

    def group(self) -> str:
        if self.take("?") and not self.take(":"):
            self.fail("only plain groups have a grammar")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.fail(f"its groups are nested more than {MAX_DEPTH} deep")
        alternatives = [self.sequence()]
        while self.take("|"):
            alternatives.append(self.sequence())
        if not self.take(")"):
            self.fail("a group does not end")
        self.depth -= 1
        return "(" + "|".join(alternatives) + ")"

    def count(self) -> str:
        if self.rest()[:1] in ("*", "+", "?"):
            found = self.next()
        elif self.take("{"):
            found = self.bounds()
        else:
            return ""
        self.take("?")  # a lazy count matches the same texts
        if self.rest()[:1] in ("*", "+", "?", "{"):
            self.fail("a count follows a count")
        return found

    def bounds(self) -> str:
        end = self.pattern.find("}", self.at)
        least, comma, most = self.pattern[self.at : max(end, self.at)].partition(",")
        numbers = [text for text in (least, most) if text]
        if not least or not all(text.isascii() and text.isdigit() and len(text) < 7 for text in numbers):
            self.fail("it has braces that are no count")
        self.at = end + 1
        low, high = int(least), int(most) if most else int(least)
        if low > high or max(low, high) > MAX_REPEAT:
            self.fail(f"it repeats something more than {MAX_REPEAT} times, or less than never")
        if not comma:
            return f"{{{low}}}"
        return f"{{{low},{most and high}}}"

    # -- characters ---------------------------------------------------------------------------------------------------

    def escaped(self) -> str:
        char = self.next()
        if char in _CLASSES:
            return _class(_CLASSES[char], is_negated=False)
        if char.lower() in _CLASSES:
            return _class(_CLASSES[char.lower()], is_negated=True)
        return _literal(self.escape(char))

    def escape(self, char: str) -> str:
        """Return the character that a backslash and ``char`` stand for."""
        if char in ("x", "u"):
            size = 2 if char == "x" else 4
            digits = self.pattern[self.at : self.at + size]
            if len(digits) < size or any(digit not in "0123456789abcdefABCDEF" for digit in digits):
                self.fail(f"\\{char} is not followed by {size} digits")
            self.at += size
            found = chr(int(digits, 16))
            if "\ud800" <= found <= "\udfff":
                self.fail("it has half of a surrogate pair")
            return found
        if char in _ESCAPES:
            return _ESCAPES[char]
        if char.isalnum() or not char.isascii():
            self.fail(f"\\{char} has no grammar")
        return char

    def char_class(self) -> str:
        is_negated = self.take("^")
        ranges: list[Range] = []
        while not self.take("]"):
            low = self.member(ranges)
            if low is None:
                continue
            high = low
            if self.pattern.startswith("-", self.at) and not self.pattern.startswith("-]", self.at):
                self.at += 1
                end = self.member(ranges)
                if end is None or end < low:
                    self.fail("a range ends before it begins")
                high = end or low
            ranges.append((low, high))
        if not ranges and not is_negated:
            self.fail("a class is empty")
        return _class(ranges, is_negated)

    def member(self, ranges: list[Range]) -> str | None:
        """Return the next character of a class, or add those of a class in it to ``ranges``."""
        char = self.next()
        if char != "\\":
            return char
        char = self.next()
        if char in _CLASSES:
            ranges += _CLASSES[char]
            return None
        if char.lower() in _CLASSES:
            self.fail(f"a class has \\{char} in it")
        return "\b" if char == "b" else self.escape(char)


def _literal(char: str) -> str:
    """Return what stands for one character of the text, as JSON spells it."""
    if char in _JSON:
        return f"({_JSON[char]})"
    if char in _UNSAFE:
        return "(" + r"\\u" + f"{ord(char):04x}" + ")"
    if "\ud800" <= char <= "\udfff":
        raise RequestError(_OPERATION, "a pattern has half of a surrogate pair")
    return f"[{_member(char)}]"


def _class(ranges: list[Range], is_negated: bool) -> str:
    """Return a class of the characters that JSON does not escape, and each other one by itself."""
    body = "".join(_member(low) if low == high else f"{_member(low)}-{_member(high)}" for low, high in ranges)
    if is_negated:
        return f'[^{body}"\\\\\\x00-\\x1F\\x7F]'
    unsafe = sorted(char for char in _UNSAFE if any(low <= char <= high for low, high in ranges))
    safe = "".join(_member(low) if low == high else f"{_member(low)}-{_member(high)}" for low, high in _safe(ranges))
    parts = ([f"[{safe}]"] if safe else []) + [_literal(char) for char in unsafe]
    return parts[0] if len(parts) == 1 else "(" + "|".join(parts) + ")"


def _safe(ranges: list[Range]) -> list[Range]:
    """Return the ranges without the characters that JSON escapes, and without halves of surrogate pairs."""
    cuts = sorted(ord(char) for char in _UNSAFE)
    found: list[Range] = []
    for low, high in ranges:
        begin = ord(low)
        for cut in cuts:
            if begin <= cut <= ord(high):
                if begin < cut:
                    found.append((chr(begin), chr(cut - 1)))
                begin = cut + 1
        if begin <= ord(high):
            found.append((chr(begin), high))
    return found


def _member(char: str) -> str:
    """Spell a character of a class so that neither the converter nor the grammar's parser reads more into it."""
    if char.isascii() and char.isalnum():
        return char
    code = ord(char)
    return f"\\x{code:02X}" if code < 256 else f"\\u{code:04X}" if code < 0x10000 else f"\\U{code:08X}"
