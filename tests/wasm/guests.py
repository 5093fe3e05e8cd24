"""Hand-written guests for the tests of the host: small WAT modules with the exports the real module has."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import wasmtime

from pyllama_wasm.host import ALLOWED_IMPORTS, CompiledModule, Engine, compile_module

EngineOf = Callable[..., Engine]
"""The fixture ``engine_of``."""

STOP, CANCEL = 1024, 1028
"""Addresses of the flags in every guest made by :func:`guest`."""

SCRATCH = 4096
"""Where tests put their data."""

_KINDS = {"i": "i32", "I": "i64", "f": "f32", "F": "f64"}


def imports(*names: str) -> str:
    """Return the WAT lines that import host functions, as ``$name``."""
    lines = []
    for (module, name), sig in ALLOWED_IMPORTS.items():
        if name in names:
            params = " ".join(_KINDS[code] for code in sig.params)
            result = f"(result {_KINDS[sig.result]})" if sig.result else ""
            lines.append(f'(import "{module}" "{name}" (func ${name} (param {params}) {result}))')
    return "\n".join(lines)


def guest(
    body: str, uses: tuple[str, ...] = (), min_pages: int = 2, max_pages: int = 256, interruptible: bool = False
) -> CompiledModule:
    """Compile a guest: ``body`` with the memory, the two flags and the named imports around it."""
    return bare(
        f"""(module
        (import "env" "memory" (memory {min_pages} {max_pages} shared))
        {imports(*uses)}
        (export "memory" (memory 0))
        (global (export "pw_stop") i32 (i32.const {STOP}))
        (global (export "pw_cancel") i32 (i32.const {CANCEL}))
        {body})""",
        interruptible,
    )


def bare(text: str, interruptible: bool = False) -> CompiledModule:
    """Compile a whole module as it is."""
    return _compiled(text, interruptible)


@cache
def _compiled(text: str, interruptible: bool) -> CompiledModule:
    return compile_module(bytes(wasmtime.wat2wasm(text)), interruptible)


def forwarding(max_pages: int = 256) -> CompiledModule:
    """A guest that exports every import under its own name, and plain loads and stores."""
    functions = []
    for (_, name), sig in ALLOWED_IMPORTS.items():
        params = " ".join(_KINDS[code] for code in sig.params)
        result = f"(result {_KINDS[sig.result]})" if sig.result else ""
        get = " ".join(f"local.get {i}" for i in range(len(sig.params)))
        functions.append(f'(func (export "{name}") (param {params}) {result} {get} call ${name})')
    every = tuple(name for _, name in ALLOWED_IMPORTS)
    return guest(LOAD_STORE + "\n".join(functions), uses=every, max_pages=max_pages)


LOAD_STORE = """
(func (export "load") (param i32) (result i32) local.get 0 i32.load)
(func (export "store") (param i32 i32) local.get 0 local.get 1 i32.store)
(func (export "grow") (param i32) (result i32) local.get 0 memory.grow)
(func (export "size") (result i32) memory.size)
(func (export "trap") unreachable)
"""

ARITHMETIC = """
(func (export "add") (param i32 i32) (result i32) local.get 0 local.get 1 i32.add)
(func (export "add64") (param i64 i64) (result i64) local.get 0 local.get 1 i64.add)
(func (export "half") (param f32) (result f32) local.get 0 f32.const 0.5 f32.mul)
(func (export "half64") (param f64) (result f64) local.get 0 f64.const 0.5 f64.mul)
(func (export "nothing"))
(func (export "wide") (param i32 i64 f32 f64) (result f64)
  local.get 0 f64.convert_i32_u local.get 1 f64.convert_i64_s f64.add
  local.get 2 f64.promote_f32 f64.add local.get 3 f64.add)
