"""What can be done to bytes of which nothing is known, and to text."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence

MAX_BYTES = 1 << 20
"""No mutation makes an input longer."""

NUMBERS = (
    0, 1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 63, 64, 100, 127, 128, 255, 256, 511, 512, 513, 1000, 1024, 4095, 4096, 32767,
    32768, 65535, 65536, 2**20, 2**24, 2**26, 2**28, 2**29, 2**30, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1, 2**32,
    2**32 + 1, 2**33, 2**40, 2**48, 2**53, 2**60, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1,
)  # fmt: skip
"""Where counts, sizes and offsets wrap or change sign."""

FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e-10, 1e10, 3.4e38, -3.4e38, float("inf"), float("-inf"), float("nan"))

TEXTS = (
    b"", b"\0", b" ", b"\n", b"\r\n", b"\x1b[2J", b"\x7f", b"%s%n", b"\xff", b"\xc0\x80", b"\xe2\x96",
    b"\xed\xa0\x80", b"\xf4\x90\x80\x80", "\u202e".encode(), "\ufeff".encode(), "\U0010ffff".encode(),
    "\u2581".encode(), b"A" * 300, b"-1", b"0", b"18446744073709551616", b"-99999999999999999999", b"1e999",
    b"../../etc/passwd", b"/dev/zero", b"<0x41>", b"<s>",
)  # fmt: skip

ByteMutator = Callable[[bytearray, random.Random], None]


def number(rng: random.Random) -> int:
    """Return a number that is likely to be wrong, or one beside it."""
    return (
        rng.choice(NUMBERS) + rng.choice((0, 0, 0, -1, 1))
        if rng.random() < 0.8
        else rng.getrandbits(rng.choice((8, 16, 32, 64)))
    )


def _place(data: bytearray, rng: random.Random, n: int = 1) -> int:
    """Return a place for ``n`` bytes; headers lie at the beginning, so that is where most of them are."""
    most = max(len(data) - n, 0)
    if rng.random() < 0.5:
        most = min(most, rng.choice((16, 64, 256, 1024, 4096)))
    return rng.randint(0, most)


def _flip(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16, 64))):
        data[_place(data, rng)] ^= 1 << rng.randrange(8)


def _byte(data: bytearray, rng: random.Random) -> None:
    data[_place(data, rng)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def _integer(data: bytearray, rng: random.Random) -> None:
    size, order = rng.choice((2, 4, 4, 8)), rng.choice(("<", "<", "<", ">"))
    if len(data) < size:
        return
    at = _place(data, rng, size)
    code = {2: "H", 4: "I", 8: "Q"}[size]
    old = struct.unpack_from(order + code, data, at)[0]
    new = rng.choice((number(rng), old + rng.randint(-8, 8), old * 2, old // 2, ~old))
    struct.pack_into(order + code, data, at, new % (1 << (8 * size)))


def _float(data: bytearray, rng: random.Random) -> None:
    if len(data) >= 4:
        struct.pack_into("<f", data, _place(data, rng, 4), rng.choice(FLOATS))


def _truncate(data: bytearray, rng: random.Random) -> None:
    del data[_place(data, rng) + 1 :]


def _remove(data: bytearray, rng: random.Random) -> None:
    at = _place(data, rng)
    del data[at : at + rng.choice((1, 2, 4, 8, 16, 64, 256, 4096))]


def _repeat(data: bytearray, rng: random.Random) -> None:
    at, n = _place(data, rng), rng.choice((1, 2, 4, 8, 16, 64, 256))
    part = bytes(data[at : at + n])
    times = rng.choice((1, 1, 2, 8, 64, 512))
    data[at:at] = part * min(times, (MAX_BYTES - len(data)) // max(len(part), 1))


def _insert(data: bytearray, rng: random.Random) -> None:
    at = _place(data, rng)
    data[at:at] = rng.choice((rng.choice(TEXTS), rng.randbytes(rng.choice((1, 4, 16, 64)))))


def _overwrite(data: bytearray, rng: random.Random) -> None:
    part = rng.choice((rng.choice(TEXTS), rng.randbytes(rng.choice((4, 16, 64))), bytes(16), b"\xff" * 16))
    at = _place(data, rng, len(part))
    data[at : at + len(part)] = part


def _move(data: bytearray, rng: random.Random) -> None:
    n = rng.choice((1, 4, 8, 16, 64))
    a, b = _place(data, rng, n), _place(data, rng, n)
    data[a : a + n], data[b : b + n] = data[b : b + n], data[a : a + n]


_BYTES: tuple[ByteMutator, ...] = (
    _flip, _byte, _integer, _integer, _float, _truncate, _remove, _repeat, _insert, _overwrite, _move,
)  # fmt: skip


def mutate_bytes(data: bytes, rng: random.Random, words: Sequence[bytes] = ()) -> bytes:
    """Return ``data`` after some of the changes; ``words`` are texts that its reader knows."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 5, 8))):
        if not made:
            made += rng.randbytes(8)
        if words and rng.random() < 0.4:
            at = _place(made, rng)
            made[at : at + rng.choice((0, 0, 1, 4))] = rng.choice(words)
        else:
            rng.choice(_BYTES)(made, rng)
    return bytes(made[:MAX_BYTES])


def splice(one: bytes, other: bytes, rng: random.Random) -> bytes:
    """Return the beginning of one input and the end of another."""
    return (one[: rng.randint(0, len(one))] + other[rng.randint(0, len(other)) :])[:MAX_BYTES]


_OPEN, _CLOSE = b"([{", b")]}"


def _group(text: bytes, rng: random.Random) -> tuple[int, int] | None:
    """Return begin and end of one of the text's bracketed parts, if it has any."""
    opening = [i for i, byte in enumerate(text[:4096]) if byte in _OPEN]
    if not opening:
        return None
    begin, depth = rng.choice(opening), 0
    for i in range(begin, min(len(text), begin + 4096)):
        depth += (text[i] in _OPEN) - (text[i] in _CLOSE)
        if not depth:
            return begin, i + 1
    return None


def mutate_text(data: bytes, rng: random.Random, words: Sequence[bytes]) -> bytes:
    """Return ``data`` after changes that know lines and brackets: parts are doubled, nested, exchanged, or lost."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        choice = rng.random()
        if choice < 0.35 and (group := _group(data, rng)):
            begin, end = group
            part = data[begin:end]
            new = rng.choice((b"", part * 2, part[:1] * 3 + part + part[-1:] * 3, part[:-1] + part + part[-1:]))
            data = data[:begin] + new + data[end:]
        elif choice < 0.55:
            lines = data.split(b"\n")
            i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
            lines[i] = rng.choice((b"", lines[j], lines[i] + lines[j]))
            data = b"\n".join(lines)
        else:
            data = mutate_bytes(data, rng, words)
    return data[:MAX_BYTES]
