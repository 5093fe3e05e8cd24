"""The module computes what native llama.cpp computes, judged on the record in `golden.py`.

Both sides read the same tokens: the prompt, then what *native* wrote. So one step that goes another way does not hide
the steps after it.

The bounds. llama.cpp rounds activations to 8 bits before every product with 4-bit weights, so the order of a sum
decides which way some of them round, and 30 layers amplify that. Native does not agree with itself any better: two
native builds (AVX2 and AVX-512) of the same sources differ by up to 1.2 in a logit, 0.21 in the mean square, over these
very steps; the same build fed one token at a time or all at once by 1.4 and 0.24 (the record's header has the figures).
The logits themselves range from -23 to 45. So the module has to be as near to native as native is to itself, and must
choose the same token wherever native's choice is clearer than such a difference can turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import pytest

import pyllama_wasm as pw

from . import golden
from .golden import Deviation, Record

RMS_BOUND = 0.26
"""A tenth above the largest distance, in the mean square, of native from itself."""

MAX_BOUND = 2.5
"""For the largest of some 25 000 differences, ten times the above; native is up to 1.4 from itself."""

MARGIN_BOUND = 0.75
"""Native's lead, in logits, from which on the module must choose the same token: twice the mean square of the
difference of two logits that are each `RMS_BOUND` off."""

SOME = ("english", "chinese", "python", "maths")
"""Prompts that are also fed one token at a time, as generation does, and the only ones for one thread: all sixteen in
every way would take minutes, and how many threads share the work changes no bit of it."""


@pytest.fixture(scope="module")
def record() -> golden.Golden:
    return golden.load()


@pytest.fixture(scope="module", params=[1, 2], ids=["1 thread", "2 threads"])
def context(request: pytest.FixtureRequest, smollm2_path: Path) -> Iterator[pw.Context]:
    with (
        pw.Model(smollm2_path, n_threads=request.param) as model,
        model.context(
            n_ctx=256, n_batch=256, n_ubatch=256, type_k="f16", type_v="f16", flash_attn_type="enabled"
        ) as made,
    ):
        yield made


def feed_batch(context: pw.Context, tokens: list[int], n_steps: int) -> golden.Floats:
    """Decode all tokens in one batch; return the logits after each of the last ``n_steps``."""
    context.memory.clear()
    batch = pw.Batch(len(tokens))
    for i, token in enumerate(tokens):
        batch.add(token, i, [0], logits=i >= len(tokens) - n_steps)
    context.decode(batch)
    return np.stack([context.logits(i) for i in batch.outputs()])


def feed_steps(context: pw.Context, prompt: list[int], written: list[int]) -> golden.Floats:
    """Decode the prompt, then token by token; return the logits after the prompt and after each but the last."""
    rows = [feed_batch(context, prompt, 1)[0]]
    batch = pw.Batch(1)
    for i, token in enumerate(written[:-1]):
        batch.clear()
        batch.add(token, len(prompt) + i, [0], logits=True)
        context.decode(batch)
        rows.append(context.logits(0).copy())
    return np.stack(rows)


def batch_logits(context: pw.Context, record: Record) -> golden.Floats:
    return feed_batch(context, [*record.prompt.tolist(), *record.written[:-1].tolist()], len(record.written))


def within_bounds(deviation: Deviation) -> bool:
    return deviation.rms <= RMS_BOUND and deviation.largest <= MAX_BOUND and deviation.largest_flip < MARGIN_BOUND


def test_record_belongs_to_the_prompts_and_the_model(record: golden.Golden, smollm2_path: Path) -> None:
    assert record.header["prompts_sha256"] == golden.sha256_of(golden.PROMPTS)
    assert record.header["model_sha256"] == golden.sha256_of(smollm2_path)
    assert [r.name for r in record.mode("step")] == record.header["prompts"]
    assert len(record.header["prompts"]) == 16
    assert all(r.written.shape == (64,) for r in record.mode("step"))


def test_prompts_have_native_tokens(context: pw.Context, record: golden.Golden) -> None:
    texts = golden.prompt_texts()
    vocab = context.model.vocab
    for r in record.mode("step"):
        assert vocab.tokenize(texts[r.name], add_special=True, parse_special=True) == r.prompt.tolist(), r.name


def test_logits_of_a_batch_are_native_ones(context: pw.Context, record: golden.Golden) -> None:
    names = record.header["prompts"] if context.model.engine.n_threads > 1 else SOME
    found = {r.name: golden.deviation(r, batch_logits(context, r)) for r in record.mode("batch") if r.name in names}
    for name, deviation in found.items():
        print(f"{name:10} {deviation}")
    total = reduce(add, found.values())
    print(f"{'all':10} {total}")
    assert len(found) == len(names)
    assert within_bounds(total), total


def test_logits_of_single_tokens_are_native_ones(context: pw.Context, record: golden.Golden) -> None:
    stepped = [r for r in record.mode("step") if r.name in SOME]
    found = [golden.deviation(r, feed_steps(context, r.prompt.tolist(), r.written.tolist())) for r in stepped]
    total = reduce(add, found)
    print(total)
    assert len(stepped) == len(SOME)
    assert within_bounds(total), total


def test_comparison_notices_one_wrong_token(context: pw.Context, record: golden.Golden) -> None:
    r = record.records["batch"][0]
    tokens = [*r.prompt.tolist(), *r.written[:-1].tolist()]
    tokens[3] = tokens[3] + 1
    deviation = golden.deviation(r, feed_batch(context, tokens, len(r.written)))
    assert not within_bounds(deviation), deviation


def test_comparison_notices_what_is_no_number(record: golden.Golden) -> None:
    r = record.records["batch"][0]
    logits = np.zeros((64, record.header["n_vocab"]), np.float32)
    logits[5, 7] = np.nan
    assert not within_bounds(golden.deviation(r, logits))
