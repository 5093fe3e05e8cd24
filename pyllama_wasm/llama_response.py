"""What ``Llama`` returns, made of completions and their pieces: OpenAI's shapes as plain dicts."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from ._logprobs import log_probabilities
from .llama_types import (
    ChatCompletionLogprobs,
    CompletionLogprobs,
    CompletionUsage,
    CreateChatCompletionResponse,
    CreateChatCompletionStreamResponse,
    CreateCompletionResponse,
)
from .types import Completion, TokenLogprob
from .vocab import Vocab

__all__ = [
    "Heading",
    "chat_logprobs",
    "chunks_to_chat",
    "completion_logprobs",
    "completion_to_chat",
    "logits_to_logprobs",
    "token_logprob",
    "usage_of",
]

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Heading:
    """What all chunks of an answer begin with."""

    model: str
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4()}")
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(
        self, text: str, finish_reason: str | None, logprobs: CompletionLogprobs | None = None
    ) -> CreateCompletionResponse:
        """Return a completion, or a chunk of one: with its usage it is whole."""
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": [
                {
                    "text": text,
                    "index": 0,
                    "logprobs": logprobs,
                    "finish_reason": cast("FinishReason | None", finish_reason),
                }
            ],
        }

    def chat(
        self,
        message: dict[str, Any],
        finish_reason: str | None,
        usage: CompletionUsage,
        logprobs: ChatCompletionLogprobs | None = None,
    ) -> CreateChatCompletionResponse:
        """Return an answer."""
        return {
            "id": f"chat{self.id}",
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": [
                {
                    "index": 0,
                    "message": cast(Any, message),
                    "logprobs": logprobs,
                    "finish_reason": finish_reason,
                }
            ],
            "usage": usage,
        }

    def chat_chunk(
        self, delta: dict[str, Any], finish_reason: str | None = None, logprobs: ChatCompletionLogprobs | None = None
    ) -> CreateChatCompletionStreamResponse:
        """Return a chunk of an answer."""
        return {
            "id": f"chat{self.id}",
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "choices": [
                {
                    "index": 0,
                    "delta": cast(Any, delta),
                    "logprobs": logprobs,
                    "finish_reason": cast(Any, finish_reason),
                }
            ],
        }


def usage_of(completion: Completion, vocab: Vocab) -> CompletionUsage:
    """Return the usage; as in llama-cpp-python the token that ends a text is not counted."""
    tokens = completion.tokens
    n_tokens = len(tokens) - (1 if tokens and vocab.is_eog(tokens[-1]) else 0)
    prompt_tokens = completion.usage.prompt_tokens
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": n_tokens,
        "total_tokens": prompt_tokens + n_tokens,
        "prompt_tokens_details": {"cached_tokens": completion.usage.cached_tokens},
    }


# -- log probabilities ------------------------------------------------------------------------------------------------


def logits_to_logprobs(logits: npt.ArrayLike, axis: int = -1) -> npt.NDArray[np.float32]:
    """Return the logarithm of the softmax of ``logits`` along ``axis``, in float32; ``-inf`` stays."""
    values = np.asarray(logits, np.float32)
    best = np.max(values, axis=axis, keepdims=True)
    shifted = values - np.where(np.isfinite(best), best, np.float32(0))
    with np.errstate(divide="ignore"):
        total = np.log(np.sum(np.exp(shifted), axis=axis, keepdims=True))
    return np.asarray(shifted - total, np.float32)


def token_logprob(vocab: Vocab, token: int, logits: npt.NDArray[np.float32], n_top: int) -> TokenLogprob:
    """Return how likely the model found ``token``, and the ``n_top`` likeliest ones."""
    logprob, best = log_probabilities(logits, token, n_top)
    data = vocab.token_to_piece(token)
    top = tuple((other, _text(vocab.token_to_piece(other)), value) for other, value in best)
    return TokenLogprob(token=token, text=_text(data), bytes=data, logprob=logprob, top=top)


def completion_logprobs(
    found: Iterable[TokenLogprob], text_offset: int, *, is_first_unknown: bool = False
) -> CompletionLogprobs:
    """Return log probabilities as completions have them; the first token's text begins at ``text_offset``."""
    logprobs: CompletionLogprobs = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    data = b""
    for item in found:
        is_unknown = is_first_unknown and not logprobs["tokens"]
        logprobs["text_offset"].append(text_offset + len(_text(data)))
        logprobs["tokens"].append(item.text)
        logprobs["token_logprobs"].append(None if is_unknown else item.logprob)
        top: dict[str, float] = {}
        for _, text, logprob in item.top:
            top.setdefault(text, logprob)
        top[item.text] = item.logprob
        logprobs["top_logprobs"].append(None if is_unknown else top)
        data += item.bytes
    return logprobs


