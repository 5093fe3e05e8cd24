"""Python functions as C function pointers: each kind that can be reached without a multimodal projector."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyllama_wasm import _abi
from pyllama_wasm.errors import GuestDiedError, HostError, RequestError
from pyllama_wasm.host import Engine
from pyllama_wasm.native import Native

NOT_REACHED = {
    "llama_sampler_i.backend_accept": "upstream calls it nowhere yet",
    "mtmd_bitmap_lazy_callback": "called while a prompt is tokenized for a projector",
    "mtmd_helper_post_decode_callback": "called after an image is decoded",
    "mtmd_progress_callback": "called while a projector is loaded",
}
SAMPLER_SLOTS = [name for name in _abi.CALLBACKS if name.startswith("llama_sampler_i.")]
REACHED = {
    "ggml_abort_callback",
    "ggml_backend_sched_eval_callback",
    "ggml_log_callback",
    "ggml_opt_epoch_callback",
    "ggml_opt_get_optimizer_params",
    "gguf_reader_callback_t",
    "llama_model_set_tensor_data_t",
    "llama_opt_param_filter",
    "llama_progress_callback",
    *(set(SAMPLER_SLOTS) - set(NOT_REACHED)),
}


def test_every_callback_type_is_called_here_or_known_to_be_out_of_reach() -> None:
    assert set(_abi.CALLBACKS) == REACHED | set(NOT_REACHED)
    assert not REACHED & set(NOT_REACHED)


@pytest.fixture
def native() -> Iterator[Native]:
    # training runs on ggml's default of four threads, whatever the context says
    with Engine(n_threads=4) as engine:
        yield Native(engine)


@pytest.fixture
def path(native: Native, tiny_path: Path) -> str:
    return native.engine.files.grant(tiny_path)


def load(native: Native, path: str, **fields: Any) -> int:
    params = native.llama_model_default_params()
    for name, value in fields.items():
        params[name] = value
    return int(native.llama_model_load_from_file(path, params))


def new_context(native: Native, model: int, **fields: Any) -> int:
    params = native.llama_context_default_params()
    small = {"n_ctx": 32, "n_batch": 32, "n_ubatch": 32, "n_threads": 1, "n_threads_batch": 1}
    for name, value in {**small, **fields}.items():
        params[name] = value
    return int(native.llama_init_from_model(model, params))


def decode(native: Native, context: int, *tokens: int) -> int:
    with native.array(np.array(tokens, "<i4")) as ptr:
        return int(native.llama_decode(context, native.llama_batch_get_one(ptr, len(tokens))))


# -- one by one -------------------------------------------------------------------------------------------------------


def test_progress_is_reported_and_can_stop_a_load(native: Native, path: str) -> None:
    seen: list[float] = []

    def report(progress: float, _: int) -> bool:
        seen.append(progress)
        return True

    with native.callback("llama_progress_callback", report) as callback:
        assert load(native, path, progress_callback=callback, progress_callback_user_data=callback.user_data)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    with native.callback("llama_progress_callback", lambda *_: False) as callback:
        assert not load(native, path, progress_callback=callback, progress_callback_user_data=callback.user_data)


def test_none_is_false_and_the_id_is_the_user_data(native: Native, path: str) -> None:
    seen: list[int] = []
    with native.callback("llama_progress_callback", lambda _, user_data: seen.append(user_data)) as callback:
        assert not load(native, path, progress_callback=callback, progress_callback_user_data=callback.user_data)
        assert seen == [callback.user_data]


def test_an_abort_callback_ends_a_decode(native: Native, path: str) -> None:
    context = new_context(native, load(native, path))
    asked: list[int] = []

    def abort(user_data: int) -> bool:
        asked.append(user_data)
        return True

    with native.callback("ggml_abort_callback", abort) as callback:
        native.llama_set_abort_callback(context, callback, callback.user_data)
        assert decode(native, context, 3, 4) == 2
        native.llama_set_abort_callback(context, None, None)
    assert asked
    assert decode(native, context, 3, 4) == 0


def test_an_eval_callback_sees_the_tensors(native: Native, path: str) -> None:
    names: list[str] = []

    def look(tensor: int, ask: bool, _: int) -> bool:
        if not ask:
            names.append(native.string(native.ggml_get_name(tensor)))
        return True

    with native.callback("ggml_backend_sched_eval_callback", look) as callback:
        model = load(native, path)
        context = new_context(native, model, cb_eval=callback, cb_eval_user_data=callback.user_data)
        assert decode(native, context, 3, 4) == 0
    assert "result_output" in names


def test_a_log_callback_gets_level_and_text(native: Native) -> None:
    lines: list[tuple[int, str]] = []
    with native.callback("ggml_log_callback", lambda level, text, _: lines.append((level, native.string(text)))) as log:
        native.llama_log_set(log, log.user_data)
        native.llama_model_load_from_file("/none.gguf", native.llama_model_default_params())
        native.llama_log_set(None, None)
    assert any(level == _abi.GGML_LOG_LEVEL_ERROR and "/none.gguf" in text for level, text in lines)


def test_a_reader_callback_feeds_a_gguf(native: Native, tiny_path: Path) -> None:
    data = tiny_path.read_bytes()

    def read(_: int, output: int, offset: int, length: int) -> int:
        part = data[offset : offset + length]
        native.engine.memory.write(output, part)
        return len(part)

    with native.callback("gguf_reader_callback_t", read) as callback:
        params = native.struct("gguf_init_params", no_alloc=True)
        context = native.gguf_init_from_callback(callback, callback.user_data, 0, len(data), params)
    assert native.gguf_get_n_tensors(context) > 10
    key = native.gguf_find_key(context, "general.architecture")
    assert native.string(native.gguf_get_val_str(context, key)) == "llama"


def test_tensor_data_comes_from_python(native: Native, path: str) -> None:
    names: list[str] = []
    metadata = native.gguf_init_from_file(path, native.struct("gguf_init_params", no_alloc=True))

    def fill(tensor: int, _: int) -> None:
        names.append(native.string(native.ggml_get_name(tensor)))
        size = native.ggml_nbytes(tensor)
        with native.array(np.full(size // 4, 0.25, np.float32)) as values:
            native.ggml_backend_tensor_set(tensor, values, 0, size)

    with native.callback("llama_model_set_tensor_data_t", fill) as callback:
        params = native.llama_model_default_params()
        model = native.llama_model_init_from_user(metadata, callback, callback.user_data, params)
    assert "output.weight" in names
    assert decode(native, new_context(native, model), 3) == 0


def test_training_asks_for_filter_rates_and_reports_batches(native: Native, path: str) -> None:
    asked: list[str] = []
    batches: list[tuple[bool, int, int]] = []
    rates = native.struct("ggml_opt_optimizer_params", **{"adamw.alpha": 1e-3, "adamw.beta1": 0.9})
    rates["adamw.beta2"], rates["adamw.eps"] = 0.999, 1e-8

    def chosen(tensor: int, _: int) -> bool:
        asked.append(native.string(native.ggml_get_name(tensor)))
        return asked[-1] == "output.weight"

    def done(train: bool, _ctx: int, _set: int, _result: int, batch: int, n: int, _start: int) -> None:
        batches.append((train, batch, n))

    model = load(native, path, load_mode=_abi.LLAMA_LOAD_MODE_NONE)
    context = new_context(native, model, type_k=_abi.GGML_TYPE_F32, type_v=_abi.GGML_TYPE_F32, n_ctx=256)
    n_ctx = native.llama_n_ctx(context)
    dataset = native.ggml_opt_dataset_init(_abi.GGML_TYPE_I32, _abi.GGML_TYPE_I32, n_ctx, n_ctx, 1, 1)
    for get in (native.ggml_opt_dataset_data, native.ggml_opt_dataset_labels):
        native.engine.memory.write(native.ggml_get_data(get(dataset)), np.full(n_ctx, 5, "<i4").tobytes())
    with (
        native.callback("llama_opt_param_filter", chosen) as param_filter,
        native.callback("ggml_opt_get_optimizer_params", lambda _: rates) as get_rates,
        native.callback("ggml_opt_epoch_callback", done) as epoch,
    ):
        params = native.struct("llama_opt_params", param_filter=param_filter, get_opt_pars=get_rates)
        params["param_filter_ud"], params["get_opt_pars_ud"] = param_filter.user_data, get_rates.user_data
        native.llama_opt_init(context, model, params)
        result = native.ggml_opt_result_init()
        native.llama_opt_epoch(context, dataset, result, result, 1, epoch, epoch)
    assert "output.weight" in asked
    assert batches[-1][0] is True
    with native.scratch(16) as out:
        native.ggml_opt_result_loss(result, out, out + 8)
        assert 0 < native.engine.memory.view(out, 1, np.float64)[0] < 100


# -- the sampler interface --------------------------------------------------------------------------------------------


class LastCandidate:
    """A sampler in Python that chooses the last candidate, and notes which of its functions were called."""

    def __init__(self, native: Native) -> None:
        self.native = native
        self.calls: list[tuple[str, tuple[int, ...]]] = []
        self.name_ptr = native.alloc(16)
        native.engine.memory.write(self.name_ptr, b"from python\0")
        slots = [name.partition(".")[2] for name in SAMPLER_SLOTS]
        self.interface = native.interface("llama_sampler_i", **{slot: self.function(slot) for slot in slots})

    def function(self, slot: str) -> Callable[..., Any]:
        def called(*args: int) -> Any:
            self.calls.append((slot, args))
            return getattr(self, slot, lambda *_: None)(*args)

        return called

    def new(self) -> int:
        return int(self.native.llama_sampler_init(self.interface.ptr, self.interface.user_data))

    def called(self) -> set[str]:
        return {slot for slot, _ in self.calls}

    def name(self, _: int) -> int:
        return self.name_ptr

    def apply(self, _: int, candidates: int) -> None:
        array = self.native.read_struct("llama_token_data_array", candidates)
        array["selected"] = array["size"] - 1
        self.native.write_struct(candidates, array)

    def clone(self, _: int) -> int:
        return self.new()

    def backend_init(self, *_: int) -> bool:
        return True


def test_a_sampler_in_python_chooses_the_token(native: Native, path: str) -> None:
    model = load(native, path)
    context = new_context(native, model)
    sampler = LastCandidate(native)
    smpl = sampler.new()
    assert decode(native, context, 3, 4) == 0
    n_vocab = native.llama_vocab_n_tokens(native.llama_model_get_vocab(model))
    assert native.llama_sampler_sample(smpl, context, -1) == n_vocab - 1
    assert [slot for slot, _ in sampler.calls] == ["apply", "accept"]
    assert sampler.calls[1][1] == (smpl, n_vocab - 1)
    assert native.string(native.llama_sampler_name(smpl)) == "from python"
    other = native.llama_sampler_clone(smpl)
    native.llama_sampler_copy(smpl, other)
    native.llama_sampler_reset(other)
    native.llama_sampler_free(other)
    assert [slot for slot, _ in sampler.calls[2:]] == ["name", "clone", "copy_state", "reset", "free"]
    assert sampler.calls[4][1] == (smpl, other)
    native.llama_sampler_free(smpl)
    sampler.interface.close()
    sampler.interface.close()


def test_a_sampler_in_python_takes_part_in_the_graph(native: Native, path: str) -> None:
    sampler = LastCandidate(native)
    chain = native.llama_sampler_chain_init(native.llama_sampler_chain_default_params())
    native.llama_sampler_chain_add(chain, sampler.new())
    native.llama_sampler_chain_add(chain, native.llama_sampler_init_greedy())
    config = native.struct("llama_sampler_seq_config", seq_id=0, sampler=chain)
    with native.array(bytes(config)) as samplers:
        context = new_context(native, load(native, path), samplers=samplers, n_samplers=1)
        assert decode(native, context, 3, 4) == 0
    assert {slot for slot in sampler.called() if slot.startswith("backend_")} == {
        "backend_init",
        "backend_apply",
        "backend_reset",
        "backend_set_input",
    }
    assert native.llama_get_sampled_token_ith(context, -1) >= 0


def test_a_function_of_a_struct_is_no_callback_of_its_own(native: Native) -> None:
    with pytest.raises(RequestError, match=r"register a llama_sampler_i\.apply: .*\(use interface\(\)\)"):
        native.callback("llama_sampler_i.apply", lambda *_: None)
    with pytest.raises(KeyError, match=r"no callback type llama_sampler_i\.aply"):
        native.interface("llama_sampler_i", aply=lambda *_: None)


# -- life and death ---------------------------------------------------------------------------------------------------


def test_an_exception_in_a_callback_comes_out_of_the_call(native: Native, path: str) -> None:
    def fail(*_: object) -> bool:
        raise LookupError("from the callback")

    callback = native.callback("llama_progress_callback", fail)
    with pytest.raises((GuestDiedError, LookupError)) as caught:
        load(native, path, progress_callback=callback, progress_callback_user_data=callback.user_data)
    seen: list[BaseException | None] = [caught.value, caught.value.__cause__]
    assert any(isinstance(error, LookupError) for error in seen)
    assert native.engine.is_dead


def test_a_closed_callback_is_not_called(native: Native, path: str) -> None:
    called: list[float] = []
    callback = native.callback("llama_progress_callback", lambda progress, _: called.append(progress))
    callback.close()
    callback.close()
    with pytest.raises((GuestDiedError, HostError)):
        load(native, path, progress_callback=callback, progress_callback_user_data=callback.user_data)
    assert called == []


def test_a_type_without_user_data_takes_one_function_at_a_time(native: Native) -> None:
    first = native.callback("ggml_opt_epoch_callback", lambda *_: None)
    with pytest.raises(RequestError, match="ggml_opt_epoch_callback: this type allows one at a time"):
        native.callback("ggml_opt_epoch_callback", lambda *_: None)
    first.close()
    native.callback("ggml_opt_epoch_callback", lambda *_: None).close()


def test_unknown_types_are_refused(native: Native) -> None:
    with pytest.raises(KeyError, match="no callback type llama_progress"):
        native.callback("llama_progress", lambda: None)
    assert native.call("pw_trampoline", len(_abi.CALLBACKS)) == 0
    assert native.call("pw_trampoline", -1) == 0


def test_every_type_has_a_trampoline_of_its_own(native: Native) -> None:
    found = [native.call("pw_trampoline", callback.kind) for callback in _abi.CALLBACKS.values()]
    assert all(found)
    assert len(set(found)) == len(_abi.CALLBACKS)


def test_callbacks_may_call_back_into_the_guest(native: Native, path: str) -> None:
    """Frames of nested calls do not overlap: the strings of the outer call survive the inner ones."""
    seen: list[str] = []

    def report(*_: object) -> bool:
        seen.append(native.string(native.llama_load_mode_name(native.llama_load_mode_from_str("mmap"))))
        return True

    with native.callback("llama_progress_callback", report) as callback:
        assert load(native, path, progress_callback=callback, progress_callback_user_data=callback.user_data)
    assert set(seen) == {"mmap"}
    assert native.frame.mark() == (0, 0)
