"""Weights in the kernels' own layout: woven once by the sandbox, kept in a file, and mapped by every later load.

Kernels read them with half the instructions. llama.cpp calls it repacking, and does it at every load.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ._atomic_file import PREFIX, put_in_place
from ._snapshot import open_regular
from .deadline import current_deadline
from .errors import HostError, PyllamaError
from .estimate import estimate_source
from .host.cache import CodeCache, require_ours
from .host.files import GrantedFile
from .limits import MAX_MEMORY_BYTES, Limits
from .params import ContextParams, ModelParams

if TYPE_CHECKING:
    from .loaded_model import LoadedModel
    from .source import ModelSource

__all__ = ["ENVIRONMENT_VARIABLE", "KeptWeights", "LoadOptions", "Repacking"]

logger = logging.getLogger("pyllama_wasm.model")

ENVIRONMENT_VARIABLE = "PYLLAMA_WASM_REPACKED_BYTES"
"""How many bytes of such files are kept; 0: none are made or used."""

_KEPT_BYTES = 16 << 30
_SMALLEST_BYTES = 32 << 20  # of a model that is worth it
_LEAST_SHARE = 0.25  # of the model that repacked weights are taken for, whatever the estimate says
_MOST_SHARE = 2  # of the files, that no repacked weights of theirs exceed
_USUAL_CTX = 4096  # where nobody says how many tokens a context is to have
_READ_OTHERWISE = {"clef"}  # its output matrix is also looked up row by row, which repacked weights cannot be
_SPARE_BYTES = 1 << 30  # of the disk, left to others
_LEFTOVER_S = 3600.0
_UNUSED_S = 30 * 86400.0  # after which a file goes; those of older modules are never used again
_WRITE_BYTES = 8 << 20
_SAMPLES, _SAMPLE_BYTES = 48, 4096  # of a file, by which it is recognized
_SUFFIX = ".weights"
_NAME = re.compile(r"[0-9a-f]{32}-[0-9a-f]{16}" + re.escape(_SUFFIX))
_WOVEN = 1  # pw_repack_end: into one buffer, of the sandbox's own memory


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded, as far as its repacked weights depend on that."""

    params: ModelParams
    context_params: ContextParams
    limits: Limits
    load: str
    module_digest: str

    may_keep: bool = True
    """Whether what the sandbox weaves may be kept. Not for a model that is loaded beside another one: what the sandbox
    then gives may be of that one's making, and later loads would take it for what is in the file."""

    used_bytes: int = 0
    """What such a one has of the sandbox's memory."""


