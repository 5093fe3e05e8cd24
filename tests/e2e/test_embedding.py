"""``Model.embed``: shapes, order, pooling, truncation, limits, and models that cannot."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import pyllama_wasm as pw

from ..tiny_models import write_bert, write_gpt2, write_mamba, write_t5

TEXTS = ["A cat sits on the mat.", "Stock markets fell sharply.", "A kitten lies on a rug."]


@pytest.fixture(scope="module")
def minilm(minilm_path: Path) -> Iterator[pw.Model]:
    with pw.Model(minilm_path) as model:
        yield model


def test_one_text_gives_one_vector_and_several_give_rows(minilm: pw.Model) -> None:
    one, rows = minilm.embed(TEXTS[0]), minilm.embed(TEXTS)
    assert one.shape == (384,) and one.dtype == np.float32
    assert rows.shape == (3, 384)
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    assert rows[0] @ rows[2] > 0.5 > rows[0] @ rows[1]
    assert minilm.embed([]).shape == (0, 384)


def test_tokens_are_taken_as_text_is(minilm: pw.Model) -> None:
    tokens = minilm.vocab.tokenize(TEXTS[0])
    one = minilm.embed(TEXTS[0])
    assert np.allclose(minilm.embed(tokens), one, atol=1e-6)
    mixed: list[str | list[int]] = [tokens, TEXTS[1]]
    assert np.allclose(minilm.embed(mixed)[0], one, atol=1e-4)
    assert minilm.embed(np.array(tokens)).shape == (384,)


def test_order_is_kept_whatever_the_lengths(minilm: pw.Model) -> None:
    texts = [("word " * n).strip() for n in (3, 100, 1, 90, 150, 2)]
    rows = minilm.embed(texts)
    for text, row in zip(texts[:3:2], rows[:3:2], strict=True):
        assert row @ minilm.embed(text) > 0.999


def test_pooling_is_what_it_says(minilm: pw.Model) -> None:
    tokens = minilm.embed(TEXTS[0], pooling="none", normalize=False)
    assert isinstance(tokens, np.ndarray) and tokens.shape == (len(minilm.vocab.tokenize(TEXTS[0])), 384)
    for pooling, expected in (("mean", tokens.mean(axis=0)), ("cls", tokens[0]), ("last", tokens[-1])):
        pooled = minilm.embed(TEXTS[0], pooling=pooling, normalize=False)  # type: ignore[call-overload]
        assert np.allclose(pooled, expected, atol=1e-4), pooling
    assert np.allclose(minilm.embed(TEXTS[0], normalize=False), tokens.mean(axis=0), atol=1e-4)
    several = minilm.embed(TEXTS, pooling="none")
    assert [len(rows) for rows in several] == [len(minilm.vocab.tokenize(text)) for text in TEXTS]


def test_usage_is_counted_per_text(minilm: pw.Model) -> None:
    result = minilm.embed_with_usage(TEXTS)
    assert result.n_tokens == tuple(len(minilm.vocab.tokenize(text)) for text in TEXTS)
    assert result.usage.prompt_tokens == result.usage.total_tokens == sum(result.n_tokens)
    assert np.array_equal(result.vectors, minilm.embed(TEXTS))
    with pytest.raises(pw.RequestError, match="gives no vector"):
        minilm.embed_with_usage(TEXTS, pooling="none")  # type: ignore[arg-type]


def test_a_text_too_long_is_refused_or_cut_on_request(minilm: pw.Model) -> None:
    text = "word " * 600
    with pytest.raises(pw.ContextFullError, match=r"text 1 has 602 tokens and the model takes 512 .*truncate=True"):
        minilm.embed(["short", text])


def test_truncation_keeps_the_closing_token(minilm_path: Path) -> None:
    with pw.Model(minilm_path, context_params=pw.ContextParams(n_ctx=16)) as model:
        text = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
        result = model.embed_with_usage([text], truncate=True)
        assert result.n_tokens == (16,)
        cut = [*model.vocab.tokenize(text)[:15], model.vocab.sep or 0]
        assert np.allclose(result.vectors[0], model.embed(cut), atol=1e-6)


@pytest.mark.parametrize("inputs", [["a", 5], [[1, 2], [3.5]], [[-1]], [[10**6]], [None], 7, [[]]])
def test_inputs_that_are_none_are_refused(minilm: pw.Model, inputs: object) -> None:
    with pytest.raises((pw.RequestError, TypeError)):
        minilm.embed(inputs)  # type: ignore[call-overload]
    assert minilm.embed("still there").shape == (384,)


def test_unknown_pooling_is_refused(minilm: pw.Model) -> None:
    with pytest.raises(pw.RequestError, match="'rank' is not one of mean"):
        minilm.embed("a", pooling="rank")  # type: ignore[call-overload]


def test_language_models_embed_too(model: pw.Model) -> None:
    rows = model.embed(TEXTS)
    assert rows.shape == (3, model.n_embd)
    tokens = model.embed(TEXTS[0], pooling="none", normalize=False)
    assert np.allclose(model.embed(TEXTS[0], normalize=False), np.asarray(tokens).mean(axis=0), atol=1e-3)
    last = model.embed([TEXTS[0], TEXTS[1]], pooling="last", normalize=False)
    assert np.linalg.norm(last[0] - tokens[-1]) < 0.05 * np.linalg.norm(tokens[-1])


@pytest.mark.parametrize("write", [write_bert, write_gpt2, write_mamba, write_t5], ids=lambda write: write.__name__)
def test_every_kind_of_model_embeds(write: Callable[[Path], Path], tmp_path: Path) -> None:
    texts = ["ab", "abcde", "a"]
    with pw.Model(write(tmp_path / "tiny.gguf"), n_threads=1) as model:
        rows = model.embed(texts, normalize=False, pooling="mean")
        tokens = model.embed(texts, normalize=False, pooling="none")
        assert rows.shape == (3, model.n_embd_out)
        for i, text in enumerate(texts):
            assert np.allclose(rows[i], tokens[i].mean(axis=0), atol=1e-3)
            assert np.allclose(rows[i], model.embed(text, normalize=False, pooling="mean"), atol=1e-3)
        assert np.allclose(model.embed("abcde", normalize=False, pooling="last"), tokens[1][-1], atol=1e-3)
        with pytest.raises(pw.ContextFullError):
            model.embed("ab " * 3000)


def test_a_model_that_only_embeds_does_not_generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp calls BERT a decoder, and asserts when it is to compute several tokens for one output."""
    chat = [{"role": "user", "content": "ab"}]
    with pw.Model(write_bert(tmp_path / "bert.gguf"), n_threads=1) as model:
        before = model.embed("ab")
        for call in (
            lambda: model.generate("abc", max_tokens=3),
            lambda: model.generate([5, 6, 7], max_tokens=0),
            lambda: model.generate_many(["abc", "a"], max_tokens=3),
            lambda: next(model.stream("abc", max_tokens=3)),
            lambda: model.chat(chat, max_tokens=3),
            lambda: next(model.chat(chat, stream=True, max_tokens=3)),
        ):
            with pytest.raises(pw.UnsupportedModelError, match=r"generate: .* token by token .*use embed"):
                call()
        # The same for an architecture that is not known for it, but has no memory.
        monkeypatch.setattr(model, "_computes_logits", True)
        with pytest.raises(pw.UnsupportedModelError, match="generate: the model keeps nothing"):
            model.generate_many(["abc", "abcd"], max_tokens=3)
        assert np.array_equal(model.embed("ab"), before)


