"""How much memory a model and a context will take, from the file's header alone: nothing is loaded or run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .errors import ModelFormatError, RequestError
from .ggml_types import GGML_TYPES
from .gguf import GGUFArray, GGUFReader, GGUFTensor
from .params import ContextParams
from .source import ModelSource, Source

__all__ = ["MemoryEstimate", "estimate_memory", "estimate_source"]

_LIMIT_BYTES = 1 << 32
_CACHE_PAD = 256
_MAX_LAYERS = 512
_MAX_SIZE = 2**31 - 1
_TYPES = {kind.name: kind for kind in GGML_TYPES.values()}

# What a sandbox has whatever the model: stacks of its threads, the module's own data, buffers of a context.
_BASE_BYTES = 15 << 20
_BYTES_PER_TOKEN = 100
_BYTES_PER_MERGE = 300

# ggml_backend_sched_new keeps 30 inputs and their copies for every node of the graph, each a ggml_tensor of 256 bytes;
# llama_context::graph_max_nodes: at least 1024 nodes, 8 for a tensor, 32 for the architectures named there.
_BYTES_PER_NODE = 2 * 30 * 256
_MANY_NODES = frozenset(
    {"qwen3next", "kimi-linear", "bailingmoe3", "qwen35", "qwen35moe", "clef", "qwen4exp", "deepseek4", "nanbeige"}
    | {"minimax-01", "minimax-m3", "hy_v4", "kimi-k3", "glm5-next", "hrm_text"}
)

# What llama_model_base::create_memory makes where it is not a KV cache for every layer.
_NO_CACHE = frozenset(
    {"bert", "jina-bert-v2", "jina-bert-v3", "nomic-bert", "nomic-bert-moe", "neo-bert", "modern-bert", "eurobert"}
    | {"gemma-embedding", "gemma-embedding2", "dream", "llada", "llada-moe", "rnd1", "wavtokenizer-dec"}
)
_RECURRENT = frozenset({"mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"})
_BOTH = frozenset({"falcon-h1"})  # every layer has attention and a state
_LINEAR = frozenset({"qwen3next", "qwen35", "qwen35moe"})  # full attention in every n-th layer only
_INDEXED = frozenset({"deepseek32", "glm-dsa", "minimax-m3", "dots3note", "hy_v4"})  # a second cache of index keys

# Repacked bytes to a block's own (wasm/kernels/strips_32.c, strips_256.c, strips_q6_K.c).
_REPACKED = dict.fromkeys(("q4_0", "q4_1", "q5_0", "q5_1", "q6_K"), (1, 1)) | {"q4_K": (37, 36), "q5_K": (45, 44)}
_STRIP_ROWS = 8

_REUSED_BYTES = 12 << 20  # measured: what a buffer freed before the cache is allocated is good for

# Every how many layers one sees the whole context, where the file does not say (set_swa_pattern in src/models).
_SWA_PERIODS = {"gemma2": 2, "gemma3": 6, "gemma3n": 5, "gemma-embedding": 6, "cohere2": 4, "gpt-oss": 2, "exaone4": 4}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of guest memory that a loaded model with one context takes; ``total_bytes`` is right within 10 %."""

    weights_bytes: int
    """The tensors; where files are mapped, no memory of the process's own."""

    kv_bytes: int
    """KV cache, or the state of recurrent layers."""

    compute_bytes: int
    """Activations of the largest graph: decides with ``n_ubatch``, and with ``n_outputs_max`` times the vocabulary."""

    overhead_bytes: int
    """Vocabulary, graph scheduler, work buffers, output rows, and what the allocator cannot use again."""

    n_ctx: int
    """Tokens the cache holds, all sequences together."""

    repacked_bytes: int = 0
    """What repacked weights take, where there are any (``ModelParams.use_extra_bufts``); not part of the sum."""

    @property
    def total_bytes(self) -> int:
        """Return the sum of all parts."""
        return self.weights_bytes + self.kv_bytes + self.compute_bytes + self.overhead_bytes

    def fits(self, memory_limit_bytes: int | None = None) -> bool:
        """Return whether that is less than ``memory_limit_bytes``, by default the 4 GiB of a sandbox."""
        return self.total_bytes <= (_LIMIT_BYTES if memory_limit_bytes is None else memory_limit_bytes)


