"""Sampling in one guest call: the same tokens as llama.cpp's own steps, one by one."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import pyllama_wasm as pw
from pyllama_wasm.native import Native


@pytest.fixture(scope="module")
def model(tiny_path: Path) -> Iterator[pw.Model]:
    with pw.Model(tiny_path, n_threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def native(model: pw.Model) -> Native:
    return model.native


@pytest.fixture
def context(model: pw.Model) -> Iterator[pw.Context]:
    """Two sequences whose last tokens have logits, at indices 2 and 4 of the batch."""
    with model.context(n_ctx=64, n_seq_max=2) as context:
        batch = pw.Batch(5, 2)
        batch.add_sequence([3, 4, 5], seq_id=0)
        batch.add_sequence([6, 7], seq_id=1)
        context.decode(batch)
        yield context


def greedy_chain(native: Native) -> int:
    chain = int(native.llama_sampler_chain_init(native.llama_sampler_chain_default_params()))
    native.llama_sampler_chain_add(chain, native.llama_sampler_init_greedy())
    return chain


def test_one_call_samples_the_most_likely_token(native: Native, context: pw.Context) -> None:
    chain = greedy_chain(native)
    for idx in (2, 4):
        expected = int(np.argmax(context.logits(idx)))
        assert int(native.call("pw_sampler_sample", chain, 0, context._ptr, idx) or 0) == expected
    native.llama_sampler_free(chain)


def test_many_sequences_are_sampled_in_one_call(native: Native, context: pw.Context) -> None:
    chain = greedy_chain(native)
    requests = b"".join(struct.pack("<IIi", chain, 0, idx) for idx in (4, 2))
    with native.array(requests) as table, native.array(bytes(8)) as out:
        assert int(native.call("pw_sampler_sample_many", 2, table, context._ptr, out) or 0) == 2
        tokens = np.frombuffer(native.engine.memory.read(out, 8), "<i4").tolist()
    assert tokens == [int(np.argmax(context.logits(idx))) for idx in (4, 2)]
    native.llama_sampler_free(chain)


def test_grammar_overrules_the_chain_and_advances(native: Native, model: pw.Model, context: pw.Context) -> None:
    chain, wanted = greedy_chain(native), [ord("x") + 3, ord("y") + 3]
    assert int(np.argmax(context.logits(2))) != wanted[0], "the grammar would have nothing to overrule"
    grammar = int(native.llama_sampler_init_grammar(model._vocab_ptr, 'root ::= "xy"', "root"))
    got = [int(native.call("pw_sampler_sample", chain, grammar, context._ptr, 2) or 0) for _ in wanted]
    assert got == wanted
    native.llama_sampler_free(grammar)
    native.llama_sampler_free(chain)


def test_chain_that_selects_nothing_answers_minus_one(native: Native, context: pw.Context) -> None:
    chain = int(native.llama_sampler_chain_init(native.llama_sampler_chain_default_params()))
    assert native.call("pw_sampler_sample", chain, 0, context._ptr, 2) == 0xFFFFFFFF  # LLAMA_TOKEN_NULL
    native.llama_sampler_free(chain)


def test_grammar_that_no_token_satisfies_answers_minus_one(
    native: Native, model: pw.Model, context: pw.Context
) -> None:
    chain = greedy_chain(native)
    grammar = int(native.llama_sampler_init_grammar(model._vocab_ptr, "root ::= <[9999999]>", "root"))
    assert native.call("pw_sampler_sample", chain, grammar, context._ptr, 2) == 0xFFFFFFFF
    native.llama_sampler_free(grammar)
    native.llama_sampler_free(chain)
