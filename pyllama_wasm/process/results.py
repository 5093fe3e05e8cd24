"""What calls return, as plain values and back: completions, log-probabilities, messages, prompts of conversations.

``..._to_wire`` and ``..._from_wire`` of a kind stand beside each other, as in ``values``: what comes back is a
stranger's, and reading raises ``WireError`` for what the process of a model would not send as long as it is what was
started.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from ..chat import ChatPrompt
from ..types import (
    ChatCompletion,
    ChatMessage,
    Completion,
    FinishReason,
    Timings,
    TokenLogprob,
    ToolCall,
    ToolCallFunction,
    Usage,
)
from .values import array, flag, integer, integers, items, mapping, number, text, tokens
from .wire import Value, WireError

__all__ = [
    "Expected",
    "completion_to_wire",
    "logprobs_from_wire",
    "logprobs_to_wire",
    "message_bytes",
    "prompt_from_wire",
    "prompt_to_wire",
]

_REASONS: tuple[FinishReason, ...] = ("stop", "length", "tool_calls", "cancelled")
_NO_TOKEN = -1


# -- completions ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """What a call was asked for, and so the most that its result may be."""

    kind: type[Completion]
    n_vocab: int
    load_s: float
    """Of the model: what the process says of it is not the time that the program has waited."""

    max_tokens: int | None = None
    n_top: int | None = None
    """How many alternatives of each token; ``None``: no log-probabilities."""

    is_scored: bool = False
    """Whether the prompt's tokens have some too."""

    text_bytes: int | None = None
    prompt_tokens: int = 0
    """The most that the prompt may have, as far as the program can tell; counts where the prompt ``is_scored``."""

    def read(self, value: Value) -> Completion:
        """Return the completion that the process sends."""
        said, ids, reason, usage, timings, logprobs, prompt_logprobs, message = items(value, 8)
        if reason not in _REASONS:
            raise WireError("it sent a generation that ended in an unknown way")
        found = tuple(tokens(ids, self.n_vocab, self.tokens_left(0)))
        counts = [integer(n) for n in items(usage, 3)]
        more: dict[str, Any] = {}
        if issubclass(self.kind, ChatCompletion):
            more["message"] = _message_from_wire(message)
        completion = self.kind(
            text=text(said),
            tokens=found,
            finish_reason=reason,
            usage=Usage(*counts),
            timings=self._timings(timings),
            logprobs=self.logprobs(logprobs, len(found)),
            prompt_logprobs=self.prompt_logprobs(prompt_logprobs, counts[0]),
            **more,
        )
        said_bytes = message_bytes(more["message"]) if more else len(completion.text.encode())
        if self.text_bytes is not None and said_bytes > self.text_bytes:
            raise WireError("it sent more text than it may")
        return completion

    def tokens_left(self, n: int) -> int:
        """Return how many more tokens there may be after ``n``."""
        return sys.maxsize if self.max_tokens is None else max(self.max_tokens - n, 0)

    def check_tokens(self, n: int) -> None:
        """Raise ``WireError`` for more tokens than were asked for."""
        if self.max_tokens is not None and n > self.max_tokens:
            raise WireError("it sent more tokens than were asked for")

    def logprobs(self, value: Value, n: int) -> tuple[TokenLogprob, ...] | None:
        """Return those of ``n`` tokens, ``None`` where none were asked for."""
        if self.n_top is None:
            if value is not None:
                raise WireError("it sent more than it was asked for")
            return None
        return logprobs_from_wire(value, self.n_vocab, self.n_top, n, n)

    def prompt_logprobs(self, value: Value, n_prompt: int) -> tuple[TokenLogprob | None, ...] | None:
        """Return those of the prompt, none of its first token, ``None`` where none were asked for."""
        if not self.is_scored or self.n_top is None:
            if value is not None:
                raise WireError("it sent more than it was asked for")
            return None
        most = max(min(n_prompt, self.prompt_tokens), 1) - 1
        return (None, *logprobs_from_wire(value, self.n_vocab, self.n_top, most))

    def _timings(self, value: Value) -> Timings:
        prompt_s, decode_s, *counts = items(value, 6)
        n_prompt, n_decode, n_draft, n_accepted = (integer(count) for count in counts)
        return Timings(number(prompt_s), number(decode_s), self.load_s, n_prompt, n_decode, n_draft, n_accepted)


def completion_to_wire(completion: Completion) -> Value:
    """Return all fields but the time of the load."""
    usage, timings = completion.usage, completion.timings
    prompt = completion.prompt_logprobs
    return [
        completion.text,
        np.asarray(completion.tokens, np.int32),
        completion.finish_reason,
        [usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens],
        [
            timings.prompt_s, timings.decode_s, timings.prompt_tokens, timings.decode_tokens, timings.draft_tokens,
            timings.accepted_tokens,
        ],
        None if completion.logprobs is None else logprobs_to_wire(completion.logprobs),
        None if prompt is None else logprobs_to_wire([item for item in prompt if item is not None]),
        dict(completion.message) if isinstance(completion, ChatCompletion) else None,
    ]  # fmt: skip


def _message_from_wire(value: Value) -> ChatMessage:
    found = mapping(value)
    content = found.get("content")
    message: ChatMessage = {"role": "assistant", "content": None if content is None else text(content)}
    if "reasoning_content" in found:
        message["reasoning_content"] = text(found["reasoning_content"])
    if "tool_calls" in found:
        message["tool_calls"] = [_call_from_wire(call) for call in items(found["tool_calls"])]
    return message


def _call_from_wire(value: Value) -> ToolCall:
    call = mapping(value)
    function = mapping(call.get("function"))
    known: ToolCallFunction = {"name": text(function.get("name")), "arguments": text(function.get("arguments"))}
    return {"id": text(call.get("id")), "type": "function", "function": known}