def estimate_memory(source: Source, params: ContextParams | None = None, **changes: Any) -> MemoryEstimate:
    """Estimate the guest memory of ``Model(source)`` with one ``model.context(params, **changes)``.

    ``changes`` are fields of ``ContextParams``, such as ``n_ctx=4096``. Only headers are read, of a split model those
    of all parts. The estimate follows llama.cpp's allocations for decoders with attention, dense or with experts, and
    is rougher for encoders and for architectures with recurrent layers.

    Raises what ``GGUFReader`` raises, ``ModelFormatError`` when a size is missing or absurd, and ``RequestError`` for
    parameters that do not fit.
    """
    try:
        params = replace(params or ContextParams(), **changes)
    except TypeError as error:
        raise RequestError("estimate memory", f"unknown parameter: {error}") from error
    model_source = ModelSource(source)
    try:
        return estimate_source(model_source, params)
    finally:
        model_source.close()


def estimate_source(source: ModelSource, params: ContextParams) -> MemoryEstimate:
    """Do as ``estimate_memory`` for a model that is about to be loaded."""
    header = source.header()
    tensors = [*header.tensors]
    for part in source.part_headers():
        tensors += part.tensors
    return _Estimator(header, tensors, params, f"estimate memory of {source.path.name}").estimate()


