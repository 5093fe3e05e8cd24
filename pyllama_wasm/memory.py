"""What a context remembers of its sequences: the KV cache or the recurrent state, ``llama_memory_t``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from .errors import RequestError

if TYPE_CHECKING:
    from .context import Context

__all__ = ["Memory"]

T = TypeVar("T")

_I32_MAX = 2**31 - 1


class Memory:
    """The memory of one context, ``context.memory``; it lives and ends with the context.

    A range of positions is ``p0`` to ``p1 - 1``; a negative bound is open. All methods may be called from any thread,
    raise ``RequestError`` for an unknown sequence or a position that is no 32-bit integer, and ``ClosedError`` after
    the context was closed. Models without a memory (BERT and the like) remember nothing: then all calls do nothing.
    """

    def __init__(self, context: Context) -> None:
        """Belong to ``context``."""
        # Made anew for every access: were it kept by the context, the two would refer to each other, and a context
        # that is dropped would stay until the next garbage collection.
        self._context = context

    @property
    def can_shift(self) -> bool:
        """Whether positions can be moved with ``seq_add`` and ``seq_div``: ``llama_memory_can_shift``.

        Also false for types of the K cache whose keys llama.cpp cannot turn, although it says so: ``bf16``, and the
        quantized ones unless attention heads are a multiple of 64 wide.
        """
        return self._run(_can_shift, "look into the KV cache")

    def clear(self, data: bool = False) -> None:
        """Forget every sequence: ``llama_memory_clear``; ``data`` also overwrites the buffers with zeros."""

        def job(context: Context) -> None:
            context._native.llama_memory_clear(context._memory, data)
            context._is_shift_pending = False

        self._run(job, "clear the KV cache")

    def seq_rm(self, seq_id: int, p0: int = -1, p1: int = -1) -> bool:
        """Remove positions of a sequence, of every sequence for -1: ``llama_memory_seq_rm``.

        Returns ``False``, and removes nothing, when this kind of memory cannot forget a part: recurrent models keep
        only the newest state.
        """
        if seq_id != -1:
            self._check_seq(seq_id)
        _check_positions(p0, p1)

        def job(context: Context) -> bool:
            native, memory = context._native, context._memory
            if seq_id != -1 or not _is_recurrent(context):
                return bool(native.llama_memory_seq_rm(memory, seq_id, p0, p1))
            # A recurrent memory takes no "every sequence", whatever llama.h says.
            done = [bool(native.llama_memory_seq_rm(memory, s, p0, p1)) for s in range(context.n_seq_max)]
            return all(done)

        return self._run(job, "remove from the KV cache")

    def seq_cp(self, source: int, target: int, p0: int = -1, p1: int = -1) -> None:
        """Let ``target`` share the positions of ``source``: ``llama_memory_seq_cp``.

        In a unified KV buffer nothing is copied: the range replaces what ``target`` has there, and the rest of it
        stays. In separate buffers the whole sequence is copied, at the next ``decode``, and replaces ``target``: a
        part raises ``RequestError``, as it does for recurrent models, and so does a sequence that was moved since the
        last ``decode``.
        """
        self._check_seq(source)
        self._check_seq(target)
        _check_positions(p0, p1)
        if source == target:
            return

        def job(context: Context) -> None:
            is_separate = not context.params.kv_unified
            # Positions begin at 0: from there to the open end is everything.
            if p0 > 0 or p1 >= 0:
                if is_separate:
                    reason, hint = "a part can be copied only within a unified KV buffer", "set kv_unified=True"
                    raise RequestError("copy a sequence", reason, hint)
                if _is_recurrent(context) or context._architecture in _WHOLE_COPIES:
                    raise RequestError("copy a sequence", "this model's memory can only be copied whole")
            if is_separate and context._is_shift_pending:
                raise RequestError("copy a sequence", "sequences were moved since the last decode", "decode first")
            if not is_separate:  # the guest asserts on cells that both have already
                context._native.llama_memory_seq_rm(context._memory, target, p0, p1)
            context._native.llama_memory_seq_cp(context._memory, source, target, p0, p1)
            context._is_copy_pending = context._is_copy_pending or is_separate

        self._run(job, "copy a sequence")

    def seq_keep(self, seq_id: int) -> None:
        """Forget every other sequence: ``llama_memory_seq_keep``."""
        self._check_seq(seq_id)

        def job(context: Context) -> None:
            native, memory = context._native, context._memory
            native.llama_memory_seq_keep(memory, seq_id)
            if not context.params.kv_unified:  # upstream looks only into the buffer of seq_id
                for other in range(context.n_seq_max):
                    if other != seq_id:
                        native.llama_memory_seq_rm(memory, other, -1, -1)

        self._run(job, "keep a sequence")

    def seq_add(self, seq_id: int, p0: int, p1: int, delta: int) -> None:
        """Move positions by ``delta``: ``llama_memory_seq_add``.

        What would come below position 0 is forgotten. The cached keys are turned at the next ``decode``. Raises
        ``RequestError`` where ``can_shift`` is false or a position would exceed 32 bits.
        """
        self._check_seq(seq_id)
        _check_positions(p0, p1, delta)

        def job(context: Context) -> None:
            _check_can_shift(context)
            native, memory = context._native, context._memory
            if int(native.llama_memory_seq_pos_max(memory, seq_id)) + delta >= _I32_MAX:
                raise RequestError("shift a sequence", f"a shift by {delta} leaves the 32 bits of a position")
            native.llama_memory_seq_add(memory, seq_id, p0, p1, delta)
            context._is_shift_pending = True

        self._run(job, "shift a sequence")

    def seq_div(self, seq_id: int, p0: int, p1: int, d: int) -> None:
        """Divide positions by ``d``, at least 1, rounding down: ``llama_memory_seq_div``; else as ``seq_add``."""
        self._check_seq(seq_id)
        _check_positions(p0, p1, d)
        if d < 1:
            raise RequestError("shift a sequence", f"positions cannot be divided by {d}", "give 1 or more")

        def job(context: Context) -> None:
            _check_can_shift(context)
            context._native.llama_memory_seq_div(context._memory, seq_id, p0, p1, d)
            context._is_shift_pending = True

        self._run(job, "shift a sequence")

    def seq_pos_min(self, seq_id: int = 0) -> int:
        """Return the first position of a sequence, -1 when it is empty: ``llama_memory_seq_pos_min``."""
        self._check_seq(seq_id)
        return self._run(lambda c: int(c._native.llama_memory_seq_pos_min(c._memory, seq_id)), "look into the KV cache")

    def seq_pos_max(self, seq_id: int = 0) -> int:
        """Return the last position of a sequence, -1 when it is empty: ``llama_memory_seq_pos_max``."""
        self._check_seq(seq_id)
        return self._run(lambda c: int(c._native.llama_memory_seq_pos_max(c._memory, seq_id)), "look into the KV cache")

    def _check_seq(self, seq_id: object) -> None:
        check_seq(seq_id, self._context.n_seq_max)

    def _run(self, job: Callable[[Context], T], operation: str) -> T:
        context = self._context
        return context._run(lambda: job(context), operation)


def check_seq(seq_id: object, n_seq_max: int) -> None:
    """Raise ``RequestError`` unless ``seq_id`` names one of ``n_seq_max`` sequences."""
    if isinstance(seq_id, bool) or not isinstance(seq_id, (int, np.integer)) or not 0 <= seq_id < n_seq_max:
        raise RequestError("use a sequence", f"sequence {seq_id!r} is not an integer from 0 to {n_seq_max - 1}")


# Architectures whose memory asserts on copies of a part, although they are not recurrent.
_WHOLE_COPIES = frozenset({"deepseek4"})


def _is_recurrent(context: Context) -> bool:
    return context.model.is_recurrent or context.model.is_hybrid


def _can_shift(context: Context) -> bool:
    """Whether the guest can move positions without dying of it at the next decode; on the engine thread."""
    model, kind = context.model, context.params.type_k
    if not context._native.llama_memory_can_shift(context._memory):
        return False
    if kind in ("f32", "f16") or model.rope_type == "none":
        return True
    if kind == "bf16" or model.n_swa or not model.n_head:
        return False  # no kernel turns bf16 in place; windows may have heads of another width
    # Upstream turns quantized keys by way of a rotation that it makes only for these heads, all of them turned.
    width = int(model._meta(f"{context._architecture}.attention.key_length") or model.n_embd // model.n_head)
    n_rot = int(model._meta(f"{context._architecture}.rope.dimension_count") or width)
    return width % 64 == 0 and n_rot == width


def _check_can_shift(context: Context) -> None:
    if not _can_shift(context):
        raise RequestError("shift a sequence", "this model and K cache cannot shift positions", "see can_shift")


def _check_positions(*values: object) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not -_I32_MAX <= value <= _I32_MAX:
            raise RequestError("use positions", f"{value!r} is not a 32-bit integer")
