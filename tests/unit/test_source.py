"""Names of the parts of a split model, and what a source keeps open."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import weakref
from pathlib import Path

import pytest

import pyllama_wasm as pw
from pyllama_wasm import _atomic_file
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
        assert source._fd is not None
        with pytest.raises(OSError, match="Bad file descriptor"):  # it may go to another process
            os.write(source._fd, b"x")
    source.close()


def test_nothing_stays_open_when_the_bytes_are_no_model() -> None:
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    before = len(os.listdir("/proc/self/fd"))
    for bad in (b"", b"no model at all"):
        with pytest.raises(pw.ModelFormatError):
            ModelSource(bad)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_headers_go_when_the_load_has_ended(tiny_path: Path) -> None:
    """Of a large vocabulary they hold many megabytes."""
    source = ModelSource(tiny_path)
    header = weakref.ref(source.header())
    assert header() is not None
    source.close()
    gc.collect()
    assert header() is None
    with pw.Model(tiny_path) as model:
        assert model._repacking._kept is None


@pytest.mark.skipif(sys.platform != "linux", reason="a descriptor can be opened again there only")
def test_a_file_of_the_program_keeps_its_position(tiny_path: Path, tmp_path: Path) -> None:
    gone = Path(shutil.copy(tiny_path, tmp_path / "gone.gguf"))
    with open(gone, "rb") as file:
        gone.unlink()
        source = ModelSource(file)
        assert source._fd is not None
        os.lseek(source._fd, 100, os.SEEK_SET)  # as another process might that it was given to
        assert file.tell() == 0 and os.lseek(file.fileno(), 0, os.SEEK_CUR) == 0
        assert source.header().architecture == "llama"
        source.close()


def test_a_file_that_cannot_be_opened_again_is_shared(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    with open(tiny_path, "rb") as file:
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", refused)
            source = ModelSource(file)
        assert source.header().architecture == "llama"
        source.close()


def test_who_is_late_does_not_wait_for_its_copy_to_go(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ModelSource(tiny_path.read_bytes())
    closed: list[int] = []
    monkeypatch.setattr(_atomic_file, "close", closed.append)
    fd = source._fd
    source.close()
    assert closed == [fd] and fd is not None
    os.close(fd)
