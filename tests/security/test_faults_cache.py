"""The cache of compiled code, damaged in ways that its own checks must see: never executed, always rebuilt."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import wasmtime

from pyllama_wasm.host import cache as code_cache
from pyllama_wasm.host import ffi, module
from pyllama_wasm.host.threads import MAX_WASM_STACK_BYTES

from ..wasm.cached import is_compiled, load_afresh, posix, wasm_file


def plant(cache: Path, path: Path, code: bytes) -> Path:
    """Put ``code`` in the place of the cached code of ``path``, under the name that its content asks for."""
    load_afresh(path)
    [entry] = cache.glob("*.cwasm")
    entry.unlink()
    planted = cache / f"{entry.stem.partition('-')[0]}-{code_cache.digest(code)}.cwasm"
    planted.write_bytes(code)
    planted.chmod(0o600)
    return planted


def compiled_otherwise(path: Path, **settings: object) -> bytes:
    """Return the code of a module by a wasmtime engine of other settings than ours."""
    config = wasmtime.Config()
    for name, value in {**module._SETTINGS, **settings}.items():
        setattr(config, name, value)
    ffi.set_max_stack(config, MAX_WASM_STACK_BYTES)
    return bytes(wasmtime.Module(wasmtime.Engine(config), path.read_bytes()).serialize())


def test_code_of_other_settings_is_not_run(cache: Path, tmp_path: Path) -> None:
    """What wasmtime made with interruption or fuel would wait for what this engine never gives."""
    path = wasm_file(tmp_path)
    for settings in ({"epoch_interruption": True}, {"consume_fuel": True}):
        planted = plant(cache, path, compiled_otherwise(path, **settings))
        stages: list[str] = []
        assert load_afresh(path, stages) == 42
        assert is_compiled(stages), settings
        assert not planted.exists()
        for entry in cache.glob("*.cwasm"):
            entry.unlink()


@pytest.mark.parametrize("code", [b"", b"\x7fELF" + bytes(1000), b"\0asm\1\0\0\0", bytes(100_000)])
def test_what_is_no_machine_code_is_not_run(cache: Path, tmp_path: Path, code: bytes) -> None:
    path = wasm_file(tmp_path)
    planted = plant(cache, path, code)
    stages: list[str] = []
    assert load_afresh(path, stages) == 42
    assert is_compiled(stages) and not planted.exists()
    stages = []
    assert load_afresh(path, stages) == 42
    assert not is_compiled(stages)


def test_code_of_our_settings_is_run_which_shows_that_the_others_could_be(cache: Path, tmp_path: Path) -> None:
    path = wasm_file(tmp_path)
    planted = plant(cache, path, compiled_otherwise(path))
    stages: list[str] = []
    assert load_afresh(path, stages) == 42
    assert not is_compiled(stages) and planted.exists()


@posix
@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_entry_that_is_no_file_is_passed_over(cache: Path, tmp_path: Path, kind: str) -> None:
    path = wasm_file(tmp_path)
    load_afresh(path)
    [entry] = cache.glob("*.cwasm")
    entry.unlink()
    if kind == "folder":
        entry.mkdir()
    else:
        os.mkfifo(entry)
    stages: list[str] = []
    assert load_afresh(path, stages) == 42
    assert is_compiled(stages)


@posix
def test_folder_that_others_can_exchange_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "anyones").mkdir()
    (tmp_path / "anyones").chmod(0o777)
    monkeypatch.setenv("PYLLAMA_WASM_CACHE", str(tmp_path / "anyones" / "cache"))
    with caplog.at_level(logging.WARNING, "pyllama_wasm.cache"):
        assert load_afresh(wasm_file(tmp_path)) == 42
    assert list((tmp_path / "anyones" / "cache").iterdir()) == []
    assert "others can rename what is in" in caplog.text
    (tmp_path / "anyones").chmod(0o1777)  # as /tmp: only the owner may
    assert load_afresh(wasm_file(tmp_path)) == 42
    assert len(list((tmp_path / "anyones" / "cache").glob("*.cwasm"))) == 1


def test_what_ended_processes_left_in_the_making_is_removed(cache: Path, tmp_path: Path) -> None:
    load_afresh(wasm_file(tmp_path))
    old, fresh = cache / "new-old.tmp", cache / "new-fresh.tmp"
    for file in (old, fresh):
        file.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    load_afresh(wasm_file(tmp_path, 43))
    assert fresh.exists() and not old.exists()


@pytest.mark.skipif(os.name != "posix", reason="needs a limit for the size of files")
def test_full_disk_leaves_no_half_written_code(tmp_path: Path) -> None:
    """A limit for the size of files acts as a disk that is full."""
    program = """
import logging, resource, sys
from pathlib import Path
from pyllama_wasm.host import Engine, load_module
logging.basicConfig(level=logging.WARNING, format="%(message)s")
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
with Engine(module=load_module(sys.argv[1]), n_threads=1) as engine:
    print(engine.call("answer"))
"""
    cache = tmp_path / "cache"
    # Coverage is measured in subprocesses too, and could not write either.
    env = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    done = subprocess.run(
        [sys.executable, "-c", program, str(wasm_file(tmp_path))],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**env, "PYLLAMA_WASM_CACHE": str(cache)},
    )
    assert (done.returncode, done.stdout) == (0, "42\n"), done.stderr
    assert "compiled code is not cached" in done.stderr and "File too large" in done.stderr
    assert list(cache.iterdir()) == []


def test_entry_that_another_process_removes_meanwhile_is_nothing_special(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load_afresh(wasm_file(tmp_path))
    modified_at = code_cache._modified_at

    def look_late(path: Path) -> float:
        path.unlink(missing_ok=True)
        return modified_at(path)

    monkeypatch.setattr(code_cache, "_modified_at", look_late)
    with caplog.at_level(logging.WARNING, "pyllama_wasm.cache"):
        assert load_afresh(wasm_file(tmp_path, 43)) == 43
    assert caplog.text == ""
    assert list(cache.iterdir()) == []