"""

TRAPS = """
(type $none (func))
(type $number (func (result i32)))
(table 2 funcref)
(elem (i32.const 1) $answer)
(func $answer (result i32) i32.const 42)
(func (export "unreachable") unreachable)
(func (export "divide") (param i32) (result i32) i32.const 1 local.get 0 i32.div_s)
(func (export "load") (param i32) (result i32) local.get 0 i32.load)
(func (export "to_int") (param f64) (result i32) local.get 0 i32.trunc_f64_s)
(func (export "indirect") (param i32) local.get 0 call_indirect (type $none))
(func $deep (export "deep") (param i32) (result i32) local.get 0 i32.const 1 i32.add call $deep i32.const 1 i32.add)
(func $recurse_to (export "recurse_to") (param i32) (result i32)
  local.get 0 i32.eqz if (result i32) i32.const 0 else local.get 0 i32.const 1 i32.sub call $recurse_to i32.const 1
  i32.add end)
(tag $oops)
(func (export "throw") throw $oops)
"""

SPIN = f"""
(func $poll (i32.load (i32.const {STOP})) (if (then unreachable)))
(func (export "spin") (loop $again call $poll br $again))
(func (export "spin_politely") (result i32)
  (loop $again call $poll (br_if $again (i32.eqz (i32.load (i32.const {CANCEL})))))
  i32.const 7)
(func (export "spin_and_clear_stop") (loop $again
  call $poll call $poll call $poll call $poll call $poll call $poll call $poll call $poll
  (i32.store (i32.const {STOP}) (i32.const 0)) br $again))
(func (export "idle") (result i32) i32.const 1)
"""

THREADS = f"""
(func $poll (i32.load (i32.const {STOP})) (if (then unreachable)))
(func $pause (param $at i32) (param $while i32)
  (drop (memory.atomic.wait32 (local.get $at) (local.get $while) (i64.const 20000000))) call $poll)
;; A thread's argument is the address of: a command, then a word it adds one to when it is done.
(func (export "pw_thread_start") (param $tid i32) (param $arg i32)
  (if (i32.eq (i32.load (local.get $arg)) (i32.const 1)) (then unreachable))
  (if (i32.eq (i32.load (local.get $arg)) (i32.const 2)) (then (drop (i32.load (i32.const -4)))))
  (if (i32.eq (i32.load (local.get $arg)) (i32.const 3)) (then (loop $again call $poll br $again)))
  (if (i32.eq (i32.load (local.get $arg)) (i32.const 4)) (then
     (loop $again (call $pause (local.get $arg) (i32.const 4))
       (br_if $again (i32.eq (i32.atomic.load (local.get $arg)) (i32.const 4))))))
  (if (i32.eq (i32.load (local.get $arg)) (i32.const 5)) (then
     (call $abort (i32.const 2048) (i32.const 12))
     (i32.atomic.store (i32.const {STOP}) (i32.const 1)) unreachable))
  (if (i32.eq (i32.load (local.get $arg)) (i32.const 6)) (then (call $log (i32.const 2) (i32.const 2048)
     (i32.const 12))))
  (if (i32.eq (i32.load (local.get $arg)) (i32.const 7)) (then
     (drop (call $callback (i32.const 1) (i32.const 1) (i32.const 3072)))))
  (drop (i32.atomic.rmw.add (i32.add (local.get $arg) (i32.const 4)) (i32.const 1)))
  (drop (memory.atomic.notify (i32.add (local.get $arg) (i32.const 4)) (i32.const 1))))
(func (export "spawn") (param i32) (result i32) local.get 0 call $thread_spawn)
(func (export "wait_for") (param $at i32) (param $value i32)
  (loop $again
    (if (i32.ne (i32.atomic.load (local.get $at)) (local.get $value)) (then
      (call $pause (local.get $at) (i32.atomic.load (local.get $at))) br $again))))
(data (i32.const 2048) "thread says!")
"""
THREAD_IMPORTS = ("thread_spawn", "abort", "log", "callback")
