"""Names of the parts of a split model, and what a source keeps open."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import pyllama_wasm as pw
from pyllama_wasm.source import ModelSource, split_parts


def test_parts_follow_llama_cpps_naming() -> None:
    assert split_parts("m-00002-of-00003.gguf") == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert split_parts("a-of-b-00001-of-00001.gguf") == ["a-of-b-00001-of-00001.gguf"]
    for name in (
        "m.gguf", "m-1-of-3.gguf", "m-00001-of-00003.bin", "m-0000x-of-00003.gguf", "00001-of-00003.gguf",
        "m-00000-of-00003.gguf", "m-00004-of-00003.gguf", "m-0000\u0662-of-00003.gguf", "", "-of-.gguf",
    ):  # fmt: skip
        assert split_parts(name) == []


def test_path_is_neither_opened_nor_copied(tiny_path: Path) -> None:
    source = ModelSource(tiny_path)
    assert (source.path, source.parts, source.operation) == (tiny_path, [], "load tiny.gguf")
    assert source.size_bytes == tiny_path.stat().st_size
    assert source.header().architecture == "llama"
    source.close()
    source.close()


@pytest.mark.skipif(sys.platform != "linux", reason="files in memory are sealed there only")
def test_bytes_are_kept_where_nobody_can_change_them(tiny_path: Path) -> None:
    source = ModelSource(tiny_path.read_bytes())
    fd = source._fd
    assert fd is not None
    for change in (lambda: os.truncate(fd, 0), lambda: os.pwrite(fd, b"x", 0), lambda: os.truncate(fd, 1 << 30)):
        with pytest.raises(OSError, match="not permitted"):
            change()
    assert source.header().architecture == "llama"
    source.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_temporary_file_serves_where_there_are_none_in_memory(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    source = ModelSource(tiny_path.read_bytes())
    monkeypatch.undo()
    assert source.header().architecture == "llama"
    assert source.size_bytes == tiny_path.stat().st_size
    if os.name == "posix":
        assert list(tmp_path.iterdir()) == []
    source.close()


def test_nothing_stays_open_when_the_bytes_are_no_model() -> None:
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    before = len(os.listdir("/proc/self/fd"))
    for bad in (b"", b"no model at all"):
        with pytest.raises(pw.ModelFormatError):
            ModelSource(bad)
    assert len(os.listdir("/proc/self/fd")) == before
