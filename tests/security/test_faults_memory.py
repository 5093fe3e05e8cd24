"""Memory that runs out, at every point that can be reached: a typed error, an unharmed neighbour, a reload that works.

Two sweeps. The ceiling is shrunk step by step, so that starting, loading and creating contexts fail each in their turn.
And in a sandbox with a context all memory but a little is taken away, more each time, so that an allocation in the
middle of decoding, restoring a state, parsing a grammar, rendering a template, tokenizing or loading an adapter fails.
``make faults`` takes small steps, the tests otherwise a few.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import pyllama_wasm as pw
from pyllama_wasm import loaded_model
from pyllama_wasm.host import load_module

from ..tiny_models import write_lora

IS_DENSE = bool(os.environ.get("PYLLAMA_WASM_FAULTS"))
MIB = 1 << 20
GRAMMAR = 'root ::= item+\nitem ::= [a-z]{1,30} | "(" item{1,20} ")"\n'
TEMPLATE = "{% for m in messages %}{{ m.content * 3 }}{% endfor %}"

ABORTS = re.compile(r"mem_buffer != NULL|exit\(70\) was called|^terminating")
"""Where llama.cpp and libc abort instead of saying that memory is out: ``ggml_init``, libc's start, a destructor that
needs memory (``common_json``)."""

WRONG_CLASS = ("std::bad_alloc", "std::exception")
"""What upstream catches on the way and gives as its own reason: a ``RequestError`` that says so."""


def answer(model: pw.Model) -> tuple[int, ...]:
    return model.generate("abc", max_tokens=4, temperature=0).tokens


@pytest.fixture
def no_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let loads begin that the estimate would refuse: a file whose header lies passes it as well."""
    monkeypatch.setattr(loaded_model, "check_fits", lambda *_: None)


@pytest.fixture
def neighbour(tiny_path: Path) -> Iterator[pw.Model]:
    """A model that must not notice, and the same file loaded again afterwards."""
    with pw.Model(tiny_path, n_threads=1) as model:
        expected = answer(model)
        yield model
        assert answer(model) == expected
    with pw.Model(tiny_path, n_threads=1) as again:
        assert answer(again) == expected


def outcome(action: Callable[[], object]) -> str:
    """Run ``action``; return ``fine``, ``out of memory`` or ``aborted``, and let everything else through."""
    try:
        action()
    except pw.OutOfMemoryError:
        return "out of memory"
    except pw.RequestError as error:
        if error.reason not in WRONG_CLASS:
            raise
        return "out of memory"
    except pw.GuestAbortError as error:
        if not ABORTS.search(error.reason):
            raise
        return "aborted"
    return "fine"


def batch(n_tokens: int = 64) -> pw.Batch:
    tokens = pw.Batch(n_tokens)
    tokens.add_sequence(list(range(5, 5 + n_tokens)))
    return tokens


# -- the ceiling ------------------------------------------------------------------------------------------------------


