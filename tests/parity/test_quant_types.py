"""Every tensor type of the build computes in the sandbox what it computes natively."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import pyllama_wasm as pw
from pyllama_wasm.ggml_types import GGML_TYPES
from pyllama_wasm.gguf import GGUFReader

from . import quant_types
from .golden import sha256_of

# Mean squared error over mean square of native's logits. With upstream's own attention it is 1.2e-6 for q8_0 and below
# 1e-8 for the others; ours adds values up in f32 where native does in half precision: up to 5e-5.
BOUND = 1e-4

NATIVE = quant_types.load()
NOT_WEIGHTS = {"q8_1", "q8_K", "i8", "i16", "i32", "i64", "f64"}
"""What only activations, indices or nothing at all in a model has."""


def logits_of(path: Path, is_repacked: bool = False) -> quant_types.Floats:
    """Decode the tokens in a sandbox."""
    params = pw.ModelParams(use_extra_bufts=is_repacked)
    with (
        pw.Model(path, params=params, n_threads=1) as model,
        model.context(n_ctx=64, type_k="f32", type_v="f32") as context,
    ):
        batch = pw.Batch(len(quant_types.TOKENS))
        for pos, token in enumerate(quant_types.TOKENS):
            batch.add(token, pos=pos, seq_ids=[0], logits=True)
        context.decode(batch)
        return np.stack([context.logits(i).copy() for i in range(len(quant_types.TOKENS))])


def error(logits: quant_types.Floats, native: quant_types.Floats) -> float:
    """Return the normalized mean squared error; infinite when a logit is no number."""
    if not np.isfinite(logits).all():
        return float("inf")
    return float(np.square((logits - native).astype(np.float64)).sum() / np.square(native.astype(np.float64)).sum())


@pytest.mark.parametrize("kind", quant_types.TYPES)
def test_logits_are_those_of_native(tmp_path: Path, kind: str) -> None:
    path = quant_types.write_model(tmp_path / "m.gguf", kind)
    found = error(logits_of(path), NATIVE[kind])
    assert found < BOUND, f"{kind}: NMSE {found:.2e}"


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q5_0", "q5_1", "q4_K", "q5_K", "q6_K"])
def test_logits_with_repacked_weights_are_those_of_native(tmp_path: Path, kind: str) -> None:
    path = quant_types.write_model(tmp_path / "m.gguf", kind)
    found = error(logits_of(path, is_repacked=True), NATIVE[kind])
    assert found < BOUND, f"{kind}: NMSE {found:.2e}"


@pytest.mark.parametrize("kind", ["f32", "f16", "q4_0", "q6_K", "nvfp4"])
def test_saved_model_is_byte_for_byte_what_native_saves(tmp_path: Path, kind: str) -> None:
    with pw.Model(quant_types.write_model(tmp_path / f"{kind}.gguf", kind), n_threads=1) as model:
        model.save(tmp_path / "saved.gguf")
    assert sha256_of(tmp_path / "saved.gguf") == quant_types.saved_hashes()[kind]


def test_the_record_holds_every_type_that_weights_can_have() -> None:
    assert set(NATIVE) == set(quant_types.TYPES) == {kind.name for kind in GGML_TYPES.values()} - NOT_WEIGHTS
    assert all(np.isfinite(logits).all() for logits in NATIVE.values())


@pytest.mark.parametrize("kind", ["q4_0", "q6_K", "iq2_s"])
def test_comparison_notices_one_wrong_block(tmp_path: Path, kind: str) -> None:
    path = quant_types.write_model(tmp_path / "m.gguf", kind)
    tensor = GGUFReader(path).tensor("blk.0.attn_output.weight")
    data = bytearray(path.read_bytes())
    row = tensor.n_bytes // quant_types.N_EMBD
    data[tensor.offset + 40 * row : tensor.offset + 48 * row] = data[tensor.offset : tensor.offset + 8 * row]
    path.write_bytes(data)
    assert error(logits_of(path), NATIVE[kind]) > BOUND
