"""Closing: twice is fine, use afterwards is told, parents close children, and nothing is left over."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

import pyllama_wasm as pw

CYCLES = int(os.environ.get("PYLLAMA_WASM_SOAK", "500"))
"""Open/close cycles of the soak test."""


def test_use_after_close_is_told(tiny: pw.Model) -> None:
    context, sampler = tiny.context(n_ctx=256), pw.Sampler(tiny)
    batch = pw.Batch(1)
    batch.add(5, 0)
    tiny.close()
    tiny.close()
    assert tiny.is_closed
    assert context.is_closed
    assert sampler.is_closed
    calls: list[Callable[[], object]] = [
        lambda: tiny.generate("a"),
        lambda: list(tiny.stream([5])),
        lambda: tiny.chat([{"role": "user", "content": "a"}]),
        lambda: tiny.context(),
        lambda: tiny.vocab.tokenize("a"),
        lambda: tiny.vocab.is_eog(200),
        lambda: context.decode(batch),
        lambda: context.memory.clear(),
        lambda: sampler.reset(),
        lambda: pw.Sampler(tiny),
        lambda: tiny.metadata,
    ]
    for call in calls:
        with pytest.raises(pw.ClosedError, match="the model is closed"):
            call()
    context.close()
    sampler.close()
    tiny.cancel()


def test_closed_context_and_sampler_are_told(tiny: pw.Model) -> None:
    context, sampler = tiny.context(n_ctx=256), pw.Sampler(tiny)
    for closing in (context, sampler):
        closing.close()
        closing.close()
        assert closing.is_closed
    with pytest.raises(pw.ClosedError, match="the context is closed"):
        context.memory.clear()
    with pytest.raises(pw.ClosedError, match="the sampler is closed"):
        sampler.reset()
    assert tiny.generate("a", max_tokens=1).usage.completion_tokens == 1


def test_with_closes_in_order(tiny_path: Path) -> None:
    with pw.Model(tiny_path, n_threads=1) as model, model.context(n_ctx=256) as context:
        assert not context.is_closed
    assert context.is_closed
    assert model.is_closed
    assert repr(model).endswith("(closed)>")


def test_closing_ends_a_running_stream(tiny: pw.Model) -> None:
    stream = tiny.stream("abc", max_tokens=None, ignore_eos=True)
    next(stream)
    tiny.close()
    with pytest.raises(pw.ClosedError):
        list(stream)
    stream.close()


def test_closing_ends_a_call_in_another_thread(model: pw.Model, smollm2_path: Path) -> None:
    outcome: list[BaseException] = []
    started = threading.Event()

    def work(loaded: pw.Model) -> None:
        try:
            for _ in loaded.stream("Once upon a time", max_tokens=None, ignore_eos=True):
                started.set()
        except pw.PyllamaError as error:
            outcome.append(error)

    loaded = pw.Model(smollm2_path)
    thread = threading.Thread(target=work, args=(loaded,))
    thread.start()
    assert started.wait(60)
    loaded.close()
    thread.join(10)
    assert not thread.is_alive()
    assert isinstance(outcome[0], (pw.ClosedError, pw.CancelledError))


def test_forgotten_model_is_freed(tiny_path: Path) -> None:
    before = len(threading.enumerate())
    for _ in range(5):
        pw.Model(tiny_path, n_threads=1)
    gc.collect()
    for _ in range(200):
        if len(threading.enumerate()) <= before:
            break
        threading.Event().wait(0.05)
    assert len(threading.enumerate()) <= before


@pytest.mark.parametrize("is_closed", [True, False])
def test_nothing_keeps_a_model_alive_that_nobody_refers_to(tiny_path: Path, is_closed: bool) -> None:
    model = pw.Model(tiny_path, n_threads=1)
    model.generate("abc", max_tokens=2)
    next(model.stream("abc"))
    model.context(n_ctx=256)
    pw.Sampler(model)
    watched = weakref.ref(model)
    if is_closed:
        model.close()
    del model
    gc.collect()
    assert watched() is None


def resident_bytes() -> int:
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no Anonymous line")


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc")
def test_open_close_cycles_leave_nothing_behind(tiny_path: Path, smollm2_path: Path) -> None:
    def cycle(i: int) -> None:
        path = smollm2_path if i % 25 == 0 else tiny_path
        with pw.Model(path, n_threads=2) as model:
            if i % 5 == 0:
                model.generate("abc", max_tokens=2, temperature=0)

    for i in range(26):
        cycle(i)
    gc.collect()
    memory, threads, files, maps = resident_bytes(), len(threading.enumerate()), open_files(), n_maps()
    for i in range(CYCLES):
        cycle(i)
    gc.collect()
    assert len(threading.enumerate()) <= threads
    assert open_files() <= files
    assert n_maps() <= maps + 20
    assert resident_bytes() - memory < 30 << 20


def n_maps() -> int:
    return Path("/proc/self/maps").read_text().count("\n")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_stream_in_a_forked_child_is_told_that_the_engine_is_gone(tiny_path: Path) -> None:
    """A child has no engine thread, and the one that it left behind may have been in the middle of a step."""
    script = f"""
import os, warnings
warnings.simplefilter("ignore")
import pyllama_wasm as pw
with pw.Model({str(tiny_path)!r}, n_threads=1) as model:
    stream = model.stream("abc", max_tokens=None, ignore_eos=True)
    for _ in range(6):
        next(stream)
        pid = os.fork()
        if pid == 0:
            try:
                for _ in range(100):
                    next(stream)
            except pw.ClosedError:
                os._exit(41)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 41
    next(stream)
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr
