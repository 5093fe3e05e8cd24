"""Compiling a module once, and trusting the cache no further than it deserves."""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
import time
from importlib import metadata
from pathlib import Path

import pytest
import wasmtime

from pyllama_wasm.errors import HostError
from pyllama_wasm.host import cache as code_cache
from pyllama_wasm.host import compile_module, load_module
from tests.wasm.cached import is_compiled, load_afresh, posix, wasm_file
from tests.wasm.guests import imports


def test_second_load_comes_from_the_cache(cache: Path, tmp_path: Path) -> None:
    path = wasm_file(tmp_path)
    first: list[str] = []
    second: list[str] = []
    assert load_afresh(path, first) == 42
    assert is_compiled(first)
    assert load_afresh(path, second) == 42
    assert second and not is_compiled(second)
    assert len(list(cache.glob("*.cwasm"))) == 1
    assert list(cache.glob("*.tmp")) == []


def test_one_process_loads_once(cache: Path, tmp_path: Path) -> None:
    path = wasm_file(tmp_path)
    loaded = []
    threads = [threading.Thread(target=lambda: loaded.append(load_module(path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(loaded) == 4 and len({id(item) for item in loaded}) == 1


def test_changed_module_is_compiled_again(cache: Path, tmp_path: Path) -> None:
    assert load_afresh(wasm_file(tmp_path, 42)) == 42
    stages: list[str] = []
    assert load_afresh(wasm_file(tmp_path, 43), stages) == 43
    assert is_compiled(stages)
    assert len(list(cache.glob("*.cwasm"))) == 2


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "extend"])
def test_damaged_cache_entry_is_never_run_but_rebuilt(cache: Path, tmp_path: Path, damage: str) -> None:
    path = wasm_file(tmp_path)
    load_afresh(path)
    (entry,) = cache.glob("*.cwasm")
    code = bytearray(entry.read_bytes())
    if damage == "flip":
        code[len(code) // 2] ^= 1
    entry.write_bytes(bytes({"flip": code, "cut": code[:-10], "empty": b"", "extend": code + b"\0"}[damage]))
    stages: list[str] = []
    assert load_afresh(path, stages) == 42
    assert is_compiled(stages)
    assert not is_compiled([]) and load_afresh(path) == 42


@pytest.mark.parametrize("at", [0, 0.3, 0.6, 0.999])
def test_damage_is_seen_in_every_part(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: float) -> None:
    monkeypatch.setattr(code_cache, "_PART_BYTES", 3000)
    path = wasm_file(tmp_path)
    load_afresh(path)
    (entry,) = cache.glob("*.cwasm")
    code = bytearray(entry.read_bytes())
    assert len(code) > 4 * 3000
    code[int(at * len(code))] ^= 1
    entry.write_bytes(code)
    stages: list[str] = []
    assert load_afresh(path, stages) == 42
    assert is_compiled(stages)


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 300, 1234])
def test_digest_of_a_file_is_the_one_of_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(code_cache, "_PART_BYTES", 100)
    monkeypatch.setattr(code_cache, "_READ_BYTES", 70)  # a part ends within what is read at once
    data = bytes(i * 7 % 251 for i in range(size))
    path = tmp_path / "data"
    path.write_bytes(data)
    digest = code_cache.file_digest(path)
    assert digest == code_cache.digest(data) == code_cache.digest(bytearray(data))
    others = [data + b"\0", data[:-1], data[100:] + data[:100], bytes([*data[:-1], 255])]
    assert digest not in [code_cache.digest(other) for other in others if other != data]


def test_digest_needs_no_further_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(code_cache, "_PART_BYTES", 100)
    monkeypatch.setattr(threading.Thread, "start", start)
    path = tmp_path / "data"
    path.write_bytes(bytes(1000))
    assert code_cache.file_digest(path) == code_cache.digest(bytes(1000))
    with pytest.raises(FileNotFoundError):
        code_cache.file_digest(tmp_path / "missing")


def test_file_that_cannot_be_read_has_no_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_file: object, i: int) -> bytes:
        raise OSError(f"cannot read part {i}")

    monkeypatch.setattr(code_cache, "_PART_BYTES", 100)
    monkeypatch.setattr(code_cache, "_part_digest", fail)
    path = tmp_path / "data"
    path.write_bytes(bytes(1000))
    with pytest.raises(OSError, match="cannot read part"):
        code_cache.file_digest(path)


