"""Guest calls: values in and out, traps as typed errors, life and death of an engine."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from pyllama_wasm.errors import (
    ClosedError,
    GuestDiedError,
    GuestTrapError,
    HostError,
    OutOfMemoryError,
    RequestError,
)
from pyllama_wasm.host import ALLOWED_IMPORTS, Engine, Signature, compile_module, load_module
from pyllama_wasm.host.shared_memory import PAGE_BYTES
from tests.wasm.guests import ARITHMETIC, LOAD_STORE, SCRATCH, TRAPS, EngineOf, bare, forwarding, guest


@pytest.fixture
def arithmetic(engine_of: EngineOf) -> Engine:
    return engine_of(guest(ARITHMETIC))


def test_call_passes_every_kind_of_number(arithmetic: Engine) -> None:
    assert arithmetic.call("add", 2, 3) == 5
    assert arithmetic.call("add64", 1 << 40, 5) == (1 << 40) + 5
    assert arithmetic.call("half", 3.0) == 1.5
    assert arithmetic.call("half64", 1e300) == 5e299
    assert arithmetic.call("nothing") is None
    assert arithmetic.call("wide", 1, -2, 0.5, 0.25) == -0.25


def test_call_wraps_integers_and_answers_signed(arithmetic: Engine) -> None:
    assert arithmetic.call("add", 0xFFFFFFFF, 0) == -1
    assert arithmetic.call("add", 0x7FFFFFFF, 1) == -(1 << 31)
    assert arithmetic.call("add", (1 << 32) + 4, True) == 5
    assert arithmetic.call("add64", (1 << 64) - 1, 0) == -1
    assert arithmetic.call("add", np.int32(-1), np.uint64(3)) == 2


def test_call_refuses_wrong_arguments_and_stays_alive(arithmetic: Engine) -> None:
    with pytest.raises(TypeError, match="takes 2 arguments, got 1"):
        arithmetic.call("add", 1)
    with pytest.raises(TypeError):
        arithmetic.call("add", 1, "two")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        arithmetic.call("add", 1, 2.5)
    with pytest.raises(HostError, match="call subtract: the module exports no such function"):
        arithmetic.call("subtract", 1, 2)
    assert arithmetic.call("add", 1, 2) == 3


def test_call_on_the_engine_thread_is_fast(arithmetic: Engine) -> None:
    n = 20000

    def many() -> float:
        tracer = sys.gettrace()  # of coverage, which takes most of the time
        sys.settrace(None)
        start = time.thread_time()  # not what other programs on this machine take
        for _ in range(n):
            arithmetic.call("add", 1, 2)
        seconds = (time.thread_time() - start) / n
        sys.settrace(tracer)
        return seconds

    assert min(arithmetic.run(many) for _ in range(5)) < 10e-6


@pytest.mark.parametrize(
    ("export", "args", "reason"),
    [
        ("unreachable", (), "unreachable code reached"),
        ("divide", (0,), "integer division by zero"),
        ("load", (-8,), "out of bounds memory access"),
        ("load", (1 << 24,), "out of bounds memory access"),
        ("to_int", (1e30,), "integer overflow"),
        ("to_int", (float("nan"),), "invalid conversion to integer"),
        ("indirect", (0,), "call of a null function pointer"),
        ("indirect", (1,), "call of a function pointer of another type"),
        ("indirect", (2,), "out of bounds table access"),
        ("deep", (0,), "call stack exhausted"),
        ("throw", (), "an exception was thrown and never caught"),
    ],
)
def test_trap_kills_the_engine_with_a_typed_error(
    engine_of: EngineOf, export: str, args: tuple[float, ...], reason: str
) -> None:
    engine = engine_of(guest(TRAPS))
    with pytest.raises(GuestTrapError) as caught:
        engine.call(export, *args)
    assert (caught.value.operation, caught.value.reason) == (export, reason)
    assert engine.is_dead and not engine.is_closed
    if export != "throw":
        assert caught.value.backtrace.startswith("  0: 0x")
    with pytest.raises(GuestDiedError, match=f"divide: the sandbox died earlier: {reason}"):
        engine.call("divide", 1)
    engine.close()


def test_deep_recursion_within_the_granted_stack_works(engine_of: EngineOf) -> None:
    assert engine_of(guest(TRAPS)).call("recurse_to", 50_000) == 50_000


def test_run_passes_results_and_exceptions_through(arithmetic: Engine) -> None:
    assert arithmetic.run(lambda: "anything") == "anything"
    with pytest.raises(ZeroDivisionError):
        arithmetic.run(lambda: 1 // 0)
    assert arithmetic.run(lambda: arithmetic.run(lambda: arithmetic.call("add", 1, 1))) == 2


def test_jobs_take_turns_in_order_of_arrival(arithmetic: Engine) -> None:
    order: list[int] = []
    gate = threading.Event()
    blocker = threading.Thread(target=arithmetic.run, args=(gate.wait,))
    blocker.start()
    threads = []
    for i in range(8):
        thread = threading.Thread(target=arithmetic.run, args=(lambda i=i: order.append(i),))
        thread.start()
        threads.append(thread)
        time.sleep(0.02)
    gate.set()
    for thread in [blocker, *threads]:
        thread.join(10)
    assert order == list(range(8))


def test_many_threads_call_at_once(arithmetic: Engine) -> None:
    wrong: list[object] = []

    def work(base: int) -> None:
        wrong.extend(i for i in range(300) if arithmetic.call("add", base, i) != base + i)

    threads = [threading.Thread(target=work, args=(1000 * n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert wrong == []


def test_close_is_idempotent_and_later_use_is_a_clear_error(arithmetic: Engine) -> None:
    arithmetic.close()
    arithmetic.close()
    assert arithmetic.is_closed
    with pytest.raises(ClosedError, match="add: the engine is closed"):
        arithmetic.call("add", 1, 2)
    with pytest.raises(ClosedError):
        arithmetic.run(lambda: None)
    with pytest.raises(ClosedError):
        arithmetic.memory.read(0, 1)
    arithmetic.cancel()


def test_close_fails_the_jobs_that_wait(arithmetic: Engine) -> None:
    begun, gate = threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def first() -> None:
        begun.set()
        gate.wait(10)

    def waiting() -> None:
        try:
            arithmetic.call("nothing")
        except ClosedError as error:
            errors.append(error)

    threads = [threading.Thread(target=arithmetic.run, args=(first,)), threading.Thread(target=waiting)]
    threads[0].start()
    begun.wait(10)
    threads[1].start()
    time.sleep(0.05)
    closer = threading.Thread(target=arithmetic.close)
    closer.start()
    time.sleep(0.05)
    gate.set()
    for thread in [*threads, closer]:
        thread.join(10)
        assert not thread.is_alive()
    assert [str(error) for error in errors] == ["nothing: the engine was closed"]


def test_close_from_a_job_takes_effect_after_it(arithmetic: Engine) -> None:
    def job() -> object:
        arithmetic.close()
        return arithmetic.call("add", 20, 22)

    assert arithmetic.run(job) == 42
    arithmetic.close()
    with pytest.raises(ClosedError):
        arithmetic.call("nothing")


def test_forgotten_engine_is_closed_without_the_cycle_collector() -> None:
    gc.collect()
    gc.disable()
    try:
        engine = Engine(module=guest(ARITHMETIC), n_threads=1)
        memory = engine.memory
        gone = weakref.ref(engine)
        engine.call("nothing")
        del engine
        assert gone() is None
        deadline = time.monotonic() + 5
        with pytest.raises(ClosedError):
            while time.monotonic() < deadline:
                memory.read(0, 1)
                time.sleep(0.01)
    finally:
        gc.enable()


def test_memory_limit_is_the_ceiling_of_the_guest(engine_of: EngineOf) -> None:
    engine = engine_of(guest(LOAD_STORE), memory_limit_bytes=10 * 65536 + 5)
    assert engine.memory.max_bytes == 10 * 65536
    assert engine.call("grow", 8) == 2
    assert engine.call("grow", 1) == -1
    assert engine.memory.size_bytes == 10 * 65536
    with pytest.raises(RequestError, match="memory_limit_bytes=65536 is below"):
        Engine(module=guest(LOAD_STORE), memory_limit_bytes=65536)


def test_closed_engine_is_not_taken_for_a_later_thread_of_the_same_number(engine_of: EngineOf) -> None:
    closed = [engine_of(guest(ARITHMETIC)) for _ in range(8)]
    for engine in closed:
        engine.close()
    wrong: list[object] = []

    def use() -> None:
        for engine in closed:
            with suppress(ClosedError):
                wrong.append(engine.call("nothing"))

    # Threads started now get the identifiers of the engines' threads.
    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert wrong == []


@pytest.mark.skipif(sys.platform != "linux", reason="limits address space")
def test_missing_address_space_is_a_typed_error() -> None:
    script = """
