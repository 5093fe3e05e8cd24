"""What one row of the corpus is: a public fault, the input that shows it, and what the sandbox must make of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import pyllama_wasm as pw

from ...conftest import TinyModel
from ...tiny_models import write_gpt2, write_lora, write_t5
from .lying_gguf import LyingGguf

Surface = Literal[
    "model", "adapter", "state", "grammar", "accept", "trigger", "template", "json", "prompt", "context", "long",
    "positions", "reader", "call",
]  # fmt: skip
"""Where the input goes in. The words are the actions of ``native_corpus.cpp``; beside ``reader``, which is
``GGUFReader`` alone, stands the gguf package of llama.cpp, beside ``call`` nothing."""

PROMPT = [5, 6, 7, 8, 9, 10]


@dataclass(frozen=True)
class Sparse:
    """A file that is far larger than what is stored of it."""

    head: bytes
    size_bytes: int

    def write(self, path: Path) -> None:
        """Write the beginning and let the rest be a hole."""
        path.write_bytes(self.head)
        os.truncate(path, self.size_bytes)


Input = bytes | Sparse | str
"""A file's content; a string is not a file but a number given as it is."""


class Seeds:
    """The good inputs that the hostile ones are made of, each written once."""

    @cached_property
    def model(self) -> bytes:
        """Return a tiny model of llama's architecture with random weights."""
        return self._written(lambda path: TinyModel().write(path))

    @cached_property
    def adapter(self) -> bytes:
        """Return a LoRA for it."""
        return self._written(lambda path: write_lora(path, {"blk.0.attn_q.weight": (64, 64)}))

    @cached_property
    def session(self) -> bytes:
        """Return a native session file of it, of six tokens."""
        with pw.Model(self.model, n_threads=1) as model, model.context(n_ctx=256) as context:
            batch = pw.Batch(16)
            batch.add_sequence(PROMPT)
            context.decode(batch)
            return context.state.get_data(PROMPT, native=True)

    @cached_property
    def gpt2(self) -> bytes:
        """Return a tiny model whose positions are learned."""
        return self._written(write_gpt2)

    @cached_property
    def t5(self) -> bytes:
        """Return a tiny encoder-decoder model."""
        return self._written(write_t5)

    def bpe(self, pre_tokenizer: str) -> bytes:
        """Return a model with a byte-pair vocabulary and this pre-tokenizer."""
        return self._written(lambda path: TinyModel(pre_tokenizer=pre_tokenizer).write(path))

    def parts(self) -> LyingGguf:
        """Return the good model, taken apart."""
        return LyingGguf.parse(self.model)

    def adapter_parts(self) -> LyingGguf:
        """Return the good adapter, taken apart."""
        return LyingGguf.parse(self.adapter)

    def _written(self, write: Callable[[Path], object]) -> bytes:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "seed.gguf"
            write(path)
            return path.read_bytes()


Maker = Callable[[Seeds], tuple[Input, ...]]


@dataclass(frozen=True)
class Case:
    """One public fault, or one that upstream's source still has."""

    id: str
    """A name, unique and fit for a file."""

    reference: str
    """CVE, advisory, issue or place in the source."""

    what: str
    """What is malformed, in a few words; a row of ``docs/security.md``."""

    surface: Surface
    make: Maker
    """Make the inputs of the surface, in its order."""

    expect: str
    """``ok``, or the class of ``pyllama_wasm.errors`` that comes out of it."""

    reason: str = ""
    """A regular expression that the message holds."""

    call: Callable[[pw.Model], object] | None = None
    """What surface ``call`` does to the good model."""

    memory_limit_bytes: int = 1 << 30

    deadline_s: float | None = None
    """What the call of the case may take, if less than all the others."""

    @property
    def is_clean(self) -> bool:
        """Whether the outcome names the fault: the end of the sandbox by a trap or an assertion does not."""
        return self.expect not in ("GuestAbortError", "GuestTrapError", "GuestStoppedError", "GuestDiedError")


def hostile_model(change: Callable[[LyingGguf], object]) -> Maker:
    """Return a maker of the good model after ``change``."""

    def make(seeds: Seeds) -> tuple[Input, ...]:
        parts = seeds.parts()
        change(parts)
        return (parts.write(),)

    return make


def hostile_adapter(change: Callable[[LyingGguf], object]) -> Maker:
    """Return a maker of the good model and its adapter after ``change``."""

    def make(seeds: Seeds) -> tuple[Input, ...]:
        parts = seeds.adapter_parts()
        change(parts)
        return (seeds.model, parts.write())

    return make
