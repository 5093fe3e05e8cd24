"""Tools, reasoning and prefill through whole answers."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pyllama_wasm as pw

from ..conftest import TinyModel

TEMPLATES = Path(__file__).resolve().parents[2] / "build/sources/llama.cpp/models/templates"
QUESTION = [{"role": "user", "content": "What is the weather in Paris?"}]
QUOTE = {3 + ord('"'): 2.0}  # so that texts of random weights come to an end


def get_weather(city: str, days: int = 1) -> str:
    """Tell the weather."""
    return f"{city} will be sunny for {days} days"


def get_time(zone: str) -> str:
    """Tell the time."""
    return "noon"


TOOLS: list[Callable[..., str]] = [get_weather, get_time]
PARAMETERS = {"get_weather": {"city", "days"}, "get_time": {"zone"}}


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pw.Model]:
    path = TinyModel(n_ctx=8192).write(tmp_path_factory.mktemp("tools") / "tiny.gguf")
    with pw.Model(path, n_threads=1) as model:
        yield model


def template_of(name: str) -> str:
    return pw.TOOLS_TEMPLATE if name == "HERE" else (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def asked(model: pw.Model, template: str = pw.TOOLS_TEMPLATE, **options: Any) -> Any:
    options = {"tools": TOOLS, "temperature": 1, "seed": 1, "max_tokens": 3000, "logit_bias": QUOTE, **options}
    return model.chat(QUESTION, template=template, **options)


def check_calls(answer: pw.ChatCompletion) -> None:
    assert answer.finish_reason == "tool_calls" and answer.tool_calls
    assert answer.message["content"] is None and answer.text == ""
    for call in answer.tool_calls:
        name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
        assert set(arguments) <= PARAMETERS[name]
        assert isinstance(arguments.get("days", 1), int)


@pytest.mark.parametrize(
    "name",
    ["HERE", "meta-llama-Llama-3.1-8B-Instruct", "mistralai-Mistral-Nemo-Instruct-2407", "Apertus-8B-Instruct",
     "fireworks-ai-llama-3-firefunction-v2", "Qwen-Qwen2.5-7B-Instruct"],
)  # fmt: skip
def test_a_required_call_is_one_of_the_tools_whatever_the_model_is(random_model: pw.Model, name: str) -> None:
    for seed in range(4):
        answer = asked(random_model, template_of(name), tool_choice="required", seed=seed)
        if "id" not in name and answer.finish_reason == "tool_calls":
            check_calls(answer)
        assert answer.tool_calls


def test_a_named_tool_is_the_one_that_is_called(random_model: pw.Model) -> None:
    for choice in ("get_time", {"type": "function", "function": {"name": "get_time"}}):
        answer = asked(random_model, tool_choice=choice)
        check_calls(answer)
        assert {call["function"]["name"] for call in answer.tool_calls} == {"get_time"}


def test_one_call_at_a_time_or_several(random_model: pw.Model) -> None:
    one = [asked(random_model, tool_choice="required", parallel_tool_calls=False, seed=n) for n in range(6)]
    assert {len(answer.tool_calls) for answer in one} == {1}
    many = [asked(random_model, tool_choice="required", parallel_tool_calls=True, seed=n) for n in range(12)]
    assert max(len(answer.tool_calls) for answer in many) > 1


def test_streamed_deltas_are_the_message(random_model: pw.Model) -> None:
    whole = asked(random_model, tool_choice="required", parallel_tool_calls=True, seed=5)
    with asked(random_model, tool_choice="required", parallel_tool_calls=True, seed=5, stream=True) as stream:
        deltas = list(stream.deltas())
    assert deltas[0] == {"role": "assistant"}
    arguments: dict[int, str] = {}
    for delta in deltas[1:]:
        (call,) = delta["tool_calls"]
        arguments[call["index"]] = arguments.get(call["index"], "") + call["function"]["arguments"]
    assert list(arguments.values()) == [call["function"]["arguments"] for call in whole.tool_calls]
    assert stream.completion is not None and stream.completion.finish_reason == "tool_calls"
    assert len(deltas) > len(arguments) + 1


def test_without_a_choice_the_answer_is_free_until_a_call_begins(random_model: pw.Model) -> None:
    prompt = random_model.chat_prompt(QUESTION, tools=TOOLS, template=pw.TOOLS_TEMPLATE)
    assert prompt.grammar_lazy and "<tool_call>" in str(prompt.grammar_triggers[0])
    answer = asked(random_model, max_tokens=20)
    assert not answer.tool_calls and answer.finish_reason == "length"


def test_no_tools_are_called_where_none_may(random_model: pw.Model) -> None:
    answer = asked(random_model, tool_choice="none", max_tokens=20)
    assert not answer.tool_calls
    prompt = random_model.chat_prompt(QUESTION, tools=TOOLS, tool_choice="none", template=pw.TOOLS_TEMPLATE)
    assert not prompt.grammar


def test_the_loop_makes_the_calls_and_gives_back_what_came_of_them(random_model: pw.Model) -> None:
    told: list[str] = []
    run = random_model.run_tools(
        QUESTION, TOOLS, max_rounds=1, on_call=lambda name, given: told.append(name), tool_choice="required",
        template=pw.TOOLS_TEMPLATE, temperature=1, seed=3, max_tokens=600, logit_bias=QUOTE, parallel_tool_calls=False,
    )  # fmt: skip
    assert run.n_rounds == 1 and len(told) == 1
    roles = [message["role"] for message in run.messages]
    assert roles == ["user", "assistant", "tool", "assistant"]
    prompt = random_model.apply_chat_template(run.messages, template=pw.TOOLS_TEMPLATE)
    assert f"<tool_response>\n{run.messages[2]['content']}\n</tool_response>" in prompt
    assert '<tool_call>\n{"name": "' + told[0] in prompt


def test_templates_without_tools_are_typed_errors(model: pw.Model, random_model: pw.Model) -> None:
    with pytest.raises(pw.UnsupportedModelError, match=r"takes no tools.*TOOLS_TEMPLATE"):
        model.chat(QUESTION, tools=TOOLS)
    with pytest.raises(pw.UnsupportedModelError, match="no answers of a given format"):
        asked(random_model, template_of("Kimi-K2-Instruct"), tools=None, response_format={"type": "json_object"})


def test_two_ways_to_say_what_the_answer_is_are_refused(random_model: pw.Model) -> None:
    json_object = {"type": "json_object"}
    for options in ({"response_format": json_object}, {"grammar": 'root ::= "a"'}):
        with pytest.raises(pw.RequestError, match="each say what the answer is"):
            asked(random_model, **options)
    with pytest.raises(pw.RequestError, match="does not go with a grammar"):
        asked(random_model, tools=None, grammar='root ::= "a"', reasoning_budget=3)
    assert asked(random_model, tools=None, grammar='root ::= "ab"').text == "ab"
    assert asked(random_model, tool_choice="none", response_format=json_object).parsed is not None


@pytest.mark.parametrize("budget", [0, 1, 7])
def test_reasoning_ends_with_its_budget(random_model: pw.Model, budget: int) -> None:
    template = template_of("Qwen-QwQ-32B")
    answer = asked(
        random_model, template, tools=None, reasoning_budget=budget, reasoning_budget_message="(Enough)", max_tokens=60
    )
    thought = answer.reasoning_content
    assert thought.endswith("(Enough)")
    assert len(thought.removesuffix("(Enough)").encode()) <= 3 * budget + 2
    assert answer.text
    free = asked(random_model, template, tools=None, max_tokens=60)
    assert not free.text and "(Enough)" not in free.reasoning_content


@pytest.mark.parametrize("budget", [-1, True, "3", 1 << 31])
def test_bad_budgets_are_refused(random_model: pw.Model, budget: Any) -> None:
    with pytest.raises(pw.RequestError, match="reasoning_budget is"):
        asked(random_model, tools=None, reasoning_budget=budget)


def test_an_answer_goes_on_from_its_prefill(model: pw.Model) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    answer = model.chat(messages, prefill="The capital of France is", temperature=0, max_tokens=8)
    assert answer.text.startswith(" Paris")
    assert answer.message["content"] == answer.text


def test_thinking_can_be_turned_off(model: pw.Model) -> None:
    template = template_of("Qwen-Qwen3-0.6B")
    with_it = model.chat_prompt(QUESTION, template=template)
    without = model.chat_prompt(QUESTION, template=template, template_kwargs={"enable_thinking": False})
    assert with_it.thinks and not with_it.prompt.endswith("</think>\n\n")
    assert without.prompt.endswith("<think>\n\n</think>\n\n")


def test_every_template_of_llama_cpp_is_rendered(random_model: pw.Model) -> None:
    found = sorted(TEMPLATES.glob("*.jinja"))
    assert len(found) > 60
    with_tools = with_json = 0
    for file in found:
        template = file.read_text(encoding="utf-8")
        assert random_model.chat_prompt(QUESTION, template=template).prompt
        with contextlib.suppress(pw.UnsupportedModelError):
            with_tools += "get_weather" in random_model.chat_prompt(QUESTION, template=template, tools=TOOLS).prompt
        with contextlib.suppress(pw.UnsupportedModelError):
            json_object = {"type": "json_object"}
            assert random_model.chat_prompt(QUESTION, template=template, response_format=json_object).grammar
            with_json += 1
    assert with_tools >= 50 and with_json >= 60


def test_an_answer_that_is_not_in_the_format_is_typed(random_model: pw.Model) -> None:
    with pytest.raises(pw.AnswerError, match="does not match the expected") as caught:
        asked(random_model, template_of("openai-gpt-oss-120b"), max_tokens=10)
    assert caught.value.text


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content }}{{ '<tool_call>' * 500 }}",
        "{% for tool in tools %}{{ tool.function.name }}{% endfor %}{{ '(' * 5000 }}",
        "{% if tools %}{{ tools[0].function.parameters.properties.city.type }}{% endif %}</s></s>",
        "{{ raise_exception('no tools') if tools else '' }}",
        "",
    ],
)
def test_hostile_templates_are_typed_errors(random_model: pw.Model, template: str) -> None:
    for options in ({}, {"tool_choice": "required"}, {"tools": None, "response_format": {"type": "json_object"}}):
        with contextlib.suppress(pw.RequestError, pw.ModelError, pw.GuestException):
            asked(random_model, template, max_tokens=5, **options)
    assert random_model.generate("a", max_tokens=1).usage.completion_tokens == 1
