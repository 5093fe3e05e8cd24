"""The bytes of a saved state: our container, native llama.cpp's session files, and what they say about the KV cache.

Container: ``magic, version u32, length of the header u32, sha256 of all that follows, header (JSON), payload``.
The payload is a native session file: ``magic u32, version u32, n_tokens u32, tokens i32[n_tokens], state``.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from . import _abi
from .errors import RequestError

__all__ = [
    "Kind",
    "KvLayout",
    "begin_container",
    "check_kv",
    "end_container",
    "head_of",
    "one_stream",
    "pack_container",
    "pack_session",
    "session_head",
    "unpack_container",
    "unpack_session",
    "with_streams",
]

Kind = Literal["context", "sequence"]

MAGIC = b"PLLSTATE"
VERSION = 1
_HEAD = struct.Struct("<8sII32s")
_DIGEST_BYTES = 32
_PIECE_BYTES = 4 << 20
_MAX_HEADER = 1 << 20

SESSIONS: Mapping[Kind, tuple[int, int]] = {
    "context": (_abi.LLAMA_SESSION_MAGIC, _abi.LLAMA_SESSION_VERSION),
    "sequence": (_abi.LLAMA_STATE_SEQ_MAGIC, _abi.LLAMA_STATE_SEQ_VERSION),
}
"""Magic and version of native session files."""

OPERATION = "load a state"
_DAMAGED_HINT = "truncated or damaged?"


def pack_container(header: Mapping[str, Any], payload: bytes) -> bytes:
    """Return payload and header with a digest before them."""
    out = BytesIO()
    begin_container(out, header)
    out.write(payload)
    end_container(out)
    return out.getvalue()


def begin_container(out: BytesIO, header: Mapping[str, Any]) -> None:
    """Write what comes before the payload; the digest follows by ``end_container``."""
    text = json.dumps(header, sort_keys=True).encode()
    out.write(_HEAD.pack(MAGIC, VERSION, len(text), b"") + text)


def end_container(out: BytesIO, look: Callable[[], None] = lambda: None) -> None:
    """Put the digest of header and payload in its place; ``look`` is called now and then and may raise."""
    with out.getbuffer() as view:
        view[_HEAD.size - _DIGEST_BYTES : _HEAD.size] = _digest(view[_HEAD.size :], look)


def _digest(data: memoryview, look: Callable[[], None]) -> bytes:
    found = hashlib.sha256()
    with data:
        for at in range(0, len(data), _PIECE_BYTES):
            look()
            found.update(data[at : at + _PIECE_BYTES])
    return found.digest()


def unpack_container(
    data: memoryview, look: Callable[[], None] = lambda: None
) -> tuple[dict[str, Any] | None, memoryview]:
    """Return header and payload after checking the digest; no header when ``data`` is no container of ours.

    ``look`` is called now and then and may raise.
    """
    if bytes(data[: len(MAGIC)]) != MAGIC:
        return None, data
    if len(data) < _HEAD.size:
        raise RequestError(OPERATION, f"only {len(data)} bytes", _DAMAGED_HINT)
    _, version, n_header, digest = _HEAD.unpack_from(data)
    if version != VERSION:
        raise RequestError(OPERATION, f"version {version} of the format; this package writes {VERSION}")
    if n_header > _MAX_HEADER or _HEAD.size + n_header > len(data):
        raise RequestError(OPERATION, "its header ends beyond the data", _DAMAGED_HINT)
    if _digest(data[_HEAD.size :], look) != digest:
        raise RequestError(OPERATION, "its content does not match its digest", _DAMAGED_HINT)
    try:
        header = json.loads(bytes(data[_HEAD.size : _HEAD.size + n_header]))
    except (ValueError, RecursionError) as error:
        raise RequestError(OPERATION, "its header is no JSON") from error
    if not isinstance(header, dict):
        raise RequestError(OPERATION, "its header is no JSON object")
    return header, data[_HEAD.size + n_header :]


def pack_session(kind: Kind, tokens: Sequence[int], state: bytes) -> bytes:
    """Return what native llama.cpp writes into a session file."""
    return session_head(kind, tokens) + state


def session_head(kind: Kind, tokens: Sequence[int]) -> bytes:
    """Return what comes before the state in a session file."""
    return struct.pack("<III", *SESSIONS[kind], len(tokens)) + np.asarray(tokens, "<i4").tobytes()


def unpack_session(kind: Kind, data: memoryview) -> tuple[list[int], memoryview]:
    """Return the tokens and the state of a session file."""
    if len(data) < 12:
        raise RequestError(OPERATION, f"only {len(data)} bytes", _DAMAGED_HINT)
    magic, version, n_tokens = struct.unpack_from("<III", data)
    if (magic, version) != SESSIONS[kind]:
        other = next((k for k, session in SESSIONS.items() if session == (magic, version)), None)
        if other is not None:
            raise RequestError(OPERATION, f"it is the state of a {other}, not of a {kind}")
        raise RequestError(OPERATION, "neither a saved state nor a session file of this llama.cpp")
    if 12 + 4 * n_tokens > len(data):
        raise RequestError(OPERATION, f"its {n_tokens} tokens end beyond the data", _DAMAGED_HINT)
    tokens = np.frombuffer(data, "<i4", n_tokens, 12)
    if n_tokens and int(tokens.min()) < 0:
        raise RequestError(OPERATION, f"token {int(tokens.min())} is none", _DAMAGED_HINT)
    return [int(token) for token in tokens], data[12 + 4 * n_tokens :]


def head_of(read: Callable[[int], bytes], size_bytes: int) -> tuple[str, npt.NDArray[np.int32]]:
    """Return the ``identity`` and the tokens that begin a container of a prompt's state, without reading the rest.

    Whether it is whole, and what it says, is not checked. Raises ``RequestError`` for what is no such container.
    """
    head = read(_HEAD.size)
    if len(head) < _HEAD.size or not head.startswith(MAGIC):
        raise RequestError(OPERATION, "it does not begin like a saved state", _DAMAGED_HINT)
    _, version, n_header, _ = _HEAD.unpack(head)
    if version != VERSION or n_header > _MAX_HEADER:
        raise RequestError(OPERATION, f"version {version} of the format; this package writes {VERSION}")
    try:
        identity = json.loads(read(n_header)).get("identity")
    except (ValueError, RecursionError, AttributeError) as error:
        raise RequestError(OPERATION, "its header is no JSON object") from error
    session = read(12)
    if not isinstance(identity, str) or len(session) < 12:
        raise RequestError(OPERATION, "it is no state of a prompt")
    magic, version, n_tokens = struct.unpack("<III", session)
    if (magic, version) != SESSIONS["sequence"] or 4 * n_tokens > size_bytes:
        raise RequestError(OPERATION, "it is no state of a prompt", _DAMAGED_HINT)
    tokens = read(4 * n_tokens)
    if len(tokens) < 4 * n_tokens:
        raise RequestError(OPERATION, "its tokens end beyond the data", _DAMAGED_HINT)
    return identity, np.frombuffer(tokens, "<i4").astype(np.int32)


@dataclass(frozen=True)
class KvLayout:
    """What the state of a context's KV cache must look like."""

    architecture: str
    n_caches: int
    """KV caches one after the other: two for models with sliding windows."""

    n_stream: int
    n_seq_max: int
    n_cells: int
    """Cells of one stream."""

    n_ext: int
    """Bytes that follow the position of each cell."""

    n_layer: int
    """Layers of the model: no cache has more."""


