"""The host when what it stands on refuses: wasmtime, the system, a thread that is late. Typed, and nothing is left."""

from __future__ import annotations

import ctypes
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import wasmtime

from pyllama_wasm.errors import ClosedError, GuestTrapError, HostError, LimitError
from pyllama_wasm.host import Engine, FileTable, Signature, blas, cache, engine, ffi, jobs, module, threads
from pyllama_wasm.host.failure import Death, Failures
from pyllama_wasm.host.ffi import FuncSig, GuestTrap
from pyllama_wasm.host.mapping import FileMapping
from pyllama_wasm.host.memory import Memory, MemoryFault
from pyllama_wasm.host.pages import CopiedPages, PosixPages
from pyllama_wasm.host.shared_memory import SharedMemory
from pyllama_wasm.host.threads import Workers, start_thread, thread_clock
from pyllama_wasm.host.waker import Waker
from pyllama_wasm.host.wasi import Wasi
from tests.wasm.guests import ARITHMETIC, EngineOf, bare, forwarding, guest
from tests.wasm.test_host_mapping import needs_mmap
from tests.wasm.test_host_wasi import OUT, READ, WRITE, granted, open_path

EAGAIN, PAGE = -6, 65536


@pytest.fixture
def arithmetic(engine_of: EngineOf) -> Engine:
    return engine_of(guest(ARITHMETIC))


@pytest.fixture
def memory() -> Iterator[Memory]:
    made = Memory(SharedMemory(module._wasmtime_engine(True), 1, 4))
    yield made
    made.close(lambda *_: None)


def refuse(*_: object, **__: object) -> None:
    raise RuntimeError("can't start new thread")


# -- starting ----------------------------------------------------------------------------------------------------------


def test_engine_without_a_thread_is_a_typed_error_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "start_thread", refuse)
    before = len(jobs._live)
    with pytest.raises(HostError, match="start the engine's thread: can't start new thread"):
        Engine(module=guest(ARITHMETIC), n_threads=1)
    assert len(jobs._live) == before