class _Estimator:
    """The arithmetic; sizes are bytes unless they count elements of one token (``n_…``)."""

    def __init__(self, header: GGUFReader, tensors: Sequence[GGUFTensor], params: ContextParams, operation: str):
        self.header, self.tensors, self.params, self.operation = header, tensors, params, operation
        self.n_layer = self._size("block_count", limit=_MAX_LAYERS)
        self.n_embd = self._size("embedding_length")
        self.n_vocab = self._vocabulary()
        self.heads = self._per_layer("attention.head_count", 0)
        self.heads_kv = self._per_layer("attention.head_count_kv", max(self.heads, default=0))
        self.n_ff = self._per_layer("feed_forward_length", 0)
        head = self.n_embd // max([1, *self.heads])
        self.n_embd_head_k = self._size("attention.key_length", head)
        self.n_embd_head_v = self._size("attention.value_length", head)
        self.n_swa = self._size("attention.sliding_window", 0)
        self._place_context()

    def estimate(self) -> MemoryEstimate:
        weights = sum(tensor.n_bytes for tensor in self.tensors)
        compute, unused = self._compute()
        overhead = unused + self._overhead()
        return MemoryEstimate(weights, self._cache(), compute, overhead, self.n_ctx, self._repacked())

    def _repacked(self) -> int:
        """Return the bytes of the matrices that are repacked; tied embeddings are, as the output's copy."""
        tied = {"token_embd.weight"} if all(tensor.name != "output.weight" for tensor in self.tensors) else set()
        embeddings = {tensor.name for tensor in self.tensors if "embd" in tensor.name} - tied
        total = 0
        for tensor in self.tensors:
            growth = _REPACKED.get(tensor.type_name)
            is_matrix = (
                len(tensor.shape) > 1 and tensor.shape[1] > 1 and tensor.n_elements == tensor.shape[0] * tensor.shape[1]
            )
            if growth and is_matrix and tensor.shape[1] % _STRIP_ROWS == 0 and tensor.name not in embeddings:
                total += tensor.n_bytes * growth[0] // growth[1]
        return total

    # -- sizes from the header ----------------------------------------------------------------------------------------

    def _value(self, key: str) -> Any:
        return self.header.metadata.get(f"{self.header.architecture}.{key}")

    def _size(self, key: str, default: int | None = None, limit: int = _MAX_SIZE) -> int:
        """Return one number; of an array the largest."""
        value = self._value(key)
        if value is None:
            if default is None:
                raise self._fail(key, "is missing")
            return default
        if isinstance(value, (list, GGUFArray)):
            return max(self._items(key, value))
        return self._number(key, value, limit)

    def _per_layer(self, key: str, default: int) -> list[int]:
        value = self._value(key)
        if isinstance(value, (list, GGUFArray)):
            return (self._items(key, value) + [0] * self.n_layer)[: self.n_layer]
        return [self._size(key, default)] * self.n_layer

    def _items(self, key: str, values: Sequence[Any]) -> list[int]:
        if not 0 < len(values) <= _MAX_LAYERS:
            raise self._fail(key, f"is an array of {len(values)}")
        return [self._number(key, value, _MAX_SIZE) for value in values]

    def _number(self, key: str, value: object, limit: int) -> int:
        if not isinstance(value, int) or not 0 <= value <= limit:
            raise self._fail(key, f"is {'text' if isinstance(value, str) else value} and not a size")
        return int(value)

    def _fail(self, key: str, what: str) -> ModelFormatError:
        return ModelFormatError(self.operation, f"{self.header.architecture or 'unknown'}.{key} {what}")

    def _vocabulary(self) -> int:
        tokens = self.header.metadata.get("tokenizer.ggml.tokens")
        if isinstance(tokens, (list, GGUFArray)):
            return len(tokens)
        return self._size("vocab_size", 0)

    def _place_context(self) -> None:
        """Set how many tokens the cache holds, and each stream of it: as ``llama_context`` rounds them."""
        params = self.params
        n_ctx = params.n_ctx or self._size("context_length")
        n_streams = 1 if params.kv_unified else params.n_seq_max
        self.n_ctx_stream = _pad(-(-_pad(n_ctx, _CACHE_PAD) // n_streams), _CACHE_PAD)
        self.n_ctx = self.n_ctx_stream * n_streams
        self.n_tokens = min(params.n_ubatch, params.n_batch, self.n_ctx)
        self.n_outputs = min(self.n_tokens, params.n_outputs_max or params.n_batch)

    # -- what is allocated --------------------------------------------------------------------------------------------

    def _cache(self) -> int:
        """Return the KV cache of the layers with attention, and the state of the others."""
        if not self._is_causal() or self.header.architecture in _NO_CACHE:
            return 0
        n_streams = self.n_ctx // self.n_ctx_stream
        total = self._index_keys() * self.n_ctx
        for layer in range(self.n_layer - self._shared_layers()):
            attends, recurs = self._kind(layer)
            if recurs:
                total += self._recurrent_state()
            if attends:
                is_short = not self.params.swa_full and self._is_swa(layer)
                total += self._row(layer) * (self._swa_cells() if is_short else self.n_ctx_stream) * n_streams
        return total

    def _swa_cells(self) -> int:
        return min(self.n_ctx_stream, _pad(self.n_swa + self.n_tokens, _CACHE_PAD))

    def _row(self, layer: int) -> int:
        """Return what one token takes in the cache of a layer."""
        row = _row_bytes(self.params.type_k, self.n_embd_head_k * self.heads_kv[layer])
        if self._value("attention.key_length_mla") is None:  # latent attention keeps no values
            row += _row_bytes(self.params.type_v, self.n_embd_head_v * self.heads_kv[layer])
        return row

    def _kind(self, layer: int) -> tuple[bool, bool]:
        """Return whether a layer has a KV cache, and whether it has a recurrent state."""
        architecture, n_head_kv = self.header.architecture, self.heads_kv[layer]
        if architecture in _RECURRENT:
            return False, True
        if architecture in _BOTH:
            return True, True
        if architecture in _LINEAR:
            interval = max(self._size("full_attention_interval", 4), 1)
            return (layer + 1) % interval == 0, (layer + 1) % interval != 0
        if architecture.startswith("nemotron_h") and self.n_ff[layer]:  # a layer is one of three things
            return False, False
        return n_head_kv > 0, n_head_kv == 0

    def _shared_layers(self) -> int:
        """Return how many of the last layers use the cache of another."""
        if self.header.architecture == "gemma3n":
            return max(self.n_layer - 20, 0)
        return min(self._size("attention.shared_kv_layers", 0), self.n_layer)

    def _index_keys(self) -> int:
        """Return what one token takes in the cache of a sparse attention's indexer, all layers together."""
        if self.header.architecture not in _INDEXED:
            return 0
        types = self._value("attention.indexer.types")
        n = sum(bool(item) for item in types) if isinstance(types, list) else self.n_layer
        return n * _row_bytes(self.params.type_k, self._size("attention.indexer.key_length", 0))

    def _is_causal(self) -> bool:
        causal = self._value("attention.causal")
        return self.params.attention_type != "non_causal" and (causal is None or bool(causal))

    def _is_swa(self, layer: int) -> bool:
        if not self.n_swa:
            return False
        pattern = self._value("attention.sliding_window_pattern")
        if isinstance(pattern, list):
            return layer < len(pattern) and bool(pattern[layer])
        period = abs(pattern) if isinstance(pattern, int) else _SWA_PERIODS.get(self.header.architecture, 0)
        return period == 0 or layer % period < period - 1

    def _recurrent_state(self) -> int:
        """Return the state of one recurrent layer: ``llama_hparams::n_embd_r`` and ``n_embd_s``, in f32."""
        architecture = self.header.architecture
        if "rwkv" in architecture:
            n_r = self._size("token_shift_count", 2) * self.n_embd
            n_s = self.n_embd * self._size("wkv.head_size", 0)
        elif architecture.startswith("lfm2"):
            n_r, n_s = self.n_embd * max(self._size("shortconv.l_cache", 1) - 1, 0), 0
        elif head := self._size("kda.head_dim", 0) if architecture in ("kimi-linear", "bailingmoe3", "kimi-k3") else 0:
            inner = head * max(self.heads, default=0)
            n_r, n_s = 3 * max(self._size("ssm.conv_kernel", 1) - 1, 0) * inner, head * inner
        else:
            inner, state = self._size("ssm.inner_size", 0), self._size("ssm.state_size", 0)
            n_conv = max(self._size("ssm.conv_kernel", 1) - 1, 0)
            n_groups = 0 if architecture == "mamba" else self._size("ssm.group_count", 0)
            n_r, n_s = n_conv * (inner + 2 * n_groups * state), state * inner
        return 4 * (n_r + n_s) * self.params.n_seq_max

    def _compute(self) -> tuple[int, int]:
        """Return the graph's buffer, and what of an earlier, smaller one stays unused; negative where it is used again.

        What is alive at once was measured with dense models, experts, sliding windows and all head layouts: five rows
        of the embedding's width, the attention mask, and either the three matrices of a feed-forward block, the
        logits, or, without flash attention, the scores of all heads.
        """
        n, uses_flash = self.n_tokens, self.params.flash_attn_type != "disabled"
        n_cells = self.n_ctx_stream
        if self.n_swa and self._is_causal():  # a mask of its own
            n_cells += self.n_ctx_stream if self.params.swa_full else self._swa_cells()
        mask = n * n_cells * (2 if uses_flash else 4)
        fixed = 5 * 4 * n * self.n_embd + mask
        ffn = 3 * 4 * n * self._feed_forward()
        logits = 4 * self.n_outputs * self.n_vocab
        if uses_flash:
            return fixed + max(ffn, logits), ffn if logits > ffn else 0
        widest = max(self.heads, default=0)
        qkv = widest * self.n_embd_head_k + max(self.heads_kv, default=0) * (self.n_embd_head_k + self.n_embd_head_v)
        scores = 4 * n * (self.n_ctx_stream * widest + qkv)
        # The buffer of the graph that asked for flash attention is freed; it serves what the base counts apart.
        return fixed + max(ffn, logits, scores), -min(fixed + ffn, _REUSED_BYTES)

    def _feed_forward(self) -> int:
        """Return how wide a feed-forward block is for one token: of experts all that are used."""
        dense = self._size("feed_forward_length", 0)
        used = self._size("expert_used_count", 0)
        if not used or not self._size("expert_count", 0):
            return dense
        return max(used * (self._size("expert_feed_forward_length", 0) or dense), dense)

    def _overhead(self) -> int:
        per_tensor = 32 if self.header.architecture in _MANY_NODES else 8
        n_nodes = max(1024, per_tensor * len(self.tensors))
        merges = self.header.metadata.get("tokenizer.ggml.merges")
        n_merges = len(merges) if isinstance(merges, (list, GGUFArray)) else 0
        vocabulary = self.n_vocab * _BYTES_PER_TOKEN + n_merges * _BYTES_PER_MERGE
        outputs = 4 * self.params.n_seq_max * self.n_vocab
        work = self.n_tokens * max(self._feed_forward(), self.n_embd) * 34 // 32
        return _BASE_BYTES + n_nodes * _BYTES_PER_NODE + vocabulary + outputs + work


def _pad(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _row_bytes(type_name: str, n: int) -> int:
    kind = _TYPES[type_name]
    return -(-n // kind.block_size) * kind.block_bytes
