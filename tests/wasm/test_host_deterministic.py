"""Code whose relaxed vector instructions do the same on every processor, and what keeps it apart from other code."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import pytest
import wasmtime

import pyllama_wasm as pw
from pyllama_wasm.errors import HostError, RequestError
from pyllama_wasm.host import Engine, compile_module, load_module, module
from tests.wasm.guests import guest

X86 = platform.machine().lower() in ("x86_64", "amd64")

RELAXED = """
(func (export "madd") (result i32)
  ;; (1 + 2^-12)^2 - (1 + 2^-11) is 2^-24, or 0 where the product is rounded first
  (i32x4.extract_lane 0 (f32x4.relaxed_madd
    (f32x4.splat (f32.const 0x1.001p0)) (f32x4.splat (f32.const 0x1.001p0)) (f32x4.splat (f32.const -0x1.002p0)))))
(func (export "dot") (result i32)
  ;; 3 * -1 + 3 * -1, or with 255 in the place of -1
  (i16x8.extract_lane_s 0 (i16x8.relaxed_dot_i8x16_i7x16_s
    (i8x16.splat (i32.const 3)) (i8x16.splat (i32.const -1)))))
(func (export "swizzle") (result i32)
  ;; what lies beyond the 16 bytes: 0, or the first of them
  (i8x16.extract_lane_u 0 (i8x16.relaxed_swizzle (i8x16.splat (i32.const 7)) (i8x16.splat (i32.const 16)))))
(func (export "trunc") (result i32)
  (i32x4.extract_lane 0 (i32x4.relaxed_trunc_f32x4_s (f32x4.splat (f32.const nan)))))
"""
ONE_WAY = {"madd": 0x33800000, "dot": -6, "swizzle": 0, "trunc": 0}


class OldProcessor(wasmtime.Config):
    """Compiles for the first x86-64 processors that wasmtime's vectors can be had on: no FMA, no AVX."""

    def __init__(self) -> None:
        super().__init__()
        if X86:
            self.target = f"x86_64-{'pc-windows-msvc' if platform.system() == 'Windows' else 'unknown-linux-gnu'}"
            for flag in ("has_sse3", "has_ssse3", "has_sse41", "has_sse42"):
                self.cranelift_flag_enable(flag)


def relaxed_wasm() -> bytes:
    text = f'(module (import "env" "memory" (memory 2 256 shared)) (export "memory" (memory 0)) {RELAXED})'
    return bytes(wasmtime.wat2wasm(text))


def answers(deterministic: bool) -> dict[str, Any]:
    """Compile as a new process would, and call everything."""
    compiled = compile_module(relaxed_wasm(), deterministic=deterministic)
    with Engine(module=compiled, n_threads=1, blas=False) as engine:
        return {name: engine.call(name) for name in ONE_WAY}


@pytest.fixture(params=["here", "old"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "old":
        monkeypatch.setattr(wasmtime, "Config", OldProcessor)
    monkeypatch.setattr(module, "_engines", {})
    name: str = request.param
    return name


def test_deterministic_code_does_what_the_specification_says_first(processor: str) -> None:
    assert answers(deterministic=True) == ONE_WAY


@pytest.mark.skipif(not X86, reason="shows what x86 does")
def test_other_code_does_what_the_processor_does_best(processor: str) -> None:
    found = answers(deterministic=False)
    assert found["dot"] == 1530 and found["swizzle"] == 7 and found["trunc"] == -(2**31)
    if processor == "old":
        assert found["madd"] == 0


def test_both_kinds_of_code_lie_in_the_cache_under_their_own_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYLLAMA_WASM_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "guest.wasm"
    path.write_bytes(relaxed_wasm())
    for is_known in (False, True):
        module._loads.clear()
        for deterministic in (True, False):
            stages: list[str] = []
            compiled = load_module(path, stages.append, deterministic=deterministic)
            assert compiled.is_deterministic == deterministic
            assert any("compiling" in stage for stage in stages) != is_known
            with Engine(module=compiled, n_threads=1) as engine:
                assert (engine.call("dot") == -6) == (deterministic or not X86)
    assert len(list((tmp_path / "cache").glob("*.cwasm"))) == 2


def test_deterministic_engine_has_no_blas_and_no_other_code() -> None:
    compiled = compile_module(relaxed_wasm(), deterministic=True)
    with Engine(module=compiled, n_threads=1, deterministic=True) as engine:
        assert engine.is_deterministic and not engine.uses_blas
    with pytest.raises(RequestError, match="contradict each other"):
        Engine(module=compiled, deterministic=True, blas=True)
    with pytest.raises(RequestError, match="was not compiled with deterministic=True"):
        Engine(module=guest(""), deterministic=True)


def test_wasmtime_that_cannot_do_it_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_engines", {})
    monkeypatch.delattr(wasmtime.Config, "wasm_relaxed_simd_deterministic")
    with pytest.raises(HostError, match="cannot compile for the same results on every processor"):
        compile_module(relaxed_wasm(), deterministic=True)


def test_parameters_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(RequestError, match="set deterministic: blas=True"):
        pw.ModelParams(deterministic=True, blas=True)
    with pytest.raises(RequestError, match="set deterministic: 1"):
        pw.ModelParams(deterministic=1)  # type: ignore[arg-type]
    assert not pw.ModelParams().deterministic
