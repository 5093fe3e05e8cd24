"""What a context is made of: ``llama_context_params``, and what is checked before the guest would assert."""

from __future__ import annotations

import struct as packing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from . import _abi
from ._memory_probe import model_shape
from ._rank_head import check_pooling
from .errors import RequestError
from .params import ContextParams

if TYPE_CHECKING:
    from .loaded_model import LoadedModel
    from .native import Native, Struct
    from .sampler import Sampler

__all__ = ["check_context_params", "context_struct", "n_outputs_per_seq", "with_samplers"]

_COPIED = (
    "n_ubatch", "n_seq_max", "n_outputs_max", "n_outputs_max_per_seq", "rope_freq_base", "rope_freq_scale",
    "yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_orig_ctx",
    "embeddings", "swa_full", "kv_unified", "no_perf",
)  # fmt: skip
_ENUMS = {
    "rope_scaling_type": "LLAMA_ROPE_SCALING_TYPE_",
    "pooling_type": "LLAMA_POOLING_TYPE_",
    "attention_type": "LLAMA_ATTENTION_TYPE_",
    "flash_attn_type": "LLAMA_FLASH_ATTN_TYPE_",
}

_OPERATION = "create a context"
_FLOAT_TYPES = ("f32", "f16", "bf16")
_BLOCK = 32  # elements per block of every quantized type the KV cache takes


def check_context_params(model: LoadedModel, params: ContextParams, architecture: str) -> None:
    """Raise ``RequestError`` or ``UnsupportedModelError`` for what this model cannot have; on the engine thread."""
    check_pooling(model, params.pooling_type, params.embeddings, _OPERATION)
    quantized = [kind for kind in (params.type_k, params.type_v) if kind not in _FLOAT_TYPES]
    if quantized and model.n_head_kv:
        shape = model_shape(model)
        for name, kind, size in (("K", params.type_k, shape.n_embd_k), ("V", params.type_v, shape.n_embd_v)):
            n_head = size // model.n_head_kv
            if kind in quantized and n_head % _BLOCK:
                reason = f"type {kind} of the {name} cache has blocks of {_BLOCK}, an attention head {n_head} numbers"
                raise RequestError(_OPERATION, reason, "use f32, f16 or bf16")
    if architecture == "t5":
        if params.pooling_type not in ("unspecified", "none"):
            raise RequestError(_OPERATION, "the decoder needs the encoder's output unpooled", "use pooling_type none")
        if params.n_seq_max > 1 and not params.kv_unified:
            reason = "the model's decoder takes several sequences in one buffer only"
            raise RequestError(_OPERATION, reason, "set kv_unified=True")


def context_struct(model: LoadedModel, params: ContextParams, architecture: str) -> Struct:
    """Return ``llama_context_params``; on the engine thread."""
    native, engine = model.native, model.engine
    struct: Struct = native.llama_context_default_params()
    for name in _COPIED:
        struct[name] = getattr(params, name)
    for name, prefix in _ENUMS.items():
        struct[name] = getattr(_abi, prefix + getattr(params, name).upper())
    for name in ("type_k", "type_v"):
        struct[name] = getattr(_abi, "GGML_TYPE_" + getattr(params, name).upper())
    # Not left to the guest: making a context with YaRN changes what it takes the model to be trained for.
    # The guest limits n_batch by n_ctx, and asserts n_batch and n_outputs_max >= n_seq_max.
    struct["n_ctx"] = max(params.n_ctx or model.n_ctx_train, params.n_seq_max)
    struct["n_batch"] = max(params.n_batch, params.n_seq_max)
    if 0 < params.n_outputs_max < params.n_seq_max:
        struct["n_outputs_max"] = params.n_seq_max
    if params.embeddings:
        _plan_pooling(struct, params, has_cache=model._meta(f"{architecture}.attention.causal") != "false")
    # More threads than the pool has would make ggml start a pool of its own for every graph.
    struct["n_threads"] = min(params.n_threads or engine.n_threads, engine.n_threads)
    struct["n_threads_batch"] = min(params.n_threads_batch or engine.n_threads, engine.n_threads)
    struct["abort_callback"] = int(native.call("pw_abort_callback") or 0)
    return struct


def _plan_pooling(struct: Struct, params: ContextParams, has_cache: bool) -> None:
    """Make the sizes such that the guest can plan a graph with pooling.

    It rounds the tokens it plans for up to a multiple of the sequences, but not the outputs, and asserts when there
    are fewer outputs than tokens.
    """
    n_seq = params.n_seq_max
    n_ubatch = min(params.n_ubatch, int(struct["n_batch"]))
    if has_cache:  # a larger context would take memory; rounded as the guest does
        n_ubatch = min(n_ubatch, -(-int(struct["n_ctx"]) // 256) * 256 // n_seq * n_seq)
    n_ubatch = -(-max(n_ubatch, 1) // n_seq) * n_seq
    struct["n_ubatch"] = n_ubatch
    struct["n_ctx"] = max(int(struct["n_ctx"]), n_ubatch)
    struct["n_batch"] = max(int(struct["n_batch"]), n_ubatch)
    if params.n_outputs_max:
        struct["n_outputs_max"] = max(int(struct["n_outputs_max"]), n_ubatch)


def n_outputs_per_seq(struct: Struct, has_encoder: bool) -> int:
    """Return for how many outputs of a sequence the guest will make samplers, or a little more."""
    n_all = int(struct["n_batch"]) if has_encoder else int(struct["n_outputs_max"]) or int(struct["n_batch"])
    return min(int(struct["n_outputs_max_per_seq"]) or n_all, n_all)


@contextmanager
def with_samplers(native: Native, struct: Struct, samplers: Mapping[int, Sampler]) -> Iterator[None]:
    """Have ``struct`` name these chains for the block: ``llama_sampler_seq_config``; on the engine thread."""
    configs = b"".join(packing.pack("<iI", seq_id, chain._parts.ptr) for seq_id, chain in samplers.items())
    with native.array(configs or bytes(8)) as ptr:
        struct["samplers"], struct["n_samplers"] = ptr if samplers else 0, len(samplers)
        yield
