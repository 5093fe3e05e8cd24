"""The memory estimate against what the sandbox really takes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pyllama_wasm as pw
from pyllama_wasm.host import Engine
from pyllama_wasm.native import Native

from . import architectures
from .shapes import Shape

MIB = 1 << 20

# Shapes of models people run, with other vocabularies, heads and experts; weights are zeros.
SHAPES = {
    "llama-1b": Shape("llama", 16, 2048, 32, 8, 8192, 128256, is_tied=True),
    "qwen2-0.5b": Shape("qwen2", 24, 896, 14, 2, 4864, 151936, kind="q8_0", is_tied=True, bias=True),
    "tinyllama": Shape("llama", 22, 2048, 32, 4, 5632, 32000),
    "experts": Shape("llama", 12, 1024, 16, 8, 1792, 32000, n_expert=8),
    "gemma3-1b": Shape(
        "gemma3", 26, 1152, 4, 1, 6912, 262144, head_dim=256, is_tied=True, qk_norm=True, post_norm=True,
        metadata={"gemma3.attention.sliding_window": 512},
    ),
    "small": Shape("llama", 4, 256, 4, 4, 768, 4096, kind="f16"),
}  # fmt: skip
CONTEXTS: dict[str, dict[str, Any]] = {
    "4096": {"n_ctx": 4096},
    "one output": {"n_ctx": 4096, "n_outputs_max": 1},
    "small batch": {"n_ctx": 8192, "n_ubatch": 128, "type_k": "f32", "type_v": "f32"},
    "no flash": {"n_ctx": 2048, "n_outputs_max": 1, "flash_attn_type": "disabled"},
    "sequences": {"n_ctx": 4096, "n_seq_max": 4, "type_k": "q8_0", "type_v": "q8_0"},
}


PLAIN = pw.ModelParams(use_extra_bufts=False)


def measure(path: Path, **changes: Any) -> tuple[int, dict[str, float]]:
    """Return what the guest takes, mapped weights included, and llama.cpp's own numbers in MiB."""
    lines: list[str] = []
    with pw.Model(path, params=PLAIN, n_threads=2) as model:
        model.engine.add_log_handler(lambda _level, line: lines.append(line))
        with model.context(**changes) as context:
            mapped = sum(end - start for start, end in model.engine.memory.mapped)
            taken = mapped + int(model.native.call("pw_heap_bytes") or 0)
            assert context.n_ctx >= changes["n_ctx"]
    return taken, {kind: buffer_size(lines, kind) for kind in ("KV", "compute")}


def buffer_size(lines: list[str], kind: str) -> float:
    """Return the sum of the buffers of one kind that llama.cpp logged, in MiB."""
    return sum(float(n) for line in lines for n in re.findall(rf"{kind} buffer size = +([\d.]+) MiB", line))


def check(path: Path, **changes: Any) -> None:
    compare(pw.estimate_memory(path, **changes), *measure(path, **changes))


def compare(estimate: pw.MemoryEstimate, taken: int, logged: dict[str, float]) -> None:
    numbers = f"estimated {estimate.total_bytes / MIB:.1f} MiB, really {taken / MIB:.1f}: {estimate}, {logged}"
    assert estimate.kv_bytes / MIB == pytest.approx(logged["KV"], abs=0.05), numbers
    assert estimate.compute_bytes / MIB == pytest.approx(logged["compute"], rel=0.1), numbers
    assert estimate.total_bytes == pytest.approx(taken, rel=0.1), numbers


@pytest.mark.parametrize("changes", CONTEXTS.values(), ids=CONTEXTS)
def test_real_model_takes_what_was_estimated(smollm2_path: Path, changes: dict[str, Any]) -> None:
    check(smollm2_path, **changes)


