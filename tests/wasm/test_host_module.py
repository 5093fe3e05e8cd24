"""Compiling a module once, and trusting the cache no further than it deserves."""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
import time
from pathlib import Path

import pytest
import wasmtime

from pyllama_wasm.errors import HostError
from pyllama_wasm.host import Engine, load_module, module
from tests.wasm.guests import imports

posix = pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("PYLLAMA_WASM_CACHE", str(folder))
    return folder


def wasm_file(folder: Path, answer: int = 42, name: str = "guest.wasm") -> Path:
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
    return any(stage.startswith("compiling") for stage in stages)


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
    for answer in range(7):
        load_afresh(wasm_file(tmp_path, answer, f"{answer}.wasm"))
        time.sleep(0.01)
    assert len(list(cache.glob("*.cwasm"))) == 4
    stages: list[str] = []
    assert load_afresh(tmp_path / "6.wasm", stages) == 6
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
