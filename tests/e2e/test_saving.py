"""Everything that writes a file does so whole or not at all: states, saved models, quantized ones."""

from __future__ import annotations

import errno
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
def test_a_new_state_is_the_owners_and_a_new_model_anyones(writers: dict[str, Save], tmp_path: Path, kind: str) -> None:
    (tmp_path / "plain").write_bytes(b"")
    writers[kind](tmp_path / "new")
    mode = stat.S_IMODE((tmp_path / "plain").stat().st_mode) if kind in ("model", "quantize") else 0o600
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == mode


@pytest.mark.parametrize("kind", ["state", "sequence", "model", "quantize"])
def test_what_is_no_file_is_not_replaced(writers: dict[str, Save], tmp_path: Path, kind: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises((pw.RequestError, pw.ModelFileError), match="not a regular file"):
        writers[kind](tmp_path / "pipe")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode) and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("kind", ["state", "sequence", "model", "quantize"])
def test_a_name_that_cannot_be_is_a_typed_error(writers: dict[str, Save], tmp_path: Path, kind: str) -> None:
    for name, reason in (("a\0b", "null"), ("x" * 300, "name too long"), ("x" * 300 + "/a", "name too long")):
        with pytest.raises((pw.RequestError, pw.ModelFileError), match=f"(?i){reason}"):
            writers[kind](tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["state", "sequence", "model", "quantize"])
def test_a_folder_that_cannot_be_looked_into_is_a_typed_error(
    writers: dict[str, Save], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    stat_of = Path.stat

    def refused(self: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        if self.name == "hidden":  # root may look into any folder
            raise PermissionError(errno.EACCES, "Permission denied")
        return stat_of(self, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(Path, "stat", refused)
    with pytest.raises((pw.RequestError, pw.ModelFileError), match="Permission denied"):
        writers[kind](tmp_path / "hidden")


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


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EIO, "short"])
@pytest.mark.parametrize("kind", ["model", "quantize"])
def test_each_write_of_the_guest_may_fail(
    writers: dict[str, Save], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, fault: int | str
) -> None:
    """One failed write in the middle, with good ones behind it, must not make a file with a hole."""
    save, real, path = writers[kind], os.pwrite, tmp_path / "file"
    save(path)
    whole = path.read_bytes()
    n_calls, k = 0, 0
    while n_calls >= k:  # the last was reached
        n_calls, k = 0, k + 1
        path.write_bytes(b"old")

        def write(fd: int, data: memoryview, offset: int, k: int = k) -> int:
            nonlocal n_calls
            n_calls += 1
            if n_calls != k:
                return real(fd, data, offset)
            if isinstance(fault, int):
                raise OSError(fault, os.strerror(fault))
            return real(fd, data[: max(1, len(data) // 2)], offset)

        monkeypatch.setattr(os, "pwrite", write)
        try:
            save(path)
            has_failed = False
        except pw.ModelFileError:
            has_failed = True
        assert has_failed == (isinstance(fault, int) and n_calls >= k), f"write {k} of {n_calls}"
        assert path.read_bytes() == (b"old" if has_failed else whole)
        assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert k > 4
