"""Conversations: checked before the guest sees them, and its answer checked as well."""

from __future__ import annotations

import json

import pytest

from pyllama_wasm import RequestError, SandboxError
from pyllama_wasm.chat import ChatPrompt, ChatRequest, check_messages

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("Hello", "messages is not a list"),
        ({"role": "user"}, "messages is not a list"),
        ([], "there is no message"),
        (["Hello"], "message 0 is not a dict"),
        ([{"content": "Hello"}], "message 0 has no role"),
        ([{"role": "", "content": "Hello"}], "message 0 has no role"),
        ([*HELLO, {"role": "user"}], "the content of message 1 is not a string"),
        ([{"role": "user", "content": 3}], "the content of message 0 is not a string"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "message 0 has a content part that is not text"),
    ],
)
def test_bad_messages_are_named(messages: object, reason: str) -> None:
    with pytest.raises(RequestError, match=f"chat: {reason}"):
        check_messages(messages)  # type: ignore[arg-type]


def test_text_parts_are_joined_and_other_keys_kept() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert check_messages([{"role": "user", "content": parts, "name": "Ann"}]) == [
        {"role": "user", "content": "a\nb", "name": "Ann"}
    ]


def test_a_tool_call_needs_no_content() -> None:
    assert check_messages([{"role": "assistant", "tool_calls": [{}]}])[0]["content"] == ""


def test_request_is_json_with_what_was_given() -> None:
    request = ChatRequest(HELLO, add_generation_prompt=False, template="{{ x }}", template_kwargs={"x": "é"})
    assert json.loads(request.to_json()) == {
        "messages": HELLO,
        "add_generation_prompt": False,
        "enable_thinking": True,
        "template": "{{ x }}",
        "template_kwargs": {"x": "é"},
    }


@pytest.mark.parametrize("content", ["\ud800", "a\udfff"])
def test_lone_surrogates_are_refused(content: str) -> None:
    with pytest.raises(RequestError, match="cannot be written as JSON"):
        ChatRequest([{"role": "user", "content": content}]).to_json()


def test_values_that_json_cannot_carry_are_refused() -> None:
    for value in (object(), float("nan")):
        with pytest.raises(RequestError, match="cannot be written as JSON"):
            ChatRequest(HELLO, template_kwargs={"x": value}).to_json()


def test_answer_is_read() -> None:
    answer = json.dumps({"prompt": "P", "stops": ["</s>", ""], "grammar": "", "format": "Content-only"})
    assert ChatPrompt.from_json(answer) == ChatPrompt("P", ("</s>",), "", "Content-only")


@pytest.mark.parametrize("answer", ["", "[1]", "{}", '{"prompt": 3}', '{"prompt": "", "stops": [1]}', "[" * 100_000])
def test_malformed_answers_of_the_guest_are_refused(answer: str) -> None:
    with pytest.raises(SandboxError, match="apply the chat template"):
        ChatPrompt.from_json(answer)


def test_lazy_grammar_is_not_taken_for_a_plain_one() -> None:
    answer = {"prompt": "P", "grammar": "root ::= [a]", "grammar_lazy": True}
    assert ChatPrompt.from_json(json.dumps(answer)).grammar == ""
    assert ChatPrompt.from_json(json.dumps({**answer, "grammar_lazy": False})).grammar == "root ::= [a]"
