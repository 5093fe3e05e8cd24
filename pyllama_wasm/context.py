"""A context: the KV cache and the buffers to compute with: ``llama_context``."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from . import _abi
from ._guest_batch import GuestBatch
from ._memory_probe import context_pieces, probe_memory
from .errors import (
    CancelledError,
    ClosedError,
    ContextFullError,
    GuestDiedError,
    OutOfMemoryError,
    RequestError,
    SandboxError,
)
from .params import ContextParams

if TYPE_CHECKING:
    from .batch import Batch
    from .loaded_model import LoadedModel
    from .native import Struct

__all__ = ["Context"]

T = TypeVar("T")

_COPIED = (
    "n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_outputs_max", "rope_freq_base", "rope_freq_scale",
    "yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_orig_ctx",
    "embeddings", "swa_full", "kv_unified",
)  # fmt: skip
_ENUMS = {
    "rope_scaling_type": "LLAMA_ROPE_SCALING_TYPE_",
    "pooling_type": "LLAMA_POOLING_TYPE_",
    "attention_type": "LLAMA_ATTENTION_TYPE_",
    "flash_attn_type": "LLAMA_FLASH_ATTN_TYPE_",
}


class Context:
    """Made by ``Model.context``; closed by ``close``, by ``with`` or with its model. Usable from any thread."""

    n_ctx: int
    """Tokens the KV cache holds, all sequences together (llama.cpp rounds up to 256)."""

    n_ctx_seq: int
    """Tokens one sequence can have."""

    n_batch: int
    """Most tokens in one ``decode``."""

    n_ubatch: int
    """Most tokens computed at once."""

    n_seq_max: int
    """Independent sequences."""

    n_outputs_max: int
    """Most tokens of one ``decode`` whose logits can be asked for."""

    def __init__(self, model: LoadedModel, params: ContextParams) -> None:
        """Create it with ``llama_init_from_model``; raises ``OutOfMemoryError`` or ``RequestError``."""
        self.model, self.params = model, params
        self._native, self._ptr = model.native, 0
        self._outputs: dict[int, int] = {}
        if model.params.vocab_only:
            raise RequestError("create a context", "the model was loaded with vocab_only", "load it with its weights")
        model._run(self._create, "create a context")

    @property
    def is_closed(self) -> bool:
        """Whether ``close`` was called on the context or on its model."""
        return not self._ptr or self.model.is_closed

    def decode(self, batch: Batch) -> None:
        """Compute ``batch``: ``llama_decode``. Logits of an earlier call become invalid.

        The batch is checked first: ``RequestError`` for a token outside the vocabulary, an unknown sequence, more
        tokens than ``n_batch`` or positions that do not follow the sequence's last one; ``ContextFullError`` when the
        KV cache has no room, which leaves it unchanged. ``CancelledError`` after ``Model.cancel``: what was computed
        until then remains in the KV cache.
        """
        self._check_batch(batch)
        outputs = {i: rank for rank, i in enumerate(batch.outputs())}

        def job() -> None:
            self._check_open("decode")
            self._decode(self._guest_batch.write(batch), outputs)

        self.model._run_cancellable(job, "decode")

    def logits(self, i: int = -1) -> npt.NDArray[np.float32]:
        """Return the logits after token ``i`` of the last batch as a read-only view of shape ``(n_vocab,)``.

        ``i`` is an index into the batch whose logits were asked for; negative ones count these from the end. The
        view is guest memory: it is valid until the next ``decode`` or ``close``; copy it to keep it.
        """
        rank = self._output_rank(i)
        n_vocab = self.model.vocab.n_tokens

        def job() -> npt.NDArray[np.float32]:
            # By rank from the end, because single-output batches of the generator carry no index of their own.
            ptr = self._native.llama_get_logits_ith(self._ptr, rank - len(self._outputs))
            if not ptr:
                raise SandboxError("get logits", "the guest has none for this token")
            view: npt.NDArray[np.float32] = self._native.engine.memory.view(int(ptr), (n_vocab,), np.float32)
            return view

        return self._run(job, "get logits")

    def memory_clear(self, data: bool = False) -> None:
        """Forget every sequence: ``llama_memory_clear``; ``data`` also overwrites the buffers."""
        self._run(lambda: self._native.llama_memory_clear(self._memory, data), "clear the KV cache")

    def memory_seq_rm(self, seq_id: int, p0: int = -1, p1: int = -1) -> bool:
        """Remove the positions ``p0`` to ``p1 - 1`` of a sequence; negative bounds are open: ``llama_memory_seq_rm``.

        Returns ``False`` when this kind of memory cannot remove a part; ``seq_id`` -1 means every sequence.
        """
        if seq_id != -1:
            self._check_seq(seq_id)
        return self._run(
            lambda: bool(self._native.llama_memory_seq_rm(self._memory, seq_id, p0, p1)), "remove from the KV cache"
        )

    def memory_seq_cp(self, source: int, target: int, p0: int = -1, p1: int = -1) -> None:
        """Copy the positions ``p0`` to ``p1 - 1`` of one sequence to another: ``llama_memory_seq_cp``."""
        self._check_seq(source)
        self._check_seq(target)
        if source != target and not self.params.kv_unified and (p0 > 0 or p1 >= 0):
            raise RequestError(
                "copy a sequence", "a part can be copied only within a unified KV buffer", "set kv_unified=True"
            )
        self._run(lambda: self._native.llama_memory_seq_cp(self._memory, source, target, p0, p1), "copy a sequence")

    def memory_seq_keep(self, seq_id: int) -> None:
        """Forget every other sequence: ``llama_memory_seq_keep``."""
        self._check_seq(seq_id)
        self._run(lambda: self._native.llama_memory_seq_keep(self._memory, seq_id), "keep a sequence")

    def memory_seq_add(self, seq_id: int, p0: int, p1: int, delta: int) -> None:
        """Shift positions by ``delta``: ``llama_memory_seq_add``; ``RequestError`` where the memory cannot shift."""
        self._check_seq(seq_id)

        def job() -> None:
            if not self._native.llama_memory_can_shift(self._memory):
                raise RequestError("shift a sequence", "this model's memory cannot shift positions")
            self._native.llama_memory_seq_add(self._memory, seq_id, p0, p1, delta)

        self._run(job, "shift a sequence")

    def memory_seq_pos_max(self, seq_id: int = 0) -> int:
        """Return the last position of a sequence, -1 when it is empty: ``llama_memory_seq_pos_max``."""
        self._check_seq(seq_id)
        return self._run(
            lambda: int(self._native.llama_memory_seq_pos_max(self._memory, seq_id)), "look into the KV cache"
        )

    def memory_seq_pos_min(self, seq_id: int = 0) -> int:
        """Return the first position of a sequence, -1 when it is empty: ``llama_memory_seq_pos_min``."""
        self._check_seq(seq_id)
        return self._run(
            lambda: int(self._native.llama_memory_seq_pos_min(self._memory, seq_id)), "look into the KV cache"
        )

    def close(self) -> None:
        """Free the context: ``llama_free``. Doing it twice is fine."""
        if not self._ptr:
            return
        self._ptr = 0
        finalizer = self._finalizer.detach()
        if finalizer is not None and not self.model.is_closed and not self.model.engine.is_dead:
            self.model._run(self._free, "close a context")

    def __enter__(self) -> Context:
        """Return the context itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close the context."""
        self.close()

    def _run(self, job: Callable[[], T], operation: str) -> T:
        """Run ``job`` on the engine thread if model and context are open."""

        def checked() -> T:
            self._check_open(operation)
            return job()

        return self.model._run(checked, operation)

    def _check_open(self, operation: str) -> None:
        if not self._ptr:
            raise ClosedError(operation, "the context is closed", "create another with model.context()")

    def _create(self) -> None:
        native, model = self._native, self.model
        model._drain_trash()
        pieces = context_pieces(model._shape(), self.params, model.n_ctx_train)
        probe_memory(native, pieces, "create a context", _MEMORY_HINT)
        mark = model.guest_log.mark()
        ptr = int(native.llama_init_from_model(model._ptr, self._struct()))
        if not ptr:
            log = model.guest_log.since(mark)
            reason = log.reason("the guest could not create it")
            if log.is_out_of_memory:
                raise OutOfMemoryError("create a context", reason, _MEMORY_HINT)
            raise RequestError("create a context", reason)
        try:
            self.n_ctx = int(native.llama_n_ctx(ptr))
            self.n_ctx_seq = int(native.llama_n_ctx_seq(ptr))
            self.n_batch = int(native.llama_n_batch(ptr))
            self.n_ubatch = int(native.llama_n_ubatch(ptr))
            self.n_seq_max = int(native.llama_n_seq_max(ptr))
            self.n_outputs_max = min(self.params.n_outputs_max or self.n_batch, self.n_batch)
            self._memory = int(native.llama_get_memory(ptr))
            # Without a KV cache or causal attention every token attends to all, so all must be computed at once.
            self._n_tokens_max = self.n_batch
            if not self._memory or not native.llama_get_causal_attn(ptr):
                self._n_tokens_max = self.n_ubatch
            self._guest_batch = GuestBatch(native, self.n_batch, self.n_seq_max)
            model._threadpool().attach(ptr)
        except BaseException:
            with suppress(GuestDiedError):  # the first error tells why
                native.llama_free(ptr)
            raise
        self._ptr = ptr
        guest_batch = self._guest_batch

        def free() -> None:
            native.llama_free(ptr)
            guest_batch.free()

        self._free = free
        # A context that is dropped without close() is freed by the next one that is created. Nothing here may refer to
        # the model: the model's pool refers to its contexts, and neither would ever go.
        self._finalizer = weakref.finalize(self, model._trash.append, free)
        self._finalizer.atexit = False

    def _struct(self) -> Struct:
        """Return ``llama_context_params``; on the engine thread."""
        native, params, engine = self._native, self.params, self.model.engine
        struct: Struct = native.llama_context_default_params()
        for name in _COPIED:
            struct[name] = getattr(params, name)
        for name, prefix in _ENUMS.items():
            struct[name] = getattr(_abi, prefix + getattr(params, name).upper())
        for name in ("type_k", "type_v"):
            struct[name] = getattr(_abi, "GGML_TYPE_" + getattr(params, name).upper())
        # More threads than the pool has would make ggml start a pool of its own for every graph.
        struct["n_threads"] = min(params.n_threads or engine.n_threads, engine.n_threads)
        struct["n_threads_batch"] = min(params.n_threads_batch or engine.n_threads, engine.n_threads)
        # The guest asserts n_outputs_max >= n_seq_max when it makes its first output buffer.
        if 0 < params.n_outputs_max < params.n_seq_max:
            struct["n_outputs_max"] = params.n_seq_max
        struct["n_batch"] = max(params.n_batch, params.n_seq_max)
        struct["abort_callback"] = int(native.call("pw_abort_callback") or 0)
        return struct

    def _check_seq(self, seq_id: int) -> None:
        if isinstance(seq_id, bool) or not isinstance(seq_id, (int, np.integer)) or not 0 <= seq_id < self.n_seq_max:
            raise RequestError(
                "use a sequence", f"sequence {seq_id!r} is not an integer from 0 to {self.n_seq_max - 1}"
            )

    def _check_batch(self, batch: Batch) -> None:
        """Raise for everything the guest would answer with an assertion or with a message that says too little."""
        n = batch.n_tokens
        if not n:
            raise RequestError("decode", "the batch is empty")
        if n > self.n_ctx:
            raise ContextFullError("decode", f"{n} tokens do not fit into a context of {self.n_ctx}", "raise n_ctx")
        if n > self._n_tokens_max:
            name = "n_batch" if self._n_tokens_max == self.n_batch else "n_ubatch"
            hint = "decode them in parts" if name == "n_batch" else "non-causal attention needs them at once: raise it"
            raise RequestError("decode", f"{n} tokens exceed {name} = {self._n_tokens_max}", hint)
        token, _, n_seq_id, seq_id = batch.arrays()
        if int(token.max()) >= self.model.vocab.n_tokens:
            raise RequestError(
                "decode", f"token {int(token.max())} is not in the vocabulary of {self.model.vocab.n_tokens} tokens"
            )
        used = seq_id[np.arange(seq_id.shape[1])[None, :] < n_seq_id[:, None]]
        if int(used.max()) >= self.n_seq_max:
            raise RequestError(
                "decode", f"sequence {int(used.max())} exceeds n_seq_max = {self.n_seq_max}", "raise n_seq_max"
            )
        n_outputs = n if self.params.embeddings else int(np.count_nonzero(batch.logits_flags()))
        if n_outputs > self.n_outputs_max:
            raise RequestError(
                "decode", f"outputs of {n_outputs} tokens exceed n_outputs_max = {self.n_outputs_max}", "ask for fewer"
            )

    def _output_rank(self, i: int) -> int:
        n = len(self._outputs)
        if i < 0 and -n <= i:
            return n + i
        if i in self._outputs:
            return self._outputs[i]
        raise RequestError("get logits", f"the last batch asked for no logits of token {i}", "add it with logits=True")

    def _prefill(self, tokens: Sequence[int], pos: int, logits_last: bool) -> None:
        """Decode checked tokens of sequence 0; on the engine thread."""
        struct = self._guest_batch.write_tokens(tokens, pos, logits_last)
        self._decode(struct, {len(tokens) - 1: 0} if logits_last else {})

    def _decode_one(self, token: int, pos: int) -> None:
        """Decode one checked token of sequence 0 and its logits; on the engine thread."""
        self._decode(self._guest_batch.write_one(token, pos), _ONE_OUTPUT)

    def _decode(self, struct: Struct, outputs: dict[int, int]) -> None:
        self._outputs = {}
        mark = self.model.guest_log.mark()
        code = int(self._native.llama_decode(self._ptr, struct))
        if code == 0:
            self._outputs = outputs
            return
        if code == 1:
            raise ContextFullError(
                "decode", f"no room in the KV cache of {self.n_ctx} tokens", "raise n_ctx or remove a sequence"
            )
        if code == 2:
            raise CancelledError("decode", "it was cancelled")
        log = self.model.guest_log.since(mark)
        reason = log.reason(f"llama_decode answered {code}")
        if log.is_out_of_memory:
            raise OutOfMemoryError("decode", reason, "raise memory_limit_bytes")
        if code == -1:
            raise RequestError("decode", reason)
        raise SandboxError("decode", reason)


_ONE_OUTPUT = {0: 0}
_MEMORY_HINT = "lower n_ctx or raise memory_limit_bytes"
