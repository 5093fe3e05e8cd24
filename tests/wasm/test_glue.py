"""The C entry points over common/: chat templates, JSON schema to grammar, speculation by n-grams."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyllama_wasm as pw
from pyllama_wasm.errors import GuestException
from pyllama_wasm.native import Native


@pytest.fixture(scope="module")
def model(smollm2_path: Path) -> Iterator[pw.Model]:
    with pw.Model(smollm2_path, n_threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def native(model: pw.Model) -> Native:
    return model.native


def call_text(native: Native, export: str, *args: int | str) -> str:
    """Call a glue export that answers text."""
    return native.take_string(int(native.call(export, *args) or 0))


def test_json_schema_becomes_a_grammar(native: Native) -> None:
    schema = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    grammar = call_text(native, "pw_json_schema_to_grammar", json.dumps(schema))
    assert "root ::=" in grammar and "name" in grammar


@pytest.mark.parametrize("schema", ["{", '{"type": "no-such-type"}', '{"$ref": "#/nowhere"}'])
def test_bad_schema_is_an_exception_and_the_engine_lives(native: Native, schema: str) -> None:
    with pytest.raises(GuestException):
        call_text(native, "pw_json_schema_to_grammar", schema)
    assert "root ::=" in call_text(native, "pw_json_schema_to_grammar", '{"type": "integer"}')


@pytest.mark.parametrize("number", ["99999999999999999999999", "-92929292929292929292929", "18446744073709551616"])
def test_numbers_beyond_64_bits_are_read(model: pw.Model, native: Native, number: str) -> None:
    """Found by fuzzing: where the guest's ``strtoll`` stopped before the digits did, the JSON parser asserted."""
    assert "e+" in call_text(native, "pw_json_schema_to_grammar", f'{{"const": {number}}}')
    messages = [{"role": "user", "content": "Hi"}]
    prompt = model.apply_chat_template(messages, template="{{ n }}", template_kwargs={"n": int(number)})
    assert float(prompt) == float(number)


def test_template_that_fails_is_an_exception(model: pw.Model, native: Native) -> None:
    request = {"messages": [{"role": "user", "content": "Hi"}], "template": "{{ raise_exception('not today') }}"}
    with pytest.raises(GuestException, match="not today"):
        call_text(native, "pw_chat_apply", model._ptr, json.dumps(request))


def test_model_template_source_is_its_own(model: pw.Model, native: Native) -> None:
    assert call_text(native, "pw_chat_template_source", model._ptr, "").strip().startswith("{%")


def test_n_gram_speculation_proposes_what_followed_before(model: pw.Model, native: Native) -> None:
    tokens = model.vocab.tokenize("one two three four five six. " * 4, add_special=False)
    period = len(tokens) // 4
    text, last = tokens[: 3 * period], tokens[3 * period]
    with model.context(n_ctx=256) as context, native.scratch(4 * 16) as out:
        handle = native.call("pw_speculative_new", "ngram-simple", context._ptr, 1, 3, 8)
        with native.array(np.array(text, dtype=np.int32)) as prompt:
            native.call("pw_speculative_begin", handle, 0, prompt, len(text))
            n = int(native.call("pw_speculative_draft", handle, 0, prompt, len(text), last, out, 4) or 0)
        drafted = native.engine.memory.view(out, (n,), np.int32).tolist()
        native.call("pw_speculative_accept", handle, 0, n)
        native.call("pw_speculative_free", handle)
    assert n > 0
    assert drafted == tokens[3 * period + 1 : 3 * period + 1 + n]


def test_speculation_that_needs_a_draft_model_is_refused(model: pw.Model, native: Native) -> None:
    with model.context(n_ctx=64) as context, pytest.raises(GuestException, match="not an n-gram kind"):
        native.call("pw_speculative_new", "draft-simple", context._ptr, 1, 3, 8)


def test_a_draft_model_proposes_what_it_finds_likely(model: pw.Model, native: Native) -> None:
    assert native.call("pw_speculative_compatible", model._ptr, model._ptr) == 1
    tokens = model.vocab.tokenize("The capital of France is")
    sizes: dict[str, Any] = {"n_ctx": 64, "n_seq_max": 1}
    with model.context(**sizes) as target, model.context(**sizes) as draft, native.scratch(4 * 4) as out:
        handle = native.call("pw_speculative_new_draft", target._ptr, draft._ptr, 4, 0.1)
        with native.array(np.array(tokens, dtype=np.int32)) as text:
            n = len(tokens) - 1
            native.call("pw_speculative_begin", handle, 0, text, n)
            assert native.call("pw_speculative_process", handle, text, n, 0) == 1
            n_drafted = int(native.call("pw_speculative_draft", handle, 0, text, n, tokens[-1], out, 4) or 0)
            drafted = native.engine.memory.view(out, (n_drafted,), np.int32).tolist()
            assert native.call("pw_speculative_process", handle, text, n, 0) == 0  # these positions are taken
        native.call("pw_speculative_free", handle)
    assert model.vocab.detokenize(drafted).startswith(" Paris")
