"""The committed module: what it imports, what it exports, and that it is the build of the sources beside it."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import wasmtime

from pyllama_wasm.host.import_table import ALLOWED_IMPORTS

ROOT = Path(__file__).resolve().parents[2]
WASM = ROOT / "wasm"


@pytest.fixture(scope="module")
def module() -> wasmtime.Module:
    config = wasmtime.Config()
    config.wasm_threads = config.shared_memory = config.wasm_relaxed_simd = config.wasm_exceptions = True
    config.cranelift_opt_level = "none"
    return wasmtime.Module.from_file(wasmtime.Engine(config), str(WASM / "llama.wasm"))


@pytest.fixture(scope="module")
def manifest() -> ModuleType:
    spec = importlib.util.spec_from_file_location("wasm_manifest", WASM / "manifest.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def documented_imports() -> list[str]:
    text = (WASM / "README.md").read_text()
    section = text[text.index("## Imports") : text.index("## Exports")]
    return re.findall(r"^\| `([\w.]+)` \|", section, re.MULTILINE)


def test_imports_are_exactly_the_documented_ones(module: wasmtime.Module) -> None:
    imported = sorted(f"{item.module}.{item.name}" for item in module.imports)
    assert imported == documented_imports()


def test_host_offers_exactly_the_documented_imports() -> None:
    offered = [("env", "memory"), *ALLOWED_IMPORTS]
    assert sorted(f"{module}.{name}" for module, name in offered) == documented_imports()


def test_module_is_the_build_of_the_sources_beside_it(manifest: ModuleType) -> None:
    assert manifest.stale() == []


def test_a_changed_source_is_noticed(manifest: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = json.loads((WASM / "llama.wasm.json").read_text())
    record["inputs"]["sysroot/stop.c"] = "0" * 64
    (tmp_path / "record.json").write_text(json.dumps(record))
    monkeypatch.setattr(manifest, "RECORD", tmp_path / "record.json")
    assert manifest.stale() == ["wasm/sysroot/stop.c changed since llama.wasm was built (run wasm/build.sh)"]


def test_memory_is_shared_and_can_grow_to_4_gib(module: wasmtime.Module) -> None:
    (memory,) = [item.type for item in module.imports if isinstance(item.type, wasmtime.MemoryType)]
    assert memory.is_shared
    assert memory.limits.max == 65535
