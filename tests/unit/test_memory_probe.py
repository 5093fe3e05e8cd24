"""How much memory a context takes, about."""

from __future__ import annotations

from pyllama_wasm import ContextParams
from pyllama_wasm._memory_probe import ModelShape, context_pieces

SMOLLM2 = ModelShape(n_layer=30, n_embd=576, n_ff=1536, n_vocab=49152, n_embd_k=192, n_embd_v=192)


def test_kv_cache_is_exact_for_the_usual_architecture() -> None:
    # llama.cpp logs "KV buffer size = 90.00 MiB" for 4096 cells of f16 and 180 MiB for 8192.
    assert context_pieces(SMOLLM2, ContextParams(n_ctx=4096), 8192)[0] == 90 << 20
    assert context_pieces(SMOLLM2, ContextParams(), 8192)[0] == 180 << 20
    assert context_pieces(SMOLLM2, ContextParams(n_ctx=4096, type_k="f32", type_v="f32"), 8192)[0] == 180 << 20


def test_logits_buffer_depends_on_the_outputs() -> None:
    few = context_pieces(SMOLLM2, ContextParams(n_ctx=4096, n_outputs_max=1), 8192)[2]
    many = context_pieces(SMOLLM2, ContextParams(n_ctx=4096), 8192)[2]
    assert many - few == 4 * 511 * 49152


def test_whole_is_close_to_what_was_measured() -> None:
    # 143 MiB of growth were measured for this context, the reserve not included.
    total = sum(context_pieces(SMOLLM2, ContextParams(n_ctx=4096, n_batch=512, n_outputs_max=1), 8192)[:3])
    assert 130 << 20 < total < 160 << 20


def test_short_cache_of_a_sliding_window_is_no_reason_to_refuse() -> None:
    shape = ModelShape(n_layer=26, n_embd=1152, n_ff=6912, n_vocab=1, n_embd_k=256, n_embd_v=256, n_swa=512)
    whole, short = (context_pieces(shape, ContextParams(n_ctx=8192, swa_full=full), 8192)[0] for full in (True, False))
    assert (whole, short) == (208 << 20, 26 << 20)
