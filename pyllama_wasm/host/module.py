"""The compiled module: machine code that every engine of this process shares."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import wasmtime

from ..errors import HostError, reason_of
from . import ffi
from .cache import CodeCache, cache_key, digest, file_digest
from .import_table import ALLOWED_IMPORTS, MEMORY_IMPORT
from .shared_memory import MAX_PAGES
from .signals import trap_signals
from .threads import MAX_WASM_STACK_BYTES

logger = logging.getLogger("pyllama_wasm.module")

Progress = Callable[[str], None]

_SETTINGS: dict[str, object] = {
    "wasm_threads": True,
    "shared_memory": True,
    "wasm_simd": True,
    "wasm_relaxed_simd": True,
    "wasm_exceptions": True,
    # What the module has no use for, a module that is not ours shall not have either.
    "wasm_multi_memory": False,
    "wasm_memory64": False,
    "wasm_gc": False,
    "wasm_function_references": False,
    "wasm_tail_call": False,
    "wasm_stack_switching": False,
    "wasm_custom_page_sizes": False,
    "wasm_wide_arithmetic": False,
    "wasm_component_model": False,
    "cranelift_opt_level": "speed",
}
"""No fuel, and epochs only on demand: they cost a quarter of the speed, and our module has interrupt points."""

_DETERMINISTIC = "wasm_relaxed_simd_deterministic"
"""NaN is not made the same everywhere (``cranelift_nan_canonicalization``): that costs a tenth more, and what of a NaN
may differ, its sign and payload, decides nothing."""

_WAIT_SLICE_S = 0.05


@dataclass(frozen=True)
class CompiledModule:
    """A module ready to be instantiated, and what its own text says about it."""

    engine: wasmtime.Engine
    module: wasmtime.Module
    exports: Mapping[str, ffi.FuncSig]
    """The exported functions that can be called with plain numbers."""
    min_pages: int
    max_pages: int
    digest: str
    """Names the content of the wasm file, see :func:`cache.digest`."""
    is_interruptible: bool = False
    """Whether wasmtime can stop it wherever it is, without its help."""
    is_deterministic: bool = False
    """Whether its relaxed vector instructions give the same bits on every processor."""


def compile_module(wasm: bytes, interruptible: bool = False, deterministic: bool = False) -> CompiledModule:
    """Compile ``wasm`` now, without the cache. Raises ``HostError`` when it is invalid or its imports are not ours.

    A module that is not ours has no safepoints, and must be ``interruptible`` to be stopped when it does not end: its
    code then looks at every loop and function whether it is to go on, and what waits for ever is woken.
    ``deterministic`` code computes the same bits on every processor, at a price: what relaxed SIMD leaves open (whether
    a product is rounded before it is added, what a dot product of bytes takes them for) is then done in one way only.
    """
    engine = _wasmtime_engine(interruptible, deterministic)
    try:
        module = wasmtime.Module(engine, wasm)
    except wasmtime.WasmtimeError as error:
        raise HostError("compile the module", str(error)) from error
    return _describe(engine, module, digest(wasm), interruptible, deterministic)


def load_module(
    path: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    interruptible: bool = False,
    deterministic: bool = False,
) -> CompiledModule:
    """Return the compiled module of a wasm file: from this process, from the cache on disk, or compiled now.

    ``path`` defaults to the ``llama.wasm`` this package ships. ``progress`` is told each stage on the calling thread.
    ``interruptible`` and ``deterministic`` are as in :func:`compile_module`.
    The work is done on another thread, so that Ctrl-C is answered at once; it then goes on and fills the cache.
    Raises ``HostError``.
    """
    if path is None and not interruptible and deterministic in _kept:
        return _kept[deterministic]
    file = Path(path) if path is not None else find_wasm()
    try:
        stat = file.stat()
    except OSError as error:
        raise HostError(f"load {file}", reason_of(error)) from error
    key = (str(file.resolve()), stat.st_mtime_ns, stat.st_size, interruptible, deterministic)
    with _loads_lock:
        load = _loads.get(key)
        if load is None or load.error is not None:
            load = _loads[key] = _Load(file, interruptible, deterministic)
    return load.wait(progress)


def keep_module(deterministic: bool = False) -> None:
    """Load the package's module, and from now on return that one: for a process that is about to give up all files."""
    _kept[deterministic] = load_module(deterministic=deterministic)


def find_wasm() -> Path:
    """Return the path of ``llama.wasm``: inside the installed package, else in the source checkout around it."""
    package = Path(__file__).resolve().parent.parent
    for candidate in (package / "llama.wasm", package.parent / "wasm" / "llama.wasm"):
        if candidate.is_file():
            return candidate
    raise HostError("load llama.wasm", "the package does not contain it", "in a source checkout: make wasm")


def module_digest() -> str:
    """Return the sha256 of the package's module, in hexadecimal. Raises ``HostError`` when there is none."""
    try:
        return hashlib.sha256(find_wasm().read_bytes()).hexdigest()
    except OSError as error:
        raise HostError("hash the module", reason_of(error)) from error


