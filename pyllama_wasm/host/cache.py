"""Machine code on disk: trusted input, since whoever can write it runs code here; so it is checked before use."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import platform
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path

import platformdirs
import wasmtime

logger = logging.getLogger("pyllama_wasm.cache")

ENVIRONMENT_VARIABLE = "PYLLAMA_WASM_CACHE"

_KEEP = 8
_LEFTOVER_S = 3600.0
"""A file in the making that is older was left by a process that ended before it was done."""

_FORMAT = "2"

_PART_BYTES = 4 << 20
_READ_BYTES = 256 << 10  # stays in the processor's cache between reading and hashing
_MAX_THREADS = 4


def cache_key(wasm_digest: str, settings: Mapping[str, object]) -> str:
    """Return the name of the machine code of one module for one wasmtime, configuration and kind of processor.

    ``wasm_digest`` is the module's :func:`digest` or :func:`file_digest`.
    """
    parts = (_FORMAT, wasm_digest, _wasmtime_version(), repr(sorted(settings.items())), *_processor())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def digest(data: bytes | bytearray) -> str:
    """Return the SHA-256 of the size of ``data`` and the SHA-256 of each of its parts: what ``file_digest`` returns."""
    view = memoryview(data)
    starts = range(0, len(view), _PART_BYTES)
    return _combined(len(view), [hashlib.sha256(view[i : i + _PART_BYTES]).digest() for i in starts])


def file_digest(path: Path) -> str:
    """Return the ``digest`` of a file's content, the parts hashed side by side: it is most of a start from the cache.

    Raises ``OSError``.
    """
    size = path.stat().st_size
    digests = [b""] * -(-size // _PART_BYTES)
    turns = itertools.count()
    errors: list[Exception] = []

    def work() -> None:
        try:
            with open(path, "rb", buffering=0) as file:
                while (i := next(turns)) < len(digests):
                    digests[i] = _part_digest(file, i)
        except Exception as error:
            errors.append(error)

    threads = []
    for _ in range(min(len(digests), os.cpu_count() or 1, _MAX_THREADS) - 1):
        thread = threading.Thread(target=work, name="pyllama-digest", daemon=True)
        with suppress(RuntimeError):  # no more threads: those there are do it
            thread.start()
            threads.append(thread)
    work()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return _combined(size, digests)


def _part_digest(file: FileIO, i: int) -> bytes:
    """Hash one part. Reading and hashing release the GIL."""
    file.seek(i * _PART_BYTES)
    part, left = hashlib.sha256(), _PART_BYTES
    buffer = memoryview(bytearray(_READ_BYTES))
    while n := file.readinto(buffer[:left]):
        part.update(buffer[:n])
        left -= n
    return part.digest()


def _combined(size: int, digests: list[bytes]) -> str:
    return hashlib.sha256(size.to_bytes(8, "little") + b"".join(digests)).hexdigest()


def _wasmtime_version() -> str:
    """Return wasmtime's version by the folder that its installation left beside it; all, where several lie there.

    It only keeps the codes of several versions apart: wasmtime itself refuses what another version made.
    """
    folders = Path(wasmtime.__file__).parent.parent.glob("wasmtime-*.dist-info")
    versions = sorted(folder.name.removeprefix("wasmtime-").removesuffix(".dist-info") for folder in folders)
    if versions:
        return " ".join(versions)
    from importlib import metadata  # its import takes half as long as a whole start from the cache

    return metadata.version("wasmtime")


def _processor() -> tuple[str, ...]:
    """Name what the code generator looks at; a home folder may be shared by unlike machines."""
    features = ""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        features = next((line for line in file if line.startswith(("flags", "Features"))), "")
    # platform.processor() may start a process.
    return platform.system(), platform.machine(), features or platform.processor()


class CodeCache:
    """A folder of machine code that only this user can write. Without one everything works, only slower to start.

    A file is named ``KEY-DIGEST.cwasm`` by the digest of its content, and is used only while that holds.
    """

    def __init__(self) -> None:
        """Find or make the folder: ``PYLLAMA_WASM_CACHE``, else the user's cache folder."""
        configured = os.environ.get(ENVIRONMENT_VARIABLE)
        path = Path(configured) if configured else Path(platformdirs.user_cache_dir("pyllama_wasm", appauthor=False))
        self.folder: Path | None = path
        """Where the code is kept; None when that folder cannot be used."""
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            require_ours(path, stat.S_ISDIR)
            self.folder = path = path.resolve()  # links on the way there may be changed later
            _require_fixed(path)
        except OSError as error:
            logger.warning("compiled code is not cached in %s: %s", path, error)
            self.folder = None

    def load(self, engine: wasmtime.Engine, key: str) -> wasmtime.Module | None:
        """Return the module of that key, or None when there is none that can be used; a damaged file is removed."""
        for file in self._files(key):
            try:
                require_ours(file, stat.S_ISREG)
                if file_digest(file) != file.stem.partition("-")[2]:
                    raise OSError("its content does not match its name")
                module = wasmtime.Module.deserialize_file(engine, str(file))
                os.utime(file)
                return module
            except (OSError, wasmtime.WasmtimeError) as error:
                logger.warning("cached code %s is rebuilt: %s", file.name, error)
                _remove(file)
        return None

    def save(self, key: str, code: bytes | bytearray) -> None:
        """Store the machine code in one step, and drop what has not been used for longest."""
        if self.folder is None:
            return
        try:
            fd, temporary = tempfile.mkstemp(prefix="new-", suffix=".tmp", dir=self.folder)  # mode 0600
            try:
                with os.fdopen(fd, "wb") as file:
                    file.write(code)
                os.replace(temporary, self.folder / f"{key}-{digest(code)}.cwasm")
            except BaseException:
                _remove(Path(temporary))
                raise
            self._prune(self.folder)
        except OSError as error:
            logger.warning("compiled code is not cached in %s: %s", self.folder, error)

    def _files(self, key: str) -> list[Path]:
        return sorted(self.folder.glob(f"{key}-*.cwasm")) if self.folder is not None else []

    @staticmethod
    def _prune(folder: Path) -> None:
        files = sorted(folder.glob("*.cwasm"), key=_modified_at, reverse=True)
        for file in files[_KEEP:]:
            _remove(file)
        for file in folder.glob("new-*.tmp"):
            if 0 < _modified_at(file) < time.time() - _LEFTOVER_S:
                _remove(file)


def require_ours(path: Path, is_kind: Callable[[int], bool]) -> None:
    """Raise ``OSError`` unless nobody else can write ``path``. On Windows the user's profile sees to that."""
    info = path.lstat()
    if not is_kind(info.st_mode):
        raise OSError("not a plain file or folder")
    if hasattr(os, "geteuid"):
        if info.st_uid != os.geteuid():
            raise OSError("it belongs to another user")
        if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise OSError("others can write to it")


def _require_fixed(path: Path) -> None:
    """Raise ``OSError`` when anybody could put another folder in the place of ``path`` after it was looked at."""
    if hasattr(os, "geteuid"):
        for parent in path.parents:
            info = parent.stat()
            is_anybodys = info.st_mode & stat.S_IWOTH and not info.st_mode & stat.S_ISVTX
            is_somebody_elses = os.geteuid() != 0 and info.st_uid not in (0, os.geteuid())
            if is_anybodys or is_somebody_elses:
                raise OSError(f"others can rename what is in {parent}")


def _modified_at(path: Path) -> float:
    """Return when a file was last written, 0 when it is gone."""
    try:
        return path.lstat().st_mtime
    except OSError:
        return 0.0


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
