"""Files that are written whole or not at all: a new file beside the old one, on the disk before it takes its name."""

from __future__ import annotations

import _thread
import errno
import os
import secrets
import shutil
import stat
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue

from .deadline import current_deadline

__all__ = ["PREFIX", "close", "discard", "final_path", "put_in_place", "replacing"]

PREFIX = ".pyllama_wasm-"
"""How the names of files and folders in the making begin."""

_PATIENCE_S = 0.01

_MOST_THREADS = 8
"""That wait for a disk at a time. What there is to do beyond that waits for one of them: a disk may hang for ever."""

_PRIVATE, _ANYONE = 0o600, 0o666  # less the umask

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


def final_path(path: Path) -> Path:
    """Return what would be written to: of a symbolic link, which stays one, the file it names.

    Raises ``OSError`` for what is there and no regular file: a device or pipe must not be replaced by one.
    """
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return target
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is a folder" if stat.S_ISDIR(mode) else "it is not a regular file")
    return target


@contextmanager
def replacing(path: Path, *, private: bool = False) -> Iterator[tuple[int, Path]]:
    """Make a new file, and let it take the place of ``path`` when the block ends; when it raises nothing is left.

    Gives its descriptor, open for reading and writing until then, and its path. The file ends with the mode of the one
    it replaces; where there is none it is as open as the umask has it, or its owner's alone if it is ``private``.
    Raises ``OSError``, and ``ValueError`` for a path with a zero character in it. A ``DeadlineError`` is an ``OSError``
    too.
    """
    target = final_path(path)
    temporary = target.with_name(f"{PREFIX}{secrets.token_hex(8)}.tmp")
    # Nobody may read the content meanwhile who may not read the file that it replaces.
    fd = os.open(temporary, _FLAGS, _PRIVATE if private or target.exists() else _ANYONE)
    try:
        try:
            yield fd, temporary
        finally:
            os.close(fd)
        put_in_place([temporary], [target])
    except BaseException:
        discard(temporary)
        raise


def discard(path: Path) -> None:
    """Remove a file, or a folder with its files, that nobody wants any more; failing to is no error.

    A disk may take long for that: a call that its deadline has ended waits a little, and leaves the rest to a thread.
    """
    if not _is_late():
        _remove(path)
        return
    is_gone = threading.Event()
    _aside(lambda: _remove(path, is_gone.set))
    is_gone.wait(_PATIENCE_S)


def _remove(path: Path, tell: Callable[[], object] = lambda: None) -> None:
    """Remove a file or folder; ``tell`` is called when the names are gone, before the disk lets go of the content."""
    held: list[int] = []
    is_folder = path.is_dir()
    with suppress(OSError):
        for file in list(path.iterdir()) if is_folder else [path]:
            with suppress(OSError):
                if sys.platform != "win32":  # where what is open cannot be removed
                    held.append(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC))
            with suppress(OSError):
                file.unlink()
    if is_folder:
        shutil.rmtree(path, ignore_errors=True)
    tell()
    for fd in held:
        os.close(fd)


def close(fd: int) -> None:
    """Close a file that has no name any more. Safe during garbage collection.

    A system may take long to let go of its content; a call that its deadline has ended leaves that to a thread.
    """
    if _is_late():
        _closing.append(fd)
        if len(_closers) >= _MOST_THREADS:
            return
        _closers.append(None)
        try:
            _thread.start_new_thread(_close_all, ())  # one of ``threading`` takes locks
        except RuntimeError:  # no more threads
            _close_all()
        return
    os.close(fd)


_closing: deque[int] = deque()
_closers: list[None] = []
"""One for each thread that closes. Lists and deques need no lock, which garbage collection could find taken."""


def _close_all() -> None:
    try:
        while _closing:
            with suppress(IndexError, OSError):  # another thread was faster
                os.close(_closing.popleft())
    finally:
        _closers.pop()


def _is_late() -> bool:
    deadline = current_deadline()
    return deadline is not None and deadline.is_due


def discard_folder(folder: Path) -> None:
    """Remove a folder of such files."""
    with suppress(OSError):
        for file in folder.iterdir():
            if file.is_file():
                discard(file)
    shutil.rmtree(folder, ignore_errors=True)


def put_in_place(files: Sequence[Path], targets: Sequence[Path]) -> None:
    """Give finished files the names of ``targets``, on the same file system, and the modes of what is there.

    All are on the disk before the first gets its name, since a name must not outlive a crash that the content does not.
    Raises ``OSError``, and ``DeadlineError`` when the disk does not have them by then: no file has its name then.
    """
    finals = [final_path(target) for target in targets]
    for file, target in zip(files, finals, strict=True):
        if not _in_time(partial(_sync, file)) and (deadline := current_deadline()) is not None:
            raise deadline.error(f"write {target.name}")
        with suppress(FileNotFoundError):
            file.chmod(target.stat().st_mode & 0o777)
    for file, target in zip(files, finals, strict=True):
        file.replace(target)
    if os.name == "posix":  # elsewhere a folder cannot be opened, and renames are on the disk by themselves
        for folder in {target.parent for target in finals}:
            _in_time(partial(_sync_folder, folder))


def _in_time(job: Callable[[], None]) -> bool:
    """Have a disk do something, and leave it to a thread when the deadline that holds comes first; whether it is done.

    Raises what it raises.
    """
    deadline = current_deadline()
    if deadline is None:
        job()
        return True
    answers: SimpleQueue[BaseException | None] = SimpleQueue()

    def answer() -> None:
        try:
            job()
            answers.put(None)
        except BaseException as error:  # noqa: BLE001  raised by who waits for it
            answers.put(error)

    _aside(answer)
    try:
        error = answers.get(timeout=min(deadline.left_s, threading.TIMEOUT_MAX))
    except Empty:
        return False
    if error is not None:
        raise error
    return True


def _aside(job: Callable[[], None]) -> None:
    """Do something in a thread, when there are too many in one of those; here when there can be none."""
    global _n_threads
    with _lock:
        if _n_threads >= _MOST_THREADS:
            _waiting.append(job)
            return
        _n_threads += 1
    try:
        threading.Thread(target=_work, args=(job,), name="pyllama-disk", daemon=True).start()
    except RuntimeError:
        _work(job)


_lock = threading.RLock()  # a finalizer may come at any moment
_n_threads = 0
_waiting: deque[Callable[[], object]] = deque()


def _work(job: Callable[[], object] | None) -> None:
    """Do a job, then those that wait."""
    global _n_threads
    while job is not None:
        with suppress(Exception):  # nobody waits for it
            job()
        with _lock:
            job = _waiting.popleft() if _waiting else None
            _n_threads -= job is None


def _after_fork() -> None:
    """Start over in a forked child, which has none of the threads."""
    global _lock, _n_threads
    _lock, _n_threads = threading.RLock(), 0
    _waiting.clear()
    _closers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _sync(file: Path) -> None:
    """Wait until the disk has the content, which is when a file system may find that it is full."""
    fd = os.open(file, os.O_RDONLY if os.name == "posix" else os.O_RDWR)  # Windows syncs only what can be written
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # not every file system can, and the files are where they belong
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
