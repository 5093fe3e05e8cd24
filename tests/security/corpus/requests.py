"""Faults that a caller's texts and numbers reach: tokenizers, contexts, samplers and positions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

import pyllama_wasm as pw

from .record import Case, Input, Maker, Seeds

TOO_LONG = 4 << 20


def _prompt(text: str | bytes) -> Maker:
    data = text.encode() if isinstance(text, str) else text
    return lambda seeds: (seeds.model, data)


def _run(pre_tokenizer: str, text: str) -> Maker:
    """Return a maker of a byte-pair model and one long run of characters."""
    return lambda seeds: (seeds.bpe(pre_tokenizer), text.encode())


def _number(n: int) -> Maker:
    return lambda seeds: (seeds.model, str(n))


def _good(seeds: Seeds) -> tuple[Input, ...]:
    return (seeds.model,)


def _samples(**changes: object) -> Callable[[pw.Model], object]:
    return lambda model: model.generate("ab", max_tokens=4, **changes)  # type: ignore[arg-type]


def _batch_of_strange_sequences(model: pw.Model) -> None:
    with model.context(n_ctx=64) as context:
        batch = pw.Batch(4)
        batch.add_sequence([5, 6], 0, 70)
        context.decode(batch)


def _embeddings(model: pw.Model) -> None:
    with model.context(n_ctx=64) as context:
        batch = pw.Batch(4, n_embd=63)
        batch.add_embeddings(np.zeros((2, 63), np.float32))
        context.decode(batch)


def _token(token: int) -> Callable[[pw.Model], object]:
    return lambda model: model.generate([token], max_tokens=1)


def _not_utf8(model: pw.Model) -> None:
    """Have bytes generated that begin no character, and some that end in the midst of one."""
    for byte in (0xFF, 0xE2):
        done = model.generate("ab", max_tokens=3, temperature=0, logit_bias={3 + byte: 1000.0})
        assert "\ufffd" in done.text and done.text.encode()


def _address(model: pw.Model) -> None:
    part = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x"}}
    model.apply_chat_template([{"role": "user", "content": [part]}])


def _endless(model: pw.Model) -> None:
    """Go on until the context is full: nothing shifts it without being asked."""
    done = model.generate("ab", max_tokens=None, temperature=0, ignore_eos=True)
    assert done.finish_reason == "length"


CASES = (
    Case("issue-27783", "#27783", "200,000 letters to o200k's pre-tokenizer", "prompt",
         _run("gpt-4o", "a" * 200_000), "ok"),
    Case("issue-26965", "#26965, #26966, #15594, #14655", "300,000 spaces to llama 3's pre-tokenizer", "prompt",
         _run("llama-bpe", " " * 300_000), "ok"),
    Case("issue-21113", "#21113, #21257, #21919", "200,000 digits to Qwen's pre-tokenizer", "prompt",
         _run("qwen2", "1" * 200_000), "ok"),
    Case("issue-21406", "#21406, #21587", "40,000 Chinese characters to DeepSeek's pre-tokenizer", "prompt",
         _run("deepseek-llm", "\u4e2d" * 40_000), "ok"),
    Case("cve-2025-52566", "CVE-2025-52566, GHSA-7rxv-5jhh-j6xx, llamafile#835", "a text of 4 MiB, for less memory",
         "prompt", _prompt("a" * TOO_LONG), "OutOfMemoryError", memory_limit_bytes=64 << 20),
    Case("issue-8691", "#8691, #9195, #11738", "a text that is no UTF-8", "prompt",
         _prompt(b"\xe2\x96 \xff\xfe \xed\xa0\x80 \xf4\x90\x80\x80 a\0b"), "ok"),
    Case("issue-10380", "#10380", "more tokens than the context has", "long",
         _number(640), "ContextFullError"),
    Case("issue-24098", "#24098", "a context of one token", "context", _number(1), "ok"),
    Case("issue-13359-context", "#13359", "a context of 2^32 - 1 tokens", "context",
         _number(2**32 - 1), "RequestError", "n_ctx"),
    Case("cve-2026-21869", "CVE-2026-21869, GHSA-8947-pfff-2f3c", "positions moved by negative amounts", "positions",
         _good, "ok"),
    Case("issue-3969", "#3969, #6638, LocalAI#1333", "a model that never ends", "call", _good, "ok", call=_endless),
    Case("issue-9195", "#9195, #11738", "an answer that is no UTF-8", "call", _good, "ok", call=_not_utf8),
    Case("issue-13688", "#13688, #12836", "a sequence that does not exist", "call",
         _good, "RequestError", call=_batch_of_strange_sequences),
    Case("cve-2025-62372", "vLLM CVE-2025-62372", "embeddings of the wrong width", "call",
         _good, "RequestError", call=_embeddings),
    Case("issue-24017-dry", "#24017 (dry_allowed_length)", "a negative length", "call",
         _good, "RequestError", call=_samples(dry_multiplier=1.0, dry_allowed_length=-1)),
    Case("issue-13405", "#13405", "all tokens forbidden", "call",
         _good, "RequestError", call=_samples(logit_bias={i: float("-inf") for i in range(275)})),
    Case("issue-24017-batch", "#24017 (llama_batch_init)", "a batch of 2^40 tokens", "call",
         _good, "RequestError", call=lambda _: pw.Batch(2**40)),
    Case("image-url", "llama-cpp-python#2220", "an address in the place of a text", "call",
         _good, "RequestError", "not text", call=_address),
    Case("sampling-nan", "ours", "a temperature of NaN", "call",
         _good, "RequestError", call=_samples(temperature=float("nan"))),
    Case("token-negative", "ours", "token -1", "call", _good, "RequestError", call=_token(-1)),
    Case("token-beyond", "ours (2^31)", "token 2^31", "call", _good, "RequestError", call=_token(2**31)),
)  # fmt: skip
