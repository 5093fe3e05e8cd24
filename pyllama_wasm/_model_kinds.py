"""Which kinds of model llama.cpp does not tell apart, and its names for kinds of RoPE."""

from __future__ import annotations

from . import _abi

__all__ = ["NO_LOGITS", "ROPE_TYPES"]

ROPE_TYPES = {
    _abi.LLAMA_ROPE_TYPE_NONE: "none",
    _abi.LLAMA_ROPE_TYPE_NORM: "norm",
    _abi.LLAMA_ROPE_TYPE_NEOX: "neox",
    _abi.LLAMA_ROPE_TYPE_MROPE: "mrope",
    _abi.LLAMA_ROPE_TYPE_IMROPE: "imrope",
    _abi.LLAMA_ROPE_TYPE_VISION: "vision",
}

NO_LOGITS = frozenset({
    "bert", "jina-bert-v2", "jina-bert-v3", "nomic-bert", "nomic-bert-moe", "neo-bert", "eurobert", "modern-bert",
    "gemma-embedding", "gemma-embedding2", "t5encoder", "clef", "wavtokenizer-dec",
})  # fmt: skip
"""Architectures that compute embeddings only. llama.cpp counts most of them as decoders."""