@pytest.mark.parametrize(
    ("broken", "error", "match"),
    [
        (wasmtime.Linker, wasmtime.WasmtimeError("no memory"), "link the module: no memory"),
        (wasmtime.Linker, HostError("link", "anything"), "link: anything"),
    ],
)
def test_module_that_cannot_be_linked_is_a_typed_error(
    monkeypatch: pytest.MonkeyPatch, broken: type, error: Exception, match: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(broken, "instantiate_pre", fail)
    with pytest.raises(HostError, match=match):
        Engine(module=guest(ARITHMETIC), n_threads=1)


def test_name_that_is_defined_twice_is_a_typed_error() -> None:
    linker = wasmtime.Linker(module._wasmtime_engine())
    sig = FuncSig("i", "i")
    callback = ffi.host_function(sig, lambda x: x, lambda _: 0)
    ffi.define_function(linker, "a", "b", sig, callback)
    with pytest.raises(HostError, match=r"link a\.b: .*defined twice"):
        ffi.define_function(linker, "a", "b", sig, callback)
    linker.close()


@pytest.mark.parametrize(
    ("flag", "error"),
    [
        ('(func (export "pw_stop"))', None),
        ('(global (export "pw_stop") i64 (i64.const 1024))', None),
        ('(global (export "pw_stop") f32 (f32.const 1024))', None),
        ('(global (export "pw_stop") v128 (v128.const i32x4 1 2 3 4))', None),
        ('(global (export "pw_stop") exnref (ref.null exn))', None),
        ('(global (export "pw_stop") externref (ref.null extern))', None),
        ('(table (export "pw_stop") 1 funcref)', None),
        ('(tag (export "pw_stop"))', None),
        ('(export "pw_stop" (memory 0))', None),
        ('(global (export "pw_stop") i32 (i32.const 1026))', "not aligned"),
        ('(global (export "pw_stop") i32 (i32.const -4))', "out of bounds"),
        ('(global (export "pw_stop") i32 (i32.const 65533))', "out of bounds"),
    ],
)
def test_flag_of_any_kind_and_place_is_taken_or_refused(engine_of: EngineOf, flag: str, error: str | None) -> None:
    made = bare(f'(module (import "env" "memory" (memory 1 2 shared)) {flag})')
    if error is None:
        assert not engine_of(made).is_dead
    else:
        with pytest.raises(MemoryFault, match=error):
            engine_of(made)


@pytest.mark.parametrize(
    "params", ["v128", "exnref", "externref", "funcref", "i32 exnref", "i32) (result v128", "i32) (result i32 i32"]
)
def test_export_that_no_call_can_carry_is_as_if_it_were_not_there(engine_of: EngineOf, params: str) -> None:
    made = engine_of(guest(f'(func (export "_initialize") (param {params}) unreachable)'))
    with pytest.raises(HostError, match="call _initialize: the module exports no such function"):
        made.call("_initialize")


def test_function_that_is_not_there_cannot_be_bound(arithmetic: Engine) -> None:
    main = arithmetic._sandbox._main
    assert main is not None
    for name in ("nothing at all", "memory"):
        with pytest.raises(HostError, match=f"call {name}: the module exports no such function"):
            main.bind(name, FuncSig(""))


def test_missing_module_is_a_typed_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.module_digest() == hashlib.sha256(module.find_wasm().read_bytes()).hexdigest()
    monkeypatch.setattr(module, "__file__", str(tmp_path / "pyllama_wasm" / "host" / "module.py"))
    with pytest.raises(HostError, match="the package does not contain it"):
        module.find_wasm()
    monkeypatch.setattr(module, "find_wasm", lambda: tmp_path)
    with pytest.raises(HostError, match="hash the module"):
        module.module_digest()


def test_number_of_threads_is_that_of_the_processors_where_there_is_no_affinity(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert engine.default_n_threads() == (os.cpu_count() or 1)


# -- calls -------------------------------------------------------------------------------------------------------------


def test_host_function_that_fails_unexpectedly_is_told_and_kills_nobody(
    engine_of: EngineOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Wasi, "fd_close", lambda *_: 1 // 0)
    made = engine_of(forwarding())
    with pytest.raises(HostError, match=r"answer the guest's call of wasi_snapshot_preview1\.fd_close: ZeroDivision"):
        made.call("fd_close", 4)
    assert not made.is_dead and made.call("size") == 2


def test_host_function_whose_failure_cannot_be_told_is_a_trap() -> None:
    def fail(*_: object) -> int:
        raise MemoryError

    callback = ffi.host_function(FuncSig("i", "i"), fail, fail)
    values = (ctypes.c_uint8 * 16)()
    trap = ctypes.c_void_p(callback(0, 0, ctypes.addressof(values), 1))
    assert ffi._take_trap(trap).reason == "a host function failed twice"
    assert trap.value is None


def test_text_of_a_trap_that_cannot_be_encoded_is_replaced() -> None:
    def fail(*_: object) -> int:
        raise GuestTrap("\udcff", False, "")

    callback = ffi.host_function(FuncSig("", ""), fail, fail)
    trap = ctypes.c_void_p(callback(0, 0, 0, 0))
    assert ffi._take_trap(trap).reason == "a host function failed twice"


def test_trap_code_that_wasmtime_py_does_not_know_is_told_by_its_message(
    engine_of: EngineOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(_trap: wasmtime.Trap) -> None:
        raise ValueError("99 is not a valid TrapCode")

    monkeypatch.setattr(wasmtime.Trap, "trap_code", property(unknown))
    with pytest.raises(GuestTrapError, match="unreachable"):
        engine_of(guest('(func (export "f") unreachable)')).call("f")


def test_instance_of_a_closed_engine_is_refused(arithmetic: Engine) -> None:
    sandbox = arithmetic._sandbox
    arithmetic.close()
    with pytest.raises(HostError, match="instantiate the module: the engine is closed"):
        sandbox._linked.instantiate()
    with pytest.raises(ClosedError, match="add: the engine is closed"):
        sandbox.call("add", 1, 2)
    sandbox.memory.close(lambda *_: None)


def test_failures_without_a_listener_keep_the_first_death() -> None:
    failures = Failures()
    first = failures.record(Death(GuestTrapError, "first"))
    assert failures.record(Death(GuestTrapError, "second")) is first
    assert failures.is_stopping


def test_nothing_left_behind_is_nothing_to_raise(arithmetic: Engine) -> None:
    # Another thread may have been told meanwhile.
    arithmetic._sandbox._raise_what_happened("add")
    assert arithmetic.callback_signatures == {}
    arithmetic.callback_signatures = {1: Signature("void", ())}
    assert list(arithmetic.callback_signatures) == [1]


# -- memory and files --------------------------------------------------------------------------------------------------


def test_file_that_shrank_while_it_was_copied(memory: Memory) -> None:
    with pytest.raises(OSError, match="became shorter"):
        FileMapping(memory, CopiedPages()).map(None, 0, 10, 10, lambda _buffer, _offset: 0)


@needs_mmap
def test_pages_placed_elsewhere_are_never_used(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = PosixPages()
    monkeypatch.setattr(pages, "_mmap", lambda *_: 4096)
    with pytest.raises(OSError, match="mmap placed pages at 0x1000 instead of 0x2000"):
        pages.release(8192, 4096)


def test_kind_of_a_file_granted_for_writing(engine_of: EngineOf, tmp_path: Path) -> None:
    made = engine_of(forwarding(), blas=False)
    assert not made.uses_blas
    fd = open_path(made, granted(made, tmp_path / "new", "w"), rights=READ | WRITE)
    assert made.call("fd_fdstat_get", fd, OUT) == 0
    assert made.memory.u32(OUT + 8) & WRITE


def test_files_are_counted_and_listed(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(b"abc")
    table = FileTable()
    table.limit = 1
    table.grant(tmp_path / "m")
    with pytest.raises(LimitError, match="the sandbox may have 1 files"):
        table.grant(tmp_path / "new", "w")
    assert table.granted() == [("/model/0/m", "r", 3)]
    table.close()


# -- threads -----------------------------------------------------------------------------------------------------------


def test_guest_thread_that_the_system_refuses_is_put_off(engine_of: EngineOf, monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine_of(forwarding())
    monkeypatch.setattr(threads, "start_thread", refuse)
    assert [made.call("thread_spawn", 0) for _ in range(5)] == [EAGAIN] * 5
    assert made._sandbox.workers.wait_until_none(0, lambda: None)


def test_threads_that_do_not_end_are_waited_for_no_longer_than_said() -> None:
    gate = threading.Event()
    workers = Workers(1, lambda _tid, _argument: gate.wait(10))  # type: ignore[arg-type]
    nudges: list[int] = []
    assert workers.spawn(0) == 1
    assert not workers.wait_until_none(0.05, lambda: nudges.append(1))
    assert len(nudges) > 1
    gate.set()
    assert workers.wait_until_none(5, lambda: None)


def test_engine_whose_guest_thread_does_not_end_keeps_its_memory_and_says_so(
    engine_of: EngineOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = engine_of(guest(ARITHMETIC))
    with monkeypatch.context() as patch:
        patch.setattr(made._sandbox.workers, "wait_until_none", lambda *_: False)
        with pytest.raises(HostError, match="close the engine: a guest thread does not end, its memory is not freed"):
            made.close()
    assert made.memory.size_bytes == 2 * PAGE
    made._sandbox.shut()


def set_size_meanwhile(monkeypatch: pytest.MonkeyPatch, n_times: int) -> list[int]:
    """Have somebody else set the stack size of new threads right after this package does."""
    real = threading.stack_size
    left = [n_times]

    def stack_size(size: int = 0) -> int:
        before = real(size)
        if size == threads._THREAD_STACK_BYTES and left[0]:
            left[0] -= 1
            real(96 << 10)
        return before

    monkeypatch.setattr(threading, "stack_size", stack_size)
    return left


def test_thread_that_may_have_a_small_stack_runs_no_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.stack_size()
    ran: list[int] = []
    try:
        left = set_size_meanwhile(monkeypatch, 1)
        start_thread(lambda: ran.append(threading.get_ident()), "test").join(5)
        assert left == [0] and len(ran) == 1
        set_size_meanwhile(monkeypatch, 10)
        with pytest.raises(RuntimeError, match="keeps changing"):
            start_thread(lambda: ran.append(0), "test")
        assert threading.stack_size() == 96 << 10  # what was asked for stays
    finally:
        monkeypatch.undo()
        threading.stack_size(before)
    time.sleep(0.02)
    assert len(ran) == 1


def test_clock_of_a_thread_goes_on_when_it_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks: list[Callable[[], float]] = []
    monkeypatch.setattr(time, "clock_gettime", lambda _: os.stat("/does not exist"))
    thread = threading.Thread(target=lambda: clocks.append(thread_clock()))
    thread.start()
    thread.join()
    assert abs(clocks[0]() - time.monotonic()) < 1
    monkeypatch.delattr(time, "pthread_getcpuclockid", raising=False)
    assert thread_clock() is time.monotonic


def test_waker_leaves_a_closed_memory_alone_and_is_used_by_one_at_a_time(memory: Memory) -> None:
    assert memory._shared is not None
    waker = Waker(module._wasmtime_engine(True), memory._shared)
    waker.step()
    assert waker._at == 4 << 20
    with waker._lock:
        waker.step()
    assert waker._at == 4 << 20
    waker.step()
    assert waker._at == 4 << 20  # around once
    waker.close()
    waker.step()


# -- BLAS --------------------------------------------------------------------------------------------------------------


def test_sandbox_holds_blas_once_and_gives_it_back_once(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    counter = SimpleNamespace(
        take=lambda: told.append("take"), give_back=lambda: told.append("give back"), libraries=list
    )
    monkeypatch.setattr(blas, "_one_thread", counter)
    product = blas.Blas(memory, True)
    product._hold()
    product._hold()  # as of two threads at once
    with product._lock:
        late = threading.Thread(target=product.release)
        late.start()
        time.sleep(0.05)
        product.release()
    late.join(5)
    assert told == ["take", "give back"]


def test_older_threadpoolctl_needs_no_word_about_threads() -> None:
    numbers: list[int] = []
    blas.set_threads(SimpleNamespace(set_num_threads=numbers.append), 3)
    assert numbers == [3]


# -- the cache ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions of POSIX")
def test_folder_of_another_user_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYLLAMA_WASM_CACHE", str(tmp_path / "cache"))
    assert cache.CodeCache().folder == tmp_path / "cache"
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    assert cache.CodeCache().folder is None


def test_file_that_is_gone_is_the_oldest(tmp_path: Path) -> None:
    assert cache._modified_at(tmp_path / "gone") == 0
