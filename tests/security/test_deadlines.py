"""Deadlines hold: whatever the guest is at, the call comes back with its typed error, and nothing is left running.

How late is measured elsewhere: here the bounds only tell an end from none, on whatever machine.
"""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

import pytest

import pyllama_wasm as pw
from pyllama_wasm import _atomic_file, loaded_model
from pyllama_wasm._snapshot import Snapshot
from pyllama_wasm.errors import DeadlineError, GuestDiedError
from pyllama_wasm.host import Engine
from pyllama_wasm.host.watchdog import watchdog
from pyllama_wasm.native import native as native_calls
from pyllama_wasm.state import State
from tests.wasm.guests import CANCEL, SPIN, STOP, THREAD_IMPORTS, THREADS, guest

from .overrun import KINDS, Bench, Files, Kind

GENEROUS_S = 10.0
LONG_PROMPT = "Tell me about the history of the world in great detail. " * 150
ENDLESS = "{% for i in range(999999999) %}{% for j in range(999999999) %}{{ '' }}{% endfor %}{% endfor %}"
USER = [{"role": "user", "content": "Hi"}]


def ends(call: Callable[[], object]) -> DeadlineError:
    """Check that a call ends with the typed error, within a bound that any machine keeps."""
    began = time.monotonic()
    with pytest.raises(DeadlineError) as caught:
        call()
    assert time.monotonic() - began < GENEROUS_S
    assert isinstance(caught.value, TimeoutError) and isinstance(caught.value, pw.LimitError)
    return caught.value


def is_usable(model: pw.Model) -> bool:
    """Check that the model works as before, or says plainly that it is dead; return which."""
    if model.is_dead:
        with pytest.raises(GuestDiedError, match="load the model again"):
            model.generate("abc")
        return False
    return len(model.generate("abc", max_tokens=3, temperature=0, deadline_s=60).tokens) > 0


# -- hand-written guests ----------------------------------------------------------------------------------------------


def test_a_polite_guest_ends_by_itself_and_lives() -> None:
    with Engine(module=guest(SPIN)) as engine:
        with pw.deadline(0.2):
            assert engine.call("spin_politely") == 7
            ends(lambda: engine.call("idle"))  # nothing more within the block
        assert engine.memory.u32(CANCEL) == 0
        assert engine.call("idle") == 1


# Takes back the flag three times before it obeys.
STUBBORN = f"""
(global $n (mut i32) (i32.const 0))
(func (export "spin") (loop $again
  (if (i32.load (i32.const {STOP})) (then
    (if (i32.eq (global.get $n) (i32.const 3)) (then unreachable))
    (global.set $n (i32.add (global.get $n) (i32.const 1)))
    (i32.store (i32.const {STOP}) (i32.const 0))))
  br $again))
"""


@pytest.mark.parametrize("code", [SPIN, STUBBORN], ids=["deaf", "stubborn"])
def test_a_guest_that_does_not_listen_is_stopped_even_if_it_clears_the_flag(code: str) -> None:
    with Engine(module=guest(code)) as engine:
        with pw.deadline(0.2):
            error = ends(lambda: engine.call("spin"))
        assert "load the model again" in str(error)
        assert engine.is_dead


@pytest.mark.parametrize("command", [3, 4], ids=["spinning", "parked on a wait"])
def test_workers_end_with_the_call(command: int) -> None:
    with Engine(module=guest(THREADS, uses=THREAD_IMPORTS), n_threads=2) as engine:
        for at in (8192, 8256):
            engine.memory.write(at, bytes((command, 0, 0, 0, 0, 0, 0, 0)))
            engine.call("spawn", at)
        with pw.deadline(0.2):
            ends(lambda: engine.call("wait_for", 8196, 1))
        assert engine._sandbox.workers.wait_until_none(GENEROUS_S, lambda: None)


