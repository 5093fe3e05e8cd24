"""Logits and embeddings of a batch: which token they belong to, how they are pooled, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import pyllama_wasm as pw

from ..tiny_models import N_CTX, write_bert, write_gpt2, write_mamba

PROMPT = [5, 6, 7, 8, 9, 10]


@pytest.fixture
def context(tiny: pw.Model) -> Iterator[pw.Context]:
    with tiny.context(n_ctx=256, n_seq_max=2, kv_unified=True, embeddings=True) as made:
        yield made


def batch_of(tokens: list[int], pos: int = 0, seq_id: int = 0) -> pw.Batch:
    batch = pw.Batch(256)
    batch.add_sequence(tokens, pos, seq_id)
    return batch


def test_all_logits_are_those_of_each_token_in_order(tiny: pw.Model) -> None:
    with tiny.context(n_ctx=512, n_seq_max=2, n_ubatch=4) as context:
        batch = pw.Batch(16)
        for pos in range(5):  # the guest computes sequence by sequence, but answers in the batch's order
            batch.add(5 + pos, pos, [0], logits=pos != 1)
            batch.add(50 + pos, pos, [1], logits=pos == 4)
        context.decode(batch)
        rows = context.all_logits()
        assert rows.shape == (5, tiny.vocab.n_tokens)
        assert not rows.flags.writeable
        for rank, i in enumerate(batch.outputs()):
            assert np.array_equal(context.logits(i), rows[rank])
            assert np.array_equal(context.logits(rank - 5), rows[rank])
        context.memory.clear()
        context.decode(batch_of([50, 51, 52, 53, 54], seq_id=1))
        assert np.allclose(context.logits(), rows[4], atol=1e-3) != np.allclose(context.logits(), rows[3], atol=1e-3)


def test_embeddings_of_tokens_and_logits_come_together(tiny: pw.Model, context: pw.Context) -> None:
    context.decode(batch_of(PROMPT))
    rows = context.all_embeddings()
    assert rows.shape == (6, tiny.n_embd)
    assert rows.dtype == np.float32
    assert not rows.flags.writeable
    assert np.array_equal(context.embeddings(2), rows[2])
    assert np.array_equal(context.embeddings(-1), rows[5])
    assert context.all_logits().shape[0] == 6  # every token is an output
    # The logits are the output weights times the normed hidden state, which is the embedding.
    with tiny.context(n_ctx=256) as plain:
        plain.decode(batch_of(PROMPT))
        assert np.allclose(plain.logits(), context.logits(), atol=1e-3)
        for call in (plain.embeddings, plain.all_embeddings, plain.embeddings_seq):
            with pytest.raises(pw.RequestError, match="get embeddings"):
                call()


@pytest.mark.parametrize("kind", ["mean", "cls", "last"])
def test_pooled_embeddings_are_made_of_those_of_the_tokens(tiny: pw.Model, context: pw.Context, kind: str) -> None:
    context.decode(batch_of(PROMPT))
    rows = np.array(context.all_embeddings())
    expected = {"mean": rows.mean(axis=0), "cls": rows[0], "last": rows[-1]}[kind]
    with tiny.context(n_ctx=256, n_seq_max=2, kv_unified=True, embeddings=True, pooling_type=kind) as pooled:
        assert pooled.pooling_type == kind
        batch = batch_of(PROMPT, seq_id=1)
        batch.add_sequence([30, 31, 32], seq_id=0)
        pooled.decode(batch)
        found = np.array(pooled.embeddings_seq(1))
        assert found.shape == (tiny.n_embd,)
        assert np.allclose(found, expected, atol=1e-3)
        assert not np.allclose(pooled.embeddings_seq(0), expected, atol=0.1)
        with pytest.raises(pw.RequestError, match=f"pooled by {kind} .use embeddings_seq"):
            pooled.embeddings(0)
        pooled.memory.clear()
        pooled.decode(batch_of([30, 31, 32], seq_id=0))
        with pytest.raises(pw.RequestError, match="gave sequence 1 none"):
            pooled.embeddings_seq(1)


def test_pooled_sequences_are_computed_at_once(tiny: pw.Model) -> None:
    """The guest would pool what is left of a sequence in its last part."""
    params = pw.ContextParams(n_ctx=512, n_ubatch=16, embeddings=True, pooling_type="mean", n_seq_max=2)
    with tiny.context(params) as separate:
        with pytest.raises(pw.RequestError, match="17 tokens exceed n_ubatch = 16"):
            separate.decode(batch_of([5] * 17))
        batch = batch_of([5] * 4)
        batch.add_sequence([5] * 6, seq_id=1)
        with pytest.raises(pw.RequestError, match="sequences of 4 and 6 tokens cannot be computed"):
            separate.decode(batch)
        batch = batch_of([5, 6, 7, 8])
        batch.add_sequence([8, 7, 6, 5], seq_id=1)
        separate.decode(batch)
        assert not np.allclose(separate.embeddings_seq(0), separate.embeddings_seq(1), atol=0.05)


def test_embeddings_and_causality_change_at_run_time(tiny: pw.Model) -> None:
    with tiny.context(n_ctx=256, n_ubatch=8) as context:
        assert context.causal_attn
        context.decode(batch_of(PROMPT))
        causal = context.logits().copy()
        context.memory.clear()
        context.set_causal_attn(False)
        assert not context.causal_attn
        with pytest.raises(pw.RequestError, match="9 tokens exceed n_ubatch = 8"):
            context.decode(batch_of([5] * 9))
        context.decode(batch_of(PROMPT))
        assert not np.allclose(context.logits(), causal, atol=0.05)
        context.set_causal_attn(True)
        context.memory.clear()
        context.set_embeddings(True)
        context.decode(batch_of(PROMPT))
        assert context.all_embeddings().shape[0] == 6
        context.set_embeddings(False)
        context.memory.clear()
        context.decode(batch_of(PROMPT))
        assert np.allclose(context.logits(), causal, atol=1e-4)
        with pytest.raises(pw.RequestError, match="computed none"):
            context.embeddings()
        for call in (context.set_causal_attn, context.set_embeddings):
            with pytest.raises(pw.RequestError, match="neither True nor False"):
                call(1)


def token_embeddings(path: Path) -> npt.NDArray[np.float32]:
    return np.array(pw.GGUFReader(path).tensor_data("token_embd.weight"))


def test_embeddings_of_tokens_do_what_the_tokens_do(tiny: pw.Model, tiny_path: Path) -> None:
    table = token_embeddings(tiny_path)
    with tiny.context(n_ctx=256) as context:
        context.decode(batch_of(PROMPT))
        expected = context.logits().copy()
        context.memory.clear()
        batch = pw.Batch(8, n_embd=tiny.n_embd)
        batch.add_embeddings(table[PROMPT[:5]], logits_last=False)
        batch.add_embedding(table[PROMPT[5]], 5, logits=True)
        context.decode(batch)
        assert np.allclose(context.logits(), expected, atol=1e-4)
        context.decode(batch_of([11], pos=6))  # tokens follow, in the same buffers
        context.memory.clear()
        large = pw.Batch(64, n_embd=tiny.n_embd)
        large.add_embeddings(table[[5] * 64])
        context.decode(large)
        wrong = pw.Batch(8, n_embd=32)
        wrong.add_embeddings(table[:2, :32])
        with pytest.raises(pw.RequestError, match="embeddings of width 32 where the model takes 64"):
            context.decode(wrong)


def test_learned_positions_end(tmp_path: Path) -> None:
    """The guest asserts on a position that has no embedding."""
    with pw.Model(write_gpt2(tmp_path / "gpt2.gguf"), n_threads=1) as model, model.context(n_ctx=256) as context:
        context.decode(batch_of([5] * N_CTX))
        with pytest.raises(pw.ContextFullError, match=f"the model knows no position {N_CTX}, only {N_CTX}"):
            context.decode(batch_of([5], pos=N_CTX))
        context.memory.seq_rm(0, N_CTX - 1)
        context.decode(batch_of([6], pos=N_CTX - 1))


def test_generating_ends_with_the_learned_positions(tmp_path: Path) -> None:
    path = write_gpt2(tmp_path / "gpt2.gguf")
    with pw.Model(path, n_threads=1, context_params=pw.ContextParams(n_ctx=256)) as model:
        with pytest.raises(pw.ContextFullError, match="the model knows no position"):
            model.generate([5] * (N_CTX + 10), max_tokens=4)
        with pytest.raises(pw.ContextFullError, match="the model knows no position"):
            model.generate([5] * (N_CTX - 1), max_tokens=20, ignore_eos=True)
        assert model.generate([5] * 10, max_tokens=4, ignore_eos=True).usage.completion_tokens == 4


def test_a_model_without_a_memory_computes_embeddings_only(tmp_path: Path) -> None:
    with (
        pw.Model(write_bert(tmp_path / "bert.gguf"), n_threads=1) as model,
        model.context(n_ctx=256, n_ubatch=16, n_seq_max=2, embeddings=True) as context,
    ):
        assert context.pooling_type == "mean"
        batch = batch_of([5, 6, 7])
        batch.add_sequence([8, 9], seq_id=1)
        context.decode(batch)
        found = np.array([context.embeddings_seq(seq) for seq in (0, 1)])
        context.encode(batch)
        assert np.array_equal(context.embeddings_seq(1), found[1])
        context.encode(batch_of([5, 6, 7]))
        assert np.allclose(context.embeddings_seq(0), found[0], atol=1e-4)
        for call in (context.logits, context.all_logits):
            with pytest.raises(pw.RequestError, match="computed embeddings and no logits"):
                call()
        with pytest.raises(pw.RequestError, match="17 tokens exceed n_ubatch = 16"):
            context.decode(batch_of([5] * 17))
        assert context.memory.seq_pos_max() == -1
        assert not context.memory.can_shift
        context.warmup()


def test_pooling_wants_all_outputs(tmp_path: Path) -> None:
    """The guest asserts when it plans a pooled graph for few outputs."""
    with pw.Model(write_bert(tmp_path / "bert.gguf"), n_threads=1) as model:
        with model.context(n_ctx=256, embeddings=True, n_outputs_max=2) as few:
            with pytest.raises(pw.RequestError, match="outputs of 3 tokens exceed n_outputs_max = 2"):
                few.encode(batch_of([5, 6, 7]))
            few.encode(batch_of([5, 6]))
        with model.context(n_ctx=256, n_outputs_max=2) as few:
            with pytest.raises(pw.RequestError, match="make it with embeddings=True"):
                few.set_embeddings(True)
            few.encode(batch_of([5, 6]))


def test_only_encoders_encode(tiny: pw.Model, tmp_path: Path) -> None:
    with pw.Model(write_mamba(tmp_path / "mamba.gguf"), n_threads=1) as mamba:
        for model in (tiny, mamba):
            with model.context(n_ctx=256) as context:
                with pytest.raises(pw.UnsupportedModelError, match="the model has no encoder"):
                    context.encode(batch_of(PROMPT))
                context.decode(batch_of(PROMPT))


@pytest.mark.parametrize("n_seq_max", [1, 2, 3, 7, 256])
@pytest.mark.parametrize(("n_ctx", "n_batch", "n_ubatch"), [(256, 2048, 512), (100, 64, 64), (2048, 512, 5), (1, 1, 1)])
def test_pooled_contexts_of_any_size_can_be_made(
    tiny: pw.Model, n_seq_max: int, n_ctx: int, n_batch: int, n_ubatch: int
) -> None:
    """The guest asserts, as native does, unless n_seq_max divides what it plans for."""
    params = pw.ContextParams(
        n_ctx=n_ctx,
        n_batch=n_batch,
        n_ubatch=n_ubatch,
        n_seq_max=n_seq_max,
        kv_unified=True,
        embeddings=True,
        pooling_type="mean",
    )
    with tiny.context(params) as context:
        assert context.n_ubatch >= min(n_ubatch, n_batch, 256 // n_seq_max * n_seq_max)
        assert context.n_ubatch % n_seq_max == 0
        context.decode(batch_of([5], seq_id=n_seq_max - 1))
        assert np.isfinite(context.embeddings_seq(n_seq_max - 1)).all()
