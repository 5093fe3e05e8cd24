"""Answering a conversation: the guest's object that knows the answer's format, and a generation read with it."""

from __future__ import annotations

import json
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from ._sampler_parts import Leaf
from .chat import ChatPrompt, MessageReader
from .errors import AnswerError, GuestException, RequestError
from .generate import Generation, GenerationRequest, TextStream
from .sampler import Sampler
from .samplers import _parse_error as parse_error
from .samplers import build_parts
from .types import ChatCompletion, ChatMessage, FinishReason

if TYPE_CHECKING:
    from .model import Model

__all__ = ["ChatGeneration", "ChatStream", "GuestChat"]

_POINTER = 0xFFFFFFFF


class GuestChat:
    """``pw_chat``: what the template made of a conversation, and how the answer to it is read; for one answer."""

    def __init__(self, model: Model, request: str) -> None:
        """Render the template; on the engine thread. Raises what it raises as ``GuestException``."""
        self._model, self._native = model, model.native
        with self._native.array(request.encode() + b"\0") as ptr:
            self._ptr = int(self._native.call("pw_chat_new", model._ptr, ptr) or 0) & _POINTER
        native, found = self._native, self._ptr

        def free() -> None:
            native.call("pw_chat_free", found)

        self._finalizer = weakref.finalize(self, model._trash.append, free)
        self._finalizer.atexit = False
        described = int(native.call("pw_chat_describe", found) or 0) & _POINTER
        self.prompt = ChatPrompt.from_json(native.take_string(described))

    def feed(self, text: str, is_last: bool) -> str:
        """Take a piece of the answer; return what is new, as JSON. On the engine thread."""
        data = text.encode("utf-8", "replace")
        with self._native.array(data + b"\0") as ptr:
            answer = int(self._native.call("pw_chat_feed", self._ptr, ptr, len(data), int(is_last)) or 0) & _POINTER
        return self._native.take_string(answer)

    def constraint(self, budget: int | None, message: str) -> Leaf:
        """Make the sampler that holds the answer to its grammar and its reasoning to ``budget`` tokens.

        On the engine thread. Raises ``RequestError`` for a grammar that does not parse.
        """
        request = json.dumps({"budget": -1 if budget is None else budget, "budget_message": message})
        mark = self._model.guest_log.mark()
        try:
            ptr = int(self._native.call("pw_chat_constraint", self._ptr, self._model._ptr, request) or 0) & _POINTER
        except GuestException as error:
            reason = error.reason
            if "does not parse" in reason:
                reason = parse_error(self._model, mark)
            raise RequestError("set the grammar of the answer", reason) from error
        return Leaf(ptr, ("chat", id(self)), is_grammar=True, keeps_order_flag=True)


