"""Conversations: checked before the guest sees them, and its answer checked as well."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pyllama_wasm import RequestError, SandboxError
from pyllama_wasm.chat import ChatPrompt, ChatRequest, MessageReader, check_messages

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
        "reasoning_format": "auto",
        "template": "{{ x }}",
        "template_kwargs": {"x": "é"},
    }


def test_a_prefill_is_the_last_message() -> None:
    request = json.loads(ChatRequest(HELLO, prefill="Sure").to_json())
    assert request["messages"] == [*HELLO, {"role": "assistant", "content": "Sure"}]
    assert request["continue_final_message"] == "content"


@pytest.mark.parametrize("content", ["\ud800", "a\udfff"])
def test_lone_surrogates_are_refused(content: str) -> None:
    with pytest.raises(RequestError, match="cannot be written as JSON"):
        ChatRequest([{"role": "user", "content": content}]).to_json()


def test_values_that_json_cannot_carry_are_refused() -> None:
    for value in (object(), float("nan")):
        with pytest.raises(RequestError, match="cannot be written as JSON"):
            ChatRequest(HELLO, template_kwargs={"x": value}).to_json()


def test_answer_is_read() -> None:
    answer = {"prompt": "P", "stops": ["</s>", ""], "grammar": "g", "format": "f", "grammar_lazy": True}
    answer |= {"grammar_triggers": ["a"], "trigger_tokens": [3], "preserved": {"7": "<t>"}, "thinks": True}
    assert ChatPrompt.from_json(json.dumps(answer)) == ChatPrompt(
        "P", ("</s>",), "g", "f", grammar_lazy=True, grammar_triggers=("a", 3), preserved={7: "<t>"}, thinks=True
    )


@pytest.mark.parametrize(
    "answer",
    [
        "", "[1]", "{}", '{"prompt": 3}', '{"prompt": "", "stops": [1]}', "[" * 100_000,
        '{"prompt": "", "preserved": {"x": "a"}}', '{"prompt": "", "preserved": {"1": 2}}',
        '{"prompt": "", "trigger_tokens": [-1]}', '{"prompt": "", "trigger_tokens": [true]}',
        '{"prompt": "", "grammar": 3}', '{"prompt": "", "grammar_lazy": 1}',
    ],
)  # fmt: skip
def test_malformed_answers_of_the_guest_are_refused(answer: str) -> None:
    with pytest.raises(SandboxError, match="apply the chat template"):
        ChatPrompt.from_json(answer)


def call(index: int, name: str = "", arguments: str = "", identity: str = "") -> dict[str, Any]:
    function = {"arguments": arguments, **({"name": name} if name else {})}
    return {"tool_calls": [{"index": index, "id": identity, "function": function}]}


def test_a_message_is_put_together_from_its_deltas() -> None:
    reader = MessageReader()
    deltas = [
        {"reasoning_content": "Hm."},
        {"content": "I "},
        {"content": "see."},
        call(0, "f", '{"a"', "x"),
        call(0, "", ": 1}"),
    ]
    told = reader.read(json.dumps(deltas)) + reader.read(json.dumps([call(1, "g")]))
    assert [reader.take(delta) for delta in told] == ["", "I ", "see.", "", "", ""]
    message = reader.message
    assert message["reasoning_content"] == "Hm." and message["content"] == "I see."
    first, second = message["tool_calls"]
    assert first == {"id": "x", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    assert len(second["id"]) == 9 and second["id"].isalnum()
    assert told[4]["tool_calls"] == [{"index": 0, "function": {"arguments": ": 1}"}}]


def test_content_beside_calls_is_none_where_there_is_no_text() -> None:
    reader = MessageReader()
    for delta in reader.read(json.dumps([call(0, "f", "{}")])):
        reader.take(delta)
    assert reader.message["content"] is None
    assert MessageReader().message == {"role": "assistant", "content": ""}


@pytest.mark.parametrize(
    "answer",
    [
        "", "{}", "[3]", '[{"content": 3}]', '[{"role": "user"}]', '[{"content": "a", "reasoning_content": "b"}]',
        '[{"tool_calls": []}]', '[{"tool_calls": [3]}]', '[{"tool_calls": [{"index": 0}]}]', "[" * 100_000,
        json.dumps([call(1, "f")]), json.dumps([call(-1, "f")]), json.dumps([call(0)]), json.dumps([call(0, "f")] * 2),
        '[{"tool_calls": [{"index": true, "function": {"name": "f"}}]}]',
        '[{"tool_calls": [{"index": 0, "function": {"name": 3}}]}]',
    ],
)  # fmt: skip
def test_malformed_deltas_of_the_guest_are_refused(answer: str) -> None:
    with pytest.raises(SandboxError, match="read the answer"):
        MessageReader().read(answer)


def test_halves_of_surrogate_pairs_do_not_get_out() -> None:
    assert MessageReader().read('[{"content": "a\\ud800b"}]') == [{"content": "a?b"}]


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("template", True, "template is bool and no text"),
        ("template_kwargs", "id", "template_kwargs is str and no dict"),
        ("tools", {"type": "function"}, "tools is dict and no list"),
        ("tools", "weather", "tools is str and no list"),
        ("tools", 3, "tools is int and no list"),
        ("prefill", 3, "prefill is int and no text"),
        ("reasoning", "much", "reasoning is 'much' and none of auto, none, deepseek"),
        ("parallel_tool_calls", 1, "parallel_tool_calls is 1"),
        ("template_kwargs", {"enable_thinking": "no"}, "enable_thinking is 'no'"),
    ],
)
def test_other_arguments_of_the_wrong_type_are_refused(field: str, value: object, reason: str) -> None:
    with pytest.raises(RequestError, match=f"chat: {reason}"):
        ChatRequest(HELLO, **{field: value}).to_json()  # type: ignore[arg-type]
