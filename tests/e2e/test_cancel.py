"""Ctrl-C and cancel: any phase ends at once, and the model is usable afterwards or plainly closed."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import pyllama_wasm as pw

LIMIT_S = 0.2
needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to oneself on Windows")


def interrupt_after(delay_s: float, action: Callable[[], object]) -> float:
    """Run ``action``, raise SIGINT after ``delay_s``, and return how long the action went on after it.

    The best of three: the machine may be busy with something else.
    """
    best = interrupt_once(delay_s, action)
    for _ in range(2):
        if best < LIMIT_S:
            break
        best = min(best, interrupt_once(delay_s, action))
    return best


def interrupt_once(delay_s: float, action: Callable[[], object]) -> float:
    main = threading.main_thread().ident
    assert main is not None
    at: list[float] = []

    def fire() -> None:
        at.append(time.perf_counter())
        signal.pthread_kill(main, signal.SIGINT)

    timer = threading.Timer(delay_s, fire)

    def run() -> None:
        timer.start()
        action()

    try:
        with pytest.raises(KeyboardInterrupt):
            run()
        return time.perf_counter() - at[0]
    finally:
        timer.join()


@pytest.fixture(scope="module")
def long_prompt(smollm2_path: Path) -> str:
    return "Tell me about the history of the world in great detail. " * 150


@needs_signals
@pytest.mark.parametrize("delay_s", [0.05, 0.3, 0.9])
def test_ctrl_c_in_the_prefill(model: pw.Model, long_prompt: str, delay_s: float) -> None:
    took = interrupt_after(delay_s, lambda: model.generate(long_prompt, max_tokens=4))
    assert took < LIMIT_S
    assert not model.engine.is_dead
    assert "Paris" in model.generate("The capital of France is", max_tokens=8, temperature=0).text


@needs_signals
@pytest.mark.parametrize("delay_s", [0.2, 0.5])
def test_ctrl_c_in_the_decode(model: pw.Model, delay_s: float) -> None:
    def decode() -> None:
        for _ in model.stream("Once upon a time", max_tokens=None, ignore_eos=True):
            pass

    assert interrupt_after(delay_s, decode) < LIMIT_S
    assert not model.engine.is_dead
    assert "Paris" in model.generate("The capital of France is", max_tokens=8, temperature=0).text


@needs_signals
def test_ctrl_c_while_waiting_for_another_call(model: pw.Model, long_prompt: str) -> None:
    def work() -> None:
        with contextlib.suppress(pw.CancelledError):
            model.generate(long_prompt, max_tokens=1)

    other = threading.Thread(target=work)
    other.start()
    time.sleep(0.2)
    took = interrupt_after(0.2, lambda: model.generate("abc", max_tokens=100, ignore_eos=True))
    assert took < LIMIT_S
    assert other.is_alive()
    model.cancel()
    other.join(10)
    assert not other.is_alive()


@needs_signals
@pytest.mark.parametrize("delay_s", [0.0, 0.02, 0.05, 0.1])
def test_ctrl_c_in_the_load(smollm2_path: Path, delay_s: float) -> None:
    def load_for_ever() -> None:
        while True:
            pw.Model(smollm2_path).close()

    threads = threading.active_count()
    assert interrupt_after(delay_s, load_for_ever) < LIMIT_S
    deadline = time.monotonic() + 5
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= threads
    with pw.Model(smollm2_path, params=pw.ModelParams(vocab_only=True)) as again:
        assert again.vocab.n_tokens


@needs_signals
def test_ctrl_c_ends_a_script_with_the_usual_exit(smollm2_path: Path) -> None:
    code = f"""
        import pyllama_wasm as pw
        with pw.Model({str(smollm2_path)!r}) as model:
            for piece in model.stream("Once upon a time", max_tokens=None, ignore_eos=True):
                print(piece, flush=True)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    began = time.perf_counter()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert time.perf_counter() - began < 3
    assert process.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")


def test_cancel_ends_every_call_and_the_model_goes_on(model: pw.Model, long_prompt: str) -> None:
    outcome: list[BaseException] = []
    running = threading.Barrier(5)

    def work(prompt: str) -> None:
        running.wait()
        try:
            model.generate(prompt, max_tokens=None, ignore_eos=True)
        except pw.PyllamaError as error:
            outcome.append(error)

    threads = [threading.Thread(target=work, args=(p,)) for p in ("a", "Once upon a time", long_prompt, long_prompt)]
    for thread in threads:
        thread.start()
    running.wait()
    deadline = time.monotonic() + 10
    while len(model._calls) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(1)
    began = time.perf_counter()
    model.cancel()
    for thread in threads:
        thread.join(10)
    took = time.perf_counter() - began
    assert [type(error) for error in outcome] == [pw.CancelledError] * 4
    assert took < LIMIT_S
    assert not model.engine.is_dead
    assert "Paris" in model.generate("The capital of France is", max_tokens=8, temperature=0).text


def test_cancel_without_a_call_does_nothing(tiny: pw.Model) -> None:
    tiny.cancel()
    assert tiny.generate("a", max_tokens=1).usage.completion_tokens == 1


def test_cancel_ends_a_low_level_decode(model: pw.Model) -> None:
    with model.context(n_ctx=2048) as context:
        batch = pw.Batch(2048)
        batch.add_sequence([5] * 2048)
        timer = threading.Timer(0.3, model.cancel)
        timer.start()
        with pytest.raises(pw.CancelledError, match="decode: it was cancelled"):
            context.decode(batch)
        timer.join()
        context.memory_clear()
        small = pw.Batch(2)
        small.add_sequence([5, 6])
        context.decode(small)
        assert context.logits().shape == (model.vocab.n_tokens,)


def test_cancel_between_the_pieces_of_a_stream(tiny: pw.Model) -> None:
    stream = tiny.stream("abc", max_tokens=None, ignore_eos=True)
    next(stream)
    tiny.cancel()
    with pytest.raises(pw.CancelledError):
        list(stream)
    assert stream.completion is not None
    assert stream.completion.finish_reason == "cancelled"


def test_interrupted_call_leaves_its_context_to_others(tiny: pw.Model) -> None:
    for _ in range(30):
        stream = tiny.stream("abc", max_tokens=None, ignore_eos=True)
        next(stream)
        tiny.cancel()
        with pytest.raises(pw.CancelledError):
            list(stream)
    assert tiny._pool._n_contexts == 1


def test_cancel_ends_a_template_that_does_not_end(tiny_path: Path) -> None:
    template = "{% for i in range(999999999) %}{% for j in range(999999999) %}{{ '' }}{% endfor %}{% endfor %}"
    with pw.Model(tiny_path, n_threads=1) as doomed:
        timer = threading.Timer(0.3, doomed.cancel)
        timer.start()
        began = time.perf_counter()
        with pytest.raises(pw.PyllamaError) as caught:
            doomed.apply_chat_template([{"role": "user", "content": "Hi"}], template=template)
        timer.join()
        assert isinstance(caught.value, (pw.GuestDiedError, pw.OutOfMemoryError, pw.RequestError))
        assert time.perf_counter() - began < 20
