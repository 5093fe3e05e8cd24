"""Everything that writes a file does so whole or not at all: states, saved models, quantized ones."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import pyllama_wasm as pw

pytestmark = pytest.mark.skipif(os.name != "posix", reason="modes, links and limits are POSIX's")

Save = Callable[[Path], object]


@pytest.fixture(scope="module")
def writers(tiny_path: Path) -> Iterator[dict[str, Save]]:
    with pw.Model(tiny_path, n_threads=1) as model, model.context(n_ctx=256) as context:
        batch = pw.Batch(8)
        batch.add_sequence([1, 40, 77])
        context.decode(batch)
        yield {
            "state": context.state.save,
            "sequence": context.state.seq_save,
            "model": model.save,
            "quantize": lambda path: pw.quantize(tiny_path, path, "Q8_0", n_threads=1),
        }


@pytest.mark.parametrize("kind", ["state", "sequence", "model", "quantize"])
def test_mode_and_link_of_what_stood_there_stay(writers: dict[str, Save], tmp_path: Path, kind: str) -> None:
    folder, link = tmp_path / "folder", tmp_path / "link"
    folder.mkdir()
    (folder / "file").write_bytes(b"old")
    (folder / "file").chmod(0o640)
    link.symlink_to("folder/file")
    writers[kind](link)
    assert link.is_symlink()
    assert stat.S_IMODE((folder / "file").stat().st_mode) == 0o640
    assert (folder / "file").stat().st_size > 1000
    assert [file.name for file in folder.iterdir()] == ["file"] and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("kind", ["state", "sequence", "model", "quantize"])
def test_what_is_no_file_is_not_replaced(writers: dict[str, Save], tmp_path: Path, kind: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises((pw.RequestError, pw.ModelFileError), match="not a regular file"):
        writers[kind](tmp_path / "pipe")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode) and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("kind", ["state", "sequence", "model"])
def test_a_name_that_cannot_be_is_a_typed_error(writers: dict[str, Save], tmp_path: Path, kind: str) -> None:
    with pytest.raises((pw.RequestError, pw.ModelFileError), match="null"):
        writers[kind](tmp_path / "a\0b")


def test_a_full_disk_leaves_what_stood_there(tiny_path: Path, tmp_path: Path) -> None:
    """A limit for the size of files acts as a disk that is full; quantizing is tested in its own file."""
    program = """
import pathlib, resource, sys, pyllama_wasm as pw
model, folder = pw.Model(sys.argv[1], n_threads=1), pathlib.Path(sys.argv[2])
context = model.context(n_ctx=256)
batch = pw.Batch(64)
batch.add_sequence(list(range(5, 69)))
context.decode(batch)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
for kind, save in (("state", context.state.save), ("model", model.save)):
    try:
        save(folder / kind)
    except (pw.RequestError, pw.ModelFileError) as error:
        print(type(error).__name__, error.reason, sep=": ")
print(len(model.generate("a", max_tokens=2).tokens))
"""
    for name in ("state", "model"):
        (tmp_path / name).write_bytes(b"old")
    command = [sys.executable, "-c", program, str(tiny_path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    assert lines[0].startswith("RequestError: ") and "File too large" in lines[0]
    assert lines[1] == "ModelFileError: it could not be written whole" and lines[2] == "2"
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"state": b"old", "model": b"old"}
