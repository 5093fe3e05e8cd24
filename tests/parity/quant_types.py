"""A tiny model in every tensor type of the build, from bytes that are the same everywhere, and native's logits.

The blocks are a hash, but for their scales, which are kept small and finite. Recorded by ``make_quant_types.py``.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pyllama_wasm.ggml_types import GGML_TYPES

from .architectures import hash_name, mix, weights
from .shapes import Value, pair, string

GOLDEN = Path(__file__).resolve().parent / "quant_types.npz"
TOKENS = tuple(5 + 7 * i for i in range(8))
"""The tokens that are decoded: those of ``native/dump_file_logits.cpp``."""

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

N_VOCAB, N_EMBD, N_FF, N_HEAD = 64, 256, 256, 2

# Where the f16 scales of a block lie, and about how large a scale makes weights of some 0.05.
_HALF_SCALES: dict[str, tuple[tuple[int, ...], float]] = {
    "q4_0": ((0,), 0.01),
    "q4_1": ((0, 2), 0.005),
    "q5_0": ((0,), 0.005),
    "q5_1": ((0, 2), 0.003),
    "q8_0": ((0,), 0.0006),
    "q2_K": ((80, 82), 0.003),
    "q3_K": ((108,), 0.001),
    "q4_K": ((0, 2), 0.0003),
    "q5_K": ((0, 2), 0.0002),
    "q6_K": ((208,), 0.00003),
    "iq2_xxs": ((0,), 0.0006),
    "iq2_xs": ((0,), 0.0006),
    "iq2_s": ((0,), 0.0006),
    "iq3_xxs": ((0,), 0.0003),
    "iq3_s": ((0,), 0.0003),
    "iq1_s": ((0,), 0.006),
    "iq4_nl": ((0,), 0.0006),
    "iq4_xs": ((0,), 0.00005),
    "tq1_0": ((52,), 0.05),
    "tq2_0": ((64,), 0.05),
    "q1_0": ((0,), 0.05),
    "q2_0": ((0,), 0.03),
}
_PLAIN: dict[str, np.dtype[Any]] = {"f32": np.dtype("<f4"), "f16": np.dtype("<f2")}
TYPES = (*_PLAIN, "bf16", *_HALF_SCALES, "iq1_m", "mxfp4", "nvfp4")
"""Every type of the build that weights can have."""

_NUMBERS = {kind.name: number for number, kind in GGML_TYPES.items()}


def _noise(name: str, n: int) -> Bytes:
    index = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    noise: Bytes = (mix(index + np.uint64(hash_name(name))) >> np.uint64(56)).astype(np.uint8)
    return noise


def tensor_bytes(name: str, kind: str, n: int) -> bytes:
    """Return ``n`` weights of type ``kind`` as they lie in a file."""
    if kind in _PLAIN:
        return bytes(weights(name, n).astype(_PLAIN[kind]).data)
    if kind == "bf16":
        return bytes((weights(name, n).view(np.uint32) >> np.uint32(16)).astype("<u2").data)
    layout = GGML_TYPES[_NUMBERS[kind]]
    n_blocks = n // layout.block_size
    blocks = _noise(name, n_blocks * layout.block_bytes).reshape(n_blocks, layout.block_bytes)
    size = 0.5 + 0.5 * np.abs(weights(f"{name}.scale", n_blocks)) / 0.1732
    if kind == "mxfp4":  # a power of two
        blocks[:, 0] = 119 + blocks[:, 0] % 4
    elif kind == "nvfp4":  # unsigned e4m3
        blocks[:, :4] = 8 + blocks[:, :4] % 16
    elif kind == "iq1_m":  # the half lies in the upper four bits of four words
        halves = (size * 0.006).astype("<f2").view("<u2")
        words = blocks[:, 48:56].copy().view("<u2")
        for i in range(4):
            words[:, i] = (words[:, i] & 0x0FFF) | ((halves >> (4 * i) & 0xF) << 12)
        blocks[:, 48:56] = words.view(np.uint8)
    else:
        places, scale = _HALF_SCALES[kind]
        for place in places:
            blocks[:, place : place + 2] = (size * scale).astype("<f2").view(np.uint8).reshape(-1, 2)
    return blocks.tobytes()


def write_model(path: Path, kind: str) -> Path:
    """Write a model of llama's architecture whose matrices are all of type ``kind``."""
    pairs: dict[str, Value] = {
        "general.architecture": "llama",
        "llama.vocab_size": N_VOCAB,
        "llama.context_length": 128,
        "llama.embedding_length": N_EMBD,
        "llama.block_count": 1,
        "llama.feed_forward_length": N_FF,
        "llama.attention.head_count": N_HEAD,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "test",
        "tokenizer.ggml.tokens": [f"tok_{i}" for i in range(N_VOCAB)],
        "tokenizer.ggml.scores": [0.0] * N_VOCAB,
    }
    shapes = {
        "token_embd.weight": (N_EMBD, N_VOCAB),
        "blk.0.attn_norm.weight": (N_EMBD,),
        **{f"blk.0.attn_{x}.weight": (N_EMBD, N_EMBD) for x in ("q", "k", "v", "output")},
        "blk.0.ffn_norm.weight": (N_EMBD,),
        **{f"blk.0.ffn_{x}.weight": (N_EMBD, N_FF) for x in ("gate", "up", "down")},
        "output_norm.weight": (N_EMBD,),
        "output.weight": (N_EMBD, N_VOCAB),
    }
    head = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(pairs))
    head += b"".join(pair(key, value) for key, value in pairs.items())
    data = b""
    for name, shape in shapes.items():
        type_name = kind if len(shape) == 2 else "f32"
        head += string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, _NUMBERS[type_name], len(data))
        data += tensor_bytes(name, type_name, int(np.prod(shape)))
        data += bytes(-len(data) % 32)
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path


def load() -> dict[str, Floats]:
    """Return native's logits by type: (len(TOKENS), N_VOCAB) each."""
    with np.load(GOLDEN) as arrays:
        names: list[str] = json.loads(bytes(arrays["names"]).decode())
        return dict(zip(names, arrays["logits"], strict=True))


def saved_hashes() -> dict[str, str]:
    """Return the sha256 of each model as native saves it, by type."""
    with np.load(GOLDEN) as arrays:
        hashes: dict[str, str] = json.loads(bytes(arrays["header"]).decode())["saved"]
    return hashes


def save(logits: dict[str, Floats], header: dict[str, Any]) -> None:
    """Write the record."""
    np.savez_compressed(
        GOLDEN,
        header=np.frombuffer(json.dumps(header, indent=1).encode(), np.uint8),
        names=np.frombuffer(json.dumps(list(logits)).encode(), np.uint8),
        logits=np.stack(list(logits.values())).astype(np.float32),
    )
