"""LoRA adapters and control vectors: applied, swapped, taken away, and refused where they do not fit."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

import pyllama_wasm as pw

from ..tiny_models import write_control_vector, write_lora

PROMPT = [5, 6, 7, 8, 9, 10]
QUERY = {"blk.0.attn_q.weight": (64, 64), "blk.1.ffn_down.weight": (64, 96)}


@pytest.fixture
def context(tiny: pw.Model) -> Iterator[pw.Context]:
    with tiny.context(n_ctx=256, type_k="f32", type_v="f32") as made:
        yield made


@pytest.fixture
def lora_path(tmp_path: Path) -> Path:
    return write_lora(tmp_path / "lora.gguf", QUERY)


def logits(context: pw.Context) -> npt.NDArray[np.float32]:
    context.memory.clear()
    batch = pw.Batch(16)
    batch.add_sequence(PROMPT)
    context.decode(batch)
    return np.array(context.logits())


def test_adapters_are_applied_scaled_swapped_and_taken_away(
    tiny: pw.Model, context: pw.Context, lora_path: Path, tmp_path: Path
) -> None:
    plain = logits(context)
    other_path = write_lora(tmp_path / "other.gguf", {"blk.1.attn_v.weight": (64, 64)}, rank=8, seed=2)
    with tiny.load_lora(lora_path) as lora, tiny.load_lora(other_path.read_bytes()) as other:
        context.set_loras([lora])
        full = logits(context)
        assert np.abs(full - plain).max() > 0.05
        context.set_loras({lora: 0.5})
        half = logits(context)
        assert np.abs(half - plain).max() > 0.02
        assert np.abs(half - full).max() > 0.02
        context.set_loras({lora: 1.0, other: 1.0})
        both = logits(context)
        context.set_loras([other])
        assert np.abs(logits(context) - both).max() > 0.02
        context.set_loras({lora: 0.0})
        assert np.allclose(logits(context), plain, atol=1e-4)
        context.set_loras([lora])
        context.set_loras([])
        assert np.allclose(logits(context), plain, atol=1e-4)


def test_an_adapter_does_what_merged_weights_do(
    tiny_path: Path, write_tiny: Callable[..., Path], tmp_path: Path, lora_path: Path
) -> None:
    tensors = {t.name: np.array(t.data) for t in gguf.GGUFReader(lora_path).tensors}
    merged = write_tiny(tmp_path / "merged.gguf")
    reader = gguf.GGUFReader(merged, "r+")
    for tensor in reader.tensors:
        if tensor.name in QUERY:
            a, b = tensors[f"{tensor.name}.lora_a"], tensors[f"{tensor.name}.lora_b"]
            tensor.data[:] += 8.0 / 4 * b @ a  # alpha 8, rank 4
    reader.data.flush()
    found = []
    for path, loras in ((tiny_path, [lora_path]), (merged, [])):
        with pw.Model(path, n_threads=1) as model, model.context(n_ctx=256, type_k="f32", type_v="f32") as made:
            made.set_loras([model.load_lora(lora) for lora in loras])
            found.append(logits(made))
    assert np.allclose(found[0], found[1], atol=5e-3)


def test_an_adapter_tells_about_itself(tiny: pw.Model, tmp_path: Path) -> None:
    path = write_lora(tmp_path / "alora.gguf", QUERY, invocation_tokens=[5, 9, 200])
    lora = tiny.load_lora(path)
    assert lora.name == "alora.gguf"
    assert lora.metadata["general.type"] == "adapter"
    assert lora.metadata["adapter.type"] == "lora"
    assert float(lora.metadata["adapter.lora.alpha"]) == 8.0
    assert lora.alora_invocation_tokens == (5, 9, 200)
    assert tiny.load_lora(write_lora(tmp_path / "lora.gguf", QUERY)).alora_invocation_tokens == ()


def test_a_closed_adapter_leaves_the_contexts_that_use_it(tiny: pw.Model, context: pw.Context, lora_path: Path) -> None:
    plain = logits(context)
    lora, kept = tiny.load_lora(lora_path), tiny.load_lora(lora_path)
    context.set_loras({lora: 1.0, kept: 0.5})
    lora.close()
    lora.close()
    assert lora.is_closed
    with_kept = logits(context)
    assert np.abs(with_kept - plain).max() > 0.02
    with pytest.raises(pw.ClosedError, match=r"lora\.gguf is closed"):
        context.set_loras([lora])
    assert np.array_equal(logits(context), with_kept)


def test_dropped_adapters_are_freed_unless_a_context_uses_them(
    tiny: pw.Model, context: pw.Context, tmp_path: Path
) -> None:
    path = write_lora(tmp_path / "large.gguf", {"blk.0.attn_q.weight": (64, 64)}, rank=1024)

    def heap() -> int:
        return int(tiny.native.call("pw_heap_bytes") or 0)

    context.set_loras([tiny.load_lora(path)])
    expected = logits(context)
    tiny.load_lora(path)
    before = heap()
    for _ in range(20):
        tiny.load_lora(path)
    gc.collect()
    assert heap() - before < 2 << 20
    assert np.array_equal(logits(context), expected)


def write_raw(path: Path, tensors: dict[str, npt.NDArray[Any]], **metadata: object) -> Path:
    """Write an adapter with anything in it."""
    values = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 1.0}
    writer = gguf.GGUFWriter(path, str(metadata.pop("architecture", "llama")))
    for key, value in {**values, **{k.replace("__", "."): v for k, v in metadata.items()}}.items():
        if value is not None:
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pair(name: str, a: tuple[int, ...], b: tuple[int, ...], dtype: Any = np.float32) -> dict[str, npt.NDArray[Any]]:
    return {f"{name}.lora_a": np.zeros(a, dtype), f"{name}.lora_b": np.zeros(b, dtype)}


GOOD = pair("blk.0.attn_q.weight", (4, 64), (64, 4))


@pytest.mark.parametrize(
    ("tensors", "metadata", "error", "reason"),
    [
        (GOOD, {"architecture": "gpt2"}, pw.UnsupportedModelError, "architecture 'gpt2' and the model is 'llama'"),
        (GOOD, {"general__type": "model"}, pw.ModelFormatError, "general.type is 'model'"),
        (GOOD, {"general__type": 5}, pw.ModelFormatError, "general.type is missing or no string"),
        (GOOD, {"adapter__type": None}, pw.ModelFormatError, "adapter.type is missing"),
        (GOOD, {"adapter__lora__alpha": "8"}, pw.ModelFormatError, "adapter.lora.alpha is no float32"),
        (GOOD, {"adapter__alora__invocation_tokens": 5}, pw.ModelFormatError, "is no array"),
        (GOOD, {"adapter__alora__invocation_tokens": ["a"]}, pw.UnsupportedModelError, "not in the vocabulary"),
        (GOOD, {"adapter__alora__invocation_tokens": [10**6]}, pw.UnsupportedModelError, "not in the vocabulary"),
        ({}, {}, pw.ModelFormatError, "no LoRA tensors"),
        ({"blk.0.attn_q.weight.lora_a": np.zeros((4, 64), np.float32)}, {}, pw.ModelFormatError, "only one of"),
        ({**GOOD, "strange": np.zeros(4, np.float32)}, {}, pw.ModelFormatError, "strange is of no LoRA"),
        (pair("blk.7.attn_q.weight", (4, 64), (64, 4)), {}, pw.UnsupportedModelError, "has no tensor blk.7"),
        (pair("blk.0.attn_q.weight", (4, 32), (64, 4)), {}, pw.UnsupportedModelError, "another model"),
        (pair("blk.0.attn_q.weight", (4, 64), (32, 4)), {}, pw.UnsupportedModelError, "another model"),
        (pair("blk.0.attn_q.weight", (4, 64), (64, 8)), {}, pw.ModelFormatError, "has an A of"),
        (pair("blk.0.attn_q.weight", (2, 4, 64), (2, 64, 4)), {}, pw.UnsupportedModelError, "another model"),
        (pair("blk.0.attn_q.weight", (4, 64), (64, 4), np.int32), {}, pw.UnsupportedModelError, "has type i32"),
        (pair("blk.0.attn_q.weight", (4, 64), (64, 4), np.float64), {}, pw.UnsupportedModelError, "has type f64"),
        (pair("token_embd.weight", (4, 64), (275, 4)), {}, pw.UnsupportedModelError, "token_embd.weight has an A"),
        (pair("token_embd.weight", (275, 4), (64, 8)), {}, pw.UnsupportedModelError, "token_embd.weight has an A"),
    ],
)  # fmt: skip
def test_adapters_that_do_not_fit_are_refused_and_the_engine_lives(
    tiny: pw.Model,
    tmp_path: Path,
    tensors: dict[str, Any],
    metadata: dict[str, Any],
    error: type[Exception],
    reason: str,
) -> None:
    path = write_raw(tmp_path / "bad.gguf", tensors, **metadata)
    with pytest.raises(error, match=reason):
        tiny.load_lora(path)
    assert tiny.generate("a", max_tokens=1).usage.completion_tokens == 1


def test_the_adapter_that_the_others_are_broken_copies_of_is_fine(tiny: pw.Model, tmp_path: Path) -> None:
    with tiny.load_lora(write_raw(tmp_path / "good.gguf", GOOD)) as lora:
        assert lora.metadata["general.architecture"] == "llama"


def test_embeddings_that_are_the_output_too_are_refused(write_tiny: Callable[..., Path], tmp_path: Path) -> None:
    """The guest asserts when it multiplies the flipped pair with hidden states."""
    lora = write_lora(tmp_path / "lora.gguf", {"token_embd.weight": (275, 64)}, is_flipped=True)
    tied = write_tiny(tmp_path / "tied.gguf", without=("output.weight",))
    with pw.Model(tied, n_threads=1) as model, pytest.raises(pw.UnsupportedModelError, match="output weights as well"):
        model.load_lora(lora)


def test_a_model_from_bytes_takes_adapters_too(tiny_path: Path, lora_path: Path) -> None:
    with pw.Model(tiny_path.read_bytes(), n_threads=1) as model, model.context(n_ctx=256) as context:
        plain = logits(context)
        context.set_loras([model.load_lora(lora_path)])
        assert np.abs(logits(context) - plain).max() > 0.05


def test_truncated_and_flipped_adapters_never_end_the_engine(
    tiny: pw.Model, context: pw.Context, lora_path: Path
) -> None:
    data = lora_path.read_bytes()
    rng = np.random.default_rng(1)
    for n in [*range(0, len(data), 199), len(data) - 1]:
        with pytest.raises(pw.ModelError):
            tiny.load_lora(data[:n])
    n_loaded = 0
    for place in rng.integers(0, min(len(data), 1200), 60):
        damaged = bytearray(data)
        damaged[place] ^= 1 << int(rng.integers(8))
        try:
            lora = tiny.load_lora(damaged)
        except pw.ModelError:
            continue
        n_loaded += 1
        context.set_loras([lora])
        logits(context)
        lora.close()
    assert n_loaded > 5
    context.set_loras([])
    assert np.isfinite(logits(context)).all()


def test_one_adapter_none_and_scales_of_numpy_are_taken(context: pw.Context, tiny: pw.Model, lora_path: Path) -> None:
    plain = logits(context)
    lora = tiny.load_lora(lora_path)
    context.set_loras([lora])
    full = logits(context)
    given: Any
    for given in (lora, {lora: np.float32(1)}, {lora: np.float16(1)}, {lora: np.int64(1)}):
        context.set_loras(None)  # type: ignore[arg-type,unused-ignore]
        assert np.allclose(logits(context), plain, atol=1e-4)
        context.set_loras(given)
        assert np.allclose(logits(context), full, atol=1e-4)
    for given in (5, [[lora]], {lora: 10**400}):
        with pytest.raises(pw.RequestError, match="apply adapters"):
            context.set_loras(given)


def test_adapters_are_checked_against_the_file_the_model_came_from(
    write_tiny: Callable[..., Path], lora_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny(tmp_path / "m.gguf", split_max_tensors=8)
    first, *rest = sorted(tmp_path.glob("m-*.gguf"))
    others = [shutil.copy(path, tmp_path / f"part{i}.gguf") for i, path in enumerate((first, *rest))]
    with pw.Model(others, n_threads=1) as listed, pw.Model(first, n_threads=1) as split:
        listed.load_lora(lora_path).close()
        split.load_lora(lora_path).close()
    wide = write_lora(tmp_path / "wide.gguf", {"blk.0.attn_q.weight": (32, 32)})
    with (
        pw.Model([first, *rest], n_threads=1) as listed,
        pytest.raises(pw.UnsupportedModelError, match="and the model has"),
    ):
        listed.load_lora(wide)
    source = write_tiny(tmp_path / "source.gguf")
    (tmp_path / "cwd").mkdir()
    write_tiny(tmp_path / "cwd" / "source.gguf", n_embd=32)
    monkeypatch.chdir(tmp_path / "cwd")
    with source.open("rb") as file, pw.Model(file, n_threads=1) as model:
        model.load_lora(lora_path).close()
        with pytest.raises(pw.UnsupportedModelError, match="and the model has"):
            model.load_lora(wide)


def test_wrong_arguments_are_refused(tiny: pw.Model, context: pw.Context, tiny_path: Path, lora_path: Path) -> None:
    lora = tiny.load_lora(lora_path)
    for scale in (float("nan"), float("inf"), 1e39, "1", True, None):
        with pytest.raises(pw.RequestError, match="is no finite number"):
            context.set_loras({lora: scale})
    with pytest.raises(pw.RequestError, match="load it with model"):
        context.set_loras(["lora.gguf"])  # type: ignore[list-item]
    with (
        pw.Model(tiny_path, n_threads=1) as other,
        other.context(n_ctx=256) as foreign,
        pytest.raises(pw.RequestError, match="loaded for another model object"),
    ):
        foreign.set_loras([lora])
    with pytest.raises(pw.ModelFileError):
        tiny.load_lora(lora_path.with_name("missing.gguf"))
    with pytest.raises(pw.ModelError):
        tiny.load_lora(tiny_path)
    with (
        pw.Model(tiny_path, params=pw.ModelParams(vocab_only=True), n_threads=1) as vocab_only,
        pytest.raises(pw.RequestError, match="without its weights"),
    ):
        vocab_only.load_lora(lora_path)


def test_control_vectors_are_applied_to_their_layers_and_taken_away(context: pw.Context, tmp_path: Path) -> None:
    plain = logits(context)
    direction = np.random.default_rng(3).standard_normal(64).astype(np.float32)
    vector = pw.ControlVector.load(write_control_vector(tmp_path / "vector.gguf", {"direction.1": direction}))
    assert np.array_equal(vector.directions, direction[None])
    context.set_control_vector(vector)
    once = logits(context)
    assert np.abs(once - plain).max() > 0.05
    context.set_control_vector(0.5 * (vector + vector * 3))
    assert np.abs(logits(context) - once).max() > 0.02
    context.set_control_vector(vector, il_start=2, il_end=2)  # the model has no layer 2
    assert np.allclose(logits(context), plain, atol=1e-4)
    context.set_control_vector(vector)
    context.set_control_vector(None)
    assert np.allclose(logits(context), plain, atol=1e-4)


def test_control_vectors_that_do_not_fit_are_refused(context: pw.Context, tmp_path: Path) -> None:
    one = np.ones(64, np.float32)
    for rows in (np.ones((1, 32)), np.ones((3, 64))):
        with pytest.raises(pw.RequestError, match="another model"):
            context.set_control_vector(pw.ControlVector(rows))
    for bad in (one, [["a"]], np.full((1, 64), np.nan), np.zeros((0, 64))):
        with pytest.raises(pw.RequestError, match="make a control vector"):
            pw.ControlVector(bad)
    with pytest.raises(pw.RequestError, match="ndarray is no control vector"):
        context.set_control_vector(one[None])  # type: ignore[arg-type]
    for start, end in ((0, 1), (1, 3), (True, 1), (1, 1.5)):
        with pytest.raises(pw.RequestError, match="is not one from 1 to 2"):
            context.set_control_vector(pw.ControlVector(one[None]), start, end)  # type: ignore[arg-type]
    for tensors in (
        {},
        {"direction.0": one},
        {"direction.x": one},
        {"direction.99999": one},
        {"direction.1": one.astype(np.float16)},
        {"direction.1": np.ones((2, 64), np.float32)},
        {"direction.1": one, "direction.2": one[:32]},
        {"direction.1": np.full(64, np.inf, np.float32)},
    ):
        with pytest.raises(pw.ModelFormatError):
            pw.ControlVector.load(write_control_vector(tmp_path / "bad.gguf", tensors))
    with pytest.raises(pw.RequestError, match="their widths"):
        pw.ControlVector(one[None]) + pw.ControlVector(one[None, :32])
    assert np.isfinite(logits(context)).all()