class KeptWeights:
    """The repacked weights of the files of one model: whether there are to be any, and the file that has them.

    It is the host's alone to say, and no sandbox is asked.
    """

    def __init__(
        self, options: LoadOptions, source: ModelSource, files: Sequence[GrantedFile | None], wish: bool | None
    ) -> None:
        """Look for the file of an earlier load of ``files``, which stay whose they are.

        ``wish`` is as ``ModelParams.use_extra_bufts``. Where it is None, weights are repacked if there is such a file
        or one can be kept for the next load, and if the copy leaves room for a context and takes no more than half of
        what the model leaves.
        """
        self._options, self._source = options, source
        self._files = [file for file in files if file is not None]
        self._file: GrantedFile | None = None
        self._folder: Path | None = None
        """Where files are kept, if one is to be for this model."""
        self._key = ""
        params = options.params
        self._size = sum(file.size_bytes() for file in self._files)
        is_mapped = options.load == "map" and params.load_mode == "mmap" and source.is_named
        # Else what a model answers would depend on what lies on the disk.
        wish = False if params.deterministic and wish is None else wish
        is_kept = is_mapped and self._size >= _SMALLEST_BYTES and len(self._files) == len(files)
        # The header is read only where it decides something: of a large vocabulary that takes a while.
        if params.vocab_only or params.no_alloc or ((wish or is_kept) and _architecture(source) in _READ_OTHERWISE):
            wish = False
        if is_kept and wish is not False and (folder := _folder()) is not None:
            try:
                self._key = self._identity()
                self._file, self._folder = self._found(folder), folder
            except OSError as error:  # what is wrong with the model's own files is the load's to say
                self._key = ""
                logger.warning("repacked weights are not kept in %s: %s", folder, error)
        self._wish = wish
        self.is_on = self._is_worth_it() if wish is None else wish
        """Whether llama.cpp is to offer weights for repacking."""

    @property
    def descriptor(self) -> int | None:
        """The file of an earlier load, open for reading until ``close``; None where there is none."""
        if self._file is None or not self.is_on:
            return None
        try:
            return self._file.acquire()  # which stays open without that, until it is revoked
        finally:
            self._file.release()

    def _is_worth_it(self) -> bool:
        if self._folder is None or not self._key:
            return False
        params, limits, size = self._options.context_params, self._options.limits, self._size
        try:
            estimate = estimate_source(self._source, replace(params, n_ctx=params.n_ctx or _USUAL_CTX))
        except PyllamaError:  # the load says what is wrong, if anything is
            return False
        if not estimate.repacked_bytes:
            return False
        limit = min(limits.memory_bytes or MAX_MEMORY_BYTES, MAX_MEMORY_BYTES) - self._options.used_bytes
        copy = max(estimate.repacked_bytes, size * _LEAST_SHARE)
        if copy > (limit - size) / 2 or estimate.total_bytes + copy > limit:
            return False
        return self._file is not None or (self._may_keep and _has_room(self._folder, int(copy)))

    def _found(self, folder: Path) -> GrantedFile | None:
        """Return the file of an earlier load, if there is one and it is what was written."""
        for path in folder.glob(f"{self._key}-*{_SUFFIX}"):
            try:
                require_ours(path, stat.S_ISREG)
                file = GrantedFile(open_regular(path, "use repacked weights"), str(path), False)
            except (PyllamaError, OSError) as error:
                logger.debug("repacked weights are not used: %s", error)
                continue
            try:
                is_whole = path.stem == f"{self._key}-{_sampled_digest(file)}"
            except OSError as error:  # of a disk that fails, say: a file that is made anew may lie elsewhere
                logger.warning("repacked weights %s cannot be read: %s", path.name, error)
                is_whole = False
            if is_whole:
                with suppress(OSError):  # a folder that cannot be written can still be read
                    os.utime(path)
                return file
            file.revoke()
            logger.warning("repacked weights %s are made again: they are not what was written", path.name)
            _remove(path)
        return None

    def do_without(self) -> None:
        """Take it that there is no file, since the sandbox cannot be granted it."""
        self.close()
        self._file = None
        if self._wish is None:
            self.is_on = self._is_worth_it()

    def close(self) -> None:
        """Close the file; what is granted or mapped of it stays."""
        if self._file is not None:
            self._file.revoke()

    @property
    def _may_keep(self) -> bool:
        return self._options.may_keep and current_deadline() is None

    @property
    def is_wanted(self) -> bool:
        """Whether what the sandbox has woven is to be kept."""
        return self.is_on and bool(self._key) and self._file is None and self._may_keep

    @property
    def most_bytes(self) -> int:
        """How large repacked weights of these files may be."""
        return _MOST_SHARE * self._size

    def keep(self, size: int, read: Callable[[int, int], bytes]) -> None:
        """Write ``size`` bytes to a file that later loads map, unless a file of the model has changed meanwhile.

        ``read(offset, n)`` gives the next ``n`` of them, in order. Failing to keep them is no error.
        """
        folder = self._folder
        if folder is None or not self.is_wanted or not 0 < size <= self.most_bytes:
            return
        try:
            if self._identity() == self._key and _make_room(folder, size):
                self._write(folder, size, read)
        except (OSError, RuntimeError, MemoryError, HostError) as error:  # RuntimeError: no more threads
            logger.warning("repacked weights are not kept in %s: %s", folder, error)

    def _identity(self) -> str:
        """Name the weights by the files they are in, of which a change of any kind gives another name."""
        params = self._options.params
        parts = [self._options.module_digest, f"{sorted(params.kv_overrides.items())!r} {params.load_mtp}"]
        for file in self._files:
            info = file.status()
            parts.append(f"{info.st_dev} {info.st_ino} {info.st_size} {info.st_mtime_ns} {info.st_ctime_ns}")
            parts.append(_sampled_digest(file))  # not every file system keeps times and numbers of its own
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]

    def _write(self, folder: Path, size: int, read: Callable[[int, int], bytes]) -> None:
        fd, name = tempfile.mkstemp(prefix=PREFIX, dir=folder)  # mode 0600
        try:
            with os.fdopen(fd, "wb", buffering=0) as file:
                for offset in range(0, size, _WRITE_BYTES):
                    data = memoryview(read(offset, min(_WRITE_BYTES, size - offset)))
                    while data:
                        data = data[file.write(data) or 0 :]
            copy = GrantedFile(os.open(name, os.O_RDONLY | getattr(os, "O_BINARY", 0)), name, False)
            try:
                target = folder / f"{self._key}-{_sampled_digest(copy)}{_SUFFIX}"
            finally:
                copy.revoke()
            # It gets its name when the disk has the content; nobody need wait for that.
            threading.Thread(target=_finish, args=(Path(name), target), name="pyllama-weights").start()
        except BaseException:
            _remove(Path(name))
            raise


