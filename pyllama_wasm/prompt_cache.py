"""The states of prompts that were computed, kept beyond the calls and the process that computed them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ._abi import LLAMA_CPP_BUILD
from ._atomic_file import replacing
from ._fork_locks import renew_after_fork
from ._prompt_files import Entry, PromptFiles, PromptMemory
from ._state_format import (
    one_stream,
    pack_container,
    pack_session,
    unpack_container,
    unpack_session,
    with_streams,
)
from .errors import CancelledError, ClosedError, GuestDiedError, PyllamaError, RequestError
from .state import _LAYOUT, _kv_layout, _n_stream, _set_state, _state_of

if TYPE_CHECKING:
    from .host.files import GrantedFile
    from .lane import Lane
    from .model import Model
    from .slots import Slot

__all__ = ["AttachedCache", "PromptCache"]

logger = logging.getLogger("pyllama_wasm.prompt_cache")

_ATTACH = "attach a prompt cache"
_MIN_GAIN = 32
"""Tokens that a state must save; fewer are computed as fast as it is read."""

_MAX_PENDING_BYTES = 256 << 20
_PART_BYTES = 4 << 20
_DIGESTS = "models.json"
_MAX_DIGESTS = 256


class PromptCache:
    """What models remember of prompts, in files of a folder: a later call, or a later program, need not compute it.

    ::

        cache = pw.PromptCache("~/.cache/my-program/prompts", max_bytes=2 << 30)
        cache.attach(model)

    From then on each ``generate``, ``stream`` and ``chat`` call of the model looks for the longest kept beginning of
    its prompt, and what it has computed is kept when it ends by itself; ``usage.cached_tokens`` tells. A model keeps
    the prompts it computed last in any case: this is for more of them, and for new processes. Not kept are calls with
    adapters, of encoders, and of deterministic models.

    The files belong to the user alone, are written in one step and bounded together by ``max_bytes``; the ones not used
    for longest go first. Several processes may share the folder. What is in a file is parsed by the sandbox only; a
    damaged or foreign one is removed, and its prompt computed. A state is used for the very same model files (by their
    content), build of llama.cpp and settings of the context only.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None = None, *, max_bytes: int = 1 << 30, min_tokens: int = 64
    ) -> None:
        """Use the folder ``path``, made with mode 0700 if there is none; ``None`` keeps states in memory.

        Prompts of fewer than ``min_tokens`` tokens are not kept. Raises ``RequestError`` for a folder that others can
        look into, or that cannot be made.
        """
        for name, value in (("max_bytes", max_bytes), ("min_tokens", min_tokens)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise RequestError("open a prompt cache", f"{name} is {value!r} and not a positive integer")
        self.min_tokens = min_tokens
        self.path = None if path is None else Path(path).expanduser()
        """The folder; None: in memory."""

        self._store = PromptMemory(max_bytes) if self.path is None else PromptFiles(self.path, max_bytes)
        self._lock = threading.Lock()
        self._writer: ThreadPoolExecutor | None = None
        self._pending: set[Future[None]] = set()
        self._n_pending_bytes = 0
        renew_after_fork(self, _lock=threading.Lock, _writer=lambda: None, _pending=set, _n_pending_bytes=int)

    def attach(self, model: Model) -> None:
        """Use the cache for a model, instead of another one if it has one; several models may share a cache.

        Reads the model's files once, to know them again; that is remembered for as long as they do not change. Raises
        ``RequestError`` for a model in a process of its own, ``ClosedError`` for a closed one.
        """
        model._check_open(_ATTACH)
        model._prompt_cache = AttachedCache(self, model, self._model_digest(model))

    def detach(self, model: Model) -> None:
        """Stop using the cache for a model."""
        if model._prompt_cache is not None and model._prompt_cache.cache is self:
            model._prompt_cache = None

    @property
    def size_bytes(self) -> int:
        """Return how many bytes are kept now."""
        return self._store.size_bytes

    @property
    def n_entries(self) -> int:
        """Return how many states are kept now."""
        return self._store.n_entries

    def flush(self) -> None:
        """Wait until what was computed so far is kept."""
        with self._lock:
            pending = list(self._pending)
        for each in pending:
            each.result()

    def clear(self) -> None:
        """Forget everything."""
        self.flush()
        self._store.clear()

    # -- writing: not on the engine's thread --------------------------------------------------------------------------

    def _keep(self, made: _Made, replaced: list[Entry]) -> None:
        """Have a state written in a thread; when too much waits for that already it is not kept."""
        with self._lock:
            if self._n_pending_bytes + len(made.state) > _MAX_PENDING_BYTES and self._pending:
                return
            if self._writer is None:
                self._writer = ThreadPoolExecutor(1, "pyllama-prompts")
            try:
                future = self._writer.submit(self._write, made, replaced)
            except RuntimeError as error:  # no more threads, or the interpreter ends
                logger.warning("a prompt of %d tokens is not kept: %s", len(made.tokens), error)
                return
            self._n_pending_bytes += len(made.state)
            self._pending.add(future)
        future.add_done_callback(partial(self._written, len(made.state)))

    def _written(self, n_bytes: int, future: Future[None]) -> None:
        with self._lock:
            self._pending.discard(future)
            self._n_pending_bytes -= n_bytes

    def _write(self, made: _Made, replaced: list[Entry]) -> None:
        try:
            state = made.state if made.layout is None else with_streams(memoryview(made.state), *made.layout)
            session = pack_session("sequence", made.tokens.tolist(), state)
            header = {"identity": made.identity, "build": LLAMA_CPP_BUILD}
            self._store.write(made.identity, made.tokens, pack_container(header, session), replaced)
        except (OSError, PyllamaError, MemoryError) as error:
            logger.warning("a prompt of %d tokens is not kept: %s", len(made.tokens), error)

    # -- knowing a model again ----------------------------------------------------------------------------------------

    def _model_digest(self, model: Model) -> str:
        """Return a digest of the content of the model's files, remembered by what the system says of them."""
        table = model.engine.files  # raises for a model in another process
        files = [file for path in model._guest_paths if (file := table.find(path)) is not None]
        try:
            names = [_name_of(file) for file in files]
            known = self._read_digests()
            digests = [known.get(name) or _content_digest(file) for file, name in zip(files, names, strict=True)]
            if names == [_name_of(file) for file in files]:
                self._write_digests({**known, **dict(zip(names, digests, strict=True))})
        except OSError as error:
            raise RequestError(_ATTACH, f"the model cannot be read: {error}") from error
        overrides = repr(sorted(model.params.kv_overrides.items()))
        return hashlib.sha256("\n".join([*digests, overrides]).encode()).hexdigest()

    def _read_digests(self) -> dict[str, str]:
        if self.path is None:
            return {}
        try:
            found = json.loads((self.path / _DIGESTS).read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(found, dict):
            return {}
        return {name: digest for name, digest in found.items() if isinstance(digest, str)}

    def _write_digests(self, digests: dict[str, str]) -> None:
        if self.path is None:
            return
        data = json.dumps(dict(list(digests.items())[-_MAX_DIGESTS:])).encode()
        with suppress(OSError), replacing(self.path / _DIGESTS, private=True) as (fd, _):
            os.write(fd, data)


@dataclass(frozen=True)
class _Made:
    """A state as the guest gave it; what becomes of it is done in another thread."""

    identity: str
    tokens: npt.NDArray[np.int32]
    state: bytes
    layout: tuple[Any, int] | None
    """What it looks like, and the number of KV buffers to keep it with; None: it is kept as it is."""


class AttachedCache:
    """A cache as one model's lanes use it, on the engine's thread."""

    def __init__(self, cache: PromptCache, model: Model, digest: str) -> None:
        """Belong to ``model``, whose files have that digest."""
        self.cache = cache
        self._model, self._digest, self._store = model, digest, cache._store
        # Of a sliding window only what it still sees is part of a state: such a state cannot be cut.
        self._is_cut = not (model.is_recurrent or model.is_hybrid or model.n_swa)

    def begin(self, lane: Lane, slot: Slot) -> None:
        """Bring back the state of the longest kept beginning of a request's prompt, if that saves computing.

        Called once for each request, before its first step. Raises what ends the engine only.
        """
        run = slot.run
        if run is None or lane.key or run.source is not None or run.is_alone:
            return
        run.keep = partial(self.keep, lane, slot)
        # A state is written at once, a copy that another request was given by the next decode: over it, or of it.
        if lane.context._is_copy_pending:
            return
        identity = self._identity(lane)
        prompt = run.prompt[:-1]  # the last token has to be computed
        found = self._store.find(identity, prompt, is_whole=not self._is_cut, n_most=lane.n_ctx_seq)
        if found is None or found[1] < slot.n_past + _MIN_GAIN:
            return
        entry, n_common = found
        try:
            state = self._read(entry, lane)
        except (OSError, PyllamaError) as error:
            self._refuse(entry, error)
            return
        before = slot.n_past, slot.n_kv, run.n_cached
        slot.n_past = slot.n_kv = run.n_cached = 0
        try:
            _set_state(lane.context, slot.seq_id, state)
        except (GuestDiedError, ClosedError):
            raise
        except CancelledError:  # while it was copied into the sandbox; the next step begins again
            slot.n_past, slot.n_kv, run.n_cached = before
            raise
        except PyllamaError as error:  # the sequence is empty then
            self._refuse(entry, error)
            return
        slot.n_past = run.n_cached = n_common
        slot.n_kv = n_common + 1 if self._is_cut else n_common  # what lies behind is cut off

    def keep(self, lane: Lane, slot: Slot) -> None:
        """Keep what a request has computed, now that it ends by itself, unless it is kept already."""
        tokens = slot.tokens[: slot.n_past].copy()
        if len(tokens) < self.cache.min_tokens or lane.context._is_copy_pending:  # perhaps not copied yet
            return
        identity, replaced = self._identity(lane), []
        # A state that cannot be cut is of use only where the whole of it is a beginning.
        best = self._store.find(identity, tokens, is_whole=not self._is_cut, n_most=1 << 31)
        if best is not None:
            entry, n_common = best
            if n_common == len(tokens) or len(tokens) - n_common < _MIN_GAIN <= n_common:
                return
            # A state that this one can be cut to, or nearly, is of no more use.
            replaced = [entry] if self._is_cut and len(entry.tokens) - n_common < _MIN_GAIN else []
        context = lane.context
        try:
            state = _state_of(context, slot.seq_id)
        except (GuestDiedError, ClosedError):
            raise
        except (PyllamaError, MemoryError) as error:
            logger.warning("a prompt of %d tokens is not kept: %s", len(tokens), error)
            return
        layout = _kv_layout(context)
        self.cache._keep(_Made(identity, tokens, state, None if layout is None else (layout, 1)), replaced)

    def _identity(self, lane: Lane) -> str:
        """Name what a state is good for."""
        context = lane.context
        settings = {name: getattr(context.params, name) for name in (*_LAYOUT, "flash_attn_type", "attention_type")}
        if _kv_layout(context) is None:
            settings["n_stream"] = _n_stream(context)
        text = json.dumps([LLAMA_CPP_BUILD, self._digest, settings], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _read(self, entry: Entry, lane: Lane) -> bytes:
        """Return the state of an entry as the lane's context has it. Raises ``OSError`` and ``RequestError``."""
        header, session = unpack_container(memoryview(self._store.read(entry)))
        if header is None or header.get("identity") != entry.identity or header.get("build") != LLAMA_CPP_BUILD:
            raise RequestError("load a state", "it was made for something else")
        tokens, state = unpack_session("sequence", session)
        if tokens != entry.tokens.tolist():
            raise RequestError("load a state", "its tokens are not those of its name")
        layout = _kv_layout(lane.context)
        if layout is None:
            return bytes(state)
        return with_streams(state, one_stream(layout), layout.n_stream)

    def _refuse(self, entry: Entry, error: Exception) -> None:
        """Drop what cannot be used; its prompt is computed."""
        logger.warning("the state of %d tokens is dropped from the prompt cache: %s", len(entry.tokens), error)
        self._store.drop(entry)


def _name_of(file: GrantedFile) -> str:
    info = file.status()
    return f"{info.st_dev} {info.st_ino} {info.st_size} {info.st_mtime_ns} {info.st_ctime_ns}"


def _parts(size_bytes: int) -> Iterator[tuple[int, int]]:
    for offset in range(0, size_bytes, _PART_BYTES):
        yield offset, min(_PART_BYTES, size_bytes - offset)


def _content_digest(file: GrantedFile) -> str:
    """Return the SHA-256 of the SHA-256 of a file's parts, hashed side by side. Raises ``OSError``."""

    def digest(part: tuple[int, int]) -> bytes:
        offset, size = part
        buffer = memoryview(bytearray(size))
        if file.read_at(buffer, offset) != size:
            raise OSError("it became shorter")
        return hashlib.sha256(buffer).digest()

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1), "pyllama-digest") as pool:
        return hashlib.sha256(b"".join(pool.map(digest, _parts(file.size_bytes())))).hexdigest()