import resource
from pyllama_wasm.errors import HostError
from pyllama_wasm.host import Engine
from tests.wasm.guests import ARITHMETIC, guest
module = guest(ARITHMETIC, max_pages=65535)
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
try:
    Engine(module=module)
except HostError as error:
    print(str(error).partition(":")[0])
"""
    repository = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "reserve the sandbox's memory\n"), done.stderr


def test_engine_refuses_bad_options() -> None:
    with pytest.raises(RequestError, match="load='mmap'"):
        Engine(module=guest(LOAD_STORE), load="mmap")
    with pytest.raises(RequestError, match="n_threads=0"):
        Engine(module=guest(LOAD_STORE), n_threads=0)


# -- what a module may import -----------------------------------------------------------------------------------------


def test_module_with_foreign_imports_is_refused_by_name() -> None:
    memory = '(import "env" "memory" (memory 1 2 shared))'
    offers = r"does not offer: env\.system, host\.log as \(i32\) -> i32 instead of"
    with pytest.raises(HostError, match=offers) as caught:
        bare(
            f"""(module {memory} (import "env" "system" (func (param i32)))
            (import "host" "log" (func (param i32) (result i32))))"""
        )
    assert "(i32, i32, i32)" in str(caught.value)
    with pytest.raises(HostError, match=r"env\.other"):
        bare(f'(module {memory} (import "env" "other" (global i32)))')
    with pytest.raises(HostError, match="does not import a shared memory"):
        bare("(module (memory 1))")
    with pytest.raises(HostError, match="compile the module"):
        compile_module(b"\0asm not really")


def test_imports_are_few_and_every_one_is_linked(engine_of: EngineOf) -> None:
    assert len(ALLOWED_IMPORTS) == 19
    assert {module for module, _ in ALLOWED_IMPORTS} == {"host", "wasi_snapshot_preview1"}
    assert engine_of(forwarding()).call("fd_close", 99) == 8


def test_failing_constructor_is_a_typed_error() -> None:
    with pytest.raises(GuestTrapError, match="_initialize: unreachable"):
        Engine(module=guest('(func (export "_initialize") unreachable)'), n_threads=1)


def test_a_start_that_memory_does_not_suffice_for_says_so() -> None:
    module = load_module()
    start = module.min_pages * PAGE_BYTES
    with pytest.raises(OutOfMemoryError, match=f"starts with {start} bytes and may grow by 65536") as caught:
        Engine(module=module, memory_limit_bytes=start + PAGE_BYTES, n_threads=1)
    enough = int(re.findall(r"at least (\d+)", caught.value.hint)[0])
    with Engine(module=module, memory_limit_bytes=enough, n_threads=1) as engine:
        assert engine.memory.max_bytes == enough
    with pytest.raises(OutOfMemoryError):
        Engine(module=module, memory_limit_bytes=enough - PAGE_BYTES, n_threads=1)
    with pytest.raises(GuestTrapError, match="start the module: unreachable"):
        Engine(module=guest("(func $go unreachable) (start $go)"), n_threads=1)


def test_start_tells_the_number_of_threads(engine_of: EngineOf) -> None:
    body = """(global $n (mut i32) (i32.const 0))
      (func (export "_initialize") (global.set $n (i32.const 100)))
      (func (export "pw_set_n_threads") (param i32) (global.set $n (i32.add (global.get $n) (local.get 0))))
      (func (export "n") (result i32) global.get $n)"""
    assert engine_of(guest(body), n_threads=3).call("n") == 103


# -- callbacks --------------------------------------------------------------------------------------------------------

_CALLBACK = f"""
(func (export "call_back") (param $kind i32) (param $id i32) (result i32)
  (if (call $callback (local.get $kind) (local.get $id) (i32.const {SCRATCH})) (then unreachable))
  (i32.load (i32.const {SCRATCH})))
