"""Files are written whole or not at all, and what stood there gives its mode."""

from __future__ import annotations

import _thread
import errno
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import pyllama_wasm as pw
from pyllama_wasm import _atomic_file
from pyllama_wasm._atomic_file import close, discard, final_path, put_in_place, replacing

posix = pytest.mark.skipif(os.name != "posix", reason="modes, links and limits are POSIX's")


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def write(path: Path, data: bytes) -> None:
    with replacing(path) as (fd, _):
        os.write(fd, data)


def test_the_file_is_there_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replacing(path) as (fd, temporary):
        os.write(fd, b"new")
        assert names(tmp_path) == [temporary.name]
        assert temporary.read_bytes() == b"new"
    assert names(tmp_path) == ["file"] and path.read_bytes() == b"new"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(error), replacing(path) as (fd, _):
        os.write(fd, b"new")
        raise error
    assert names(tmp_path) == ["file"] and path.read_bytes() == b"old"


def test_a_failing_sync_or_rename_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for owner, name in ((os, "fsync"), (Path, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(OSError, match="No space left"):
                write(path, b"new")
        assert names(tmp_path) == ["file"] and path.read_bytes() == b"old"


def test_all_files_are_on_the_disk_before_the_first_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, targets = [tmp_path / "a", tmp_path / "b"], [tmp_path / "x", tmp_path / "y"]
    for file in files:
        file.write_bytes(file.name.encode())
    happened: list[str] = []
    replace = Path.replace

    def told(self: Path, to: Path) -> Path:
        happened.append(self.name)
        return replace(self, to)

    monkeypatch.setattr(os, "fsync", lambda fd: happened.append("sync"))
    monkeypatch.setattr(Path, "replace", told)
    put_in_place(files, targets)
    assert happened[:4] == ["sync", "sync", "a", "b"]
    assert [target.read_bytes() for target in targets] == [b"a", b"b"]


@posix
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o755])
def test_the_mode_of_the_replaced_file_is_kept(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(mode)
    write(path, b"new")
    assert stat.S_IMODE(path.stat().st_mode) == mode and path.read_bytes() == b"new"


@posix
def test_a_new_file_has_the_mode_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write(tmp_path / "ours", b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


@posix
def test_a_private_file_is_private_while_it_is_written(tmp_path: Path) -> None:
    path, umask = tmp_path / "file", os.umask(0)
    try:
        for mode in (None, 0o600, 0o664):  # with no file there, and with one
            if mode is not None:
                path.write_bytes(b"old")
                path.chmod(mode)
            for private in (False, True) if mode else (True,):
                with replacing(path, private=private) as (fd, temporary):
                    assert stat.S_IMODE(os.fstat(fd).st_mode) == stat.S_IMODE(temporary.stat().st_mode) == 0o600
                assert stat.S_IMODE(path.stat().st_mode) == (mode or 0o600)
    finally:
        os.umask(umask)


@posix
def test_a_symbolic_link_stays_one(tmp_path: Path) -> None:
    folder, link = tmp_path / "folder", tmp_path / "link"
    folder.mkdir()
    for old in (b"old", None):  # with a file behind it, and without
        if old is not None:
            (folder / "file").write_bytes(old)
            (folder / "file").chmod(0o640)
        link.unlink(missing_ok=True)
        link.symlink_to("folder/file")
        write(link, b"new")
        assert link.is_symlink() and link.read_bytes() == b"new"
        assert names(folder) == ["file"] and names(tmp_path) == ["folder", "link"]
        (folder / "file").unlink()
    link.unlink()
    link.symlink_to("link")
    with pytest.raises(OSError, match="symbolic links"):
        write(link, b"new")


@posix
def test_folders_devices_and_pipes_are_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to("/dev/null")
    for path in (tmp_path / "pipe", tmp_path / "null", Path("/dev/null")):
        with pytest.raises(OSError, match="not a regular file"):
            write(path, b"new")
    with pytest.raises(OSError, match="it is a folder"):
        final_path(tmp_path)
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_paths_that_cannot_be_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "missing" / "file", b"")
    with pytest.raises(ValueError, match="null"):
        write(tmp_path / "a\0b", b"")


@posix
def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    program = """
import pathlib, resource, sys
from pyllama_wasm._atomic_file import replacing
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    with replacing(pathlib.Path(sys.argv[1])) as (fd, _), open(fd, "wb", closefd=False) as file:
        file.write(bytes(1_000_000))
except OSError as error:
    print(error.strerror)
"""
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "File too large\n", done.stderr
    assert names(tmp_path) == ["file"] and path.read_bytes() == b"old"


def test_a_disk_that_is_in_time_tells_what_went_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    with pw.deadline(60):
        write(path, b"old")
    assert path.read_bytes() == b"old"

    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pw.deadline(60), pytest.raises(OSError, match="No space left"):
        write(path, b"new")
    assert names(tmp_path) == ["file"] and path.read_bytes() == b"old"


def test_a_disk_that_is_not_in_time_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    done = threading.Event()

    def slow(_: object) -> None:
        done.wait(30)

    monkeypatch.setattr(os, "fsync", slow)
    began = time.monotonic()
    with pw.deadline(0.1), pytest.raises(pw.DeadlineError, match="write file: it did not end"):
        write(path, b"new")
    assert time.monotonic() - began < 10
    assert names(tmp_path) == ["file"] and path.read_bytes() == b"old"
    done.set()


@pytest.mark.parametrize("is_late", [True, False])
def test_what_nobody_wants_goes(tmp_path: Path, is_late: bool) -> None:
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    for name in ("a", "b", "inner/c"):
        (folder / name).write_bytes(b"content")
    (tmp_path / "file").write_bytes(b"content")
    with pw.deadline(1e-6 if is_late else 60):
        time.sleep(1e-3)
        for name in ("folder", "missing", "file"):
            discard(tmp_path / name)
    ends_at = time.monotonic() + 10
    while names(tmp_path) and is_late and time.monotonic() < ends_at:
        time.sleep(0.01)
    assert names(tmp_path) == []


def test_who_is_late_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, closed = threading.Event(), threading.Event()

    def slow(*_: object) -> None:
        assert done.wait(30)
        closed.set()

    monkeypatch.setattr(os, "close", slow)
    monkeypatch.setattr(Path, "unlink", slow)
    (tmp_path / "file").write_bytes(b"content")
    began = time.monotonic()
    with pw.deadline(1e-6):
        time.sleep(1e-3)
        discard(tmp_path / "file")
        close(0)
    assert time.monotonic() - began < 10 and not closed.is_set()
    done.set()
    assert closed.wait(10)


def test_the_sync_of_a_folder_is_not_waited_for_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = threading.Event()
    monkeypatch.setattr(_atomic_file, "_sync_folder", lambda _: done.wait(30))
    with pw.deadline(0.2):
        write(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    done.set()


def test_a_disk_is_waited_for_where_there_is_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(_: object) -> None:
        raise RuntimeError("can't start new thread")

    def no_raw_thread(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    with pw.deadline(60):
        write(tmp_path / "kept", b"new")
    monkeypatch.setattr(_thread, "start_new_thread", no_raw_thread)
    fd = os.open(tmp_path / "kept", os.O_RDONLY)
    with pw.deadline(1e-6):
        time.sleep(1e-3)
        discard(tmp_path / "kept")
        close(fd)
    assert names(tmp_path) == []
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_disk_that_hangs_takes_no_more_threads_than_there_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = threading.Event()
    synced: list[int] = []

    def slow(fd: int) -> None:
        done.wait(30)
        synced.append(fd)

    def is_idle() -> bool:
        return not _atomic_file._n_threads and not _atomic_file._waiting

    monkeypatch.setattr(os, "fsync", slow)
    n_before = threading.active_count()
    for i in range(12):
        with pw.deadline(0.01), pytest.raises(pw.DeadlineError):
            write(tmp_path / f"file{i}", b"new")
    assert threading.active_count() - n_before <= _atomic_file._MOST_THREADS
    done.set()
    ends_at = time.monotonic() + 10
    while not is_idle() and time.monotonic() < ends_at:
        time.sleep(0.01)
    assert is_idle() and names(tmp_path) == [] and len(synced) >= _atomic_file._MOST_THREADS - 1
    monkeypatch.undo()
    with pw.deadline(60):
        write(tmp_path / "file", b"new")
    assert names(tmp_path) == ["file"]


def test_files_that_are_slow_to_close_take_few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    done = threading.Event()
    closed: list[int] = []

    def slow(fd: int) -> None:
        done.wait(30)
        closed.append(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "close", slow)
        with pw.deadline(1e-6):
            time.sleep(1e-3)
            for fd in range(1000, 1020):
                close(fd)
        assert len(_atomic_file._closers) == _atomic_file._MOST_THREADS
        done.set()
        ends_at = time.monotonic() + 10
        while _atomic_file._closers and time.monotonic() < ends_at:
            time.sleep(0.01)
        assert sorted(closed) == list(range(1000, 1020))


def test_whatever_goes_wrong_on_a_disk_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise ValueError("it is odd")

    monkeypatch.setattr(os, "fsync", broken)
    with pw.deadline(60), pytest.raises(ValueError, match="it is odd"):
        write(tmp_path / "file", b"new")
    assert names(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "register_at_fork"), reason="there is no fork here")
def test_a_forked_child_counts_its_own_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_atomic_file, "_n_threads", 8)
    lock = _atomic_file._lock
    _atomic_file._after_fork()
    assert _atomic_file._n_threads == 0 and _atomic_file._lock is not lock
