"""Files that are written whole or not at all: a new file beside the old one, on the disk before it takes its name."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["PREFIX", "final_path", "put_in_place", "replacing"]

PREFIX = ".pyllama_wasm-"
"""How the names of files and folders in the making begin."""

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
    Raises ``OSError``, and ``ValueError`` for a path with a zero character in it.
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
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def put_in_place(files: Sequence[Path], targets: Sequence[Path]) -> None:
    """Give finished files the names of ``targets``, on the same file system, and the modes of what is there.

    All are on the disk before the first gets its name, since a name must not outlive a crash that the content does not.
    """
    finals = [final_path(target) for target in targets]
    for file, target in zip(files, finals, strict=True):
        _sync(file)
        with suppress(FileNotFoundError):
            file.chmod(target.stat().st_mode & 0o777)
    for file, target in zip(files, finals, strict=True):
        file.replace(target)
    if os.name == "posix":  # elsewhere a folder cannot be opened, and renames are on the disk by themselves
        for folder in {target.parent for target in finals}:
            _sync_folder(folder)


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
