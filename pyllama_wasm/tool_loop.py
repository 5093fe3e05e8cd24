"""The loop that makes the calls a model asks for, until it asks no more."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import RequestError
from .tools import Tool, call_tool, tool_name
from .types import ChatCompletion, ToolCall

__all__ = ["ToolRun", "run_tools"]


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


def run_tools(
    chat: Callable[..., ChatCompletion],
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Tool],
    max_rounds: int,
    on_call: Callable[[str, Mapping[str, Any]], object] | None,
    options: dict[str, Any],
) -> ToolRun:
    """Alternate between ``chat`` and the tools; see ``Model.run_tools``."""
    if isinstance(max_rounds, bool) or not isinstance(max_rounds, int) or max_rounds < 0:
        raise RequestError("run tools", f"max_rounds is {max_rounds!r} and no count")
    if options.get("stream"):
        raise RequestError("run tools", "it cannot stream", "stream the rounds yourself: chat(..., stream=True)")
    functions = {tool_name(tool): tool for tool in tools}
    told: list[Mapping[str, Any]] = list(messages)
    choice = options.pop("tool_choice", None)
    for n_rounds in range(max_rounds + 1):
        if n_rounds == max_rounds:
            choice = "none"
        answer = chat(told, tools=tools, tool_choice=choice, **options)
        told.append(answer.message)
        calls = answer.tool_calls if answer.finish_reason == "tool_calls" else ()
        if not calls or any(isinstance(functions.get(call["function"]["name"]), Mapping) for call in calls):
            return ToolRun(told, answer, n_rounds)
        for call in calls:
            told.append(_made(functions, call, on_call))
        choice = None if choice == "none" else "auto"  # what was required has been done
    return ToolRun(told, answer, max_rounds)


def _made(
    functions: Mapping[str, Tool], call: ToolCall, on_call: Callable[[str, Mapping[str, Any]], object] | None
) -> dict[str, Any]:
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    if on_call is not None:
        on_call(name, _read(arguments))
    content = call_tool(functions.get(name), name, arguments)
    return {"role": "tool", "tool_call_id": call["id"], "name": name, "content": content}


def _read(arguments: str) -> Mapping[str, Any]:
    try:
        found = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
