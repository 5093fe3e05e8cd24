"""What a guest that means harm may use up, and how it lives with the rest of a Python process."""

from __future__ import annotations

import ast
import ctypes
import faulthandler
import os
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import wasmtime

import pyllama_wasm.host
from pyllama_wasm.errors import GuestTrapError, HostError
from pyllama_wasm.host import compile_module, signals
from pyllama_wasm.host.signals import TrapSignals, trap_signals
from tests.security.test_host_edge import MEMORY, run_python
from tests.wasm.guests import EngineOf, bare, guest
from tests.wasm.test_host_mapping import linux


def test_tables_are_bounded(engine_of: EngineOf) -> None:
    body = """(table $t 1 externref) (func (export "more") (param i32) (result i32)
      (table.grow $t (ref.null extern) (local.get 0)))"""
    engine = engine_of(guest(body))
    for n in (-1, 1 << 31, 1 << 24, 1 << 20):
        assert engine.call("more", n) == -1
    assert engine.call("more", 1000) == 1
    with pytest.raises(HostError, match="table"):
        engine_of(guest("(table 10000000 funcref)"))
    with pytest.raises(HostError, match="table"):
        engine_of(guest("(table 1 funcref) (table 1 funcref)"))


def test_exceptions_that_are_kept_are_bounded(engine_of: EngineOf) -> None:
    body = """(tag $t (param i64 i64 i64 i64 i64 i64 i64 i64)) (table $kept 1000000 exnref)
      (func (export "keep") (param $n i32)
        (loop $next
          (table.set $kept (local.get $n) (block $caught (result exnref)
            (try_table (catch_all_ref $caught) (i64.const 1) (i64.const 1) (i64.const 1) (i64.const 1) (i64.const 1)
              (i64.const 1) (i64.const 1) (i64.const 1) (throw $t)) unreachable))
          (br_if $next (local.tee $n (i32.sub (local.get $n) (i32.const 1))))))"""
    with pytest.raises(GuestTrapError, match="out of memory"):
        engine_of(guest(body)).call("keep", 999_999)


def test_compiler_refuses_what_is_too_large() -> None:
    with pytest.raises(HostError, match="compile the module"):
        compile_module(bytes(wasmtime.wat2wasm("(module)")) + b"\x01\xff\xff\xff\xff\x0f")
    with pytest.raises(HostError, match="compile the module"):
        bare(f"(module {MEMORY} (func {'(local i64)' * 60_000}))")


def test_stack_is_the_engines_own_whatever_thread_calls(engine_of: EngineOf) -> None:
    body = """(func $deep (export "deep") (param i32) (result i32)
      (i32.add (call $deep (i32.add (local.get 0) (i32.const 1))) (i32.const 1)))"""
    found: list[BaseException] = []

    def call() -> None:
        try:
            engine_of(guest(body)).call("deep", 0)
        except GuestTrapError as error:
            found.append(error)

    previous = threading.stack_size(64 << 10)
    try:
        thread = threading.Thread(target=call)
        thread.start()
    finally:
        threading.stack_size(previous)
    thread.join(30)
    assert [str(error) for error in found] == ["deep: call stack exhausted"]


def test_backtrace_is_printable_and_bounded(engine_of: EngineOf) -> None:
    name = "\\1b[2J" + "x" * 5000
    engine = engine_of(guest(f'(func (@name "{name}") (export "f") unreachable)'))
    with pytest.raises(GuestTrapError) as caught:
        engine.call("f")
    assert "\\x1b[2Jxxx" in caught.value.backtrace
    assert "\x1b" not in caught.value.backtrace and len(caught.value.backtrace) < 1000


# -- Python ------------------------------------------------------------------------------------------------------------

_FAULT_HANDLERS = """
import faulthandler, sys
from pyllama_wasm.errors import GuestTrapError
from pyllama_wasm.host import Engine
from tests.wasm.guests import TRAPS, guest

def trap(engine=None):
    for name, args in (("load", (-8,)), ("unreachable", ()), ("divide", (0,)), ("deep", (0,))):
        try:
            (engine or Engine(module=guest(TRAPS), n_threads=1)).call(name, *args)
        except GuestTrapError as error:
            print(error.reason)
        engine = None

if {first}:
    faulthandler.enable()
early = Engine(module=guest(TRAPS), n_threads=1)
(faulthandler.disable if {first} else faulthandler.enable)()
trap(early)
if {first}:
    faulthandler.disable()
    Engine(module=guest(TRAPS), n_threads=1).close()
    assert faulthandler.is_enabled()
"""


@linux
@pytest.mark.parametrize("first", [True, False])
def test_faulthandler_may_come_and_go(first: bool) -> None:
    done = run_python(_FAULT_HANDLERS.format(first=first))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "out of bounds memory access",
        "unreachable code reached",
        "integer division by zero",
        "call stack exhausted",
    ]
    assert done.stderr == ""


