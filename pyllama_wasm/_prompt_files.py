"""Where the states of prompts are kept: one file each in a private folder, or memory; bounded, longest prefix first."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ._atomic_file import PREFIX, replacing
from ._fork_locks import renew_after_fork
from ._state_format import head_of
from .errors import RequestError, reason_of

__all__ = ["Entry", "PromptFiles", "PromptMemory"]

logger = logging.getLogger("pyllama_wasm.prompt_cache")

Tokens = npt.NDArray[np.int32]

_SUFFIX = ".state"
_LEFTOVER_S = 3600.0
_MAX_FILES = 10_000
_OPERATION = "open a prompt cache"


@dataclass(frozen=True, eq=False)
class Entry:
    """The state after some tokens."""

    name: str
    identity: str
    """What the state is good for: the model and the settings of its context."""

    tokens: Tokens
    size_bytes: int

    def n_common(self, prompt: Tokens) -> int:
        """Return how many tokens both begin with."""
        n = min(len(self.tokens), len(prompt))
        differs = self.tokens[:n] != prompt[:n]
        return int(differs.argmax()) if differs.any() else n


def entry_name(identity: str, tokens: Tokens) -> str:
    """Return the name that the state of these tokens has."""
    digest = hashlib.sha256(np.ascontiguousarray(tokens, "<i4").tobytes()).hexdigest()
    return f"{identity[:32]}-{digest[:32]}"


class PromptMemory:
    """States in memory. Every method may be called from any thread."""

    def __init__(self, max_bytes: int) -> None:
        """Keep at most ``max_bytes``; the ones not used for longest go first."""
        self._max_bytes = max_bytes
        self._lock = threading.RLock()
        renew_after_fork(self, _lock=threading.RLock)
        self._entries: dict[str, Entry] = {}  # the one used last comes last
        self._data: dict[str, bytes] = {}

    @property
    def size_bytes(self) -> int:
        """How many bytes are kept."""
        with self._lock:
            return sum(entry.size_bytes for entry in self._entries.values())

    @property
    def n_entries(self) -> int:
        """How many states are kept."""
        with self._lock:
            return len(self._entries)

    def find(self, identity: str, prompt: Tokens, *, is_whole: bool, n_most: int) -> tuple[Entry, int] | None:
        """Return the entry with the longest common beginning, and how long that is.

        ``is_whole``: all of the entry's tokens must be that beginning. Entries of more than ``n_most`` tokens are
        left out.
        """
        best: tuple[Entry, int] | None = None
        with self._lock:
            for entry in self._entries.values():
                if entry.identity != identity or len(entry.tokens) > n_most:
                    continue
                n = entry.n_common(prompt)
                if n and (best is None or n > best[1]) and not (is_whole and n < len(entry.tokens)):
                    best = entry, n
        return best

    def read(self, entry: Entry) -> bytes:
        """Return the data of an entry and count it as used. Raises ``OSError`` when it is gone."""
        with self._lock:
            if entry.name not in self._data:
                raise FileNotFoundError(entry.name)
            self._entries[entry.name] = self._entries.pop(entry.name)
            return self._data[entry.name]

    def write(self, identity: str, tokens: Tokens, data: bytes, replaced: Iterable[Entry] = ()) -> None:
        """Keep a state instead of the ``replaced`` ones, if it fits at all. Raises ``OSError``."""
        entry = Entry(entry_name(identity, tokens), identity, tokens, len(data))
        if entry.size_bytes > self._max_bytes:
            return
        with self._lock:
            self._store(entry, data)
            self._entries[entry.name] = entry
            for each in replaced:
                if each.name != entry.name:
                    self.drop(each)
            while self.size_bytes > self._max_bytes:
                self.drop(next(iter(self._entries.values())))

    def drop(self, entry: Entry) -> None:
        """Forget an entry."""
        with self._lock:
            self._entries.pop(entry.name, None)
            self._remove(entry)

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            for entry in list(self._entries.values()):
                self.drop(entry)

    def _store(self, entry: Entry, data: bytes) -> None:
        self._data[entry.name] = data

    def _remove(self, entry: Entry) -> None:
        self._data.pop(entry.name, None)


class PromptFiles(PromptMemory):
    """States as files of a folder, which several processes may share. What lies there is not believed.

    A file holds what ``_state_format.pack_container`` makes: header, tokens and state. Heads are read when the folder
    has changed; whether the rest is whole is seen when it is loaded.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Use a folder, made if there is none. Raises ``RequestError`` for one that others can look into or change."""
        super().__init__(max_bytes)
        self.folder = folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            info = folder.stat()
        except (OSError, ValueError) as error:
            raise RequestError(_OPERATION, f"{folder}: {reason_of(error)}") from error
        if not stat.S_ISDIR(info.st_mode):
            raise RequestError(_OPERATION, f"{folder} is no folder")
        if hasattr(os, "geteuid") and (info.st_uid != os.geteuid() or info.st_mode & 0o077):
            hint = "it holds prompts, and what is in it goes into answers: chmod 700"
            raise RequestError(_OPERATION, f"{folder} is not its user's alone", hint)
        self._seen_ns = -1

    def find(self, identity: str, prompt: Tokens, *, is_whole: bool, n_most: int) -> tuple[Entry, int] | None:
        """See ``PromptMemory.find``."""
        with self._lock:
            self._look()
            return super().find(identity, prompt, is_whole=is_whole, n_most=n_most)

    def read(self, entry: Entry) -> bytes:
        """Return the bytes of a file and count it as used. Raises ``OSError`` when it cannot be read."""
        path = self._path(entry.name)
        with open(path, "rb", opener=_open_plain) as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode) or info.st_size != entry.size_bytes:
                raise OSError(f"{path.name} is not what it was")
            data = file.read(entry.size_bytes + 1)
        with suppress(OSError):
            os.utime(path)
        return data

    def write(self, identity: str, tokens: Tokens, data: bytes, replaced: Iterable[Entry] = ()) -> None:
        """Write a file in one step instead of the ``replaced`` ones, and remove what was not used for longest."""
        if len(data) > self._max_bytes:
            return
        name = entry_name(identity, tokens)
        with replacing(self._path(name), private=True) as (fd, _), open(fd, "wb", closefd=False) as file:
            file.write(data)
        for each in replaced:
            if each.name != name:
                self.drop(each)
        self._prune()

    @property
    def size_bytes(self) -> int:
        """How many bytes the files have."""
        return sum(info.st_size for info, _ in self._files())

    @property
    def n_entries(self) -> int:
        """How many files there are."""
        return len(self._files())

    def clear(self) -> None:
        """Remove all files."""
        for _, path in self._files():
            _unlink(path)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{_SUFFIX}"

    def _remove(self, entry: Entry) -> None:
        _unlink(self._path(entry.name))

    def _files(self) -> list[tuple[os.stat_result, Path]]:
        """Return the files, the one used last first."""
        found = []
        with suppress(OSError), os.scandir(self.folder) as items:
            for item in items:
                if item.name.endswith(_SUFFIX) and item.is_file(follow_symlinks=False):
                    with suppress(OSError):
                        found.append((item.stat(follow_symlinks=False), Path(item.path)))
        return sorted(found, key=lambda each: -each[0].st_mtime_ns)

    def _look(self) -> None:
        """Learn which files there are now; under the lock."""
        try:
            changed_ns = self.folder.stat().st_mtime_ns
        except OSError:
            self._entries.clear()
            return
        # A change within the clock's grain of the last look may have gone unseen.
        if changed_ns == self._seen_ns and time.time_ns() - changed_ns > 1_000_000_000:
            return
        known, self._entries = self._entries, {}
        for info, path in self._files()[:_MAX_FILES]:
            entry = known.get(path.stem)
            if entry is None or entry.size_bytes != info.st_size:
                entry = self._entry(path, info.st_size)
            if entry is not None:
                self._entries[entry.name] = entry
        self._seen_ns = changed_ns

    def _entry(self, path: Path, size_bytes: int) -> Entry | None:
        """Read the head of a file; one that has none is removed."""
        try:
            with open(path, "rb", opener=_open_plain) as file:
                identity, tokens = head_of(file.read, size_bytes)
            if path.stem != entry_name(identity, tokens):
                raise RequestError("load a state", "it has another name than its content")
        except OSError:
            return None
        except RequestError as error:
            logger.warning("%s is removed from the prompt cache: %s", path.name, error)
            _unlink(path)
            return None
        return Entry(path.stem, identity, tokens, size_bytes)

    def _prune(self) -> None:
        total = 0
        for info, path in self._files():
            total += info.st_size
            if total > self._max_bytes:
                _unlink(path)
        for path in self.folder.glob(f"{PREFIX}*.tmp"):  # of processes that ended before they were done
            with suppress(OSError):
                if time.time() - path.lstat().st_mtime > _LEFTOVER_S:
                    path.unlink()


def _open_plain(path: str, flags: int) -> int:
    # Neither through a link nor waiting for the other end of a pipe.
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def _unlink(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
