"""What a real model logs: llama.cpp's own lines, and what becomes of its sandbox."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

import pyllama_wasm as pw


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


def test_a_dead_sandbox_is_logged_once(tiny_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pw.Model(tiny_path, n_threads=1) as model:
        for _ in range(2):
            with pytest.raises(pw.GuestDiedError):
                model.native.call("llama_load_mode_from_str", b"x\n\x1b[2J")
        [died] = records(caplog, "engine")
    assert (died.levelname, getattr(died, "model", "")) == ("ERROR", tiny_path.name)
    assert died.getMessage().startswith("the sandbox died: GuestAbortError: ")
    assert "unknown load mode: x" in died.getMessage() and died.getMessage().isprintable()
