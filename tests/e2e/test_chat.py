"""Conversations through the model's own template, rendered in the sandbox."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import pyllama_wasm as pw

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ASKED = [{"role": "system", "content": "Answer in one sentence."}, *QUESTION]


def test_answer_has_message_usage_and_timings(model: pw.Model) -> None:
    answer = model.chat(ASKED, temperature=0, max_tokens=64)
    assert "Paris" in answer.text
    assert answer.message == {"role": "assistant", "content": answer.text}
    assert answer.finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + len(answer.tokens)
    assert answer.timings.decode_tokens_per_s > 0
    assert "<|im_end|>" not in answer.text


def test_streamed_answer_is_the_same(model: pw.Model) -> None:
    with model.chat(ASKED, stream=True, temperature=0, max_tokens=64) as stream:
        text = "".join(stream)
    assert text == model.chat(ASKED, temperature=0, max_tokens=64).text
    assert isinstance(stream.completion, pw.ChatCompletion)
    assert stream.completion.message["content"] == text


def test_prompt_is_what_the_models_template_makes(model: pw.Model) -> None:
    prompt = model.apply_chat_template([{"role": "system", "content": "Be brief."}, *QUESTION])
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    without = model.apply_chat_template(QUESTION, add_generation_prompt=False)
    assert not without.endswith("assistant\n")
    assert "SmolLM" in without  # the template's own system message


def test_a_template_is_rendered_where_no_template_engine_is_installed(
    tiny: pw.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)  # so that an import of it fails
    prompt = tiny.apply_chat_template(QUESTION, template="{{ messages[0].content | upper }}")
    assert prompt == "WHAT IS THE CAPITAL OF FRANCE?"


def test_a_template_that_is_too_long_is_refused(tiny: pw.Model) -> None:
    with pytest.raises(pw.RequestError, match="more than 262144 characters"):
        tiny.chat(QUESTION, template="{{ 1 }}" * 160_000)


def test_conversation_goes_on(model: pw.Model) -> None:
    messages = [*ASKED, {"role": "assistant", "content": "Paris."}, {"role": "user", "content": "And of Italy?"}]
    assert "Rome" in model.chat(messages, temperature=0, max_tokens=48).text


def test_another_template_can_be_given(model: pw.Model) -> None:
    template = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}{{ tail }}"
    assert model.apply_chat_template(QUESTION, template=template, template_kwargs={"tail": "!"}).endswith(
        "[user:What is the capital of France?]!"
    )


def test_template_that_refuses_is_a_request_error(write_tiny: Callable[..., Path], tmp_path: Path) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pw.Model(write_tiny(tmp_path / "t.gguf", chat_template=template), n_threads=1) as tiny:
        with pytest.raises(pw.RequestError, match="roles must alternate"):
            tiny.chat(QUESTION)
        assert tiny.generate("a", max_tokens=1).usage.completion_tokens == 1


@pytest.mark.parametrize("template", ["{% for %}", "{{ 1 | no_such_filter }}", "{{ unknown() }}", "{% if %}"])
def test_broken_templates_harm_nothing(tiny: pw.Model, template: str) -> None:
    with pytest.raises(pw.PyllamaError, match="apply the chat template"):
        tiny.apply_chat_template(QUESTION, template=template)
    assert tiny.generate("a", max_tokens=1).usage.completion_tokens == 1


def test_bad_conversations_are_refused_before_the_guest_sees_them(tiny: pw.Model) -> None:
    for messages in ([], ["hello"], [{"role": "user"}], "hello"):
        with pytest.raises(pw.RequestError, match="chat: "):
            tiny.chat(messages)  # type: ignore[arg-type]
