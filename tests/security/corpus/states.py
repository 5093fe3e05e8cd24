"""Faults of saved states, as native session files: counts, sequences and positions that the reader believes."""

from __future__ import annotations

import struct
from collections.abc import Callable

from .record import PROMPT, Case, Input, Maker, Seeds

# magic, version and token count; tokens; the architecture with its length; then buffers, cells and what each cell is:
# position and number of sequences, then those sequences.
N_TOKENS = 8
TOKENS = 12
ARCHITECTURE = TOKENS + 4 * len(PROMPT)
N_STREAM = ARCHITECTURE + 4 + len("llama")
N_CELLS = N_STREAM + 4
CELLS = N_CELLS + 4
CELL_BYTES = 12
LAYOUT = CELLS + CELL_BYTES * len(PROMPT)
"""Whether V is transposed, and the number of layers."""


def _at(*changes: tuple[int, int]) -> Maker:
    """Return a maker that puts 32-bit numbers at places of the good session file."""

    def make(seeds: Seeds) -> tuple[Input, ...]:
        data = bytearray(seeds.session)
        for place, value in changes:
            struct.pack_into("<I", data, place, value % 2**32)
        return (seeds.model, bytes(data))

    return make


def _changed(change: Callable[[bytes], bytes]) -> Maker:
    return lambda seeds: (seeds.model, change(seeds.session))


def _other_model(seeds: Seeds) -> tuple[Input, ...]:
    """Return a session of a model with half as many layers to one that has two."""
    made = seeds.parts()
    made.number("llama.block_count", 1)
    made.tensors = [tensor for tensor in made.tensors if not tensor.name.startswith(b"blk.1.")]
    return (made.write(), seeds.session)


CASES = (
    Case("issue-27068", "#27068", "it ends in the midst of the KV cache", "state",
         _changed(lambda data: data[: len(data) * 2 // 3]), "RequestError", "midst of the KV cache"),
    Case("issue-8699", "#8699, #24017", "more cells than the context has", "state",
         _at((N_CELLS, 2**31)), "RequestError", "do not fit"),
    Case("state-cells-max", "#24017 (2^32 - 1)", "2^32 - 1 cells", "state",
         _at((N_CELLS, 2**32 - 1)), "RequestError", "do not fit"),
    Case("state-tokens", "#24017 (tokens)", "2^32 - 1 tokens", "state",
         _at((N_TOKENS, 2**32 - 1)), "RequestError", "end beyond the data"),
    Case("state-vocabulary", "ours", "tokens that the vocabulary does not have", "state",
         _at((TOKENS, 2**31 - 1)), "RequestError"),
    Case("state-architecture", "#24017 (lengths)", "a name of 2^32 - 1 bytes", "state",
         _at((ARCHITECTURE, 2**32 - 1)), "RequestError"),
    Case("state-streams", "#24017 (buffers)", "2^32 - 1 KV buffers", "state",
         _at((N_STREAM, 2**32 - 1)), "RequestError", "KV buffers"),
    Case("issue-17118", "#15215, #17118", "a position of -1", "state",
         _at((CELLS, -1)), "RequestError"),
    Case("state-sequences", "KV-cell restore", "a cell of 2^32 - 1 sequences", "state",
         _at((CELLS + 4, 2**32 - 1)), "RequestError"),
    Case("state-sequence-id", "KV-cell restore (id)", "a cell of a sequence that does not exist", "state",
         _at((CELLS + 8, 255)), "RequestError"),
    Case("state-position-twice", "KV-cell restore (twice)", "two cells of the same position", "state",
         _at((CELLS + CELL_BYTES, 0)), "ok"),
    Case("state-layers", "#8699 (layers)", "2^32 - 1 layers", "state",
         _at((LAYOUT + 4, 2**32 - 1)), "RequestError", "layers"),
    Case("gpt4all-1742", "gpt4all#1742", "the state of another model", "state",
         _other_model, "RequestError"),
    Case("state-random", "ours", "random bytes behind a good beginning", "state",
         _changed(lambda data: data[:LAYOUT] + bytes((i * 167) % 251 for i in range(len(data) - LAYOUT))),
         "RequestError"),
    Case("state-empty", "ours (empty)", "no bytes", "state", _changed(lambda _: b""), "RequestError"),
)  # fmt: skip