class Repacking:
    """What one sandbox does about the weights that it loads, off the engine's thread."""

    def __init__(self, model: LoadedModel, source: ModelSource, guest_paths: Sequence[str], wish: bool | None) -> None:
        """Tell the sandbox of a model that is about to be loaded, and of the file of an earlier load.

        ``wish`` is as in ``KeptWeights``, which decides, in the program that has opened the files.
        """
        self._engine, self._native = model.engine, model.native
        self._guest_path = ""
        self._woven = (0, 0)
        self._kept: KeptWeights | None = None
        if (opened := source.opened_files) is not None:
            self.is_on = opened.repacks and wish is not False
            """Whether llama.cpp is to offer weights for repacking."""
            if self.is_on and opened.weights is not None:
                self._grant(opened.weights)
        else:
            options = LoadOptions(
                model.params, model.context_params, model.limits, model.load, model.engine.module_digest,
                may_keep=model._is_alone, used_bytes=0 if model._is_alone else model.engine.memory.size_bytes,
            )  # fmt: skip
            self._kept = KeptWeights(options, source, [self._engine.files.find(path) for path in guest_paths], wish)
            if (descriptor := self._kept.descriptor) is not None and not self._grant(descriptor):
                self._kept.do_without()
            self._kept.close()
            self.is_on = self._kept.is_on
        self._engine.run(self._begin, source.operation)

    def _grant(self, descriptor: int) -> bool:
        """Have the sandbox read the file of an earlier load; whether it may."""
        try:
            self._guest_path = self._engine.files.grant_fd(descriptor, "weights")
        except (PyllamaError, OSError) as error:  # too many granted, say: the sandbox weaves again
            logger.debug("repacked weights are not used: %s", error)
            return False
        return True

    def _begin(self) -> None:
        with self._native.array(self._guest_path.encode() + b"\0") as path:
            try:
                self._engine.call("pw_repack_begin", path)
            except HostError:  # a module without kernels of ours, such as the one that is measured beside it
                self.is_on = False

    def _end(self) -> tuple[int, int]:
        """Return the address and size of the weights that were woven; on the engine thread."""
        with self._native.array(np.zeros(2, np.uint32)) as place:
            made = int(self._engine.call("pw_repack_end", place) or 0)
            address, size = self._engine.memory.view(place, 2, np.uint32).tolist()
        return (address, size) if made == _WOVEN else (0, 0)

    def end(self) -> None:
        """Have what the sandbox has woven kept, if it is to be here; else ``woven_bytes`` and ``read`` are for that."""
        if self._guest_path:
            self._engine.files.revoke(self._guest_path)
        kept, self._kept = self._kept, None  # with the source that it has, and what that has read
        if kept is not None and self.is_on and kept.is_wanted:
            kept.keep(self.woven_bytes(), self.read)

    def woven_bytes(self) -> int:
        """Return how many bytes the load has woven, 0 where they are mapped, or there are none."""
        self._woven = self._engine.run(self._end, "load a model") if self.is_on else (0, 0)
        return self._woven[1]

    def read(self, offset: int, n: int) -> bytes:
        """Return ``n`` bytes of them. Raises ``IndexError`` beyond their end."""
        address, size = self._woven
        if not 0 <= offset <= offset + n <= size:
            raise IndexError(f"{n} bytes at {offset} of {size}")
        return bytes(self._engine.memory.read(address + offset, n))


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
    """Return whether a file of ``size`` bytes may be kept, if need be in place of those that are there."""
    if size > kept_bytes():
        return False
    try:
        can_go = sum(info.st_size for info, file in _kept_files(folder) if not file.name.startswith(PREFIX))
        return shutil.disk_usage(folder).free + can_go >= size + _SPARE_BYTES
    except OSError as error:
        logger.warning("repacked weights are not kept in %s: %s", folder, error)
        return False


def _make_room(folder: Path, size: int) -> bool:
    """Let files not used for longest make room for one of ``size`` bytes; return whether it may be kept."""
    limit = kept_bytes()
    if size > limit or not _has_room(folder, size):
        return False
    _prune(folder, limit - size)
    before = -1
    while (free := shutil.disk_usage(folder).free) < size + _SPARE_BYTES:
        # One that is mapped still takes its room, and the next would be lost for nothing.
        if free <= before or not _prune_one(folder):
            return False
        before = free
    return True


def _kept_files(folder: Path) -> list[tuple[os.stat_result, Path]]:
    """Return our files with what the system says of them, those in the making and the ones used last first.

    Another process may remove some. What has another kind of name is not ours and is left alone.
    """
    files = []
    for file in folder.iterdir():
        if _NAME.fullmatch(file.name) or file.name.startswith(PREFIX):
            with suppress(OSError):
                files.append((file.lstat(), file))
    return sorted(files, key=lambda item: (not item[1].name.startswith(PREFIX), -item[0].st_mtime))


def _prune(folder: Path, limit: int) -> None:
    """Drop what has not been used for longest, and what processes that ended have left half written.

    What others are writing counts: the files that are there are dropped for it before it is complete.
    """
    total, now = 0, time.time()
    for info, file in _kept_files(folder):
        is_in_the_making = file.name.startswith(PREFIX)
        if now - info.st_mtime > (_LEFTOVER_S if is_in_the_making else _UNUSED_S):
            _remove(file)
            continue
        total += info.st_size
        if total > limit and not is_in_the_making:
            _remove(file)


def _prune_one(folder: Path) -> bool:
    """Drop the file not used for longest; False when there is none that can be."""
    files = [file for _, file in _kept_files(folder) if not file.name.startswith(PREFIX)]
    return bool(files) and _remove(files[-1])


def _remove(file: Path) -> bool:
    """Remove a file; False where the system does not, as one that is mapped on Windows."""
    try:
        file.unlink(missing_ok=True)
    except OSError:
        return False
    return True
