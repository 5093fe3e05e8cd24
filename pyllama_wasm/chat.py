"""Conversations as the guest's template engine wants them: checked messages in, prompt and stop strings out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import RequestError, SandboxError

__all__ = ["ChatPrompt", "ChatRequest", "check_messages"]

Json = Any
"""A value of a parsed JSON text."""


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

    def to_json(self) -> str:
        """Return the request for ``pw_chat_apply``; raise ``RequestError`` for what JSON or UTF-8 cannot carry."""
        request: dict[str, Json] = {
            "messages": check_messages(self.messages),
            "add_generation_prompt": self.add_generation_prompt,
            "enable_thinking": self.enable_thinking,
            "template_kwargs": dict(self.template_kwargs),
        }
        if self.tools is not None:
            request["tools"] = list(self.tools)
        if self.template is not None:
            request["template"] = self.template
        try:
            text = json.dumps(request, ensure_ascii=False, allow_nan=False)
            text.encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError("chat", f"the conversation cannot be written as JSON: {error}") from error
        return text


@dataclass(frozen=True)
class ChatPrompt:
    """What the template answered."""

    prompt: str
    stops: tuple[str, ...] = ()
    grammar: str = ""
    format: str = ""

    @classmethod
    def from_json(cls, text: str) -> ChatPrompt:
        """Read the answer of ``pw_chat_apply``, which is as untrusted as everything from the guest."""
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SandboxError("apply the chat template", "the guest's answer is not JSON") from error
        if not isinstance(answer, dict) or not isinstance(answer.get("prompt"), str):
            raise SandboxError("apply the chat template", "the guest's answer has no prompt")
        stops = answer.get("stops") or []
        if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
            raise SandboxError("apply the chat template", "the guest's answer has malformed stops")
        # A lazy grammar begins at a trigger in the text, for tool calls; as a plain one it would forbid that text.
        grammar = "" if answer.get("grammar_lazy") else answer.get("grammar") or ""
        form = answer.get("format") or ""
        return cls(answer["prompt"], tuple(stop for stop in stops if stop), str(grammar), str(form))
