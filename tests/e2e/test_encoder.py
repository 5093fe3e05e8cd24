"""Models with an encoder and a decoder: what the decoder sees, and what the guest would assert on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

import pyllama_wasm as pw

from ..tiny_models import N_EMBD, write_t5

SOURCE = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pw.Model]:
    with pw.Model(write_t5(tmp_path_factory.mktemp("t5") / "t5.gguf"), n_threads=1) as model:
        yield model


@pytest.fixture
def context(t5: pw.Model) -> Iterator[pw.Context]:
    with t5.context(n_ctx=256, n_ubatch=32, n_seq_max=2, kv_unified=True) as made:
        yield made


def batch_of(tokens: list[int], pos: int = 0, seq_id: int = 0) -> pw.Batch:
    batch = pw.Batch(64)
    batch.add_sequence(tokens, pos, seq_id)
    return batch


def test_the_decoder_sees_what_was_encoded(context: pw.Context) -> None:
    found = []
    for source in (SOURCE, [30, 31, 32, 33, 34]):
        context.memory.clear()
        context.encode(batch_of(source))
        context.decode(batch_of([0]))
        context.decode(batch_of([12, 13], pos=1))
        found.append(context.logits().copy())
        assert np.isfinite(found[-1]).all()
    assert not np.allclose(found[0], found[1], atol=0.1)


def test_the_encoder_gives_embeddings_and_no_logits(context: pw.Context) -> None:
    context.encode(batch_of(SOURCE))
    assert context.all_embeddings().shape == (len(SOURCE), N_EMBD)
    assert np.array_equal(context.embeddings(1), context.all_embeddings()[1])
    with pytest.raises(pw.RequestError, match="no logits"):
        context.logits()
    context.decode(batch_of([0]))
    assert context.logits().std() > 0
    with pytest.raises(pw.RequestError, match="computed none"):
        context.embeddings()


def test_sequences_see_their_own_input_only(context: pw.Context) -> None:
    context.encode(batch_of(SOURCE))
    context.decode(batch_of([0]))
    alone = context.logits().copy()
    context.memory.clear()
    both = batch_of(SOURCE)
    both.add_sequence([30, 31, 32], seq_id=1)
    context.encode(both)
    start = batch_of([0])
    start.add(0, 0, [1], logits=True)
    context.decode(start)
    assert np.allclose(context.logits(0), alone, atol=1e-3)
    assert not np.allclose(context.logits(1), alone, atol=0.1)


def test_nothing_is_decoded_before_it_is_encoded(t5: pw.Model, context: pw.Context) -> None:
    """The guest asserts, or reads beyond its tables."""
    with pytest.raises(pw.RequestError, match="sequence 0 was not encoded"):
        context.decode(batch_of([0]))
    context.encode(batch_of(SOURCE, seq_id=1))
    with pytest.raises(pw.RequestError, match="sequence 0 was not encoded"):
        context.decode(batch_of([0]))
    context.decode(batch_of([0], seq_id=1))
    with t5.context(n_ctx=256) as other:
        other.warmup()
        with pytest.raises(pw.RequestError, match="sequence 0 was not encoded"):
            other.decode(batch_of([0]))


def test_the_input_must_fit_at_once(context: pw.Context) -> None:
    with pytest.raises(pw.RequestError, match="33 tokens exceed n_ubatch = 32"):
        context.encode(batch_of([5] * 33))
    context.encode(batch_of([5] * 32))
    context.decode(batch_of([0]))


def test_contexts_that_the_guest_would_assert_on_are_refused(t5: pw.Model) -> None:
    with pytest.raises(pw.RequestError, match="set kv_unified=True"):
        t5.context(n_ctx=512, n_seq_max=2)
    with pytest.raises(pw.RequestError, match="use pooling_type none"):
        t5.context(n_ctx=256, pooling_type="mean")
    for params in ({"n_outputs_max": 1}, {"embeddings": True}, {"flash_attn_type": "enabled"}, {"type_v": "q8_0"}):
        with t5.context(n_ctx=256, **params) as made:
            made.encode(batch_of(SOURCE))
            made.decode(batch_of([0]))
            assert np.isfinite(made.logits()).all()
