"""Conversations as the guest's template engine wants them: checked messages in, a prompt and a message out."""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import RequestError, SandboxError
from .types import ChatMessage, ToolCall

__all__ = ["ChatPrompt", "ChatRequest", "MessageReader", "check_messages"]

Json = Any
"""A value of a parsed JSON text."""

REASONING = ("auto", "none", "deepseek")

_MAX_CALLS = 1024
_ID_LETTERS = string.ascii_letters + string.digits


def check_messages(messages: Sequence[Mapping[str, Json]]) -> list[dict[str, Json]]:
    """Return the messages as plain dicts; raise ``RequestError`` naming the first bad one.

    ``role`` is a non-empty string, ``content`` a string or a list of ``{"type": "text", "text": ...}`` parts; it
    may be missing only beside ``tool_calls``. Other keys are passed on to the template as they are.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise RequestError("chat", "messages is not a list", "give [{'role': 'user', 'content': '...'}]")
    if not messages:
        raise RequestError("chat", "there is no message", "give at least one")
    return [_check_message(i, message) for i, message in enumerate(messages)]


def _check_message(index: int, message: object) -> dict[str, Json]:
    if not isinstance(message, Mapping):
        raise RequestError("chat", f"message {index} is not a dict", "give {'role': ..., 'content': ...}")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise RequestError("chat", f"message {index} has no role", "system, user, assistant or tool")
    if content is None and message.get("tool_calls"):
        content = ""
    if isinstance(content, list):
        content = _join_parts(index, content)
    if not isinstance(content, str):
        raise RequestError("chat", f"the content of message {index} is not a string")
    return {**message, "role": role, "content": content}


def _join_parts(index: int, parts: list[object]) -> str:
    texts = []
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RequestError("chat", f"message {index} has a content part that is not text")
        texts.append(part["text"])
    return "\n".join(texts)


@dataclass(frozen=True)
class ChatRequest:
    """What the template is rendered with."""

    messages: Sequence[Mapping[str, Json]]
    tools: Sequence[Mapping[str, Json]] | None = None
    add_generation_prompt: bool = True
    template: str | None = None
    """A jinja template to use instead of the model's own."""

    enable_thinking: bool = True
    template_kwargs: Mapping[str, Json] = field(default_factory=dict)
    tool_choice: str | None = None
    """``none``, ``auto`` or ``required``."""

    parallel_tool_calls: bool | None = None
    json_schema: Mapping[str, Json] | None = None
    reasoning: str = "auto"
    prefill: str | None = None
    """How the answer begins."""

    def to_json(self) -> str:
        """Return the request for ``pw_chat_apply``; raise ``RequestError`` for what JSON or UTF-8 cannot carry."""
        self._check()
        messages = check_messages(self.messages)
        request: dict[str, Json] = {
            "messages": messages,
            "add_generation_prompt": self.add_generation_prompt,
            "enable_thinking": self.template_kwargs.get("enable_thinking", self.enable_thinking),
            "template_kwargs": dict(self.template_kwargs),
            "reasoning_format": self.reasoning,
        }
        if self.prefill is not None:
            messages.append({"role": "assistant", "content": self.prefill})
            request["continue_final_message"] = "content"
        if self.tools is not None:
            request["tools"] = list(self.tools)
        for name in ("template", "tool_choice", "parallel_tool_calls", "json_schema"):
            if getattr(self, name) is not None:
                request[name] = getattr(self, name)
        try:
            text = json.dumps(request, ensure_ascii=False, allow_nan=False)
            text.encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError("chat", f"the conversation cannot be written as JSON: {error}") from error
        return text

    def _check(self) -> None:
        """Check what is neither a message nor left to the template."""
        for name in ("template", "prefill"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise RequestError("chat", f"{name} is {type(getattr(self, name)).__name__} and no text")
        if not isinstance(self.template_kwargs, Mapping):
            raise RequestError("chat", f"template_kwargs is {type(self.template_kwargs).__name__} and no dict")
        if isinstance(self.tools, (str, bytes, Mapping)) or not isinstance(self.tools, (Sequence, type(None))):
            raise RequestError("chat", f"tools is {type(self.tools).__name__} and no list")
        if not isinstance(self.parallel_tool_calls, (bool, type(None))):
            raise RequestError(
                "chat", f"parallel_tool_calls is {self.parallel_tool_calls!r}, and neither True nor False"
            )
        if self.reasoning not in REASONING:
            raise RequestError("chat", f"reasoning is {self.reasoning!r} and none of {', '.join(REASONING)}")
        thinking = self.template_kwargs.get("enable_thinking", True)
        if not isinstance(thinking, bool):
            raise RequestError("chat", f"enable_thinking is {thinking!r}, and neither True nor False")


@dataclass(frozen=True)
class ChatPrompt:
    """What the template makes of a conversation: the prompt, and what the answer to it looks like.

    ``grammar`` is what the answer must follow, for tool calls or a schema; empty when it is free. A lazy one
    (``grammar_lazy``) holds from the first of ``grammar_triggers`` on: patterns, and tokens. One that is not begins
    with ``generation_prompt``, which is already part of the prompt.
    """

    prompt: str
    stops: tuple[str, ...] = ()
    """Strings that end the answer."""

    grammar: str = ""
    format: str = ""
    grammar_lazy: bool = False
    grammar_triggers: tuple[str | int, ...] = ()
    preserved: Mapping[int, str] = field(default_factory=dict)
    """Control tokens that belong to the text of the answer, and that text."""

    generation_prompt: str = ""
    """The end of the prompt, with which the answer's format begins."""

    thinks: bool = False
    """Whether the template has a place for reasoning."""

    takes_tools: bool = True
    """Whether the template can hand over the tools that were given, in a way that the answer can be read."""

    @classmethod
    def from_json(cls, text: str) -> ChatPrompt:
        """Read the answer of ``pw_chat_apply``, which is as untrusted as everything from the guest."""
        answer = _read("apply the chat template", text, dict)

        def take(name: str, kind: type, default: Json) -> Json:
            value = answer.get(name, default)
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                raise SandboxError("apply the chat template", f"the guest's answer has a malformed {name}")
            return value

        if not isinstance(answer.get("prompt"), str):
            raise SandboxError("apply the chat template", "the guest's answer has no prompt")
        stops, triggers, tokens = (take(name, list, []) for name in ("stops", "grammar_triggers", "trigger_tokens"))
        preserved = {str(token): text for token, text in take("preserved", dict, {}).items()}
        if not all(isinstance(stop, str) for stop in [*stops, *triggers, *preserved.values()]):
            raise SandboxError("apply the chat template", "the guest's answer has malformed stops or triggers")
        if not all(type(token) is int and token >= 0 for token in tokens) or not all(map(_is_token, preserved)):
            raise SandboxError("apply the chat template", "the guest's answer has malformed tokens")
        return cls(
            answer["prompt"],
            stops=tuple(stop for stop in stops if stop),
            grammar=take("grammar", str, ""),
            format=take("format", str, ""),
            grammar_lazy=take("grammar_lazy", bool, False),
            grammar_triggers=(*triggers, *tokens),
            preserved={int(token): text for token, text in preserved.items()},
            generation_prompt=take("generation_prompt", str, ""),
            thinks=take("thinks", bool, False),
            takes_tools=take("takes_tools", bool, True),
        )


def _is_token(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 10


def _read(operation: str, text: str, kind: type) -> Json:
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SandboxError(operation, "the guest's answer is not JSON") from error
    if not isinstance(answer, kind):
        raise SandboxError(operation, f"the guest's answer is no {kind.__name__}")
    return answer


class MessageReader:
    """Puts a message together from its deltas, which come from the guest and are checked one by one."""

    OPERATION = "read the answer"

    def __init__(self) -> None:
        """Begin with nothing said."""
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[ToolCall] = []
        self._arguments: list[list[str]] = []

    def read(self, text: str) -> list[dict[str, Json]]:
        """Return the deltas of an answer of ``pw_chat_feed``; calls without an id are given one."""
        return [self.checked(delta) for delta in _read(self.OPERATION, text, list)]

    def take(self, delta: Mapping[str, Json]) -> str:
        """Add a delta to the message and return the content it adds."""
        content: str = delta.get("content", "")
        self._content.append(content)
        self._reasoning.append(delta.get("reasoning_content", ""))
        for call in delta.get("tool_calls", ()):
            if call["index"] == len(self._calls):
                name = call["function"]["name"]
                self._calls.append({"id": call["id"], "type": "function", "function": {"name": name, "arguments": ""}})
                self._arguments.append([])
            self._arguments[call["index"]].append(call["function"].get("arguments", ""))
        return content

    @property
    def message(self) -> ChatMessage:
        """Return the message so far, as OpenAI writes it; ``content`` is ``None`` beside tool calls and no text."""
        content = "".join(self._content)
        message: ChatMessage = {"role": "assistant", "content": content}
        if reasoning := "".join(self._reasoning):
            message["reasoning_content"] = reasoning
        if self._calls:
            message["content"] = content or None
            message["tool_calls"] = [
                {**call, "function": {"name": call["function"]["name"], "arguments": "".join(arguments)}}
                for call, arguments in zip(self._calls, self._arguments, strict=True)
            ]
        return message

    def checked(self, delta: Json) -> dict[str, Json]:
        """Return a delta; raise ``SandboxError`` for what is none, or does not follow those before."""
        if not isinstance(delta, dict) or len(delta) != 1:
            raise SandboxError(self.OPERATION, "the guest's answer has a malformed delta")
        ((name, value),) = delta.items()
        if name in ("content", "reasoning_content") and isinstance(value, str):
            return {name: _unicode(value)}
        if name != "tool_calls" or not isinstance(value, list) or len(value) != 1:
            raise SandboxError(self.OPERATION, "the guest's answer has a malformed delta")
        return {"tool_calls": [self._checked_call(value[0])]}

    def _checked_call(self, call: Json) -> dict[str, Json]:
        function = call.get("function") if isinstance(call, dict) else None
        index = call.get("index") if isinstance(call, dict) else None
        if not isinstance(function, dict) or type(index) is not int or not 0 <= index < _MAX_CALLS:
            raise SandboxError(self.OPERATION, "the guest's answer has a malformed tool call")
        texts = [call.get("id", ""), function.get("name", ""), function.get("arguments", "")]
        if not all(isinstance(text, str) for text in texts):
            raise SandboxError(self.OPERATION, "the guest's answer has a malformed tool call")
        name, arguments = (_unicode(text) for text in texts[1:])
        if not name:
            if index >= self._n_told:
                raise SandboxError(self.OPERATION, "the guest's answer has a tool call without a name")
            return {"index": index, "function": {"arguments": arguments}}
        if index != self._n_told:
            raise SandboxError(self.OPERATION, "the guest's answer has a tool call twice")
        self._n_told += 1
        known = {"name": name, "arguments": arguments}
        return {"index": index, "id": _unicode(texts[0]) or _new_id(), "type": "function", "function": known}

    _n_told = 0


def _unicode(text: str) -> str:
    """Return text without halves of surrogate pairs, which JSON may spell."""
    return text.encode("utf-8", "replace").decode()


def _new_id() -> str:
    """Return an id for a call that the model gave none: nine letters, which is what Mistral's templates insist on."""
    return "".join(secrets.choice(_ID_LETTERS) for _ in range(9))
