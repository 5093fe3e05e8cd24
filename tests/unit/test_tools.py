"""Functions described as tools, and called."""

from __future__ import annotations

import asyncio
import enum
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Any, Literal, TypedDict

import pydantic
import pytest

import pyllama_wasm as pw
from pyllama_wasm.tool_loop import await_tools, run_tools, tool_steps
from pyllama_wasm.tools import call_tool, choose_tools, function_tool


class Unit(enum.Enum):
    C = "celsius"
    F = "fahrenheit"


@dataclass
class Place:
    """Where something is."""

    city: str
    country: str = "France"


class Point(TypedDict):
    x: float
    y: float


class Person(pydantic.BaseModel):
    name: str
    born: date | None = None


def weather(
    place: Place, unit: Unit = Unit.C, days: Annotated[int, "How many."] = 1, kind: Literal["now", "soon"] = "now"
) -> str:
    """Tell the weather.

    It is always sunny.

    Args:
        place: The city,
            and its country.
        unit (Unit): What to tell it in.

    Returns:
        What it will be like.
    """
    return f"{place.city}, {place.country}: 18 {unit.value}, {days} {kind}"


def test_a_function_is_described_by_its_hints_and_its_docstring() -> None:
    tool = function_tool(weather)
    assert tool["type"] == "function"
    function = tool["function"]
    assert function["name"] == "weather"
    assert function["description"] == "Tell the weather.\n\nIt is always sunny."
    schema = function["parameters"]
    assert schema["required"] == ["place"] and schema["additionalProperties"] is False
    assert schema["properties"] == {
        "place": {"$ref": "#/$defs/Place", "description": "The city, and its country."},
        "unit": {"enum": ["celsius", "fahrenheit"], "description": "What to tell it in."},
        "days": {"type": "integer", "description": "How many."},
        "kind": {"enum": ["now", "soon"]},
    }
    assert schema["$defs"]["Place"]["description"] == "Where something is."
    assert schema["$defs"]["Place"]["required"] == ["city"]


def test_every_kind_of_type_has_a_schema() -> None:
    def tool(
        a: list[int],
        b: dict[str, float],
        c: tuple[int, str],
        d: bool | None,
        e: Any,
        f: Point,
        g: Person,
    ) -> None: ...

    found = function_tool(tool)["function"]["parameters"]["properties"]
    assert found["a"] == {"type": "array", "items": {"type": "integer"}}
    assert found["b"] == {"type": "object", "additionalProperties": {"type": "number"}}
    assert found["c"]["prefixItems"] == [{"type": "integer"}, {"type": "string"}]
    assert found["d"] == {"anyOf": [{"type": "boolean"}, {"type": "null"}]}
    assert found["e"] == {}
    assert found["f"] == {"$ref": "#/$defs/Point"} and found["g"] == {"$ref": "#/$defs/Person"}


def no_hints(a, b=2):  # type: ignore[no-untyped-def]
    return [a, b]


class Greeter:
    """Say hello."""

    def __init__(self, word: str) -> None:
        self.word = word

    def __call__(self, name: str) -> str:
        return f"{self.word} {name}"

    def greet(self, name: str) -> str:
        return self(name)


@pytest.mark.parametrize(
    ("tool", "arguments", "result"),
    [
        (weather, {"place": {"city": "Paris"}, "unit": "fahrenheit"}, "Paris, France: 18 fahrenheit, 1 now"),
        (no_hints, {"a": 1}, "[1, 2]"),
        (Greeter("Hi"), {"name": "Ann"}, "Hi Ann"),
        (Greeter("Ho").greet, {"name": "Ann"}, "Ho Ann"),
    ],
)
def test_a_call_converts_its_arguments_and_its_result(
    tool: Callable[..., Any], arguments: dict[str, Any], result: str
) -> None:
    assert call_tool(tool, "it", json.dumps(arguments)) == result


