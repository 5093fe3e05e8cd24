"""The arrays of one ``llama_batch`` in guest memory, allocated once per context and written before each decode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .batch import Batch
from .errors import ContextFullError

if TYPE_CHECKING:
    from .native import Native, Struct

__all__ = ["GuestBatch"]


class GuestBatch:
    """Guest memory for ``n_tokens_max`` tokens with up to ``n_seq_max`` sequence ids each.

    Layout, in 32-bit words of ``n = n_tokens_max`` (the logits flags are bytes)::

        token[n]  pos[n]  n_seq_id[n]  seq_id[n] (pointers into seq_ids)  seq_ids[n * n_seq_max]  logits[n]

    All methods run on the engine thread.
    """

    def __init__(self, native: Native, n_tokens_max: int, n_seq_max: int, n_pos: int = 0) -> None:
        """Allocate the block; raises ``OutOfMemoryError``.

        ``n_pos`` is how many positions the model has an embedding for, 0 for any number: every write raises
        ``ContextFullError`` for one beyond, on which the guest would assert.
        """
        self.n_pos = n_pos
        self._native, self._memory, self._n_seq_max = native, native.engine.memory, n_seq_max
        n = n_tokens_max
        self._ptr = native.alloc(4 * n * (4 + n_seq_max) + n)
        self._token, self._pos = self._ptr, self._ptr + 4 * n
        self._n_seq_id, self._seq_id = self._ptr + 8 * n, self._ptr + 12 * n
        self._seq_ids = self._ptr + 16 * n
        self._logits = self._seq_ids + 4 * n * n_seq_max
        # The pointers never change; nothing else writes here.
        pointers = self._seq_ids + 4 * n_seq_max * np.arange(n, dtype=np.uint32)
        self._memory.write(self._seq_id, pointers.astype("<u4").tobytes())
        arrays = {"pos": self._pos, "n_seq_id": self._n_seq_id, "seq_id": self._seq_id, "logits": self._logits}
        self._struct = native.struct("llama_batch", token=self._token, **arrays)
        self._embd = self._embd_bytes = 0
        self._embd_struct = native.struct("llama_batch", **arrays)
        self._ones = np.ones(n, np.int32)
        self._is_single = False

    def write(self, batch: Batch) -> Struct:
        """Copy ``batch`` in; the caller has checked that it fits. Raises ``OutOfMemoryError`` for embeddings only."""
        write, n = self._memory.write, batch.n_tokens
        token, pos, n_seq_id, seq_id = batch.arrays()
        self._check_pos(int(pos.max()))
        if batch.n_embd:
            self._write_embeddings(batch)
        rows = np.zeros((n, self._n_seq_max), "<i4")
        width = min(self._n_seq_max, batch.n_seq_max)
        rows[:, :width] = seq_id[:, :width]
        write(self._token, token.astype("<i4").tobytes())
        write(self._pos, pos.astype("<i4").tobytes())
        write(self._n_seq_id, n_seq_id.astype("<i4").tobytes())
        write(self._seq_ids, rows.tobytes())
        write(self._logits, batch.logits_flags().tobytes())
        self._is_single = False
        struct = self._embd_struct if batch.n_embd else self._struct
        struct["n_tokens"] = n
        return struct

    def _write_embeddings(self, batch: Batch) -> None:
        """Copy the embeddings to a block of their own, which grows as needed: few contexts ever need one."""
        data = np.ascontiguousarray(batch.embeddings()).tobytes()
        if len(data) > self._embd_bytes:
            self._native.free(self._embd)
            self._embd = self._embd_bytes = 0
            self._embd, self._embd_bytes = self._native.alloc(len(data)), len(data)
            self._embd_struct["embd"] = self._embd
        self._memory.write(self._embd, data)

    def write_tokens(self, tokens: Sequence[int], pos: int, logits_last: bool) -> Struct:
        """Write ``tokens`` of sequence 0 at consecutive positions from ``pos``."""
        write, n = self._memory.write, len(tokens)
        self._check_pos(pos + n - 1)
        flags = bytearray(n)
        flags[-1] = logits_last
        write(self._token, np.asarray(tokens, "<i4").tobytes())
        write(self._pos, np.arange(pos, pos + n, dtype="<i4").tobytes())
        write(self._n_seq_id, np.ones(n, "<i4").tobytes())
        write(self._seq_ids, bytes(4 * n * self._n_seq_max))
        write(self._logits, bytes(flags))
        self._struct["n_tokens"] = n
        self._is_single = n == 1 and logits_last
        return self._struct

    def write_one(self, token: int, pos: int) -> Struct:
        """Write one token of sequence 0 with its logits; the cheap path of every decode step."""
        if not self._is_single:
            return self.write_tokens((token,), pos, True)
        self._check_pos(pos)
        self._memory.set_u32(self._token, token)
        self._memory.set_u32(self._pos, pos)
        return self._struct

    def write_arrays(
        self,
        token: npt.NDArray[np.int32],
        pos: npt.NDArray[np.int32],
        seq_id: npt.NDArray[np.int32],
        logits: npt.NDArray[np.int8],
    ) -> Struct:
        """Write checked tokens with one sequence id each: contiguous arrays of int32, the flags int8, of one length.

        The cheap path of a batch that several sequences share. The struct is the one of every other write.
        """
        write, n = self._memory.write, len(token)
        if self.n_pos:
            self._check_pos(int(pos.max()))
        write(self._token, token.data)
        write(self._pos, pos.data)
        write(self._logits, logits.data)
        if self._n_seq_max == 1:
            write(self._seq_ids, seq_id.data)
        else:
            rows = np.zeros((n, self._n_seq_max), np.int32)
            rows[:, 0] = seq_id
            write(self._seq_ids, rows.data)
        write(self._n_seq_id, self._ones[:n].data)
        self._struct["n_tokens"] = n
        self._is_single = False
        return self._struct

    def _check_pos(self, last: int) -> None:
        if 0 < self.n_pos <= last:
            raise ContextFullError("decode", f"the model knows no position {last}, only {self.n_pos}")

    def free(self) -> None:
        """Give the block back."""
        self._native.free(self._ptr)
        self._native.free(self._embd)
