"""Several choices of one prompt as streams: more than run at a time, in turn, and ended in the midst of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import pyllama_wasm as pw
from pyllama_wasm._run_many import begin_streams, interleaved
from pyllama_wasm.generate import Generation

PROMPT = "a prompt that is worth to be computed only once"
ASKED: list[Any] = [{"role": "user", "content": PROMPT}]
OPTIONS: dict[str, Any] = {"max_tokens": 12, "seed": 3, "temperature": 1.0, "logit_bias": {2: float("-inf")}}


@pytest.fixture
def llm(tiny_path: Path) -> Iterator[pw.Llama]:
    with pw.Llama(tiny_path, n_ctx=256, n_threads=1) as llm:
        yield llm


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """End what would wait for ever."""
    with pw.deadline(60):
        yield


def texts_of(chunks: Iterator[Any], n: int) -> list[str]:
    texts = [""] * n
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
    return texts


def whole(llm: pw.Llama, n: int) -> list[str]:
    return [choice["text"] for choice in llm(PROMPT, n=n, **OPTIONS)["choices"]]


def is_idle(llm: pw.Llama) -> bool:
    scheduler = llm._model._scheduler
    with scheduler._lock:
        scheduler._collect()
    return not llm._model._calls and not scheduler._queue and not scheduler._runs()


def only_one_slot(model: pw.Model) -> None:
    """Leave memory for one lane of one slot."""
    scheduler = model._scheduler
    open_lane = scheduler._open_lane

    def limited(n_slots: int, n_ctx: int, key: Any) -> Any:
        if n_slots > 1 or scheduler.n_lanes:
            raise pw.OutOfMemoryError("create a context", "no room")
        return open_lane(n_slots, n_ctx, key)

    scheduler._open_lane = limited


def test_more_choices_than_run_at_a_time(llm: pw.Llama) -> None:
    texts = texts_of(llm(PROMPT, n=20, stream=True, **OPTIONS), 20)
    assert texts == whole(llm, 20) and len(set(texts)) == 20
    chat = {**OPTIONS, "n": 20}
    expected = [choice["message"]["content"] for choice in llm.create_chat_completion(ASKED, **chat)["choices"]]
    assert texts_of(llm.create_chat_completion(ASKED, stream=True, **chat), 20) == expected
    assert is_idle(llm)


def test_the_reader_of_some_choices_can_ask_for_others(llm: pw.Llama) -> None:
    chunks = llm(PROMPT, n=20, stream=True, **OPTIONS)
    begun = next(chunks)
    assert texts_of(llm(PROMPT, n=3, stream=True, **OPTIONS), 3) == whole(llm, 3)
    index = begun["choices"][0]["index"]
    texts = texts_of(chunks, 20)
    texts[index] = begun["choices"][0]["text"] + texts[index]
    assert texts == whole(llm, 20)


def test_memory_for_one_at_a_time(llm: pw.Llama) -> None:
    expected = whole(llm, 2)
    llm._model._scheduler.close_idle()
    only_one_slot(llm._model)
    assert texts_of(llm(PROMPT, n=2, stream=True, **OPTIONS), 2) == expected
    streams = [llm._model.stream(PROMPT, max_tokens=12, seed=seed) for seed in (1, 2)]
    begin_streams(streams)
    found = [(piece for piece in stream) for stream in streams]
    assert sum(map(len, interleaved(streams, found))) == sum(len(stream.text) for stream in streams)
    assert [stream.text for stream in streams] == [
        llm._model.generate(PROMPT, max_tokens=12, seed=seed).text for seed in (1, 2)
    ]


def test_a_deterministic_model_computes_one_after_the_other(tiny_path: Path) -> None:
    with pw.Llama(tiny_path, n_ctx=256, n_threads=1, deterministic=True) as llm:
        assert texts_of(llm(PROMPT, n=3, stream=True, **OPTIONS), 3) == whole(llm, 3)


def test_several_readers_share_the_slots(llm: pw.Llama) -> None:
    expected = whole(llm, 12)

    def read(_: int) -> list[str]:
        with pw.deadline(60):
            return texts_of(llm(PROMPT, n=12, stream=True, **OPTIONS), 12)

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(read, range(3))) == [expected] * 3


def test_choices_of_another_process(tiny_path: Path, llm: pw.Llama) -> None:
    with pw.Llama(tiny_path, n_ctx=256, n_threads=1, isolation="process", limits=pw.Limits(threads=2)) as other:
        options = {**OPTIONS, "max_tokens": 40}  # more than who is not read may be ahead
        expected = [choice["text"] for choice in llm(PROMPT, n=18, **options)["choices"]]
        assert texts_of(other(PROMPT, n=18, stream=True, **options), 18) == expected


def test_ending_early_ends_all(llm: pw.Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Callable[..., Any]] = [
        partial(llm.create_completion, PROMPT),
        partial(llm.create_chat_completion, ASKED),
    ]
    for call in calls:
        chunks = call(n=12, stream=True, **OPTIONS)
        for _ in range(5):
            next(chunks)
        assert not is_idle(llm)
        chunks.close()
        assert is_idle(llm)

        def failing(generation: Generation[Any], register: Callable[..., None] = Generation.register) -> None:
            register(generation)
            if len(llm._model._calls) == 3:
                raise ZeroDivisionError

        with monkeypatch.context() as patched:
            patched.setattr(Generation, "register", failing)
            with pytest.raises(ZeroDivisionError) as caught:
                next(call(n=5, stream=True, **OPTIONS))
            assert is_idle(llm), caught


def test_prompts_that_differ_are_each_computed(tiny: pw.Model) -> None:
    options: dict[str, Any] = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}
    prompts = ["one prompt" * 3, "two prompts" * 3, "one prompt" * 3]
    streams = [tiny.stream(prompt, **options) for prompt in prompts]
    begin_streams(streams)
    twins = [stream._generation.twins for stream in streams]
    assert twins[0] is twins[2] is not twins[1]
    assert ["".join(stream) for stream in streams] == [tiny.generate(prompt, **options).text for prompt in prompts]


def test_the_cached_tokens_are_those_of_no_choice(llm: pw.Llama) -> None:
    first = llm(PROMPT, n=3, **OPTIONS)
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == first["timings"]["cache_n"] == 0
    assert llm(PROMPT, n=3, **OPTIONS)["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_a_call_from_a_callback_is_refused(llm: pw.Llama) -> None:
    found: list[BaseException] = []

    def ask(tokens: Any, logits: Any) -> None:
        try:
            next(llm(PROMPT, n=2, stream=True, **OPTIONS))
        except pw.RequestError as error:
            found.append(error)

    llm._model.generate("a", max_tokens=1, logits_processors=[ask])
    assert "callback" in str(found[0]) and threading.active_count() < 50
