"""An assertion in one of ggml's worker threads ends every thread of the sandbox, and nothing else."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

import pyllama_wasm as pw
from pyllama_wasm import _abi
from pyllama_wasm.errors import GuestAbortError, GuestDiedError
from pyllama_wasm.host import Engine
from pyllama_wasm.native import Native

N_EMBD, N_ROWS = 8, 16


def look_up_rows(native: Native, indices: list[int], n_threads: int) -> int:
    """Compute ``ggml_get_rows`` on a threadpool; ggml asserts that every index is a row."""
    params = native.struct("ggml_init_params", mem_size=1 << 20)
    context = native.ggml_init(params)
    table = native.ggml_new_tensor_2d(context, _abi.GGML_TYPE_F32, N_EMBD, N_ROWS)
    wanted = native.ggml_new_tensor_1d(context, _abi.GGML_TYPE_I32, len(indices))
    native.engine.memory.write(native.ggml_get_data(wanted), np.array(indices, dtype=np.int32).tobytes())
    graph = native.ggml_new_graph(context)
    native.ggml_build_forward_expand(graph, native.ggml_get_rows(context, table, wanted))
    with native.scratch(len(native.struct("ggml_threadpool_params"))) as pool_params:
        native.write_struct(pool_params, native.ggml_threadpool_params_default(n_threads))
        pool = native.ggml_threadpool_new(pool_params)
    plan = native.ggml_graph_plan(graph, n_threads, pool)
    with native.scratch(max(plan["work_size"], 1)) as work, native.scratch(len(plan)) as plan_ptr:
        plan["work_data"] = work
        native.write_struct(plan_ptr, plan)
        status = int(native.ggml_graph_compute(graph, plan_ptr))
    native.ggml_threadpool_free(pool)
    native.ggml_free(context)
    return status


@pytest.mark.parametrize("n_threads", [2, 4])
def test_good_rows_are_computed_by_all_threads(n_threads: int) -> None:
    with Engine(n_threads=n_threads) as engine:
        assert look_up_rows(Native(engine), [3] * 400, n_threads) == _abi.GGML_STATUS_SUCCESS


@pytest.mark.parametrize("n_threads", [2, 4])
def test_an_assert_in_a_worker_ends_every_thread(n_threads: int, tiny_path: Path) -> None:
    before = threading.active_count()
    with pw.Model(tiny_path, n_threads=1) as bystander, Engine(n_threads=n_threads) as engine:
        alone = bystander.generate("abc", max_tokens=4, temperature=0.0).tokens
        native = Native(engine)
        # ggml deals rows out in order: only the last worker meets the index that is no row
        with pytest.raises(GuestAbortError, match="GGML_ASSERT"):
            look_up_rows(native, [3] * 399 + [999], n_threads)
        assert engine.is_dead
        with pytest.raises(GuestDiedError, match="load the model again"):
            native.ggml_time_us()
        assert bystander.generate("abc", max_tokens=4, temperature=0.0).tokens == alone
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_a_new_engine_works_at_once_after_an_assert() -> None:
    with Engine(n_threads=2) as engine, pytest.raises(GuestAbortError):
        look_up_rows(Native(engine), [999] * 400, 2)
    with Engine(n_threads=2) as engine:
        assert look_up_rows(Native(engine), [0, 1, 2], 2) == _abi.GGML_STATUS_SUCCESS


def test_a_pool_larger_than_the_grant_is_an_error_and_no_hang() -> None:
    # One worker is granted, three are asked for: they would wait for each other for ever.
    with Engine(n_threads=1) as engine, pytest.raises(GuestAbortError, match="GGML_ASSERT"):
        look_up_rows(Native(engine), [0] * 400, 4)
