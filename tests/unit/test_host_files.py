"""The table of granted files: what may be opened, and under which name."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import pytest

from pyllama_wasm.errors import ModelFileError, RequestError
from pyllama_wasm.host.files import FileTable, GrantedFile

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX files")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF and more")
    return path


def found(table: FileTable, guest_path: str) -> GrantedFile:
    file = table.find(guest_path)
    assert file is not None
    return file


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_grant_names_a_file_by_number_and_its_own_name(model: Path) -> None:
    table = FileTable()
    assert table.grant(model) == "/model/0/model.gguf"
    assert table.grant(str(model)) == "/model/1/model.gguf"
    buffer = bytearray(20)
    file = found(table, "/model/1/model.gguf")
    assert file.read_at(memoryview(buffer), 5) == 8
    assert bytes(buffer[:8]) == b"and more"
    assert file.size_bytes() == 13
    assert table.find("/model/2/model.gguf") is None
    table.close()


def test_parts_of_a_model_lie_beside_each_other(tmp_path: Path) -> None:
    table = FileTable()
    parts = [tmp_path / f"big-{i}-of-2.gguf" for i in (1, 2)]
    for part in parts:
        part.write_bytes(b"x")
    first = table.grant(parts[0])
    assert first == "/model/0/big-1-of-2.gguf"
    assert table.grant(parts[1], beside=first) == "/model/0/big-2-of-2.gguf"
    with pytest.raises(RequestError, match="already granted beside it"):
        table.grant(parts[1], beside=first)
    table.close()


@posix
@pytest.mark.parametrize(
    ("name", "guest_name"),
    [
        ("a b.gguf", "a b.gguf"),
        ("naïve 模型.gguf", "naïve 模型.gguf"),
        ("new\nline", "new_line"),
        ("\x1b[31mred", "_x1b[31mred"),
        ("back\\slash", "back_slash"),
        ("...", "file"),
        (os.fsdecode(b"bad\xffbyte"), "bad_udcffbyte"),
        ("x" * 240 + ".gguf", "x" * 195 + ".gguf"),
    ],
)
def test_guest_name_is_one_printable_component(tmp_path: Path, name: str, guest_name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    table = FileTable()
    assert table.grant(tmp_path / name) == f"/model/0/{guest_name}"
    table.close()


def test_link_to_a_file_is_granted(model: Path, tmp_path: Path) -> None:
    # Model folders of several programs are made of links.
    link = tmp_path / "link.gguf"
    try:
        link.symlink_to(model)
    except OSError:
        pytest.skip("no links here")
    table = FileTable()
    assert found(table, table.grant(link)).size_bytes() == 13
    table.close()


def test_folder_missing_file_and_nul_are_refused(tmp_path: Path) -> None:
    table = FileTable()
    with pytest.raises(ModelFileError, match=r"it is a folder \(give the path"):
        table.grant(tmp_path)
    with pytest.raises(ModelFileError, match=r"missing\.gguf: No such file"):
        table.grant(tmp_path / "missing.gguf")
    with pytest.raises(ModelFileError, match="null"):
        table.grant("nul\0byte")
    with pytest.raises(RequestError, match="mode 'rw'"):
        table.grant(tmp_path, "rw")
    assert issubclass(ModelFileError, OSError)


@posix
def test_fifo_and_device_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    table = FileTable()
    start = time.monotonic()
    for path in (tmp_path / "fifo", Path("/dev/zero"), Path("/dev/null")):
        for mode in ("r", "w"):
            with pytest.raises(ModelFileError, match="not a regular file"):
                table.grant(path, mode)
    assert time.monotonic() - start < 1


@posix
def test_unreadable_file_is_refused(model: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    model.chmod(0)
    with pytest.raises(ModelFileError, match="Permission denied"):
        FileTable().grant(model)


def test_refused_file_leaves_no_descriptor_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m").write_bytes(b"x")
    opened: list[int] = []
    real_open = os.open

    def open_a_folder_instead(path: str, flags: int, mode: int = 0o777) -> int:
        opened.append(real_open(tmp_path, os.O_RDONLY) if sys.platform != "win32" else real_open(path, flags, mode))
        return opened[-1]

    if sys.platform == "win32":
        pytest.skip("folders cannot be opened")
    monkeypatch.setattr(os, "open", open_a_folder_instead)  # as if the file were swapped between check and opening
    with pytest.raises(ModelFileError, match="it is a folder"):
        FileTable().grant(tmp_path / "m")
    assert len(opened) == 1 and not is_open(opened[0])


def test_file_for_writing_is_made_and_emptied(tmp_path: Path) -> None:
    table = FileTable()
    path = tmp_path / "state"
    file = found(table, table.grant(path, "w"))
    assert file.write_at(memoryview(b"hello"), 2) == 5
    assert path.read_bytes() == b"\0\0hello"
    again = found(table, table.grant(path, "w"))
    assert path.read_bytes() == b""
    again.write_at(memoryview(b"x"), 0)
    again.truncate()
    assert again.size_bytes() == 0
    table.close()


def test_file_for_reading_refuses_writing(model: Path) -> None:
    table = FileTable()
    file = found(table, table.grant(model))
    with pytest.raises(OSError, match="granted for reading only"):
        file.write_at(memoryview(b"x"), 0)
    table.close()
    assert model.read_bytes() == b"GGUF and more"


def test_revoked_file_is_closed_and_refused(model: Path) -> None:
    table = FileTable()
    guest_path = table.grant(model)
    file = found(table, guest_path)
    fd = file.acquire()
    file.release()
    table.revoke(guest_path)
    table.revoke(guest_path)
    table.revoke("/never/granted")
    assert not is_open(fd)
    assert table.find(guest_path) is None
    with pytest.raises(OSError, match="taken back"):
        file.read_at(memoryview(bytearray(1)), 0)


def test_revoked_file_stays_open_until_a_read_under_way_ends(model: Path) -> None:
    table = FileTable()
    file = found(table, table.grant(model))
    fd = file.acquire()
    table.close()
    assert is_open(fd)
    file.release()
    assert not is_open(fd)
    with pytest.raises(ModelFileError, match="the engine is closed"):
        table.grant(model)


def test_descriptor_is_not_inherited_by_programs(model: Path) -> None:
    table = FileTable()
    file = found(table, table.grant(model))
    assert not os.get_inheritable(file.acquire())
    file.release()
    table.close()


def test_reading_works_where_there_is_no_pread(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "preadv", raising=False)
    monkeypatch.delattr(os, "pwrite", raising=False)
    table = FileTable()
    file = found(table, table.grant(model))
    wrong: list[bytes] = []

    def read(offset: int) -> None:
        for _ in range(200):
            buffer = bytearray(4)
            file.read_at(memoryview(buffer), offset)
            if buffer != b"GGUF and more"[offset : offset + 4]:
                wrong.append(bytes(buffer))

    threads = [threading.Thread(target=read, args=(offset,)) for offset in (0, 5, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    table.revoke(file.guest_path)
    written = found(table, table.grant(model, "w"))
    assert written.write_at(memoryview(b"abc"), 3) == 3
    assert model.read_bytes() == b"\0\0\0abc"
    table.close()


def test_reading_that_fails_is_remembered(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyllama_wasm.host import files

    def failing(_fd: int, _buffer: memoryview, _offset: int) -> int:
        raise OSError(5, "Input/output error")

    table = FileTable()
    file = found(table, table.grant(model))
    assert file.read_error is None
    monkeypatch.setattr(files, "_read_once", failing)
    with pytest.raises(OSError, match="Input/output error"):
        file.read_at(memoryview(bytearray(4)), 0)
    assert file.read_error is not None and file.read_error.errno == 5
    table.close()


def test_short_reads_of_the_system_are_joined(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyllama_wasm.host import files

    real = files._read_once
    monkeypatch.setattr(files, "_read_once", lambda fd, buffer, offset: real(fd, buffer[:3], offset))
    table = FileTable()
    buffer = bytearray(13)
    assert found(table, table.grant(model)).read_at(memoryview(buffer), 0) == 13
    assert buffer == b"GGUF and more"
    table.close()


@posix
def test_open_file_is_granted_under_any_name_and_stays_the_callers(model: Path) -> None:
    table = FileTable()
    with model.open("rb") as file:
        guest_path = table.grant_fd(file.fileno(), "other.gguf")
        assert guest_path == "/model/0/other.gguf"
        assert table.grant_fd(file.fileno(), "second", beside=guest_path) == "/model/0/second"
    granted, buffer = found(table, guest_path), bytearray(4)
    assert (granted.read_at(memoryview(buffer), 0), bytes(buffer)) == (4, b"GGUF")
    assert not granted.is_writable
    fd = granted.acquire()
    granted.release()
    table.close()
    assert not is_open(fd)


@posix
def test_open_file_granted_for_writing_is_not_cut(model: Path) -> None:
    table = FileTable()
    fd = os.open(model, os.O_RDWR)
    granted = found(table, table.grant_fd(fd, "m", "w"))
    os.close(fd)
    granted.write_at(memoryview(b"XX"), 0)
    table.close()
    assert model.read_bytes() == b"XXUF and more"


@posix
def test_what_is_no_open_regular_file_is_not_granted(model: Path, tmp_path: Path) -> None:
    table = FileTable()
    folder = os.open(tmp_path, os.O_RDONLY)
    read_end, write_end = os.pipe()
    for fd, reason in ((-1, "Bad file descriptor"), (folder, "it is a folder"), (read_end, "not a regular file")):
        with pytest.raises(ModelFileError, match=f"grant x: {reason}"):
            table.grant_fd(fd, "x")
    for fd in (folder, read_end, write_end):
        os.close(fd)
    fd = os.open(model, os.O_RDONLY)
    with pytest.raises(RequestError, match="neither 'r' nor 'w'"):
        table.grant_fd(fd, "x", "rw")
    table.close()
    with pytest.raises(ModelFileError, match="the engine is closed"):
        table.grant_fd(fd, "x")
    os.close(fd)