def test_a_job_of_many_short_calls_is_refused_the_next_one_and_the_guest_lives() -> None:
    with Engine(module=guest(SPIN)) as engine:

        def job() -> None:
            while True:
                engine.call("idle")

        with pw.deadline(0.2):
            ends(lambda: engine.run(job, "count"))
        assert not engine.is_dead
        assert engine.call("idle") == 1


def test_what_the_host_does_for_long_is_ended_between_its_pieces() -> None:
    with Engine(module=guest(SPIN)) as engine:
        engine.check_time("copy")
        engine.run(lambda: engine.check_time("copy"))

        def job() -> None:
            while True:
                engine.check_time("copy")

        with pw.deadline(0.1):
            assert ends(lambda: engine.run(job, "count")).operation == "count"
            assert ends(lambda: engine.check_time("copy")).operation == "copy"
        assert not engine.is_dead


def test_large_arguments_are_copied_piece_by_piece(tiny: pw.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    native, data = tiny.native, bytes(range(256)) * 50
    looks: list[str] = []
    monkeypatch.setattr(native_calls, "PIECE_BYTES", 5000)
    with monkeypatch.context() as patch:
        patch.setattr(tiny.engine, "check_time", looks.append)
        with native.array(data) as ptr:
            assert native.engine.memory.read(ptr, len(data)) == data
            out = BytesIO()
            native.read_into(ptr, len(data), out, "read")
            assert out.getvalue() == data
    assert looks == ["copy into the sandbox"] * 3 + ["read"] * 3

    def job() -> None:
        time.sleep(0.2)
        with native.array(data):
            raise AssertionError("its time was up")

    with pw.deadline(0.1):
        ends(lambda: tiny.engine.run(job))
    assert is_usable(tiny)


def test_a_state_is_hashed_and_written_in_time(tiny: pw.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(file: Path) -> None:
        time.sleep(1)
        raise OSError("nobody hears of it any more")

    with tiny.context(n_ctx=256) as context:
        batch = pw.Batch(8)
        batch.add_sequence([5] * 8)
        context.decode(batch)
        data = context.state.get_data()
        assert tiny.metadata
        with monkeypatch.context() as patch:
            patch.setattr(State, "_run", lambda *_: time.sleep(0.1))  # what the sandbox does
            for call in (context.state.get_data, lambda: context.state.seq_get_data(0)):
                with pw.deadline(0.05):
                    assert ends(call).operation == "save a state"
        (tmp_path / "state").write_bytes(b"old")
        with monkeypatch.context() as patch:
            patch.setattr(_atomic_file, "_sync", slowly)
            with pw.deadline(0.3):
                assert ends(lambda: context.state.save(tmp_path / "state")).operation == "write state"
        assert [file.name for file in tmp_path.iterdir()] == ["state"]
        assert (tmp_path / "state").read_bytes() == b"old"
        with pw.deadline(0.01):
            time.sleep(0.01)
            ends(lambda: context.state.set_data(data))
            ends(lambda: context.state.load(tmp_path / "state"))
        context.state.set_data(data)


def test_a_job_that_waits_behind_another_is_withdrawn() -> None:
    gate, ran = threading.Event(), []
    with Engine(module=guest(SPIN)) as engine:
        blocker = threading.Thread(target=engine.run, args=(gate.wait,))
        blocker.start()
        with pw.deadline(0.1):
            ends(lambda: engine.run(lambda: ran.append("late")))
        gate.set()
        blocker.join(GENEROUS_S)
        assert engine.call("idle") == 1
        assert ran == []


def test_an_engine_has_a_deadline_of_its_own_for_every_call() -> None:
    with Engine(module=guest(SPIN)) as engine:
        engine.deadline_s = 0.2
        ends(lambda: engine.call("spin"))


def test_what_ends_in_time_is_not_touched_and_not_watched_any_more() -> None:
    with Engine(module=guest(SPIN)) as engine, pw.deadline(60):
        n_watched = watchdog.n_watched
        assert [engine.call("idle") for _ in range(100)] == [1] * 100
        assert watchdog.n_watched <= n_watched  # others that were there may have come to their end


def test_patience_ends_only_the_guest_call_that_goes_on() -> None:
    with Engine(module=guest(SPIN)) as engine:
        outcome: list[object] = []

        def spin() -> None:
            try:
                outcome.append(engine.call("spin_politely"))
            except pw.PyllamaError as error:
                outcome.append(error)

        def many() -> None:
            ends_at = time.monotonic() + 0.5
            while time.monotonic() < ends_at:
                engine.call("idle")
            outcome.append(engine.cancel_requested)

        for job in (lambda: engine.run(many), spin):
            thread = threading.Thread(target=job)
            thread.start()
            time.sleep(0.1)
            engine.cancel(0.05, patience_s=0.05)
            thread.join(GENEROUS_S)
        assert outcome == [False, 7]
        assert not engine.is_dead


# -- every kind of call of a model ------------------------------------------------------------------------------------


def test_prefill_decode_stream_and_batches_end_and_the_model_goes_on(model: pw.Model, smollm2_path: Path) -> None:
    calls: list[Callable[[pw.Model], object]] = [
        lambda own: own.generate(LONG_PROMPT, deadline_s=0.3),
        lambda own: own.generate("Once", max_tokens=None, ignore_eos=True, deadline_s=0.3),
        lambda own: list(own.stream("Once", max_tokens=None, ignore_eos=True, deadline_s=0.3)),
        lambda own: own.chat(USER, sampling=pw.SamplingParams(ignore_eos=True), deadline_s=0.3),
        lambda own: own.generate_many(["a", "b", LONG_PROMPT], max_tokens=None, ignore_eos=True, deadline_s=0.3),
        lambda own: own.embed([LONG_PROMPT[:1000]] * 50, deadline_s=0.3),
    ]
    with pw.Model(smollm2_path) as own:
        n_ended = 0
        for call in calls:
            if own.is_dead:  # a busy machine: what could not end by itself in time was stopped
                break
            ends(lambda call=call: call(own))  # type: ignore[misc]
            n_ended += 1
        assert n_ended >= 1 and not own._calls
        is_usable(own)
    assert is_usable(model)


def test_low_level_calls_end(smollm2_path: Path) -> None:
    with pw.Model(smollm2_path) as own:
        context, batch = own.context(n_ctx=2048), pw.Batch(2048)
        batch.add_sequence([5] * 2048)
        ends(lambda: context.decode(batch, deadline_s=0.2))
        with pw.deadline(1e-3):
            time.sleep(2e-3)
            ends(lambda: own.vocab.tokenize("a"))
            ends(lambda: own.context(n_ctx=256))
            context.close()  # closing works, whatever the time
        assert context.is_closed


def test_a_tokenizer_and_a_template_without_end_are_stopped(tiny_path: Path, model: pw.Model) -> None:
    with pw.Model(tiny_path, n_threads=1) as own:
        error = ends(lambda: own.vocab.tokenize("a" * 10_000_000, deadline_s=0.2))
        assert own.is_dead and "load the model again" in str(error)
        assert not is_usable(own)
    with pw.Model(tiny_path, n_threads=1, limits=pw.Limits(deadline_s=0.3)) as own:  # the model's own deadline
        ends(lambda: own.apply_chat_template(USER, template=ENDLESS))
    assert is_usable(model)


def test_a_grammar_of_many_ways_ends(tiny_path: Path) -> None:
    grammar = "root ::= " + '"a"? ' * 2000 + '"b"'
    with pw.Model(tiny_path, n_threads=1) as own:
        ends(lambda: [own.generate("a", max_tokens=400, grammar=grammar, deadline_s=0.3) for _ in range(500)])


def test_a_load_ends_and_leaves_nothing(tiny_path: Path, tmp_path: Path, model: pw.Model) -> None:
    bomb = write_kv_bomb(tiny_path, tmp_path / "bomb.gguf", 100_000)
    threads = set(threading.enumerate())
    error = ends(lambda: pw.Model(bomb, n_threads=1, limits=pw.Limits(deadline_s=0.1)))
    assert error.operation == "load bomb.gguf"
    assert {t for t in threading.enumerate() if t.name == "pyllama-engine"} <= threads
    assert is_usable(model)


def write_kv_bomb(source: Path, path: Path, n: int) -> Path:
    """Write a GGUF with ``n`` more metadata entries, all of them valid."""
    data = source.read_bytes()
    (n_kv,) = struct.unpack_from("<Q", data, 16)
    entries = b"".join(struct.pack("<Q", 19) + b"%019d" % i + struct.pack("<IB", 7, 1) for i in range(n))
    assert len(entries) % 32 == 0  # the tensors stay aligned
    path.write_bytes(data[:16] + struct.pack("<Q", n_kv + n) + data[24:24] + entries + data[24:])
    return path


def test_the_bomb_is_a_model_that_loads_without_a_deadline(tiny_path: Path, tmp_path: Path) -> None:
    bomb = write_kv_bomb(tiny_path, tmp_path / "bomb.gguf", 1000)
    with pw.Model(bomb, n_threads=1) as own:
        assert is_usable(own)


# -- several callers --------------------------------------------------------------------------------------------------


def test_others_of_the_same_batch_go_on(tiny_path: Path) -> None:
    with pw.Model(tiny_path, n_threads=1) as own:
        expected = own.generate("abc", max_tokens=400, ignore_eos=True, temperature=0).tokens
        outcome: list[tuple[int, ...]] = []

        def other() -> None:
            outcome.append(own.generate("abc", max_tokens=400, ignore_eos=True, temperature=0).tokens)

        thread = threading.Thread(target=other)
        thread.start()
        for _ in range(3):
            ends(
                lambda: list(iter(lambda: own.generate("xyz", max_tokens=None, ignore_eos=True, deadline_s=0.02), None))
            )
        thread.join(60)
        assert outcome == [expected]


def test_many_short_deadlines_leave_right_answers_and_a_model_that_goes_on(tiny: pw.Model) -> None:
    expected = tiny.generate("abc", max_tokens=30, ignore_eos=True, temperature=0).tokens
    outcome: list[object] = []

    def work(seed: int) -> None:
        random = Random(seed)
        for _ in range(12):
            deadline_s = random.choice([0.005, 0.02, 0.05, None])
            try:
                stream = tiny.stream("abc", max_tokens=30, ignore_eos=True, temperature=0, deadline_s=deadline_s)
                list(stream)
                outcome.append(stream.completion is not None and stream.completion.tokens == expected)
            except pw.PyllamaError as error:
                outcome.append(isinstance(error, DeadlineError) or tiny.is_dead)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert outcome == [True] * 72
    assert not tiny._calls
    if not tiny.is_dead:
        assert tiny.generate("abc", max_tokens=30, ignore_eos=True, temperature=0).tokens == expected


def test_a_leader_does_not_wait_behind_another_call_beyond_its_deadline(tiny: pw.Model) -> None:
    expected = tiny.generate("abc", max_tokens=4, ignore_eos=True, temperature=0).tokens
    gate, begun = threading.Event(), threading.Event()

    def long_call() -> None:
        begun.set()
        gate.wait(GENEROUS_S)

    other = threading.Thread(target=tiny.engine.run, args=(long_call,))
    other.start()
    begun.wait(GENEROUS_S)
    ends(lambda: tiny.generate("abc", max_tokens=4, deadline_s=0.1))
    assert not gate.is_set() and other.is_alive()
    gate.set()
    other.join(GENEROUS_S)
    assert tiny.generate("abc", max_tokens=4, ignore_eos=True, temperature=0).tokens == expected


@pytest.mark.parametrize("load", ["map", "snapshot"])
def test_a_load_ends_before_anything_runs(tiny_path: Path, monkeypatch: pytest.MonkeyPatch, load: Any) -> None:
    """The copy of the file and the look at its header take their time from the same deadline."""
    monkeypatch.setattr(loaded_model, "check_fits", lambda *_: time.sleep(0.06))
    for deadline_s in (1e-6, 0.05):
        limits = pw.Limits(deadline_s=deadline_s)
        error = ends(lambda limits=limits: pw.Model(tiny_path, load=load, limits=limits))  # type: ignore[misc]
        assert error.operation == "load tiny.gguf"


class Dripping:
    """A file object that never ends."""

    def read(self, n: int) -> bytes:
        time.sleep(0.01)
        return b"GGUF"


def test_copying_what_never_ends_ends(tiny_path: Path) -> None:
    limits = pw.Limits(deadline_s=0.2)
    ends(lambda: pw.Model(Dripping(), limits=limits))
    with pw.Model(tiny_path, n_threads=1, limits=pw.Limits(deadline_s=5)) as own:
        own.limits = limits  # those of the load would be as short
        ends(lambda: own.load_lora(Dripping()))
        assert is_usable(own)


def test_reading_a_long_header_ends(tiny_path: Path, tmp_path: Path) -> None:
    bomb = write_kv_bomb(tiny_path, tmp_path / "bomb.gguf", 90_000)
    assert len(pw.GGUFReader(bomb).metadata) > 90_000
    with pw.deadline(0.01):
        ends(lambda: pw.GGUFReader(bomb))


def test_a_snapshot_that_another_load_makes_is_not_waited_for_longer(tiny_path: Path) -> None:
    fd = os.open(tiny_path, os.O_RDONLY)
    try:
        snapshot = Snapshot.of(fd, 1 << 30, "load")
        with snapshot._lock, pw.deadline(0.05):
            ends(lambda: Snapshot.of(fd, 1 << 30, "load"))
        assert Snapshot.of(fd, 1 << 30, "load") is snapshot
    finally:
        os.close(fd)


def test_a_stream_nobody_reads_is_ended_by_its_next_piece(tiny: pw.Model) -> None:
    stream = tiny.stream("abc", max_tokens=None, ignore_eos=True, deadline_s=1)
    assert next(stream)
    time.sleep(1.1)
    ends(lambda: list(stream))
    assert stream.completion is not None and stream.completion.finish_reason == "cancelled"
    assert is_usable(tiny)


def test_a_call_that_was_computed_in_time_is_returned_late(tiny: pw.Model) -> None:
    stream = tiny.stream("abc", max_tokens=1, ignore_eos=True, deadline_s=1)
    pieces = [next(stream, "")]
    time.sleep(1)
    pieces += stream
    assert stream.completion is not None and stream.completion.finish_reason == "length"


@pytest.mark.parametrize("seconds", [0, -1, "1"])
def test_a_bad_deadline_is_a_request_error(tiny: pw.Model, seconds: object) -> None:
    calls: tuple[Callable[..., object], ...] = (tiny.generate, tiny.stream, tiny.embed, tiny.vocab.tokenize)
    for call in calls:
        with pytest.raises(pw.RequestError, match="positive number of seconds"):
            call("abc", deadline_s=seconds)


# -- every kind of call that is measured (overrun.py), without a bound on how late it may be --------------------------

SHORT = {"context of 8192", "template of loops", "clear 32768", "samplers over 50,000 tokens"}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.name in SHORT], ids=lambda kind: kind.name)
def test_kinds_that_are_measured_end_and_leave_the_engine_usable_or_dead(kind: Kind, tmp_path: Path) -> None:
    bench = Bench(Files(tmp_path), n_threads=2)
    try:
        for deadline_s in (0.02, 0.2):
            call = bench.prepared(kind)
            own = bench._model
            assert own is not None
            try:
                with pw.deadline(deadline_s):
                    ends(call)
            except pytest.fail.Exception:
                assert not kind.is_endless  # it was done before
            is_usable(own)
    finally:
        bench.close()
