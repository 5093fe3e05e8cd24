"""Several threads and several models at once: fair turns, no cross-talk, no deadlock."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyllama_wasm as pw

PROMPTS = [
    "The capital of France is",
    "Once upon a time",
    "Water boils at",
    "The best way to learn",
    "Dear Sir or Madam,",
    "def main():",
    "Two plus two equals",
    "In the year 1969",
]


def greedy(model: pw.Model, prompt: str, n: int) -> tuple[int, ...]:
    return model.generate(prompt, max_tokens=n, temperature=0).tokens


def seeded(model: pw.Model, prompt: str, n: int) -> tuple[int, ...]:
    return model.generate(prompt, max_tokens=n, seed=11, temperature=1.2).tokens


def test_eight_threads_on_two_models_answer_as_alone(
    model: pw.Model, write_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    with pw.Model(write_tiny(tmp_path / "other.gguf", seed=9)) as other:
        jobs = [
            (call, target, prompt)
            for i, prompt in enumerate(PROMPTS)
            for call, target in [(greedy if i % 2 else seeded, model if i % 4 < 2 else other)]
        ]
        alone = [call(target, prompt, 12) for call, target, prompt in jobs]
        with ThreadPoolExecutor(8) as executor:
            together = list(executor.map(lambda job: job[0](job[1], job[2], 12), jobs))
        assert together == alone


def test_two_hundred_short_generations(tiny: pw.Model, write_tiny: Callable[..., Path], tmp_path: Path) -> None:
    with pw.Model(write_tiny(tmp_path / "other.gguf", seed=9), n_threads=2) as other:
        jobs = [((tiny, other)[i % 2], f"prompt {i % 10}") for i in range(200)]
        alone = {(id(m), prompt): greedy(m, prompt, 5) for m, prompt in dict.fromkeys(jobs)}
        with ThreadPoolExecutor(8) as executor:
            together = list(executor.map(lambda job: greedy(job[0], job[1], 5), jobs))
        assert together == [alone[id(m), prompt] for m, prompt in jobs]
        assert tiny._scheduler.n_lanes <= 8


def test_more_threads_than_contexts_wait_for_their_turn(tiny: pw.Model) -> None:
    expected = greedy(tiny, "abc", 4)
    with ThreadPoolExecutor(40) as executor:
        assert set(executor.map(lambda _: greedy(tiny, "abc", 4), range(80))) == {expected}
    assert tiny._scheduler.n_lanes <= 16


def test_calls_wait_when_memory_allows_no_further_context(smollm2_path: Path) -> None:
    with pw.Model(smollm2_path, memory_limit_bytes=400 << 20, n_threads=2) as small:
        expected = greedy(small, "The capital of France is", 4)
        with ThreadPoolExecutor(6) as executor:
            found = list(executor.map(lambda _: greedy(small, "The capital of France is", 4), range(12)))
        assert set(found) == {expected}


def test_turns_are_fair(tiny: pw.Model) -> None:
    counts = [0] * 4
    stop = threading.Event()

    def work(i: int) -> None:
        with tiny.stream("abc", max_tokens=None, ignore_eos=True, temperature=0) as stream:
            for _ in stream:
                counts[i] += 1
                if stop.is_set():
                    return

    # One call is long at work before the others begin; then all advance at the same pace.
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    while min(counts) < 20 and any(thread.is_alive() for thread in threads):
        time.sleep(0.001)
    spread = max(counts) - min(counts)
    stop.set()
    for thread in threads:
        thread.join(30)
    assert spread < 200


def test_tokenizing_is_possible_while_generating(model: pw.Model) -> None:
    stream = model.stream("Once upon a time", max_tokens=40, temperature=0)
    expected = model.vocab.tokenize("Hello world")
    for _ in stream:
        assert model.vocab.tokenize("Hello world") == expected
