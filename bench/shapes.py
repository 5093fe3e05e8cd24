#!/usr/bin/env python3
"""Models with random weights and the shapes of real ones, in every type that is measured: ``build/bench-models``.

Speed depends on shapes and types, not on what the weights say. Written as f16 by the ``gguf`` package, then quantized
by ``pyllama_wasm.quantize``, which gives every tensor the type that llama-quantize would give it. What is there already
is kept; ``shapes.py NAME ...`` makes models ahead of a run (all takes some minutes and 10 GB).
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

import pyllama_wasm as pw

FOLDER = Path(__file__).resolve().parent.parent / "build" / "bench-models"
TYPES = ("Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "F16")
_FORMAT = 1
"""Raised when what is written changes, so that cached files are made anew."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder with tied embeddings."""

    architecture: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    n_ff: int
    n_vocab: int
    pre_tokenizer: str
    rope_freq_base: float
    rms_epsilon: float
    has_bias: bool = False
    has_rope_factors: bool = False
    n_ctx_train: int = 32768

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield names and shapes, the slowest-varying dimension first."""
        n, kv = self.n_embd, self.n_embd // self.n_head * self.n_head_kv
        yield "token_embd.weight", (self.n_vocab, n)
        yield "output_norm.weight", (n,)
        if self.has_rope_factors:
            yield "rope_freqs.weight", (n // self.n_head // 2,)
        for i in range(self.n_layer):
            yield f"blk.{i}.attn_norm.weight", (n,)
            for name, rows in (("attn_q", n), ("attn_k", kv), ("attn_v", kv)):
                yield f"blk.{i}.{name}.weight", (rows, n)
                if self.has_bias:
                    yield f"blk.{i}.{name}.bias", (rows,)
            yield f"blk.{i}.attn_output.weight", (n, n)
            yield f"blk.{i}.ffn_norm.weight", (n,)
            yield f"blk.{i}.ffn_gate.weight", (self.n_ff, n)
            yield f"blk.{i}.ffn_up.weight", (self.n_ff, n)
            yield f"blk.{i}.ffn_down.weight", (n, self.n_ff)


SHAPES = {
    "Qwen2.5-0.5B": Shape("qwen2", 24, 896, 14, 2, 4864, 151936, "qwen2", 1e6, 1e-6, has_bias=True),
    "Llama-3.2-1B": Shape(
        "llama", 16, 2048, 32, 8, 8192, 128256, "llama-bpe", 5e5, 1e-5, has_rope_factors=True, n_ctx_train=131072
    ),
    # For trying the benchmarks themselves.
    "tiny": Shape("llama", 2, 256, 4, 2, 512, 1024, "llama-bpe", 1e4, 1e-5, n_ctx_train=4096),
}


def names() -> list[str]:
    """Return the names of all models: ``SHAPE-TYPE``."""
    return [f"{shape}-{kind}" for shape in SHAPES for kind in TYPES]


def model_path(name: str, report: Callable[[str], object] = print) -> Path:
    """Return the path of the model ``SHAPE-TYPE``, made now unless it is there; ``KeyError`` for an unknown name."""
    shape_name, _, kind = name.rpartition("-")
    shape = SHAPES[shape_name]
    if kind not in TYPES:
        raise KeyError(name)
    path, source = FOLDER / f"{name}.gguf", FOLDER / f"{shape_name}-F16.gguf"
    made_of = json.dumps([_FORMAT, asdict(shape), kind, pw.LLAMA_CPP_BUILD])
    digest = hashlib.sha256(made_of.encode()).hexdigest()
    stamp = path.with_suffix(".stamp")
    if path.exists() and stamp.exists() and stamp.read_text() == digest:
        return path
    FOLDER.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    if kind == "F16":
        report(f"writing {path.name}")
        temporary = path.with_suffix(".tmp")
        write(shape, temporary)
        temporary.replace(path)
    else:
        model_path(f"{shape_name}-F16", report)
        report(f"quantizing {path.name}")
        pw.quantize(source, path, kind)
    stamp.write_text(digest)
    return path


def write(shape: Shape, path: Path) -> None:
    """Write a model of that shape in f16, norms and biases in f32."""
    writer = gguf.GGUFWriter(path, shape.architecture)
    writer.add_context_length(shape.n_ctx_train)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_layer_norm_rms_eps(shape.rms_epsilon)
    writer.add_rope_freq_base(shape.rope_freq_base)
    writer.add_rope_dimension_count(shape.n_embd // shape.n_head)
    writer.add_vocab_size(shape.n_vocab)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    _add_vocabulary(writer, shape)
    for name, dims in shape.tensors():
        dtype = np.dtype(np.float16 if len(dims) > 1 else np.float32)
        writer.add_tensor_info(name, dims, dtype, int(np.prod(dims)) * dtype.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(1)
    for name, dims in shape.tensors():
        writer.write_tensor_data(_weights(rng, name, dims))
    writer.close()


def _weights(rng: np.random.Generator, name: str, dims: tuple[int, ...]) -> npt.NDArray[np.floating]:
    """Return weights that keep activations near the size they have, so that every logit is finite."""
    if len(dims) == 1:
        return np.zeros(dims, np.float32) if name.endswith(".bias") else np.ones(dims, np.float32)
    values = rng.standard_normal(dims, np.float32)
    values *= dims[1] ** -0.5
    return values.astype(np.float16)


def _add_vocabulary(writer: gguf.GGUFWriter, shape: Shape) -> None:
    """Add a byte-pair vocabulary of the right size: bytes, pairs, threes, and as many merges as a real one has."""
    alphabet = _byte_characters()
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    pairs = [(a, b) for a in alphabet for b in alphabet]
    threes = ((a + b, c) for (a, b), c in itertools.product(pairs, alphabet))
    merges = list(itertools.islice(itertools.chain(pairs, threes), shape.n_vocab - len(alphabet) - len(special)))
    tokens = [*alphabet, *(a + b for a, b in merges), *special]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(shape.pre_tokenizer)
    writer.add_token_list(tokens)
    kinds = [gguf.TokenType.NORMAL] * (len(tokens) - len(special)) + [gguf.TokenType.CONTROL] * len(special)
    writer.add_token_types(kinds)
    writer.add_token_merges([f"{a} {b}" for a, b in merges])
    writer.add_bos_token_id(len(tokens) - 2)
    writer.add_eos_token_id(len(tokens) - 1)


def _byte_characters() -> list[str]:
    """Return the character that stands for each byte in byte-pair vocabularies, as GPT-2 chose them."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in plain)
    shifted = {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [shifted.get(byte, chr(byte)) for byte in range(256)]


def main() -> None:
    """Make the models named on the command line."""
    parser = argparse.ArgumentParser(description="Make random-weight models in build/bench-models.")
    parser.add_argument("names", nargs="*", help="SHAPE-TYPE, by default all of Qwen2.5-0.5B and Llama-3.2-1B")
    wanted = parser.parse_args().names or [name for name in names() if not name.startswith("tiny")]
    if unknown := [name for name in wanted if name not in names()]:
        parser.error(f"there is no model {unknown[0]}; there are {', '.join(names())}")
    for name in wanted:
        print(model_path(name))


if __name__ == "__main__":
    main()
