"""``AsyncLlama``: the drop-in's calls, awaited; what is cancelled ends, and nothing else."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pyllama_wasm as pw

from ..waiting import until

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}answer:"
OPTIONS: dict[str, Any] = {"max_tokens": 10, "temperature": 0.0}


@pytest.fixture(scope="module")
def path(write_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("chat") / "chat.gguf", chat_template=TEMPLATE)


def answers(response: Any) -> str:
    return "".join(choice["text"] for choice in response["choices"])


def test_calls_are_those_of_llama(path: Path) -> None:
    messages: Any = [{"role": "user", "content": "hi"}]

    async def go() -> None:
        async with pw.AsyncLlama(model_path=path, n_threads=1) as llama:
            own = await llama.load()
            expected = own.create_completion("abc", **OPTIONS)
            assert answers(await llama.create_completion("abc", **OPTIONS)) == answers(expected)
            assert answers(await llama("abc", **OPTIONS)) == answers(expected)
            chunks = [chunk async for chunk in await llama.create_completion("abc", stream=True, **OPTIONS)]
            assert "".join(map(answers, chunks)) == answers(expected)
            chat = await llama.create_chat_completion(messages, **OPTIONS)
            assert chat["choices"] == own.create_chat_completion(messages, **OPTIONS)["choices"]
            embedding = await llama.create_embedding("abc")
            assert embedding["data"] == own.create_embedding("abc")["data"]
            assert await llama.embed("abc") == own.embed("abc")
            tokens = await llama.tokenize("abc")
            assert tokens == own.tokenize(b"abc")
            assert await llama.detokenize(tokens) == own.detokenize(tokens)
            assert await llama.score("abc") == own.score("abc")
            assert await llama.count_tokens(messages) == own.count_tokens(messages)
            assert await llama.apply_chat_template(messages) == own.apply_chat_template(messages)
            found = await llama.create_completion("abc", n=2, echo=True, logprobs=1, **OPTIONS)
            assert len(found["choices"]) == 2
            for unsupported in (llama.infill("a", "b"), llama.rerank("a", ["b"])):
                with pytest.raises(pw.UnsupportedModelError):
                    await unsupported
            with pytest.raises(pw.RequestError):
                await llama.create_completion("abc", max_tokens="many")
        with pytest.raises(pw.ClosedError):
            await llama.create_completion("abc")

    asyncio.run(go())


def test_many_are_computed_together_in_a_bounded_number_of_threads(path: Path) -> None:
    with pw.Llama(path, n_threads=1) as llama:
        expected = [answers(llama.create_completion(f"prompt {i}", **OPTIONS)) for i in range(50)]

        async def go() -> list[str]:
            shared = pw.AsyncLlama(llama)
            calls = (shared.create_completion(f"prompt {i}", **OPTIONS) for i in range(50))
            return [answers(response) for response in await asyncio.gather(*calls)]

        assert asyncio.run(go()) == expected
        assert sum(thread.name.startswith("pyllama-calls") for thread in threading.enumerate()) <= 16
        llama.create_completion("abc", max_tokens=1)  # it was not closed
        with pytest.raises(pw.RequestError, match="n_ctx"):
            pw.AsyncLlama(llama, n_ctx=5)


@pytest.mark.parametrize("is_stepwise", [False, True])
def test_a_cancelled_task_ends_its_request_alone(path: Path, is_stepwise: bool) -> None:
    n_taken = 0

    def slow(tokens: Any, logits: Any) -> Any:
        nonlocal n_taken
        n_taken += 1
        time.sleep(0.002)
        return logits

    long: dict[str, Any] = {"max_tokens": None, "temperature": 0.0, "logit_bias": {2: -100.0}}
    if is_stepwise:
        long["stopping_criteria"] = pw.StoppingCriteriaList([lambda tokens, logits: False])

    async def go(llama: pw.Llama) -> str:
        shared = pw.AsyncLlama(llama)
        other = asyncio.create_task(shared.create_completion("other", max_tokens=100, logit_bias={2: -100.0}, seed=1))
        call = asyncio.create_task(
            shared.create_completion("abc", logits_processor=pw.LogitsProcessorList([slow]), **long)
        )
        await asyncio.to_thread(until, lambda: n_taken > 5)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await asyncio.sleep(0.2)
        n_then = n_taken
        await asyncio.sleep(0.1)
        assert n_taken == n_then < 300
        return answers(await other)

    with pw.Llama(path, n_threads=1, n_ctx=512) as llama:
        expected = answers(llama.create_completion("other", max_tokens=100, logit_bias={2: -100.0}, seed=1))
        assert asyncio.run(go(llama)) == expected
        scheduler = llama._model._scheduler
        until(lambda: sum(lane.n_running for lane in scheduler._lanes) == 0)


def test_a_stream_that_is_left_ends(path: Path) -> None:
    async def go(llama: pw.Llama) -> None:
        async with await pw.AsyncLlama(llama).create_completion("abc", max_tokens=None, stream=True) as chunks:
            async for _ in chunks:
                break
        await chunks.close()
        with pytest.raises(StopAsyncIteration):
            await chunks.__anext__()
        waiting = await pw.AsyncLlama(llama).create_completion("abc", max_tokens=None, stream=True)
        task = asyncio.create_task(waiting.__anext__())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(StopAsyncIteration):
            await waiting.__anext__()

    with pw.Llama(path, n_threads=1, n_ctx=512) as llama:
        asyncio.run(go(llama))
        scheduler = llama._model._scheduler
        until(lambda: not llama._model._calls)
        until(lambda: sum(lane.n_running for lane in scheduler._lanes) <= 1)


def test_a_call_in_a_process_of_its_own_is_cancelled_too(path: Path) -> None:
    async def go() -> None:
        async with pw.AsyncLlama(path, n_threads=1, isolation="process") as llama:
            expected = answers(await llama.create_completion("abc", **OPTIONS))
            call = asyncio.create_task(llama.create_completion("abc", max_tokens=None, logit_bias={2: -100.0}))
            await asyncio.sleep(0.05)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert answers(await llama.create_completion("abc", **OPTIONS)) == expected

    asyncio.run(go())
