"""Samplers: the chain of llama.cpp, and a grammar beside it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import pyllama_wasm as pw


@pytest.fixture
def context(tiny: pw.Model) -> Iterator[pw.Context]:
    with tiny.context(n_ctx=256) as made:
        batch = pw.Batch(8)
        batch.add_sequence([5, 6, 7])
        made.decode(batch)
        yield made


def test_cold_sampling_takes_the_largest_logit(tiny: pw.Model, context: pw.Context) -> None:
    with pw.Sampler.chain(tiny, pw.SamplingParams(temperature=0)) as sampler:
        assert sampler.sample(context) == int(np.argmax(context.logits()))


def test_same_seed_same_tokens(tiny: pw.Model, context: pw.Context) -> None:
    def draw(seed: int) -> list[int]:
        with pw.Sampler(tiny, pw.SamplingParams(temperature=5, top_k=0, seed=seed)) as sampler:
            assert sampler.seed == seed
            return [sampler.sample(context) for _ in range(20)]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


def test_random_seed_is_drawn_afresh(tiny: pw.Model) -> None:
    seeds = set()
    for _ in range(4):
        with pw.Sampler(tiny) as sampler:
            seeds.add(sampler.seed)
    assert len(seeds) > 1


def test_reset_starts_over(tiny: pw.Model, context: pw.Context) -> None:
    with pw.Sampler(tiny, pw.SamplingParams(temperature=5, top_k=0, seed=7)) as sampler:
        first = [sampler.sample(context) for _ in range(10)]
        sampler.reset()
        assert [sampler.sample(context) for _ in range(10)] == first


def test_top_k_limits_the_choice(tiny: pw.Model, context: pw.Context) -> None:
    best = set(np.argsort(context.logits())[-3:].tolist())
    params = pw.SamplingParams(temperature=50, top_k=3, top_p=1.0, min_p=0.0, seed=1)
    with pw.Sampler(tiny, params) as sampler:
        assert {sampler.sample(context) for _ in range(60)} == best


def test_logit_bias_forbids_and_forces(tiny: pw.Model, context: pw.Context) -> None:
    best = int(np.argmax(context.logits()))
    with pw.Sampler(tiny, pw.SamplingParams(temperature=0, logit_bias={best: float("-inf")})) as sampler:
        assert sampler.sample(context) != best
    with pw.Sampler(tiny, pw.SamplingParams(temperature=0, logit_bias={99: 1000.0})) as sampler:
        assert sampler.sample(context) == 99


def test_ignore_eos_forbids_every_end(tiny: pw.Model, context: pw.Context) -> None:
    bias = {2: 1000.0}
    with pw.Sampler(tiny, pw.SamplingParams(temperature=0, logit_bias=bias)) as sampler:
        assert sampler.sample(context) == 2
    with pw.Sampler(tiny, pw.SamplingParams(temperature=0, logit_bias=bias, ignore_eos=True)) as sampler:
        assert sampler.sample(context) != 2


def test_penalty_sees_the_prompt(tiny: pw.Model, context: pw.Context) -> None:
    best = int(np.argmax(context.logits()))
    params = pw.SamplingParams(temperature=0, presence_penalty=1000.0)
    with pw.Sampler(tiny, params) as sampler:
        sampler.accept_prompt([best])
        assert sampler.sample(context) != best


@pytest.mark.parametrize(
    "params",
    [
        pw.SamplingParams(mirostat=1, seed=1),
        pw.SamplingParams(mirostat=2, seed=1),
        pw.SamplingParams(dry_multiplier=0.8, seed=1),
        pw.SamplingParams(xtc_probability=0.5, seed=1),
        pw.SamplingParams(top_n_sigma=1.0, typical_p=0.9, dynatemp_range=0.2, seed=1),
        pw.SamplingParams(samplers=("min_p", "adaptive_p"), adaptive_target=0.5, seed=1),
        pw.SamplingParams(samplers=(), seed=1),
        pw.SamplingParams(samplers=("top_k",), top_k=1),
        pw.SamplingParams(samplers=("infill", "temperature"), seed=1),
        pw.SamplingParams(repeat_penalty=1.3, frequency_penalty=0.5, seed=1),
        pw.SamplingParams(temperature=-1),
    ],
    ids=repr,
)
def test_every_sampler_of_llama_cpp_generates(tiny: pw.Model, params: pw.SamplingParams) -> None:
    completion = tiny.generate("abc", max_tokens=8, sampling=params)
    assert 1 <= len(completion.tokens) <= 8


def test_grammar_is_followed_whatever_the_model_wants(tiny: pw.Model) -> None:
    grammar = 'root ::= "{" [a-z]+ ":" ("true" | "false") "}"'
    texts = Counter(
        tiny.generate("x", max_tokens=200, grammar=grammar, temperature=1.5, seed=seed, logit_bias={2: 5.0}).text
        for seed in range(5)
    )
    for text in texts:
        assert text[0] == "{"
        assert text.endswith((":true}", ":false}"))


def test_grammar_makes_json_of_a_real_model(model: pw.Model) -> None:
    grammar = r"""
