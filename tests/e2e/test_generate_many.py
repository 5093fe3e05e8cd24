"""Many prompts in one batch, prefixes that are not computed twice, and models with an encoder or a recurrent state."""

from __future__ import annotations

import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import pyllama_wasm as pw

from .. import tiny_models

PROMPTS = [
    "The capital of France is",
    "Once upon a time",
    "Water boils at",
    "The best way to learn",
    "Dear Sir or Madam,",
    "def main():",
    "Two plus two equals",
    "In the year 1969",
    "My favourite colour is",
    "1, 2, 3, 4,",
]
GREEDY = pw.SamplingParams(temperature=0)


@pytest.fixture
def mamba(tmp_path: Path) -> Iterator[pw.Model]:
    with pw.Model(tiny_models.write_mamba(tmp_path / "mamba.gguf"), n_threads=1) as loaded:
        yield loaded


@pytest.fixture
def t5(tmp_path: Path) -> Iterator[pw.Model]:
    with pw.Model(tiny_models.write_t5(tmp_path / "t5.gguf"), n_threads=1) as loaded:
        yield loaded


def lane_sizes(model: pw.Model) -> list[int]:
    return [len(lane.slots) for lane in model._scheduler._lanes]


# -- many prompts ----------------------------------------------------------------------------------------------------


def test_answers_are_those_of_single_calls_in_order(model: pw.Model) -> None:
    alone = [model.generate(prompt, max_tokens=5, sampling=GREEDY) for prompt in PROMPTS]
    many = model.generate_many(PROMPTS, max_tokens=5, sampling=GREEDY)
    assert [completion.text for completion in many] == [completion.text for completion in alone]
    assert [completion.tokens for completion in many] == [completion.tokens for completion in alone]
    assert [completion.usage.prompt_tokens for completion in many] == [
        completion.usage.prompt_tokens for completion in alone
    ]