class _Load:
    """One load that several callers may wait for."""

    def __init__(self, file: Path, interruptible: bool, deterministic: bool) -> None:
        self.error: BaseException | None = None
        self._file, self._how = file, (interruptible, deterministic)
        self._stages: list[str] = []
        self._result: CompiledModule | None = None
        self._done = threading.Event()
        threading.Thread(target=self._main, name="pyllama-compile", daemon=True).start()

    def wait(self, progress: Progress | None) -> CompiledModule:
        """Wait, interruptibly, and report the stages."""
        n_told = 0
        is_done = False
        while not is_done:
            is_done = self._done.wait(_WAIT_SLICE_S)
            for stage in self._stages[n_told:]:
                n_told += 1
                if progress is not None:
                    progress(stage)
        if self._result is None:
            reason = self.error.reason if isinstance(self.error, HostError) else f"{self.error!r}"
            raise HostError(f"load {self._file.name}", reason) from self.error
        return self._result

    def _main(self) -> None:
        try:
            self._result = self._load()
        except BaseException as error:
            self.error = error
        finally:
            self._done.set()

    def _load(self) -> CompiledModule:
        self._stages.append("reading the module")
        settings = _settings(*self._how)
        engine = _wasmtime_engine(*self._how)
        cache = CodeCache()
        content = file_digest(self._file)
        module = cache.load(engine, cache_key(content, settings))
        if module is not None:
            logger.debug("%s: machine code taken from %s", self._file.name, cache.folder)
            return _describe(engine, module, content, *self._how)
        wasm = self._file.read_bytes()
        self._stages.append("compiling the module (once, some seconds)")
        began = time.perf_counter()
        compiled = compile_module(wasm, *self._how)
        logger.info("%s: compiled in %.1f s", self._file.name, time.perf_counter() - began)
        self._stages.append("saving the compiled module")
        # The key is of what was compiled: the file may have been replaced since it was looked at first.
        cache.save(cache_key(compiled.digest, settings), compiled.module.serialize())
        return compiled


def _describe(
    engine: wasmtime.Engine, module: wasmtime.Module, content: str, interruptible: bool, deterministic: bool
) -> CompiledModule:
    min_pages, max_pages = _check_imports(module)
    exports = ffi.FuncExports(module)
    return CompiledModule(engine, module, exports, min_pages, max_pages, content, interruptible, deterministic)


def _check_imports(module: wasmtime.Module) -> tuple[int, int]:
    """Refuse imports that are not in the table; return the limits of the imported memory in pages."""
    limits: tuple[int, int] | None = None
    foreign = []
    for item in module.imports:
        key, ty = (item.module, item.name or ""), item.type
        if key == MEMORY_IMPORT and isinstance(ty, wasmtime.MemoryType) and ty.is_shared and not ty.is_64:
            limits = (ty.limits.min, min(ty.limits.max or 0, MAX_PAGES))
        elif not isinstance(ty, wasmtime.FuncType) or key not in ALLOWED_IMPORTS:
            foreign.append(".".join(key))
        elif ffi.func_sig(ty) != ALLOWED_IMPORTS[key]:
            foreign.append(f"{'.'.join(key)} as {ffi.func_sig(ty)} instead of {ALLOWED_IMPORTS[key]}")
    if foreign:
        raise HostError("check the module", f"it imports what this host does not offer: {', '.join(sorted(foreign))}")
    if limits is None:
        raise HostError("check the module", "it does not import a shared memory env.memory")
    return limits


_kept: dict[bool, CompiledModule] = {}
_loads: dict[tuple[str, int, int, bool, bool], _Load] = {}
_loads_lock = threading.Lock()
_engines: dict[tuple[bool, bool], wasmtime.Engine] = {}
_before_fork: list[object] = []
"""In a forked child, what it inherited. Its parent's compiler threads are gone, so it compiles on one thread."""

_engine_lock = threading.Lock()


def _settings(interruptible: bool, deterministic: bool) -> dict[str, object]:
    """Return all that the machine code depends on but the module, wasmtime and the processor."""
    return {
        **_SETTINGS,
        "max_wasm_stack": MAX_WASM_STACK_BYTES,
        "epoch_interruption": interruptible,
        _DETERMINISTIC: deterministic,
    }


def _wasmtime_engine(interruptible: bool = False, deterministic: bool = False) -> wasmtime.Engine:
    """Return one of the wasmtime engines of this process, one for each kind of code: compiled code, no state."""
    key = (interruptible, deterministic)
    with _engine_lock:
        engine = _engines.get(key)
        if engine is None:
            config = wasmtime.Config()
            if deterministic and not hasattr(type(config), _DETERMINISTIC):  # else it would become a plain attribute
                reason = "this wasmtime cannot compile for the same results on every processor"
                raise HostError("compile the module", reason, "pip install 'wasmtime>=50,<51'")
            for name, value in _settings(*key).items():
                if name == "max_wasm_stack":
                    ffi.set_max_stack(config, MAX_WASM_STACK_BYTES)
                else:
                    setattr(config, name, value)
            config.parallel_compilation = not _before_fork
            engine = wasmtime.Engine(config)
            trap_signals.note()
            _engines[key] = engine
        return engine


def _after_fork() -> None:
    """Start over in a forked child: threads and locks of wasmtime did not come along. Nothing is freed there."""
    global _engines, _loads, _loads_lock, _engine_lock
    _before_fork.extend([_engines, _loads])
    _engines, _loads = {}, {}
    _loads_lock, _engine_lock = threading.Lock(), threading.Lock()
    trap_signals.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
