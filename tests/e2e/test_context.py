"""The low-level objects: context, batch, logits, KV cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import pyllama_wasm as pw


@pytest.fixture
def context(tiny: pw.Model) -> Iterator[pw.Context]:
    with tiny.context(n_ctx=256, n_batch=64, n_seq_max=2, kv_unified=True) as made:
        yield made


def batch_of(tokens: list[int], pos: int = 0, seq_id: int = 0) -> pw.Batch:
    batch = pw.Batch(256, n_seq_max=2)
    batch.add_sequence(tokens, pos, seq_id)
    return batch


def test_sizes_are_those_asked_for(context: pw.Context) -> None:
    assert (context.n_ctx, context.n_batch, context.n_seq_max) == (256, 64, 2)


def test_logits_are_a_read_only_view_over_the_vocabulary(tiny: pw.Model, context: pw.Context) -> None:
    context.decode(batch_of([5, 6, 7]))
    logits = context.logits()
    assert logits.shape == (tiny.vocab.n_tokens,)
    assert logits.dtype == np.float32
    assert not logits.flags.writeable
    assert np.isfinite(logits).all()
    assert np.array_equal(context.logits(2), logits)
    assert logits.std() > 0


def test_logits_of_tokens_not_asked_for_are_refused(context: pw.Context) -> None:
    with pytest.raises(pw.RequestError, match="asked for no logits of token -1"):
        context.logits()
    context.decode(batch_of([5, 6, 7]))
    for i in (0, 1, 3, -2):
        with pytest.raises(pw.RequestError, match=f"asked for no logits of token {i}"):
            context.logits(i)


def test_logits_of_several_tokens(context: pw.Context) -> None:
    batch = pw.Batch(8)
    for pos, token in enumerate([5, 6, 7, 8]):
        batch.add(token, pos, logits=pos in (1, 3))
    context.decode(batch)
    assert np.array_equal(context.logits(1), context.logits(-2))
    assert np.array_equal(context.logits(3), context.logits(-1))
    second = context.logits(1).copy()
    context.memory.clear()
    context.decode(batch_of([5, 6]))
    assert np.allclose(context.logits(), second, atol=1e-4)


def test_sequences_do_not_see_each_other(context: pw.Context) -> None:
    context.decode(batch_of([5, 6, 7], seq_id=0))
    alone = context.logits().copy()
    context.memory.clear()
    context.decode(batch_of([9, 10, 11, 12], seq_id=1))
    context.decode(batch_of([5, 6, 7], seq_id=0))
    assert np.allclose(context.logits(), alone, atol=1e-4)
    assert (context.memory.seq_pos_max(0), context.memory.seq_pos_max(1)) == (2, 3)


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        (pw.Batch(4), "the batch is empty"),
        (batch_of([10**6]), "token 1000000 is not in the vocabulary"),
        (batch_of([5] * 65), "65 tokens exceed n_batch = 64"),
        (batch_of([5, 6], pos=3), ""),
    ],
)
def test_bad_batches_are_refused_and_the_context_lives_on(context: pw.Context, batch: pw.Batch, reason: str) -> None:
    context.decode(batch_of([5, 6]))
    with pytest.raises(pw.RequestError, match=f"decode: .*{reason}"):
        context.decode(batch)
    context.decode(batch_of([7], pos=2))
    assert context.memory.seq_pos_max(0) == 2


def test_sequence_beyond_the_context_is_refused(tiny: pw.Model) -> None:
    with tiny.context(n_ctx=256) as single, pytest.raises(pw.RequestError, match="sequence 1 exceeds n_seq_max = 1"):
        single.decode(batch_of([5], seq_id=1))


def test_more_logits_than_reserved_are_refused(tiny: pw.Model) -> None:
    with tiny.context(n_ctx=256, n_outputs_max=1) as small:
        batch = pw.Batch(4)
        batch.add(5, 0, logits=True)
        batch.add(6, 1, logits=True)
        with pytest.raises(pw.RequestError, match="outputs of 2 tokens exceed n_outputs_max = 1"):
            small.decode(batch)


def test_non_causal_tokens_must_fit_at_once(tiny: pw.Model) -> None:
    with tiny.context(n_ctx=256, n_batch=64, n_ubatch=8, attention_type="non_causal") as made:
        with pytest.raises(pw.RequestError, match="20 tokens exceed n_ubatch = 8"):
            made.decode(batch_of([5] * 20))
        made.decode(batch_of([5] * 8))


def test_embeddings_output_every_token(tiny: pw.Model) -> None:
    with tiny.context(n_ctx=256, embeddings=True, n_outputs_max=4) as made:
        with pytest.raises(pw.RequestError, match="outputs of 5 tokens exceed n_outputs_max = 4"):
            made.decode(batch_of([5] * 5))
        made.decode(batch_of([5] * 4))


def test_full_context_is_told_and_keeps_what_it_has(context: pw.Context) -> None:
    for start in range(0, 256, 64):
        context.decode(batch_of([5] * 64, pos=start))
    with pytest.raises(pw.ContextFullError, match="no room in the KV cache of 256 tokens"):
        context.decode(batch_of([5], pos=256))
    assert context.memory.seq_pos_max(0) == 255
    context.memory.seq_rm(0, 200)
    context.decode(batch_of([5], pos=200))


def test_more_tokens_than_the_context_holds_are_refused(context: pw.Context) -> None:
    batch = pw.Batch(300)
    batch.add_sequence([5] * 300)
    with pytest.raises(pw.ContextFullError, match="300 tokens do not fit into a context of 256"):
        context.decode(batch)


@pytest.mark.parametrize("params", [{"type_v": "q4_0", "flash_attn_type": "disabled"}, {"nonsense": 1}, {"n_ctx": -1}])
def test_impossible_contexts_are_refused(tiny: pw.Model, params: dict[str, object]) -> None:
    with pytest.raises(pw.RequestError):
        tiny.context(**params)  # type: ignore[arg-type]
    assert tiny.generate("a", max_tokens=1).usage.completion_tokens == 1


@pytest.mark.parametrize("type_k", ["f32", "f16", "q8_0"])
def test_kv_cache_types_compute_nearly_the_same(tiny: pw.Model, type_k: str) -> None:
    def logits(kind: str) -> list[float]:
        with tiny.context(n_ctx=256, type_k=kind, type_v="f16", flash_attn_type="enabled") as made:
            made.decode(batch_of([5, 6, 7, 8]))
            return [float(x) for x in made.logits()]

    assert np.allclose(logits(type_k), logits("f32"), atol=0.5)


def test_sequences_outnumbering_the_batch_are_possible(tiny: pw.Model) -> None:
    with tiny.context(n_ctx=1024, n_seq_max=4, n_batch=2, n_ubatch=2, n_outputs_max=1) as many:
        assert many.n_seq_max == 4
        many.decode(batch_of([5], seq_id=1))


def test_views_outlive_context_and_model_harmlessly(tiny: pw.Model) -> None:
    context = tiny.context(n_ctx=256)
    context.decode(batch_of([5, 6]))
    logits = context.logits()
    context.close()
    tiny.close()
    assert logits.sum() is not None
    assert logits.shape[0] > 200


def test_dropped_contexts_are_freed(tiny: pw.Model) -> None:
    def heap() -> int:
        return int(tiny.native.call("pw_heap_bytes") or 0)

    for _ in range(3):
        tiny.context(n_ctx=256)
    before = heap()
    for _ in range(20):
        tiny.context(n_ctx=256)
    assert heap() - before < 4 << 20


@pytest.mark.parametrize(("n_ctx", "n_seq_max"), [(1, 4), (2, 256)])
def test_contexts_smaller_than_their_sequences_are_possible(tiny: pw.Model, n_ctx: int, n_seq_max: int) -> None:
    with tiny.context(n_ctx=n_ctx, n_seq_max=n_seq_max, kv_unified=True, n_outputs_max=1) as many:
        many.decode(batch_of([5], seq_id=1))
        assert np.isfinite(many.logits()).all()


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "iq4_nl"])
@pytest.mark.parametrize("flash_attn_type", ["enabled", "disabled", "auto"])
def test_quantized_caches_want_heads_of_whole_blocks(
    write_tiny: Callable[..., Path], tmp_path: Path, kind: str, flash_attn_type: str
) -> None:
    """Without flash attention the guest asserts on it."""
    with pw.Model(write_tiny(tmp_path / "narrow.gguf", n_embd=48), n_threads=1) as narrow:
        for name in ("type_k", "type_v"):
            params = pw.ContextParams(n_ctx=256, flash_attn_type=flash_attn_type, **{name: kind})  # type: ignore[arg-type]
            with pytest.raises(pw.RequestError, match="has blocks of 32, an attention head 24 numbers"):
                narrow.context(params)
        assert narrow.generate("a", max_tokens=1).usage.completion_tokens == 1


def test_yarn_leaves_the_model_as_it_was(tiny: pw.Model) -> None:
    with tiny.context(rope_scaling_type="yarn", rope_freq_scale=0.125, yarn_orig_ctx=512) as made:
        assert made.n_ctx == 512
    with tiny.context() as made:
        assert made.n_ctx == 512


@pytest.mark.parametrize("tokens", [[5, 5], [7, 6]])
def test_positions_follow_each_other(context: pw.Context, tokens: list[int]) -> None:
    batch = pw.Batch(4)
    batch.add_tokens(tokens, [3, 2])
    with pytest.raises(pw.RequestError, match="positions of a sequence decrease"):
        context.decode(batch)
    batch.clear()
    batch.add_tokens(tokens, [0, 2])
    with pytest.raises(pw.RequestError, match="decode: the positions of sequence 0 are not continuous"):
        context.decode(batch)
    context.decode(batch_of([5, 6]))
    for pos in (1, 3):
        with pytest.raises(pw.RequestError, match=f"sequence 0 goes on at position {pos} and has 1 as its last one"):
            context.decode(batch_of(tokens, pos=pos))
    context.decode(batch_of(tokens, pos=2))


def test_a_token_of_several_sequences_wants_a_unified_cache(tiny: pw.Model, context: pw.Context) -> None:
    batch = pw.Batch(4, n_seq_max=2)
    batch.add(5, 0, [0, 1], logits=True)
    context.decode(batch)
    assert [context.memory.seq_pos_max(seq) for seq in (0, 1)] == [0, 0]
    with tiny.context(n_ctx=512, n_seq_max=2) as separate:
        with pytest.raises(pw.RequestError, match="set kv_unified=True"):
            separate.decode(batch)
        separate.decode(batch_of([5], seq_id=1))


def test_threads_can_be_set_at_run_time(tiny_path: Path) -> None:
    with pw.Model(tiny_path, n_threads=2) as model, model.context(n_ctx=256, n_threads=1) as context:
        assert (context.n_threads, context.n_threads_batch) == (1, 2)
        found = []
        for n in (1, 2):
            context.set_n_threads(n)
            assert (context.n_threads, context.n_threads_batch) == (n, n)
            context.memory.clear()
            context.decode(batch_of([5, 6, 7]))
            found.append(context.logits().copy())
        assert np.array_equal(found[0], found[1])
        context.set_n_threads(1, 2)
        assert (context.n_threads, context.n_threads_batch) == (1, 2)
        for wrong in (0, 3, -1, 1.5, True):
            with pytest.raises(pw.RequestError, match="set the threads"):
                context.set_n_threads(wrong)  # type: ignore[arg-type]


def test_counters_count_and_begin_anew(context: pw.Context, tiny: pw.Model) -> None:
    context.decode(batch_of([5] * 20))
    context.logits()
    context.decode(batch_of([5], pos=20))
    context.logits()
    perf = context.perf()
    assert (perf.n_p_eval, perf.n_eval) == (20, 1)
    assert perf.t_p_eval_ms > 0
    assert perf.t_eval_ms > 0
    context.perf_reset()
    again = context.perf()
    assert (again.n_p_eval, again.t_p_eval_ms, again.t_eval_ms) == (1, 0.0, 0.0)
    assert again.t_start_ms >= perf.t_start_ms
    with tiny.context(n_ctx=256, no_perf=True) as silent:
        silent.decode(batch_of([5] * 20))
        silent.logits()
        assert silent.perf().t_p_eval_ms == 0.0


def test_warming_up_leaves_no_trace(context: pw.Context) -> None:
    context.warmup()
    assert context.memory.seq_pos_max() == -1
    with pytest.raises(pw.RequestError, match="get logits"):
        context.logits()
    context.decode(batch_of([5, 6]))
    expected = context.logits().copy()
    with pytest.raises(pw.RequestError, match="the context is not empty"):
        context.warmup()
    context.memory.clear()
    context.decode(batch_of([5, 6]))
    assert np.array_equal(context.logits(), expected)
    context.synchronize()


def test_a_closed_context_says_so(tiny: pw.Model) -> None:
    context = tiny.context(n_ctx=256)
    context.decode(batch_of([5]))
    context.close()
    for call in (
        context.logits,
        context.all_logits,
        context.perf,
        context.warmup,
        lambda: context.causal_attn,
        lambda: context.n_threads,
        lambda: context.set_embeddings(True),
        lambda: context.set_loras([]),
        lambda: context.decode(batch_of([5])),
    ):
        with pytest.raises(pw.ClosedError):
            call()


def test_interrupt_before_a_context_is_closed_leaves_it_open(tiny: pw.Model) -> None:
    context = tiny.context(n_ctx=256)
    real = tiny.engine.run_unbounded

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    tiny.engine.run_unbounded = interrupted  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt):
        context.close()
    tiny.engine.run_unbounded = real  # type: ignore[method-assign]
    assert not context.is_closed
    context.close()
    assert context.is_closed
    context.close()
