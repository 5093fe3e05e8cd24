"""The WASI calls, as a guest makes them: right answers, and refusals that touch nothing."""

from __future__ import annotations

import logging
import os
import struct
import time
from pathlib import Path

import pytest

from pyllama_wasm.errors import GuestAbortError, ModelFileError, RequestError
from pyllama_wasm.host import Engine, FileTable
from tests.wasm.guests import SCRATCH, EngineOf, forwarding

SUCCESS, EACCES, EBADF, EEXIST, EFAULT, EILSEQ, EINVAL = 0, 2, 8, 20, 21, 25, 28
EMFILE, ENOENT, ENOTDIR, ESPIPE = 33, 44, 54, 70
ROOT = 3
NAME, OUT, IOVS, DATA = SCRATCH, SCRATCH + 1024, SCRATCH + 2048, SCRATCH + 8192
READ, WRITE = 1 << 1, 1 << 6
CREATE, DIRECTORY, EXCLUSIVE, TRUNCATE = 1, 2, 4, 8
SIZE = 2 * 65536


@pytest.fixture
def engine(engine_of: EngineOf) -> Engine:
    return engine_of(forwarding())


def open_path(engine: Engine, path: bytes | str, oflags: int = 0, rights: int = READ, root: int = ROOT) -> int:
    """Return the descriptor, or the errno as a negative number."""
    name = path.encode() if isinstance(path, str) else path
    engine.memory.write(NAME, name)
    code = engine.call("path_open", root, 0, NAME, len(name), oflags, rights, rights, 0, OUT)
    assert isinstance(code, int)
    return -code if code else engine.memory.u32(OUT)


def granted(engine: Engine, path: Path, mode: str = "r") -> str:
    return engine.files.grant(path, mode).removeprefix("/")


def iovs(engine: Engine, *buffers: tuple[int, int]) -> tuple[int, int]:
    engine.memory.write(IOVS, b"".join(struct.pack("<II", *buffer) for buffer in buffers))
    return IOVS, len(buffers)


def transfer(engine: Engine, call: str, fd: int, *buffers: tuple[int, int]) -> int:
    """Return the number of bytes, or the errno as a negative number."""
    code = engine.call(call, fd, *iovs(engine, *buffers), OUT)
    assert isinstance(code, int)
    return -code if code else engine.memory.u32(OUT)