def test_module_replaced_during_the_load_is_cached_as_what_it_is(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = wasm_file(tmp_path, 42)
    first = path.read_bytes()
    load = code_cache.CodeCache.load

    def replace(self: code_cache.CodeCache, engine: wasmtime.Engine, key: str) -> wasmtime.Module | None:
        wasm_file(tmp_path, 43)
        return load(self, engine, key)

    with monkeypatch.context() as patch:
        patch.setattr(code_cache.CodeCache, "load", replace)
        assert load_afresh(path) == 43
    path.write_bytes(first)
    assert load_afresh(path) == 42


def test_version_of_wasmtime_is_part_of_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version("wasmtime")
    assert code_cache._wasmtime_version() == version
    key = code_cache.cache_key("digest", {})
    monkeypatch.setattr(wasmtime, "__file__", str(tmp_path / "wasmtime" / "__init__.py"))
    assert code_cache._wasmtime_version() == version  # packed differently
    assert code_cache.cache_key("digest", {}) == key
    (tmp_path / "wasmtime-49.0.0.dist-info").mkdir()
    assert code_cache.cache_key("digest", {}) != key


def test_exports_are_the_functions_that_take_and_return_numbers() -> None:
    text = """(module (import "env" "memory" (memory 1 10 shared)) (export "memory" (memory 0))
      (global (export "flag") i32 (i32.const 0))
      (func (export "good") (param i32 i64 f32) (result f64) f64.const 0)
      (func (export "two") (result i32 i32) i32.const 0 i32.const 0)
      (func (export "nothing")))"""
    exports = compile_module(bytes(wasmtime.wat2wasm(text))).exports
    assert {name: str(sig) for name, sig in exports.items()} == {"good": "(i32, i64, f32) -> f64", "nothing": "()"}
    assert len(exports) == 2
    assert exports["good"] is exports["good"]
    for name in ("memory", "flag", "two", "missing"):
        assert name not in exports and exports.get(name) is None


@posix
def test_cache_is_private(cache: Path, tmp_path: Path) -> None:
    load_afresh(wasm_file(tmp_path))
    (entry,) = cache.glob("*.cwasm")
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert stat.S_IMODE(entry.stat().st_mode) == 0o600


@posix
def test_folder_others_can_write_to_is_not_used(cache: Path, tmp_path: Path) -> None:
    cache.mkdir()
    cache.chmod(0o777)
    assert load_afresh(wasm_file(tmp_path)) == 42
    assert list(cache.iterdir()) == []


@posix
def test_entry_others_could_have_written_is_not_used(cache: Path, tmp_path: Path) -> None:
    path = wasm_file(tmp_path)
    load_afresh(path)
    (entry,) = cache.glob("*.cwasm")
    entry.chmod(0o666)
    stages: list[str] = []
    assert load_afresh(path, stages) == 42
    assert is_compiled(stages)


@posix
def test_link_in_place_of_an_entry_or_the_folder_is_not_followed(cache: Path, tmp_path: Path) -> None:
    path = wasm_file(tmp_path)
    load_afresh(path)
    (entry,) = cache.glob("*.cwasm")
    elsewhere = tmp_path / "elsewhere.cwasm"
    entry.rename(elsewhere)
    entry.symlink_to(elsewhere)
    stages: list[str] = []
    assert load_afresh(path, stages) == 42
    assert is_compiled(stages)
    cache.rename(tmp_path / "moved")
    cache.symlink_to(tmp_path / "moved")
    stages = []
    assert load_afresh(path, stages) == 42
    assert is_compiled(stages)


def test_unusable_cache_folder_only_costs_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("PYLLAMA_WASM_CACHE", str(tmp_path / "file" / "cache"))
    assert load_afresh(wasm_file(tmp_path)) == 42


def test_old_entries_are_dropped(cache: Path, tmp_path: Path) -> None:
    for answer in range(11):
        load_afresh(wasm_file(tmp_path, answer, f"{answer}.wasm"))
        time.sleep(0.01)
    assert len(list(cache.glob("*.cwasm"))) == 8
    stages: list[str] = []
    assert load_afresh(tmp_path / "10.wasm", stages) == 10
    assert not is_compiled(stages)


def test_bad_modules_are_typed_errors(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"load .*missing\.wasm: No such file"):
        load_module(tmp_path / "missing.wasm")
    (tmp_path / "bad.wasm").write_bytes(b"\0asm\1\0\0\0garbage")
    for _ in range(2):
        with pytest.raises(HostError, match=r"load bad\.wasm"):
            load_module(tmp_path / "bad.wasm")
    (tmp_path / "foreign.wasm").write_bytes(
        bytes(wasmtime.wat2wasm('(module (import "env" "memory" (memory 1 2 shared)) (import "a" "b" (func)))'))
    )
    with pytest.raises(HostError, match=r"does not offer: a\.b"):
        load_module(tmp_path / "foreign.wasm")


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_interrupt_does_not_wait_for_the_compiler(cache: Path, tmp_path: Path) -> None:
    body = "local.get 0 " + "i32.const 3 i32.mul local.get 0 i32.add " * 400
    functions = "\n".join(f'(func (export "f{i}") (param i32) (result i32) {body})' for i in range(1500))
    text = f'(module (import "env" "memory" (memory 1 2 shared)) {imports("log")} {functions})'
    (tmp_path / "big.wasm").write_bytes(bytes(wasmtime.wat2wasm(text)))
    sent: list[float] = []

    def interrupt() -> None:
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    threading.Timer(0.2, interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        load_module(tmp_path / "big.wasm")
    assert time.monotonic() - sent[0] < 0.2
    assert "f7" in load_module(tmp_path / "big.wasm").exports  # the compiler went on
