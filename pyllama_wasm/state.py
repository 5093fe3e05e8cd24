"""The content of a context's memory as bytes: ``llama_state_*`` and ``llama_state_seq_*``."""

from __future__ import annotations

import hashlib
import os
import stat
import struct
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from ._abi import LLAMA_CPP_BUILD
from ._atomic_file import replacing
from ._state_format import (
    OPERATION,
    Kind,
    KvLayout,
    begin_container,
    check_kv,
    end_container,
    session_head,
    unpack_container,
    unpack_session,
)
from .deadline import Deadline, current_deadline
from .errors import PyllamaError, RequestError, SandboxError, UnsupportedModelError
from .memory import check_seq

if TYPE_CHECKING:
    from .context import Context

__all__ = ["State"]

T = TypeVar("T")

File = str | os.PathLike[str] | IO[bytes]

_SAVE = "save a state"
_TOO_LARGE = "it is larger than the sandbox's memory"
_PIECE_BYTES = 4 << 20
_SEQ_MAGIC = 0xAF143CD8  # before the sequence id in what llama_state_seq_get_data writes

# Settings of a context that decide what the numbers in its KV cache mean.
_LAYOUT = (
    "type_k", "type_v", "swa_full", "kv_unified", "rope_scaling_type", "rope_freq_base", "rope_freq_scale",
    "yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_orig_ctx",
)  # fmt: skip