def message_bytes(message: Mapping[str, Any]) -> int:
    """Return how long the texts of a message, or of a delta of one, are together."""
    said = [message.get("content") or "", message.get("reasoning_content", "")]
    for call in message.get("tool_calls", ()):
        said += [call.get("id", ""), call["function"].get("name", ""), call["function"].get("arguments", "")]
    return sum(len(part.encode()) for part in said)


# -- log-probabilities ------------------------------------------------------------------------------------------------


def logprobs_to_wire(found: Sequence[TokenLogprob]) -> Value:
    """Return arrays of all of them, and the text of each token once."""
    n_top = max((len(item.top) for item in found), default=0)
    chosen = np.array([item.token for item in found], np.int32)
    values = np.array([item.logprob for item in found], np.float32)
    top = np.full((len(found), n_top), _NO_TOKEN, np.int32)
    top_values = np.zeros((len(found), n_top), np.float32)
    texts: dict[int, str] = {}
    for row, item in enumerate(found):
        texts[item.token] = item.text
        for column, (token, said, value) in enumerate(item.top):
            top[row, column], top_values[row, column], texts[token] = token, value, said
    pieces = [item.bytes for item in found]
    ids = np.array(list(texts), np.int32)
    return [chosen, values, top, top_values, ids, _joined(said.encode() for said in texts.values()), _joined(pieces)]


def logprobs_from_wire(
    value: Value, n_vocab: int, n_top: int, most: int, n: int | None = None
) -> tuple[TokenLogprob, ...]:
    """Return those of ``n`` tokens again, or of at most ``most``, each with at most ``n_top`` alternatives."""
    sent_chosen, sent_values, sent_top, sent_top_values, ids, sent_texts, sent_pieces = items(value, 7)
    chosen = tokens(integers(sent_chosen, n), n_vocab, most)
    values = _checked_values(array(sent_values, len(chosen)))
    top = integers(sent_top, len(chosen), None)
    if top.shape[1] > n_top or (top.size and not _NO_TOKEN <= int(top.min()) <= int(top.max()) < n_vocab):
        raise WireError("it sent other alternatives of tokens than it was asked for")
    top_values = _checked_values(array(sent_top_values, *top.shape))
    known = tokens(integers(ids, None), n_vocab, len(chosen) * (1 + n_top))
    texts = dict(zip(known, (_decoded(piece) for piece in _split(sent_texts, len(known))), strict=True))
    pieces = _split(sent_pieces, len(chosen))
    if not {*chosen, *(int(token) for token in np.unique(top) if token != _NO_TOKEN)} <= texts.keys():
        raise WireError("it sent a token without its text")
    return tuple(
        TokenLogprob(
            token=token,
            text=texts[token],
            bytes=pieces[row],
            logprob=values[row],
            top=tuple(
                (other, texts[other], likely)
                for other, likely in zip(top[row].tolist(), top_values[row].tolist(), strict=True)
                if other != _NO_TOKEN
            ),
        )
        for row, token in enumerate(chosen)
    )


def _checked_values(values: npt.NDArray[np.float32]) -> Any:
    """Return logarithms of probabilities as plain numbers."""
    if values.size and not bool((values <= 0).all()):  # false for NaN too
        raise WireError("it sent probabilities that are none")
    return values if values.ndim > 1 else values.tolist()


def _joined(pieces: Iterable[bytes]) -> Value:
    """Return byte strings as their lengths and all of them together."""
    found = list(pieces)
    return [np.array([len(piece) for piece in found], np.int32), b"".join(found)]


def _split(value: Value, n: int) -> list[bytes]:
    lengths, whole = items(value, 2)
    sizes = integers(lengths, n).tolist()
    if not isinstance(whole, bytes) or any(size < 0 for size in sizes) or sum(sizes) != len(whole):
        raise WireError("it sent texts of other lengths than it says")
    return [whole[start:end] for start, end in pairwise(accumulate(sizes, initial=0))]


def _decoded(piece: bytes) -> str:
    try:
        return piece.decode()
    except UnicodeDecodeError as error:
        raise WireError("it sent a text that is not UTF-8") from error


# -- what a template makes of a conversation --------------------------------------------------------------------------


def prompt_to_wire(prompt: ChatPrompt) -> Value:
    """Return every field."""
    return {
        "texts": [prompt.prompt, prompt.grammar, prompt.format, prompt.generation_prompt],
        "flags": [prompt.grammar_lazy, prompt.thinks, prompt.takes_tools],
        "stops": list(prompt.stops),
        "triggers": list(prompt.grammar_triggers),
        "preserved": [[token, said] for token, said in prompt.preserved.items()],
    }


def prompt_from_wire(value: Value, n_vocab: int) -> ChatPrompt:
    """Return it again."""
    found = mapping(value)
    rendered, grammar, kind, generation_prompt = (text(item) for item in items(found.get("texts"), 4))
    is_lazy, thinks, takes_tools = (flag(item) for item in items(found.get("flags"), 3))
    preserved = (items(pair, 2) for pair in items(found.get("preserved")))
    return ChatPrompt(
        rendered,
        stops=tuple(text(stop) for stop in items(found.get("stops"))),
        grammar=grammar,
        format=kind,
        grammar_lazy=is_lazy,
        grammar_triggers=tuple(
            text(trigger) if isinstance(trigger, str) else integer(trigger, 0, n_vocab - 1)
            for trigger in items(found.get("triggers"))
        ),
        preserved={integer(token, 0, n_vocab - 1): text(said) for token, said in preserved},
        generation_prompt=generation_prompt,
        thinks=thinks,
        takes_tools=takes_tools,
    )
