"""The loop that makes the calls a model asks for, until it asks no more."""

from __future__ import annotations

import inspect
import json
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from .errors import RequestError
from .tools import Tool, await_tool, call_tool, is_coroutine_tool, tool_name
from .types import ChatCompletion

__all__ = ["ToolRun", "await_tools", "run_tools", "tool_steps"]


@dataclass(frozen=True)
class ToolRun:
    """What became of a conversation with tools; ``str()`` of it is the last answer's text."""

    messages: list[Mapping[str, Any]]
    """The whole conversation: what was given, the calls, their results, and the last answer."""

    completion: ChatCompletion
    """The last answer. It still has ``tool_calls`` where one of them is of a tool that is only a description."""

    n_rounds: int
    """How many answers had calls that were made."""

    def __str__(self) -> str:
        """Return the last answer's text."""
        return self.completion.text


@dataclass(frozen=True)
class _Ask:
    """The model is to answer; what is sent back is its ``ChatCompletion``."""

    messages: list[Mapping[str, Any]]
    options: dict[str, Any]


@dataclass(frozen=True)
class _Make:
    """A tool is to be called; what is sent back is its result as text."""

    tool: Tool | None
    name: str
    arguments: str


_Steps = Generator[_Ask | _Make, Any, ToolRun]


def run_tools(
    chat: Callable[..., ChatCompletion],
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Tool],
    max_rounds: int,
    on_call: Callable[[str, Mapping[str, Any]], object] | None,
    options: dict[str, Any],
) -> ToolRun:
    """Alternate between ``chat`` and the tools; see ``Model.run_tools``."""
    for tool in tools:
        if is_coroutine_tool(tool):
            raise RequestError("run tools", f"{tool_name(tool)} is a coroutine function", "use AsyncModel.run_tools")
    steps = tool_steps(messages, tools, max_rounds, options)
    found: Any = None
    while True:
        try:
            step = steps.send(found)
        except StopIteration as stop:
            return cast(ToolRun, stop.value)
        if isinstance(step, _Ask):
            found = chat(step.messages, **step.options)
        else:
            if on_call is not None:
                on_call(step.name, _read(step.arguments))
            found = call_tool(step.tool, step.name, step.arguments)


async def await_tools(
    chat: Callable[..., Awaitable[ChatCompletion]],
    steps: _Steps,
    on_call: Callable[[str, Mapping[str, Any]], object] | None,
    in_thread: Callable[[Callable[[], Any]], Awaitable[Any]],
) -> ToolRun:
    """Do as ``run_tools`` for an event loop: what can be awaited is, other functions are called by ``in_thread``."""
    found: Any = None
    while True:
        try:
            step = steps.send(found)
        except StopIteration as stop:
            return cast(ToolRun, stop.value)
        if isinstance(step, _Ask):
            found = await chat(step.messages, **step.options)
        else:
            if on_call is not None:
                told = on_call(step.name, _read(step.arguments))
                if inspect.isawaitable(told):
                    await told
            found = await await_tool(step.tool, step.name, step.arguments, in_thread)


def tool_steps(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool], max_rounds: int, options: dict[str, Any]
) -> _Steps:
    """Yield what is to be done one after the other, for ``await_tools``; raises ``RequestError`` for what cannot be."""
    if isinstance(max_rounds, bool) or not isinstance(max_rounds, int) or max_rounds < 0:
        raise RequestError("run tools", f"max_rounds is {max_rounds!r} and no count")
    if options.get("stream"):
        raise RequestError("run tools", "it cannot stream", "stream the rounds yourself: chat(..., stream=True)")
    functions = {tool_name(tool): tool for tool in tools}
    told: list[Mapping[str, Any]] = list(messages)
    left = dict(options)
    choice = left.pop("tool_choice", None)
    for n_rounds in range(max_rounds + 1):
        if n_rounds == max_rounds:
            choice = "none"
        answer: ChatCompletion = yield _Ask(told, {"tools": tools, "tool_choice": choice, **left})
        told.append(answer.message)
        calls = answer.tool_calls if answer.finish_reason == "tool_calls" else ()
        if not calls or any(isinstance(functions.get(call["function"]["name"]), Mapping) for call in calls):
            return ToolRun(told, answer, n_rounds)
        for call in calls:
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            content: str = yield _Make(functions.get(name), name, arguments)
            told.append({"role": "tool", "tool_call_id": call["id"], "name": name, "content": content})
        choice = None if choice == "none" else "auto"  # what was required has been done
    return ToolRun(told, answer, max_rounds)


def _read(arguments: str) -> Mapping[str, Any]:
    try:
        found = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
