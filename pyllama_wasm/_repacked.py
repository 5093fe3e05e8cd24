"""Weights in the kernels' own layout: woven once by the sandbox, kept in a file, and mapped by every later load.

Kernels read them with half the instructions. llama.cpp calls it repacking, and does it at every load.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ._atomic_file import PREFIX, put_in_place
from .deadline import current_deadline
from .errors import HostError, PyllamaError
from .estimate import estimate_source
from .host import module_digest
from .host.cache import CodeCache, require_ours
from .host.files import GrantedFile
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
_LEAST_SHARE = 0.25  # of the model that repacked weights are taken for, whatever the estimate says
_USUAL_CTX = 4096  # where nobody says how many tokens a context is to have
_READ_OTHERWISE = {"clef"}  # its output matrix is also looked up row by row, which repacked weights cannot be
_SPARE_BYTES = 1 << 30  # of the disk, left to others
_LEFTOVER_S = 3600.0
_WRITE_BYTES = 8 << 20
_SAMPLES, _SAMPLE_BYTES = 48, 4096  # of a file, by which it is recognized
_SUFFIX = ".weights"
_WOVEN = 1  # pw_repack_end: into one buffer, of the sandbox's own memory


class Repacking:
    """What one load of a model does about it, off the engine's thread."""

    def __init__(self, model: LoadedModel, source: ModelSource, guest_paths: Sequence[str]) -> None:
        """Decide for a model that is about to be loaded, and tell its sandbox of the file of an earlier load.

        Without a wish in ``params`` weights are repacked where there is such a file or one can be kept for the next
        load, and where the copy leaves room for a context and takes no more than half of what the model leaves.
        """
        self._engine, self._native, self._guest_paths = model.engine, model.native, guest_paths
        params = model.params
        self._settings = f"{sorted(params.kv_overrides.items())!r} {params.load_mtp}"
        self._folder: Path | None = None
        """Where files are kept, if one is to be for this model."""
        self._key = self._guest_path = ""
        size = sum(file.size_bytes() for path in guest_paths if (file := self._engine.files.find(path)))
        is_mapped = model.load == "map" and params.load_mode == "mmap" and source.is_named
        # Else what a model answers would depend on what lies on the disk.
        wish = False if params.deterministic and params.use_extra_bufts is None else params.use_extra_bufts
        is_kept = is_mapped and size >= _SMALLEST_BYTES
        # The header is read only where it decides something: of a large vocabulary that takes a while.
        if params.vocab_only or params.no_alloc or ((wish or is_kept) and _architecture(source) in _READ_OTHERWISE):
            wish = False
        if is_kept and wish is not False and (folder := _folder()) is not None:
            self._folder, self._key = folder, self._identity()
            self._guest_path = self._grant(folder)
        self.is_on = self._is_worth_it(model, source, size) if wish is None else wish
        """Whether llama.cpp is to offer weights for repacking."""
        self._engine.run(self._begin, source.operation)

    def _is_worth_it(self, model: LoadedModel, source: ModelSource, size: int) -> bool:
        if self._folder is None or not self._key:
            return False
        params = model.context_params
        try:
            estimate = estimate_source(source, replace(params, n_ctx=params.n_ctx or _USUAL_CTX))
        except PyllamaError:  # the load says what is wrong, if anything is
            return False
        if not estimate.repacked_bytes:
            return False
        limit = min(model.limits.memory_bytes or MAX_MEMORY_BYTES, MAX_MEMORY_BYTES)
        copy = max(estimate.repacked_bytes, size * _LEAST_SHARE)
        if copy > (limit - size) / 2 or estimate.total_bytes + copy > limit:
            return False
        return bool(self._guest_path) or (current_deadline() is None and _has_room(self._folder, int(copy)))

    def _grant(self, folder: Path) -> str:
        """Have the sandbox read the file of an earlier load, if there is one; return its guest path."""
        for file in folder.glob(f"{self._key}-*{_SUFFIX}"):
            try:
                require_ours(file, stat.S_ISREG)
                guest_path = self._engine.files.grant(file)
            except (PyllamaError, OSError) as error:  # too many granted, say: the sandbox weaves again
                logger.debug("repacked weights are not used: %s", error)
                continue
            granted = self._engine.files.find(guest_path)
            if granted is not None and file.stem == f"{self._key}-{_sampled_digest(granted)}":
                with suppress(OSError):  # a folder that cannot be written can still be read
                    os.utime(file)
                return guest_path
            self._engine.files.revoke(guest_path)
            logger.warning("repacked weights %s are made again: they are not what was written", file.name)
            _remove(file)
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
        if not self.is_on or not self._key or self._folder is None or current_deadline() is not None:
            return
        made, address, size = self._engine.run(self._end, "load a model")
        try:
            if made == _WOVEN and self._identity() == self._key and _has_room(self._folder, size):
                self._keep(self._folder, address, size)
        except (OSError, RuntimeError, MemoryError, HostError) as error:  # RuntimeError: no more threads
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
            parts.append(_sampled_digest(file))  # not every file system keeps times and numbers of its own
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]

    def _keep(self, folder: Path, address: int, size: int) -> None:
        fd, name = tempfile.mkstemp(prefix=PREFIX, dir=folder)  # mode 0600
        try:
            with os.fdopen(fd, "wb", buffering=0) as file:
                for offset in range(0, size, _WRITE_BYTES):
                    data = memoryview(self._engine.memory.read(address + offset, min(_WRITE_BYTES, size - offset)))
                    while data:
                        data = data[file.write(data) or 0 :]
            copy = GrantedFile(os.open(name, os.O_RDONLY | getattr(os, "O_BINARY", 0)), name, False)
            target = folder / f"{self._key}-{_sampled_digest(copy)}{_SUFFIX}"
            copy.revoke()
            # It gets its name when the disk has the content; nobody need wait for that.
            threading.Thread(target=_finish, args=(Path(name), target), name="pyllama-weights").start()
        except BaseException:
            _remove(Path(name))
            raise


