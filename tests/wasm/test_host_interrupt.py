"""Modules that are not ours: without safepoints, they are stopped by wasmtime, woken, and kept from others."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from pyllama_wasm.errors import GuestDiedError, GuestStoppedError, GuestTrapError
from pyllama_wasm.host import CompiledModule, Engine, Signature, files, jobs, load_module
from pyllama_wasm.host.module import _loads
from tests.wasm.cached import wasm_file
from tests.wasm.guests import SCRATCH, EngineOf, forwarding, guest
from tests.wasm.test_host_cancel import after
from tests.wasm.test_host_mapping import open_guest

ENDLESS = """
(func (export "loop") (loop $again br $again))
(func $a (export "calls") (call $b) (call $b)) (func $b (call $c) (call $c)) (func $c (call $d) (call $d))
(func $d (call $e) (call $e)) (func $e (loop $again (call $f) br $again)) (func $f)
(func (export "fill") (loop $again (memory.fill (i32.const 8192) (i32.const 1) (i32.const 100000)) br $again))
(func (export "wait") (drop (memory.atomic.wait32 (i32.const 8192) (i32.const 0) (i64.const -1)))
  (loop $again br $again))
(func (export "wait_at_the_end") (drop (memory.atomic.wait64 (i32.const 0x9ffff8) (i64.const 0) (i64.const -1)))
  (loop $again br $again))
(func (export "wait_again") (loop $again
  (drop (memory.atomic.wait32 (i32.const 8192) (i32.const 0) (i64.const -1))) br $again))
(func (export "ask") (loop $again
  (drop (call $random_get (i32.const 8192) (i32.const 65536))) br $again))
(func (export "catch") (loop $again (block $caught (try_table (catch_all $caught) (call $f))) br $again))
(func (export "idle") (result i32) i32.const 1)
(func (export "count") (param i32) (result i32) (local $n i32)
  (loop $next (local.set $n (i32.add (local.get $n) (i32.const 1)))
    (br_if $next (local.tee 0 (i32.sub (local.get 0) (i32.const 1))))) (local.get $n))
(func (export "spawn") (param i32) (result i32) (call $thread_spawn (local.get 0)))
(func (export "pw_thread_start") (param $tid i32) (param $command i32)
  (if (i32.eq (local.get $command) (i32.const 1)) (then (loop $again br $again)))
  (if (i32.eq (local.get $command) (i32.const 2)) (then
    (drop (memory.atomic.wait32 (i32.const 8192) (i32.const 0) (i64.const -1))) (loop $again br $again)))
  (if (i32.eq (local.get $command) (i32.const 3)) (then unreachable)))
