"""A context: the memory of some sequences and the buffers to compute with: ``llama_context``."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from . import _abi
from ._batch_check import BatchLimits, check_batch
from ._context_sampling import ContextSampling
from ._context_setup import check_context_params, context_struct, n_outputs_per_seq, with_samplers
from ._guest_batch import GuestBatch
from ._memory_probe import context_pieces, model_shape, probe_memory
from ._rank_head import check_pooling
from .adapter import ControlVector, LoraAdapter, Loras, apply_control_vector, apply_loras
from .errors import (
    CancelledError,
    ClosedError,
    ContextFullError,
    GuestDiedError,
    OutOfMemoryError,
    RequestError,
    SandboxError,
    UnsupportedModelError,
)
from .memory import Memory
from .params import POOLING_TYPES, ContextParams
from .state import State
from .types import ContextPerf

if TYPE_CHECKING:
    from .batch import Batch
    from .loaded_model import LoadedModel
    from .native import Struct
    from .sampler import Sampler

__all__ = ["Context"]

T = TypeVar("T")


class Context(ContextSampling):
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

    def __init__(
        self, model: LoadedModel, params: ContextParams, samplers: Mapping[int, Sampler] | None = None
    ) -> None:
        """Create it with ``llama_init_from_model``; raises ``OutOfMemoryError`` or ``RequestError``."""
        self.model, self.params = model, params
        self._native, self._ptr = model.native, 0
        self._forget_outputs()
        # What llama.cpp only notes down and carries out at the beginning of the next decode.
        self._is_shift_pending = self._is_copy_pending = False
        self._encoded_seqs: frozenset[int] = frozenset()
        self._loras: dict[LoraAdapter, float] = {}
        self._samplers = dict(samplers or {})
        if model.params.vocab_only:
            raise RequestError("create a context", "the model was loaded with vocab_only", "load it with its weights")
        model._run(self._create, "create a context")

    @property
    def is_closed(self) -> bool:
        """Whether ``close`` was called on the context or on its model."""
        return not self._ptr or self.model.is_closed

    @property
    def memory(self) -> Memory:
        """The KV cache or recurrent state: remove, copy and move what sequences remember."""
        return Memory(self)

    @property
    def state(self) -> State:
        """The content of the memory as bytes or file, of all sequences or of one."""
        return State(self)

    def decode(self, batch: Batch, *, deadline_s: float | None = None) -> None:
        """Compute ``batch``: ``llama_decode``. Logits and embeddings of an earlier call become invalid.

        The batch is checked first: ``RequestError`` for a token outside the vocabulary, an unknown sequence, more
        tokens than ``n_batch`` or positions that do not follow the sequence's last one; ``ContextFullError`` when the
        KV cache has no room, which leaves it unchanged. ``CancelledError`` after ``Model.cancel`` and ``DeadlineError``
        after ``deadline_s`` seconds: what was computed until then remains in the KV cache. A model without a memory
        (BERT and the like) encodes instead. A model with encoder and decoder must have encoded each sequence before:
        ``encode``.
        """
        check_batch(batch, self._limits, "decode")
        outputs = self._outputs_of(batch, self._limits.all_outputs)

        def job() -> None:
            self._check_open("decode")
            if self._needs_encode:
                self._check_encoded(batch)
            try:
                self._decode(self._guest_batch.write(batch), outputs)
            except RequestError:
                self._check_positions(batch)
                raise
            if self._samplers:
                self._note_sampled(batch)

        with self.model._bounded(deadline_s):
            self.model._run_cancellable(job, "decode")

    def encode(self, batch: Batch, *, deadline_s: float | None = None) -> None:
        """Compute ``batch`` with the model's encoder: ``llama_encode``.

        All tokens attend to all of their sequence and must fit ``n_ubatch``; every token is an output. For a model
        with a decoder too (T5) the result is what ``decode`` looks at from then on, for the batch's sequences only.
        Raises as ``decode`` does, and ``UnsupportedModelError`` for a model that only decodes.
        """
        if self._memory and not self.model.has_encoder:
            raise UnsupportedModelError("encode", "the model has no encoder", "use decode")
        limits = dataclasses.replace(self._limits, must_fit_ubatch=True, must_be_equal=False, all_outputs=True)
        check_batch(batch, limits, "encode")
        outputs = self._outputs_of(batch, True)
        _, _, n_seq_id, seq_id = batch.arrays()
        seqs = frozenset(int(s) for row, n in zip(seq_id, n_seq_id, strict=True) for s in row[:n])

        def job() -> None:
            self._check_open("encode")
            self._encode(self._guest_batch.write(batch), outputs, seqs)

        with self.model._bounded(deadline_s):
            self.model._run_cancellable(job, "encode")

    def warmup(self) -> None:
        """Compute one small batch and forget it: ``llama_set_warmup``.

        The first real one then finds its weights read. Raises ``RequestError`` unless the context is empty and has no
        samplers, which would draw.
        """
        if self._samplers:
            raise RequestError("warm up", "the context has samplers", "warm up first")
        if any(self.memory.seq_pos_max(seq) >= 0 for seq in range(self.n_seq_max)):
            raise RequestError("warm up", "the context is not empty", "warm up first, or clear it")
        native, vocab = self._native, self.model.vocab
        ends = [token for token in (vocab.bos, vocab.eos) if token is not None]
        tokens = (ends or [0])[: min(self.n_batch, self.n_ubatch, self.n_outputs_max)]

        def job() -> None:
            self._check_open("warm up")
            native.llama_set_warmup(self._ptr, True)
            try:
                outputs = {i: i for i in range(len(tokens))}
                if self._needs_encode:
                    self._encode(self._guest_batch.write_tokens(tokens, 0, True), outputs, frozenset((0,)))
                self._decode(self._guest_batch.write_tokens(tokens, 0, True), outputs)
            finally:
                native.llama_memory_clear(self._memory, True)
                native.llama_synchronize(self._ptr)
                native.llama_perf_context_reset(self._ptr)
                native.llama_set_warmup(self._ptr, False)
                self._forget_outputs()
                self._encoded_seqs = frozenset()

        self.model._run_cancellable(job, "warm up")

    def synchronize(self) -> None:
        """Wait for the computation to end: ``llama_synchronize``. ``decode`` and all that reads outputs do so."""
        self._run(lambda: self._native.llama_synchronize(self._ptr), "synchronize")

    def set_embeddings(self, value: bool) -> None:
        """Compute embeddings from the next ``decode`` on, or only logits: ``llama_set_embeddings``.

        With embeddings every token of a batch is an output. ``RequestError`` for pooled ones in a
        context that was made without, unless its sizes happen to suit.
        """
        _check_flag("set embeddings", value)
        is_planned = self.params.embeddings or self.pooling_type == "none"
        if value and not is_planned and (self.n_outputs_max < self.n_ubatch or self.n_ubatch % self.n_seq_max):
            raise RequestError(
                "set embeddings", "the context was not made for pooling them", "make it with embeddings=True"
            )

        def job() -> None:
            check_pooling(self.model, self.params.pooling_type, value, "set embeddings")
            self._native.llama_set_embeddings(self._ptr, value)
            self._is_embedding = value
            self._update_limits()

        self._run(job, "set embeddings")

    @property
    def causal_attn(self) -> bool:
        """Whether tokens attend only to earlier ones: ``llama_get_causal_attn``."""
        return self._run(lambda: bool(self._native.llama_get_causal_attn(self._ptr)), "get causal attention")

    def set_causal_attn(self, value: bool) -> None:
        """Let tokens attend only to earlier ones, or to all: ``llama_set_causal_attn``.

        Without it a batch must fit ``n_ubatch``.
        """
        _check_flag("set causal attention", value)

        def job() -> None:
            self._native.llama_set_causal_attn(self._ptr, value)
            self._is_causal = value
            self._update_limits()

        self._run(job, "set causal attention")

    @property
    def n_threads(self) -> int:
        """Threads that decode single tokens: ``llama_n_threads``."""
        return self._run(lambda: int(self._native.llama_n_threads(self._ptr)), "get the threads")

    @property
    def n_threads_batch(self) -> int:
        """Threads that compute batches: ``llama_n_threads_batch``."""
        return self._run(lambda: int(self._native.llama_n_threads_batch(self._ptr)), "get the threads")

    def set_n_threads(self, n_threads: int, n_threads_batch: int | None = None) -> None:
        """Use so many threads, 1 to the engine's number, for tokens and for batches: ``llama_set_n_threads``."""
        n_max = self.model.engine.n_threads
        n_batch = n_threads if n_threads_batch is None else n_threads_batch
        for n in (n_threads, n_batch):
            if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= n_max:
                reason = f"{n!r} is not a number from 1 to the sandbox's {n_max}"
                raise RequestError("set the threads", reason, "load the model with more n_threads")
        self._run(lambda: self._native.llama_set_n_threads(self._ptr, n_threads, n_batch), "set the threads")

    def set_loras(self, adapters: Loras) -> None:
        """Apply these LoRA adapters, and no others, from the next ``decode`` on: ``llama_set_adapters_lora``.

        One adapter or several; a mapping gives each its scale, else it is 1; 0 leaves one out, ``None`` turns all off.
        What the KV cache holds stays as it was computed: clear it to begin anew. Raises ``RequestError`` for an adapter
        of another model and ``ClosedError`` for a closed one.
        """
        apply_loras(self, adapters)

    def set_control_vector(self, vector: ControlVector | None, il_start: int = 1, il_end: int | None = None) -> None:
        """Add a control vector to the hidden states, ``None`` for none, from the next ``decode`` on.

        It acts on the layers ``il_start`` to ``il_end``, by default all but layer 0, which has none:
        ``llama_set_adapter_cvec``. Raises ``RequestError`` when its width or its layers are not the model's.
        """
        apply_control_vector(self, vector, il_start, il_end)

    def perf(self) -> ContextPerf:
        """Return llama.cpp's counters of this context: ``llama_perf_context``; all zero with ``no_perf``."""

        def job() -> ContextPerf:
            struct = self._native.llama_perf_context(self._ptr)
            return ContextPerf(**{f.name: struct[f.name] for f in dataclasses.fields(ContextPerf)})

        return self._run(job, "get performance counters")

    def perf_reset(self) -> None:
        """Start counting anew: ``llama_perf_context_reset``."""
        self._run(lambda: self._native.llama_perf_context_reset(self._ptr), "reset performance counters")

    def close(self) -> None:
        """Free the context: ``llama_free``. Doing it twice is fine."""
        if not self._ptr:
            return

        def job() -> None:
            # Here, where no other call of the guest is under way, and so that Ctrl-C before leaves it open.
            self._ptr = 0
            if self._finalizer.detach() is not None:
                self._free()
            self._release_samplers()

        if self.model.is_closed or self.model.engine.is_dead:
            self._ptr = 0
            self._finalizer.detach()
            self._release_samplers()
            return
        with suppress(ClosedError, GuestDiedError):  # then its memory is gone already
            self.model._run_unbounded(job, "close a context")

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
        self._architecture = model._meta("general.architecture")
        check_context_params(model, self.params, self._architecture)
        pieces = context_pieces(model_shape(model), self.params, model.n_ctx_train)
        threadpool = model._threadpool()  # lasts: made now, it is not in the middle of what the context gives back
        probe_memory(native, pieces, "create a context", _MEMORY_HINT)
        ptr = self._make()
        try:
            self._read_properties(ptr)
            n_pos = model.n_ctx_train if self._architecture in _LEARNED_POSITIONS else 0
            self._guest_batch = GuestBatch(native, self.n_batch, self.n_seq_max, n_pos)
            threadpool.attach(ptr)
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

    def _make(self) -> int:
        """Have the guest make its context and return the address."""
        native, model = self._native, self.model
        struct = context_struct(model, self.params, self._architecture)
        self._n_outputs_per_seq = n_outputs_per_seq(struct, model.has_encoder)
        mark = model.guest_log.mark()
        with self._samplers_given(), with_samplers(native, struct, self._samplers):
            ptr = int(native.llama_init_from_model(model._ptr, struct))
            if ptr:
                return ptr
            log = model.guest_log.since(mark)
            reason = log.reason("the guest could not create it")
            if log.is_out_of_memory:
                raise OutOfMemoryError("create a context", reason, _MEMORY_HINT)
            raise RequestError("create a context", reason)

    def _read_properties(self, ptr: int) -> None:
        native, model, params = self._native, self.model, self.params
        self.n_ctx = int(native.llama_n_ctx(ptr))
        self.n_ctx_seq = int(native.llama_n_ctx_seq(ptr))
        self.n_batch = int(native.llama_n_batch(ptr))
        self.n_ubatch = int(native.llama_n_ubatch(ptr))
        self.n_seq_max = int(native.llama_n_seq_max(ptr))
        self.n_outputs_max = self.n_batch
        self._n_outputs_per_seq = min(self._n_outputs_per_seq, self.n_batch)
        if params.n_outputs_max and not model.has_encoder:
            self.n_outputs_max = min(params.n_outputs_max, self.n_batch)
        self.pooling_type = POOLING_TYPES[int(native.llama_pooling_type(ptr)) + 1]
        self._memory = int(native.llama_get_memory(ptr))
        self._needs_encode = bool(self._memory) and model.has_encoder
        # Elsewhere the guest's buffer of logits holds zeros. What keeps nothing computes embeddings or diffuses text.
        self._computes_logits = model._computes_logits and (bool(self._memory) or model.is_diffusion)
        self._is_embedding, self._is_causal = params.embeddings, bool(native.llama_get_causal_attn(ptr))
        self._n_embd_out = int(native.llama_model_n_embd_out(model._ptr))
        self._n_cls_out = int(native.llama_model_n_cls_out(model._ptr))
        has_mrope = int(native.llama_model_rope_type(model._ptr)) in _MROPE_TYPES
        self._n_embd_inp = 0 if has_mrope else int(native.llama_model_n_embd_inp(model._ptr))
        # The size of nothing tells how many caches a state consists of.
        self._empty_state_bytes = int(native.llama_state_seq_get_size(ptr, 0)) if self._memory else 0
        self._update_limits()

    def _update_limits(self) -> None:
        """Work out what ``decode`` takes as the context is set now."""
        # Without a KV cache or causal attention every token attends to all, so all must be computed at once.
        is_pooled = self._is_embedding and self.pooling_type in ("mean", "cls", "rank")
        at_once = not self._memory or not self._is_causal or is_pooled
        is_separate = not self.params.kv_unified and self.n_seq_max > 1
        self._limits = BatchLimits(
            n_ctx=self.n_ctx if self._memory else max(self.n_ctx, self.n_batch),
            n_batch=self.n_batch,
            n_ubatch=self.n_ubatch,
            n_seq_max=self.n_seq_max,
            n_outputs_max=self.n_outputs_max,
            n_vocab=self.model.vocab.n_tokens,
            n_embd=self._n_embd_inp,
            is_unified=not is_separate or not self._memory,
            must_fit_ubatch=at_once,
            must_be_equal=at_once and bool(self._memory) and is_separate,
            all_outputs=self._is_embedding or not self._memory,
        )

    def _outputs_of(self, batch: Batch, all_outputs: bool) -> dict[int, int]:
        """Return the row of each output by its index in the batch."""
        return {i: rank for rank, i in enumerate(range(batch.n_tokens) if all_outputs else batch.outputs())}

    def _check_encoded(self, batch: Batch) -> None:
        """Raise unless the encoder has seen every sequence; the guest would assert or compute with nothing."""
        _, _, n_seq_id, seq_id = batch.arrays()
        seqs = {int(s) for row, n in zip(seq_id, n_seq_id, strict=True) for s in row[:n]}
        if missing := seqs - self._encoded_seqs:
            reason = f"sequence {min(missing)} was not encoded"
            raise RequestError("decode", reason, "give its input to encode first")

    def _check_positions(self, batch: Batch) -> None:
        """Raise if the positions are why the guest refused ``batch``; on the engine thread."""
        _, pos, n_seq_id, seq_id = batch.arrays()
        for seq in {int(s) for row, n in zip(seq_id, n_seq_id, strict=True) for s in row[:n]}:
            rows = [i for i, n in enumerate(n_seq_id) if seq in seq_id[i, :n]]
            found = sorted({int(pos[i]) for i in rows})
            last = int(self._native.llama_memory_seq_pos_max(self._memory, seq))
            if last >= 0 and found[0] != last + 1:
                reason = f"sequence {seq} goes on at position {found[0]} and has {last} as its last one"
                raise RequestError("decode", reason, "go on at the next one, or remove what comes after")
            if found[-1] - found[0] >= len(found):
                raise RequestError("decode", f"the positions of sequence {seq} are not continuous")

    def _prefill(self, tokens: Sequence[int], pos: int, logits_last: bool) -> None:
        """Decode checked tokens of sequence 0; on the engine thread."""
        struct = self._guest_batch.write_tokens(tokens, pos, logits_last)
        self._decode(struct, {len(tokens) - 1: 0} if logits_last else {})

    def _decode_one(self, token: int, pos: int) -> None:
        """Decode one checked token of sequence 0 and its logits; on the engine thread."""
        self._decode(self._guest_batch.write_one(token, pos), _ONE_OUTPUT)

    def _decode(self, struct: Struct, outputs: dict[int, int]) -> None:
        """Run ``llama_decode``; ``outputs``: row by index in the batch; on the engine thread."""
        self._outputs = {}
        self._sampled, self._without_logits = {}, frozenset()
        mark = self.model.guest_log.mark()
        code = int(self._native.llama_decode(self._ptr, struct))
        if code != -1:  # refused before anything was done
            self._is_shift_pending = self._is_copy_pending = False
        if code:
            raise self._failure(code, mark, "decode")
        self._outputs = outputs
        self._has_logits, self._has_embeddings = self._computes_logits, self._is_embedding

    def _encode(self, struct: Struct, outputs: dict[int, int], seqs: frozenset[int]) -> None:
        """Run ``llama_encode`` for these sequences; on the engine thread."""
        self._forget_outputs()
        mark = self.model.guest_log.mark()
        code = int(self._native.llama_encode(self._ptr, struct))
        if code:
            raise self._failure(code, mark, "encode")
        self._outputs, self._encoded_seqs = outputs, seqs
        self._has_logits = not self.model.has_encoder and self._computes_logits
        # T5 keeps the encoder's output for its decoder, asked for or not.
        self._has_embeddings = self._is_embedding or self._needs_encode

    def _failure(self, code: int, mark: int, operation: str) -> Exception:
        """Return the exception for what ``llama_decode`` or ``llama_encode`` answered."""
        if code == 1:
            reason = f"no room in the KV cache of {self.n_ctx} tokens"
            return ContextFullError(operation, reason, "raise n_ctx or remove a sequence")
        if code == 2:
            return CancelledError(operation, "it was cancelled")
        log = self.model.guest_log.since(mark)
        reason = log.reason(f"llama_{operation} answered {code}")
        if log.is_out_of_memory:
            return OutOfMemoryError(operation, reason, "raise memory_limit_bytes")
        return RequestError(operation, reason) if code == -1 else SandboxError(operation, reason)


_ONE_OUTPUT = {0: 0}
_MEMORY_HINT = "lower n_ctx or raise memory_limit_bytes"

_MROPE_TYPES = (_abi.LLAMA_ROPE_TYPE_MROPE, _abi.LLAMA_ROPE_TYPE_IMROPE, _abi.LLAMA_ROPE_TYPE_VISION)

# Architectures with a table of positions, which the guest asserts on when it is left.
_LEARNED_POSITIONS = frozenset({"bert", "gpt2", "mpt", "starcoder"})


def _check_flag(operation: str, value: object) -> None:
    if not isinstance(value, bool):
        raise RequestError(operation, f"{value!r} is neither True nor False")
