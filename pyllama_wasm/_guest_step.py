"""One token further in one guest call: ``pw_step_run`` of the glue, for sequences whose samplers hold no Python."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from .errors import GuestException

if TYPE_CHECKING:
    from .context import Context
    from .sampler import Sampler

__all__ = ["NOTHING", "NOT_ASKED", "PIECE_BYTES", "GuestStep"]

_IN = struct.Struct("<IIiii")  # chain, grammar, token, pos, seq_id
_ROW = struct.Struct("<20xiii48s")  # … chosen, is_eog, n_piece, piece

PIECE_BYTES = 48
"""A longer piece is not in its row."""

NOTHING = -1
"""Chosen where the samplers left no token."""

THREW = -2
NOT_ASKED = -3
"""Chosen where the samplers of a row before have thrown."""

_DECODE_THREW = -1001
_SAMPLE_THREW = -1002


class GuestStep:
    """Rows in guest memory, one for each sequence that goes on by one token. All methods run on the engine thread.

    A row that has been run is ready for the next run by itself: the chosen token, at the position that follows.
    """

    def __init__(self, context: Context, n_max: int) -> None:
        """Make ``n_max`` rows for the sequences of ``context``: ``pw_step_new``. Raises ``OutOfMemoryError``."""
        self._context, self._native = context, context._native
        self._log = context.model.guest_log
        self._ptr = int(self._native.call("pw_step_new", context._ptr, n_max) or 0)
        self._rows = int(self._native.call("pw_step_rows", self._ptr) or 0)
        # Views, because looking costs nothing then; what is written goes through the memory's checks.
        data = self._native.engine.memory.view(self._rows, n_max * _ROW.size, np.uint8).data
        self._views = [data[: n * _ROW.size] for n in range(n_max + 1)]
        self._mark = 0
        self._call = self._native.engine.call
        self.failure: GuestException | None = None
        """What the samplers of the row that ``THREW`` have thrown."""

        native, ptr = self._native, self._ptr

        def free() -> None:
            native.call("pw_step_free", ptr)

        self.free = free
        """Gives the rows back: ``pw_step_free``. Refers to nothing but the engine."""

    def write(self, row: int, sampler: Sampler, token: int, pos: int, seq_id: int) -> None:
        """Fill one row: what to decode next, and what chooses after it."""
        self._mark = self._log.mark()  # here, since a step that succeeds complains of nothing
        parts = sampler._parts
        data = _IN.pack(parts.ptr, parts.grammar.ptr if parts.grammar else 0, token, pos, seq_id)
        self._native.engine.memory.write(self._rows + row * _ROW.size, data)

    def run(self, n: int) -> Iterator[tuple[int, int, int, bytes]]:
        """Decode and sample the first ``n`` rows, and return what came out of each.

        That is the chosen token, whether it ends the generation, the bytes of its piece, and the piece, filled up with
        zeros, where it is not longer than ``PIECE_BYTES``. Raises as ``Context.decode`` does; no row
        has changed then.
        """
        code = self._call("pw_step_run", self._ptr, n)
        if code:
            self._check(int(code))
        self._context._is_copy_pending = False
        return _ROW.iter_unpack(self._views[n])

    def _check(self, code: int) -> None:
        self.failure = None
        if code not in (_DECODE_THREW, -1):  # -1: refused before anything was done
            self._context._is_copy_pending = False
        if code == _DECODE_THREW:
            raise self._native.fail("llama_decode")
        if code != _SAMPLE_THREW:
            raise self._context._failure(code, self._mark, "decode")
        failure = self._native.fail("pw_step_run")
        if not isinstance(failure, GuestException):
            raise failure
        self.failure = failure
