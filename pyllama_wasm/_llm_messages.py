"""Conversations of ``llm`` as ``Model.chat`` takes them, and its answers as ``llm`` does."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from llm import Tool, ToolCall
from llm.parts import AttachmentPart, Message, StreamEvent, TextPart, ToolCallPart, ToolResultPart

from .errors import RequestError

__all__ = ["ToolCalls", "messages_of", "response_format_of", "tools_of"]


def messages_of(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """Return the conversation in OpenAI's shape. Raises ``RequestError`` for attachments."""
    found = []
    for message in messages:
        if any(isinstance(part, AttachmentPart) for part in message.parts):
            raise RequestError("chat", "the conversation has an attachment", "only text is supported")
        found += _answers(message) if message.role == "tool" else [_message(message)]
    return found


def tools_of(tools: Iterable[Any]) -> list[dict[str, Any]]:
    """Return the functions among ``tools`` in OpenAI's shape."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description or "",
                "parameters": tool.input_schema or {"type": "object", "properties": {}},
            },
        }
        for tool in tools
        if isinstance(tool, Tool)
    ]


def response_format_of(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON schema in OpenAI's shape."""
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": dict(schema), "strict": True}}


class ToolCalls:
    """The calls of tools in an answer, put together from its deltas."""

    def __init__(self) -> None:
        """Begin with none."""
        self._calls: dict[int, dict[str, str]] = {}

    def add(self, deltas: Sequence[Mapping[str, Any]]) -> Iterator[StreamEvent]:
        """Take the ``tool_calls`` of a delta and yield what ``llm`` is to know of them."""
        for number, delta in enumerate(deltas):
            index, function = delta.get("index", number), delta.get("function") or {}
            call = self._calls.setdefault(index, {"id": f"call_{index}", "name": "", "arguments": ""})
            call["id"] = delta.get("id") or call["id"]
            if name := function.get("name"):
                call["name"] += name
                yield StreamEvent(type="tool_call_name", chunk=name, tool_call_id=call["id"])
            if arguments := function.get("arguments"):
                call["arguments"] += arguments
                yield StreamEvent(type="tool_call_args", chunk=arguments, tool_call_id=call["id"])

    def finished(self) -> list[ToolCall]:
        """Return the calls; one whose arguments are no JSON object, as the answer was cut off, is left out."""
        found = []
        for call in self._calls.values():
            try:
                arguments = json.loads(call["arguments"] or "{}")
            except ValueError:
                continue
            if isinstance(arguments, dict):
                found.append(ToolCall(name=call["name"], arguments=arguments, tool_call_id=call["id"]))
        return found


def _message(message: Message) -> dict[str, Any]:
    text = "".join(part.text for part in message.parts if isinstance(part, TextPart))
    calls = [
        {
            "id": part.tool_call_id or f"call_{number}",
            "type": "function",
            "function": {"name": part.name, "arguments": json.dumps(part.arguments)},
        }
        for number, part in enumerate(message.parts)
        if isinstance(part, ToolCallPart)
    ]
    if calls:
        return {"role": message.role, "content": text, "tool_calls": calls}
    return {"role": message.role, "content": text}


def _answers(message: Message) -> list[dict[str, Any]]:
    """Return one message for each result of a tool."""
    return [
        {"role": "tool", "tool_call_id": part.tool_call_id or "", "name": part.name, "content": part.output}
        for part in message.parts
        if isinstance(part, ToolResultPart)
    ]
