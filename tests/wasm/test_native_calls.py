"""Typed calls: arguments in, results out, structs, strings, guest memory, errors as exceptions."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from pyllama_wasm import _abi
from pyllama_wasm.errors import (
    ClosedError,
    GuestAbortError,
    GuestDiedError,
    GuestException,
    HostError,
    OutOfMemoryError,
    RequestError,
)
from pyllama_wasm.host import Engine
from pyllama_wasm.native import Native, Struct
from pyllama_wasm.native.frame import FRAME_BYTES


@pytest.fixture(scope="module")
def native() -> Iterator[Native]:
    with Engine(n_threads=1) as engine:
        yield Native(engine)


def growth(native: Native, use: Callable[[], None], n: int) -> int:
    """Return by how many bytes the guest's heap grows in ``n`` more uses."""
    for _ in range(3):
        use()
    before = native.call("pw_heap_bytes") or 0
    for _ in range(n):
        use()
    return (native.call("pw_heap_bytes") or 0) - before


# -- arguments and results --------------------------------------------------------------------------------------------


def test_scalars_go_in_and_come_out(native: Native) -> None:
    assert native.ggml_blck_size(_abi.GGML_TYPE_Q8_0) == 32
    assert native.ggml_row_size(_abi.GGML_TYPE_F32, 1 << 20) == 1 << 22
    assert native.ggml_is_quantized(_abi.GGML_TYPE_Q8_0) is True
    assert native.ggml_is_quantized(_abi.GGML_TYPE_F32) is False
    assert native.ggml_fp16_to_fp32(0x3C00) == 1.0
    assert native.ggml_fp32_to_fp16(-2.0) == 0xC000
    assert native.llama_time_us() > 0
    assert native.llama_backend_init() is None


def test_strings_are_copied_in_and_out(native: Native) -> None:
    assert native.llama_load_mode_from_str("mmap") == _abi.LLAMA_LOAD_MODE_MMAP
    assert native.llama_load_mode_from_str(b"none") == _abi.LLAMA_LOAD_MODE_NONE
    assert native.string(native.llama_load_mode_name(_abi.LLAMA_LOAD_MODE_MLOCK)) == "mlock"
    with native.array(b"mmap\0") as ptr:
        assert native.llama_load_mode_from_str(ptr) == _abi.LLAMA_LOAD_MODE_MMAP
    assert native.string(0) == ""


def test_long_strings_do_not_need_the_frame(native: Native) -> None:
    text = "é" * FRAME_BYTES

    def use() -> None:
        context = native.gguf_init_empty()
        native.gguf_set_val_str(context, "key", text)
        assert native.string(native.gguf_get_val_str(context, native.gguf_find_key(context, "key"))) == text
        native.gguf_free(context)

    assert growth(native, use, 400) == 0


def test_pointers_are_unsigned(native: Native) -> None:
    ptr = native.alloc(64)
    try:
        assert 0 < ptr < native.engine.memory.size_bytes
        assert ptr % 16 == 0
    finally:
        native.free(ptr)


def test_64_bit_values_keep_their_sign(native: Native) -> None:
    context = native.gguf_init_empty()
    native.gguf_set_val_i64(context, "i", -(1 << 63))
    native.gguf_set_val_u64(context, "u", (1 << 64) - 1)
    native.gguf_set_val_f64(context, "f", 0.1)
    native.gguf_set_val_u32(context, "w", (1 << 32) - 1)
    native.gguf_set_val_i8(context, "b", -128)

    def value(code: str, key: str) -> object:
        return getattr(native, f"gguf_get_val_{code}")(context, native.gguf_find_key(context, key))

    assert value("i64", "i") == -(1 << 63)
    assert value("u64", "u") == (1 << 64) - 1
    assert value("f64", "f") == 0.1
    assert value("u32", "w") == (1 << 32) - 1
    assert value("i8", "b") == -128
    native.gguf_free(context)