class _Reader:
    """Reads little-endian numbers and skips ahead; beyond the end it raises ``RequestError``."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._at = data, 0

    def take(self, layout: str) -> tuple[Any, ...]:
        size = struct.calcsize(layout)
        self.skip(size)
        return struct.unpack_from(layout, self._data, self._at - size)

    def skip(self, n: int) -> int:
        if n > len(self._data) - self._at:
            raise RequestError(OPERATION, "it ends in the midst of the KV cache", _DAMAGED_HINT)
        self._at += n
        return self._at

    def text(self) -> bytes:
        (n,) = self.take("<I")
        end = self.skip(n)
        return bytes(self._data[end - n : end])

    @property
    def n_left(self) -> int:
        return len(self._data) - self._at


def check_kv(kind: Kind, state: memoryview, layout: KvLayout) -> None:
    """Raise ``RequestError`` unless ``state`` has the structure that ``llama_kv_cache::state_write`` gives it.

    Types, row sizes and layers are compared with the model by the guest, which refuses what differs. Checked here is
    what it would believe: counts, positions, sequences, and that nothing is missing or left over.
    """
    reader = _Reader(state)
    if kind == "context":
        architecture = reader.text()
        if architecture != layout.architecture.encode():
            name = architecture.decode(errors="replace")
            raise RequestError(OPERATION, f"it was made with a model of architecture {name}")
    for _ in range(layout.n_caches):
        (n_stream,) = reader.take("<I")
        if n_stream != layout.n_stream:
            reason = f"{n_stream} KV buffers where the context has {layout.n_stream}"
            raise RequestError(OPERATION, reason, "n_seq_max and kv_unified must be as they were")
        for _ in range(n_stream):
            (n_cells,) = reader.take("<I")
            if n_cells > layout.n_cells:
                reason = f"{n_cells} tokens do not fit into the {layout.n_cells} of the context"
                raise RequestError(OPERATION, reason, "raise n_ctx")
            if n_cells:
                _check_cells(kind, reader, n_cells, layout)
                _check_tensors(reader, n_cells, layout)
    if reader.n_left:
        raise RequestError(OPERATION, f"{reader.n_left} bytes are left over", _DAMAGED_HINT)


def _check_cells(kind: Kind, reader: _Reader, n_cells: int, layout: KvLayout) -> None:
    for _ in range(n_cells):
        pos, n_seq = reader.take("<iI")
        # The newest position has to have a successor.
        if not 0 <= pos < 2**31 - 1:
            raise RequestError(OPERATION, f"a token at position {pos}", _DAMAGED_HINT)
        if not 1 <= n_seq <= (1 if kind == "sequence" else layout.n_seq_max):
            raise RequestError(OPERATION, f"a token of {n_seq} sequences", _DAMAGED_HINT)
        reader.skip(layout.n_ext)
        seqs = reader.take(f"<{n_seq}i")
        if kind == "context" and (min(seqs) < 0 or max(seqs) >= layout.n_seq_max or len(set(seqs)) < n_seq):
            raise RequestError(OPERATION, f"a token of the sequences {list(seqs)}", _DAMAGED_HINT)


def _check_tensors(reader: _Reader, n_cells: int, layout: KvLayout) -> None:
    is_transposed, n_layer, _, _ = reader.take("<IIII")
    if is_transposed > 1:
        raise RequestError(OPERATION, "the V cache is laid out in no known way", _DAMAGED_HINT)
    if n_layer > layout.n_layer:
        raise RequestError(OPERATION, f"{n_layer} layers where the model has {layout.n_layer}", _DAMAGED_HINT)
    for _ in range(n_layer):
        _, row_bytes = reader.take("<iQ")
        reader.skip(row_bytes * n_cells)
    for _ in range(n_layer):
        if is_transposed:
            _, item_bytes, n_rows = reader.take("<iII")
            reader.skip(item_bytes * n_rows * n_cells)
        else:
            _, row_bytes = reader.take("<iQ")
            reader.skip(row_bytes * n_cells)


def with_streams(state: memoryview, layout: KvLayout, n_stream: int) -> bytes:
    """Return a sequence's state as a context with ``n_stream`` KV buffers has it; ``layout`` is that of ``state``.

    A sequence lies in one buffer, the others are empty, and the guest reads it into whichever is its own. Raises
    ``RequestError`` as ``check_kv``.
    """
    check_kv("sequence", state, layout)
    reader, found = _Reader(state), []
    for _ in range(layout.n_caches):
        reader.take("<I")
        parts = []
        for _ in range(layout.n_stream):
            begin = len(state) - reader.n_left
            (n_cells,) = reader.take("<I")
            if n_cells:
                _check_cells("sequence", reader, n_cells, layout)
                _check_tensors(reader, n_cells, layout)
                parts.append(state[begin : len(state) - reader.n_left])
        if len(parts) > 1:
            raise RequestError(OPERATION, f"one sequence in {len(parts)} KV buffers", _DAMAGED_HINT)
        found.append(struct.pack("<I", n_stream) + b"".join(parts) + bytes(4 * (n_stream - len(parts))))
    return b"".join(found)


def one_stream(layout: KvLayout) -> KvLayout:
    """Return the layout of the same state with a single KV buffer."""
    return replace(layout, n_stream=1)
