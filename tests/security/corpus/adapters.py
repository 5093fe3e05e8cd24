"""Faults of LoRA adapters: what they claim to be, and matrices that do not fit the model."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np

from .lying_gguf import ARRAY, F32, STRING, U32, LyingGguf, Tensor, array
from .record import Case, Input, Seeds, hostile_adapter

QUERY = "blk.0.attn_q.weight"
N_EXPERT, N_EMBD, N_FF = 4, 64, 96


def _shapes(
    a: tuple[int, ...], b: tuple[int, ...], name: str = QUERY, kind: int = 0, item_bytes: int = 4
) -> Callable[[LyingGguf], None]:
    """Return a change of the adapter's only pair, dimensions as the file counts."""

    def change(made: LyingGguf) -> None:
        made.tensors = [
            Tensor(f"{name}.lora_{half}".encode(), dims, kind, bytes(item_bytes * int(np.prod(dims))))
            for half, dims in (("a", a), ("b", b))
        ]

    return change


def expert_model(seeds: Seeds) -> bytes:
    """Return the good model with four experts in each layer."""
    made, rng = seeds.parts(), np.random.default_rng(3)
    made.number("llama.expert_count", N_EXPERT).number("llama.expert_used_count", 2)
    made.tensors = [tensor for tensor in made.tensors if b".ffn_" not in tensor.name or b"norm" in tensor.name]

    def add(name: str, *dims: int) -> None:
        values = (0.3 * rng.standard_normal(int(np.prod(dims)))).astype("<f4")
        made.tensors.append(Tensor(name.encode(), dims, 0, values.tobytes()))

    for i in range(2):
        add(f"blk.{i}.ffn_gate_inp.weight", N_EMBD, N_EXPERT)
        add(f"blk.{i}.ffn_gate_exps.weight", N_EMBD, N_FF, N_EXPERT)
        add(f"blk.{i}.ffn_up_exps.weight", N_EMBD, N_FF, N_EXPERT)
        add(f"blk.{i}.ffn_down_exps.weight", N_FF, N_EMBD, N_EXPERT)
    return made.write()


def _experts(n_expert: int) -> Callable[[Seeds], tuple[Input, ...]]:
    def make(seeds: Seeds) -> tuple[Input, ...]:
        made = seeds.adapter_parts()
        _shapes((N_EMBD, 4, n_expert), (4, N_FF, n_expert), "blk.0.ffn_up_exps.weight")(made)
        return (expert_model(seeds), made.write())

    return make


def quantized_model(seeds: Seeds) -> bytes:
    """Return the good model with its query matrices in q4_0."""
    made = seeds.parts()
    for tensor in made.tensors:
        if tensor.name.endswith(b"attn_q.weight"):
            tensor.kind, tensor.data = 2, (struct.pack("<e", 0.01) + bytes(range(16))) * (64 * 2)
    return made.write()


