"""Ask whether a context will fit before llama.cpp tries: some of its allocations assert instead of failing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import OutOfMemoryError, RequestError
from .params import ContextParams
from .text import parse_count

if TYPE_CHECKING:
    from .loaded_model import LoadedModel
    from .native import Native

__all__ = ["ModelShape", "context_pieces", "model_shape", "probe_memory"]

_KV_BYTES = {  # per 32 elements
    "f32": 128, "f16": 64, "bf16": 64, "q8_0": 34, "q5_1": 24, "q5_0": 22, "q4_1": 20, "q4_0": 18, "iq4_nl": 18,
}  # fmt: skip

# ggml_backend_sched_new: 30 inputs and copies for each of 8 graph nodes per tensor, a ggml_tensor of 240 bytes each.
_SCHED_BYTES_PER_TENSOR = 8 * 30 * 2 * 240
_TENSORS_PER_LAYER = 12

# What decoding allocates as it goes: work buffers, output rows, thread stacks.
_RESERVE_BYTES = 24 << 20


@dataclass(frozen=True)
class ModelShape:
    """The sizes a context's memory depends on; elements of one token and layer for K and V."""

    n_layer: int
    n_embd: int
    n_ff: int
    n_vocab: int
    n_embd_k: int
    n_embd_v: int
    n_swa: int = 0


def model_shape(model: LoadedModel) -> ModelShape:
    """Return the sizes of a loaded model; on the engine thread."""
    if model.params.no_alloc:
        raise RequestError("create a context", "the model was loaded with no_alloc", "load it with its weights")
    architecture = model._meta("general.architecture")

    def size(key: str, default: int) -> int:
        found = parse_count(model._meta(f"{architecture}.{key}"))
        return default if found is None else found

    head = model.n_embd // max(model.n_head, 1)
    n_embd_k = model.n_head_kv * size("attention.key_length", head)
    n_embd_v = model.n_head_kv * size("attention.value_length", head)
    if rank := size("attention.kv_lora_rank", 0):  # multi-head latent attention caches the compressed form
        n_embd_k, n_embd_v = rank, 0
    if model.is_recurrent or model.is_hybrid:  # few layers or none have a cache that grows with the context
        n_embd_k = n_embd_v = 0
    n_ff = size("feed_forward_length", 0)
    return ModelShape(model.n_layer, model.n_embd, n_ff, model.vocab.n_tokens, n_embd_k, n_embd_v, model.n_swa)


def context_pieces(shape: ModelShape, params: ContextParams, n_ctx_train: int) -> list[int]:
    """Return about how many bytes a context allocates, in the pieces it does so.

    An estimate from below where architectures differ: a too large one would refuse what works.
    """
    n_ctx = -(-(params.n_ctx or n_ctx_train) // 256) * 256
    n_ubatch = min(params.n_ubatch, params.n_batch, n_ctx)
    n_outputs = min(n_ubatch, params.n_outputs_max or n_ubatch)
    per_token = shape.n_embd_k * _KV_BYTES[params.type_k] + shape.n_embd_v * _KV_BYTES[params.type_v]
    n_cells = n_ctx
    if shape.n_swa and not params.swa_full:  # as if no layer saw more than the window
        n_cells = min(n_ctx, -(-(shape.n_swa + n_ubatch) // 256) * 256)
    return [
        n_cells * shape.n_layer * per_token // 32,
        (shape.n_layer * _TENSORS_PER_LAYER + 8) * _SCHED_BYTES_PER_TENSOR,
        4 * n_ubatch * (2 * shape.n_ff + 6 * shape.n_embd) + 4 * n_outputs * shape.n_vocab,
        _RESERVE_BYTES,
    ]


def probe_memory(native: Native, pieces: list[int], operation: str, hint: str) -> None:
    """Raise ``OutOfMemoryError`` unless the guest can allocate all ``pieces`` at once; on the engine thread."""
    taken: list[int] = []
    try:
        for n_bytes in pieces:
            ptr = int(native.call("pw_alloc", min(n_bytes, 2**32 - 1)) or 0) & 0xFFFFFFFF
            if not ptr:
                needed, limit = sum(pieces) / 2**20, native.engine.memory.max_bytes / 2**20
                reason = f"it needs about {needed:.0f} MiB, which the sandbox of {limit:.0f} MiB has not left"
                raise OutOfMemoryError(operation, reason, hint)
            taken.append(ptr)
    finally:
        for ptr in taken:
            native.free(ptr)
