"""Machine code on disk: trusted input, since whoever can write it runs code here; so it is checked before use."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import stat
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import platformdirs
import wasmtime

logger = logging.getLogger("pyllama_wasm.cache")

ENVIRONMENT_VARIABLE = "PYLLAMA_WASM_CACHE"

_KEEP = 4
_FORMAT = "1"


def cache_key(wasm_sha256: str, settings: Mapping[str, object]) -> str:
    """Return the name of the machine code of one module for one wasmtime, configuration and kind of processor."""
    parts = (_FORMAT, wasm_sha256, metadata.version("wasmtime"), repr(sorted(settings.items())), *_processor())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _processor() -> tuple[str, ...]:
    """Name what the code generator looks at; a home folder may be shared by unlike machines."""
    features = platform.processor()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            features = next((line for line in file if line.startswith(("flags", "Features"))), features)
    except OSError:  # not Linux
        pass
    return platform.system(), platform.machine(), features


class CodeCache:
    """A folder of machine code that only this user can write. Without one everything works, only slower to start.

    A file is named ``KEY-DIGEST.cwasm`` by the SHA-256 of its content, and is used only while that holds.
    """

    def __init__(self) -> None:
        """Find or make the folder: ``PYLLAMA_WASM_CACHE``, else the user's cache folder."""
        configured = os.environ.get(ENVIRONMENT_VARIABLE)
        path = Path(configured) if configured else Path(platformdirs.user_cache_dir("pyllama_wasm", appauthor=False))
        self.folder: Path | None = path
        """Where the code is kept; None when that folder cannot be used."""
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            _require_ours(path, stat.S_ISDIR)
        except OSError as error:
            logger.warning("compiled code is not cached in %s: %s", path, error)
            self.folder = None

    def load(self, engine: wasmtime.Engine, key: str) -> wasmtime.Module | None:
        """Return the module of that key, or None when there is none that can be used; a damaged file is removed."""
        for file in self._files(key):
            try:
                _require_ours(file, stat.S_ISREG)
                digest = file.stem.partition("-")[2]
                if _sha256(file) != digest:
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
                os.replace(temporary, self.folder / f"{key}-{hashlib.sha256(code).hexdigest()}.cwasm")
            except BaseException:
                _remove(Path(temporary))
                raise
            self._prune()
        except OSError as error:
            logger.warning("compiled code is not cached in %s: %s", self.folder, error)

    def _files(self, key: str) -> list[Path]:
        return sorted(self.folder.glob(f"{key}-*.cwasm")) if self.folder is not None else []

    def _prune(self) -> None:
        assert self.folder is not None
        files = sorted(self.folder.glob("*.cwasm"), key=lambda file: file.stat().st_mtime, reverse=True)
        for file in files[_KEEP:]:
            _remove(file)


def _require_ours(path: Path, is_kind: Callable[[int], bool]) -> None:
    """Raise ``OSError`` unless nobody else can write ``path``. On Windows the user's profile sees to that."""
    info = path.lstat()
    if not is_kind(info.st_mode):
        raise OSError("not a plain file or folder")
    if hasattr(os, "geteuid"):
        if info.st_uid != os.geteuid():
            raise OSError("it belongs to another user")
        if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise OSError("others can write to it")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
