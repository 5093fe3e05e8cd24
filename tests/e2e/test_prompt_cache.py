"""Prompts that were computed are not computed again, by other calls, other models of the file and other processes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyllama_wasm as pw
from pyllama_wasm import prompt_cache

from ..tiny_models import write_cohere2, write_mamba, write_t5

RULES = "You are a librarian who knows many books. " * 6
GREEDY: dict[str, Any] = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def cache(tmp_path: Path) -> pw.PromptCache:
    return pw.PromptCache(tmp_path / "prompts")


def opened(path: Path, cache: pw.PromptCache | None, **options: Any) -> pw.Model:
    model = pw.Model(path, n_threads=1, **options)
    if cache is not None:
        cache.attach(model)
    return model


def test_another_load_of_the_model_goes_on_from_what_was_computed(tiny_path: Path, cache: pw.PromptCache) -> None:
    with opened(tiny_path, cache) as model:
        first = model.generate(RULES + "Faust?", **GREEDY)
        assert first.usage.cached_tokens == 0
    cache.flush()
    assert cache.n_entries == 1 and cache.size_bytes > 1000
    with opened(tiny_path, pw.PromptCache(cache.path)) as model:
        again = model.generate(RULES + "Faust?", **GREEDY)
        assert again.usage.cached_tokens == again.usage.prompt_tokens - 1
        assert again.tokens == first.tokens
    with opened(tiny_path, None) as model, opened(tiny_path, cache) as other:
        alone = model.generate(RULES + "Hamlet, by whom?", **GREEDY)
        shared = other.generate(RULES + "Hamlet, by whom?", **GREEDY)
        assert shared.usage.cached_tokens >= len(RULES) - 10 > alone.usage.cached_tokens == 0
        assert shared.tokens == alone.tokens


@pytest.mark.parametrize("where", ["memory", "files"])
def test_more_prompts_than_a_model_remembers_by_itself(tiny_path: Path, tmp_path: Path, where: str) -> None:
    cache = pw.PromptCache(None if where == "memory" else tmp_path / "prompts")
    prompts = [f"{i} {RULES}" for i in range(5)]
    with opened(tiny_path, None) as model:
        alone = [model.generate(prompt, **GREEDY).tokens for prompt in prompts]
        assert model.generate(prompts[0], **GREEDY).usage.cached_tokens < 10
    with opened(tiny_path, cache) as model:
        assert [model.generate(prompt, **GREEDY).tokens for prompt in prompts] == alone
        cache.flush()
        for prompt, tokens in zip(prompts, alone, strict=True):
            again = model.generate(prompt, **GREEDY)
            assert again.usage.cached_tokens == again.usage.prompt_tokens - 1
            assert again.tokens == tokens
        cache.flush()
        assert cache.n_entries == 5
        cache.clear()
        assert cache.n_entries == 0


def test_a_state_is_good_for_lanes_of_other_sizes(tiny_path: Path, cache: pw.PromptCache) -> None:
    prompts = [f"{i} {RULES}" for i in range(6)]
    with opened(tiny_path, cache) as model:
        with ThreadPoolExecutor(6) as pool:  # lanes of several slots
            together = list(pool.map(lambda prompt: model.generate(prompt, **GREEDY), prompts))
        assert max(len(lane.slots) for lane in model._scheduler._lanes) > 1
        cache.flush()
    with opened(tiny_path, cache) as model:
        for prompt, answer in zip(prompts, together, strict=True):  # one slot
            again = model.generate(prompt, **GREEDY)
            assert again.usage.cached_tokens == again.usage.prompt_tokens - 1
            assert again.tokens == answer.tokens
    with opened(tiny_path, cache) as model:
        answers = model.generate_many(prompts, **GREEDY)
        assert [answer.tokens for answer in answers] == [answer.tokens for answer in together]
        assert all(answer.usage.cached_tokens for answer in answers)


def test_a_conversation_that_grows_takes_the_place_of_its_beginning(tiny_path: Path, cache: pw.PromptCache) -> None:
    with opened(tiny_path, cache) as model:
        prompt = model.vocab.tokenize(RULES[:100], add_special=True)
        further = model.vocab.tokenize(" And then? " * 4)
        for _ in range(3):
            prompt += [*model.generate(prompt, **GREEDY).tokens, *further]
            cache.flush()
    assert cache.n_entries == 1
    with opened(tiny_path, cache) as model:
        assert model.generate(prompt, **GREEDY).usage.cached_tokens > 200


def test_a_short_prompt_and_one_that_does_not_end_by_itself_are_not_kept(tiny: pw.Model, cache: pw.PromptCache) -> None:
    cache.attach(tiny)
    tiny.generate("short", max_tokens=4)
    with tiny.stream(RULES, max_tokens=100, ignore_eos=True) as stream:
        next(stream)
    cache.flush()
    assert cache.n_entries == 0
    cache.detach(tiny)
    tiny.generate(RULES, **GREEDY)
    cache.flush()
    assert cache.n_entries == 0


def test_another_model_or_another_setting_of_the_context_does_not_use_it(
    tiny_path: Path, write_tiny: Callable[..., Path], tmp_path: Path, cache: pw.PromptCache
) -> None:
    with opened(tiny_path, cache) as model:
        model.generate(RULES, **GREEDY)
        cache.flush()
    same_shape = write_tiny(tmp_path / "tiny.gguf", seed=2)  # nothing but the weights differs
    f32 = pw.ContextParams(type_k="f32", type_v="f32")
    for path, options in [(same_shape, {}), (tiny_path, {"context_params": f32})]:
        with opened(path, None, **options) as alone, opened(path, cache, **options) as model:
            answer = model.generate(RULES, **GREEDY)
            assert answer.usage.cached_tokens == 0
            assert answer.tokens == alone.generate(RULES, **GREEDY).tokens


@pytest.mark.parametrize("write", [write_mamba, write_cohere2, write_t5], ids=["recurrent", "window", "encoder"])
def test_a_state_that_cannot_be_cut_is_only_used_whole(write: Callable[[Path], Path], tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf")
    cache = pw.PromptCache(tmp_path / "prompts", min_tokens=8)
    start = [1, *range(40, 78)]
    few: dict[str, Any] = {"max_tokens": 3, "temperature": 0, "ignore_eos": True}
    with opened(path, cache) as model:
        further = [*start, *model.generate(start, **few).tokens, 90, 91]
        cache.flush()
    with opened(path, None) as model:
        expected = [model.generate(further, **few).tokens]
    with opened(path, None) as model:
        expected.append(model.generate([*start, 92, 93], **few).tokens)
    with opened(path, cache) as model:
        longer = model.generate(further, **few)
    with opened(path, cache) as model:
        other = model.generate([*start, 92, 93], **few)
    assert [longer.tokens, other.tokens] == expected
    n_kept = len(start) + 2  # its last token was never computed
    assert [longer.usage.cached_tokens, other.usage.cached_tokens] == ([0, 0] if write is write_t5 else [n_kept, 0])


def test_a_state_that_cannot_be_cut_does_not_keep_its_beginning_from_being_kept(tmp_path: Path) -> None:
    path = write_mamba(tmp_path / "model.gguf")
    cache = pw.PromptCache(tmp_path / "prompts", min_tokens=8)
    few: dict[str, Any] = {"max_tokens": 2, "temperature": 0, "ignore_eos": True}
    start = [1, *range(40, 74)]
    for prompt in ([*start, *range(100, 118)], start):  # the first state cannot be cut back to the second
        with opened(path, cache) as model:
            tokens = model.generate(prompt, **few).tokens
            cache.flush()
    assert cache.n_entries == 2
    with opened(path, cache) as model:
        assert model.generate([*start, *tokens, 90], **few).usage.cached_tokens == len(start) + 1


def test_bytes_of_the_same_content_are_the_same_model(tiny_path: Path, cache: pw.PromptCache) -> None:
    with opened(tiny_path, cache) as model:
        model.generate(RULES, **GREEDY)
        cache.flush()
    with pw.Model(tiny_path.read_bytes(), n_threads=1) as model:
        cache.attach(model)
        assert model.generate(RULES, **GREEDY).usage.cached_tokens > 0


def test_adapters_and_deterministic_models_are_left_out(tiny_path: Path, cache: pw.PromptCache) -> None:
    for _ in range(2):
        with opened(tiny_path, cache, params=pw.ModelParams(deterministic=True)) as model:
            assert model.generate(RULES, **GREEDY).usage.cached_tokens == 0
    cache.flush()
    assert cache.n_entries == 0


def damaged(data: bytes, how: str) -> bytes:
    if how == "one bit":
        return data[:-1] + bytes([data[-1] ^ 1])
    if how == "cut off":
        return data[: len(data) // 2]
    from pyllama_wasm._state_format import pack_container, unpack_container

    header, session = unpack_container(memoryview(data))
    assert header is not None
    n = len(session)
    if how == "zeros":  # with a digest that is right
        return pack_container(header, bytes(session[: n // 2]) + bytes(n - n // 2))
    if how == "counts":
        n_tokens = int(np.frombuffer(session, "<u4", 1, 8)[0])
        at = 12 + 4 * n_tokens
        return pack_container(header, bytes(session[: at + 4]) + b"\xff\xff\xff\x7f" + bytes(session[at + 8 :]))
    return pack_container({**header, "build": "b1"}, bytes(session))


@pytest.mark.parametrize("how", ["one bit", "cut off", "zeros", "counts", "another build"])
def test_a_damaged_state_is_dropped_and_its_prompt_computed(tiny_path: Path, cache: pw.PromptCache, how: str) -> None:
    with opened(tiny_path, cache) as model:
        expected = model.generate(RULES, **GREEDY).tokens
        cache.flush()
    assert cache.path is not None
    (file,) = cache.path.glob("*.state")
    bad = damaged(file.read_bytes(), how)
    file.write_bytes(bad)
    with opened(tiny_path, cache) as model:
        answer = model.generate(RULES, **GREEDY)
        if how != "zeros":  # the numbers of a KV cache may be any
            assert (answer.usage.cached_tokens, answer.tokens) == (0, expected)
        cache.flush()
        assert model.generate("abc", max_tokens=2, ignore_eos=True).usage.completion_tokens == 2
    if how != "zeros":
        assert file.read_bytes() != bad


def test_what_cannot_be_written_is_computed_all_the_same(
    tiny: pw.Model, cache: pw.PromptCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache.attach(tiny)
    assert cache.path is not None

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache._store, "write", full)
    assert tiny.generate(RULES, **GREEDY).usage.completion_tokens == 6
    cache.flush()
    assert "is not kept: " in caplog.text and cache.n_entries == 0


def test_attaching_reads_the_model_once(
    tiny_path: Path, cache: pw.PromptCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[object] = []
    digest = prompt_cache._content_digest

    def counted(file: Any) -> str:
        reads.append(file)
        return digest(file)

    monkeypatch.setattr(prompt_cache, "_content_digest", counted)
    for _ in range(3):
        with opened(tiny_path, pw.PromptCache(cache.path)):
            pass
    assert len(reads) == 1


def test_wrong_arguments_and_models_are_refused(tiny_path: Path, cache: pw.PromptCache) -> None:
    with pytest.raises(pw.RequestError, match="max_bytes is 0"):
        pw.PromptCache(None, max_bytes=0)
    model = opened(tiny_path, None)
    model.close()
    with pytest.raises(pw.ClosedError):
        cache.attach(model)
    with pw.Model(tiny_path, isolation="process", n_threads=1) as other, pytest.raises(pw.RequestError):
        cache.attach(other)


def test_awaited_calls_use_it_too(tiny_path: Path, cache: pw.PromptCache) -> None:
    async def go() -> list[pw.Completion]:
        async with pw.AsyncModel(tiny_path, n_threads=1) as model:
            cache.attach(model.model)
            await model.generate(RULES, **GREEDY)
            cache.flush()
            return await asyncio.gather(*(model.generate(f"{RULES} {i}", **GREEDY) for i in range(8)))

    assert all(answer.usage.cached_tokens > 200 for answer in asyncio.run(go()))


def test_copies_of_a_prompt_that_are_not_made_yet_are_neither_kept_nor_overwritten(tiny_path: Path) -> None:
    """Choices of one token leave copies behind that the next step makes, to and from slots that others have then."""
    cache, shared = pw.PromptCache(), "a prompt of several choices " * 4
    others = [f"{i} {RULES}" for i in range(2)]
    few: dict[str, Any] = {"ignore_eos": True, "temperature": 0, "logprobs": 0}
    with opened(tiny_path, cache) as model:
        for other in others:
            model.generate(other, max_tokens=1, **few)
    cache.flush()
    with opened(tiny_path, None) as model:
        expected = [model.generate(prompt, max_tokens=8, **few) for prompt in (*others, shared + "and on")]
    for n_others in (1, 2):  # over where the copy comes from; and where it goes
        with opened(tiny_path, cache) as model:
            model.generate_n(shared, 2, max_tokens=1, **few)
            found = model.generate_many(others[:n_others], n_parallel=2, max_tokens=8, **few)
            found += model.generate_many([shared + "and on"] * 2, n_parallel=2, max_tokens=8, **few)
        cache.flush()
        told = [*expected[:n_others], expected[2], expected[2]]
        for one, alone in zip(found, told, strict=True):
            assert one.tokens == alone.tokens
            logprobs = [[each.logprob for each in each_of.logprobs or ()] for each_of in (one, alone)]
            assert logprobs[0] == pytest.approx(logprobs[1], abs=0.01)
    with opened(tiny_path, cache) as model:
        again = model.generate(shared + "and on", max_tokens=8, **few)
        assert again.tokens == expected[2].tokens
