"""The classifier of a model that ranks: whether its file has one, and how many numbers it gives.

A model says by its metadata that it ranks. llama.cpp believes it: without the tensors it would take the beginning of an
embedding for the scores, and with a head of another width those of another text, or assert.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .errors import UnsupportedModelError
from .text import parse_count

if TYPE_CHECKING:
    from .loaded_model import LoadedModel

__all__ = ["check_pooling", "check_rank_head"]

_RANK = 4  # LLAMA_POOLING_TYPE_RANK
_N_POOLINGS = 5
_UNSPECIFIED = 0xFFFFFFFF  # LLAMA_POOLING_TYPE_UNSPECIFIED as llama.cpp's own saver writes it


def check_pooling(model: LoadedModel, asked: str, computes: bool, operation: str) -> None:
    """Raise ``UnsupportedModelError`` for a way of pooling that the model cannot; on the engine thread.

    ``asked`` is a pooling type of ``ContextParams``, ``computes`` whether embeddings are wanted.
    """
    kind = model._meta(f"{model._meta('general.architecture')}.pooling_type")
    number = parse_count(kind)
    if asked == "unspecified" and number is not None and _N_POOLINGS <= number < _UNSPECIFIED:
        raise UnsupportedModelError(operation, f"its pooling type {kind} is unknown", "name a pooling_type")
    if computes and (asked == "rank" or (asked == "unspecified" and kind == str(_RANK))):
        check_rank_head(model, operation)


def check_rank_head(model: LoadedModel, operation: str) -> None:
    """Raise ``UnsupportedModelError`` unless the model gives as many scores as it says; on the engine thread."""
    expected = int(model.native.llama_model_n_cls_out(model._ptr))
    found = _head_width(model)
    if found is None:
        reason = "the model has no classifier (neither cls nor cls.output)"
        raise UnsupportedModelError(operation, reason, "use one that was converted as a reranker")
    if found != expected:
        reason = f"the model's classifier gives {found} numbers, and its metadata speaks of {expected}"
        raise UnsupportedModelError(operation, reason, "use one that was converted as a reranker")


def _head_width(model: LoadedModel) -> int | None:
    """Return the rows of the last matrix of the head, ``None`` without one; reads the files' headers in the guest."""
    native = model.native
    widths: dict[str, int] = {}
    for path in model._guest_paths:
        metadata = int(native.gguf_init_from_file(path, native.struct("gguf_init_params", no_alloc=True)))
        if not metadata:
            continue
        try:
            for name in ("cls.weight", "cls.output.weight"):
                index = int(native.gguf_find_tensor(metadata, name))
                if index >= 0:
                    shape = native.engine.memory.read(int(native.gguf_get_tensor_ne(metadata, index)), 32)
                    widths[name] = int(np.frombuffer(shape, "<i8")[1])
        finally:
            native.gguf_free(metadata)
    return widths.get("cls.output.weight", widths.get("cls.weight"))