def chat_logprobs(found: Sequence[TokenLogprob] | None, pieces: Vocab) -> ChatCompletionLogprobs | None:
    """Return log probabilities as chat answers have them."""
    if found is None:
        return None
    content: list[Any] = [
        {
            "token": item.text,
            "bytes": list(item.bytes),
            "logprob": item.logprob,
            "top_logprobs": [
                {"token": text, "bytes": list(pieces.token_to_piece(token)), "logprob": logprob}
                for token, text, logprob in item.top
            ],
        }
        for item in found
    ]
    return {"content": content, "refusal": None}


def _text(data: bytes) -> str:
    return data.decode(errors="replace")


# -- completions of a formatted prompt as answers ---------------------------------------------------------------------


def completion_to_chat(
    completion: CreateCompletionResponse, tool_name: str | None = None
) -> CreateChatCompletionResponse:
    """Return a completion as an answer, or as the arguments of a call of ``tool_name``."""
    choice = completion["choices"][0]
    heading = Heading(completion["model"], completion["id"], completion["created"])
    logprobs = _to_chat_logprobs(choice["logprobs"])
    if tool_name is None:
        message: dict[str, Any] = {"role": "assistant", "content": choice["text"]}
        return heading.chat(message, choice["finish_reason"], completion["usage"], logprobs)
    function = {"name": tool_name, "arguments": choice["text"]}
    call = {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}
    message = {"role": "assistant", "content": None, "function_call": dict(function), "tool_calls": [call]}
    return heading.chat(message, "tool_calls", completion["usage"], logprobs)


def chunks_to_chat(
    chunks: Iterable[CreateCompletionResponse], tool_name: str | None = None
) -> Iterator[CreateChatCompletionStreamResponse]:
    """Turn the chunks of a completion into those of an answer, or of a call of ``tool_name``."""
    heading: Heading | None = None
    for chunk in chunks:
        choice = chunk["choices"][0]
        if heading is None:
            heading = Heading(chunk["model"], chunk["id"], chunk["created"])
            yield heading.chat_chunk({"role": "assistant"})
            if tool_name is not None:
                function = {"name": tool_name, "arguments": ""}
                call = {"index": 0, "id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}
                yield heading.chat_chunk({"tool_calls": [call]})
        reason = choice["finish_reason"]
        if reason is not None:
            yield heading.chat_chunk({}, reason if tool_name is None else "tool_calls")
        elif tool_name is None:
            yield heading.chat_chunk({"content": choice["text"]}, None, _to_chat_logprobs(choice["logprobs"]))
        else:
            piece = {"index": 0, "function": {"arguments": choice["text"]}}
            yield heading.chat_chunk({"tool_calls": [piece]})


def _to_chat_logprobs(logprobs: CompletionLogprobs | None) -> ChatCompletionLogprobs | None:
    """Return a completion's log probabilities as a chat answer has them; of text only the text is known."""
    if logprobs is None:
        return None
    content: list[Any] = []
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        others = [{"token": t, "bytes": list(t.encode()), "logprob": value} for t, value in (top or {}).items()]
        content.append({"token": token, "bytes": list(token.encode()), "logprob": logprob, "top_logprobs": others})
    return {"content": content, "refusal": None}
