"""``Llama.create_chat_completion``: llama-cpp-python's calls and shapes, judged by the ``openai`` package."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

import pyllama_wasm as pw
from pyllama_wasm.llama_chat_format import (
    CHAT_FORMATS,
    ChatFormatterResponse,
    Jinja2ChatFormatter,
)

ASKED: list[Any] = [{"role": "user", "content": "hi"}]
TALK: list[Any] = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "U2"},
]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {"type": "object", "properties": {"x": {"enum": ["a", "b"]}}, "required": ["x"]},
    },
}
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 6}


@pytest.fixture(scope="module")
def chat_path(write_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("chat") / "chat.gguf", chat_template=pw.TOOLS_TEMPLATE, n_ctx=2048)


@pytest.fixture(scope="module")
def llm(chat_path: Path) -> Iterator[pw.Llama]:
    with pw.Llama(chat_path, n_ctx=2048, n_threads=1) as llm:
        yield llm


@pytest.fixture(scope="module")
def other(chat_path: Path) -> Iterator[Callable[..., pw.Llama]]:
    """Return a function that loads the model with other keywords."""
    opened: list[pw.Llama] = []

    def load(**keywords: Any) -> pw.Llama:
        opened.append(pw.Llama(chat_path, n_ctx=2048, n_threads=1, **keywords))
        return opened[-1]

    yield load
    for llm in opened:
        llm.close()


def content_of(answer: dict[str, Any]) -> Any:
    return answer["choices"][0]["message"]["content"]


def calls_of(answer: dict[str, Any]) -> list[Any]:
    return ChatCompletion.model_validate(answer).choices[0].message.tool_calls or []


def test_answer_has_openai_s_shape(llm: pw.Llama) -> None:
    found = llm.create_chat_completion(ASKED, **GREEDY)
    checked = ChatCompletion.model_validate(found)
    assert found["id"].startswith("chatcmpl-") and checked.model == llm.model_path
    assert checked.choices[0].message.role == "assistant" and checked.choices[0].finish_reason in ("stop", "length")
    assert checked.usage is not None and checked.usage.completion_tokens <= 6
    assert isinstance(llm.create_chat_completion_openai_v1(ASKED, **GREEDY), ChatCompletion)


def test_without_the_openai_package_its_types_are_an_import_error(
    llm: pw.Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openai.types.chat", None)
    with pytest.raises(ImportError, match="pip install openai"):
        llm.create_chat_completion_openai_v1(ASKED)


def test_streamed_answer_is_the_whole_one(llm: pw.Llama) -> None:
    chunks = list(llm.create_chat_completion(ASKED, stream=True, **GREEDY))
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant"} and deltas[-1] == {}
    whole = llm.create_chat_completion(ASKED, **GREEDY)
    assert "".join(delta.get("content", "") for delta in deltas) == content_of(whole)
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    typed = list(llm.create_chat_completion_openai_v1(ASKED, stream=True, **GREEDY))
    assert all(isinstance(chunk, ChatCompletionChunk) for chunk in typed) and len(typed) == len(chunks)


def test_logprobs_come_with_answers_and_streams(llm: pw.Llama) -> None:
    options = {**GREEDY, "logprobs": True, "top_logprobs": 2}
    whole = ChatCompletion.model_validate(llm.create_chat_completion(ASKED, **options)).choices[0].logprobs
    assert whole is not None and whole.content
    assert all(len(item.top_logprobs) == 2 and item.logprob <= 0 for item in whole.content)
    chunks = llm.create_chat_completion(ASKED, stream=True, **options)
    told = [ChatCompletionChunk.model_validate(chunk).choices[0].logprobs for chunk in chunks]
    tokens = [item.token for logprobs in told if logprobs and logprobs.content for item in logprobs.content]
    assert tokens == [item.token for item in whole.content][: len(tokens)] and tokens
    without = llm.create_chat_completion(ASKED, top_logprobs=2, **GREEDY)
    assert without["choices"][0]["logprobs"] is None


def test_json_is_what_was_asked_for(llm: pw.Llama) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    theirs = {"type": "json_object", "schema": schema}
    openais = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    for asked in (theirs, openais):
        answer = llm.create_chat_completion(ASKED, response_format=asked, seed=1)  # type: ignore[arg-type]
        assert json.loads(content_of(answer))["n"] in (1, 2)


def test_several_answers_to_one_conversation(llm: pw.Llama) -> None:
    options: dict[str, Any] = {"max_tokens": 6, "temperature": 1.0, "seed": 4}
    found = llm.create_chat_completion(ASKED, n=3, **options)
    assert len(ChatCompletion.model_validate(found).choices) == 3
    one = [content_of(llm.create_chat_completion(ASKED, **{**options, "seed": 4 + i})) for i in range(3)]
    assert [choice["message"]["content"] for choice in found["choices"]] == one
    *chunks, last = llm.create_chat_completion(
        ASKED, n=3, stream=True, stream_options={"include_usage": True}, **options
    )
    texts = ["", "", ""]
    for chunk in chunks:
        (choice,) = ChatCompletionChunk.model_validate(chunk).choices
        texts[choice.index] += choice.delta.content or ""
    assert texts == one
    usage = ChatCompletionChunk.model_validate(last).usage
    assert usage is not None and last["choices"] == []
    assert usage.completion_tokens == found["usage"]["completion_tokens"]
    assert last["timings"]["prompt_n"] + last["timings"]["cache_n"] >= usage.prompt_tokens
    llm.set_cache(pw.LlamaRAMCache())
    try:
        cached = llm.create_chat_completion(ASKED, n=2, **options)
        assert [choice["index"] for choice in cached["choices"]] == [0, 1]
        *_, last = llm.create_chat_completion(ASKED, stream=True, stream_options={"include_usage": True}, **options)
        assert ChatCompletionChunk.model_validate(last).usage
    finally:
        llm.set_cache(None)
        llm.reset()


def test_keywords_of_openai_and_of_llama_cpp_s_server(llm: pw.Llama, other: Callable[..., pw.Llama]) -> None:
    more: dict[str, Any] = {"max_completion_tokens": 3, "user": "me", "temperature": 0, "top_n_sigma": 2.0}
    assert llm.create_chat_completion(ASKED, **more)["usage"]["completion_tokens"] <= 3
    for wrong in ({"tempreature": 0}, {"reasoning_format": "loud"}, {"n": True}):
        with pytest.raises(pw.RequestError):
            llm.create_chat_completion(ASKED, **wrong)
    handled: list[dict[str, Any]] = []
    mine = other(chat_handler=lambda **options: handled.append(options))
    mine.create_chat_completion(ASKED, n=2, chat_template_kwargs={"a": 1})
    assert handled[0]["n"] == 2 and handled[0]["chat_template_kwargs"] == {"a": 1}


# -- tools ------------------------------------------------------------------------------------------------------------


def test_a_tool_that_must_be_called_is(other: Callable[..., pw.Llama]) -> None:
    llm = other(chat_format="chatml-function-calling")
    choice: Any = {"type": "function", "function": {"name": "look"}}
    found = llm.create_chat_completion(ASKED, tools=[TOOL], tool_choice=choice)
    (call,) = calls_of(found)
    assert call.type == "function" and call.function.name == "look"
    assert json.loads(call.function.arguments)["x"] in ("a", "b")
    assert found["choices"][0]["finish_reason"] == "tool_calls" and content_of(found) is None
    chunks = list(llm.create_chat_completion(ASKED, tools=[TOOL], tool_choice=choice, stream=True))
    calls = [ChatCompletionChunk.model_validate(c).choices[0].delta.tool_calls for c in chunks]
    pieces = [call[0].function.arguments or "" for call in calls if call and call[0].function]
    assert json.loads("".join(pieces))["x"] in ("a", "b")
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    with pytest.raises(pw.RequestError, match="'hear'"):
        llm.create_chat_completion(ASKED, tools=[TOOL], tool_choice={"type": "function", "function": {"name": "hear"}})


def forced(llm: pw.Llama, text: str) -> Callable[..., Any]:
    """Return a logits processor that has the model say ``text`` and end."""
    tokens = [*(3 + byte for byte in text.encode()), llm.token_eos()]  # the tiny vocabulary has a token for each byte
    begun: list[int] = []

    def process(ids: npt.NDArray[np.int32], scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        begun[:] = begun or [len(ids)]
        changed = np.full_like(scores, -np.inf)
        changed[tokens[min(len(ids) - begun[0], len(tokens) - 1)]] = 0
        return changed

    return process


CALL = '<tool_call>\n{"name": "look", "arguments": {"x": "a"}}\n</tool_call>'


def test_calls_of_the_model_are_read_whole_and_streamed(llm: pw.Llama) -> None:
    options: dict[str, Any] = {"tools": [TOOL], "tool_choice": "auto"}
    found = llm.create_chat_completion(ASKED, logits_processor=pw.LogitsProcessorList([forced(llm, CALL)]), **options)
    (call,) = calls_of(found)
    assert (call.function.name, json.loads(call.function.arguments)) == ("look", {"x": "a"})
    assert found["choices"][0]["finish_reason"] == "tool_calls"
    processor = pw.LogitsProcessorList([forced(llm, CALL)])
    chunks = list(llm.create_chat_completion(ASKED, stream=True, logits_processor=processor, **options))
    calls = [ChatCompletionChunk.model_validate(c).choices[0].delta.tool_calls for c in chunks]
    pieces = [call[0] for call in calls if call]
    assert pieces[0].index == 0 and pieces[0].id and pieces[0].function and pieces[0].function.name == "look"
    arguments = "".join(p.function.arguments or "" for p in pieces if p.function)
    assert json.loads(arguments) == {"x": "a"} and chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_functions_of_the_deprecated_kind_are_answered_in_kind(llm: pw.Llama) -> None:
    talk: list[Any] = [
        *ASKED,
        {"role": "assistant", "content": None, "function_call": {"name": "look", "arguments": '{"x": "b"}'}},
        {"role": "function", "name": "look", "content": "seen"},
    ]
    options: dict[str, Any] = {"functions": [TOOL["function"]], "function_call": "auto"}
    found = llm.create_chat_completion(talk, logits_processor=pw.LogitsProcessorList([forced(llm, CALL)]), **options)
    message = ChatCompletion.model_validate(found).choices[0].message
    assert message.function_call is not None and message.function_call.name == "look" and not message.tool_calls
    assert found["choices"][0]["finish_reason"] == "function_call"
    processor = pw.LogitsProcessorList([forced(llm, CALL)])
    chunks = list(llm.create_chat_completion(talk, stream=True, logits_processor=processor, **options))
    told = [ChatCompletionChunk.model_validate(c).choices[0].delta.function_call for c in chunks]
    assert json.loads("".join(t.arguments or "" for t in told if t)) == {"x": "a"}
    with pytest.raises(pw.RequestError, match="function_call"):
        llm.create_chat_completion(ASKED, functions=[TOOL["function"]], function_call=3)  # type: ignore[arg-type]


# -- formats ----------------------------------------------------------------------------------------------------------

LLAMA_2 = "[INST] <<SYS>>\nS\n<</SYS>>\n\nU1 [/INST] A1 </s><s>[INST] U2 [/INST]"
LLAMA_3 = "".join(
    f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>"
    for role, text in (("system", "S"), ("user", "U1"), ("assistant", "A1"), ("user", "U2"))
)
PROMPTS = {
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
    "<|im_start|>user\nU2<|im_end|>\n<|im_start|>assistant\n",
    "llama-2": LLAMA_2,
    "llama-3": LLAMA_3 + "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral-instruct": "[INST] S\n\nU1 [/INST]A1</s>[INST] U2 [/INST]",
    "vicuna": "S USER: U1 ASSISTANT: A1</s>USER: U2 ASSISTANT:",
    "zephyr": "<|system|>\nS</s>\n<|user|>\nU1</s>\n<|assistant|>\nA1</s>\n<|user|>\nU2</s>\n<|assistant|>\n",
    "alpaca": "S\n\n### Instruction:\nU1\n\n### Response:\nA1</s>### Instruction:\nU2\n\n### Response:\n",
    "openchat": "S<|end_of_turn|>GPT4 Correct User: U1<|end_of_turn|>GPT4 Correct Assistant: A1<|end_of_turn|>"
    "GPT4 Correct User: U2<|end_of_turn|>GPT4 Correct Assistant:",
}


@pytest.mark.parametrize("name", sorted(CHAT_FORMATS))
def test_every_named_format_renders_in_the_sandbox(name: str, llm: pw.Llama) -> None:
    template = CHAT_FORMATS[name].template
    prompt = llm._model.apply_chat_template(TALK, template=template)
    assert prompt == PROMPTS.get(name, prompt)
    found = [prompt.index(text) for text in ("S", "U1", "A1", "U2")]
    assert found == sorted(found) and prompt.endswith(CHAT_FORMATS[name].cue)
    alone = llm._model.apply_chat_template([{"role": "user", "content": "U"}], template=template)
    assert "S\n" not in alone and alone.count("U") >= 1
    assert not llm._model.apply_chat_template(ASKED, template=template, add_generation_prompt=False).endswith(
        CHAT_FORMATS[name].cue or "nothing"
    )


def test_a_named_format_is_used_and_its_stop_strings_end_the_answer(other: Callable[..., pw.Llama]) -> None:
    llm = other(chat_format="zephyr")
    processor = pw.LogitsProcessorList([forced(llm, "well</s>y")])
    found = llm.create_chat_completion(TALK, logits_processor=processor)
    assert content_of(found) == "well" and found["choices"][0]["finish_reason"] == "stop"


def test_handlers_and_formatters_of_the_program_answer(
    other: Callable[..., pw.Llama], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyllama_wasm.llama_chat_format._handlers", {})
    told: dict[str, Any] = {}

    def handle(**options: Any) -> str:
        told.update(options)
        return "mine"

    llm = other(chat_handler=handle)
    assert llm.create_chat_completion(ASKED, top_k=3) == "mine"
    assert told["llama"] is llm and told["top_k"] == 3 and told["temperature"] == 0.2

    @pw.register_chat_format("plain")
    def plain(messages: Any, **_: Any) -> ChatFormatterResponse:
        return ChatFormatterResponse(messages[-1]["content"], stop=["<end>"])

    llm = other(chat_format="plain")
    assert content_of(llm.create_chat_completion(ASKED, **GREEDY)) == llm("hi", **GREEDY)["choices"][0]["text"]
    chunks = list(llm.create_chat_completion(ASKED, stream=True, **GREEDY))
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant"} and chunks[-1]["choices"][0]["delta"] == {}
    as_json: Any = {"type": "json_object", "schema": {"enum": ["x"]}}
    answer = llm.create_chat_completion(ASKED, response_format=as_json, logprobs=True)
    assert ChatCompletion.model_validate(answer).choices[0].message.content == '"x"'

    formatter = Jinja2ChatFormatter("{{ messages[0]['content'] }}", eos_token="</s>", bos_token="<s>")
    llm = other(chat_handler=formatter.to_chat_handler())
    assert content_of(llm.create_chat_completion(ASKED, **GREEDY)) == llm("hi", **GREEDY)["choices"][0]["text"]


def test_a_model_s_further_templates_have_names(other: Callable[..., pw.Llama]) -> None:
    assert other().chat_format == "chat_template.default"
    with pytest.raises(pw.RequestError, match="'rag'"):
        other(chat_format="chat_template.rag")


def test_cached_states_and_guesses_take_part_in_answers(other: Callable[..., pw.Llama], llm: pw.Llama) -> None:
    expected = content_of(llm.create_chat_completion(ASKED, **GREEDY))
    cached = other()
    cached.set_cache(pw.LlamaCache())
    assert content_of(cached.create_chat_completion(ASKED, **GREEDY)) == expected
    cached.reset()
    cached.eval([5, 6])
    again = cached.create_chat_completion(ASKED, **GREEDY)
    assert content_of(again) == expected and again["usage"]["prompt_tokens_details"]["cached_tokens"] > 5
    guessing = other(draft_model=pw.LlamaPromptLookupDecoding(num_pred_tokens=2))
    assert content_of(guessing.create_chat_completion(ASKED, **GREEDY)) == expected
    chunks = guessing.create_chat_completion(ASKED, stream=True, **GREEDY)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == expected


def test_images_are_refused_and_nothing_is_fetched(llm: pw.Llama) -> None:
    image = {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}
    with pytest.raises(pw.RequestError, match="not text"):
        llm.create_chat_completion([{"role": "user", "content": [image]}])


def test_keywords_that_ask_for_nothing_do_not_keep_guesses_away(llm: pw.Llama) -> None:
    expected = content_of(llm.create_chat_completion(ASKED, max_tokens=4, temperature=0))
    llm.set_cache(pw.LlamaRAMCache())
    try:
        nothing: dict[str, Any] = {"reasoning_format": None, "reasoning_budget": None, "prefill": None, "n": None}
        answer = llm.create_chat_completion(ASKED, max_completion_tokens=4, temperature=0, **nothing)
        assert content_of(answer) == expected
    finally:
        llm.set_cache(None)