def test_continuous_refill_uses_one_lane_and_few_steps(tiny: pw.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    n_steps = [0]
    run = tiny._run_cancellable

    def counting(job: Callable[[], object], operation: str) -> object:
        n_steps[0] += 1
        return run(job, operation)

    monkeypatch.setattr(tiny, "_run_cancellable", counting)
    found = tiny.generate_many(["ab" * i for i in range(1, 25)], max_tokens=20, n_parallel=4, ignore_eos=True)
    assert {len(completion.tokens) for completion in found} == {20}
    assert lane_sizes(tiny) == [4]
    assert n_steps[0] <= 24 * 20 / 4 + 10


def test_seeds_decide_for_each_prompt(tiny: pw.Model) -> None:
    each = [pw.SamplingParams(seed=i, temperature=1.5) for i in range(6)]
    alone = [tiny.generate("abc", max_tokens=12, sampling=params).tokens for params in each]
    many = tiny.generate_many(["abc"] * 6, max_tokens=12, sampling=each)
    assert [completion.tokens for completion in many] == alone
    assert len(set(alone)) > 1


def test_stop_strings_and_short_answers_end_on_their_own(model: pw.Model) -> None:
    whole = model.generate(PROMPTS[1], max_tokens=16, sampling=GREEDY).text
    stop = whole[20:28]
    found = model.generate_many(PROMPTS[:3], max_tokens=16, sampling=GREEDY, stop=stop)
    assert found[1].text == whole[: whole.index(stop)]
    assert found[1].finish_reason == "stop"
    assert found[0].finish_reason == "length"


def test_progress_counts_to_the_end(tiny: pw.Model) -> None:
    seen: list[tuple[int, int]] = []
    tiny.generate_many(["a", "b", "c"], max_tokens=3, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (3, 3)
    assert seen == sorted(seen)


def test_nothing_to_do_is_nothing(tiny: pw.Model) -> None:
    assert tiny.generate_many([]) == []
    assert [completion.text for completion in tiny.generate_many(["a", "b"], max_tokens=0)] == ["", ""]
    assert tiny._scheduler.n_lanes == 0


@pytest.mark.parametrize(
    ("prompts", "arguments", "text"),
    [
        (["a", "a" * 600], {}, "leaves no room in a context of 512"),
        (["a", "b"], {"n_parallel": 0}, "not a count from 1 to 64"),
        (["a", "b"], {"sampling": [GREEDY]}, "1 sampling parameters for 2 prompts"),
        ("ab", {}, "one text and not a list"),
        (["a", [5, 10**6]], {}, "is not an integer from 0"),
        (["a", "b"], {"sampling": [GREEDY, GREEDY.replace(grammar="root ::= (")]}, "set grammar"),
        (["a"], {"logits_processors": [3]}, "is not a function"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(
    tiny: pw.Model, prompts: list[str], arguments: dict[str, object], text: str
) -> None:
    with pytest.raises(pw.RequestError, match=text):
        tiny.generate_many(prompts, max_tokens=4, **arguments)  # type: ignore[arg-type]
    assert tiny._scheduler.n_lanes == 0
    assert not tiny._calls


def test_fewer_run_at_a_time_when_memory_is_short(smollm2_path: Path) -> None:
    with pw.Model(smollm2_path, memory_limit_bytes=230 << 20, n_threads=2) as small:
        found = small.generate_many(PROMPTS[:5], max_tokens=4, sampling=GREEDY)
        (n_slots,) = lane_sizes(small)
        assert n_slots < 5
        expected = [small.generate(prompt, max_tokens=4, sampling=GREEDY).text for prompt in PROMPTS[:5]]
        assert [completion.text for completion in found] == expected


# -- ending ----------------------------------------------------------------------------------------------------------


def test_cancel_ends_all_and_the_model_goes_on(tiny: pw.Model) -> None:
    timer = threading.Timer(0.2, tiny.cancel)
    timer.start()
    with pytest.raises(pw.CancelledError):
        for _ in range(1000):
            tiny.generate_many(["a", "b", "c"], max_tokens=400, ignore_eos=True)
    timer.join()
    assert not tiny._calls
    assert tiny.generate("a", max_tokens=2, ignore_eos=True).usage.completion_tokens == 2


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to oneself on Windows")
def test_ctrl_c_in_one_thread_leaves_the_others_alone(model: pw.Model) -> None:
    main = threading.main_thread().ident
    assert main is not None
    expected = [model.generate(prompt, max_tokens=12, sampling=GREEDY).tokens for prompt in PROMPTS[:3]]
    with ThreadPoolExecutor(3) as executor:
        futures = [executor.submit(model.generate, prompt, max_tokens=12, sampling=GREEDY) for prompt in PROMPTS[:3]]
        timer = threading.Timer(0.2, lambda: signal.pthread_kill(main, signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            model.generate_many(PROMPTS, max_tokens=None, ignore_eos=True, n_parallel=2)
        timer.join()
        assert [future.result(60).tokens for future in futures] == expected
    assert not model._calls


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to oneself on Windows")
def test_ctrl_c_at_any_moment_harms_nobody_else(tiny: pw.Model) -> None:
    rng = random.Random(3)
    main = threading.main_thread().ident
    assert main is not None
    alone = {p: tiny.generate(p, max_tokens=12, sampling=GREEDY, ignore_eos=True).tokens for p in PROMPTS}
    is_over, is_open, n_interrupts = threading.Event(), threading.Event(), 0

    def others(i: int) -> list[bool]:
        found: list[bool] = []
        while not is_over.is_set():
            prompt = PROMPTS[(i + len(found)) % len(PROMPTS)]
            found.append(tiny.generate(prompt, max_tokens=12, sampling=GREEDY, ignore_eos=True).tokens == alone[prompt])
        return found

    def interrupt() -> None:
        while not is_over.is_set():
            time.sleep(0.02 * rng.random())
            if is_open.is_set():
                is_open.clear()
                signal.pthread_kill(main, signal.SIGINT)

    with ThreadPoolExecutor(4) as executor:
        futures = [executor.submit(others, i) for i in range(3)]
        executor.submit(interrupt)
        for i in range(150):
            try:
                is_open.set()
                if i % 2:
                    tiny.generate_many(PROMPTS[:4], max_tokens=200, n_parallel=3, ignore_eos=True)
                else:
                    list(tiny.stream("abc", max_tokens=200, ignore_eos=True))
                while is_open.is_set():
                    time.sleep(0.001)
                time.sleep(0.1)  # the signal is on its way
            except KeyboardInterrupt:
                n_interrupts += 1
        is_over.set()
        outcomes = [outcome for future in futures for outcome in future.result(60)]
    assert n_interrupts == 150
    assert all(outcomes)
    assert len(outcomes) > 30
    assert tiny.generate("a", max_tokens=1).usage.completion_tokens == 1
    assert not any(lane.n_running for lane in tiny._scheduler._lanes)
    assert not tiny._calls


def test_error_in_a_logits_processor_ends_its_own_call_only(tiny: pw.Model) -> None:
    class OwnError(Exception):
        pass

    def spoil(tokens: npt.NDArray[np.int32], logits: npt.NDArray[np.float32]) -> None:
        if len(tokens) > 8:
            raise OwnError

    expected = tiny.generate("abc", max_tokens=30, sampling=GREEDY, ignore_eos=True).tokens
    with tiny.stream("abc", max_tokens=30, sampling=GREEDY, ignore_eos=True) as stream:
        next(stream)
        with pytest.raises(OwnError):
            tiny.generate("xyz", max_tokens=30, logits_processors=[spoil], ignore_eos=True)
        list(stream)
        assert stream.completion is not None
        assert stream.completion.tokens == expected


def test_logits_processors_see_the_prompt_and_decide(tiny: pw.Model) -> None:
    wanted = tiny.vocab.tokenize("z", add_special=False)[-1]
    seen: list[list[int]] = []

    def force(tokens: npt.NDArray[np.int32], logits: npt.NDArray[np.float32]) -> None:
        seen.append([int(token) for token in tokens])
        logits[:] = -np.inf
        logits[wanted] = 0

    for completion in tiny.generate_many(["ab", "c"], max_tokens=3, logits_processors=[force]):
        assert completion.tokens == (wanted,) * 3
    assert [*tiny.vocab.tokenize("ab"), wanted] in seen


def test_a_callback_cannot_wait_for_its_own_model(tiny: pw.Model) -> None:
    def reenter(tokens: npt.NDArray[np.int32], logits: npt.NDArray[np.float32]) -> None:
        tiny.generate("a", max_tokens=1)

    with pytest.raises(pw.RequestError, match="cannot wait for the model itself"):
        tiny.generate("a", max_tokens=2, logits_processors=[reenter])


# -- prefixes --------------------------------------------------------------------------------------------------------


def test_common_prefix_is_not_computed_again_and_changes_nothing(model: pw.Model, smollm2_path: Path) -> None:
    start = "You are a patient teacher who explains things in short and simple sentences. "
    prompts = [start + "What is rain?", start + "What is a volcano?", start + "What is rain?"]
    with pw.Model(smollm2_path) as fresh:
        first, second, third = [fresh.generate(prompt, max_tokens=12, sampling=GREEDY) for prompt in prompts]
    n_start = len(model.vocab.tokenize(start)) - 1
    assert first.usage.cached_tokens == 0
    assert second.usage.cached_tokens >= n_start
    assert third.usage.cached_tokens >= n_start
    assert first.text == third.text
    assert second.timings.prompt_tokens == second.usage.prompt_tokens - second.usage.cached_tokens
    with pw.Model(smollm2_path) as other:
        assert other.generate(prompts[1], max_tokens=12, sampling=GREEDY).text == second.text


def test_same_prompt_computes_one_token(tiny: pw.Model) -> None:
    first = tiny.generate("abcdef", max_tokens=4, sampling=GREEDY)
    again = tiny.generate("abcdef", max_tokens=4, sampling=GREEDY)
    assert again.usage.cached_tokens == again.usage.prompt_tokens - 1
    assert again.tokens == first.tokens


def test_prompt_in_steps_of_one_token(tiny: pw.Model) -> None:
    expected = tiny.generate("abcdef", max_tokens=6, sampling=GREEDY).tokens
    with pw.Model(tiny.path, n_threads=1, context_params=pw.ContextParams(n_ubatch=1)) as slow:
        assert slow.generate("abcdef", max_tokens=6, sampling=GREEDY).tokens == expected
        many = slow.generate_many(["abcdef"] * 3, max_tokens=6, sampling=GREEDY)
        assert [completion.tokens for completion in many] == [expected] * 3


def test_recurrent_model_continues_but_never_goes_back(mamba: pw.Model) -> None:
    prompts = ["abcabc", "abcxyz", "abcabc", "abc"]
    alone = []
    for prompt in prompts:
        with pw.Model(mamba.path, n_threads=1) as fresh:
            alone.append(fresh.generate(prompt, max_tokens=8, sampling=GREEDY, ignore_eos=True))
    found = [mamba.generate(prompt, max_tokens=8, sampling=GREEDY, ignore_eos=True) for prompt in prompts]
    assert [completion.tokens for completion in found] == [completion.tokens for completion in alone]
    assert [completion.usage.cached_tokens for completion in found] == [0] * 4
    many = mamba.generate_many(prompts, max_tokens=8, sampling=GREEDY, ignore_eos=True)
    assert [completion.tokens for completion in many] == [completion.tokens for completion in alone]
    whole = [*mamba.vocab.tokenize("abc"), *found[3].tokens]
    assert mamba.generate(whole, max_tokens=2, sampling=GREEDY).usage.cached_tokens in (0, len(whole) - 1)


def test_recurrent_model_survives_a_cancelled_step(mamba: pw.Model) -> None:
    expected = mamba.generate("abc", max_tokens=30, sampling=GREEDY, ignore_eos=True).tokens
    with mamba.stream("abc", max_tokens=30, sampling=GREEDY, ignore_eos=True) as stream:
        next(stream)
        lane = next(lane for lane in mamba._scheduler._lanes if lane.n_running)
        slot = lane.slots[0]
        slot.n_kv += 1  # what a cancelled step leaves: nobody knows what the state holds
        rest = list(stream)
        assert rest
        assert stream.completion is not None
        assert stream.completion.tokens == expected


# -- encoder-decoder -------------------------------------------------------------------------------------------------


def by_hand(t5: pw.Model, text: str, n: int) -> tuple[int, ...]:
    """Greedy decoding with the low-level objects."""
    source, found = t5.vocab.tokenize(text), []
    batch = pw.Batch(64)
    with t5.context(n_ctx=64) as context:
        batch.add_sequence(source)
        context.encode(batch)
        token = 0
        for pos in range(n):
            batch.clear()
            batch.add(token, pos, [0], logits=True)
            context.decode(batch)
            token = int(np.argmax(context.logits(-1)))
            found.append(token)
            if t5.vocab.is_eog(token):
                break
    return tuple(found)


def test_encoder_decoder_model_answers_as_its_steps_by_hand(t5: pw.Model) -> None:
    texts = ["translate: abc", "xyz", "translate: abc"]
    expected = [by_hand(t5, text, 10) for text in texts]
    assert len(set(expected)) > 1
    assert [t5.generate(text, max_tokens=10, sampling=GREEDY).tokens for text in texts] == expected
    many = t5.generate_many(texts, max_tokens=10, sampling=GREEDY)
    assert [completion.tokens for completion in many] == expected
    assert many[0].usage.prompt_tokens == len(t5.vocab.tokenize(texts[0]))


def test_encoder_decoder_streams_do_not_mix(t5: pw.Model) -> None:
    texts = ["abc", "hello there"]
    alone = [t5.generate(text, max_tokens=12, sampling=GREEDY).text for text in texts]
    streams = [t5.stream(text, max_tokens=12, sampling=GREEDY) for text in texts]
    found = ["", ""]
    for _ in range(12):
        for i, stream in enumerate(streams):
            found[i] += next(stream, "")
    assert found == alone


def test_source_without_room_is_refused(t5: pw.Model) -> None:
    with pytest.raises(pw.ContextFullError, match="leaves no room"):
        t5.generate("a" * 100)
    assert t5.generate("a" * 40, max_tokens=2, sampling=GREEDY).tokens == by_hand(t5, "a" * 40, 2)


def test_model_that_only_encodes_does_not_generate(tmp_path: Path) -> None:
    path = tiny_models.write_bert(tmp_path / "bert.gguf")
    with pw.Model(path, n_threads=1) as bert, pytest.raises(pw.PyllamaError):
        bert.generate("abc", max_tokens=2)


# -- threads ---------------------------------------------------------------------------------------------------------


def test_threads_and_streams_and_batches_at_once(tiny: pw.Model) -> None:
    alone = {p: tiny.generate(p, max_tokens=10, sampling=GREEDY, ignore_eos=True).tokens for p in PROMPTS}

    def work(i: int) -> bool:
        prompt = PROMPTS[i % len(PROMPTS)]
        if i % 3 == 0:
            return tiny.generate(prompt, max_tokens=10, sampling=GREEDY, ignore_eos=True).tokens == alone[prompt]
        if i % 3 == 1:
            found = tiny.generate_many(PROMPTS, max_tokens=10, n_parallel=3, sampling=GREEDY, ignore_eos=True)
            return [completion.tokens for completion in found] == list(alone.values())
        with tiny.stream(prompt, max_tokens=10, sampling=GREEDY, ignore_eos=True) as stream:
            for _ in stream:
                time.sleep(0.001)
        return stream.completion is not None and stream.completion.tokens == alone[prompt]

    with ThreadPoolExecutor(9) as executor:
        assert all(executor.map(work, range(27)))
    assert not tiny._calls
    assert sum(lane_sizes(tiny)) < 32  # 16, and a lane of one slot for each request that can use none of the free ones


def test_users_own_context_gets_the_room_of_idle_lanes(smollm2_path: Path) -> None:
    with pw.Model(smollm2_path, memory_limit_bytes=420 << 20, n_threads=2) as small:
        small.generate_many(PROMPTS[:6], max_tokens=2, sampling=GREEDY)
        assert small._scheduler.n_lanes == 1
        with small.context(n_ctx=4096, n_batch=256):
            assert small._scheduler.n_lanes == 0
        assert small.generate(PROMPTS[0], max_tokens=2, sampling=GREEDY).usage.completion_tokens == 2


def test_an_error_of_a_processor_ends_its_own_call_whatever_its_type(tiny: pw.Model) -> None:
    alone = tiny.generate(PROMPTS[0], max_tokens=8, sampling=GREEDY, ignore_eos=True).tokens

    def raising(error: Exception) -> Callable[[Any, Any], None]:
        def process(_tokens: Any, _logits: Any) -> None:
            raise error

        return process

    def work(i: int) -> str:
        errors = {0: pw.ClosedError("ask", "the other model is closed"), 1: pw.CancelledError("ask", "enough")}
        processors = [raising(errors[i])] if i in errors else []
        try:
            found = tiny.generate(
                PROMPTS[0], max_tokens=8, sampling=GREEDY, ignore_eos=True, logits_processors=processors
            )
        except pw.PyllamaError as error:
            return f"{type(error).__name__}: {error.reason}"
        return "right" if found.tokens == alone else "wrong"

    with ThreadPoolExecutor(5) as executor:
        found = list(executor.map(work, range(5)))
    assert found == ["ClosedError: the other model is closed", "CancelledError: enough", "right", "right", "right"]


def test_embedding_from_a_callback_of_the_model_is_refused(tiny: pw.Model) -> None:
    def process(_tokens: Any, _logits: Any) -> None:
        tiny.embed("text")

    with pytest.raises(pw.RequestError, match="cannot wait for the model itself"):
        tiny.generate("a", max_tokens=1, logits_processors=[process])