@pytest.mark.parametrize("context", ["4096", "no flash", "sequences"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_other_shapes_take_what_was_estimated(tmp_path: Path, shape: Shape, context: str) -> None:
    check(shape.write(tmp_path / "m.gguf"), **CONTEXTS[context])


def test_sliding_window_layers_may_keep_a_short_cache(tmp_path: Path) -> None:
    check(SHAPES["gemma3-1b"].write(tmp_path / "m.gguf"), n_ctx=8192, swa_full=False, n_outputs_max=1)


def test_decoding_a_whole_batch_stays_within_the_estimate(smollm2_path: Path) -> None:
    params = pw.ContextParams(n_ctx=2048, n_ubatch=64, n_outputs_max=1)
    with pw.Model(smollm2_path, params=PLAIN, n_threads=2) as model, model.context(params) as context:
        batch = pw.Batch(64)
        for pos in range(64):
            batch.add(100 + pos, pos=pos, seq_ids=[0], logits=pos == 63)
        context.decode(batch)
        mapped = sum(end - start for start, end in model.engine.memory.mapped)
        taken = mapped + int(model.native.call("pw_heap_bytes") or 0)
    assert pw.estimate_memory(smollm2_path, params).total_bytes == pytest.approx(taken, rel=0.1)


@pytest.mark.parametrize(
    ("taken", "kv", "compute"), [(115, 40.0, 20.0), (85, 40.0, 20.0), (100, 41.0, 20.0), (100, 40.0, 23.0)]
)
def test_comparison_notices_a_part_that_is_off(taken: int, kv: float, compute: float) -> None:
    estimate = pw.MemoryEstimate(10 * MIB, 40 * MIB, 20 * MIB, 30 * MIB, 4096)
    compare(estimate, 100 * MIB, {"KV": 40.0, "compute": 20.0})
    with pytest.raises(AssertionError, match="really"):
        compare(estimate, taken * MIB, {"KV": kv, "compute": compute})


# Architectures whose layers share or compress their cache in ways of their own.
OWN_WAYS = {"qwen4exp-moe", "glm5-next-moe", "minimax-01-moe", "graniteswitch"}


class Sandbox:
    """One engine that makes all models, and its log."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.native = Native(Engine(n_threads=1))
        self.native.engine.add_log_handler(lambda _level, line: self.lines.append(line))

    def cache_mib(self, case: architectures.Case) -> float:
        self.lines.clear()
        self.native.engine.run(lambda: architectures.make(self.native, case))
        return buffer_size(self.lines, "(?:KV|RS)")


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    made = Sandbox()
    yield made
    made.native.engine.close()


def test_cache_of_every_architecture_is_known(sandbox: Sandbox) -> None:
    wrong = {}
    for case in architectures.load():
        estimate = pw.estimate_memory(case.metadata, n_ctx=64, n_batch=32, n_ubatch=32)
        estimated, real = estimate.kv_bytes / MIB, sandbox.cache_mib(case)
        if abs(estimated - real) > 0.011:  # the log has two decimals for each of two caches
            wrong[case.name] = (round(estimated, 3), real)
    assert set(wrong) <= OWN_WAYS, wrong


@pytest.mark.parametrize("kind", ["demo", "tied"])
def test_a_repacked_copy_takes_what_was_estimated(kind: str, smollm2_path: Path, tmp_path: Path) -> None:
    path = smollm2_path
    if kind == "tied":
        shape = Shape("llama", 2, 256, 4, 4, 768, 4096, kind="q6_K", is_tied=True)
        path = shape.write(tmp_path / "tied.gguf")
    taken = []
    for wish in (False, True):
        with pw.Model(path, params=pw.ModelParams(use_extra_bufts=wish), n_threads=2, load="snapshot") as model:
            mapped = sum(end - start for start, end in model.engine.memory.mapped)
            taken.append(mapped + int(model.native.call("pw_heap_bytes") or 0))
    estimate = pw.estimate_memory(path, n_ctx=256)
    assert 0 < estimate.repacked_bytes == pytest.approx(taken[1] - taken[0], rel=0.05, abs=MIB)
