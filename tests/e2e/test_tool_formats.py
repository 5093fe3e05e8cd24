"""Tool calls in the formats of many models, read whole and piece by piece."""

# ruff: noqa: RUF001  DeepSeek's markers are written with such characters

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pyllama_wasm as pw
from pyllama_wasm.chat import ChatRequest, MessageReader
from pyllama_wasm.chat_generation import GuestChat
from pyllama_wasm.errors import GuestException

from ..conftest import TinyModel

TEMPLATES = Path(__file__).resolve().parents[2] / "build/sources/llama.cpp/models/templates"
QUESTION = [{"role": "user", "content": "What is the weather in Paris?"}]

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tell the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}

PARIS = '{"city": "Paris"}'
CALL = '{"name": "get_weather", "arguments": {"city": "Paris"}}'

ANSWERS = {
    "Qwen-Qwen2.5-7B-Instruct": f"<tool_call>\n{CALL}\n</tool_call>",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": f"<tool_call>\n{CALL}\n</tool_call>",
    "meta-llama-Llama-3.1-8B-Instruct": '{"name": "get_weather", "parameters": {"city": "Paris"}}',
    "mistralai-Mistral-Nemo-Instruct-2407": f'[TOOL_CALLS][{CALL[:-1]}, "id": "abcdef123"}}]',
    "Qwen3-Coder": (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>"
    ),
    "openai-gpt-oss-120b": f"<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{PARIS}",
    "deepseek-ai-DeepSeek-V3.1": (
        f"</think><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{PARIS}"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    ),
    "Kimi-K2-Instruct": (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        f"{PARIS}<|tool_call_end|><|tool_calls_section_end|>"
    ),
    "meetkai-functionary-medium-v3.1": f"<function=get_weather>{PARIS}</function>",
    "meetkai-functionary-medium-v3.2": f"get_weather\n{PARIS}",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": (
        '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "get_weather", "parameters": {"city": "Paris"}}\n]'
        "<|END_ACTION|>"
    ),
    "GLM-4.6": (
        "<think></think>\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>"
    ),
    "MiniMax-M2": (
        '</think>\n\n<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Paris</parameter>\n'
        "</invoke>\n</minimax:tool_call>"
    ),
    "ibm-granite-granite-4.0": f"<tool_call>\n{CALL}\n</tool_call>",
    "fireworks-ai-llama-3-firefunction-v2": f" functools[{CALL}]",
    "NVIDIA-Nemotron-Nano-v2": f"</think><TOOLCALL>[{CALL}]</TOOLCALL>",
    "Apertus-8B-Instruct": '<|tools_prefix|>[{"get_weather": {"city": "Paris"}}]<|tools_suffix|>',
    "google-gemma-4-31B-it": '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>}<tool_call|>',
    "HERE": f"<tool_call>\n{CALL}\n</tool_call>",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pw.Model]:
    with pw.Model(TinyModel().write(tmp_path_factory.mktemp("formats") / "tiny.gguf"), n_threads=1) as model:
        yield model


