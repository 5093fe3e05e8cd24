"""``llama_model_quantize_params`` with everything it points to, in guest memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from . import _abi
from ._model_struct import override_table
from .native import Native, Struct

if TYPE_CHECKING:
    from .imatrix import Imatrix
    from .quantize_params import QuantizeParams

__all__ = ["write_params"]

_TEXT_BYTES = 127


def write_params(native: Native, params: QuantizeParams, imatrix: Imatrix | None) -> Struct:
    """Return the struct; what it points to stays allocated until the engine is closed. On the engine thread."""
    struct: Struct = native.llama_model_quantize_default_params()
    for name in ("allow_requantize", "quantize_output_tensor", "pure", "keep_split", "dry_run", "max_buf_size"):
        struct[name] = getattr(params, name)
    for name in ("output_tensor_type", "token_embedding_type"):
        if (kind := getattr(params, name)) is not None:
            struct[name] = ggml_type(kind)
    overrides = dict(params.kv_overrides)
    if imatrix is not None:
        items = [
            native.struct("llama_model_imatrix_data", name=_text(native, name), data=_put(native, values.tobytes()),
                          size=values.size)
            for name, values in imatrix.entries.items()
        ]  # fmt: skip
        struct["imatrix"] = _table(native, items, native.struct("llama_model_imatrix_data"))
        overrides |= _imatrix_notes(imatrix)
    if overrides:
        struct["kv_overrides"] = _put(native, override_table(overrides))
    if params.tensor_types:
        patterns = [
            native.struct("llama_model_tensor_override", pattern=_text(native, pattern), type=ggml_type(kind))
            for pattern, kind in params.tensor_types.items()
        ]
        struct["tt_overrides"] = _table(native, patterns, native.struct("llama_model_tensor_override"))
    if params.prune_layers:
        struct["prune_layers"] = _put(native, np.array([*params.prune_layers, -1], "<i4").tobytes())
    return struct


def ggml_type(name: str) -> int:
    """Return the number of a tensor type by its lower-case name."""
    return int(getattr(_abi, f"GGML_TYPE_{name.upper()}"))


def _imatrix_notes(imatrix: Imatrix) -> dict[str, str | int]:
    """Return the metadata that ``llama-quantize`` adds about an importance matrix."""
    notes: dict[str, str | int] = {}
    if imatrix.source:
        notes["quantize.imatrix.file"] = _cut(imatrix.source)
    if imatrix.datasets:
        notes["quantize.imatrix.dataset"] = _cut(imatrix.datasets[0])
    notes["quantize.imatrix.entries_count"] = len(imatrix.entries)
    if imatrix.n_chunks > 0:
        notes["quantize.imatrix.chunks_count"] = imatrix.n_chunks
    return notes


def _cut(text: str) -> str:
    # As strncpy does, but never in the middle of a character.
    return text.encode()[:_TEXT_BYTES].decode(errors="ignore")


def _table(native: Native, items: list[Struct], end: Struct) -> int:
    """Write an array of structs and the one that ends it."""
    return _put(native, b"".join(bytes(item) for item in (*items, end)))


def _text(native: Native, text: str) -> int:
    return _put(native, text.encode() + b"\0")


def _put(native: Native, data: bytes) -> int:
    ptr = native.alloc(len(data))
    native.engine.memory.write(ptr, data)
    return ptr
