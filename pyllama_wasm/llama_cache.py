"""Saved states of a ``Llama``, kept by the tokens they were computed from: in memory or on the disk, never pickled."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ._atomic_file import replacing
from .errors import RequestError

__all__ = ["BaseLlamaCache", "LlamaCache", "LlamaDiskCache", "LlamaRAMCache", "LlamaState", "longest_token_prefix"]

Key = tuple[int, ...]

DEFAULT_CAPACITY_BYTES = 2 << 30


def longest_token_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens ``a`` and ``b`` begin with in common."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(np.asarray(a[:n], np.int64) != np.asarray(b[:n], np.int64))
    return int(differ[0]) if len(differ) else n


@dataclass
class LlamaState:
    """What a ``Llama`` remembers: from ``save_state``, for ``load_state`` of the same model with the same settings."""

    input_ids: npt.NDArray[np.int32]
    """The tokens, shape ``(n_tokens,)``."""

    scores: npt.NDArray[np.float32]
    """The logits after each token with ``logits_all``, shape ``(n_tokens, n_vocab)``; else without rows."""

    n_tokens: int
    llama_state: bytes
    """``State.get_data``: the KV cache behind a header that tells what it belongs to. Only the sandbox parses it."""

    llama_state_size: int
    """Bytes of it."""

    seed: int


class BaseLlamaCache(ABC):
    """What ``Llama.set_cache`` takes: states by their tokens, found by the longest common beginning."""

    def __init__(self, capacity_bytes: int = DEFAULT_CAPACITY_BYTES) -> None:
        """Keep states of at most ``capacity_bytes`` together."""
        if isinstance(capacity_bytes, bool) or not isinstance(capacity_bytes, int) or capacity_bytes < 0:
            raise RequestError("set capacity_bytes", f"{capacity_bytes!r} is not a number of bytes")
        self.capacity_bytes = capacity_bytes

    @property
    @abstractmethod
    def cache_size(self) -> int:
        """Bytes of all states in it."""

    @abstractmethod
    def __getitem__(self, key: Sequence[int]) -> LlamaState:
        """Return the state that begins as ``key`` does for longest; ``KeyError`` when none has a token in common."""

    @abstractmethod
    def __contains__(self, key: Sequence[int]) -> bool:
        """Tell whether there is such a state."""

    @abstractmethod
    def __setitem__(self, key: Sequence[int], value: LlamaState) -> None:
        """Keep a state; those not used for longest go where there is no room."""


class LlamaRAMCache(BaseLlamaCache):
    """States in memory."""

    def __init__(self, capacity_bytes: int = DEFAULT_CAPACITY_BYTES) -> None:
        """Begin with none."""
        super().__init__(capacity_bytes)
        self.cache_state: OrderedDict[Key, LlamaState] = OrderedDict()
        self._lock = threading.RLock()

    @property
    def cache_size(self) -> int:
        """Bytes of all states in it."""
        with self._lock:
            return sum(state.llama_state_size + state.scores.nbytes for state in self.cache_state.values())

    def __getitem__(self, key: Sequence[int]) -> LlamaState:
        """Return the state that begins as ``key`` does for longest."""
        with self._lock:
            found = _best(tuple(key), self.cache_state)
            self.cache_state.move_to_end(found)
            return self.cache_state[found]

    def __contains__(self, key: Sequence[int]) -> bool:
        """Tell whether a state has a token in common with ``key``."""
        with self._lock:
            return _has_any(tuple(key), self.cache_state)

    def __setitem__(self, key: Sequence[int], value: LlamaState) -> None:
        """Keep a state; those not used for longest go where there is no room."""
        with self._lock:
            self.cache_state.pop(tuple(key), None)
            self.cache_state[tuple(key)] = value
            while self.cache_state and self.cache_size > self.capacity_bytes:
                self.cache_state.popitem(last=False)


LlamaCache = LlamaRAMCache


class LlamaDiskCache(BaseLlamaCache):
    """States in files of a folder: for each the bytes that the sandbox parses, and a JSON text of what they are.

    Nothing in it can run code, whoever wrote it: a damaged or foreign file is no entry, or is refused with
    ``RequestError`` when it is loaded. Several processes may use one folder.
    """

    def __init__(
        self,
        cache_dir: str | os.PathLike[str] = ".cache/llama_cache",
        capacity_bytes: int = DEFAULT_CAPACITY_BYTES,
    ) -> None:
        """Use ``cache_dir``, which is made where it is missing."""
        super().__init__(capacity_bytes)
        self.cache_dir = Path(cache_dir)
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        self._known: dict[Path, tuple[int, dict[str, Any]]] = {}
        self._lock = threading.RLock()

    @property
    def cache_size(self) -> int:
        """Bytes of all files in it."""
        return sum(_size(path) + _size(_state_path(path)) for path in self._entries().values())

    def __getitem__(self, key: Sequence[int]) -> LlamaState:
        """Return the state that begins as ``key`` does for longest."""
        with self._lock:
            entries = self._entries()
            path = entries[_best(tuple(key), entries)]
            about = self._known[path][1]
        try:
            data = _state_path(path).read_bytes()
            os.utime(path)
        except OSError as error:  # another process has dropped it
            raise KeyError(tuple(key)) from error
        tokens = np.asarray(about["tokens"], np.int32)
        return LlamaState(tokens, np.zeros((0, 0), np.float32), len(tokens), data, len(data), about["seed"])

    def __contains__(self, key: Sequence[int]) -> bool:
        """Tell whether a state has a token in common with ``key``."""
        return _has_any(tuple(key), self._entries())

    def __setitem__(self, key: Sequence[int], value: LlamaState) -> None:
        """Keep a state, without its scores; those not used for longest go where there is no room."""
        # What the state holds, not the key: a key may have a last token that was never computed.
        tokens = [int(token) for token in value.input_ids[: value.n_tokens]]
        path = self.cache_dir / f"{hashlib.sha256(repr(tokens).encode()).hexdigest()}.json"
        about = {"format": _FORMAT, "tokens": tokens, "seed": int(value.seed)}
        # The text makes an entry of it, so it comes last.
        for target, data in ((_state_path(path), value.llama_state), (path, json.dumps(about).encode())):
            with replacing(target, private=True) as (fd, _), open(fd, "wb", closefd=False) as file:
                file.write(data)
        with self._lock:
            self._make_room()

    def _make_room(self) -> None:
        used = sorted(self._entries().values(), key=lambda path: self._known[path][0])
        size = self.cache_size
        for path in used:
            if size <= self.capacity_bytes:
                return
            size -= _size(path) + _size(_state_path(path))
            for file in (path, _state_path(path)):
                file.unlink(missing_ok=True)

    def _entries(self) -> dict[Key, Path]:
        """Return the files by the tokens of their states, reading those that are new or have changed."""
        known: dict[Path, tuple[int, dict[str, Any]]] = {}
        with self._lock:
            for path in self.cache_dir.glob("*.json"):
                with suppress(OSError, ValueError, RecursionError):
                    time_ns = path.stat().st_mtime_ns
                    before = self._known.get(path)
                    known[path] = (time_ns, before[1]) if before else (time_ns, _read_about(path))
            self._known = known
        return {tuple(about["tokens"]): path for path, (_, about) in known.items()}


_FORMAT = 1


def _read_about(path: Path) -> dict[str, Any]:
    """Return what is said of a state; raises ``ValueError`` for what is none of ours."""
    about = json.loads(path.read_bytes())
    if not isinstance(about, dict) or about.get("format") != _FORMAT:
        raise ValueError("not of this format")
    tokens, seed = about.get("tokens"), about.get("seed")
    if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token < 2**31 for token in tokens):
        raise ValueError("no tokens")
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise ValueError("no seed")
    return about


def _state_path(path: Path) -> Path:
    return path.with_suffix(".state")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _best(key: Key, keys: Iterable[Key]) -> Key:
    """Return the key with the longest beginning in common; raises ``KeyError`` when none has any."""
    lengths = {other: longest_token_prefix(other, key) for other in keys}
    best = max(lengths, key=lambda other: lengths[other], default=())
    if not lengths.get(best):
        raise KeyError(key)
    return best


def _has_any(key: Key, keys: Iterable[Key]) -> bool:
    try:
        _best(key, keys)
    except KeyError:
        return False
    return True