def template_of(name: str) -> str:
    return pw.TOOLS_TEMPLATE if name == "HERE" else (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def open_chat(model: pw.Model, template: str, **more: Any) -> GuestChat:
    request = ChatRequest(QUESTION, template=template, tools=more.pop("tools", [WEATHER]), **more).to_json()
    return model._run(lambda: GuestChat(model, request), "test")


def read(model: pw.Model, chat: GuestChat, pieces: list[str]) -> tuple[pw.ChatMessage, list[dict[str, Any]]]:
    reader, deltas = MessageReader(), []
    for i, piece in enumerate(pieces):
        answer = model._run(lambda: chat.feed(piece, i == len(pieces) - 1), "test")  # noqa: B023
        deltas += reader.read(answer)
    for delta in deltas:
        reader.take(delta)
    return reader.message, deltas


@pytest.mark.parametrize("name", ANSWERS)
def test_a_call_is_read_whole_and_in_pieces(model: pw.Model, name: str) -> None:
    text = ANSWERS[name]
    for pieces in ([text], list(text), [text[i : i + 7] for i in range(0, len(text), 7)]):
        message, deltas = read(model, open_chat(model, template_of(name)), pieces)
        (call,) = message["tool_calls"]
        assert call["type"] == "function" and call["function"]["name"] == "get_weather"
        assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
        assert call["id"] and not (message["content"] or "").strip()
        told = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
        assert [item["index"] for item in told] == [0] * len(told)
        assert [("id" in item, "name" in item["function"]) for item in told] == [(True, True)] + [(False, False)] * (
            len(told) - 1
        )


@pytest.mark.parametrize("name", ["Qwen-Qwen2.5-7B-Instruct", "Kimi-K2-Instruct", "HERE"])
def test_several_calls_have_an_index_each(model: pw.Model, name: str) -> None:
    first = ANSWERS[name]
    text = f"{first}\n{first}" if "Kimi" not in name else first.replace("<|tool_call_end|>", "<|tool_call_end|>", 1)
    if "Kimi" in name:
        inner = first.split("<|tool_calls_section_begin|>")[1].split("<|tool_calls_section_end|>")[0]
        text = f"<|tool_calls_section_begin|>{inner}{inner.replace(':0', ':1')}<|tool_calls_section_end|>"
    message, deltas = read(model, open_chat(model, template_of(name), parallel_tool_calls=True), list(text))
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["get_weather"] * 2
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    indices = [delta["tool_calls"][0]["index"] for delta in deltas if "tool_calls" in delta]
    assert indices == sorted(indices) and set(indices) == {0, 1}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Qwen-Qwen3-0.6B", "<think>\nIt is a city.\n</think>\n\nIt is sunny."),
        ("openai-gpt-oss-120b", "<|channel|>analysis<|message|>It is a city.<|end|><|start|>assistant<|channel|>final"
         "<|message|>It is sunny."),
        ("CohereForAI-c4ai-command-r7b-12-2024-tool_use",
         "<|START_THINKING|>It is a city.<|END_THINKING|><|START_RESPONSE|>It is sunny.<|END_RESPONSE|>"),
    ],
)  # fmt: skip
def test_reasoning_is_told_apart(model: pw.Model, name: str, text: str) -> None:
    message, deltas = read(model, open_chat(model, template_of(name), tools=None), list(text))
    assert message["reasoning_content"].strip() == "It is a city."
    assert (message["content"] or "").strip() == "It is sunny."
    kinds = [next(iter(delta)) for delta in deltas]
    assert kinds == sorted(kinds, reverse=True)  # reasoning first


def test_reasoning_stays_in_the_content_where_it_is_wanted_there(model: pw.Model) -> None:
    text = "<think>\nIt is a city.\n</think>\n\nIt is sunny."
    chat = open_chat(model, template_of("Qwen-Qwen3-0.6B"), tools=None, reasoning="none")
    message, _ = read(model, chat, [text])
    assert message == {"role": "assistant", "content": text}


def test_text_before_a_call_is_content(model: pw.Model) -> None:
    message, _ = read(model, open_chat(model, template_of("HERE")), list("Let me see.\n" + ANSWERS["HERE"]))
    assert (message["content"] or "").strip() == "Let me see."
    assert len(message["tool_calls"]) == 1


def test_a_call_that_was_cut_short_has_what_there_is_of_it(model: pw.Model) -> None:
    message, _ = read(model, open_chat(model, template_of("HERE")), [ANSWERS["HERE"][:50]])
    (call,) = message["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    with pytest.raises(json.JSONDecodeError):
        json.loads(call["function"]["arguments"])


HOSTILE = [
    "<tool_call>" * 2000,
    '{"name": ' * 3000,
    "[" * 20_000,
    "\0\x01\x1b",
    "<tool_call>\n{}\n</tool_call>",
    "﻿" * 100,
]


@pytest.mark.parametrize(
    "name", ["Qwen-Qwen2.5-7B-Instruct", "meta-llama-Llama-3.1-8B-Instruct", "GLM-4.6", "Qwen3-Coder"]
)
def test_hostile_answers_harm_nothing(model: pw.Model, name: str) -> None:
    for text in HOSTILE:
        for pieces in ([text], [text[:100], text[100:]]):
            with contextlib.suppress(GuestException):
                read(model, open_chat(model, template_of(name)), pieces)
    assert not model.is_dead
