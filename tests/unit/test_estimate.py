"""The memory estimate on files that are odd or hostile; what it is worth is shown in tests/parity."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pyllama_wasm as pw


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def pair(key: str, value: Any) -> bytes:
    if isinstance(value, str):
        return string(key) + struct.pack("<I", 8) + string(value)
    if isinstance(value, float):
        return string(key) + struct.pack("<If", 6, value)
    if isinstance(value, list):
        return string(key) + struct.pack(f"<IIQ{len(value)}q", 9, 11, len(value), *value)
    return string(key) + struct.pack("<Iq", 11, value)


def header(**changes: Any) -> bytes:
    """Return a GGUF without tensors: a llama of two layers, some of its sizes changed or (None) left out."""
    sizes = {"block_count": 2, "embedding_length": 64, "context_length": 512, "attention.head_count": 4} | changes
    pairs = {"general.architecture": "llama", **{f"llama.{k}": v for k, v in sizes.items() if v is not None}}
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + b"".join(pair(k, v) for k, v in pairs.items())


def test_parts_add_up_and_the_context_is_rounded_as_llama_cpp_does() -> None:
    estimate = pw.estimate_memory(header(), n_ctx=100)
    assert estimate.n_ctx == 256
    assert estimate.kv_bytes == 256 * 2 * (64 + 64) * 2
    assert estimate.weights_bytes == 0
    parts = (estimate.weights_bytes, estimate.kv_bytes, estimate.compute_bytes, estimate.overhead_bytes)
    assert estimate.total_bytes == sum(parts)
    assert pw.estimate_memory(header()).n_ctx == 512
    assert pw.estimate_memory(header(), n_ctx=1000, n_seq_max=3).n_ctx == 3 * 512
    assert pw.estimate_memory(header(), n_ctx=1000, n_seq_max=3, kv_unified=True).n_ctx == 1024


def test_fits_compares_with_the_limit_of_a_sandbox() -> None:
    estimate = pw.estimate_memory(header(), n_ctx=256)
    assert estimate.fits()
    assert not estimate.fits(1 << 20)
    assert not pw.estimate_memory(header(block_count=512, embedding_length=8192), n_ctx=1 << 20).fits()


def test_cache_follows_heads_types_and_parameters() -> None:
    base = pw.estimate_memory(header(), n_ctx=256).kv_bytes
    assert pw.estimate_memory(header(**{"attention.head_count_kv": 1}), n_ctx=256).kv_bytes == base // 4
    assert pw.estimate_memory(header(**{"attention.head_count_kv": [2, 4]}), n_ctx=256).kv_bytes == base * 3 // 4
    assert pw.estimate_memory(header(), n_ctx=256, type_k="f32", type_v="f32").kv_bytes == 2 * base
    assert pw.estimate_memory(header(), n_ctx=256, type_k="q8_0", type_v="q8_0").kv_bytes == base * 34 // 64
    assert pw.estimate_memory(header(), n_ctx=256, attention_type="non_causal").kv_bytes == 0


def test_all_parts_of_a_split_model_count(tiny_path: Path, write_tiny: Any, tmp_path: Path) -> None:
    write_tiny(tmp_path / "m.gguf", split_max_tensors=8)
    first = min(tmp_path.glob("m-*.gguf"))
    assert pw.estimate_memory(first).weights_bytes == pw.estimate_memory(tiny_path).weights_bytes


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"block_count": None}, r"llama\.block_count is missing"),
        ({"context_length": None}, r"llama\.context_length is missing"),
        ({"block_count": 10**6}, r"llama\.block_count is 1000000 and not a size"),
        ({"block_count": "two"}, r"llama\.block_count is text and not a size"),
        ({"embedding_length": -1}, r"llama\.embedding_length is -1"),
        ({"embedding_length": 2.5}, r"llama\.embedding_length is 2\.5 and not a size"),
        ({"attention.head_count": [1] * 600}, r"llama\.attention\.head_count is an array of 600"),
        ({"attention.head_count": []}, r"llama\.attention\.head_count is an array of 0"),
    ],
)
def test_absurd_sizes_are_named(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(pw.ModelFormatError, match=f"estimate memory of bytes: {reason}"):
        pw.estimate_memory(header(**changes))


def test_bad_parameters_and_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(pw.RequestError, match="estimate memory: unknown parameter"):
        pw.estimate_memory(header(), n_context=5)
    with pytest.raises(pw.RequestError, match="set type_k"):
        pw.estimate_memory(header(), type_k="q2_K")
    with pytest.raises(pw.ModelFileError, match=r"load missing\.gguf"):
        pw.estimate_memory(tmp_path / "missing.gguf")


NUMBERS = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(0, 300), st.lists(st.integers(-5, 600), max_size=4))
KEYS = (
    "block_count", "embedding_length", "context_length", "attention.head_count", "attention.head_count_kv",
    "attention.key_length", "attention.sliding_window", "attention.sliding_window_pattern", "feed_forward_length",
    "expert_count", "expert_used_count", "vocab_size", "full_attention_interval", "attention.shared_kv_layers",
    "attention.causal",
)  # fmt: skip


@settings(max_examples=200, deadline=1000)
@given(changes=st.dictionaries(st.sampled_from(KEYS), NUMBERS))
def test_any_sizes_give_an_estimate_or_a_model_error(changes: dict[str, Any]) -> None:
    try:
        estimate = pw.estimate_memory(header(**changes), n_ctx=256, swa_full=False)
    except pw.ModelError:
        return
    assert estimate.kv_bytes >= 0
    assert estimate.total_bytes > 0
