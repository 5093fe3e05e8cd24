"""Parameters: llama.cpp's defaults, and a clear refusal of everything out of range."""

from __future__ import annotations

import dataclasses
import math

import pytest

from pyllama_wasm import ContextParams, ModelParams, RequestError, SamplingParams


def test_sampling_defaults_are_those_of_common_params_sampling() -> None:
    params = SamplingParams()
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.8, 40, 0.95, 0.05)
    assert (params.repeat_penalty, params.penalty_last_n, params.typical_p) == (1.0, 64, 1.0)
    assert params.samplers == (
        "penalties", "dry", "top_n_sigma", "top_k", "typical_p", "top_p", "min_p", "xtc", "temperature",
    )  # fmt: skip
    assert params.seed == 0xFFFFFFFF


def test_context_defaults_are_those_of_llama_context_default_params() -> None:
    params = ContextParams()
    assert (params.n_batch, params.n_ubatch, params.n_seq_max) == (2048, 512, 1)
    assert (params.type_k, params.type_v, params.flash_attn_type) == ("f16", "f16", "auto")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", -1),
        ("seed", 2**32),
        ("temperature", math.nan),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("top_k", 1.0),
        ("repeat_penalty", 0),
        ("repeat_penalty", math.inf),
        ("penalty_last_n", -1),
        ("mirostat", 3),
        ("samplers", ("top_k", "magic")),
        ("samplers", "top_k"),
        ("logit_bias", {-1: 0.0}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: math.inf}),
        ("dry_sequence_breakers", (1,)),
        ("grammar", "root ::= \0"),
        ("ignore_eos", 1),
        ("temperature", 1e-40),
        ("temperature", 1e300),
        ("logit_bias", {1: 1e300}),
        ("logit_bias", {1: True}),
        ("frequency_penalty", 1e30),
        ("dry_multiplier", -1.0),
    ],
)
def test_sampling_params_name_what_is_wrong(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"set {name}: "):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_ctx", -1),
        ("n_batch", 0),
        ("n_ubatch", 0),
        ("n_seq_max", 257),
        ("type_k", "q3_K"),
        ("flash_attn_type", "on"),
        ("pooling_type", 1),
        ("rope_freq_base", -1.0),
        ("kv_unified", 1),
    ],
)
def test_context_params_name_what_is_wrong(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"set {name}: "):
        ContextParams(**{name: value})  # type: ignore[arg-type]


def test_model_params_take_only_booleans() -> None:
    with pytest.raises(RequestError, match="set check_tensors: "):
        ModelParams(check_tensors=1)  # type: ignore[arg-type]


def test_params_are_frozen_and_own_their_mappings() -> None:
    bias = {3: 1.0}
    params = SamplingParams(logit_bias=bias)
    bias[4] = 2.0
    assert dict(params.logit_bias) == {3: 1.0}
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_k = 1  # type: ignore[misc]


def test_replace_changes_a_copy_and_refuses_unknown_names() -> None:
    params = SamplingParams()
    assert params.replace(top_k=1).top_k == 1
    assert params.top_k == 40
    with pytest.raises(RequestError, match="there is no parameter 'topk'"):
        params.replace(topk=1)
    with pytest.raises(RequestError, match="set top_p"):
        params.replace(top_p=7)
