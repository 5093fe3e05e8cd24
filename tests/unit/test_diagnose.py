"""Why a load failed: the file first, then the guest."""

from __future__ import annotations

from pathlib import Path

import pytest

import pyllama_wasm as pw
from pyllama_wasm._diagnose import explain_load_failure
from pyllama_wasm._guest_log import LogExcerpt
from pyllama_wasm.source import ModelSource

NOTHING = LogExcerpt(())


def test_a_truncated_file_explains_whatever_the_guest_said(tiny_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.gguf"
    path.write_bytes(tiny_path.read_bytes()[:-100])
    died = pw.GuestTrapError("load", "out of bounds")
    error = explain_load_failure(ModelSource(path), died, NOTHING, None)
    assert isinstance(error, pw.ModelFormatError)
    assert str(error).startswith("load short.gguf: tensor ")


def test_unknown_architecture_is_unsupported(tiny_path: Path) -> None:
    log = LogExcerpt(("llama_model_load: error loading model: unknown model architecture: 'fancy'",))
    error = explain_load_failure(ModelSource(tiny_path), None, log, None)
    assert type(error) is pw.UnsupportedModelError
    assert str(error) == ("load tiny.gguf: unknown model architecture: 'fancy' (this llama.cpp build cannot run it)")


def test_missing_tensor_is_a_format_error(tiny_path: Path) -> None:
    log = LogExcerpt(("llama_model_load: error loading model: missing tensor 'output.weight'",))
    assert (
        str(explain_load_failure(ModelSource(tiny_path), None, log, None))
        == "load tiny.gguf: missing tensor 'output.weight'"
    )


@pytest.mark.parametrize(
    "cause", [pw.OutOfMemoryError("llama_model_load_from_file", "the guest has no memory left"), None]
)
def test_too_little_memory_tells_the_sizes(tiny_path: Path, cause: pw.PyllamaError | None) -> None:
    log = NOTHING if cause else LogExcerpt(("llama_model_load: error loading model: mmap failed: Out of memory",))
    error = explain_load_failure(ModelSource(tiny_path), cause, log, 64 << 20)
    assert isinstance(error, pw.OutOfMemoryError)
    assert "the sandbox at most 64 MiB" in error.reason
    assert error.hint == "raise memory_limit_bytes"


def test_death_of_the_guest_keeps_its_kind_and_backtrace(tiny_path: Path) -> None:
    died = pw.GuestAbortError("call", "GGML_ASSERT(x) failed")
    died.backtrace = "frames"
    error = explain_load_failure(ModelSource(tiny_path), died, NOTHING, None)
    assert type(error) is pw.GuestAbortError
    assert str(error) == "load tiny.gguf: GGML_ASSERT(x) failed"
    assert error.backtrace == "frames"
