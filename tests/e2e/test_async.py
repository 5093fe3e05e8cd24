"""Calls that are awaited: computed together, without a thread for each, and ended when nobody wants them any more."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyllama_wasm as pw
from pyllama_wasm.scheduler import MAX_AHEAD, MAX_SLOTS

from ..waiting import n_running, seconds_to_cancel, until

LONG = {"max_tokens": None, "ignore_eos": True, "temperature": 0.0}

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}answer:"


def test_fifty_awaiting_calls_are_answered_as_alone_in_shared_steps_without_a_thread_each(tiny: pw.Model) -> None:
    prompts = [f"prompt {i}" for i in range(50)]
    options: dict[str, Any] = {"max_tokens": 20, "ignore_eos": True, "temperature": 0}
    alone = [tiny.generate(prompt, **options).tokens for prompt in prompts]
    most_threads = most_slots = 0

    async def watch() -> None:
        nonlocal most_threads, most_slots
        while True:
            most_threads = max(most_threads, threading.active_count())
            most_slots = max(most_slots, n_running(tiny))
            await asyncio.sleep(0.001)

    async def go() -> list[pw.Completion]:
        watching = asyncio.create_task(watch())
        model = pw.AsyncModel(tiny)
        try:
            return await asyncio.gather(*(model.generate(prompt, **options) for prompt in prompts))
        finally:
            watching.cancel()

    before = threading.active_count()
    assert [answer.tokens for answer in asyncio.run(go())] == alone
    assert 2 < most_slots <= MAX_SLOTS
    assert most_threads <= before + MAX_SLOTS  # those that tokenize, whatever the number of calls
    until(lambda: n_running(tiny) == 0)


def test_a_stream_gives_the_pieces_of_the_text_and_its_completion(tiny: pw.Model) -> None:
    async def go() -> tuple[list[str], pw.Completion | None]:
        async with pw.AsyncModel(tiny).stream("abc", max_tokens=30, seed=5) as stream:
            return [piece async for piece in stream], stream.completion

    pieces, completion = asyncio.run(go())
    assert completion is not None and len(pieces) > 1
    assert "".join(pieces) == completion.text == tiny.generate("abc", max_tokens=30, seed=5).text


def test_a_conversation_whole_and_in_pieces(write_tiny: Callable[..., Path], tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    path = write_tiny(tmp_path / "chat.gguf", chat_template=TEMPLATE)

    async def go() -> tuple[pw.ChatCompletion, str, pw.ChatCompletion | None, str]:
        async with pw.AsyncModel(path, n_threads=1) as model:
            whole = await model.chat(messages, max_tokens=8, seed=3)
            stream = await model.chat(messages, stream=True, max_tokens=8, seed=3)
            text = "".join([piece async for piece in stream])
            again = await model.chat(messages, stream=True, max_tokens=8, seed=3)
            deltas = [delta async for delta in again.deltas()]
            assert deltas[0] == {"role": "assistant"}
            assert "".join(delta.get("content", "") for delta in deltas) == text
            return whole, text, stream.completion, await model.apply_chat_template(messages)

    whole, text, completion, prompt = asyncio.run(go())
    assert isinstance(whole, pw.ChatCompletion) and isinstance(completion, pw.ChatCompletion)
    assert whole.text == text == completion.text
    assert prompt == "user: hi\nanswer:"


def test_a_cancelled_task_computes_no_further_token_and_frees_its_slot_while_others_go_on(tiny: pw.Model) -> None:
    other_alone = tiny.generate("other", max_tokens=300, ignore_eos=True, temperature=0).tokens
    n_taken: dict[str, int] = {}

    async def go() -> pw.Completion:
        model = pw.AsyncModel(tiny)
        other = asyncio.create_task(model.generate("other", max_tokens=300, ignore_eos=True, temperature=0))

        def slow(tokens: Any, logits: Any) -> None:
            n_taken["mine"] = n_taken.get("mine", 0) + 1

        mine = asyncio.create_task(model.generate("mine", max_tokens=400, ignore_eos=True, logits_processors=[slow]))
        while n_taken.get("mine", 0) < 5:
            await asyncio.sleep(0)
        mine.cancel()
        with pytest.raises(asyncio.CancelledError):
            await mine
        n_taken["then"] = n_taken["mine"]
        return await other

    assert asyncio.run(go()).tokens == other_alone
    assert n_taken["mine"] <= n_taken["then"] + 1 < 400  # the step that was under way
    until(lambda: n_running(tiny) == 0)
    assert not tiny._calls


def test_a_cancelled_prefill_ends_at_once_and_the_model_goes_on(model: pw.Model) -> None:
    tokens = [i % 40_000 + 100 for i in range(6000)]

    async def go() -> float:
        return await seconds_to_cancel(model, pw.AsyncModel(model).generate(tokens, max_tokens=1), 1)

    assert asyncio.run(go()) < 1.5  # one step of the prompt takes longer
    assert n_running(model) == 0
    assert model.generate("The capital of France is", max_tokens=1, temperature=0).text == " Paris"


def test_a_stream_that_nobody_reads_stays_a_few_tokens_ahead_and_holds_up_nobody(tiny: pw.Model) -> None:
    async def go() -> tuple[int, str]:
        model = pw.AsyncModel(tiny)
        stream = model.stream("abc", max_tokens=400, ignore_eos=True, temperature=0)
        await anext_of(stream)
        assert len((await model.generate("other", max_tokens=50, ignore_eos=True)).tokens) == 50
        await asyncio.to_thread(until, lambda: tiny._scheduler._leader is None)
        n_ahead = len(stream._stream._generation._tokens)  # type: ignore[union-attr]
        async for _ in stream:
            pass
        return n_ahead, stream.text

    n_ahead, text = asyncio.run(go())
    assert 1 <= n_ahead <= 4 * MAX_AHEAD  # a byte of a character is a token without text
    assert text == tiny.generate("abc", max_tokens=400, ignore_eos=True, temperature=0).text


async def anext_of(stream: pw.AsyncTextStream[Any]) -> str:
    return await stream.__anext__()


def test_a_loop_that_ends_in_the_midst_leaves_the_model_usable(tiny: pw.Model) -> None:
    loop = asyncio.new_event_loop()
    model = pw.AsyncModel(tiny)
    stream = model.stream("abc", **LONG)
    loop.run_until_complete(anext_of(stream))
    call = loop.create_task(model.generate("other", **LONG))
    call._log_destroy_pending = False  # type: ignore[attr-defined]  # the loop is left as it must not be
    loop.run_until_complete(asyncio.sleep(0.02))
    loop.close()
    del stream, call
    gc.collect()
    until(lambda: n_running(tiny) == 0 or not tiny._calls)
    assert len(tiny.generate("abc", max_tokens=3, ignore_eos=True).tokens) == 3
    until(lambda: n_running(tiny) == 0)


def test_deadlines_of_a_call_and_of_a_task_hold(tiny: pw.Model) -> None:
    async def go() -> None:
        model = pw.AsyncModel(tiny)

        def slow(tokens: Any, logits: Any) -> None:
            time.sleep(0.01)

        with pytest.raises(pw.DeadlineError):
            await model.generate("abc", deadline_s=0.2, logits_processors=[slow], **LONG)
        with pw.deadline(0.2), pytest.raises(pw.DeadlineError):
            await model.generate("abc", logits_processors=[slow], **LONG)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(model.generate("abc", logits_processors=[slow], **LONG), 0.2)
        assert (await model.generate("abc", max_tokens=2, ignore_eos=True)).usage.completion_tokens == 2

    asyncio.run(go())


def test_cancel_and_close_end_all_who_await(tiny_path: Path) -> None:
    def slow(tokens: Any, logits: Any) -> None:
        time.sleep(0.005)

    async def ended_by(end: Callable[[pw.AsyncModel], object]) -> list[type]:
        async with pw.AsyncModel(tiny_path, n_threads=1) as model:
            calls = [model.generate(f"abc {i}", logits_processors=[slow], **LONG) for i in range(20)]
            tasks = [asyncio.create_task(call) for call in calls]
            await asyncio.to_thread(until, lambda: len(model.model._calls) == 20)
            await asyncio.to_thread(end, model)
            return [type(error) for error in await asyncio.gather(*tasks, return_exceptions=True)]

    assert set(asyncio.run(ended_by(lambda model: model.cancel()))) == {pw.CancelledError}
    assert set(asyncio.run(ended_by(lambda model: model.model.close()))) == {pw.ClosedError}


def test_what_is_wrong_with_a_call_is_raised_to_who_awaits_it(tiny: pw.Model) -> None:
    async def go() -> None:
        model = pw.AsyncModel(tiny)
        with pytest.raises(pw.RequestError, match="max_tokens"):
            await model.generate("abc", max_tokens=-1)
        with pytest.raises(pw.ContextFullError):
            await model.generate("a" * 4000)
        with pytest.raises(ValueError, match="mine"):
            await model.generate("abc", logits_processors=[fail])
        assert (await model.generate("abc", max_tokens=0)).finish_reason == "length"

    def fail(tokens: Any, logits: Any) -> None:
        raise ValueError("mine")

    asyncio.run(go())


# -- loading ------------------------------------------------------------------------------------------------------


def test_tasks_share_one_load_and_the_model_is_closed_with_the_block(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[pw.Model] = []
    prepare = pw.Model._prepare

    def counted(self: pw.Model) -> None:
        loads.append(self)
        prepare(self)

    monkeypatch.setattr(pw.Model, "_prepare", counted)

    async def go() -> None:
        lazy = pw.AsyncModel(tiny_path, n_threads=1)
        with pytest.raises(pw.ClosedError, match="not loaded"):
            lazy.model  # noqa: B018
        await asyncio.gather(*(lazy.generate("a", max_tokens=1) for _ in range(5)))
        assert len(loads) == 1 and not lazy.model.is_closed
        await lazy.close()
        await lazy.close()
        assert loads[0].is_closed
        with pytest.raises(pw.ClosedError):
            await lazy.generate("a")
        with pytest.raises(pw.RequestError, match="n_threads"):
            pw.AsyncModel(loads[0], n_threads=1)

    asyncio.run(go())


def test_a_load_that_fails_is_told_and_one_that_is_cancelled_ends(tiny_path: Path, tmp_path: Path) -> None:
    begun, gate = threading.Event(), threading.Event()

    def progress(fraction: float) -> None:
        begun.set()
        gate.wait(10)

    async def go() -> None:
        with pytest.raises(pw.ModelFileError):
            await pw.AsyncModel(tmp_path / "none.gguf").load()
        model = pw.AsyncModel(tiny_path, n_threads=1, progress=progress)
        loading = asyncio.create_task(model.load())
        await asyncio.to_thread(begun.wait, 10)
        future = model._load.future  # type: ignore[union-attr]
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loading
        gate.set()
        with pytest.raises(pw.CancelledError):
            await asyncio.wrap_future(future)
        assert (await model.generate("a", max_tokens=1)).usage.completion_tokens == 1  # loaded anew
        await model.close()

    asyncio.run(go())


def test_a_model_in_a_process_of_its_own_answers_alike(tiny: pw.Model, tiny_path: Path) -> None:
    async def go() -> tuple[list[pw.Completion], str, Any]:
        async with pw.AsyncModel(tiny_path, n_threads=1, isolation="process") as model:
            calls = (model.generate(f"prompt {i}", max_tokens=12, temperature=0, ignore_eos=True) for i in range(6))
            answers = await asyncio.gather(*calls)
            cancelled = asyncio.create_task(model.generate("abc", **LONG))
            await asyncio.sleep(0.02)
            cancelled.cancel()
            text = "".join([piece async for piece in model.stream("abc", max_tokens=20, seed=1)])
            return answers, text, await model.embed(["a", "b"])

    answers, text, vectors = asyncio.run(go())
    for i, answer in enumerate(answers):
        again = tiny.generate(f"prompt {i}", max_tokens=12, temperature=0, ignore_eos=True)
        assert answer.tokens == again.tokens
    assert text == tiny.generate("abc", max_tokens=20, seed=1).text
    np.testing.assert_allclose(vectors, tiny.embed(["a", "b"]), atol=1e-5)


# -- embeddings ---------------------------------------------------------------------------------------------------


def test_texts_of_many_tasks_are_embedded_together(tiny: pw.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    embed = tiny.embed_with_usage

    def counted(texts: Any, **options: Any) -> pw.Embeddings:
        calls.append(len(texts))
        time.sleep(0.02)
        return embed(texts, **options)

    monkeypatch.setattr(tiny, "embed_with_usage", counted)
    texts = [f"text {i}" for i in range(50)]

    async def go() -> list[Any]:
        model = pw.AsyncModel(tiny)
        tasks = [asyncio.create_task(model.embed(text)) for text in texts]
        dropped = asyncio.create_task(model.embed(["dropped"] * 1000))
        await asyncio.sleep(0.01)
        dropped.cancel()
        return await asyncio.gather(*tasks)

    vectors = asyncio.run(go())
    np.testing.assert_allclose(np.stack(vectors), embed(texts).vectors, atol=1e-5)
    until(lambda: calls[-1] <= 64)
    assert len(calls) < 6 and sum(calls) < 200


def test_a_text_that_is_too_long_fails_its_own_call_alone(tiny: pw.Model) -> None:
    async def go() -> list[Any]:
        model = pw.AsyncModel(tiny)
        calls = [model.embed("a"), model.embed("b" * 4000), model.embed(["c", "d"]), model.embed("e", pooling="none")]
        return await asyncio.gather(*calls, return_exceptions=True)

    single, error, double, tokens = asyncio.run(go())
    assert single.shape == (64,) and double.shape == (2, 64) and tokens.ndim == 2
    assert isinstance(error, pw.ContextFullError)
