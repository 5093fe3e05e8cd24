"""The arithmetic of measurements: spreads, what a model costs, and the machine's limits it is held against."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

import pyllama_wasm as pw
from pyllama_wasm import measure

COST = measure.ModelCost(weights_bytes=1_000, n_weights=400, n_output_weights=100, kv_bytes_per_token=2.0)
LIMITS = measure.MachineLimits(n_threads=1, read_bytes_per_s=1e6, ops_per_s=1e6)


def test_a_spread_has_the_median_and_the_quartiles() -> None:
    spread = measure.Spread.of([5.0, 1.0, 4.0, 2.0, 3.0])
    assert spread == measure.Spread(n=5, median=3.0, low=1.0, high=5.0, lower_quartile=2.0, upper_quartile=4.0)
    assert measure.Spread.of([7.0]) == measure.Spread(1, 7.0, 7.0, 7.0, 7.0, 7.0)
    assert measure.Spread.of([1.0, 2.0]).median == 1.5
    with pytest.raises(pw.RequestError, match="there are none"):
        measure.Spread.of([])


def test_decoding_is_held_against_the_bytes_read() -> None:
    assert COST.decode_bytes(0) == 1_000 and COST.decode_bytes(500) == 2_000
    assert LIMITS.decode(COST, 0) == 1_000 and LIMITS.decode(COST, 500) == 500
    assert LIMITS.share("decode_at_500", 250.0, COST) == 0.5


def test_prefill_is_held_against_the_products_done() -> None:
    # of a prompt, only the last token meets the output matrix
    assert COST.prefill_ops(10) == 2 * (400 * 10 + 100)
    assert LIMITS.prefill(COST, 10) == pytest.approx(10 * 1e6 / 8_200)
    assert LIMITS.share("prefill_10", 10 * 1e6 / 8_200 / 4, COST) == pytest.approx(0.25)


def test_figures_without_a_limit_have_no_share() -> None:
    assert LIMITS.share("first_token_s", 1.0, COST) is None
    assert LIMITS.share("sequences_8", 1.0, COST) is None


def test_the_cost_of_a_model_counts_what_a_token_reads(write_tiny: Callable[..., Path], tmp_path: Path) -> None:
    n_embd, n_ff, n_layer = 64, 96, 2
    path = write_tiny(tmp_path / "own.gguf")
    n_vocab = len(pw.GGUFReader(path).metadata["tokenizer.ggml.tokens"])  # type: ignore[arg-type]
    matrices = n_layer * (4 * n_embd * n_embd + 3 * n_embd * n_ff)
    norms = (2 * n_layer + 1) * n_embd
    cost = measure.model_cost(path)
    assert (cost.n_weights, cost.n_output_weights) == (matrices, n_vocab * n_embd)
    assert cost.weights_bytes == 4 * (matrices + norms + n_vocab * n_embd)
    assert cost.kv_bytes_per_token == n_layer * 2 * n_embd * 2
    assert measure.model_cost(path, "f32").kv_bytes_per_token == 2 * cost.kv_bytes_per_token

    tied = measure.model_cost(write_tiny(tmp_path / "tied.gguf", without=("output.weight",)))
    assert replace(tied, weights_bytes=0) == replace(cost, weights_bytes=0) and tied.weights_bytes == cost.weights_bytes


def test_of_experts_those_a_token_uses_are_counted(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "experts.gguf", "llama")
    for key, value in {
        "context_length": 64,
        "embedding_length": 32,
        "block_count": 1,
        "feed_forward_length": 64,
    }.items():
        writer.add_uint32(f"llama.{key}", value)
    for key, value in {"attention.head_count": 1, "expert_count": 8, "expert_used_count": 2}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_token_list(["a", "b"])
    writer.add_tensor("token_embd.weight", np.zeros((2, 32), np.float32))
    writer.add_tensor("blk.0.ffn_up_exps.weight", np.zeros((8, 64, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    cost = measure.model_cost(tmp_path / "experts.gguf")
    assert cost.n_weights == 2 * 64 * 32 and cost.weights_bytes == 4 * (2 * 64 * 32 + 2 * 32)


def test_the_limits_of_this_machine_are_positive_numbers() -> None:
    limits = measure.measure_limits(1)
    assert limits.n_threads == 1 and limits.read_bytes_per_s > 1e6 and limits.ops_per_s > 1e6


@pytest.mark.parametrize("n_threads", [0, -1, True, 1.5, "2", 1 << 40])
def test_limits_are_those_of_some_threads(n_threads: object) -> None:
    with pytest.raises(pw.RequestError, match="n_threads"):
        measure.measure_limits(n_threads)  # type: ignore[arg-type]


def test_a_prompt_as_long_as_the_training_is_measured(write_tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "short.gguf", n_ctx=256)
    workload = measure.Workload(prefill=(256,), n_decode=2, depths=(0,), n_sequences=0)
    assert set(measure.measure_speed(path, workload)) == {"prefill_256", "decode_at_0", "first_token_s"}


def test_a_workload_keeps_what_a_model_was_trained_for() -> None:
    workload = measure.Workload(prefill=(512, 128, 128), depths=(1024, 0), n_decode=16)
    assert workload.prefill == (128, 512) and workload.depths == (0, 1024)
    fitted = workload.fit(600)
    assert fitted.prefill == (128, 512) and fitted.depths == (0,)
    assert workload.fit(128) == replace(fitted, prefill=(128,))
    assert workload.n_ctx == 1280 and workload.fit(64).n_ctx == 256


@pytest.mark.parametrize(
    "changes",
    [
        {"n_threads": 0}, {"n_threads": True}, {"n_decode": 0}, {"n_decode": 4097}, {"n_sequences": -1},
        {"prefill": (0,)}, {"prefill": (1 << 21,)}, {"depths": (-1,)}, {"depths": ("x",)}, {"cache_type": "q9_9"},
        {"prefill": 128}, {"depths": "128"}, {"prefill": None},
    ],
)  # fmt: skip
def test_a_workload_refuses_what_makes_no_sense(changes: dict[str, object]) -> None:
    with pytest.raises(pw.RequestError):
        measure.Workload(**changes)  # type: ignore[arg-type]


def test_a_program_that_dies_is_an_error_that_says_how() -> None:
    python = [sys.executable, "-c"]
    with pytest.raises(pw.HostError, match=r"^try: its process ended with exit code 3: the reason$"):
        measure.run([*python, "import sys; print('x'); print('the reason', file=sys.stderr); sys.exit(3)"], "try")
    with pytest.raises(pw.HostError, match="signal 6: it said nothing"):
        measure.run([*python, "import os; os.abort()"], "try")
    with pytest.raises(pw.HostError, match="exit code 0"):
        measure.run([*python, "print('no figures')"], "try")
    fault = """import json; print(json.dumps({"error": ["MemoryFault", ["read", "out of bounds", ""]]}))"""
    with pytest.raises(pw.HostError, match=r"^read: out of bounds$"):  # a class that users do not see
        measure.run([*python, fault], "try")
    with pytest.raises(pw.HostError, match="cannot be started"):
        measure.run(["/nowhere/at/all"], "try")


def test_an_error_over_there_is_the_same_error_here(tmp_path: Path) -> None:
    with pytest.raises(pw.ModelFileError, match="No such file") as caught:
        measure.in_process("speed", tmp_path / "missing.gguf")
    assert caught.value.hint == "check the path"
    (tmp_path / "bad.gguf").write_bytes(b"not a model at all" * 10)
    with pytest.raises(pw.ModelFormatError):
        measure.in_process("memory", tmp_path / "bad.gguf")
    with pytest.raises(pw.RequestError, match="is not one of speed"):
        measure.in_process("fly", tmp_path)


def test_the_child_imports_nothing_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numpy.py").write_text("raise SystemExit('planted')")
    monkeypatch.chdir(tmp_path)
    assert measure.in_process("limits", "x")["n_threads"] == 1
