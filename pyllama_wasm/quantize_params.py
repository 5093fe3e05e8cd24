"""The parameters of quantizing, with llama.cpp's defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .errors import RequestError
from .gguf import GGML_TYPES, TensorType

__all__ = ["NEED_IMATRIX", "QUANTIZE_TYPES", "TENSOR_TYPES", "QuantizeParams"]

Override = bool | int | float | str

QUANTIZE_TYPES: Mapping[str, str] = {
    **{name: f"MOSTLY_{name}" for name in (
        "Q1_0", "Q2_0", "Q4_0", "Q4_1", "MXFP4_MOE", "Q5_0", "Q5_1", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ1_S",
        "IQ1_M", "TQ1_0", "TQ2_0", "Q2_K", "Q2_K_S", "IQ3_XXS", "IQ3_S", "IQ3_M", "IQ3_XS", "Q3_K_S", "Q3_K_M",
        "Q3_K_L", "IQ4_NL", "IQ4_XS", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0", "F16", "BF16",
    )},
    "Q3_K": "MOSTLY_Q3_K_M",
    "Q4_K": "MOSTLY_Q4_K_M",
    "Q5_K": "MOSTLY_Q5_K_M",
    "F32": "ALL_F32",
    "COPY": "ALL_F32",
}  # fmt: skip
"""What ``quantize`` can make, by the names of ``llama-quantize``, with the ``llama_ftype`` each stands for. ``COPY``
changes no tensor (to join the parts of a split model, or to change metadata)."""

_NOT_FOR_FILES = ("q8_1", "q8_K", "i8", "i16", "i32", "i64", "f64")
TENSOR_TYPES: Mapping[str, TensorType] = {
    kind.name.lower(): kind for kind in GGML_TYPES.values() if kind.name not in _NOT_FOR_FILES
}
"""What a tensor can be quantized to, by its name in lower case."""

NEED_IMATRIX = frozenset({"iq2_xxs", "iq2_xs", "iq2_s", "iq1_s", "iq1_m"})
"""Types whose making asserts that there is an importance matrix."""

_MIB = 1 << 20
_KEY_BYTES = 127


@dataclass(frozen=True)
class QuantizeParams:
    """How to quantize: ``llama_model_quantize_params``."""

    allow_requantize: bool = False
    """Also take tensors that are quantized already, which loses quality twice."""

    quantize_output_tensor: bool = True
    """Quantize ``output.weight`` too."""

    pure: bool = False
    """One type for all tensors, instead of more bits for the sensitive ones."""

    keep_split: bool = False
    """Write as many files as the model comes in: ``name-00001-of-00003.gguf``."""

    dry_run: bool = False
    """Only find out types and sizes; nothing is written."""

    output_tensor_type: str | None = None
    """Type of ``output.weight``, such as ``q8_0``."""

    token_embedding_type: str | None = None
    """Type of the token embeddings."""

    tensor_types: Mapping[str, str] = field(default_factory=dict)
    """Regular expression (ECMAScript) to type; the first that is found in a tensor's name decides its type."""

    prune_layers: Sequence[int] = ()
    """Layers to leave out; the others are numbered anew."""

    kv_overrides: Mapping[str, Override] = field(default_factory=dict)
    """Metadata to set; text of at most 127 bytes, integers of 32 bits without sign."""

    max_buf_size: int = 256 * _MIB
    """Bytes of one tensor's rows kept in the sandbox's memory at once."""

    def __post_init__(self) -> None:
        """Check every field; raise ``RequestError`` naming the first bad one."""
        for name in ("allow_requantize", "quantize_output_tensor", "pure", "keep_split", "dry_run"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"set {name}", f"{getattr(self, name)!r} is neither True nor False")
        for name in ("output_tensor_type", "token_embedding_type"):
            if getattr(self, name) is not None:
                _check_type(name, getattr(self, name))
        for pattern, kind in self.tensor_types.items():
            if not isinstance(pattern, str) or not pattern or "\0" in pattern:
                raise RequestError("set tensor_types", f"{pattern!r} is not a regular expression")
            _check_type("tensor_types", kind)
        layers = tuple(self.prune_layers)
        for layer in layers:
            if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
                raise RequestError("set prune_layers", f"{layer!r} is not the number of a layer")
        object.__setattr__(self, "prune_layers", tuple(sorted(set(layers))))
        for key, value in self.kv_overrides.items():
            _check_override(key, value)
        if isinstance(self.max_buf_size, bool) or not isinstance(self.max_buf_size, int):
            raise RequestError("set max_buf_size", f"{self.max_buf_size!r} is not an integer")
        if not _MIB <= self.max_buf_size <= 2048 * _MIB:
            raise RequestError("set max_buf_size", f"{self.max_buf_size} is outside {_MIB} to {2048 * _MIB}")


def _check_type(name: str, kind: object) -> None:
    if not isinstance(kind, str) or kind.lower() not in TENSOR_TYPES:
        raise RequestError(f"set {name}", f"{kind!r} is not one of {', '.join(TENSOR_TYPES)}")


def _check_override(key: object, value: object) -> None:
    operation = "set kv_overrides"
    if not isinstance(key, str) or not key or "\0" in key or len(key.encode()) > _KEY_BYTES:
        raise RequestError(operation, f"{key!r} is not a key of 1 to {_KEY_BYTES} bytes")
    if key == "general.alignment" or key.startswith("split."):
        raise RequestError(operation, f"{key} describes the file and cannot be set")
    if isinstance(value, str):
        if "\0" in value or len(value.encode()) > _KEY_BYTES:
            raise RequestError(operation, f"the text of {key} is longer than {_KEY_BYTES} bytes, or has a zero in it")
    elif isinstance(value, bool) or (isinstance(value, int) and 0 <= value < 1 << 32):
        return
    elif not isinstance(value, float) or isinstance(value, int):
        raise RequestError(operation, f"{value!r} for {key} is not text, a number of 32 bits, a float or a bool")