def _nan_router(seeds: Seeds) -> tuple[Input, ...]:
    made = LyingGguf.parse(expert_model(seeds))
    tensor = made.tensor("blk.0.ffn_gate_inp.weight")
    tensor.data = np.full(len(tensor.data) // 4, np.nan, "<f4").tobytes()
    return (made.write(),)


def _half(seeds: Seeds) -> tuple[Input, ...]:
    return (seeds.model, seeds.adapter[:-600], seeds.adapter)


def _huge(made: LyingGguf) -> None:
    """Claim a rank whose matrices are far beyond the file."""
    made.tensors[0].dims, made.tensors[1].dims = (64, 2**26), (2**26, 64)


def _lost_half(made: LyingGguf) -> None:
    made.tensors = made.tensors[:1]


def _tokens(kind: int, tokens: list[int] | list[bytes]) -> Callable[[LyingGguf], object]:
    return lambda made: made.set("adapter.alora.invocation_tokens", ARRAY, array(kind, tokens))


def _value(key: str, kind: int, value: bytes) -> Callable[[LyingGguf], object]:
    return lambda made: made.set(key, kind, value)


_NUMBER = struct.pack("<I", 5)

CASES = (
    Case("issue-29128", "#29128 (still open)", "fewer experts than the model has", "adapter",
         _experts(2), "UnsupportedModelError", "another model"),
    Case("issue-29128-more", "#29128 (more)", "more experts than the model has", "adapter",
         _experts(64), "UnsupportedModelError", "another model"),
    Case("issue-25611", "#25611", "it ends half way, and is loaded again whole", "adapter",
         _half, "ModelFormatError", "ends beyond the file"),
    Case("issue-18050", "#18050, #18466, #18375", "64 adapters at once", "adapter",
         lambda seeds: (seeds.model, *[seeds.adapter] * 64), "ok"),
    Case("issue-12587", "#12587, #12592", "an adapter of a matrix that is repacked for the processor", "adapter",
         lambda seeds: (quantized_model(seeds), seeds.adapter), "ok"),
    Case("issue-24251-router", "#24251 (experts)", "a router of experts that is NaN", "model",
         _nan_router, "ModelError", "not numbers"),
    Case("adapter-general-type", "llama-adapter.cpp", "general.type is a number", "adapter",
         hostile_adapter(_value("general.type", U32, _NUMBER)), "ModelFormatError", "no string"),
    Case("adapter-type", "llama-adapter.cpp (adapter.type)", "adapter.type is a number", "adapter",
         hostile_adapter(_value("adapter.type", U32, _NUMBER)), "ModelFormatError", "no string"),
    Case("adapter-architecture", "llama-adapter.cpp (architecture)", "the architecture is a number", "adapter",
         hostile_adapter(_value("general.architecture", U32, _NUMBER)), "ModelFormatError", "no string"),
    Case("adapter-alpha", "llama-adapter.cpp (alpha)", "alpha is a string", "adapter",
         hostile_adapter(lambda m: m.string("adapter.lora.alpha", "8")), "ModelFormatError", "no float32"),
    Case("adapter-alpha-nan", "ours", "alpha is NaN", "adapter",
         hostile_adapter(lambda m: m.number("adapter.lora.alpha", float("nan"), F32)), "ModelFormatError", "alpha"),
    Case("alora-tokens", "llama-adapter.cpp:230", "invocation tokens beyond the vocabulary", "adapter",
         hostile_adapter(_tokens(U32, [2**32 - 1, 2**31])), "UnsupportedModelError", "not in the vocabulary"),
    Case("alora-strings", "llama-adapter.cpp:230 (type)", "invocation tokens that are strings", "adapter",
         hostile_adapter(_tokens(STRING, [b"a"])), "UnsupportedModelError", "not in the vocabulary"),
    Case("adapter-integers", "llama-adapter.cpp:358", "matrices of 32-bit integers", "adapter",
         hostile_adapter(_shapes((64, 4), (4, 64), kind=26)), "UnsupportedModelError", "has type i32"),
    Case("adapter-rank", "llama-adapter.cpp:358 (rank)", "A and B of different ranks", "adapter",
         hostile_adapter(_shapes((64, 4), (8, 64))), "ModelFormatError", "has an A of"),
    Case("adapter-rank-0", "llama-adapter.cpp:358 (rank 0)", "matrices of rank 0", "adapter",
         hostile_adapter(_shapes((64, 0), (0, 64))), "ModelFormatError"),
    Case("adapter-rank-huge", "llama-adapter.cpp:245", "a rank of 2^26", "adapter",
         hostile_adapter(_huge), "ModelFormatError", "ends beyond the file"),
    Case("adapter-embeddings", "llama-adapter.cpp:358 (token_embd)", "embeddings with A and B of different ranks",
         "adapter", hostile_adapter(_shapes((4, 275), (8, 64), "token_embd.weight")), "UnsupportedModelError"),
    Case("adapter-half", "ours", "A without B", "adapter",
         hostile_adapter(_lost_half), "ModelFormatError", "only one of"),
    Case("adapter-nothing", "ours (nothing)", "no tensors", "adapter",
         hostile_adapter(lambda m: m.tensors.clear()), "ModelFormatError", "no LoRA tensors"),
    Case("adapter-model", "ours", "the model itself as its adapter", "adapter",
         lambda seeds: (seeds.model, seeds.model), "ModelFormatError"),
    Case("adapter-counts", "CVE-2024-21836 (adapter)", "tensor count * size of a row wraps", "adapter",
         hostile_adapter(lambda m: setattr(m, "n_tensors", 2**64 // 200)), "ModelFormatError", "the header claims"),
)  # fmt: skip
