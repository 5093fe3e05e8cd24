"""Conversations whose model is in another process: what crosses, and the stream of an answer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from ..chat import MessageReader
from ..chat_calls import _checked_budget as checked_budget
from ..errors import RequestError, SandboxError
from ..generate import TextStream
from ..structured import ResponseFormat
from ..tools import choose_tools
from ..types import ChatCompletion, Completion
from .call import Call
from .results import Expected, message_bytes
from .stream import RemoteGeneration
from .values import items
from .wire import Value, WireError

if TYPE_CHECKING:
    from .remote import RemoteCalls

__all__ = ["RemoteChat", "asked_options", "next_piece"]

_MOST_DELTAS = 1 << 12
"""Of a piece: a few for each call of a tool that an answer may have, and they seldom come together."""

_PLAIN = ("template", "template_kwargs", "parallel_tool_calls", "reasoning", "reasoning_budget_message", "prefill")


def asked_options(options: dict[str, Any]) -> tuple[dict[str, Value], ResponseFormat | None]:
    """Take from ``options`` what is the conversation's, as plain values; what is left is about sampling."""
    response_format = options.pop("response_format", None)
    response = None if response_format is None else ResponseFormat.of(response_format)
    tools, choice = choose_tools(options.pop("tools", None), options.pop("tool_choice", None))
    asked: dict[str, Value] = {name: options.pop(name) for name in _PLAIN if options.get(name) is not None}
    if (budget := checked_budget(options.pop("reasoning_budget", None))) is not None:
        asked["reasoning_budget"] = budget
    if response is not None:
        asked["response_format"] = response.wire
    if tools is not None:
        asked |= {"tools": tools, "tool_choice": choice}
    for name in _PLAIN:
        options.pop(name, None)
    if not isinstance(asked.get("template_kwargs", {}), Mapping):
        raise RequestError("chat", f"template_kwargs is {type(asked['template_kwargs']).__name__} and no dict")
    return asked, response


def next_piece(stream: TextStream) -> tuple[str | None, Iterable[Value]]:
    """Return the next text of a stream, ``None`` at its end, and the deltas of it if it is a conversation's."""
    try:
        piece = TextStream.__next__(stream)  # a ChatStream's own would skip what is no content
    except StopIteration:
        return None, ()
    unread: deque[Value] = getattr(stream._generation, "unread_deltas", deque())
    deltas = list(unread)
    unread.clear()
    return piece, deltas


class RemoteChat(RemoteGeneration):
    """An answer that is generated in another process, and its deltas."""

    def __init__(
        self,
        model: RemoteCalls,
        call: Call,
        expected: Expected,
        reader: Callable[[str], Any] | None,
    ) -> None:
        """Take over a call that the process has accepted."""
        super().__init__(model, call, expected)
        self._reader, self._message = reader, MessageReader()
        self.unread_deltas: deque[dict[str, Any]] = deque()

    def _took_deltas(self, values: Value, piece: str) -> None:
        sent = items(values)
        if len(sent) > _MOST_DELTAS:
            raise WireError("it sent more than it was asked for")
        contents = []
        for value in sent:
            try:
                delta = self._message.checked(value)
            except SandboxError as error:
                raise WireError(error.reason) from error
            if "content" not in delta:  # which is the piece, and counted with it
                self._count(message_bytes(delta))
            contents.append(self._message.take(delta))
            self.unread_deltas.append(delta)
        if "".join(contents) != piece:
            raise WireError("it sent another text than what its parts are together")

    def completion(self) -> Completion:
        """Return what was generated as far as it was read."""
        found = cast(ChatCompletion, super().completion())
        if self._completion is None:
            message = self._message.message
            found = replace(found, text=message["content"] or "", message=message)
        return replace(found, reader=self._reader)
