"""Runs a WebAssembly command (a program with a ``main``) in the product's sandbox, with more granted than usual.

The pieces are the product's own: memory, mapping, guest threads, ``host.*`` calls. What differs: ``_start`` is called
instead of single exports, and WASI has arguments and folders (`folders.py`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import wasmtime

from pyllama_wasm.errors import HostError
from pyllama_wasm.host import ffi
from pyllama_wasm.host.blas import Blas
from pyllama_wasm.host.callbacks import Callbacks
from pyllama_wasm.host.failure import Failures
from pyllama_wasm.host.host_calls import HostCalls
from pyllama_wasm.host.import_table import MEMORY_IMPORT
from pyllama_wasm.host.imports import _answer
from pyllama_wasm.host.log import GuestLog
from pyllama_wasm.host.mapping import FileMapping
from pyllama_wasm.host.memory import Flag, Memory
from pyllama_wasm.host.module import _SETTINGS
from pyllama_wasm.host.pages import platform_pages
from pyllama_wasm.host.shared_memory import MAX_PAGES, SharedMemory
from pyllama_wasm.host.threads import Workers, start_thread

from .folders import Folder, FolderWasi

_WORKER_LIMIT = 64
_STOP_WAIT_S = 10.0
_THREAD_START = ffi.FuncSig("ii")
_NO_ARGUMENTS = ffi.FuncSig("")
_ONE_NUMBER = ffi.FuncSig("i")


class Output(GuestLog):
    """Everything a program says, in order: ``host.log``, standard output and standard error."""

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[bytes] = []

    def write(self, level: int, text: bytes) -> None:
        """Take a message of ``ggml_log``."""
        self._parts.append(text)

    def write_stream(self, fd: int, text: bytes) -> None:
        """Take bytes written to standard output or error."""
        self._parts.append(text)

    @property
    def text(self) -> str:
        """All of it so far."""
        return b"".join(self._parts).decode(errors="replace")


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    exit_code: int | None
    """What it returned or passed to ``exit``; None when it was ended by a trap."""
    output: str
    trap: str
    """Why it trapped, with the backtrace, or an empty string."""
    seconds: float


@dataclass(frozen=True)
class Grants:
    """What a program may use."""

    folders: tuple[Folder, ...]
    n_threads: int = 2
    timeout_s: float = 600.0
    is_deterministic: bool = False
    is_blas: bool = False


class Program:
    """One run of one command module."""

    def __init__(self, wasm: Path, argv: Sequence[str], grants: Grants) -> None:
        engine, module = _compile(wasm, grants.is_deterministic)
        self._engine, self._grants = engine, grants
        limits = _memory_limits(module)
        self._pages = platform_pages()
        self._memory = Memory(SharedMemory(engine, limits.min, min(limits.max or MAX_PAGES, MAX_PAGES)))
        self._failures, self._output, self._stop = Failures(), Output(), Flag()
        self._workers = Workers(_WORKER_LIMIT, self._run_worker)
        self._wasi = FolderWasi(self._memory, self._output, grants.folders, argv)
        self._calls = HostCalls(
            self._memory,
            FileMapping(self._memory, self._pages),
            self._wasi.table,  # type: ignore[arg-type]  # it answers get() alike
            self._workers,
            Callbacks(),
            self._output,
            self._failures,
            Blas(self._memory, is_on=True),
        )
        self._callbacks: list[Any] = []
        self._pre = self._link(module)
        self._trap = ""
        self._trap_lock = threading.Lock()

    def run(self) -> Outcome:
        """Run ``_start`` to its end, or stop it when its time is up."""
        begun = time.monotonic()
        main = start_thread(self._run_main, "upstream-test")
        main.join(self._grants.timeout_s)
        if main.is_alive():
            self._fail(f"stopped after {self._grants.timeout_s:g} s")
        # As on any operating system, the other threads of a process end when main returns.
        self._end_threads()
        main.join(_STOP_WAIT_S)
        seconds = time.monotonic() - begun
        self._stop.detach()
        self._wasi.table.close_all()
        if main.is_alive():
            raise HostError("end the program", "it does not stop")
        self._pre.close()
        self._linker.close()
        self._memory.close(self._pages.release)
        code = None if self._trap else self._wasi.exit_code or 0
        return Outcome(code, self._output.text, self._trap, seconds)

    def _run_main(self) -> None:
        try:
            instance = ffi.Instance(self._engine, self._pre)
        except (ffi.GuestTrap, HostError) as error:
            self._fail(f"instantiate: {error}")
            return
        try:
            stop = instance.global_i32("pw_stop")
            if stop is not None:
                self._stop.attach(self._memory, stop)
            instance.bind("pw_set_n_threads", _ONE_NUMBER)(self._grants.n_threads)
            if self._grants.is_blas:
                instance.bind("pw_set_blas", _ONE_NUMBER)(1)
            instance.bind("_start", _NO_ARGUMENTS)()
        except ffi.GuestTrap as trap:
            self._trapped(trap)
        finally:
            instance.close()

    def _run_worker(self, tid: int, argument: int) -> None:
        try:
            instance = ffi.Instance(self._engine, self._pre)
        except (ffi.GuestTrap, HostError) as error:
            self._fail(f"start thread {tid}: {error}")
            return
        try:
            instance.bind("pw_thread_start", _THREAD_START)(tid, argument)
        except ffi.GuestTrap as trap:
            self._trapped(trap)
        finally:
            instance.close()

    def _trapped(self, trap: ffi.GuestTrap) -> None:
        if self._wasi.exit_code is None:
            reason = self._failures._abort_text or trap.reason
            self._fail(f"{reason}\n{trap.backtrace}")
        self._stop.set(1)

    def _fail(self, reason: str) -> None:
        """Keep the first reason and stop every thread."""
        with self._trap_lock:
            self._trap = self._trap or reason
        self._stop.set(1)

    def _end_threads(self) -> None:
        self._workers.close()
        if not self._workers.wait_until_none(_STOP_WAIT_S, lambda: self._stop.set(1)):
            self._fail("guest threads do not end")

    def _link(self, module: wasmtime.Module) -> wasmtime.InstancePre:
        linker = wasmtime.Linker(self._engine)
        missing = []
        for item in module.imports:
            name = item.name or ""
            if (item.module, name) == MEMORY_IMPORT:
                continue
            func = getattr(self._calls if item.module == "host" else self._wasi, name, None)
            sig = ffi.func_sig(item.type) if isinstance(item.type, wasmtime.FuncType) else None
            if func is None or sig is None:
                missing.append(f"{item.module}.{name}")
                continue
            callback = ffi.host_function(sig, func, _answer(f"{item.module}.{name}", self._failures))
            self._callbacks.append(callback)
            ffi.define_function(linker, item.module, name, sig, callback)
        if missing:
            raise HostError("link the program", f"nothing answers {', '.join(missing)}")
        shared = self._memory._shared
        assert shared is not None
        with wasmtime.Store(self._engine) as store:
            ffi.define_shared_memory(linker, store, *MEMORY_IMPORT, shared.pointer)
        self._linker = linker
        return linker.instantiate_pre(module)


@cache
def _engine(is_deterministic: bool) -> wasmtime.Engine:
    config = wasmtime.Config()
    for name, value in _SETTINGS.items():
        setattr(config, name, value)
    config.wasm_relaxed_simd_deterministic = is_deterministic
    return wasmtime.Engine(config)


@cache
def _compile(wasm: Path, is_deterministic: bool) -> tuple[wasmtime.Engine, wasmtime.Module]:
    engine = _engine(is_deterministic)
    return engine, wasmtime.Module.from_file(engine, str(wasm))


def _memory_limits(module: wasmtime.Module) -> wasmtime.Limits:
    for item in module.imports:
        if (item.module, item.name) == MEMORY_IMPORT and isinstance(item.type, wasmtime.MemoryType):
            return item.type.limits
    raise HostError("load the program", "it does not import a shared memory env.memory")
