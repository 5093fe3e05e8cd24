"""The host and the real module: what it imports, and the exports the host itself relies on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pyllama_wasm.host import ALLOWED_IMPORTS, CompiledModule, Engine, load_module
from pyllama_wasm.host.import_table import MEMORY_IMPORT

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def llama() -> CompiledModule:
    return load_module()


@pytest.fixture
def engine(llama: CompiledModule) -> Iterator[Engine]:
    with Engine(module=llama, n_threads=2) as engine:
        yield engine


def test_module_imports_nothing_that_is_not_in_the_table(llama: CompiledModule) -> None:
    imported = {(item.module, item.name or "") for item in llama.module.imports}
    assert imported - {MEMORY_IMPORT} <= set(ALLOWED_IMPORTS)
    assert MEMORY_IMPORT in imported


def test_module_exports_what_the_host_calls(llama: CompiledModule) -> None:
    for name in ("_initialize", "pw_thread_start", "pw_set_n_threads"):
        assert name in llama.exports
    names = {export.name for export in llama.module.exports}
    assert {"pw_stop", "pw_cancel", "pw_error"} <= names


def test_fresh_engine_allocates_and_frees(engine: Engine) -> None:
    pointers = [engine.call("pw_alloc", 1000) for _ in range(100)]
    assert all(isinstance(pointer, int) and pointer % 16 == 0 and pointer for pointer in pointers)
    assert len(set(pointers)) == 100
    for pointer in pointers:
        engine.memory.write(int(pointer or 0), bytes(1000))
        engine.call("pw_free", int(pointer or 0))


def test_engines_do_not_share_memory(llama: CompiledModule, engine: Engine) -> None:
    with Engine(module=llama, n_threads=1) as other:
        here, there = engine.call("pw_alloc", 16), other.call("pw_alloc", 16)
        assert here == there  # the same module in the same state
        engine.memory.write(int(here or 0), b"only in this one")
        other.memory.write(int(there or 0), bytes(16))
        assert engine.memory.read(int(here or 0), 16) == b"only in this one"


def test_allocation_beyond_the_ceiling_is_null_and_the_engine_lives(llama: CompiledModule) -> None:
    with Engine(module=llama, n_threads=1, memory_limit_bytes=16 << 20) as engine:
        assert engine.call("pw_alloc", 100 << 20) == 0
        assert engine.call("pw_alloc", 1000) != 0
        assert engine.memory.size_bytes <= 16 << 20