"""
USES = ("random_get", "thread_spawn")


def endless(interruptible: bool = True) -> CompiledModule:
    return guest(ENDLESS, uses=USES, min_pages=160, interruptible=interruptible)


@pytest.fixture
def hostile(engine_of: EngineOf) -> Engine:
    return engine_of(endless(), n_threads=2)


@pytest.mark.parametrize("export", ["loop", "calls", "fill", "wait", "wait_at_the_end", "wait_again", "ask", "catch"])
def test_guest_without_safepoints_is_stopped_wherever_it_is(hostile: Engine, export: str) -> None:
    after(0.05, hostile.cancel)
    began = time.monotonic()
    with pytest.raises(GuestStoppedError, match=f"{export}: it did not end in time after it was cancelled"):
        hostile.call(export)
    assert time.monotonic() - began < 2
    assert hostile.is_dead
    with pytest.raises(GuestDiedError, match="died earlier"):
        hostile.call("idle")


@pytest.mark.parametrize("command", [1, 2])
def test_threads_of_such_a_guest_end_with_the_engine(hostile: Engine, command: int) -> None:
    assert hostile.call("spawn", command) == 1
    assert hostile.call("spawn", 3 - command) == 2
    time.sleep(0.05)
    began = time.monotonic()
    hostile.close()
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("export", ["loop", "wait"])
def test_trap_of_a_thread_ends_a_caller_that_never_looks(hostile: Engine, export: str) -> None:
    def job() -> None:
        hostile.call("spawn", 3)
        hostile.call(export)

    # Nothing stops the caller but its own cancel: the death of the thread is what is told.
    after(0.1, hostile.cancel)
    with pytest.raises(GuestTrapError, match="unreachable code reached"):
        hostile.run(job)


def test_endless_start_function_is_stopped(engine_of: EngineOf) -> None:
    body = "(func $go (loop $again br $again)) (start $go)"
    begun = threading.Event()
    failures: list[BaseException] = []

    def make() -> None:
        begun.set()
        try:
            engine_of(guest(body, interruptible=True))
        except GuestStoppedError as error:
            failures.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    begun.wait(5)
    deadline = time.monotonic() + 5
    while not failures and time.monotonic() < deadline:
        time.sleep(0.02)
        for live in list(jobs._live):
            live.cancel()
    thread.join(10)
    assert [error.args[0].partition(":")[0] for error in failures] == ["start the module"]


def test_stopping_one_leaves_the_others_of_its_module_alone(engine_of: EngineOf) -> None:
    hostile, peaceful = engine_of(endless()), engine_of(endless())
    answers: list[object] = []
    thread = threading.Thread(target=lambda: answers.append(peaceful.call("count", 300_000_000)))
    thread.start()
    after(0.02, hostile.cancel)
    with pytest.raises(GuestStoppedError):
        hostile.call("loop")
    thread.join(30)
    assert answers == [300_000_000]
    assert peaceful.call("idle") == 1 and not peaceful.is_dead


def test_only_who_asks_pays_for_it(engine_of: EngineOf) -> None:
    assert not endless(interruptible=False).is_interruptible
    assert endless().is_interruptible
    assert engine_of(endless(interruptible=False)).call("count", 5) == 5


def test_both_kinds_of_code_are_cached_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYLLAMA_WASM_CACHE", str(tmp_path / "cache"))
    path = wasm_file(tmp_path)
    for _ in range(2):
        _loads.clear()
        for interruptible in (False, True):
            module = load_module(path, interruptible=interruptible)
            assert module.is_interruptible == interruptible
            with Engine(module=module, n_threads=1) as engine:
                assert engine.call("answer") == 42
    assert len(list((tmp_path / "cache").glob("*.cwasm"))) == 2


# -- host calls that take long ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", ["map", "copy"])
def test_stop_reaches_a_host_call_that_reads_for_long(
    engine_of: EngineOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: str
) -> None:
    path = tmp_path / "m"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    engine = engine_of(forwarding(max_pages=20000), load=load)
    fd = open_guest(engine, path)
    engine.call("grow", 4096)
    engine.memory.write(SCRATCH, (1 << 20).to_bytes(4, "little") + (240 << 20).to_bytes(4, "little"))

    def slow(fd: int, buffer: memoryview, offset: int) -> int:
        time.sleep(0.05)
        return len(buffer)

    monkeypatch.setattr(files, "_read_once", slow)
    after(0.1, engine.cancel)
    began = time.monotonic()
    with pytest.raises(GuestStoppedError, match="did not end in time"):
        if load == "map":
            engine.call("fd_read", fd, SCRATCH, 1, SCRATCH + 64)
        else:
            engine.call("map_file", fd, 0, 1 << 29, SCRATCH + 64)
    assert time.monotonic() - began < 1


# -- callbacks --------------------------------------------------------------------------------------------------------

CALLER = f"""
(func (export "call_back") (param $id i32) (result i32)
  (call $callback (i32.const 1) (local.get $id) (i32.const {SCRATCH})))
(func (export "trap_after") (param $id i32)
  (if (call $callback (i32.const 1) (local.get $id) (i32.const {SCRATCH})) (then unreachable)))
(func (export "idle") (result i32) i32.const 1)
(func (export "spawn") (param i32) (result i32) (call $thread_spawn (local.get 0)))
(func (export "pw_thread_start") (param i32 i32)
  (if (call $callback (i32.const 1) (local.get 1) (i32.const {SCRATCH})) (then unreachable)))
