"""Weights in the kernels' own layout: woven once by the sandbox, kept in a file, and mapped by every later load.

Kernels read them with half the instructions. llama.cpp calls it repacking, and does it at every load.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ._atomic_file import PREFIX, put_in_place
from .deadline import current_deadline
from .errors import HostError, PyllamaError
from .host import module_digest
from .host.cache import CodeCache
from .limits import MAX_MEMORY_BYTES

if TYPE_CHECKING:
    from .loaded_model import LoadedModel
    from .source import ModelSource

__all__ = ["ENVIRONMENT_VARIABLE", "Repacking"]

logger = logging.getLogger("pyllama_wasm.model")

ENVIRONMENT_VARIABLE = "PYLLAMA_WASM_REPACKED_BYTES"
"""How many bytes of such files are kept; 0: none are made or used."""

_KEPT_BYTES = 16 << 30
_SMALLEST_BYTES = 32 << 20  # of a model that is worth it
_GROWTH = 1.1  # a file of repacked weights, to the model's
_SPARE_BYTES = 1 << 30  # of the disk, left to others
_LEFTOVER_S = 3600.0
_WRITE_BYTES = 8 << 20
_SUFFIX = ".weights"
_WOVEN = 1  # pw_repack_end: into one buffer, of the sandbox's own memory


class Repacking:
    """What one load of a model does about it, off the engine's thread."""

    def __init__(self, model: LoadedModel, source: ModelSource, guest_paths: Sequence[str]) -> None:
        """Decide for a model that is about to be loaded, and tell its sandbox of the file of an earlier load.

        Without a wish in ``params`` weights are repacked where a file can be kept for the next load, and where the
        copy takes no more than half of the memory that the model itself leaves.
        """
        self._engine, self._native, self._guest_paths = model.engine, model.native, guest_paths
        params = model.params
        self._settings = f"{sorted(params.kv_overrides.items())!r} {params.load_mtp}"
        size = sum(file.size_bytes() for path in guest_paths if (file := self._engine.files.find(path)))
        is_mapped = model.load == "map" and params.load_mode == "mmap" and source.is_named
        has_weights = not (params.vocab_only or params.no_alloc)
        self._folder: Path | None = None
        """Where files are kept, if one is to be for this model."""
        if is_mapped and has_weights and params.use_extra_bufts is not False and size >= _SMALLEST_BYTES:
            self._folder = _folder()
        wish = params.use_extra_bufts
        if wish is None and params.deterministic:
            wish = False  # else results could depend on what the disk and the memory have room for
        elif wish is None:
            limit = min(model.limits.memory_bytes or MAX_MEMORY_BYTES, MAX_MEMORY_BYTES)
            wish = self._folder is not None and size * _GROWTH <= (limit - size) / 2
        self.is_on = has_weights and wish
        """Whether llama.cpp is to offer weights for repacking."""
        self._key = self._identity() if self.is_on and self._folder is not None else ""
        self._guest_path = self._grant()
        self._engine.run(self._begin, source.operation)

    def _grant(self) -> str:
        """Have the sandbox read the file of an earlier load, if there is one; return its guest path."""
        if not self._key or self._folder is None:
            return ""
        file = self._folder / f"{self._key}{_SUFFIX}"
        with suppress(PyllamaError, OSError):  # none there, or too many granted: the sandbox weaves again
            if file.is_file():
                os.utime(file)
                return self._engine.files.grant(file)
        return ""

    def _begin(self) -> None:
        with self._native.array(self._guest_path.encode() + b"\0") as path:
            try:
                self._engine.call("pw_repack_begin", path)
            except HostError:  # a module without kernels of ours, such as the one that is measured beside it
                self.is_on, self._key = False, ""

    def _end(self) -> tuple[int, int, int]:
        """Return what became of it, and the address and size of the weights; on the engine thread."""
        with self._native.array(np.zeros(2, np.uint32)) as place:
            made = int(self._engine.call("pw_repack_end", place) or 0)
            address, size = self._engine.memory.view(place, 2, np.uint32).tolist()
        return made, address, size

    def end(self) -> None:
        """Keep what the sandbox has woven, unless a file has changed meanwhile. Failing to is no error."""
        if self._guest_path:
            self._engine.files.revoke(self._guest_path)
        if not self._key or self._folder is None or current_deadline() is not None:
            return
        made, address, size = self._engine.run(self._end, "load a model")
        if made != _WOVEN or self._identity() != self._key:
            return
        try:
            self._keep(self._folder, address, size)
        except OSError as error:
            logger.warning("repacked weights are not kept in %s: %s", self._folder, error)

    def _identity(self) -> str:
        """Name the weights by the files they are in, of which a change of any kind gives another name."""
        parts = [module_digest(), self._settings]
        for guest_path in self._guest_paths:
            file = self._engine.files.find(guest_path)
            if file is None:
                return ""
            info = file.status()
            parts.append(f"{info.st_dev} {info.st_ino} {info.st_size} {info.st_mtime_ns} {info.st_ctime_ns}")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]

    def _keep(self, folder: Path, address: int, size: int) -> None:
        limit = kept_bytes()
        if size > limit or shutil.disk_usage(folder).free < size + _SPARE_BYTES:
            return
        fd, name = tempfile.mkstemp(prefix=PREFIX, dir=folder)  # mode 0600
        try:
            with os.fdopen(fd, "wb", buffering=0) as file:
                for offset in range(0, size, _WRITE_BYTES):
                    data = memoryview(self._engine.memory.read(address + offset, min(_WRITE_BYTES, size - offset)))
                    while data:
                        data = data[file.write(data) or 0 :]
        except BaseException:
            _remove(Path(name))
            raise
        target = folder / f"{self._key}{_SUFFIX}"
        # It gets its name when the disk has the content; nobody need wait for that.
        threading.Thread(target=_finish, args=(Path(name), target, limit), name="pyllama-weights").start()


def _finish(file: Path, target: Path, limit: int) -> None:
    try:
        put_in_place([file], [target])
        _prune(target.parent, limit)
    except OSError as error:
        _remove(file)
        logger.warning("repacked weights are not kept in %s: %s", target.parent, error)


def kept_bytes() -> int:
    """Return how many bytes of repacked weights are kept on the disk."""
    try:
        return max(0, int(os.environ[ENVIRONMENT_VARIABLE]))
    except (KeyError, ValueError):
        return _KEPT_BYTES


def _folder() -> Path | None:
    """Return the folder that only this user can write, or None."""
    if not kept_bytes():
        return None
    cache = CodeCache().folder
    if cache is None:
        return None
    folder = cache / "weights"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        logger.warning("repacked weights are not kept in %s: %s", folder, error)
        return None
    return folder


def _prune(folder: Path, limit: int) -> None:
    """Drop what has not been used for longest, and what processes that ended have left half written."""
    total, now = 0, time.time()
    files = [(file.stat(), file) for file in folder.iterdir()]
    for info, file in sorted(files, key=lambda item: -item[0].st_mtime):
        if file.name.startswith(PREFIX):
            is_unwanted = now - info.st_mtime > _LEFTOVER_S
        else:
            total += info.st_size
            is_unwanted = total > limit
        if is_unwanted:
            _remove(file)


def _remove(file: Path) -> None:
    with suppress(OSError):
        file.unlink()
