"""Small modules that are loaded through the cache of compiled code; the fixture ``cache`` gives it a folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import wasmtime

from pyllama_wasm.host import Engine, load_module, module

posix = pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")


def wasm_file(folder: Path, answer: int = 42, name: str = "guest.wasm") -> Path:
    """Write a module whose ``answer`` returns a number."""
    text = f"""(module (import "env" "memory" (memory 1 10 shared))
      (func (export "answer") (result i32) i32.const {answer}))"""
    path = folder / name
    path.write_bytes(bytes(wasmtime.wat2wasm(text)))
    return path


def load_afresh(path: Path, stages: list[str] | None = None) -> int:
    """Load as a new process would, and return what the guest answers."""
    module._loads.clear()
    stages = [] if stages is None else stages
    with Engine(module=load_module(path, stages.append), n_threads=1) as engine:
        answer = engine.call("answer")
    assert isinstance(answer, int)
    return answer


def is_compiled(stages: list[str]) -> bool:
    """Tell whether a load has compiled the module."""
    return any(stage.startswith("compiling") for stage in stages)