_CRASH = """
import ctypes
import faulthandler
faulthandler.enable()
from pyllama_wasm.errors import GuestTrapError
from pyllama_wasm.host import Engine
from tests.wasm.guests import TRAPS, guest

engines = [Engine(module=guest(TRAPS), n_threads=1) for _ in range(2)]
for engine in engines:
    faulthandler.disable()
    try:
        engine.call("load", -8)
    except GuestTrapError as error:
        print(error.reason, flush=True)
ctypes.string_at(8)
"""


@linux
def test_a_crash_of_the_host_ends_the_process_after_faulthandler_was_turned_off() -> None:
    """wasmtime passes it on to faulthandler's handler, which would return at once."""
    done = run_python(_CRASH)
    assert done.returncode == -signal.SIGSEGV
    assert done.stdout.splitlines() == ["out of bounds memory access"] * 2
    assert done.stderr == ""


_FOREIGN = """
import faulthandler
import wasmtime
wasmtime.Store(wasmtime.Engine())
faulthandler.enable()
from pyllama_wasm.errors import GuestTrapError
from pyllama_wasm.host import Engine
from tests.wasm.guests import TRAPS, guest

with Engine(module=guest(TRAPS), n_threads=1) as engine:
    try:
        engine.call("load", -8)
    except GuestTrapError as error:
        print(error.reason, faulthandler.is_enabled())
"""


@linux
def test_a_program_may_have_started_wasmtime_itself_and_faulthandler_then() -> None:
    done = run_python(_FOREIGN)
    assert (done.returncode, done.stdout, done.stderr) == (0, "out of bounds memory access True\n", "")


@linux
def test_handlers_of_wasmtime_are_known_by_their_library() -> None:
    compile_module(bytes(wasmtime.wat2wasm(f"(module {MEMORY})")))
    previous = trap_signals._actions
    assert {signal.SIGSEGV, signal.SIGILL, signal.SIGFPE} <= set(previous)
    assert signal.SIGUSR1 not in previous and not TrapSignals("darwin")._is_needed
    elsewhere = TrapSignals("darwin")
    elsewhere.note()
    elsewhere.restore()
    assert elsewhere._actions == {}
    again = TrapSignals()
    again.note()
    again.note()
    assert set(again._actions) == set(previous)


@linux
def test_a_program_is_told_that_faulthandler_writes_elsewhere() -> None:
    done = run_python("import logging\nlogging.basicConfig(format='%(message)s')\n" + _FOREIGN)
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        "faulthandler was enabled after wasmtime had been started, and is enabled anew: it writes to stderr, not to a "
        "file that it was given",
        "the sandbox died: GuestTrapError: out of bounds memory access",
    ]


@linux
def test_handlers_that_are_not_found_are_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    segv = {signal.SIGSEGV: signals._action(signal.SIGSEGV)}
    monkeypatch.setattr(signals, "_wasmtimes_actions", lambda: dict(segv))
    monkeypatch.setattr(faulthandler, "is_enabled", lambda: False)
    with caplog.at_level("WARNING", "pyllama_wasm"):
        TrapSignals().note()
    assert "wasmtime's handlers of SIGILL are not found" in caplog.text
    caplog.clear()
    monkeypatch.undo()
    with caplog.at_level("WARNING", "pyllama_wasm"):
        TrapSignals().note()
    assert caplog.text == ""


@linux
def test_an_engine_that_may_open_nothing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(signals, "_wasmtimes_actions", lambda: {signal.SIGSEGV: None})
    monkeypatch.setattr(faulthandler, "is_enabled", lambda: True)
    monkeypatch.setattr(os, "open", refused)
    known = TrapSignals()
    with pytest.raises(HostError, match="start the engine: /dev/null cannot be opened: Too many open files"):
        known.note()
    assert known._actions == {} and not known._leads_to_faulthandler


@linux
def test_handlers_of_other_libraries_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def action_of(function: object) -> object:
        address = 0 if function is None else ctypes.cast(function, ctypes.c_void_p).value  # type: ignore[arg-type]
        return ctypes.create_string_buffer(ctypes.string_at(ctypes.byref(ctypes.c_size_t(address or 0)), 8), 256)

    known = TrapSignals()
    known.note()
    put_back: list[int] = []
    libc = SimpleNamespace(sigaction=lambda number, *_: put_back.append(number), dladdr=ctypes.CDLL(None).dladdr)
    for function, is_replaced in ((None, True), (ctypes.pythonapi.Py_Main, True), (ctypes.CDLL(None).abort, False)):
        put_back.clear()
        with monkeypatch.context() as patch:
            patch.setattr(signals, "_action", lambda _number, function=function: action_of(function))
            patch.setattr(signals, "_libc", lambda: libc)
            known.restore()
        assert bool(put_back) == is_replaced


def test_nothing_rests_on_assert() -> None:
    """With ``python -O`` they are gone."""
    host = Path(pyllama_wasm.host.__file__).parent
    found = [
        f"{file.name}:{node.lineno}"
        for file in host.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Assert)
    ]
    assert found == []