def test_structs_by_value_in_and_out(native: Native) -> None:
    params = native.ggml_threadpool_params_default(3)
    assert isinstance(params, Struct)
    assert (params.name, params["n_threads"], params["paused"]) == ("ggml_threadpool_params", 3, False)
    half = native.ggml_fp32_to_bf16(1.0)
    assert half["bits"] == 0x3F80
    assert native.ggml_bf16_to_fp32(half) == 1.0
    batch = native.llama_batch_init(4, 0, 1)
    assert batch["token"] != 0
    assert batch["embd"] == 0
    native.llama_batch_free(batch)


def test_a_numpy_integer_is_an_integer(native: Native) -> None:
    assert native.ggml_blck_size(np.int64(_abi.GGML_TYPE_Q8_0)) == 32


@pytest.mark.parametrize("value", [-1, 1 << 32])
def test_a_number_that_does_not_fit_names_function_and_argument(native: Native, value: int) -> None:
    with pytest.raises(RequestError, match=rf"ggml_type_size: type: {value} does not fit u32"):
        native.ggml_type_size(value)


def test_arguments_of_the_wrong_kind_are_type_errors(native: Native) -> None:
    with pytest.raises(TypeError, match="ggml_type_size: type:"):
        native.ggml_type_size("Q8_0")
    with pytest.raises(TypeError, match="ggml_type_size: type:"):
        native.ggml_type_size(8.0)
    with pytest.raises(TypeError, match="expected a struct llama_batch, got int"):
        native.llama_batch_free(0)
    with pytest.raises(TypeError, match="expected a struct llama_batch"):
        native.llama_batch_free(Struct("llama_logit_bias"))


def test_a_wrong_number_of_arguments_shows_the_signature(native: Native) -> None:
    with pytest.raises(TypeError, match=r"ggml_row_size\(type, ne\) takes 2 arguments, got 1"):
        native.ggml_row_size(0)
    with pytest.raises(TypeError, match=r"llama_version\(\) takes 0 arguments, got 1"):
        native.llama_version(1)


def test_a_nul_inside_a_string_is_refused(native: Native) -> None:
    with pytest.raises(RequestError, match="llama_load_mode_from_str: str: a C string cannot hold a NUL"):
        native.llama_load_mode_from_str("mm\0ap")
    with pytest.raises(RequestError, match="pw_json_schema_to_grammar: a C string cannot hold a NUL"):
        native.call("pw_json_schema_to_grammar", "{}\0")


def test_an_unknown_function_is_an_attribute_error(native: Native) -> None:
    with pytest.raises(AttributeError, match="exports no function llama_decoed"):
        _ = native.llama_decoed
    with pytest.raises(HostError, match="pw_gone"):
        native.call("pw_gone")


def test_functions_are_listed_kept_and_documented(native: Native) -> None:
    assert "llama_decode" in dir(native)
    assert native.llama_decode is native.llama_decode
    assert native.llama_decode.__name__ == "llama_decode"
    assert "llama_decode(ctx: ptr, batch: struct:llama_batch) -> i32" in str(native.llama_decode.__doc__)
    assert "Process a batch of tokens." in str(native.llama_decode.__doc__)


# -- guest memory -----------------------------------------------------------------------------------------------------


def test_arrays_are_copied_in_c_order(native: Native) -> None:
    values = np.arange(12, dtype=np.int32).reshape(3, 4)
    with native.array(values.T) as ptr:
        assert native.engine.memory.view(ptr, (4, 3), np.int32).tolist() == values.T.tolist()
    with native.array(b"") as ptr:
        assert ptr


def test_scratch_and_arrays_are_given_back(native: Native) -> None:
    def use() -> None:
        with native.scratch(1 << 20), native.array(bytes(1 << 18)):
            pass

    assert growth(native, use, 50) == 0


def test_structs_are_written_and_read_in_place(native: Native) -> None:
    bias = native.struct("llama_logit_bias", token=7, bias=0.5)
    with native.array(bytes(16)) as ptr:
        native.write_struct(ptr + 8, bias)
        assert native.read_struct("llama_logit_bias", ptr + 8) == bias
        assert native.read_struct("llama_logit_bias", ptr) == native.struct("llama_logit_bias")


