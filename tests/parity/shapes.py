"""Model files of real shapes that take no disk: the header is whole, the weights are a hole of zeros."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

from pyllama_wasm.ggml_types import GGML_TYPES

Value = str | int | float | list[str] | list[float]
_NUMBERS = {kind.name: number for number, kind in GGML_TYPES.items()}


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder with attention."""

    architecture: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    n_ff: int
    n_vocab: int
    kind: str = "q4_0"
    """Type of the matrices."""
    head_dim: int = 0
    n_expert: int = 0
    is_tied: bool = False
    """Whether the output matrix is that of the embeddings."""
    bias: bool = False
    qk_norm: bool = False
    post_norm: bool = False
    metadata: dict[str, Value] = field(default_factory=dict)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor, fastest-varying dimension first."""
        head = self.head_dim or self.n_embd // self.n_head
        n, q, kv = self.n_embd, head * self.n_head, head * self.n_head_kv
        found: dict[str, tuple[int, ...]] = {"token_embd.weight": (n, self.n_vocab), "output_norm.weight": (n,)}
        if not self.is_tied:
            found["output.weight"] = (n, self.n_vocab)
        layer: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (n,),
            "attn_q.weight": (n, q),
            "attn_k.weight": (n, kv),
            "attn_v.weight": (n, kv),
            "attn_output.weight": (q, n),
            "ffn_norm.weight": (n,),
        }
        if self.bias:
            layer |= {"attn_q.bias": (q,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
        if self.qk_norm:
            layer |= {"attn_q_norm.weight": (head,), "attn_k_norm.weight": (head,)}
        if self.post_norm:
            layer |= {"post_attention_norm.weight": (n,), "post_ffw_norm.weight": (n,)}
        if self.n_expert:
            layer["ffn_gate_inp.weight"] = (n, self.n_expert)
            layer |= {f"ffn_{x}_exps.weight": (n, self.n_ff, self.n_expert) for x in ("gate", "up")}
            layer["ffn_down_exps.weight"] = (self.n_ff, n, self.n_expert)
        else:
            layer |= {"ffn_gate.weight": (n, self.n_ff), "ffn_up.weight": (n, self.n_ff)}
            layer["ffn_down.weight"] = (self.n_ff, n)
        for i in range(self.n_layer):
            found |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
        return found

    def write(self, path: Path) -> Path:
        """Write the file to ``path``."""
        pairs = {
            "general.architecture": self.architecture,
            "tokenizer.ggml.model": "test",
            "tokenizer.ggml.tokens": [f"t{i}" for i in range(self.n_vocab)],
            "tokenizer.ggml.scores": [0.0] * self.n_vocab,
            **{f"{self.architecture}.{key}": value for key, value in self._sizes().items()},
            **self.metadata,
        }
        tensors, offset, table = self.tensors(), 0, b""
        for name, shape in tensors.items():
            kind = GGML_TYPES[_NUMBERS[self.kind if len(shape) > 1 and "gate_inp" not in name else "f32"]]
            table += string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
            table += struct.pack("<IQ", _NUMBERS[kind.name], offset)
            n = 1
            for dim in shape:
                n *= dim
            offset += -(-n // kind.block_size * kind.block_bytes // 32) * 32
        head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs))
        head += b"".join(pair(key, value) for key, value in pairs.items()) + table
        with path.open("wb") as file:
            file.write(head)
            file.truncate(-(-len(head) // 32) * 32 + offset)
        return path

    def _sizes(self) -> dict[str, Value]:
        sizes: dict[str, Value] = {
            "vocab_size": self.n_vocab,
            "context_length": 8192,
            "embedding_length": self.n_embd,
            "block_count": self.n_layer,
            "feed_forward_length": self.n_ff,
            "attention.head_count": self.n_head,
            "attention.head_count_kv": self.n_head_kv,
            "attention.layer_norm_rms_epsilon": 1e-5,
        }
        if self.head_dim:
            sizes |= {"attention.key_length": self.head_dim, "attention.value_length": self.head_dim}
        if self.n_expert:
            sizes |= {"expert_count": self.n_expert, "expert_used_count": 2}
        return sizes


def string(text: str) -> bytes:
    """Return a GGUF string."""
    return struct.pack("<Q", len(text.encode())) + text.encode()


def pair(key: str, value: Value) -> bytes:
    """Return one metadata entry: string, uint32, float32 or an array of strings or floats."""
    if isinstance(value, str):
        return string(key) + struct.pack("<I", 8) + string(value)
    if isinstance(value, int):
        return string(key) + struct.pack("<II", 4, value)
    if isinstance(value, float):
        return string(key) + struct.pack("<If", 6, value)
    if isinstance(value[0], str):
        items = b"".join(string(str(item)) for item in value)
        return string(key) + struct.pack("<IIQ", 9, 8, len(value)) + items
    return string(key) + struct.pack(f"<IIQ{len(value)}f", 9, 6, len(value), *value)
