"""``Struct``: named fields over the bytes the guest sees."""

from __future__ import annotations

import struct

import pytest

from pyllama_wasm import _abi
from pyllama_wasm.errors import RequestError
from pyllama_wasm.native import Struct


def test_a_new_struct_is_zero() -> None:
    params = Struct("llama_context_params")
    assert bytes(params) == bytes(_abi.STRUCTS["llama_context_params"].size)
    assert params["n_ctx"] == 0
    assert params["embeddings"] is False


def test_fields_lie_where_c_has_them() -> None:
    data = Struct("llama_token_data")
    data["id"], data["logit"], data["p"] = -7, 1.5, 0.25
    assert bytes(data) == struct.pack("<iff", -7, 1.5, 0.25)
    assert (data["id"], data["logit"], data["p"]) == (-7, 1.5, 0.25)


def test_pointers_take_none_and_addresses() -> None:
    batch = Struct("llama_batch")
    batch["token"] = 0xFFFFFFF0
    assert batch["token"] == 0xFFFFFFF0
    batch["token"] = None
    assert batch["token"] == 0


def test_function_pointers_take_anything_with_an_index() -> None:
    class Target:
        function = 17

    params = Struct("llama_model_params")
    params["progress_callback"] = Target()
    assert params["progress_callback"] == 17


def test_char_arrays_are_text() -> None:
    override = Struct("llama_model_kv_override")
    override["key"] = "tokenizer.ggml.add_bos_token"
    override["val_bool"] = True
    assert override["key"] == "tokenizer.ggml.add_bos_token"
    override["key"] = "é"
    assert override["key"] == "é"  # what was there before is gone
    with pytest.raises(RequestError, match=r"set llama_model_kv_override\.key: expected at most 127 bytes"):
        override["key"] = "x" * 128


def test_unions_share_their_bytes() -> None:
    override = Struct("llama_model_kv_override")
    override["val_f64"] = 1.0
    assert override["val_i64"] == 0x3FF0000000000000


def test_arrays_are_tuples_and_set_as_a_whole() -> None:
    params = Struct("ggml_threadpool_params")
    mask = tuple(i % 3 == 0 for i in range(512))
    params["cpumask"] = mask
    assert params["cpumask"] == mask
    with pytest.raises(RequestError, match="expected 512 values, got 2"):
        params["cpumask"] = (True, False)
    tensor = Struct("ggml_tensor")
    before = bytes(tensor)
    with pytest.raises(RequestError, match="ne"):
        tensor["ne"] = (1, 2, 3, 1 << 63)
    assert bytes(tensor) == before


def test_nested_structs_by_dotted_name_and_as_a_whole() -> None:
    options = Struct("mtmd_helper_init_opt")
    options["video_params.fps_target"] = 2.5
    inner = options["video_params"]
    assert isinstance(inner, Struct)
    assert inner["fps_target"] == 2.5
    inner["timestamp_interval_ms"] = 1 << 40
    options["video_params"] = inner
    assert options["video_params.timestamp_interval_ms"] == 1 << 40
    with pytest.raises(TypeError, match="expected a struct mtmd_helper_video_init_params"):
        options["video_params"] = Struct("llama_batch")


def test_nested_structs_without_a_name_of_their_own() -> None:
    params = Struct("ggml_opt_optimizer_params")
    params["adamw.beta1"] = 0.5
    params["sgd.alpha"] = 0.125
    assert struct.unpack("<7f", bytes(params)) == (0.0, 0.5, 0.0, 0.0, 0.0, 0.125, 0.0)


def test_an_unknown_field_names_the_struct() -> None:
    with pytest.raises(KeyError, match="struct llama_batch has no field tokens"):
        Struct("llama_batch")["tokens"] = 1
    with pytest.raises(KeyError, match="there is no struct llama_bitch"):
        Struct("llama_bitch")


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("llama_context_params", "n_ctx", -1),
        ("llama_context_params", "n_ctx", 1 << 32),
        ("llama_context_params", "n_threads", 1 << 31),
        ("llama_context_params", "rope_freq_base", 1e300),
        ("llama_batch", "token", -4),
    ],
)
def test_a_value_that_does_not_fit_is_refused(name: str, field: str, value: object) -> None:
    value_before = Struct(name)
    with pytest.raises(RequestError, match=rf"set {name}\.{field}"):
        value_before[field] = value
    assert value_before == Struct(name)


def test_a_value_of_the_wrong_kind_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"set llama_context_params\.n_ctx"):
        Struct("llama_context_params")["n_ctx"] = 1.5
    with pytest.raises(TypeError, match=r"set llama_model_kv_override\.key"):
        Struct("llama_model_kv_override")["key"] = 5


def test_bytes_round_trip_and_equality() -> None:
    one = Struct("llama_logit_bias")
    one["token"], one["bias"] = 5, -1.0
    two = Struct("llama_logit_bias", bytes(one))
    assert one == two
    two["token"] = 6
    assert one != two
    assert one["token"] == 5
    assert list(one) == ["token", "bias"]
    assert "bias" in one
    assert repr(one) == "Struct(llama_logit_bias: token=5, bias=-1.0)"
    with pytest.raises(RequestError, match="3 bytes instead of 8"):
        Struct("llama_logit_bias", b"abc")


@pytest.mark.parametrize("name", sorted(_abi.STRUCTS))
def test_every_struct_reads_back_what_was_written(name: str) -> None:
    value = Struct(name)
    for field in value:
        value[field] = value[field]
    assert value == Struct(name)
    assert len(value) == _abi.STRUCTS[name].size
