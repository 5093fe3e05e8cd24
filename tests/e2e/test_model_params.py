"""What a model says of itself, and metadata that the caller overrides."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import pytest

import pyllama_wasm as pw


def test_every_property_of_the_real_model(model: pw.Model) -> None:
    assert (model.n_embd_inp, model.n_embd_out, model.n_layer_nextn, model.n_swa) == (576, 576, 0, 0)
    assert (model.rope_type, model.rope_freq_scale_train, model.ftype) == ("norm", 1.0, "Q4_1")
    assert (model.n_cls_out, model.cls_labels, model.decoder_start_token) == (1, (None,), None)
    assert (model.has_encoder, model.has_decoder) == (False, True)
    assert (model.is_recurrent, model.is_hybrid, model.is_diffusion) == (False, False, False)
    assert model.get_chat_template() == model.chat_template
    assert model.get_chat_template("tool_use") is None
    assert model.sampling_metadata == {}
    with pytest.raises(pw.RequestError, match="'a\\\\x00b' is not a name"):
        model.get_chat_template("a\0b")


def rewrite(source: Path, path: Path, add: Callable[[gguf.GGUFWriter], None]) -> Path:
    """Write ``source`` again with more metadata."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        writer.add_key_value(field.name, field.contents(), field.types[0], field.types[-1] if field.types[1:] else None)
    add(writer)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def annotated(tiny_path: Path, tmp_path: Path) -> Path:
    """Return a tiny model with named chat templates, classifier labels and recommended sampling."""

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_chat_template([{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}])
        writer.add_array("llama.classifier.output_labels", ["good", "bad"])
        writer.add_float32("general.sampling.temp", 0.25)
        writer.add_int32("general.sampling.top_k", 7)

    return rewrite(tiny_path, tmp_path / "annotated.gguf", add)


def test_named_templates_labels_and_sampling_metadata(annotated: Path) -> None:
    with pw.Model(annotated, n_threads=1) as model:
        assert (model.chat_template, model.get_chat_template("tool_use")) == ("D", "T")
        assert model.get_chat_template("rag") is None
        assert (model.n_cls_out, model.cls_labels) == (2, ("good", "bad"))
        assert {key: float(value) for key, value in model.sampling_metadata.items()} == {"temp": 0.25, "top_k": 7}


def test_overridden_metadata_is_what_the_model_uses(tiny_path: Path) -> None:
    overrides: dict[str, Any] = {
        "llama.context_length": 333,
        "tokenizer.ggml.eos_token_id": 7,
        "llama.rope.freq_base": 123.0,
    }
    with pw.Model(tiny_path, params=pw.ModelParams(kv_overrides=overrides), n_threads=1) as model:
        assert (model.n_ctx_train, model.vocab.eos) == (333, 7)
        changed = model.generate("abc", max_tokens=6, temperature=0, ignore_eos=True).tokens
    with pw.Model(tiny_path, n_threads=1) as model:
        assert (model.n_ctx_train, model.vocab.eos) == (512, 2)
        assert model.generate("abc", max_tokens=6, temperature=0, ignore_eos=True).tokens != changed


def test_bool_and_text_can_be_overridden(tiny_path: Path) -> None:
    overrides: dict[str, Any] = {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.model": "no_such_tokenizer"}
    with pw.Model(tiny_path, params=pw.ModelParams(kv_overrides={"tokenizer.ggml.add_bos_token": False})) as model:
        assert not model.vocab.add_bos
    with pytest.raises(pw.UnsupportedModelError, match="no_such_tokenizer"):
        pw.Model(tiny_path, params=pw.ModelParams(kv_overrides=overrides))


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("llama.context_length", 2.0, "is uint32 in the file and cannot be overridden by a float"),
        ("llama.context_length", True, "is uint32 in the file and cannot be overridden by a bool"),
        ("general.architecture", 1, "is string in the file and cannot be overridden by a int"),
        ("llama.attention.layer_norm_rms_epsilon", 1, "is float32 in the file"),
        ("tokenizer.ggml.tokens", "x", "is an array in the file"),
    ],
)
def test_override_of_another_kind_is_refused_instead_of_ignored(
    tiny_path: Path, key: str, value: Any, reason: str
) -> None:
    with pytest.raises(pw.RequestError, match=f"load tiny.gguf: {key} {reason}"):
        pw.Model(tiny_path, params=pw.ModelParams(kv_overrides={key: value}))


@pytest.mark.parametrize(
    "overrides",
    [
        {"a" * 128: 1},
        {"": 1},
        {"a\0": 1},
        {7: 1},
        {"a": "x" * 128},
        {"a": "é" * 64},
        {"a": "x\0"},
        {"a": 2**63},
        {"a": float("nan")},
        {"a": None},
        {"a": [1]},
        "text",
    ],
)
def test_overrides_that_do_not_fit_the_struct_are_refused(overrides: Any) -> None:
    with pytest.raises(pw.RequestError, match="set kv_overrides"):
        pw.ModelParams(kv_overrides=overrides)


def test_longest_override_arrives_whole(tiny_path: Path) -> None:
    name = "n" * 127
    with pytest.raises(pw.UnsupportedModelError, match=name):
        pw.Model(tiny_path, params=pw.ModelParams(kv_overrides={"tokenizer.ggml.model": name}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.attention.head_count", 0),
        ("llama.attention.head_count", 3),
        ("llama.attention.head_count_kv", -1),
        ("llama.block_count", 2**40),
        ("llama.block_count", 600),
        ("llama.embedding_length", -1),
        ("llama.context_length", -5),
        ("llama.rope.dimension_count", 2**31),
        ("llama.expert_count", 10**6),
        ("llama.attention.key_length", 2**31),
        ("tokenizer.ggml.bos_token_id", 10**6),
    ],
)
def test_hostile_overrides_end_in_an_exception_or_in_a_model(tiny_path: Path, key: str, value: int) -> None:
    with suppress(pw.PyllamaError), pw.Model(tiny_path, params=override(key, value), n_threads=1) as model:
        model.generate("abc", max_tokens=2, temperature=0)
    with pw.Model(tiny_path, n_threads=1) as model:
        assert model.generate("abc", max_tokens=2, temperature=0).tokens


def override(key: str, value: int) -> pw.ModelParams:
    return pw.ModelParams(kv_overrides={key: value})


def test_large_numbers_of_classifier_outputs_are_bounded(tiny_path: Path, tmp_path: Path) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_array("llama.classifier.output_labels", ["x"] * 5000)

    with pw.Model(rewrite(tiny_path, tmp_path / "labels.gguf", add), n_threads=1) as model:
        assert model.n_cls_out == len(model.cls_labels) == 4096
