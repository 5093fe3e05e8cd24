"""Make every memory.fill and memory.copy of a linked module a call of sysroot/memory.c: run after the linker.

clang emits the instructions for every block whose size is not small and constant and cannot be told not to where there
are threads, and nothing ends one before it is done. A call takes exactly as many bytes as the instruction (the
function's index is padded), so nothing else in the module moves.

    memory_calls.py MODULE    rewrites the file in place; says how many there were
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

CODE, CUSTOM, IMPORT = 10, 0, 2
NAMES = {b"pw_memory_copy": b"\xfc\x0a\x00\x00", b"pw_memory_fill": b"\xfc\x0b\x00"}
"""The functions, and the instructions that become calls of them; in their own bodies they stay."""

# How many immediates an instruction has, all of them LEB128; the others are in `_immediates`.
_NO_IMMEDIATE = frozenset({0x00, 0x01, 0x05, 0x0A, 0x0B, 0x0F, 0x1A, 0x1B, 0xD1, 0xD3, 0xD4, *range(0x45, 0xC5)})
_LEBS = {
    **dict.fromkeys((0x02, 0x03, 0x04, 0x08, 0x0C, 0x0D, 0x10, 0x12, 0x3F, 0x40, 0x41, 0x42, 0xD0, 0xD2), 1),
    **dict.fromkeys(range(0x20, 0x27), 1),
    **dict.fromkeys((0x11, 0x13), 2),
    **dict.fromkeys(range(0x28, 0x3F), 2),
}
_FC_LEBS = {**dict.fromkeys(range(8), 0), 8: 2, 9: 1, 10: 2, 11: 1, 12: 2, 13: 1, 14: 2, 15: 1, 16: 1, 17: 1}


def leb(data: bytes, at: int) -> tuple[int, int]:
    """Return an unsigned LEB128 and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def padded_call(index: int, n_bytes: int) -> bytes:
    """Return a call of a function in exactly ``n_bytes``."""
    if index >= 1 << 7 * (n_bytes - 1):
        raise ValueError(f"function {index} cannot be called in {n_bytes} bytes: link the runtime earlier")
    groups = [index >> 7 * i & 0x7F | 0x80 for i in range(n_bytes - 1)]
    return bytes([0x10, *groups[:-1], groups[-1] & 0x7F])


def sections(module: bytes) -> Iterator[tuple[int, int, int]]:
    """Give kind, begin and end of every section."""
    at = 8
    while at < len(module):
        kind = module[at]
        size, at = leb(module, at + 1)
        yield kind, at, at + size
        at += size


def _skip_lebs(code: bytes, at: int, n: int) -> int:
    while n:
        if code[at] < 0x80:
            n -= 1
        at += 1
    return at


def _memarg(code: bytes, at: int) -> int:
    """Step over an alignment, which may announce the number of a memory, and an offset."""
    return _skip_lebs(code, at, 3 if code[at] & 0x40 else 2)


def _after_vector(code: bytes, at: int) -> int:
    """Step over the immediates of a SIMD instruction."""
    number, at = leb(code, at)
    if number < 12 or number in (92, 93):
        return _memarg(code, at)
    if number in (12, 13):
        return at + 16
    if 21 <= number <= 34:
        return at + 1
    return _memarg(code, at) + 1 if 84 <= number <= 91 else at


def _after_try_table(code: bytes, at: int) -> int:
    n, at = leb(code, _skip_lebs(code, at, 1))
    for _ in range(n):
        at = _skip_lebs(code, at + 1, 2 if code[at] < 2 else 1)
    return at


