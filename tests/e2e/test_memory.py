"""The KV cache as an object: several sequences, prefix reuse, and what it refuses before the guest would assert."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import pyllama_wasm as pw

from ..tiny_models import write_mamba

PROMPT = [5, 6, 7, 8, 9, 10]


@pytest.fixture
def context(tiny: pw.Model) -> Iterator[pw.Context]:
    with tiny.context(n_ctx=256, n_batch=64, n_seq_max=3, kv_unified=True) as made:
        yield made


@pytest.fixture
def separate(tiny: pw.Model) -> Iterator[pw.Context]:
    with tiny.context(n_ctx=768, n_batch=64, n_seq_max=3) as made:
        yield made


def feed(context: pw.Context, tokens: list[int], pos: int = 0, seq_id: int = 0) -> npt.NDArray[np.float32]:
    batch = pw.Batch(64)
    batch.add_sequence(tokens, pos, seq_id)
    context.decode(batch)
    return np.array(context.logits())


def positions(context: pw.Context) -> list[tuple[int, int]]:
    memory = context.memory
    return [(memory.seq_pos_min(seq), memory.seq_pos_max(seq)) for seq in range(context.n_seq_max)]


def test_kv_cache_can_be_edited(context: pw.Context) -> None:
    memory = context.memory
    feed(context, PROMPT)
    memory.seq_cp(0, 1)
    memory.seq_cp(0, 2, 0, 3)
    assert positions(context) == [(0, 5), (0, 5), (0, 2)]
    assert memory.seq_rm(0, 2)
    assert positions(context) == [(0, 1), (0, 5), (0, 2)]
    memory.seq_keep(1)
    assert positions(context) == [(-1, -1), (0, 5), (-1, -1)]
    memory.seq_add(1, 0, -1, 5)
    assert positions(context)[1] == (5, 10)
    memory.seq_div(1, 0, -1, 5)
    assert positions(context)[1] == (1, 2)
    memory.clear()
    assert positions(context) == [(-1, -1)] * 3


def test_a_sequence_of_minus_one_is_every_sequence(separate: pw.Context) -> None:
    for seq in range(3):
        feed(separate, PROMPT, seq_id=seq)
    assert separate.memory.seq_rm(-1, 3)
    assert positions(separate) == [(0, 2)] * 3
    assert separate.memory.seq_rm(-1)
    assert positions(separate) == [(-1, -1)] * 3


def test_keeping_a_sequence_forgets_those_in_other_buffers_too(separate: pw.Context) -> None:
    for seq in range(3):
        feed(separate, PROMPT, seq_id=seq)
    separate.memory.seq_keep(1)
    assert positions(separate) == [(-1, -1), (0, 5), (-1, -1)]


def test_a_common_prefix_is_computed_once(context: pw.Context) -> None:
    alone = []
    for token in (20, 21):
        alone.append(feed(context, [*PROMPT, token]))
        context.memory.clear()
    feed(context, PROMPT)
    for seq in (1, 2):
        context.memory.seq_cp(0, seq)
    batch = pw.Batch(2)
    batch.add_tokens([20, 21], len(PROMPT), [1, 2], True)
    context.decode(batch)
    assert np.allclose(context.all_logits(), alone, atol=1e-3)
    assert not np.allclose(alone[0], alone[1], atol=0.1)


def test_sequences_in_separate_buffers_are_copied_whole(separate: pw.Context) -> None:
    expected = feed(separate, [*PROMPT, 20])
    separate.memory.clear()
    feed(separate, PROMPT)
    feed(separate, [30, 31], seq_id=1)
    separate.memory.seq_cp(0, 1)
    separate.memory.seq_cp(0, 1, 0, -1)  # from 0 on is all of it
    assert positions(separate)[1] == (0, 5)
    assert np.allclose(feed(separate, [20], len(PROMPT), seq_id=1), expected, atol=1e-3)


@pytest.mark.parametrize(("p0", "p1"), [(1, 2), (0, 3), (2, -1), (0, 600)])
def test_part_of_a_sequence_is_copied_only_in_a_unified_cache(separate: pw.Context, p0: int, p1: int) -> None:
    feed(separate, PROMPT)
    with pytest.raises(pw.RequestError, match="set kv_unified=True"):
        separate.memory.seq_cp(0, 1, p0, p1)
    assert positions(separate)[1] == (-1, -1)


@pytest.mark.parametrize("seq_id", [-1, 3, True, 1.0, None])
def test_unknown_sequences_are_refused(context: pw.Context, seq_id: int) -> None:
    memory = context.memory
    for call in (
        memory.seq_pos_min,
        memory.seq_pos_max,
        memory.seq_keep,
        lambda seq: memory.seq_cp(seq, 0),
        lambda seq: memory.seq_cp(0, seq),
        lambda seq: memory.seq_add(seq, 0, -1, 1),
        lambda seq: memory.seq_div(seq, 0, -1, 2),
        lambda seq: memory.seq_rm(seq) if seq != -1 else memory.seq_keep(seq),
    ):
        with pytest.raises(pw.RequestError, match="use a sequence"):
            call(seq_id)
    feed(context, PROMPT)


@pytest.mark.parametrize("position", [2**31, -(2**31), 1.5, True])
def test_positions_are_32_bit_integers(context: pw.Context, position: int) -> None:
    memory = context.memory
    for call in (
        lambda p: memory.seq_rm(0, p),
        lambda p: memory.seq_cp(0, 1, 0, p),
        lambda p: memory.seq_add(0, 0, -1, p),
        lambda p: memory.seq_div(0, 0, -1, p),
    ):
        with pytest.raises(pw.RequestError, match="is not a 32-bit integer"):
            call(position)


def test_shifts_that_make_no_sense_are_refused_and_the_engine_lives(context: pw.Context) -> None:
    feed(context, PROMPT)
    for d in (0, -2):
        with pytest.raises(pw.RequestError, match="positions cannot be divided"):
            context.memory.seq_div(0, 0, -1, d)
    with pytest.raises(pw.RequestError, match="leaves the 32 bits"):
        context.memory.seq_add(0, 0, -1, 2**31 - 5)
    context.memory.seq_add(0, 0, -1, -3)  # what comes below 0 is forgotten
    assert positions(context)[0] == (0, 2)
    assert np.isfinite(feed(context, [11], 3)).all()


def test_a_recurrent_memory_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    with (
        pw.Model(write_mamba(tmp_path / "mamba.gguf"), n_threads=1) as model,
        model.context(n_ctx=256, n_seq_max=2, kv_unified=True) as context,
    ):
        expected = feed(context, [*PROMPT, 20])
        context.memory.clear()
        feed(context, PROMPT)
        assert not context.memory.seq_rm(0, 3)
        assert context.memory.seq_pos_max(0) == 5
        with pytest.raises(pw.RequestError, match="only be copied whole"):
            context.memory.seq_cp(0, 1, 0, 3)
        context.memory.seq_cp(0, 1)
        assert np.allclose(feed(context, [20], 6, seq_id=1), expected, atol=1e-3)
        assert context.memory.seq_rm(-1)
        assert [context.memory.seq_pos_max(seq) for seq in (0, 1)] == [-1, -1]


def test_the_memory_keeps_its_context_and_ends_with_it(tiny: pw.Model) -> None:
    memory = tiny.context(n_ctx=256).memory
    gc.collect()
    assert memory.seq_pos_max() == -1
    context = tiny.context(n_ctx=256)
    memory = context.memory
    context.close()
    with pytest.raises(pw.ClosedError):
        memory.clear()


@pytest.mark.parametrize("kind", ["bf16", "q8_0", "iq4_nl"])
def test_keys_that_the_guest_cannot_turn_are_not_shifted(tiny: pw.Model, kind: str) -> None:
    """Native llama.cpp dies of this at the next decode, in a missing kernel or reading a null pointer."""
    with tiny.context(n_ctx=256, type_k=kind) as context:
        feed(context, PROMPT)
        assert not context.memory.can_shift
        for call in (context.memory.seq_add, context.memory.seq_div):
            with pytest.raises(pw.RequestError, match="cannot shift positions"):
                call(0, 0, -1, 2)
        feed(context, [11], len(PROMPT))


def test_keys_of_wide_heads_are_shifted_when_quantized_too(write_tiny: Callable[..., Path], tmp_path: Path) -> None:
    with (
        pw.Model(write_tiny(tmp_path / "wide.gguf", n_head=1), n_threads=1) as model,
        model.context(n_ctx=256, type_k="q8_0") as context,
    ):
        feed(context, PROMPT)
        assert context.memory.can_shift
        context.memory.seq_add(0, 0, -1, 4)
        assert np.isfinite(feed(context, [11], 10)).all()


def test_what_is_shared_already_can_be_shared_again(context: pw.Context) -> None:
    """The guest asserts on it."""
    expected = feed(context, [*PROMPT, 20])
    context.memory.clear()
    feed(context, PROMPT)
    for p0, p1 in ((-1, -1), (2, 4), (0, -1), (4, 100)):
        context.memory.seq_cp(0, 1, p0, p1)
        assert positions(context)[1] == (0, 5)
    feed(context, [30, 31, 32], seq_id=2)
    context.memory.seq_cp(0, 2, 3, -1)
    assert positions(context)[2] == (0, 5)
    assert np.allclose(feed(context, [20], 6, seq_id=1), expected, atol=1e-3)


def test_a_moved_sequence_is_copied_between_buffers_after_the_next_decode(separate: pw.Context) -> None:
    """The guest asserts on positions that were divided and copied."""
    feed(separate, PROMPT)
    separate.memory.seq_div(0, 0, -1, 3)
    with pytest.raises(pw.RequestError, match="moved since the last decode"):
        separate.memory.seq_cp(0, 1)
    feed(separate, [11], 2)
    separate.memory.seq_cp(0, 1)
    assert np.isfinite(feed(separate, [12], 3, seq_id=1)).all()