def _finish(file: Path, target: Path) -> None:
    try:
        put_in_place([file], [target])
    except OSError as error:
        _remove(file)
        logger.warning("repacked weights are not kept in %s: %s", target.parent, error)
    with suppress(OSError):
        _prune(target.parent, kept_bytes())


def _architecture(source: ModelSource) -> str:
    try:
        return source.header().architecture
    except PyllamaError:
        return ""


def _sampled_digest(file: GrantedFile) -> str:
    """Return a digest of the file's size, its ends and pages between, evenly spread; raises ``OSError``."""
    size = file.size_bytes()
    found = hashlib.sha256(str(size).encode())
    buffer = bytearray(_SAMPLE_BYTES)
    for i in range(_SAMPLES):
        n = file.read_at(memoryview(buffer), max(0, size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
        found.update(buffer[:n])
    return found.hexdigest()[:16]


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
        require_ours(folder, stat.S_ISDIR)
    except OSError as error:
        logger.warning("repacked weights are not kept in %s: %s", folder, error)
        return None
    return folder


def _has_room(folder: Path, size: int) -> bool:
    """Return whether a file of ``size`` bytes may be kept; files not used for longest make room for it."""
    limit = kept_bytes()
    if size > limit:
        return False
    _prune(folder, limit - size)
    while (is_full := shutil.disk_usage(folder).free < size + _SPARE_BYTES) and _prune_one(folder):
        continue
    return not is_full


def _kept_files(folder: Path) -> list[tuple[os.stat_result, Path]]:
    """Return the files with what the system says of them, the ones used last first; another process may remove some."""
    files = []
    for file in folder.iterdir():
        with suppress(OSError):
            files.append((file.stat(), file))
    return sorted(files, key=lambda item: -item[0].st_mtime)


def _prune(folder: Path, limit: int) -> None:
    """Drop what has not been used for longest, and what processes that ended have left half written."""
    total, now = 0, time.time()
    for info, file in _kept_files(folder):
        if file.name.startswith(PREFIX):
            is_unwanted = now - info.st_mtime > _LEFTOVER_S
        else:
            total += info.st_size
            is_unwanted = total > limit
        if is_unwanted:
            _remove(file)


def _prune_one(folder: Path) -> bool:
    """Drop the file not used for longest; False when there is none."""
    files = [file for _, file in _kept_files(folder) if not file.name.startswith(PREFIX)]
    if files:
        _remove(files[-1])
    return bool(files)


def _remove(file: Path) -> None:
    with suppress(OSError):
        file.unlink()