class State:
    """What a context remembers, ``context.state``, to keep and to bring back; usable from any thread.

    A state is what the memory holds, not the logits: after loading, decode at least one token. With it may go the
    tokens it was computed from, which loading gives back. Adapters, samplers and an encoder's output are not part.

    The bytes begin with a header of ours: format, build of llama.cpp, a fingerprint of model and settings, a digest.
    So what is damaged, of another model, of other settings or of another build is refused with ``RequestError``
    before the sandbox sees it, and the context is as before. With ``native=True`` there is no header: the bytes are a
    session file of llama.cpp itself (``llama_state_save_file``), and reading takes these too. Their structure is
    checked, but whether the numbers are damaged or another model's nobody can tell. What only the sandbox notices
    raises ``RequestError`` as well; then the context, or the sequence, is empty.
    """

    def __init__(self, context: Context) -> None:
        """Belong to ``context``."""
        self._context = context

    @property
    def size_bytes(self) -> int:
        """Bytes of the context's state now, without header and tokens: ``llama_state_get_size``."""
        return self._run(lambda c: int(c._native.llama_state_get_size(c._ptr)), _SAVE)

    def get_data(self, tokens: Sequence[int] = (), *, native: bool = False) -> bytes:
        """Return the state of all sequences: ``llama_state_get_data``.

        Raises ``RequestError`` after ``memory.seq_add``, ``seq_div`` or a copy between separate buffers until the
        next ``decode``, which carries them out, and ``OutOfMemoryError`` when a copy does not fit into the sandbox.
        """
        return self._get(None, tokens, native)

    def set_data(self, data: bytes | bytearray | memoryview) -> list[int]:
        """Replace what the context holds by a saved state and return its tokens: ``llama_state_set_data``."""
        return self._set(None, data)

    def save(self, file: File, tokens: Sequence[int] = (), *, native: bool = False) -> None:
        """Write ``get_data`` to a path, which is replaced in one step, or to a binary file object."""
        with self._bounded():
            _write(file, self._get(None, tokens, native))

    def load(self, file: File) -> list[int]:
        """Do ``set_data`` with what a path or the rest of a binary file object holds; return the tokens."""
        with self._bounded():
            return self._set(None, self._read(file))

    def seq_size_bytes(self, seq_id: int = 0) -> int:
        """Bytes of one sequence's state now: ``llama_state_seq_get_size``."""
        check_seq(seq_id, self._context.n_seq_max)
        return self._run(lambda c: int(c._native.llama_state_seq_get_size(c._ptr, seq_id)), _SAVE)

    def seq_get_data(self, seq_id: int = 0, tokens: Sequence[int] = (), *, native: bool = False) -> bytes:
        """Return the state of one sequence: ``llama_state_seq_get_data``. Raises as ``get_data``."""
        check_seq(seq_id, self._context.n_seq_max)
        return self._get(seq_id, tokens, native)

    def seq_set_data(self, seq_id: int, data: bytes | bytearray | memoryview) -> list[int]:
        """Replace one sequence, whichever it was saved from, and return its tokens: ``llama_state_seq_set_data``.

        The other sequences stay. ``RequestError`` when the KV cache has no room: then this sequence is empty.
        """
        check_seq(seq_id, self._context.n_seq_max)
        return self._set(seq_id, data)

    def seq_save(self, file: File, seq_id: int = 0, tokens: Sequence[int] = (), *, native: bool = False) -> None:
        """Write ``seq_get_data`` to a path or a binary file object: ``llama_state_seq_save_file``."""
        with self._bounded():
            _write(file, self.seq_get_data(seq_id, tokens, native=native))

    def seq_load(self, file: File, seq_id: int = 0) -> list[int]:
        """Do ``seq_set_data`` with what a path or a binary file object holds: ``llama_state_seq_load_file``."""
        check_seq(seq_id, self._context.n_seq_max)
        with self._bounded():
            return self._set(seq_id, self._read(file))

    def _get(self, seq_id: int | None, tokens: Sequence[int], is_native: bool) -> bytes:
        kind: Kind = "context" if seq_id is None else "sequence"
        vocab = self._context.model.vocab
        checked = [vocab._check(token, _SAVE) for token in tokens]
        out = BytesIO()  # its ``getvalue`` copies nothing
        with self._bounded():
            if not is_native:
                begin_container(out, self._header(kind))
            out.write(session_head(kind, checked))
            self._run(lambda c: _write_state(c, seq_id, out), _SAVE)
            if not is_native:
                end_container(out, lambda: _look(_SAVE))
        return out.getvalue()

    def _set(self, seq_id: int | None, data: bytes | bytearray | memoryview) -> list[int]:
        kind: Kind = "context" if seq_id is None else "sequence"
        try:
            view = memoryview(data).cast("B")
        except TypeError as error:
            raise RequestError(OPERATION, f"{type(data).__name__} is no bytes, or not contiguous") from error
        with self._bounded():
            header, session = unpack_container(view, lambda: _look(OPERATION))
            if header is not None:
                _check_header(header, self._header(kind))
            tokens, state = unpack_session(kind, session)
            for token in tokens:
                self._context.model.vocab._check(token, OPERATION)

            def job(context: Context) -> None:
                if context._is_copy_pending:
                    raise RequestError(OPERATION, "a copied sequence is not copied yet", "decode first")
                layout = _kv_layout(context)
                if layout is not None:
                    check_kv(kind, state, layout)
                _set_state(context, seq_id, state)

            self._run(job, OPERATION)
        return tokens

    def _bounded(self) -> AbstractContextManager[Deadline | None]:
        """Have one deadline hold for all that a call does, in the sandbox and outside."""
        return self._context.model._bounded(None)

    def _header(self, kind: Kind) -> dict[str, Any]:
        context = self._context
        model, params = context.model, context.params
        metadata = hashlib.sha256(repr(sorted(model.metadata.items())).encode())
        return {
            "kind": kind,
            "build": LLAMA_CPP_BUILD,
            "model": {
                "architecture": context._architecture,
                "n_params": model.n_params,
                "size_bytes": model.size_bytes,
                "metadata": metadata.hexdigest(),
            },
            "context": {**{name: getattr(params, name) for name in _LAYOUT}, "n_stream": _n_stream(context)},
        }

    def _read(self, file: File) -> bytearray:
        limit = self._context.model.engine.memory.max_bytes
        if not isinstance(file, (str, os.PathLike)):
            return _read_all(file, limit)
        try:
            with open(file, "rb", opener=_open_without_waiting) as opened:
                status = os.fstat(opened.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise RequestError(OPERATION, f"{os.fspath(file)} is not a regular file")
                if status.st_size > limit:
                    raise RequestError(OPERATION, _TOO_LARGE)
                return _read_all(opened, limit)
        except PyllamaError:
            raise
        except (OSError, ValueError) as error:
            raise RequestError(OPERATION, f"{os.fspath(file)} cannot be read: {error}") from error

    def _run(self, job: Callable[[Context], T], operation: str) -> T:
        context = self._context
        if not context._memory and not context.is_closed:
            raise UnsupportedModelError(operation, "the model keeps nothing between two batches")
        return context._run(lambda: job(context), operation)


def _n_stream(context: Context) -> int:
    return 1 if context.params.kv_unified else context.n_seq_max


def _check_header(header: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise ``RequestError`` naming the first thing that differs."""
    if header.get("kind") != expected["kind"]:
        reason = f"it is the state of a {header.get('kind')}, not of a {expected['kind']}"
        raise RequestError(OPERATION, reason)
    if header.get("build") != expected["build"]:
        raise RequestError(OPERATION, f"it was made by llama.cpp {header.get('build')}; this is {expected['build']}")
    if header.get("model") != expected["model"]:
        raise RequestError(OPERATION, "it was made with another model")
    theirs, ours = header.get("context"), expected["context"]
    if not isinstance(theirs, dict) or theirs.keys() != ours.keys():
        raise RequestError(OPERATION, "it was made by another version of this package")
    for name, value in ours.items():
        if theirs[name] != value:
            reason = f"{name} was {theirs[name]!r} and is {value!r} in this context"
            raise RequestError(OPERATION, reason, "make the context as it was")


def _kv_layout(context: Context) -> KvLayout | None:
    """Return what the state must look like; ``None`` for memories that only the guest can read."""
    model = context.model
    architecture = context._architecture
    if model.is_recurrent or model.is_hybrid or architecture in _OTHER_MEMORIES:
        return None
    # No V cache; further positions and tokens beside the cells.
    if any(model._meta(f"{architecture}.{key}") for key in ("attention.kv_lora_rank", "ple.ngram_size")):
        return None
    n_stream = _n_stream(context)
    n_caches, rest = divmod(context._empty_state_bytes - 8, 4 + 4 * n_stream)
    if rest or n_caches not in (1, 2):
        return None
    # M-RoPE keeps two more positions and the token of each cell.
    n_ext = 0 if context._n_embd_inp else 12
    n_cells = -(-context.n_ctx_seq // 256) * 256
    n_layer = model.n_layer + model.n_layer_nextn
    return KvLayout(architecture, n_caches, n_stream, context.n_seq_max, n_cells, n_ext, n_layer)


# Architectures with caches beside the KV cache.
_OTHER_MEMORIES = frozenset({"deepseek32", "deepseek4", "dots3note", "glm-dsa", "hy_v4", "minimax-m3", "qwen4exp"})


def _state_of(context: Context, seq_id: int | None) -> bytes:
    """Return the state as native session files hold it; on the engine thread."""
    out = BytesIO()
    _write_state(context, seq_id, out)
    return out.getvalue()


def _write_state(context: Context, seq_id: int | None, out: BytesIO) -> None:
    """Write the state as native session files hold it; on the engine thread."""
    if context._is_shift_pending or context._is_copy_pending:
        reason = "sequences were moved or copied since the last decode, and it is not carried out yet"
        raise RequestError(_SAVE, reason, "decode first")
    native, ptr = context._native, context._ptr
    if seq_id is None:
        size = int(native.llama_state_get_size(ptr))
    else:
        size = int(native.llama_state_seq_get_size(ptr, seq_id))
    native.engine.check_output(size, _SAVE)
    with native.scratch(size) as buffer:
        if seq_id is None:
            n = int(native.llama_state_get_data(ptr, buffer, size))
        else:
            n = int(native.llama_state_seq_get_data(ptr, buffer, size, seq_id))
        if not n or n != size:
            raise SandboxError(_SAVE, "the guest could not write it")
        skipped = 0 if seq_id is None else 8
        native.read_into(buffer + skipped, n - skipped, out, _SAVE)


def _set_state(context: Context, seq_id: int | None, state: bytes | memoryview) -> None:
    """Give the state to the guest; what it refuses leaves nothing half read; on the engine thread."""
    native, ptr = context._native, context._ptr
    mark = context.model.guest_log.mark()
    head = b"" if seq_id is None else struct.pack("<Ii", _SEQ_MAGIC, seq_id)
    size = len(head) + len(state)
    with native.scratch(size) as buffer:
        native.engine.memory.write(buffer, head)
        native.write(buffer + len(head), state, OPERATION)
        if seq_id is None:
            n = int(native.llama_state_set_data(ptr, buffer, size))
        else:
            n = int(native.llama_state_seq_set_data(ptr, buffer, size, seq_id))
    if n == size:
        if seq_id is None:
            context._is_shift_pending = False
        return
    if seq_id is None:
        native.llama_memory_clear(context._memory, True)
    else:
        native.llama_memory_seq_rm(context._memory, seq_id, -1, -1)
    lines = context.model.guest_log.since(mark).lines
    # The first line says what was wrong, the next that therefore the state could not be restored.
    reason = lines[0].partition(": ")[2] if lines else f"{size - n} bytes are left over"
    raise RequestError(OPERATION, reason, "made with other settings, or damaged?")


def _open_without_waiting(path: str, flags: int) -> int:
    # A FIFO that nobody writes to would block; it means nothing for regular files.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))


def _read_all(file: IO[bytes], limit: int) -> bytearray:
    """Read to the end piece by piece: a file object may allocate all it is asked for at once."""
    data = bytearray()
    while True:
        _look(OPERATION)
        piece = file.read(_PIECE_BYTES)
        if not isinstance(piece, bytes):
            raise RequestError(OPERATION, "the file does not give bytes", "open it in binary mode")
        if not piece:
            return data
        data += piece
        if len(data) > limit:
            raise RequestError(OPERATION, _TOO_LARGE)


def _look(operation: str) -> None:
    """Raise ``DeadlineError`` when the deadline of the calling thread has come."""
    if (deadline := current_deadline()) is not None:
        deadline.check(operation)


def _write(file: File, data: bytes) -> None:
    if not isinstance(file, (str, os.PathLike)):
        file.write(data)
        return
    path = Path(file)
    try:
        with replacing(path, private=True) as (fd, _), open(fd, "wb", closefd=False) as opened:
            for at in range(0, len(data), _PIECE_BYTES):
                _look(_SAVE)
                opened.write(memoryview(data)[at : at + _PIECE_BYTES])
    except PyllamaError:
        raise
    except (OSError, ValueError) as error:
        raise RequestError(_SAVE, f"{path} cannot be written: {error}") from error