def test_few_outputs_are_a_limit_and_not_the_end(tmp_path: Path) -> None:
    """The guest asserts on more outputs than its buffer was made for."""
    batch = pw.Batch(8)
    for pos in range(3):
        batch.add(5 + pos, pos, [0], True)
    with pw.Model(write_bert(tmp_path / "bert.gguf"), n_threads=1) as model:
        one = pw.ContextParams(n_ctx=64, n_outputs_max=1)
        two = pw.ContextParams(n_ctx=64, n_outputs_max=2, n_outputs_max_per_seq=1, n_seq_max=2)
        for params in (one, two):
            with model.context(params) as context:
                for compute in (context.decode, context.encode):
                    with pytest.raises(pw.RequestError, match="outputs of 3 tokens exceed n_outputs_max"):
                        compute(batch)
        with model.context(n_ctx=64, n_outputs_max_per_seq=1) as context:
            context.decode(batch)
            with pytest.raises(pw.RequestError, match="no logits"):
                context.logits()


def test_generating_goes_on_beside_it(tiny: pw.Model) -> None:
    before = tiny.generate("ab", max_tokens=4, temperature=0).tokens
    tiny.embed(["ab", "abc"])
    assert tiny.generate("ab", max_tokens=4, temperature=0).tokens == before


def test_threads_share_a_model(tiny: pw.Model) -> None:
    expected = tiny.embed(["ab", "abc", "b"])
    results: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: results.append(tiny.embed(["ab", "abc", "b"]))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6 and all(np.allclose(result, expected, atol=1e-5) for result in results)


def test_cancel_ends_a_call_and_the_model_goes_on(minilm: pw.Model) -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            minilm.embed(["word " * 400] * 40)
        except pw.CancelledError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(0.5)
    assert thread.is_alive()
    minilm.cancel()
    thread.join(30)
    assert len(errors) == 1
    assert minilm.embed("again").shape == (384,)


def test_use_after_close_and_without_weights_says_so(tiny_path: Path) -> None:
    model = pw.Model(tiny_path, n_threads=1)
    model.embed("ab")
    model.close()
    with pytest.raises(pw.ClosedError):
        model.embed("ab")
    with (
        pw.Model(tiny_path, params=pw.ModelParams(vocab_only=True)) as bare,
        pytest.raises(pw.RequestError, match="vocab_only"),
    ):
        bare.embed("ab")


def test_kept_contexts_make_room_for_others_and_others_for_them(smollm2_path: Path) -> None:
    """In a sandbox that holds either, generating and embedding take turns."""
    with pw.Model(smollm2_path, memory_limit_bytes=420 << 20, n_threads=2) as small:
        vector = small.embed("hello")
        with pytest.raises(pw.OutOfMemoryError, match="create a context"):
            small.embed("hello " * 1500)
        small.embed("hello", pooling="none")
        assert list(small._embedder._contexts) == ["none"]
        assert len(small.generate_many(["a b c"] * 8, max_tokens=2, temperature=0)) == 8
        assert not small._embedder._contexts and small._scheduler.n_slots == 8
        assert np.array_equal(small.embed("hello"), vector)
        with small.context(n_ctx=4096, n_batch=256):
            assert not small._embedder._contexts


def test_release_waits_for_a_batch_but_not_on_the_engines_thread(minilm: pw.Model) -> None:
    embedder, released = minilm._embedder, threading.Event()
    minilm.embed(TEXTS[0])
    with embedder._lock:

        def release() -> None:
            embedder.release()
            released.set()

        thread = threading.Thread(target=release)
        thread.start()
        assert not minilm._run(embedder.release, "release")  # the engine's thread
        assert not released.wait(0.1) and embedder._contexts
    thread.join(10)
    assert released.is_set() and not embedder._contexts
    assert not embedder.release()