def test_read_goes_on_where_it_ended_and_stops_at_the_end(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(bytes(range(100)))
    fd = open_path(engine, granted(engine, tmp_path / "m"))
    assert fd == 4
    assert transfer(engine, "fd_read", fd, (DATA, 10), (DATA + 20, 0), (DATA + 30, 5)) == 15
    assert engine.memory.read(DATA, 10) == bytes(range(10))
    assert engine.memory.read(DATA + 30, 5) == bytes(range(10, 15))
    assert transfer(engine, "fd_read", fd, (DATA, 80), (DATA + 80, 80)) == 85
    assert engine.memory.read(DATA, 85) == bytes(range(15, 100))
    assert transfer(engine, "fd_read", fd, (DATA, 80)) == 0


def test_two_descriptors_of_one_file_have_offsets_of_their_own(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(b"abcdef")
    name = granted(engine, tmp_path / "m")
    first, second = open_path(engine, name), open_path(engine, name)
    assert first != second
    transfer(engine, "fd_read", first, (DATA, 4))
    transfer(engine, "fd_read", second, (DATA, 2))
    assert engine.memory.read(DATA, 2) == b"ab"
    assert engine.call("fd_close", first) == SUCCESS
    assert transfer(engine, "fd_read", first, (DATA, 2)) == -EBADF
    assert transfer(engine, "fd_read", second, (DATA, 2)) == 2


def test_large_read_is_whole(engine: Engine, tmp_path: Path) -> None:
    n = 12 << 20
    data = bytes(range(256)) * (n // 256)
    (tmp_path / "m").write_bytes(data)
    fd = open_path(engine, granted(engine, tmp_path / "m"))
    engine.call("grow", n // 65536)
    assert transfer(engine, "fd_read", fd, (SIZE, n)) == n
    assert engine.memory.read(SIZE, n) == data


def test_seek_and_tell(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(b"0123456789")
    fd = open_path(engine, granted(engine, tmp_path / "m"))

    def seek(offset: int, whence: int) -> int:
        code = engine.call("fd_seek", fd, offset, whence, OUT)
        assert isinstance(code, int)
        return -code if code else struct.unpack("<Q", engine.memory.read(OUT, 8))[0]

    assert seek(3, 0) == 3
    assert seek(2, 1) == 5
    assert seek(-1, 2) == 9
    assert transfer(engine, "fd_read", fd, (DATA, 5)) == 1
    assert seek(-11, 2) == -EINVAL
    assert seek(0, 3) == -EINVAL
    assert seek((1 << 63) - 1, 1) == -EINVAL
    assert seek(0, 1) == 10
    assert seek(1 << 62, 0) == 1 << 62
    assert transfer(engine, "fd_read", fd, (DATA, 5)) == 0
    assert engine.call("fd_seek", 1, 0, 1, OUT) == ESPIPE
    assert engine.call("fd_seek", ROOT, 0, 1, OUT) == ESPIPE


@pytest.mark.parametrize(
    "path",
    [
        "",
        ".",
        "/",
        "model",
        "model/0",
        "model/0/",
        "model/0/m/",
        "model/0/m/.",
        "model/0/../0/m",
        "./model/0/m",
        "/model/0/m",
        "model//0/m",
        "model/0/M",
        "model/0/m\0",
        "model/0/m\0x",
        "../../etc/passwd",
        "etc/passwd",
        "/etc/passwd",
        "proc/self/environ",
        "model/1/m",
        "x" * 5000,
    ],
)
def test_only_the_exact_granted_path_is_found(engine: Engine, tmp_path: Path, path: str) -> None:
    (tmp_path / "m").write_bytes(b"x")
    assert granted(engine, tmp_path / "m") == "model/0/m"
    assert open_path(engine, path) == -ENOENT
    engine.memory.write(NAME, path.encode())
    assert engine.call("path_filestat_get", ROOT, 0, NAME, len(path), OUT) == ENOENT


def test_open_refuses_what_the_grant_does_not_hold(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(b"x")
    name = granted(engine, tmp_path / "m")
    assert open_path(engine, name, rights=READ | WRITE) == -EACCES
    assert open_path(engine, name, oflags=CREATE) == -EACCES
    assert open_path(engine, name, oflags=TRUNCATE) == -EACCES
    assert open_path(engine, name, oflags=DIRECTORY) == -ENOTDIR
    assert open_path(engine, name, oflags=EXCLUSIVE) == -EEXIST
    assert open_path(engine, b"model/0/\xff") == -EILSEQ
    for root in (0, 1, 4, 5, -1):
        assert open_path(engine, name, root=root) == -EBADF
    assert (tmp_path / "m").read_bytes() == b"x"
    assert open_path(engine, name) == 4  # the refusals left no descriptor behind
    engine.files.revoke("/" + name)
    assert open_path(engine, name) == -ENOENT
    assert transfer(engine, "fd_read", 4, (DATA, 1)) == -EBADF


def test_descriptors_are_bounded(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(b"x")
    name = granted(engine, tmp_path / "m")
    assert [open_path(engine, name) for _ in range(256)] == list(range(4, 260))
    assert open_path(engine, name) == -EMFILE
    assert engine.call("fd_close", 100) == SUCCESS
    assert open_path(engine, name) == 100


def test_a_file_is_not_granted_for_reading_and_writing_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"abc")
    os.link(path, tmp_path / "link.bin")
    table = FileTable()
    for first, second in (("r", "w"), ("w", "r")):
        guest_path = table.grant(path, first)
        assert table.grant(path, first) != guest_path  # twice the same way is fine
        for other in (path, tmp_path / "link.bin"):
            with pytest.raises(RequestError, match="for reading and for writing at a time"):
                table.grant(other, second)
        table.grant(tmp_path / f"other-{second}.bin", "w")
        for granted_path, _, _ in table.granted():
            table.revoke(granted_path)
    assert path.read_bytes() == b""  # granted for writing alone it was
    path.write_bytes(b"abc")
    table.grant(path)
    with pytest.raises(RequestError):
        table.grant(path, "w")
    assert path.read_bytes() == b"abc"
    table.close()


def test_a_file_that_cannot_be_emptied_is_not_granted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    table = FileTable()
    (tmp_path / "a.bin").write_bytes(b"old")
    monkeypatch.setattr(os, "ftruncate", fails)
    with pytest.raises(ModelFileError, match="No space left on device"):
        table.grant(tmp_path / "a.bin", "w")
    assert table.granted() == []
    table.grant(tmp_path / "b.bin", "w")  # there is nothing to cut
    table.close()


def test_file_granted_for_writing_is_written(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "state.bin"
    fd = open_path(engine, granted(engine, path, "w"), oflags=CREATE | TRUNCATE, rights=READ | WRITE)
    engine.memory.write(DATA, b"hello world")
    assert transfer(engine, "fd_write", fd, (DATA, 6), (DATA + 6, 5)) == 11
    assert engine.call("fd_seek", fd, 0, 0, OUT) == SUCCESS
    assert transfer(engine, "fd_write", fd, (DATA + 6, 5)) == 5
    assert path.read_bytes() == b"world world"
    read_only = open_path(engine, "model/0/state.bin")
    assert transfer(engine, "fd_write", read_only, (DATA, 1)) == -EBADF
    assert transfer(engine, "fd_read", read_only, (DATA, 3)) == 3


def test_stat_tells_kind_and_size_and_nothing_of_the_host(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(bytes(1234))
    name = granted(engine, tmp_path / "m")
    fd = open_path(engine, name)
    engine.memory.write(NAME, name.encode())
    assert engine.call("path_filestat_get", ROOT, 0, NAME, len(name), OUT) == SUCCESS
    device, _inode, *rest = struct.unpack("<QQBxxxxxxxQQQQQ", engine.memory.read(OUT, 64))
    assert (device, *rest) == (0, 4, 1, 1234, 0, 0, 0)
    assert engine.call("fd_fdstat_get", fd, OUT) == SUCCESS
    kind, _, rights, _ = struct.unpack("<BxHxxxxQQ", engine.memory.read(OUT, 24))
    assert kind == 4 and rights & READ and not rights & WRITE
    assert engine.call("fd_fdstat_get", 1, OUT) == SUCCESS
    kind, _, rights, _ = struct.unpack("<BxHxxxxQQ", engine.memory.read(OUT, 24))
    assert kind == 2 and rights & WRITE and not rights & (1 << 2)


def test_one_folder_is_preopened(engine: Engine) -> None:
    assert engine.call("fd_prestat_get", ROOT, OUT) == SUCCESS
    assert engine.memory.read(OUT, 8) == struct.pack("<BxxxI", 0, 1)
    assert engine.call("fd_prestat_dir_name", ROOT, OUT, 1) == SUCCESS
    assert engine.memory.read(OUT, 1) == b"/"
    assert engine.call("fd_prestat_dir_name", ROOT, OUT, 0) == EINVAL
    for fd in (0, 2, 4, 5, -1):
        assert engine.call("fd_prestat_get", fd, OUT) == EBADF
        assert engine.call("fd_prestat_dir_name", fd, OUT, 1) == EBADF


def test_clocks_and_random(engine: Engine) -> None:
    assert engine.call("clock_time_get", 0, 1, OUT) == SUCCESS
    now = struct.unpack("<Q", engine.memory.read(OUT, 8))[0]
    assert abs(now / 1e9 - time.time()) < 5
    for clock in (1, 2, 3):
        assert engine.call("clock_time_get", clock, 1, OUT) == SUCCESS
    assert engine.call("clock_time_get", 4, 1, OUT) == EINVAL
    assert engine.call("random_get", DATA, 65536) == SUCCESS
    assert len(set(engine.memory.read(DATA, 65536))) == 256
    assert engine.call("random_get", DATA, 65537) == EINVAL  # gigabytes of it would take seconds
    assert engine.call("random_get", SIZE - 4, 5) == EFAULT
    assert engine.memory.read(SIZE - 4, 4) == bytes(4)


def test_standard_streams(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pyllama_wasm.guest")
    assert transfer(engine, "fd_read", 0, (DATA, 100)) == 0
    assert transfer(engine, "fd_read", 1, (DATA, 100)) == -EBADF
    assert transfer(engine, "fd_write", 0, (DATA, 1)) == -EBADF
    engine.memory.write(DATA, b"one\ntwo \x1b[31m" + b"red\n")
    assert transfer(engine, "fd_write", 2, (DATA, 8), (DATA + 8, 9)) == 17
    engine.memory.write(DATA, b"no newline")
    assert transfer(engine, "fd_write", 1, (DATA, 10)) == 10
    engine.close()
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("WARNING", "one"),
        ("WARNING", "two \\x1b[31mred"),
        ("INFO", "no newline"),
    ]


def test_bad_pointers_are_refused_before_anything_happens(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(b"abcdef")
    name = granted(engine, tmp_path / "m")
    fd = open_path(engine, name)
    assert transfer(engine, "fd_read", fd, (DATA, 2), (SIZE - 1, 2)) == -EFAULT
    assert transfer(engine, "fd_read", fd, (0xFFFFFFFF, 2)) == -EFAULT
    assert transfer(engine, "fd_read", fd, (DATA, 0xFFFFFFFF)) == -EFAULT
    assert engine.memory.read(DATA, 2) == bytes(2)
    assert engine.call("fd_read", fd, *iovs(engine, (DATA, 2)), -1) == EFAULT
    assert engine.call("fd_read", fd, SIZE - 4, 1, OUT) == EFAULT
    assert engine.call("fd_read", fd, IOVS, 1025, OUT) == EINVAL
    assert engine.call("fd_read", fd, IOVS, -1, OUT) == EINVAL
    assert transfer(engine, "fd_read", fd, (DATA, 2)) == 2  # the offset had not moved
    assert engine.memory.read(DATA, 2) == b"ab"
    engine.memory.write(NAME, name.encode())
    assert engine.call("path_open", ROOT, 0, NAME, len(name), 0, READ, READ, 0, -1) == EFAULT
    assert engine.call("path_open", ROOT, 0, SIZE, 4, 0, READ, READ, 0, OUT) == EFAULT
    assert open_path(engine, name) == fd + 1
    for call, args in (
        ("clock_time_get", (0, 0, SIZE - 7)),
        ("fd_fdstat_get", (fd, SIZE - 23)),
        ("fd_prestat_get", (ROOT, SIZE)),
        ("fd_prestat_dir_name", (ROOT, SIZE, 1)),
        ("fd_seek", (fd, 0, 0, -1)),
    ):
        assert engine.call(call, *args) == EFAULT
    assert not engine.is_dead


def test_unknown_descriptors_are_refused(engine: Engine) -> None:
    for fd in (4, 100, -1):
        assert engine.call("fd_close", fd) == EBADF
        assert engine.call("fd_fdstat_get", fd, OUT) == EBADF
        assert engine.call("fd_seek", fd, 0, 0, OUT) == EBADF
        assert engine.call("fd_fdstat_set_flags", fd, 0) == EBADF
    assert engine.call("fd_close", ROOT) == EBADF
    assert engine.call("fd_fdstat_set_flags", 1, 4) == SUCCESS


def test_abort_text_is_kept_printable_and_bounded(engine_of: EngineOf, engine: Engine) -> None:
    engine.memory.write(DATA, b"GGML_ASSERT(\x1b[2Jn > 0) failed\n")
    engine.call("abort", DATA, 30)
    with pytest.raises(GuestAbortError, match=r"GGML_ASSERT\(\\x1b\[2Jn > 0\) failed$"):
        engine.call("trap")
    other = engine_of(forwarding())
    other.call("abort", -1, 100)
    with pytest.raises(GuestAbortError, match="its text lies out of bounds"):
        other.call("trap")


def test_log_call_joins_continued_pieces(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "pyllama_wasm.guest")
    lines: list[tuple[int, str]] = []
    engine.add_log_handler(lambda level, line: lines.append((level, line)))
    pieces = ((3, b"loading "), (5, b"tensors"), (5, b" now\n"), (1, b"detail\n"), (2, b"held"), (4, b"bad\n"))
    for level, text in pieces:
        engine.memory.write(DATA, text)
        engine.call("log", level, DATA, len(text))
    engine.call("log", 4, -1, 10)
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("WARNING", "loading tensors now"),
        ("DEBUG", "detail"),
        ("INFO", "held"),
        ("ERROR", "bad"),
    ]
    assert lines == [(3, "loading tensors now"), (1, "detail"), (2, "held"), (4, "bad")]
    assert not engine.is_dead
