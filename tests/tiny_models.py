"""Tiny models with random weights of architectures that the tests' usual one (llama) cannot stand for, and adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

N_EMBD, N_HEAD, N_FF, N_LAYER, N_CTX = 64, 2, 96, 2, 64
N_BUCKETS = 8


class Writer:
    """A GGUF in the making, with a byte-level vocabulary and what every architecture states."""

    def __init__(self, path: Path, architecture: str, n_layer: int = N_LAYER, seed: int = 1) -> None:
        self.path, self.gguf = path, gguf.GGUFWriter(path, architecture)
        self._rng = np.random.default_rng(seed)
        self.gguf.add_context_length(N_CTX)
        self.gguf.add_embedding_length(N_EMBD)
        self.gguf.add_block_count(n_layer)
        self.gguf.add_feed_forward_length(N_FF)
        self.gguf.add_head_count(N_HEAD)
        tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
        kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL] + [gguf.TokenType.BYTE] * 256
        self.gguf.add_tokenizer_model("llama")
        self.gguf.add_token_list(tokens)
        self.gguf.add_token_scores([-float(i) for i in range(len(tokens))])
        self.gguf.add_token_types(kinds)
        self.gguf.add_bos_token_id(1)
        self.gguf.add_eos_token_id(2)
        self.n_vocab = len(tokens)

    def add(self, name: str, *shape: int) -> None:
        """Add a tensor, its slowest-varying dimension first."""
        scale = 1.0 if len(shape) == 1 else 0.3
        self.gguf.add_tensor(name, (scale * self._rng.standard_normal(shape)).astype(np.float32))

    def close(self) -> Path:
        """Write it all."""
        self.gguf.write_header_to_file()
        self.gguf.write_kv_data_to_file()
        self.gguf.write_tensors_to_file()
        self.gguf.close()
        return self.path


def write_t5(path: Path) -> Path:
    """Write an encoder-decoder model."""
    writer = Writer(path, "t5")
    writer.gguf.add_layer_norm_rms_eps(1e-5)
    writer.gguf.add_relative_attn_buckets_count(N_BUCKETS)
    writer.gguf.add_decoder_start_token_id(0)
    writer.add("token_embd.weight", writer.n_vocab, N_EMBD)
    for side, attentions in (("enc", ("attn",)), ("dec", ("attn", "cross_attn"))):
        for i in range(N_LAYER):
            block = f"{side}.blk.{i}"
            for attention in attentions:
                writer.add(f"{block}.{attention}_norm.weight", N_EMBD)
                for part in ("q", "k", "v", "o"):
                    writer.add(f"{block}.{attention}_{part}.weight", N_EMBD, N_EMBD)
            if not i:
                writer.add(f"{block}.attn_rel_b.weight", N_BUCKETS, N_HEAD)
            writer.add(f"{block}.ffn_norm.weight", N_EMBD)
            writer.add(f"{block}.ffn_up.weight", N_FF, N_EMBD)
            writer.add(f"{block}.ffn_down.weight", N_EMBD, N_FF)
        writer.add(f"{side}.output_norm.weight", N_EMBD)
    return writer.close()


def write_gpt2(path: Path) -> Path:
    """Write a model with a learned embedding for each of its 64 positions."""
    writer = Writer(path, "gpt2")
    writer.gguf.add_layer_norm_eps(1e-5)
    writer.add("token_embd.weight", writer.n_vocab, N_EMBD)
    writer.add("position_embd.weight", N_CTX, N_EMBD)
    for i in range(N_LAYER):
        block = f"blk.{i}"
        shapes = {"attn_qkv": (3 * N_EMBD, N_EMBD), "attn_output": (N_EMBD, N_EMBD)}
        shapes |= {"ffn_up": (N_FF, N_EMBD), "ffn_down": (N_EMBD, N_FF)}
        for name, shape in shapes.items():
            writer.add(f"{block}.{name}.weight", *shape)
            writer.add(f"{block}.{name}.bias", shape[0])
        for name in ("attn_norm", "ffn_norm"):
            writer.add(f"{block}.{name}.weight", N_EMBD)
            writer.add(f"{block}.{name}.bias", N_EMBD)
    writer.add("output_norm.weight", N_EMBD)
    writer.add("output_norm.bias", N_EMBD)
    return writer.close()


def write_bert(
    path: Path, pooling: int = 1, extra: Mapping[str, tuple[int, ...]] | None = None, labels: Sequence[str] = ()
) -> Path:
    """Write a model that keeps nothing and computes embeddings only; ``extra`` are shapes of further tensors."""
    writer = Writer(path, "bert")
    writer.gguf.add_layer_norm_eps(1e-5)
    writer.gguf.add_causal_attention(False)
    writer.gguf.add_uint32("bert.pooling_type", pooling)
    if labels:
        writer.gguf.add_classifier_output_labels(list(labels))
    for name, shape in (extra or {}).items():
        writer.add(name, *shape)
    writer.gguf.add_token_type_count(2)
    writer.add("token_embd.weight", writer.n_vocab, N_EMBD)
    writer.add("position_embd.weight", N_CTX, N_EMBD)
    writer.add("token_types.weight", 2, N_EMBD)
    writer.add("token_embd_norm.weight", N_EMBD)
    writer.add("token_embd_norm.bias", N_EMBD)
    for i in range(N_LAYER):
        block = f"blk.{i}"
        shapes = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (N_EMBD, N_EMBD))
        shapes |= {"ffn_up": (N_FF, N_EMBD), "ffn_down": (N_EMBD, N_FF)}
        for name, shape in shapes.items():
            writer.add(f"{block}.{name}.weight", *shape)
            writer.add(f"{block}.{name}.bias", shape[0])
        for name in ("attn_output_norm", "layer_output_norm"):
            writer.add(f"{block}.{name}.weight", N_EMBD)
            writer.add(f"{block}.{name}.bias", N_EMBD)
    return writer.close()


def write_cohere2(path: Path, n_swa: int = 8) -> Path:
    """Write a model of which three layers see only the last ``n_swa`` tokens and one sees all."""
    writer = Writer(path, "cohere2", n_layer=4)
    writer.gguf.add_layer_norm_eps(1e-5)
    writer.gguf.add_sliding_window(n_swa)
    writer.gguf.add_logit_scale(1.0)
    writer.add("token_embd.weight", writer.n_vocab, N_EMBD)
    for i in range(4):
        block = f"blk.{i}"
        writer.add(f"{block}.attn_norm.weight", N_EMBD)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            writer.add(f"{block}.{name}.weight", N_EMBD, N_EMBD)
        for name in ("ffn_gate", "ffn_up"):
            writer.add(f"{block}.{name}.weight", N_FF, N_EMBD)
        writer.add(f"{block}.ffn_down.weight", N_EMBD, N_FF)
    writer.add("output_norm.weight", N_EMBD)
    return writer.close()


def write_mamba(path: Path) -> Path:
    """Write a recurrent model."""
    n_conv, n_inner, n_state, n_rank = 4, 2 * N_EMBD, 16, 4
    writer = Writer(path, "mamba")
    writer.gguf.add_layer_norm_rms_eps(1e-5)
    writer.gguf.add_ssm_conv_kernel(n_conv)
    writer.gguf.add_ssm_inner_size(n_inner)
    writer.gguf.add_ssm_state_size(n_state)
    writer.gguf.add_ssm_time_step_rank(n_rank)
    writer.add("token_embd.weight", writer.n_vocab, N_EMBD)
    for i in range(N_LAYER):
        block = f"blk.{i}"
        writer.add(f"{block}.attn_norm.weight", N_EMBD)
        writer.add(f"{block}.ssm_in.weight", 2 * n_inner, N_EMBD)
        writer.add(f"{block}.ssm_conv1d.weight", n_inner, n_conv)
        writer.add(f"{block}.ssm_conv1d.bias", n_inner)
        writer.add(f"{block}.ssm_x.weight", n_rank + 2 * n_state, n_inner)
        writer.add(f"{block}.ssm_dt.weight", n_inner, n_rank)
        writer.add(f"{block}.ssm_dt.bias", n_inner)
        writer.gguf.add_tensor(f"{block}.ssm_a", -np.ones((n_inner, n_state), np.float32))
        writer.add(f"{block}.ssm_d", n_inner)
        writer.add(f"{block}.ssm_out.weight", N_EMBD, n_inner)
    writer.add("output_norm.weight", N_EMBD)
    return writer.close()


def write_lora(
    path: Path,
    shapes: Mapping[str, tuple[int, int]],
    *,
    rank: int = 4,
    alpha: float = 8.0,
    seed: int = 1,
    architecture: str = "llama",
    invocation_tokens: Sequence[int] = (),
    is_flipped: bool = False,
) -> Path:
    """Write a LoRA with random weights: ``shapes`` are (outputs, inputs) by the name of the tensor changed.

    ``is_flipped``: as the token embeddings want it, whose A has a row per output.
    """
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    if invocation_tokens:
        writer.add_key_value("adapter.alora.invocation_tokens", list(invocation_tokens), gguf.GGUFValueType.ARRAY,
                             sub_type=gguf.GGUFValueType.UINT32)  # fmt: skip
    for name, shape in shapes.items():
        a = (0.2 * rng.standard_normal((rank, shape[1]))).astype(np.float32)
        b = (0.2 * rng.standard_normal((shape[0], rank))).astype(np.float32)
        writer.add_tensor(f"{name}.lora_a", b if is_flipped else a)
        writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(a.T) if is_flipped else b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_control_vector(path: Path, directions: Mapping[str, npt.NDArray[Any]]) -> Path:
    """Write directions by the names of their tensors."""
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    for name, direction in directions.items():
        writer.add_tensor(name, direction)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
