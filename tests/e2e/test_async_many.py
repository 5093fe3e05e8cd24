"""Awaited: many prompts, several choices, gaps and tools; and ends at moments when nobody expects them."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pyllama_wasm as pw
from pyllama_wasm import _async_bridge
from pyllama_wasm.scheduler import MAX_SLOTS

from ..waiting import n_running, seconds_to_cancel, until

GREEDY: dict[str, Any] = {"max_tokens": 8, "ignore_eos": True, "temperature": 0}
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}answer:"
FIM = {"fim_pre": 260, "fim_suf": 261, "fim_mid": 262}


def test_many_prompts_and_choices_are_those_of_threads(tiny: pw.Model) -> None:
    prompts = [f"prompt {i}" for i in range(20)]
    told: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        assert threading.current_thread() is threading.main_thread()
        told.append((done, total))

    async def go() -> None:
        model = pw.AsyncModel(tiny)
        found = await model.generate_many(prompts, n_parallel=4, progress=progress, **GREEDY)
        assert [one.tokens for one in found] == [one.tokens for one in tiny.generate_many(prompts, **GREEDY)]
        assert told[-1] == (20, 20)
        seeded: dict[str, Any] = {"max_tokens": 8, "seed": 3, "ignore_eos": True}
        choices = await model.generate_n("abc" * 20, 3, **seeded)
        assert [one.tokens for one in choices] == [one.tokens for one in tiny.generate_n("abc" * 20, 3, **seeded)]
        assert (await model.generate_many(["a"], max_tokens=0, echo=True, logprobs=0))[0].prompt_logprobs
        assert await model.generate_many([]) == []
        refused: list[dict[str, Any]] = [{"n_parallel": 0}, {"tempreature": 1}, {"deadline_s": -1}]
        for wrong in refused:
            with pytest.raises(pw.RequestError):
                await model.generate_many(["a"], **wrong)
        with pytest.raises(pw.DeadlineError):
            await model.generate_many(["a", "b"], deadline_s=0.05, max_tokens=None, ignore_eos=True)

    asyncio.run(go())
    assert not tiny._calls
    until(lambda: n_running(tiny) == 0)


def test_answers_gaps_and_tools(write_tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "chat.gguf", chat_template=TEMPLATE, n_ctx=8192)
    overrides = {f"tokenizer.ggml.{name}_token_id": token for name, token in FIM.items()}
    asked = [{"role": "user", "content": "hi"}]
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    heard: list[int] = []

    async def listen(n: int) -> str:
        await asyncio.sleep(0)
        heard.append(n)
        return "well"

    tool = {"type": "function", "function": {"name": "listen", "parameters": schema}}
    options: dict[str, Any] = {"tool_choice": "required", "template": pw.TOOLS_TEMPLATE, "seed": 3, "max_tokens": 600}
    options |= {"logit_bias": {3 + ord('"'): 2.0}, "parallel_tool_calls": False, "temperature": 1}

    async def go(own: pw.Model) -> None:
        model = pw.AsyncModel(own)
        answers = await model.chat_n(asked, 3, seed=2, max_tokens=6)
        assert [one.message for one in answers] == [one.message for one in own.chat_n(asked, 3, seed=2, max_tokens=6)]
        whole = await model.infill("ab", "cd", **GREEDY)
        assert whole.text == own.infill("ab", "cd", **GREEDY).text
        assert "".join([piece async for piece in await model.infill("ab", "cd", stream=True, **GREEDY)]) == whole.text
        described = await model.chat(asked, tools=[tool], **options)
        assert described.tool_calls[0]["function"]["name"] == "listen"
        run = await model.run_tools(asked, [listen], max_rounds=1, **options)
        assert [message["role"] for message in run.messages] == ["user", "assistant", "tool", "assistant"]
        assert run.messages[2]["content"] == "well" and len(heard) == run.n_rounds == 1

    with pw.Model(path, params=pw.ModelParams(kv_overrides=overrides), n_threads=1) as own:
        asyncio.run(go(own))
        with pytest.raises(pw.RequestError, match="coroutine"):
            own.run_tools(asked, [listen], **options)


def test_a_cancelled_task_ends_all_its_prompts_and_no_others(tiny: pw.Model) -> None:
    expected = tiny.generate("other", max_tokens=200, ignore_eos=True, temperature=0).tokens

    async def go() -> None:
        model = pw.AsyncModel(tiny)
        other = asyncio.create_task(model.generate("other", max_tokens=200, ignore_eos=True, temperature=0))
        many = asyncio.create_task(
            model.generate_many([f"{i}" for i in range(30)], max_tokens=None, ignore_eos=True, n_parallel=6)
        )
        await asyncio.to_thread(until, lambda: n_running(tiny) >= 6)
        many.cancel()
        with pytest.raises(asyncio.CancelledError):
            await many
        await asyncio.to_thread(until, lambda: n_running(tiny) <= 1)
        assert (await other).tokens == expected

    asyncio.run(go())
    assert not tiny._calls and not tiny._scheduler._queue


def test_a_long_prompt_of_several_choices_is_ended_at_once(model: pw.Model) -> None:
    tokens = [i % 40_000 + 100 for i in range(6000)]

    async def go() -> float:
        return await seconds_to_cancel(model, pw.AsyncModel(model).generate_n(tokens, 3, max_tokens=1), 3)

    assert asyncio.run(go()) < 1.5  # one step of the prompt takes longer
    assert model.generate("The capital of France is", max_tokens=1, temperature=0).text == " Paris"


def test_a_task_that_is_collected_gives_its_slots_back(tiny: pw.Model) -> None:
    loop = asyncio.new_event_loop()
    call = loop.create_task(pw.AsyncModel(tiny).generate_many(["a", "b"], max_tokens=None, ignore_eos=True))

    async def started() -> None:
        while n_running(tiny) < 2:
            await asyncio.sleep(0.001)

    loop.run_until_complete(started())
    loop.close()
    call._log_destroy_pending = False  # type: ignore[attr-defined]
    del call
    running = tuple(tiny._calls)
    until(lambda: gc.collect() >= 0 and not tiny._calls)
    assert {run.completion().finish_reason for run in running} == {"cancelled"}  # not computed to their ends
    assert tiny.generate("a", max_tokens=1).usage.completion_tokens == 1
    until(lambda: n_running(tiny) == 0)


def test_closing_before_a_load_has_its_turn_is_told_as_that(tiny_path: Path) -> None:
    gate = threading.Event()
    busy = [_async_bridge.workers().submit(gate.wait, 20) for _ in range(MAX_SLOTS)]  # no thread is left

    async def go() -> None:
        model = pw.AsyncModel(tiny_path, n_threads=1)
        loads = [asyncio.create_task(model.load()) for _ in range(2)]
        await asyncio.sleep(0.05)
        await model.close()
        for load in loads:
            with pytest.raises(pw.ClosedError, match="closed"):
                await load
        gate.set()

    try:
        asyncio.run(go())
    finally:
        gate.set()
    assert all(future.result(20) for future in busy)


@pytest.mark.parametrize("ends_load", [True, False])
def test_closing_in_the_midst_of_a_load_is_told_as_that(tiny_path: Path, ends_load: bool) -> None:
    begun, gate = threading.Event(), threading.Event()

    def progress(fraction: float) -> None:
        if (fraction > 0) is not ends_load:  # after the last one nothing can end it
            begun.set()
            gate.wait(10)

    async def go() -> None:
        model = pw.AsyncModel(tiny_path, n_threads=1, progress=progress)
        load = asyncio.create_task(model.load())
        await asyncio.to_thread(begun.wait, 10)
        await model.close()
        gate.set()
        with pytest.raises(pw.ClosedError):
            await load

    asyncio.run(go())


def test_chunks_whose_reader_was_cancelled_are_closed(write_tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "chat.gguf", chat_template=TEMPLATE)

    def slow(tokens: Any, logits: Any) -> Any:
        time.sleep(0.01)
        return logits

    async def go(llama: pw.Llama) -> None:
        options: dict[str, Any] = {"max_tokens": None, "logit_bias": {2: -100.0}, "stream": True}
        chunks = await pw.AsyncLlama(llama).create_completion(
            "abc", logits_processor=pw.LogitsProcessorList([slow]), **options
        )
        await chunks.__anext__()
        reading = asyncio.create_task(chunks.__anext__())
        await asyncio.sleep(0.005)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await chunks.close()
        assert chunks._chunks.gi_frame is None
        assert not llama._model._calls
        again = await pw.AsyncLlama(llama).create_completion("abc", **options)
        await again.__anext__()
        reading = asyncio.create_task(again.__anext__())
        await asyncio.sleep(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await asyncio.to_thread(until, lambda: again._chunks.gi_frame is None)  # by itself
        left = await pw.AsyncLlama(llama).create_completion("abc", **options)
        await left.__anext__()
        await asyncio.gather(left.close(), left.close())
        assert left._chunks.gi_frame is None

    with pw.Llama(path, n_threads=1, n_ctx=512) as llama:
        asyncio.run(go(llama))


def test_a_model_in_a_process_of_its_own_does_it_too(tiny: pw.Model, tiny_path: Path) -> None:
    async def go() -> None:
        async with pw.AsyncModel(tiny_path, n_threads=1, isolation="process") as model:
            found = await model.generate_many(["a", "b"], **GREEDY)
            assert [one.tokens for one in found] == [one.tokens for one in tiny.generate_many(["a", "b"], **GREEDY)]
            assert len(await model.generate_n("a", 2, **GREEDY)) == 2
            call = asyncio.create_task(model.generate_many(["a", "b"] * 500, max_tokens=None, ignore_eos=True))
            await asyncio.sleep(0.1)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert (await model.generate("a", **GREEDY)).tokens == tiny.generate("a", **GREEDY).tokens

    asyncio.run(go())


def test_iterators_are_for_all_choices(write_tiny: Callable[..., Path], tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "hello"}]
    seen: set[int] = set()

    def only_q(tokens: Any, logits: Any) -> None:
        seen.add(len(tokens))
        keep = logits[ord("q") + 3]
        logits[:] = float("-inf")
        logits[ord("q") + 3] = keep

    async def go(model: pw.AsyncModel) -> None:
        def options() -> dict[str, Any]:
            return {"stop": iter(["qqq"]), "logits_processors": iter([only_q]), "max_tokens": 8}

        answers = await model.chat_n(asked, 3, **options())
        assert len({answer.text for answer in answers}) == len({answer.tokens for answer in answers}) == 1
        assert {answer.finish_reason for answer in answers} == {"stop"}
        texts = await model.generate_n("hello", 3, **options())
        assert [(one.tokens, one.finish_reason) for one in texts] == [(answers[0].tokens, "stop")] * 3

    with pw.Model(write_tiny(tmp_path / "chat.gguf", chat_template=TEMPLATE), n_threads=1) as model:
        asyncio.run(go(pw.AsyncModel(model)))
    assert seen


def test_tools_have_threads_of_their_own() -> None:
    from pyllama_wasm.tool_loop import _Make

    names: list[str] = []

    def look() -> str:
        """Look."""
        names.append(threading.current_thread().name)
        return "seen"

    def steps(*_: object) -> Any:
        result = yield _Make(look, "look", "{}")
        return result

    async def go() -> None:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("pyllama_wasm.async_api.tool_steps", steps)
            assert await pw.AsyncModel("none.gguf").run_tools([], [look]) == "seen"  # type: ignore[comparison-overlap]

    asyncio.run(go())
    assert names[0].startswith("pyllama-calls")
