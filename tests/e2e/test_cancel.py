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
TRIES, PATIENCE_S = 5, 60.0
needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to oneself on Windows")


def interrupt(delay_s: float, action: Callable[[], object]) -> float:
    """Run ``action``, raise SIGINT after ``delay_s``, and return how long the action went on after it."""
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


def check_afterwards(model: pw.Model) -> bool:
    """Check that the model is usable or plainly dead; return which. Only a busy machine makes it die."""
    if model.engine.is_dead:
        with pytest.raises(pw.GuestDiedError, match="load the model again"):
            model.generate("abc")
        return False
    assert "Paris" in model.generate("The capital of France is", max_tokens=8, temperature=0).text
    return True


def ends_in_time(path: Path, end: Callable[[pw.Model], float]) -> bool:
    """Whether ``end`` came back within the limit and left its model usable, in one of several tries.

    One try alone would test how busy the machine is: there are five, and more until a minute is over.
    """
    began = time.monotonic()
    n_tries = 0
    while n_tries < TRIES or time.monotonic() - began < PATIENCE_S:
        n_tries += 1
        with pw.Model(path) as model:
            took = end(model)
            if check_afterwards(model) and took < LIMIT_S:
                return True
    return False


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


LONG_PROMPT = "Tell me about the history of the world in great detail. " * 150


@needs_signals
@pytest.mark.parametrize("delay_s", [0.05, 0.3, 0.9])
def test_ctrl_c_in_the_prefill(smollm2_path: Path, delay_s: float) -> None:
    def end(model: pw.Model) -> float:
        return interrupt(delay_s, lambda: model.generate(LONG_PROMPT, max_tokens=4))

    assert ends_in_time(smollm2_path, end)


@needs_signals
@pytest.mark.parametrize("delay_s", [0.2, 0.5])
def test_ctrl_c_in_the_decode(smollm2_path: Path, delay_s: float) -> None:
    def end(model: pw.Model) -> float:
        return interrupt(delay_s, lambda: list(model.stream("Once upon", max_tokens=None, ignore_eos=True)))

    assert ends_in_time(smollm2_path, end)


@needs_signals
def test_ctrl_c_while_waiting_for_another_call(smollm2_path: Path) -> None:
    def end(model: pw.Model) -> float:
        def work() -> None:
            with contextlib.suppress(pw.CancelledError, pw.GuestDiedError):
                model.generate(LONG_PROMPT, max_tokens=1)

        other = threading.Thread(target=work)
        other.start()
        time.sleep(0.2)
        took = interrupt(0.2, lambda: model.generate("abc", max_tokens=100, ignore_eos=True))
        assert other.is_alive()
        model.cancel()
        other.join(10)
        assert not other.is_alive()
        return took

    assert ends_in_time(smollm2_path, end)


@needs_signals
@pytest.mark.parametrize("delay_s", [0.0, 0.02, 0.05, 0.1])
def test_ctrl_c_in_the_load(smollm2_path: Path, delay_s: float) -> None:
    def load_for_ever() -> None:
        while True:
            pw.Model(smollm2_path).close()

    threads = threading.active_count()
    assert min(interrupt(delay_s, load_for_ever) for _ in range(2)) < LIMIT_S
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


def test_cancel_ends_every_call_and_the_model_goes_on(smollm2_path: Path) -> None:
    def end(model: pw.Model) -> float:
        outcome: list[BaseException] = []

        def work(prompt: str) -> None:
            try:
                model.generate(prompt, max_tokens=None, ignore_eos=True)
            except pw.PyllamaError as error:
                outcome.append(error)

        threads = [threading.Thread(target=work, args=(p,)) for p in ("a", "Once", LONG_PROMPT, LONG_PROMPT)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(model._calls) == 4 and bool(model._cancellable))
        time.sleep(0.3)  # so that two answer while the long prompts are read
        assert len(model._calls) == 4
        began = time.perf_counter()
        model.cancel()
        for thread in threads:
            thread.join(10)
        took = time.perf_counter() - began
        assert len(outcome) == 4
        if not model.engine.is_dead:
            assert [type(error) for error in outcome] == [pw.CancelledError] * 4
        return took

    assert ends_in_time(smollm2_path, end)


def test_cancel_without_a_call_does_nothing(tiny: pw.Model) -> None:
    tiny.cancel()
    assert tiny.generate("a", max_tokens=1).usage.completion_tokens == 1


def test_cancel_ends_a_low_level_decode(smollm2_path: Path) -> None:
    def end(model: pw.Model) -> float:
        context, batch = model.context(n_ctx=2048), pw.Batch(2048)
        batch.add_sequence([5] * 2048)
        at: list[float] = []

        def cancel() -> None:
            at.append(time.perf_counter())
            model.cancel()

        timer = threading.Timer(0.3, cancel)
        timer.start()
        with pytest.raises((pw.CancelledError, pw.GuestStoppedError)):
            context.decode(batch)
        took = time.perf_counter() - at[0]
        timer.join()
        if not model.engine.is_dead:
            context.memory.clear()
            small = pw.Batch(2)
            small.add_sequence([5, 6])
            context.decode(small)
            assert context.logits().shape == (model.vocab.n_tokens,)
        return took

    assert ends_in_time(smollm2_path, end)


def test_cancel_does_not_reach_the_job_behind_the_one_it_meant(tiny: pw.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    has_begun = threading.Event()

    def first() -> None:
        order.append("first")
        has_begun.set()
        time.sleep(0.05)

    def slow_cancel(*_: float) -> None:
        time.sleep(0.2)  # the first job has long come to its end by then
        order.append("cancel")

    monkeypatch.setattr(tiny.engine, "cancel", slow_cancel)
    threads = [
        threading.Thread(target=lambda: tiny._run_cancellable(first, "first")),
        threading.Thread(target=lambda: tiny._run(lambda: order.append("second"), "second")),
    ]
    threads[0].start()
    assert has_begun.wait(10)
    threads[1].start()
    tiny.cancel()
    for thread in threads:
        thread.join(10)
    assert order == ["first", "cancel", "second"]
    tiny.cancel()  # with nothing there that may be cancelled
    assert order == ["first", "cancel", "second"]


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
    assert tiny._scheduler.n_lanes == 1


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