(func (export "ignore_error") (param $id i32) (result i32)
  (call $callback (i32.const 1) (local.get $id) (i32.const {SCRATCH})))
(func (export "double") (param i32) (result i32) (i32.mul (local.get 0) (i32.const 2)))
(func (export "store") (param i32 i32) local.get 0 local.get 1 i32.store)
"""


@pytest.fixture
def caller(engine_of: EngineOf) -> Engine:
    engine = engine_of(guest(_CALLBACK, uses=("callback",)))
    engine.callback_signatures = {1: Signature("i32", ()), 2: Signature("i32", ("i32", "ptr", "f32"))}
    return engine


def test_callback_gets_arguments_and_gives_a_result(caller: Engine) -> None:
    seen: list[tuple[object, ...]] = []

    def func(*args: object) -> int:
        seen.append(args)
        return -5

    caller.memory.write(SCRATCH + 8, (-3 & (1 << 64) - 1).to_bytes(8, "little"))
    caller.memory.write(SCRATCH + 16, (0xFFFFFFF0).to_bytes(8, "little"))
    caller.memory.write(SCRATCH + 24, b"\0\0\x80\x3f" + bytes(4))
    assert caller.call("call_back", 2, caller.register(func)) == -5
    assert seen == [(-3, 0xFFFFFFF0, 1.0)]


def test_callback_may_call_its_own_engine_again(caller: Engine) -> None:
    def func() -> int:
        inner = caller.run(lambda: caller.call("double", 10))
        assert isinstance(inner, int)
        return inner + 1

    def outer() -> object:
        return caller.call("call_back", 1, nested)

    nested = caller.register(func)
    assert caller.call("call_back", 1, caller.register(outer)) == 21


def test_raising_callback_kills_the_guest_and_is_told(caller: Engine) -> None:
    def func() -> int:
        raise LookupError("no such thing")

    with pytest.raises(GuestTrapError, match="a Python callback raised LookupError: no such thing") as caught:
        caller.call("call_back", 1, caller.register(func))
    assert isinstance(caught.value.__cause__, LookupError)
    assert caller.is_dead


def test_exception_of_a_callback_is_raised_when_the_guest_goes_on(caller: Engine) -> None:
    def func() -> int:
        raise LookupError("no such thing")

    func_id = caller.register(func)
    with pytest.raises(LookupError, match="no such thing"):
        caller.call("ignore_error", func_id)
    assert not caller.is_dead
    assert caller.call("double", 4) == 8


def test_unregistered_callback_is_refused(caller: Engine) -> None:
    func_id = caller.register(lambda: 1)
    assert caller.call("call_back", 1, func_id) == 1
    caller.unregister(func_id)
    caller.unregister(func_id)
    with pytest.raises(HostError, match=f"callback {func_id} is not registered"):
        caller.call("ignore_error", func_id)
    with pytest.raises(GuestTrapError, match="callback kind 9 is not registered"):
        caller.call("call_back", 9, caller.register(lambda: 1))


def test_exceptions_of_two_engines_do_not_mix(engine_of: EngineOf) -> None:
    engines = [engine_of(guest(_CALLBACK, uses=("callback",))) for _ in range(4)]
    wrong: list[object] = []

    def work(n: int, engine: Engine) -> None:
        engine.callback_signatures = {1: Signature("i32", ())}

        def func() -> int:
            time.sleep(0.0005)
            raise LookupError(n)

        func_id = engine.register(func)
        for _ in range(50):
            try:
                engine.call("ignore_error", func_id)
            except LookupError as error:
                if error.args != (n,):
                    wrong.append(error)
            else:
                wrong.append(n)

    threads = [threading.Thread(target=work, args=item) for item in enumerate(engines)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert wrong == []
