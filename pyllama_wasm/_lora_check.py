"""Whether a LoRA file suits a model: what the guest would assert on, when it loads the adapter or when it uses it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .errors import ModelFormatError, PyllamaError, UnsupportedModelError
from .gguf import GGUFReader
from .source import split_parts

if TYPE_CHECKING:
    from .host.files import GrantedFile
    from .loaded_model import LoadedModel

__all__ = ["check_lora"]

Shape = tuple[int, ...]

_A, _B = ".lora_a", ".lora_b"
_EMBEDDINGS = "token_embd.weight"
_ANOTHER_MODEL = "made for another model?"

_TYPES = {"general.type": "string", "general.architecture": "string", "adapter.type": "string"}
_OPTIONAL_TYPES = {"adapter.lora.alpha": "float32", "adapter.alora.invocation_tokens": "array"}

_MAX_INVOCATION_TOKENS = 1 << 16

# Types that ggml multiplies with; the integers, f64 and the types of intermediate results it asserts on.
_NO_WEIGHTS = frozenset({"i8", "i16", "i32", "i64", "f64", "q8_1", "q8_k"})


def check_lora(reader: GGUFReader, model: LoadedModel, operation: str) -> None:
    """Raise ``ModelFormatError`` if it is no LoRA adapter, ``UnsupportedModelError`` if it does not suit ``model``."""
    _check_metadata(reader, model, operation)
    base = _base_tensors(model)
    for name, (a, b) in _pairs(reader, operation).items():
        shape = None if base is None else base.get(name)
        if base is not None and shape is None:
            raise UnsupportedModelError(operation, f"the model has no tensor {name}", _ANOTHER_MODEL)
        if name == _EMBEDDINGS:
            _check_embeddings(a, b, shape, base, operation)
        else:
            _check_pair(name, (a, b), shape, operation)


def _check_metadata(reader: GGUFReader, model: LoadedModel, operation: str) -> None:
    for key, kind in _TYPES.items():
        if reader.types.get(key) != kind:
            raise ModelFormatError(operation, f"{key} is missing or no {kind}", "not a LoRA adapter?")
    for key, kind in _OPTIONAL_TYPES.items():
        if reader.types.get(key, kind) != kind:
            raise ModelFormatError(operation, f"{key} is no {kind}")
    for key, wanted in (("general.type", "adapter"), ("adapter.type", "lora")):
        if reader.metadata[key] != wanted:
            raise ModelFormatError(operation, f"{key} is {reader.metadata[key]!r} and not {wanted!r}")
    alpha = reader.metadata.get("adapter.lora.alpha", 0.0)
    if isinstance(alpha, float) and not math.isfinite(alpha):
        raise ModelFormatError(operation, f"adapter.lora.alpha is {alpha}")
    architecture = model.metadata.get("general.architecture")
    if reader.architecture != architecture:
        reason = f"it is for architecture {reader.architecture!r} and the model is {architecture!r}"
        raise UnsupportedModelError(operation, reason, _ANOTHER_MODEL)
    tokens = reader.metadata.get("adapter.alora.invocation_tokens", ())
    if not isinstance(tokens, (str, int, float)) and len(tokens) > _MAX_INVOCATION_TOKENS:
        raise ModelFormatError(operation, f"it has {len(tokens)} invocation tokens")
    for token in tokens if not isinstance(tokens, (str, int, float)) else ():
        if not isinstance(token, int) or not 0 <= token < model.vocab.n_tokens:
            raise UnsupportedModelError(operation, f"invocation token {token!r} is not in the vocabulary")


def _pairs(reader: GGUFReader, operation: str) -> dict[str, tuple[Shape, Shape]]:
    """Return the shapes of A and B by the name of the tensor they change, innermost dimension first."""
    halves: dict[str, dict[str, Shape]] = {}
    for tensor in reader.tensors:
        name = tensor.name
        if name.endswith((_A, _B)):
            if tensor.type_name.lower() in _NO_WEIGHTS:
                raise UnsupportedModelError(operation, f"tensor {name} has type {tensor.type_name}")
            halves.setdefault(name[: -len(_A)], {})[name[-len(_A) :]] = tensor.shape
        elif not name.endswith("_norm.weight"):
            raise ModelFormatError(operation, f"tensor {name} is of no LoRA adapter")
    if not halves:
        raise ModelFormatError(operation, "it holds no LoRA tensors")
    for name, half in halves.items():
        if len(half) < 2:
            raise ModelFormatError(operation, f"{name} has only one of {_A} and {_B}")
        if 0 in (*half[_A], *half[_B]):
            raise ModelFormatError(operation, f"{name} has an empty tensor")
    return {name: (half[_A], half[_B]) for name, half in halves.items()}


def _padded(shape: Shape) -> Shape:
    return shape + (1,) * (4 - len(shape))


def _check_pair(name: str, pair: tuple[Shape, Shape], shape: Shape | None, operation: str) -> None:
    a, b = (_padded(half) for half in pair)
    if a[1] != b[0] or a[2:] != b[2:]:
        raise ModelFormatError(operation, f"{name} has an A of {pair[0]} and a B of {pair[1]}")
    if shape is None:
        if a[2:] != (1, 1):
            reason = f"{name} changes several matrices, and the model's own cannot be looked at"
            raise UnsupportedModelError(operation, reason, "load the model from a path")
    elif (a[0], b[1], *a[2:]) != _padded(shape):
        raise UnsupportedModelError(
            operation, f"{name} makes {(a[0], b[1], *a[2:])} and the model has {_padded(shape)}", _ANOTHER_MODEL
        )


def _check_embeddings(a: Shape, b: Shape, shape: Shape | None, base: dict[str, Shape] | None, operation: str) -> None:
    """Check the pair of the token embeddings, where A has a row per token."""
    if base is None or shape is None or "output.weight" not in base:
        # The guest would multiply the flipped pair with the hidden states, and assert.
        reason = "it changes token embeddings that are the output weights as well"
        raise UnsupportedModelError(operation, reason, "llama.cpp cannot apply that")
    if len(a) != 2 or len(b) != 2 or a[0] != b[0] or (b[1], a[1]) != shape:
        raise UnsupportedModelError(operation, f"{_EMBEDDINGS} has an A of {a} and a B of {b}", _ANOTHER_MODEL)


def _base_tensors(model: LoadedModel) -> dict[str, Shape] | None:
    """Return the shapes of the model's tensors; ``None`` when not all of its parts can be found.

    Read is what the sandbox was granted, and not the path: what lies there may be another file by now, and a file
    object has just a name. The parts of a list with names of their own are not found.
    """
    names = split_parts(model.path.name) or [model.path.name]
    find = model.engine.files.find
    # A model's files are what its engine is granted first: the parts beside each other, those of a list one by one.
    files = [find(f"/model/0/{name}") or find(f"/model/{i}/{name}") for i, name in enumerate(names)]
    readers = [_header(file) for file in files if file is not None]
    parts = [reader for reader in readers if reader is not None]
    if len(parts) != len(names) or parts[0].metadata.get("split.count", 1) not in (0, len(parts)):
        return None
    return {tensor.name: tensor.shape for part in parts for tensor in part.tensors} or None


def _header(file: GrantedFile) -> GGUFReader | None:
    try:
        fd = file.acquire()
    except OSError:
        return None
    try:
        return GGUFReader(fd)
    except PyllamaError:
        return None
    finally:
        file.release()