def test_models_and_dataclasses_are_results_too() -> None:
    def born(person: Person) -> Person:
        assert person.born == date(2000, 2, 29)
        return person

    def place() -> Place:
        return Place("Rome", "Italy")

    answer = call_tool(born, "born", '{"person": {"name": "Ann", "born": "2000-02-29"}}')
    assert json.loads(answer) == {"name": "Ann", "born": "2000-02-29"}
    assert json.loads(call_tool(place, "place", "")) == {"city": "Rome", "country": "Italy"}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("{", "error: JSONDecodeError"),
        ("[1]", "error: TypeError: the arguments are no object"),
        ("{}", "error: TypeError: the parameter 'place' is missing"),
        ('{"plaice": 1}', "error: TypeError: there is no parameter 'plaice'"),
        ('{"place": "Paris"}', "error: TypeError: 'Paris' is no dict"),
        ('{"place": {"town": "Paris"}}', "error: ValueError: Place has no 'town'"),
        ('{"place": {"city": "Paris"}, "days": "1"}', "error: TypeError: '1' is no int"),
        ('{"place": {"city": "Paris"}, "days": true}', "error: TypeError: True is no int"),
        ('{"place": {"city": "Paris"}, "unit": "K"}', "error: ValueError: 'K' is not a valid Unit"),
        ('{"place": {"city": "Paris"}, "kind": "never"}', "error: ValueError: 'never' is none of"),
    ],
)
def test_what_goes_wrong_is_told_to_the_model(arguments: str, reason: str) -> None:
    assert call_tool(weather, "weather", arguments).startswith(reason)


def test_whatever_a_tool_raises_is_text() -> None:
    def fails() -> None:
        raise KeyError("no such city")

    assert call_tool(fails, "fails", "{}") == "error: KeyError: 'no such city'"
    assert call_tool(None, "gone", "{}") == "error: LookupError: there is no tool gone"


@pytest.mark.parametrize(
    ("tool", "reason"),
    [
        (lambda *args: None, "has no name of its own"),
        (lambda **kwargs: None, "has no name of its own"),
        (lambda a=b"": a, None),
        (bytes.hex, "no name of its own|no signature"),
    ],
)
def test_functions_that_cannot_be_described_are_refused(tool: Callable[..., Any], reason: str | None) -> None:
    if reason is None:
        assert function_tool(tool)["function"]["parameters"]["properties"] == {"a": {}}
        return
    with pytest.raises(pw.RequestError, match=reason):
        function_tool(tool)


