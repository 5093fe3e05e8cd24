"""The C entry points over common/: chat templates, JSON schema to grammar, speculation by n-grams."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

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
    """Call a glue export that answers text; strings among the arguments are copied into the guest."""
    pointers = []
    try:
        values = []
        for arg in args:
            if isinstance(arg, str):
                data = arg.encode() + b"\0"
                pointers.append(native.alloc(len(data)))
                native.engine.memory.write(pointers[-1], data)
                values.append(pointers[-1])
            else:
                values.append(arg)
        return native.take_string(int(native.call(export, *values)))
    finally:
        for pointer in pointers:
            native.free(pointer)


def test_json_schema_becomes_a_grammar(native: Native) -> None:
    schema = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    grammar = call_text(native, "pw_json_schema_to_grammar", json.dumps(schema))
    assert "root ::=" in grammar and "name" in grammar


@pytest.mark.parametrize("schema", ["{", '{"type": "no-such-type"}', '{"$ref": "#/nowhere"}'])
def test_bad_schema_is_an_exception_and_the_engine_lives(native: Native, schema: str) -> None:
    with pytest.raises(GuestException):
        call_text(native, "pw_json_schema_to_grammar", schema)
    assert "root ::=" in call_text(native, "pw_json_schema_to_grammar", '{"type": "integer"}')


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
        name = native.alloc(32)
        native.engine.memory.write(name, b"ngram-simple\0")
        handle = native.call("pw_speculative_new", name, context._ptr, 1, 3, 8)
        with native.array(np.array(text, dtype=np.int32)) as prompt:
            native.call("pw_speculative_begin", handle, 0, prompt, len(text))
            n = int(native.call("pw_speculative_draft", handle, 0, prompt, len(text), last, out, 4))
        drafted = native.engine.memory.view(out, (n,), np.int32).tolist()
        native.call("pw_speculative_free", handle)
        native.free(name)
    assert n > 0
    assert drafted == tokens[3 * period + 1 : 3 * period + 1 + n]
