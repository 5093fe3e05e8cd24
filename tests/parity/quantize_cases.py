"""What is quantized to compare with native: models written byte for byte the same everywhere, and a list of cases."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pyllama_wasm.quantize_params import QUANTIZE_TYPES

HERE = Path(__file__).resolve().parent
GOLDEN = HERE / "quantized.json"

Floats = npt.NDArray[np.float32]

NO_TYPE = frozenset({"COPY", "Q3_K", "Q4_K", "Q5_K"})
TYPES = tuple(name for name in QUANTIZE_TYPES if name not in NO_TYPE)
# The search for these takes seconds for each million weights.
SLIM = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "IQ3_M")
# And the tables that they search in take up to half a minute to build.
SLOW = ("IQ1_S", "IQ1_M", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS")
NEED_IMATRIX = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ1_S", "IQ1_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S")


@dataclass(frozen=True)
class Shape:
    """A model of llama's architecture."""

    n_embd: int = 256
    n_ff: int = 256
    n_layer: int = 4
    n_head: int = 4
    n_head_kv: int = 2
    n_expert: int = 0
    n_rows: int = 32
    """Rows of each matrix: far fewer than a real model has, as quantizing knows no more than rows."""

    kind: str = "f32"

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield names and shapes, the slowest-varying dimension first."""
        n_embd, n_rows = self.n_embd, self.n_rows
        yield "token_embd.weight", (n_rows, n_embd)
        for i in range(self.n_layer):
            yield f"blk.{i}.attn_norm.weight", (n_embd,)
            yield f"blk.{i}.attn_q.weight", (n_rows, n_embd)
            yield f"blk.{i}.attn_k.weight", (n_rows, n_embd)
            yield f"blk.{i}.attn_v.weight", (n_rows, n_embd)
            yield f"blk.{i}.attn_output.weight", (n_rows, n_embd)
            yield f"blk.{i}.ffn_norm.weight", (n_embd,)
            expert, suffix = ((self.n_expert,), "_exps") if self.n_expert else ((), "")
            if self.n_expert:
                yield f"blk.{i}.ffn_gate_inp.weight", (self.n_expert, n_embd)
            yield f"blk.{i}.ffn_gate{suffix}.weight", (*expert, n_rows, n_embd)
            yield f"blk.{i}.ffn_up{suffix}.weight", (*expert, n_rows, n_embd)
            yield f"blk.{i}.ffn_down{suffix}.weight", (*expert, n_rows, self.n_ff)
        yield "output_norm.weight", (n_embd,)
        yield "output.weight", (n_rows, n_embd)

    def write(self, path: Path) -> None:
        """Write the GGUF. Not with the gguf package: its output may differ from version to version."""
        keys: dict[str, Any] = {
            "general.architecture": "llama",
            "llama.context_length": 512,
            "llama.embedding_length": self.n_embd,
            "llama.block_count": self.n_layer,
            "llama.feed_forward_length": self.n_ff,
            "llama.attention.head_count": self.n_head,
            "llama.attention.head_count_kv": self.n_head_kv,
            "llama.attention.layer_norm_rms_epsilon": 1e-5,
            "llama.rope.dimension_count": self.n_embd // self.n_head,
        }
        if self.n_expert:
            keys |= {"llama.expert_count": self.n_expert, "llama.expert_used_count": 2}
        random = np.random.RandomState(7)  # its stream never changes, unlike default_rng's
        write_gguf(path, keys, {name: (_weights(random, shape), self._kind(shape)) for name, shape in self.tensors()})

    def _kind(self, shape: tuple[int, ...]) -> str:
        return "f32" if len(shape) == 1 else self.kind


MODELS: Mapping[str, Shape] = {
    "dense": Shape(),
    "slim": Shape(n_layer=8, n_rows=5),
    "odd": Shape(n_embd=96, n_ff=160, n_layer=2, n_head=2, n_head_kv=1),
    "moe": Shape(n_layer=1, n_expert=8, n_rows=5, n_head_kv=1),
    "f16": Shape(n_layer=1, kind="f16"),
    "bf16": Shape(n_layer=1, kind="bf16"),
}


def _weights(random: np.random.RandomState, shape: tuple[int, ...]) -> Floats:
    """Return weights with what upsets quantizers: outliers, rows of zeros, constant rows, very small numbers."""
    # Sums of uniform numbers, not normal ones: those take a logarithm, which differs between C libraries.
    values: Floats = (0.07 * (random.random_sample((6, *shape)).sum(axis=0) - 3)).astype(np.float32)
    if len(shape) > 1:
        rows = values.reshape(-1, shape[-1])
        rows[0::17, ::29] *= 40
        rows[1] = 0
        rows[2, :32] = 0
        rows[2, 32:64] = 0.25
        rows[3] *= 1e-20
    return values


_NUMBERS = {"f32": 0, "f16": 1, "bf16": 30}


def write_gguf(path: Path, keys: Mapping[str, Any], tensors: Mapping[str, tuple[Floats, str]]) -> None:
    """Write a GGUF of version 3: u32, f32, text and lists of text, and tensors as ``(values, type)``."""
    table, blobs, offset = b"", [], 0
    for name, (values, kind) in tensors.items():
        blob = _encode(values, kind)
        dims = values.shape[::-1]
        table += _text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, _NUMBERS[kind], offset)
        blobs.append(blob + bytes(-len(blob) % 32))
        offset += len(blobs[-1])
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(keys))
    head += b"".join(_text(key) + _value(value) for key, value in keys.items()) + table
    path.write_bytes(head + bytes(-len(head) % 32) + b"".join(blobs))


def _encode(values: Floats, kind: str) -> bytes:
    if kind == "bf16":
        return (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    return values.astype("<f2" if kind == "f16" else "<f4").tobytes()


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(_text(item) for item in value)
    return struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<II", 4, value)


def importances(shape: Shape) -> dict[str, tuple[Floats, Floats]]:
    """Return sums of squares and counts per expert by tensor name, as ``llama-imatrix`` collects them."""
    random = np.random.RandomState(11)
    entries: dict[str, tuple[Floats, Floats]] = {}
    for name, dims in shape.tensors():
        if len(dims) == 1 or name in ("token_embd.weight", "output.weight"):
            continue
        n_matrices = dims[0] if len(dims) == 3 else 1
        counts = np.array([0 if i == 5 else 64 + i for i in range(n_matrices)], np.float32)
        sums = (counts[:, None] * random.random_sample((n_matrices, dims[-1])) ** 3).astype(np.float32)
        entries[name] = sums, counts
    return entries


def write_imatrix_gguf(path: Path, shape: Shape) -> None:
    """Write what ``llama-imatrix`` writes today."""
    keys = {
        "general.type": "imatrix",
        "imatrix.datasets": ["wiki.test.raw"],
        "imatrix.chunk_count": 3,
        "imatrix.chunk_size": 512,
    }
    tensors: dict[str, tuple[Floats, str]] = {}
    for name, (sums, counts) in importances(shape).items():
        tensors[f"{name}.in_sum2"] = sums, "f32"
        tensors[f"{name}.counts"] = counts.reshape(-1, 1), "f32"
    write_gguf(path, keys, tensors)


def write_imatrix_dat(path: Path, shape: Shape) -> None:
    """Write what ``llama-imatrix`` wrote until 2025: means times the number of calls."""
    entries = importances(shape)
    data = struct.pack("<i", len(entries))
    for name, (sums, counts) in entries.items():
        values = (3 * sums / np.maximum(counts, 1)[:, None]).astype("<f4")
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 3, values.size) + values.tobytes()
    path.write_bytes(data + struct.pack("<ii", 3, 8) + b"wiki.txt")


WRITE_IMATRIX: Mapping[str, Callable[[Path, Shape], None]] = {"gguf": write_imatrix_gguf, "dat": write_imatrix_dat}


@dataclass(frozen=True)
class Case:
    """One quantization, ours and native's: ``changes`` and ``flags`` mean the same."""

    name: str
    model: str
    type: str
    imatrix: str = ""
    """Suffix of the importance matrix's file, empty: none."""

    changes: Mapping[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] = ()

    @property
    def is_slow(self) -> bool:
        """Whether it takes more than some seconds."""
        return self.type in SLOW


