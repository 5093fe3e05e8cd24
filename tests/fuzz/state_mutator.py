"""What can be done to a saved state by who knows its parts: our header, its digest, and llama.cpp's numbers."""

from __future__ import annotations

import json
import random
import struct

from pyllama_wasm._state_format import pack_container, unpack_container
from pyllama_wasm.errors import RequestError

from .json_mutator import mutate_json
from .mutators import mutate_bytes, number

_WORDS = (b"architecture", b"llama", b"mamba", b"n_layer", b"kind", b"context", b"sequence", b"build")
_NUMBERS_WITHIN = (16, 48, 160, 400, 4096)
"""Counts, positions and sizes lie in the beginning, each at a multiple of four of the session's."""


def mutate_state(data: bytes, rng: random.Random) -> bytes:
    """Return the state after changes, under our header mostly with a digest that is right: else none of it is read."""
    try:
        header, session = unpack_container(memoryview(data)) if rng.random() < 0.9 else (None, memoryview(data))
    except RequestError:
        header, session = None, memoryview(data)
    changed = bytes(session)
    if header is None or rng.random() < 0.8:
        changed = _numbers(changed, rng) if rng.random() < 0.6 else mutate_bytes(changed, rng)
    if header is None:
        return changed
    if rng.random() < 0.3:
        text = mutate_json(json.dumps(header).encode(), rng, _WORDS)
        try:
            header = json.loads(text)
        except (ValueError, RecursionError):
            return data.replace(json.dumps(header, sort_keys=True).encode(), text)
    return pack_container(header if isinstance(header, dict) else {"": header}, changed)


def _numbers(data: bytes, rng: random.Random) -> bytes:
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = 4 * (rng.randrange(min(len(made), rng.choice(_NUMBERS_WITHIN))) // 4) if made else 0
        if rng.random() < 0.3:
            at += 1  # behind a name of five letters nothing is aligned any more
        if at + 4 <= len(made):
            (old,) = struct.unpack_from("<I", made, at)
            new = rng.choice((number(rng), old + rng.choice((-1, 1)), rng.randrange(8)))
            struct.pack_into("<I", made, at, new % 2**32)
    return bytes(made)