def test_a_taken_string_is_freed(native: Native) -> None:
    schema = json.dumps({"enum": ["x" * 4000]})

    def use() -> None:
        grammar = native.call("pw_json_schema_to_grammar", schema) or 0
        assert native.take_string(grammar).startswith("root ::=")

    assert growth(native, use, 500) == 0


def test_a_call_gives_its_frame_back_however_it_ends(native: Native) -> None:
    native.llama_load_mode_from_str("mmap")
    native.ggml_threadpool_params_default(1)
    with pytest.raises(RequestError):
        native.ggml_type_size(-1)
    with pytest.raises(GuestException):
        native.call("pw_json_schema_to_grammar", "{" * (2 * FRAME_BYTES))
    assert native.frame.mark() == (0, 0)


# -- errors -----------------------------------------------------------------------------------------------------------


def test_a_cpp_exception_is_raised_and_the_engine_lives(native: Native) -> None:
    with pytest.raises(GuestException, match=r"pw_json_schema_to_grammar: .*parse error"):
        native.call("pw_json_schema_to_grammar", "no json")
    with pytest.raises(GuestException):
        native.call("pw_json_schema_to_grammar", '{"type": "no such type"}')
    assert native.ggml_blck_size(_abi.GGML_TYPE_Q8_0) == 32
    assert not native.engine.is_dead


def test_a_caught_exception_of_the_guest_is_not_ours(native: Native) -> None:
    """llama.cpp catches its own and answers null; that is no error of the boundary."""
    assert native.llama_model_load_from_file("/not/granted", native.llama_model_default_params()) == 0


def test_an_error_is_raised_once(native: Native) -> None:
    with pytest.raises(GuestException):
        native.call("pw_json_schema_to_grammar", "{")
    assert int(native.error_code[0]) == 0
    assert native.llama_max_devices() > 0


def test_guest_memory_that_runs_out_is_an_out_of_memory_error() -> None:
    with Engine(n_threads=1, memory_limit_bytes=64 << 20) as engine:
        native = Native(engine)
        with pytest.raises(OutOfMemoryError, match=r"allocate 1073741824 bytes.*\(raise memory_limit_bytes\)"):
            native.alloc(1 << 30)
        with pytest.raises(OutOfMemoryError, match="mtmd_bitmap_init"), native.scratch(16) as data:
            native.mtmd_bitmap_init(1 << 13, 1 << 13, data)
        assert native.ggml_blck_size(_abi.GGML_TYPE_Q8_0) == 32


def test_an_assert_ends_the_engine_and_says_why() -> None:
    with Engine(n_threads=1) as engine:
        native = Native(engine)
        with pytest.raises(GuestAbortError, match=r"llama_load_mode_from_str: .*unknown load mode: x"):
            native.llama_load_mode_from_str("x")
        with pytest.raises(GuestDiedError, match="died earlier"):
            native.llama_max_devices()
        native.free(64)  # what belonged to a dead engine needs no freeing


def test_after_close_calls_raise_closed_error() -> None:
    engine = Engine(n_threads=1)
    native = Native(engine)
    engine.close()
    with pytest.raises(ClosedError):
        native.llama_max_devices()
    native.free(64)


# -- threads and cost -------------------------------------------------------------------------------------------------


def test_calls_from_many_threads_do_not_mix(native: Native) -> None:
    wrong: list[str] = []

    def work(seed: int) -> None:
        for i in range(100):
            text = f"{seed}-{i}"
            context = native.gguf_init_empty()
            native.gguf_set_val_str(context, "key", text)
            if native.string(native.gguf_get_val_str(context, 0)) != text:
                wrong.append(text)
            native.gguf_free(context)
            if i % 10 == 0:
                with pytest.raises(GuestException):
                    native.call("pw_json_schema_to_grammar", text + "{")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_call_costs_little_more_than_the_engine_asks(native: Native) -> None:
    def best(call: Callable[[], object]) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(1000):
                call()
            times.append((time.perf_counter() - start) / 1000)
        return min(times)

    def measure() -> tuple[float, float]:
        size, engine_call = native.ggml_type_size, native.engine.call
        return best(lambda: size(8)), best(lambda: engine_call("ggml_type_size", 8))

    typed, plain = native.engine.run(measure)
    assert typed - plain < 10e-6