root ::= "{\"name\": \"" [A-Za-z ]{1,20} "\", \"age\": " [1-9] [0-9]? "}"
"""
    completion = model.generate("A person as JSON: ", max_tokens=60, grammar=grammar, temperature=0.7, seed=2)
    assert set(json.loads(completion.text)) == {"name", "age"}
    assert completion.finish_reason == "stop"


def test_grammar_that_does_not_parse_is_refused(tiny: pw.Model) -> None:
    for grammar in ("root ::= (", "other ::= [a]", "root ::= root"):
        with pytest.raises(pw.RequestError, match="set grammar"):
            tiny.generate("a", grammar=grammar)
    assert tiny.generate("a", max_tokens=1).usage.completion_tokens == 1


def test_the_chain_is_that_of_common_sampler_init(tiny: pw.Model) -> None:
    def names(**changes: Any) -> tuple[str, ...]:
        with pw.Sampler(tiny, pw.SamplingParams(**changes)) as sampler:
            return sampler.names

    truncating = ("top-k", "?typical", "top-p", "min-p", "?xtc")  # "?" marks what is switched off
    assert names() == ("?penalties", "?dry", "?top-n-sigma", *truncating, "temp-ext", "dist")
    assert names(temperature=0, logit_bias={1: 2.0})[0] == "logit-bias"
    assert names(temperature=0)[-1] == "greedy"
    assert names(samplers=("adaptive_p", "min_p")) == ("min-p", "adaptive-p")
    assert names(samplers=("temperature", "top_k"), top_k=1) == ("temp-ext", "top-k", "greedy")
    assert names(mirostat=1, temperature=0.7) == ("temp", "mirostat")
    assert names(mirostat=2) == ("temp", "mirostat-v2")
    assert names(grammar='root ::= "a"', samplers=()) == ("dist",)


def test_logits_that_are_no_numbers_do_not_end_the_sandbox(tiny: pw.Model, context: pw.Context) -> None:
    native = tiny.native
    ptr = int(native.llama_get_logits_ith(context._ptr, -1))
    native.engine.memory.write(ptr, np.full(tiny.vocab.n_tokens, np.nan, np.float32).tobytes())
    for params in (pw.SamplingParams(), pw.SamplingParams(temperature=0), pw.SamplingParams(grammar='root ::= "a"')):
        with pw.Sampler(tiny, params) as sampler, pytest.raises(pw.ModelError, match="not numbers"):
            sampler.sample(context)
    with pw.SamplerChain(tiny, [pw.Sampler.grammar(tiny, "root ::= .")]) as chain, pytest.raises(pw.RequestError):
        chain.sample(context)
    assert tiny.generate("a", max_tokens=1).usage.completion_tokens == 1


def test_sampling_without_logits_is_refused(tiny: pw.Model) -> None:
    with tiny.context(n_ctx=256) as empty, pw.Sampler(tiny) as sampler, pytest.raises(pw.RequestError) as caught:
        sampler.sample(empty)
    assert "no logits of token -1" in str(caught.value)


def test_context_of_another_model_is_refused(tiny: pw.Model, context: pw.Context) -> None:
    with (
        pw.Model(tiny.path, n_threads=1) as other,
        pw.Sampler(other) as sampler,
        pytest.raises(pw.RequestError) as caught,
    ):
        sampler.sample(context)
    assert "belongs to another model" in str(caught.value)