def _after(code: bytes, at: int) -> int:
    """Return where the instruction at ``at`` ends."""
    op = code[at]
    at += 1
    if op in _NO_IMMEDIATE:
        return at
    if 0x28 <= op <= 0x3E:
        return _memarg(code, at)
    if op in _LEBS:
        return _skip_lebs(code, at, _LEBS[op])
    if op in (0x43, 0x44):
        return at + (4 if op == 0x43 else 8)
    if op == 0x0E:
        n, at = leb(code, at)
        return _skip_lebs(code, at, n + 1)
    if op == 0x1C:
        n, at = leb(code, at)
        return _skip_lebs(code, at, n)
    if op == 0x1F:
        return _after_try_table(code, at)
    if op == 0xFC:
        number, at = leb(code, at)
        return _skip_lebs(code, at, _FC_LEBS[number])
    if op == 0xFD:
        return _after_vector(code, at)
    if op == 0xFE:
        number, at = leb(code, at)
        return at + 1 if number == 3 else _memarg(code, at)
    raise ValueError(f"unknown instruction {op:#04x}")


def instructions(code: bytes, begin: int, end: int) -> Iterator[int]:
    """Give where each instruction of a function's body begins; ``ValueError`` if they do not fill it exactly."""
    n, at = leb(code, begin)
    for _ in range(n):
        at = _skip_lebs(code, at, 2)
    while at < end:
        yield at
        at = _after(code, at)
    if at != end:
        raise ValueError("a function's instructions do not end where it does")


def bodies(module: bytes, begin: int) -> Iterator[tuple[int, int]]:
    """Give begin and end of the body of every function the module defines."""
    n, at = leb(module, begin)
    for _ in range(n):
        size, at = leb(module, at)
        yield at, at + size
        at += size


def count_imported_functions(module: bytes, begin: int) -> int:
    """Return how many functions come first in the numbering."""
    n, at = leb(module, begin)
    count = 0
    for _ in range(n):
        for _ in range(2):
            size, at = leb(module, at)
            at += size
        kind = module[at]
        at += 1
        count += kind == 0
        if kind == 0:
            at = _skip_lebs(module, at, 1)
        elif kind == 3:
            at += 2
        elif kind == 4:
            at = _skip_lebs(module, at + 1, 1)
        else:
            at += kind == 1  # a table has a type of reference before its limits
            flags = module[at]
            at = _skip_lebs(module, at + 1, 2 if flags & 1 else 1)
    return count


def function_names(module: bytes, begin: int, end: int) -> dict[bytes, int]:
    """Return the numbers of the functions by the name section, if this custom section is it."""
    size, at = leb(module, begin)
    if module[at : at + size] != b"name":
        return {}
    at += size
    while at < end:
        kind = module[at]
        size, at = leb(module, at + 1)
        if kind == 1:
            found = {}
            n, at = leb(module, at)
            for _ in range(n):
                index, at = leb(module, at)
                size, at = leb(module, at)
                found[module[at : at + size]] = index
                at += size
            return found
        at += size
    return {}


def rewrite(module: bytes) -> tuple[bytes, int]:
    """Return the module with calls in the place of the instructions, and how many there were."""
    numbers: dict[bytes, int] = {}
    n_imported = code_at = 0
    for kind, begin, end in sections(module):
        if kind == IMPORT:
            n_imported = count_imported_functions(module, begin)
        elif kind == CODE:
            code_at = begin
        elif kind == CUSTOM:
            numbers.update(function_names(module, begin, end))
    calls = {instruction: padded_call(numbers[name], len(instruction)) for name, instruction in NAMES.items()}
    own = {numbers[name] for name in NAMES}
    out = bytearray(module)
    count = 0
    for number, (begin, end) in enumerate(bodies(module, code_at), n_imported):
        if number in own or not any(module.find(instruction, begin, end) >= 0 for instruction in calls):
            continue
        for at in instructions(module, begin, end):
            if module[at] != 0xFC:
                continue
            for instruction, call in calls.items():
                if module.startswith(instruction, at):
                    out[at : at + len(call)] = call
                    count += 1
    return bytes(out), count


def main() -> None:
    """Rewrite the file named on the command line."""
    path = Path(sys.argv[1])
    module, count = rewrite(path.read_bytes())
    path.write_bytes(module)
    print(f"{path.name}: {count} instructions on memory are calls now")


if __name__ == "__main__":
    main()
