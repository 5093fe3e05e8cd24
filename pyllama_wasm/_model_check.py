"""What a model file says that llama.cpp answers with an assertion or a single word, or counts wrongly in 32 bits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from .errors import ModelError, ModelFormatError, UnsupportedModelError
from .gguf import GGUFArray, GGUFReader, GGUFTensor

if TYPE_CHECKING:
    from .loaded_model import LoadedModel
    from .source import ModelSource

__all__ = ["check_charsmap", "check_loaded", "find_fault"]

_MAX_LAYERS, _MAX_EXPERTS = 512, 1024  # LLAMA_MAX_LAYERS, LLAMA_MAX_EXPERTS
_MAX_TOKENS, _MAX_HEADER_BYTES = 1 << 20, 64 << 20  # of a larger vocabulary no faults are looked for
_ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")
_ACTIVATIONS = ("gelu", "silu", "tanh")
_BYTE = 6  # LLAMA_TOKEN_TYPE_BYTE
_TABLES_OF_NUMBERS = re.compile(r"(^d2t|\.ffn_gate_tid2eid)(\.weight)?$")  # of tokens and of experts
_MATRICES = re.compile(r"^(cls(\.output)?|decision\.scorer_out|conf_proj)\.weight$")  # of one output, maybe
_NORM_OR_BIAS = re.compile(r"norm(\d|_\w+)?(\.weight)?$|\.bias$")
_FLOATS, _INTEGERS = ("f32", "f16", "bf16"), ("i8", "i16", "i32", "i64")
_NOT_MULTIPLIED = frozenset({"f64", "q8_1", "q8_k"})  # the last two are what ggml makes of the other factor
_OWN_WIDTHS = {
    "lfm2": "dense_2.weight",
    "lfm2moe": "dense_2.weight",
    "qwen35": "cls.output.weight",
    "gemma-embedding2": "output.weight",
    "wavtokenizer-dec": "output.weight",
    "gemma4-assistant": "",
    "deepseek4": "",
    "qwen4exp": "",
    "clef": "",
    "modern-bert": "",
}
"""Architectures whose outputs may have another width than their layers, by the matrix that gives it (its shape is
checked by the load) or, where that is empty, by their own code."""

_TOKENS, _CHARSMAP = "tokenizer.ggml.tokens", "tokenizer.ggml.precompiled_charsmap"

Faults = Iterator[tuple[str, type[ModelError]]]


def find_fault(header: GGUFReader) -> tuple[str, type[ModelError]] | None:
    """Return what is wrong with the metadata and the class of error for it, ``None`` if that is not to be seen.

    For after a failed load: it reads the whole vocabulary. Checked is what ``llama_model_base::load_hparams`` and
    ``llama_vocab::impl::load`` assert.
    """
    for check in _CHECKS:
        for fault in check(header):
            return fault
    return None


def check_loaded(model: LoadedModel, source: ModelSource) -> None:
    """Raise ``ModelFormatError`` for what a load let pass and ggml asserts later."""
    operation, trained = source.operation, model.n_ctx_train
    if trained < 0:
        raise ModelFormatError(operation, f"it was trained for {trained % 2**32} tokens, more than can be counted")
    for key, value in model._run(lambda: _epsilons(model), operation).items():
        if value.startswith("-") or "nan" in value:  # ggml asserts, at the first token
            raise ModelFormatError(operation, f"{key} is {value}")
    try:
        header = source.header()
    except ModelError:  # it is stricter than llama.cpp, which has taken the file
        return
    if model.vocab.type == "ugm":
        check_charsmap(header, operation)
    if not model.params.vocab_only:
        check_widths(header, model.n_embd, model.n_embd_out, operation)
        for part in (header, *_readable(source.part_headers())):
            check_types(part.tensors, operation)


def _readable(headers: Iterator[GGUFReader]) -> Iterator[GGUFReader]:
    with suppress(ModelError):
        yield from headers


def check_types(tensors: Iterable[GGUFTensor], operation: str) -> None:
    """Raise ``ModelFormatError`` for a tensor of a type that ggml's operations on it do not take.

    Whole numbers are no weights, and some types cannot be multiplied with. Norms and biases are multiplied with and
    added to what is computed in f32, and must be f32 themselves. A row has no blocks to quantize by: llama.cpp keeps
    everything of one dimension in a type of floats.
    """
    for tensor in tensors:
        if tensor.type_name == "f32" or _TABLES_OF_NUMBERS.search(tensor.name):
            continue
        if tensor.type_name in _INTEGERS:
            raise ModelFormatError(
                operation, f"tensor {tensor.name!r} has whole numbers ({tensor.type_name}), and weights have not"
            )
        if tensor.type_name.lower() in _NOT_MULTIPLIED:
            reason = f"tensor {tensor.name!r} has the type {tensor.type_name}, which nothing is multiplied with"
            raise ModelFormatError(operation, reason)
        if _NORM_OR_BIAS.search(tensor.name):
            reason = f"tensor {tensor.name!r} has the type {tensor.type_name}, and norms and biases have f32"
            raise ModelFormatError(operation, reason)
        if (
            tensor.type_name not in _FLOATS
            and tensor.n_elements == tensor.shape[0]
            and not _MATRICES.search(tensor.name)
        ):
            raise ModelFormatError(operation, f"tensor {tensor.name!r} is a single row and quantized")


def check_widths(header: GGUFReader, n_embd: int, n_embd_out: int, operation: str) -> None:
    """Raise ``ModelFormatError`` for outputs of a width that nothing in the model computes."""
    if n_embd_out == n_embd:
        return
    matrix = _OWN_WIDTHS.get(header.architecture)
    if matrix is None or (matrix and all(tensor.name != matrix for tensor in header.tensors)):
        reason = f"it has outputs of {n_embd_out} values, and computes {n_embd}"
        raise ModelFormatError(operation, reason)


def _epsilons(model: LoadedModel) -> dict[str, str]:
    """Return what is added to a norm, as text; on the engine thread."""
    architecture = model._meta("general.architecture")
    keys = [f"{architecture}.attention.{norm}_epsilon" for norm in ("layer_norm", "layer_norm_rms", "group_norm")]
    return {key: model._meta(key) for key in keys}


def check_charsmap(header: GGUFReader, operation: str) -> None:
    """Raise ``ModelFormatError`` for a table of characters that ends beyond itself."""
    charsmap = header.metadata.get(_CHARSMAP)
    if isinstance(charsmap, (list, GGUFArray)):
        # llama.cpp adds 4 to the size of the table before it compares: in 32 bits that may be 0 again.
        head = charsmap.head(4) if isinstance(charsmap, GGUFArray) else charsmap[:4]
        n_bytes = sum((byte & 0xFF) << 8 * i for i, byte in enumerate(head) if isinstance(byte, int))
        if n_bytes + 4 >= len(charsmap):
            raise ModelFormatError(operation, f"{_CHARSMAP} holds {len(charsmap)} bytes and claims {n_bytes}")


def _number(header: GGUFReader, key: str, default: int = 0) -> int:
    """Return a value of the architecture; of a list with one for each layer the largest."""
    value = header.metadata.get(f"{header.architecture}.{key}", default)
    if isinstance(value, (list, GGUFArray)):
        items = value.head(_MAX_LAYERS) if isinstance(value, GGUFArray) else value
        value = max((item for item in items if isinstance(item, int)), default=default)
    return value if isinstance(value, int) else default


def _layers(header: GGUFReader) -> Faults:
    n = _number(header, "block_count", 1)
    if not 1 <= n <= _MAX_LAYERS:
        yield f"it has {n} layers and not 1 to {_MAX_LAYERS}", ModelFormatError
    predicted = _number(header, "nextn_predict_layers")
    if predicted > n:
        yield f"{predicted} of its {n} layers predict further tokens", ModelFormatError


def _experts(header: GGUFReader) -> Faults:
    n, used = _number(header, "expert_count"), _number(header, "expert_used_count")
    groups, groups_used = _number(header, "expert_group_count"), _number(header, "expert_group_used_count")
    if n > _MAX_EXPERTS:
        yield f"it has {n} experts and not at most {_MAX_EXPERTS}", UnsupportedModelError
    if used > n or (n > 0 and used == 0):
        yield f"it uses {used} of its {n} experts", ModelFormatError
    if groups >= max(n, 1) or (groups > 1 and (n % groups or not 0 < groups_used < groups)):
        yield f"its {n} experts are in {groups} groups of which it uses {groups_used}", ModelFormatError


def _names(header: GGUFReader) -> Faults:
    for key, known in (("rope.scaling.type", _ROPE_SCALINGS), ("classifier.activation", _ACTIVATIONS)):
        value = header.metadata.get(f"{header.architecture}.{key}", known[0])
        if isinstance(value, str) and value not in known:
            yield f"{header.architecture}.{key} is {value!r}", UnsupportedModelError


def _vocabulary(header: GGUFReader) -> Faults:
    size = _number(header, "vocab_size")
    if header.metadata.get("tokenizer.ggml.model") in ("no_vocab", "none") and size >= 2**31:
        yield f"it has no vocabulary and claims {size} tokens", ModelFormatError
    tokens, kinds = header.metadata.get(_TOKENS, []), header.metadata.get("tokenizer.ggml.token_type", [])
    if not isinstance(tokens, (list, GGUFArray)) or not isinstance(kinds, (list, GGUFArray)):
        return
    if max(len(tokens), len(kinds)) > _MAX_TOKENS or header.data_offset > _MAX_HEADER_BYTES:
        return
    seen: dict[object, int] = {}
    for i, token in enumerate(tokens):
        text = token or f"[EMPTY_{i}]"
        if text in seen:
            yield f"the tokens {seen[text]} and {i} are both {text!r}", ModelFormatError
        seen[text] = i
    for i, (token, kind) in enumerate(zip(tokens, kinds, strict=False)):
        if kind == _BYTE and not _is_byte(token):
            yield f"token {i} is a byte and its text {token!r}", ModelFormatError


def _is_byte(token: object) -> bool:
    digits = token[3:5] if isinstance(token, str) and token[:3] == "<0x" and token[5:] == ">" else ""
    return len(digits) == 2 and all(digit in "0123456789abcdefABCDEF" for digit in digits)


_CHECKS: tuple[Callable[[GGUFReader], Faults], ...] = (_layers, _experts, _names, _vocabulary)