def _cases() -> Iterator[Case]:
    for kind in TYPES:
        if kind not in NEED_IMATRIX:
            yield Case(kind, "dense", kind)
        if kind not in ("F32", "F16", "BF16"):
            yield Case(f"{kind} imatrix", "slim" if kind in SLIM else "dense", kind, "gguf")
    yield Case("COPY", "dense", "COPY")
    yield Case("Q4_K alias", "dense", "Q4_K")
    for kind in ("Q4_K_M", "Q6_K", "TQ1_0", "Q2_0"):
        yield Case(f"odd {kind}", "odd", kind)
    yield Case("odd IQ2_XXS imatrix", "odd", "IQ2_XXS", "gguf")
    for kind in ("MXFP4_MOE", "Q2_K"):
        yield Case(f"moe {kind}", "moe", kind)
    for kind in ("IQ3_S", "Q4_0"):
        yield Case(f"moe {kind} imatrix", "moe", kind, "gguf")
    for model in ("f16", "bf16"):
        for kind in ("Q4_0", "IQ4_XS", "F32"):
            yield Case(f"{model} {kind}", model, kind)
    yield Case("legacy imatrix", "dense", "IQ4_XS", "dat")
    yield Case("pure", "dense", "Q4_K_M", changes={"pure": True}, flags=("--pure",))
    yield Case(
        "leave output", "dense", "Q5_K_M",
        changes={"quantize_output_tensor": False}, flags=("--leave-output-tensor",),
    )  # fmt: skip
    yield Case(
        "types of output and embeddings", "dense", "Q4_K_M",
        changes={"output_tensor_type": "q8_0", "token_embedding_type": "iq4_nl"},
        flags=("--output-tensor-type", "q8_0", "--token-embedding-type", "iq4_nl"),
    )  # fmt: skip
    yield Case(
        "types by pattern", "dense", "Q4_K_M",
        changes={"tensor_types": {r"blk\.[12]\.attn_v": "q8_0", "ffn_down": "nvfp4"}},
        flags=("--tensor-type", r"blk\.[12]\.attn_v=q8_0", "--tensor-type", "ffn_down=nvfp4"),
    )  # fmt: skip
    yield Case("pruned", "dense", "Q2_K", "gguf", changes={"prune_layers": [2, 1]}, flags=("--prune-layers", "1,2"))
    yield Case(
        "overrides", "dense", "Q8_0",
        changes={"kv_overrides": {"a.text": "caf\u00e9", "a.int": 4000000000, "a.float": 0.1, "a.bool": True}},
        flags=("--override-kv", "a.text=str:caf\u00e9", "--override-kv", "a.int=int:4000000000",
               "--override-kv", "a.float=float:0.1", "--override-kv", "a.bool=bool:true"),
    )  # fmt: skip


CASES = tuple(_cases())


def write_inputs(folder: Path) -> None:
    """Write all models and importance matrices into ``folder``."""
    for name, shape in MODELS.items():
        shape.write(folder / f"{name}.gguf")
        for suffix, write in WRITE_IMATRIX.items():
            write(folder / f"{name}.imatrix.{suffix}", shape)
