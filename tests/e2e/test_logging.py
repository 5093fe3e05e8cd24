"""What a real model logs: llama.cpp's own lines, and what becomes of its sandbox."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

import pyllama_wasm as pw
from pyllama_wasm.host.wasi import Wasi


def records(caplog: pytest.LogCaptureFixture, logger: str) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == f"pyllama_wasm.{logger}"]


def test_loading_is_logged_with_the_models_name(tiny_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pyllama_wasm")
    with pw.Model(tiny_path, n_threads=1):
        pass
    [loaded] = records(caplog, "model")
    assert loaded.getMessage().startswith("loaded in ")
    said = records(caplog, "guest")
    assert any("loaded meta data with" in record.getMessage() for record in said)
    assert {getattr(record, "model", "") for record in (loaded, *said)} == {tiny_path.name}
    assert records(caplog, "engine") == []  # closing is no death


def test_lists_of_a_file_are_logged_as_far_as_upstream_logs_them(
    tiny_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pyllama_wasm")
    with pw.Model(tiny_path, n_threads=1):
        pass
    metadata = pw.GGUFReader(tiny_path).metadata
    lists = {key: list(value) for key, value in metadata.items() if isinstance(value, (list, pw.GGUFArray))}
    assert "tokenizer.ggml.tokens" in lists
    said = [record.getMessage() for record in records(caplog, "guest")]
    for key, items in lists.items():
        if isinstance(items[0], str):
            quoted = (str(item).replace("\\", "\\\\").replace('"', '\\"') for item in items)
            whole = "[" + ", ".join(f'"{item}"' for item in quoted) + "]"
            [line] = (line for line in said if f" {key} " in line)
            shown = whole if len(whole.encode()) <= 40 else f"{whole[:37]}..."
            assert line.endswith(f"= {shown}".replace("\n", "\\n")), line


def test_a_dead_sandbox_is_logged_once(tiny_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pw.Model(tiny_path, n_threads=1) as model:
        for _ in range(2):
            with pytest.raises(pw.GuestDiedError):
                model.native.call("llama_load_mode_from_str", b"x\n\x1b[2J")
        [died] = records(caplog, "engine")
    assert (died.levelname, getattr(died, "model", "")) == ("ERROR", tiny_path.name)
    assert died.getMessage().startswith("the sandbox died: GuestAbortError: ")
    assert "unknown load mode: x" in died.getMessage() and died.getMessage().isprintable()


def test_a_header_is_read_in_large_pieces(
    write_tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    read = Wasi.fd_read

    def counted(wasi: Wasi, *arguments: int) -> int:
        reads.append(arguments[0])
        return read(wasi, *arguments)

    monkeypatch.setattr(Wasi, "fd_read", counted)
    path = write_tiny(tmp_path / "m.gguf", n_vocab_extra=20_000)
    with pw.Model(path, params=pw.ModelParams(vocab_only=True)):
        pass
    header = pw.GGUFReader(path).data_offset
    assert header > 300_000
    assert len(reads) < header / 20_000 + 10
