"""Every instruction that fills or copies memory is a call with safepoints, in the committed module and in any other."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import wasmtime

ROOT = Path(__file__).parents[2]

# Has an instruction of every form of immediates, and constants that look like the instructions sought.
GUEST = """(module (memory (export "memory") 64 64 shared) (table 2 funcref) (tag $t (param i32))
(func $pw_memory_fill (param i32 i32 i32)
  (memory.fill (local.get 0) (i32.const 7) (local.get 2)))
(func $pw_memory_copy (param i32 i32 i32)
  (memory.copy (local.get 0) (local.get 1) (local.get 2)))
(func (export "run") (param $n i32) (result i32) (local $v v128) (local $l i64)
  (local.set $v (v128.const i8x16 0xfc 11 0 0xfc 10 0 0 0xfc 11 0 0 0 0 0 0 0))
  (local.set $v (i8x16.shuffle 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 (local.get $v) (local.get $v)))
  (v128.store (i32.const 64) (local.get $v)) (drop (i8x16.extract_lane_u 3 (local.get $v)))
  (drop (v128.load8_lane 2 (i32.const 64) (local.get $v)))
  (drop (i32.atomic.rmw.add (i32.const 128) (i32.const 1))) (atomic.fence)
  (local.set $l (i64.const 0x000bfc)) (drop (f32.const 1)) (drop (f64.const 2))
  (block $b (br_table $b $b (i32.const 0)))
  (drop (block $c (result i32) (try_table (catch $t $c) (throw $t (i32.const 5))) (i32.const 0)))
  (drop (select (result i32) (i32.const 1) (i32.const 2) (i32.const 0)))
  (drop (ref.is_null (ref.null func))) (drop (table.size)) (drop (i32.trunc_sat_f32_s (f32.const 1)))
  (memory.fill (i32.const 1024) (i32.const 9) (local.get $n))
  (memory.copy (i32.const 1030) (i32.const 1024) (local.get $n))
  (i32.load8_u (i32.const 1036))))"""


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("memory_calls", ROOT / "wasm" / "memory_calls.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(module: bytes, n: int) -> int:
    config = wasmtime.Config()
    config.shared_memory = config.wasm_exceptions = True
    store = wasmtime.Store(wasmtime.Engine(config))
    exports = wasmtime.Instance(store, wasmtime.Module(store.engine, module), []).exports(store)
    function = exports["run"]
    assert isinstance(function, wasmtime.Func)
    result: int = function(store, n)
    return result


def test_the_committed_module_has_none_left(tool: ModuleType) -> None:
    module = (ROOT / "wasm" / "llama.wasm").read_bytes()
    assert tool.rewrite(module) == (module, 0)


def test_instructions_become_calls_and_nothing_else_moves(tool: ModuleType) -> None:
    module = bytes(wasmtime.wat2wasm(GUEST))
    assert run(module, 12) == 9
    rewritten, count = tool.rewrite(module)
    assert count == 2 and len(rewritten) == len(module)
    assert sum(a != b for a, b in zip(module, rewritten, strict=True)) <= 7
    assert run(rewritten, 12) == 7  # what the function fills with
    assert tool.rewrite(rewritten) == (rewritten, 0)


def test_a_module_without_the_functions_and_code_that_is_none_are_refused(tool: ModuleType) -> None:
    with pytest.raises(KeyError):
        tool.rewrite(bytes(wasmtime.wat2wasm("(module (memory 1) (func (memory.fill)))".replace(
            "(memory.fill)", "(memory.fill (i32.const 0) (i32.const 0) (i32.const 9))"))))  # fmt: skip
    with pytest.raises(ValueError, match="unknown instruction 0x06"):
        list(tool.instructions(b"\x00\x06\x0b", 0, 3))
    with pytest.raises(ValueError, match="do not end where it does"):
        list(tool.instructions(b"\x00\x43\x00\x0b", 0, 4))
    with pytest.raises(ValueError, match="link the runtime earlier"):
        tool.padded_call(1 << 14, 3)
    assert tool.padded_call(5, 3) == b"\x10\x85\x00"
