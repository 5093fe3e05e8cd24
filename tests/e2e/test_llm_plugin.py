"""The plugin with the real ``llm``: its command line, its Python interface, and what it keeps."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

# Read when llm is imported. The demo model's package is a plugin too, and lacks what it needs.
os.environ.setdefault("LLM_LOAD_PLUGINS", "pyllama-wasm")

import llm
from huggingface_hub import constants
from llm.cli import cli
from pydantic import BaseModel

import pyllama_wasm as pw
from pyllama_wasm import llm_plugin
from pyllama_wasm._llm_store import Known, Store
from pyllama_wasm.types import ChatCompletion, Timings, Usage

from ..hub_server import HubServer, Repo

BRIEF = "Answer in one sentence."
QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."

Run = Callable[..., str]


@pytest.fixture(autouse=True)
def user_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path / "llm"))
    for name in ("LLM_MODEL", "LLM_EMBEDDING_MODEL"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "llm"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    def run(*arguments: str, exit_code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["llm", *arguments])
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == exit_code, result.output
        return result.output.strip()

    return run


def test_a_path_answers_and_the_conversation_goes_on(run: Run, smollm2_path: Path, user_dir: Path) -> None:
    name = f"pyllama-wasm/{smollm2_path}"
    assert run("-m", name, "-s", BRIEF, "-o", "temperature", "0", QUESTION) == ANSWER
    # Nothing names the model now but llm's log.
    assert run("-c", "-o", "temperature", "0", "-o", "max_tokens", "4", "--no-stream", "Which country is it in?")
    logged = json.loads(run("logs", "--json"))
    assert [entry["model"] for entry in logged] == [name, name]
    assert logged[0]["conversation_id"] == logged[1]["conversation_id"]
    assert logged[0]["output_tokens"] == 8
    assert logged[0]["response_json"] == {"finish_reason": "stop"}
    assert f"chat       {name}  {smollm2_path}" in run("pyllama-wasm", "list")


def test_the_command_finds_the_plugin_by_its_entry_point(smollm2_path: Path) -> None:
    command = [sys.executable, "-m", "llm", "-m", "pyllama-wasm/demo", "-o", "temperature", "0", "-s", BRIEF, QUESTION]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (answer.stdout.strip(), answer.stderr) == (ANSWER, "")


def test_a_reference_is_fetched(
    run: Run, write_tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", chat_template="{{ messages[-1].content }}")
    server = HubServer()
    server.repos["user/tiny"] = Repo()
    server.repos["user/tiny"].commit({"tiny-F32.gguf": path.read_bytes()})
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    try:
        run("-m", "pyllama-wasm/user/tiny:F32", "-o", "max_tokens", "3", "Hello")
        run("pyllama-wasm", "add", "small", "hf:user/tiny", "-a", "sm")
        assert "no model is named other" in run("pyllama-wasm", "remove", "other", exit_code=1)
    finally:
        server.close()
    # From here on there is no server.
    run("-m", "sm", "-o", "max_tokens", "3", "Hello")
    assert run("pyllama-wasm", "list").splitlines() == [
        "chat       pyllama-wasm/small (sm)  hf:user/tiny",
        "chat       pyllama-wasm/user/tiny:F32  user/tiny:F32",
    ]
    assert "pyllama-wasm/small (aliases: sm)" in run("models")
    run("pyllama-wasm", "remove", "pyllama-wasm/small")
    assert "pyllama-wasm/small" not in run("models")
    assert "Unknown model" in run("-m", "sm", "Hello", exit_code=1)


def test_what_is_no_model_cannot_be_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"nothing")
    assert "instead of 'GGUF'" in run("pyllama-wasm", "add", "bad", str(tmp_path / "bad.gguf"), exit_code=1)
    assert "No such file" in run("pyllama-wasm", "add", "bad", str(tmp_path / "absent.gguf"), exit_code=1)
    assert run("pyllama-wasm", "list") == ""


def test_a_model_that_cannot_be_loaded_is_told_on_one_line(run: Run, tmp_path: Path) -> None:
    output = run("-m", f"pyllama-wasm/{tmp_path}/absent.gguf", "Hello", exit_code=1)
    assert output == "Error: load absent.gguf: No such file or directory (check the path)"
    assert run("pyllama-wasm", "list") == ""


def test_the_default_model_may_be_a_reference(run: Run, tmp_path: Path, write_tiny: Callable[..., Path]) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", chat_template="{{ messages[-1].content }}")
    run("models", "default", f"pyllama-wasm/{path}")
    run("-o", "max_tokens", "2", "Hello")
    assert f"pyllama-wasm/{path}" in run("logs", "--json")


def test_embeddings_are_those_of_the_model(run: Run, minilm_path: Path) -> None:
    vector = json.loads(run("embed", "-m", f"pyllama-wasm/{minilm_path}", "-c", "Hello"))
    with pw.Model(minilm_path) as model:
        assert vector == pytest.approx([float(value) for value in model.embed("Hello")], abs=1e-5)
    # It was remembered, as a collection knows the model only by its name.
    model = llm.get_embedding_model(f"pyllama-wasm/{minilm_path}")  # type: ignore[no-untyped-call]
    assert len(list(model.embed_multi(["one", "two", "three"]))) == 3
    assert list(model.embed_multi([])) == []
    run("pyllama-wasm", "add", "mini", str(minilm_path), "--embedding")
    assert f"embedding  pyllama-wasm/mini  {minilm_path}" in run("pyllama-wasm", "list")


def test_the_answer_comes_in_pieces_and_is_counted(smollm2_path: Path) -> None:
    model = llm.get_model("pyllama-wasm/demo")
    response = model.prompt(QUESTION, system=BRIEF, temperature=0)
    pieces = list(response)
    assert len(pieces) > 3
    assert "".join(pieces) == ANSWER
    usage = response.usage()
    with pw.Model(smollm2_path) as own:
        messages = [{"role": "system", "content": BRIEF}, {"role": "user", "content": QUESTION}]
        expected = own.chat(messages, temperature=0).usage
    assert (usage.input, usage.output) == (expected.prompt_tokens, expected.completion_tokens)


def test_an_answer_that_nobody_reads_on_is_stopped(smollm2_path: Path) -> None:
    iterator = iter(llm.get_model("pyllama-wasm/demo").prompt("Count to one thousand.", temperature=0))
    next(iterator)
    del iterator
    assert "Paris" in llm.get_model("pyllama-wasm/demo").prompt(QUESTION, system=BRIEF, temperature=0).text()


def test_options_are_checked_and_reach_the_sampler(smollm2_path: Path) -> None:
    model = llm.get_model("pyllama-wasm/demo")
    assert model.prompt(QUESTION, system=BRIEF, temperature=0, stop=" is").text() == "The capital of France"
    assert model.prompt(QUESTION, system=BRIEF, temperature=0, max_tokens=2).text() == "The capital"
    texts = {model.prompt("Tell a story.", temperature=2, top_k=0, seed=5, max_tokens=4).text() for _ in range(2)}
    assert len(texts) == 1
    for options in ({"temperature": -1}, {"top_p": 2}, {"seed": -1}, {"max_tokens": 0}, {"unknown": 1}):
        with pytest.raises(ValueError, match="validation error"):
            model.prompt("x", options=options)


def test_the_async_model_answers_the_same(smollm2_path: Path) -> None:
    async def ask() -> tuple[str, Any, str]:
        model = llm.get_async_model("pyllama-wasm/demo")
        conversation = model.conversation()
        first = conversation.prompt(QUESTION, system=BRIEF, temperature=0)
        text = await first.text()
        second = conversation.prompt("Say it again.", temperature=0, max_tokens=8)
        return text, await first.usage(), await second.text()

    text, usage, again = asyncio.run(ask())
    assert text == ANSWER
    assert usage.output == 8
    assert again


def test_attachments_are_refused(tmp_path: Path) -> None:
    model = llm.get_model("pyllama-wasm/demo")
    with pytest.raises(ValueError, match="does not support attachments"):
        model.prompt("What is this?", attachments=[llm.Attachment(type="image/png", content=b"png")])
    message = llm.user("What is this?", llm.Attachment(type="image/png", content=b"png"))
    with pytest.raises(llm.ModelError, match="only text is supported"):
        model.prompt(messages=[message]).text()


def test_without_llm_the_plugin_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llm", None)
    monkeypatch.delitem(sys.modules, "pyllama_wasm.llm_plugin")
    with pytest.raises(pw.MissingExtraError, match=r"pip install 'pyllama-wasm\[llm\]'"):
        importlib.import_module("pyllama_wasm.llm_plugin")


class Person(BaseModel):
    """Somebody."""

    name: str
    age: int


@pytest.mark.parametrize(
    "schema", [Person, {"type": "object", "properties": {"x": {"enum": ["only"]}}, "required": ["x"]}]
)
def test_an_answer_is_of_its_schema(smollm2_path: Path, schema: Any) -> None:
    response = llm.get_model("pyllama-wasm/demo").prompt(
        "Invent a person.", schema=schema, temperature=0, max_tokens=99
    )
    if schema is Person:
        Person.model_validate_json(response.text())
    else:
        assert response.json() is not None
        assert json.loads(response.text()) == {"x": "only"}


class Scripted:
    """A model that answers by a script and keeps what it was asked."""

    def __init__(self, *answers: list[dict[str, Any]]) -> None:
        self.answers = list(answers)
        self.asked: list[dict[str, Any]] = []

    def chat(self, **arguments: Any) -> SimpleNamespace:
        self.asked.append(arguments)
        deltas = self.answers.pop(0)
        text = "".join(delta.get("content", "") for delta in deltas)
        completion = ChatCompletion(text, (), "stop", Usage(5, 3, 2), Timings(0, 0, 0, 0, 0))
        return SimpleNamespace(deltas=lambda: iter(deltas), close=lambda: None, completion=completion)


def call(index: int, name: str, *arguments: str) -> Iterator[dict[str, Any]]:
    first = {"index": index, "id": f"id{index}", "type": "function", "function": {"name": name, "arguments": ""}}
    yield {"tool_calls": [first]}
    for piece in arguments:
        yield {"tool_calls": [{"index": index, "function": {"arguments": piece}}]}


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def test_tools_are_called_and_their_results_go_back(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [*call(0, "add", '{"a": 1,', ' "b": 2}'), *call(1, "add", '{"a": 3, "b": 4}')]
    model = Scripted([{"role": "assistant"}, *calls], [{"content": "3 "}, {"content": "and 7"}])
    monkeypatch.setattr(llm_plugin, "warm_model", lambda _: model)
    chain = llm.get_model("pyllama-wasm/demo").conversation().chain("1+2? 3+4?", tools=[add], system="Count.")
    assert "".join(chain) == "3 and 7"
    first, second = model.asked
    assert first["tools"][0]["function"]["name"] == "add"
    assert first["tools"][0]["function"]["description"] == "Add two numbers."
    assert set(first["tools"][0]["function"]["parameters"]["properties"]) == {"a", "b"}
    assert [message["role"] for message in first["messages"]] == ["system", "user"]
    roles = [message["role"] for message in second["messages"]]
    assert roles == ["system", "user", "assistant", "tool", "tool"]
    assert [made["function"] for made in second["messages"][2]["tool_calls"]] == [
        {"name": "add", "arguments": '{"a": 1, "b": 2}'},
        {"name": "add", "arguments": '{"a": 3, "b": 4}'},
    ]
    assert [(answer["tool_call_id"], answer["content"]) for answer in second["messages"][3:]] == [
        ("id0", "3"),
        ("id1", "7"),
    ]


class ScriptedAwaited:
    """The same, awaited."""

    def __init__(self, model: Scripted) -> None:
        self._model = model

    async def chat(self, **arguments: Any) -> ScriptedAwaited:
        self._answer = self._model.chat(**arguments)
        self.completion = self._answer.completion
        return self

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, *_: object) -> None:
        pass

    async def deltas(self) -> AsyncIterator[dict[str, Any]]:
        for delta in self._answer.deltas():
            yield delta


def test_the_async_model_tells_tool_calls_and_reasoning_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    script = [{"reasoning_content": "Hm."}, {"content": "So"}, *call(0, "add", '{"a": 1,', ' "b": 2}')]
    model = Scripted(script, [{"content": "3"}])
    monkeypatch.setattr(llm_plugin, "warm_model", lambda _: model)
    monkeypatch.setattr(llm_plugin, "AwaitedModel", ScriptedAwaited)

    async def ask() -> tuple[list[tuple[str, str]], list[tuple[str, dict[str, Any]]], str]:
        asked = llm.get_async_model("pyllama-wasm/demo")
        response = asked.prompt("1+2?", tools=[add])
        stream: AsyncIterator[Any] = response.astream_events()  # type: ignore[no-untyped-call]
        events = [(event.type, event.chunk) async for event in stream]
        made = [(made.name, made.arguments) for made in await response.tool_calls()]
        return events, made, await asked.prompt("And?").text()

    events, made, text = asyncio.run(ask())
    assert events == [
        ("reasoning", "Hm."), ("text", "So"), ("tool_call_name", "add"),
        ("tool_call_args", '{"a": 1,'), ("tool_call_args", ' "b": 2}'),
    ]  # fmt: skip
    assert made == [("add", {"a": 1, "b": 2})]
    assert text == "3"


def test_tools_reach_a_model_whose_template_has_them(
    run: Run, tmp_path: Path, write_tiny: Callable[..., Path], smollm2_path: Path
) -> None:
    path = write_tiny(tmp_path / "tools.gguf", chat_template=pw.TOOLS_TEMPLATE)
    code = "def add(a: int, b: int) -> int:\n    return a + b"
    run("-m", f"pyllama-wasm/{path}", "--functions", code, "-o", "max_tokens", "4", "-o", "seed", "1", "1 + 2?")
    refused = run("-m", "pyllama-wasm/demo", "--functions", code, "1 + 2?", exit_code=1)
    assert refused.startswith("Error: chat: the model's chat template takes no tools")


def test_reasoning_is_told_apart_from_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        llm_plugin, "warm_model", lambda _: Scripted([{"reasoning_content": "Hm."}, {"content": "Yes"}])
    )
    response = llm.get_model("pyllama-wasm/demo").prompt("Is it?")
    events: Iterator[Any] = response.stream_events()  # type: ignore[no-untyped-call]
    assert [(event.type, event.chunk) for event in events] == [("reasoning", "Hm."), ("text", "Yes")]
    assert response.text() == "Yes"


def test_a_call_that_was_cut_off_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [*call(0, "add", '{"a": 1,'), *call(1, "add", "[1]"), *call(2, "add")]
    monkeypatch.setattr(llm_plugin, "warm_model", lambda _: Scripted(calls))
    response = llm.get_model("pyllama-wasm/demo").prompt("1+2?", tools=[add])
    assert [(made.name, made.arguments) for made in response.tool_calls()] == [("add", {})]


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"chat": [1]}', '{"chat": {"x": 1}}', '{"chat": {"x": {"reference": 1}}}']
)
def test_a_damaged_file_of_names_harms_nothing(tmp_path: Path, content: str) -> None:
    store = Store(tmp_path)
    store.path.write_text(content)
    assert store.read("chat") == {}
    store.add("chat", "y", Known("u/r", ("a",)))
    assert store.read("chat") == {"y": Known("u/r", ("a",))}
    assert store.remove("y")


def test_a_file_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(pw.ModelFileError):
        Store(tmp_path / "file" / "folder").add("chat", "x", Known("u/r"))