class ChatGeneration(Generation[ChatCompletion]):
    """One answer; what the model says is read by the guest as the template's format wants it."""

    def __init__(
        self,
        model: Model,
        request: GenerationRequest,
        chat: GuestChat,
        *,
        max_ahead: int | None = None,
        reader: Callable[[str], Any] | None = None,
        budget: int | None = None,
        budget_message: str = "",
        one_call: bool = False,
    ) -> None:
        """Prepare the answer; ``budget`` is the most tokens of reasoning, which ``budget_message`` then ends.

        With ``one_call`` further calls of tools are left out: not every template's grammar forbids them.
        """
        super().__init__(model, request, ChatCompletion, max_ahead=max_ahead)
        self._chat, self._reader, self._budget = chat, reader, (budget, budget_message)
        self._most_calls = 1 if one_call else 1 << 31
        self._preserved = {token: text.encode() for token, text in chat.prompt.preserved.items()}
        self._message = MessageReader()  # of a stream: what was read
        self._heard = MessageReader()
        self._pending: list[str] = []  # text that was not given to the guest yet
        self._said: list[str] = []
        self._deltas: deque[list[dict[str, Any]]] = deque()  # one list for each of the unread texts
        self.unread_deltas: deque[dict[str, Any]] = deque()  # of the texts that were read

    def took(self, token: int, piece: bytes, is_eog: bool) -> None:
        """Turn a token into text; control tokens that are part of the format are text too."""
        preserved = self._preserved.get(token)
        if preserved is not None:
            piece = preserved
            if is_eog and not self.is_ended:
                self._pending.append(self._assembler.feed(piece))
        super().took(token, piece, is_eog)

    def next_text(self) -> str | None:
        """Wait for the next content and return it, or ``""`` for what is none; ``None`` at the end."""
        text = super().next_text()
        if text is not None:
            for delta in self._deltas.popleft():
                self._message.take(delta)
                self.unread_deltas.append(delta)
        return text

    @property
    def message(self) -> ChatMessage:
        """The message so far, of a stream as far as it was read."""
        return self._message.message

    def completion(self) -> ChatCompletion:
        """Return what was generated so far; of a stream, what was read."""
        message, plain = self.message, super().completion()
        reason: FinishReason = plain.finish_reason
        if reason == "stop" and "tool_calls" in message:
            reason = "tool_calls"
        return replace(plain, text=message["content"] or "", finish_reason=reason, message=message, reader=self._reader)

    def _make_sampler(self, request: GenerationRequest) -> Sampler:
        prompt, (budget, message) = self._chat.prompt, self._budget
        if not prompt.grammar and (budget is None or not prompt.thinks):
            return super()._make_sampler(request)
        sampler = Sampler.__new__(Sampler)
        make = build_parts(self._model, request.sampling, lambda: self._chat.constraint(budget, message))
        sampler._attach(self._model, request.sampling, make, request.logits_processors)
        return sampler

    def _emit(self, text: str) -> None:
        self._pending.append(text)
        if self.max_ahead is not None:
            self._hear(is_last=False)

    def _emit_rest(self, text: str) -> None:
        self._pending.append(text)
        self._hear(is_last=True)

    def _hear(self, is_last: bool) -> None:
        """Have the guest read what there is, and emit what is new in the message."""
        text = "".join(self._pending)
        self._pending.clear()
        self._said.append(text)
        try:
            deltas = self._heard.read(self._chat.feed(text, is_last))
        except GuestException as error:
            failure = AnswerError("read the answer", error.reason, "its text is in the error's text attribute")
            failure.text = "".join(self._said)
            raise failure from error
        deltas = [delta for delta in deltas if all(c["index"] < self._most_calls for c in delta.get("tool_calls", ()))]
        if self.max_ahead is None:
            for delta in deltas:
                self._message.take(delta)
            return
        if deltas:
            self._deltas.append(deltas)
            super()._emit("".join(delta.get("content", "") for delta in deltas))


class ChatStream(TextStream):
    """The pieces of an answer's content; its completion is a ``ChatCompletion``.

    ``deltas`` gives everything, reasoning and tool calls too.
    """

    def __enter__(self) -> ChatStream:
        """Return the stream itself."""
        return self

    def __next__(self) -> str:
        """Return the next piece of the content."""
        while True:
            text = super().__next__()
            if text:
                return text

    def deltas(self) -> Iterator[Mapping[str, Any]]:
        """Yield OpenAI's deltas, ``{"role": "assistant"}`` first.

        Each of the others has ``content``, ``reasoning_content`` or ``tool_calls``. A tool call comes with its
        ``index``, ``id`` and name at first, and with further pieces of its arguments after.
        """
        yield {"role": "assistant"}
        unread: deque[dict[str, Any]] = cast(Any, self._generation).unread_deltas
        unread.clear()
        while True:
            while unread:
                yield unread.popleft()
            try:
                super().__next__()
            except StopIteration:
                break
        yield from unread

    @property
    def completion(self) -> ChatCompletion | None:
        """Return the completion when the stream has ended or was closed, ``None`` before."""
        return cast(ChatCompletion | None, super().completion)