"""


@pytest.fixture
def caller(engine_of: EngineOf) -> Engine:
    engine = engine_of(guest(CALLER, uses=("callback", "thread_spawn")))
    engine.callback_signatures = {1: Signature("i32", ())}
    return engine


class NamelessError(Exception):
    def __str__(self) -> str:
        raise ZeroDivisionError("no text")


@pytest.mark.parametrize(
    "kind", [ValueError, StopIteration, GeneratorExit, SystemExit, KeyboardInterrupt, BaseException, NamelessError]
)
def test_whatever_a_callback_raises_is_what_the_caller_gets(caller: Engine, kind: type[BaseException]) -> None:
    raised = kind()

    def func() -> int:
        raise raised

    func_id = caller.register(func)
    with pytest.raises(kind) as caught:
        caller.call("call_back", func_id)
    assert caught.value is raised
    assert caller.call("idle") == 1
    with pytest.raises(GuestTrapError, match=f"a Python callback raised {kind.__name__}") as died:
        caller.call("trap_after", func_id)
    assert died.value.__cause__ is raised
    assert caller.is_dead


def test_exception_without_a_text_in_a_guest_thread_ends_the_guest(caller: Engine) -> None:
    def func() -> int:
        raise NamelessError

    func_id = caller.register(func)
    with pytest.raises(GuestDiedError, match="a Python callback raised NamelessError"):
        caller.call("spawn", func_id)
        while True:
            caller.call("idle")
            time.sleep(0.001)


def test_callbacks_and_calls_that_nest_without_end_are_an_ordinary_error(caller: Engine) -> None:
    depth = 0

    def func() -> object:
        nonlocal depth
        depth += 1
        return caller.call("call_back", func_id)

    func_id = caller.register(func)
    with pytest.raises(RecursionError):
        caller.call("call_back", func_id)
    assert depth > 20
    assert caller.call("idle") == 1


def test_call_from_the_end_of_pythons_stack_never_fails_half_way(
    caller: Engine, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host function that cannot even begin would answer with whatever lies on the stack."""
    lost: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", lost.append)
    answer = caller.register(lambda: 3)
    outcomes: set[object] = set()

    def deep(n: int) -> object:
        return deep(n - 1) if n else caller.call("call_back", answer)

    for n in range(880, 1000):

        def func(n: int = n) -> object:
            return deep(n)

        func_id = caller.register(func)
        try:
            outcomes.add(caller.call("call_back", func_id))
        except RecursionError:
            outcomes.add("RecursionError")
        caller.unregister(func_id)
    assert outcomes == {0, "RecursionError"}
    assert lost == [] and capfd.readouterr().err == ""


def test_two_engines_in_a_loop_never_get_each_others_errors(engine_of: EngineOf) -> None:
    """One raises and traps, the other works: wasmtime-py's own host functions would mix them up."""
    over = threading.Event()
    wrong: list[object] = []
    n_good = 0

    def good() -> None:
        nonlocal n_good
        engine = engine_of(guest(CALLER, uses=("callback", "thread_spawn")))
        engine.callback_signatures = {1: Signature("i32", ())}
        func_id = engine.register(lambda: 5)
        while not over.is_set():
            try:
                if engine.call("call_back", func_id) != 0 or engine.memory.u32(SCRATCH) != 5:
                    wrong.append("answer")
                n_good += 1
            except Exception as error:  # noqa: BLE001
                wrong.append(error)
                return

    thread = threading.Thread(target=good)
    thread.start()

    def func() -> int:
        raise LookupError(round_)

    for round_ in range(int(os.environ.get("PYLLAMA_WASM_ROUNDS", "150"))):
        with Engine(module=guest(CALLER, uses=("callback", "thread_spawn")), n_threads=1) as engine:
            engine.callback_signatures = {1: Signature("i32", ())}
            func_id = engine.register(func)
            for _ in range(5):
                with pytest.raises(LookupError) as caught:
                    engine.call("call_back", func_id)
                assert caught.value.args == (round_,)
            with pytest.raises(GuestTrapError, match=f"LookupError: {round_}$"):
                engine.call("trap_after", func_id)
    over.set()
    thread.join(10)
    assert wrong == [] and n_good > 100