def ceilings() -> list[int]:
    """Return ceilings in bytes above what the module starts with."""
    if IS_DENSE:
        return list(range(0, 64 * MIB, 1 << 17))
    return [0, MIB, 3 * MIB // 2, 2 * MIB, 8 * MIB, 31 * MIB, 32 * MIB, 40 * MIB, 56 * MIB, 64 * MIB]


def test_ceiling_that_shrinks(neighbour: pw.Model, no_estimate: None) -> None:
    lowest = load_module().min_pages * 65536
    found: dict[str, set[str]] = {"load": set(), "context": set(), "generate": set()}
    expected = answer(neighbour)
    for above in ceilings():

        def use(limit: int = lowest + above) -> None:
            def check_answer() -> None:
                assert answer(model) == expected

            with pw.Model(neighbour.path, n_threads=1, memory_limit_bytes=limit) as model:
                found["context"].add(outcome(lambda: model.context(n_ctx=512).decode(batch())))
                found["generate"].add(outcome(check_answer))
                assert not model.engine.is_dead
                assert model.metadata

        found["load"].add(outcome(use))
    assert found["context"] == found["generate"] == {"fine", "out of memory"}
    assert found["load"] == {"fine", "out of memory"}


def test_ceiling_below_what_the_module_starts_with_is_refused(tiny_path: Path, no_estimate: None) -> None:
    with pytest.raises(pw.RequestError):
        pw.Model(tiny_path, n_threads=1, memory_limit_bytes=load_module().min_pages * 65536 - 1)


# -- what is left -----------------------------------------------------------------------------------------------------


def take_memory(model: pw.Model, leave: int) -> None:
    """Allocate all of the sandbox's memory but one block of ``leave`` bytes and scraps of less than 256."""
    native = model.native

    def alloc(size: int) -> int:
        return int(native.call("pw_alloc", size) or 0) & 0xFFFFFFFF

    def job() -> None:
        room, size = alloc(leave) if leave else 0, 16 * MIB
        while size >= 256:
            if not alloc(size):
                size //= 2
        native.free(room)

    model.engine.run(job)


def leaves() -> list[int]:
    """Return how many bytes to leave."""
    if IS_DENSE:
        return [*range(0, 16384, 512), *range(16384, 1 << 17, 4096), *range(1 << 17, 4 * MIB, 1 << 17)]
    return [0, 1024, 4096, 16384, 1 << 16, 1 << 18, MIB, 4 * MIB]


def decode(_model: pw.Model, context: pw.Context, _state: bytes, _lora: Path) -> None:
    context.decode(batch())


def restore(_model: pw.Model, context: pw.Context, state: bytes, _lora: Path) -> None:
    context.state.set_data(state)


def sample(model: pw.Model, context: pw.Context, _state: bytes, _lora: Path) -> None:
    with pw.Sampler(model, pw.SamplingParams(seed=1)) as sampler:
        context.decode(batch())
        sampler.sample(context)


def parse_grammar(model: pw.Model, _context: pw.Context, _state: bytes, _lora: Path) -> None:
    pw.Sampler(model, pw.SamplingParams(grammar=GRAMMAR)).close()


def render(model: pw.Model, _context: pw.Context, _state: bytes, _lora: Path) -> None:
    model.apply_chat_template([{"role": "user", "content": "x" * 5000}], template=TEMPLATE)


def tokenize(model: pw.Model, _context: pw.Context, _state: bytes, _lora: Path) -> None:
    model.vocab.tokenize("hello " * 3000)


def load_lora(model: pw.Model, _context: pw.Context, _state: bytes, lora: Path) -> None:
    model.load_lora(lora).close()


def create_context(model: pw.Model, _context: pw.Context, _state: bytes, _lora: Path) -> None:
    model.context(n_ctx=256)


def generate(model: pw.Model, _context: pw.Context, _state: bytes, _lora: Path) -> None:
    answer(model)


USES = (decode, restore, sample, parse_grammar, render, tokenize, load_lora, create_context, generate)


@pytest.mark.parametrize("use", USES, ids=[use.__name__ for use in USES])
def test_less_and_less_is_left(
    neighbour: pw.Model, tmp_path: Path, use: Callable[[pw.Model, pw.Context, bytes, Path], None]
) -> None:
    lora = write_lora(tmp_path / "lora.gguf", {"blk.0.attn_q.weight": (64, 64)})
    with neighbour.context(n_ctx=512) as context:
        context.decode(batch())
        state = context.state.get_data()
    found = set()
    for leave in leaves():
        with pw.Model(neighbour.path, n_threads=1, memory_limit_bytes=80 * MIB) as model:
            context = model.context(n_ctx=512)
            context.decode(batch())
            context.memory.clear()
            take_memory(model, leave)
            found.add(outcome(lambda model=model, context=context: use(model, context, state, lora)))  # type: ignore[misc]
            if not model.engine.is_dead:
                model.vocab.is_eog(2)
    assert "out of memory" in found
    if use not in (create_context, generate):  # which ask beforehand for more than is ever left here
        assert "fine" in found
    assert "aborted" not in found or use in (load_lora, render)


def test_memory_given_back_can_be_used_again(neighbour: pw.Model) -> None:
    """A sandbox that ran out works as before when there is room again."""
    with pw.Model(neighbour.path, n_threads=1, memory_limit_bytes=80 * MIB) as model:
        native = model.native
        blocks: list[int] = []

        def take() -> None:
            size = 16 * MIB
            while size >= 4096:
                block = int(native.call("pw_alloc", size) or 0) & 0xFFFFFFFF
                blocks.append(block)
                size = size if block else size // 2

        def give_back() -> None:
            for block in blocks:
                native.free(block)

        for _ in range(3):
            assert answer(model) == answer(neighbour)
            model.engine.run(take)
            with pytest.raises(pw.OutOfMemoryError):
                model.context(n_ctx=256)
            model.engine.run(give_back)
            blocks.clear()
        assert answer(model) == answer(neighbour)