def test_types_without_a_schema_are_refused() -> None:
    def tool(a: bytes) -> None: ...

    def unknown(a: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(pw.RequestError, match="bytes has no JSON schema"):
        function_tool(tool)
    with pytest.raises(pw.RequestError, match="cannot be read: name 'Nowhere'"):
        function_tool(unknown)


DESCRIBED = {"type": "function", "function": {"name": "described", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("tools", "choice", "reason"),
    [
        ("weather", None, "tools is str and no list"),
        (DESCRIBED, None, "tools is dict and no list"),
        ([3], None, "tool 0 is neither a function"),
        ([{"name": "x"}], None, "tool 0 is neither a function"),
        ([{"type": "function", "function": {"name": "a b"}}], None, "the name of tool 0 is 'a b'"),
        ([{"type": "function", "function": {"name": "a", "description": 3}}], None, "description of tool a is no text"),
        ([{"type": "function", "function": {"name": "a", "parameters": []}}], None, "parameters of tool a are no sche"),
        ([weather, weather], None, "two tools have the same name"),
        ([weather], "rain", "tool_choice is 'rain'"),
        ([weather], {"type": "function"}, "tool_choice is"),
        (None, "required", "there are no tools"),
        (
            [{"type": "function", "function": {"name": "a", "strict": True, "parameters": {"not": {}}}}],
            None,
            "not cannot be kept",
        ),
    ],
)
def test_bad_tools_are_named(tools: Any, choice: Any, reason: str) -> None:
    with pytest.raises(pw.RequestError, match=reason):
        choose_tools(tools, choice)


def test_the_choice_says_what_is_passed_on() -> None:
    assert choose_tools(None, None) == (None, None)
    assert choose_tools([], "auto") == (None, None)
    for choice in ("none", "auto", "required"):
        tools, said = choose_tools([weather, DESCRIBED], choice)
        assert tools is not None and len(tools) == 2 and said == choice
    for named in ("described", {"type": "function", "function": {"name": "described"}}):
        tools, said = choose_tools([weather, DESCRIBED], named)
        assert said == "required" and tools is not None
        assert [tool["function"]["name"] for tool in tools] == ["described"]


# -- the loop ---------------------------------------------------------------------------------------------------------


def answer(text: str, *calls: tuple[str, str]) -> pw.ChatCompletion:
    message: pw.ChatMessage = {"role": "assistant", "content": text or None}
    if calls:
        message["tool_calls"] = [
            {"id": f"id{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for i, (name, arguments) in enumerate(calls)
        ]
    usage, timings = pw.Usage(1, 1), pw.Timings(0, 0, 0, 1, 0)
    return pw.ChatCompletion(text, (1,), "tool_calls" if calls else "stop", usage, timings, message=message)


class Script:
    """A chat that answers what was written down."""

    def __init__(self, *answers: pw.ChatCompletion) -> None:
        self.answers = list(answers)
        self.asked: list[dict[str, Any]] = []

    def __call__(self, messages: list[Mapping[str, Any]], **options: Any) -> pw.ChatCompletion:
        self.asked.append({"messages": list(messages), **options})
        return self.answers.pop(0)


QUESTION = [{"role": "user", "content": "Weather?"}]


def test_calls_are_made_until_the_model_asks_no_more() -> None:
    chat = Script(
        answer("", ("no_hints", '{"a": 1}'), ("gone", "{}")), answer("", ("no_hints", "{}")), answer("It is sunny.")
    )
    told: list[object] = []
    run = run_tools(
        chat, QUESTION, [no_hints], 8, lambda name, given: told.append((name, given)), {"tool_choice": "required"}
    )
    assert str(run) == "It is sunny." and run.n_rounds == 2
    assert told == [("no_hints", {"a": 1}), ("gone", {}), ("no_hints", {})]
    results = [message for message in run.messages if message["role"] == "tool"]
    assert [(message["tool_call_id"], message["content"]) for message in results] == [
        ("id0", "[1, 2]"),
        ("id1", "error: LookupError: there is no tool gone"),
        ("id0", "error: TypeError: the parameter 'a' is missing"),
    ]
    assert [asked["tool_choice"] for asked in chat.asked] == ["required", "auto", "auto"]
    assert run.messages[-1] == run.completion.message


async def later(city: str) -> str:
    """Tell the weather, after a while."""
    await asyncio.sleep(0.01)
    return f"{city}: rain"


class Station:
    async def __call__(self, n: int) -> int:
        if n < 0:
            raise ValueError("too cold")
        return n + 1


def test_coroutine_functions_are_described_and_awaited_and_others_called_in_a_thread() -> None:
    assert function_tool(later)["function"]["parameters"]["required"] == ["city"]
    threads: list[str] = []

    def here(a: int) -> int:
        threads.append(threading.current_thread().name)
        return a

    async def told(name: str, given: Mapping[str, Any]) -> None:
        names.append(name)

    async def in_thread(call: Callable[[], Any]) -> Any:
        return await asyncio.to_thread(call)

    calls = (("later", '{"city": "Rome"}'), ("Station", '{"n": 1}'), ("Station", '{"n": -1}'), ("here", '{"a": 5}'))
    script, names = Script(answer("", *calls, ("later", "[]")), answer("Wet.")), list[str]()

    async def chat(messages: list[Mapping[str, Any]], **options: Any) -> pw.ChatCompletion:
        return script(messages, **options)

    steps = tool_steps(QUESTION, [later, Station(), here], 8, {})
    run = asyncio.run(await_tools(chat, steps, told, in_thread))
    results = [message["content"] for message in run.messages if message["role"] == "tool"]
    wrong = "error: TypeError: the arguments are no object"
    assert results == ["Rome: rain", "2", "error: ValueError: too cold", "5", wrong]
    assert names == ["later", "Station", "Station", "here", "later"]
    assert str(run) == "Wet." and threads != [threading.current_thread().name]
    for tool in (later, Station()):
        with pytest.raises(pw.RequestError, match=r"coroutine function .*AsyncModel"):
            run_tools(Script(), QUESTION, [tool], 1, None, {})


def test_after_the_last_round_there_are_no_tools() -> None:
    chat = Script(answer("", ("no_hints", '{"a": 1}')), answer("Enough."))
    run = run_tools(chat, QUESTION, [no_hints], 1, None, {})
    assert run.n_rounds == 1 and str(run) == "Enough."
    assert [asked["tool_choice"] for asked in chat.asked] == [None, "none"]


def test_a_tool_that_is_only_described_is_left_to_the_caller() -> None:
    chat = Script(answer("", ("no_hints", '{"a": 1}'), ("described", "{}")))
    run = run_tools(chat, QUESTION, [no_hints, DESCRIBED], 8, None, {})
    assert [call["function"]["name"] for call in run.completion.tool_calls] == ["no_hints", "described"]
    assert len(run.messages) == 2


def test_bad_arguments_of_the_loop_are_refused() -> None:
    for rounds, options, reason in (
        (-1, {}, "no count"),
        (True, {}, "no count"),
        (1, {"stream": True}, "cannot stream"),
    ):
        with pytest.raises(pw.RequestError, match=reason):
            run_tools(Script(), QUESTION, [no_hints], rounds, None, options)
