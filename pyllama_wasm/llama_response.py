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
    ResponseTimings,
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
    "timings_of",
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
        self, text: str, finish_reason: str | None, logprobs: CompletionLogprobs | None = None, index: int = 0
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
                    "index": index,
                    "logprobs": logprobs,
                    "finish_reason": cast("FinishReason | None", finish_reason),
                }
            ],
        }

    def chat(
        self,
        answers: Sequence[tuple[dict[str, Any], str | None, ChatCompletionLogprobs | None]],
        usage: CompletionUsage,
    ) -> CreateChatCompletionResponse:
        """Return answers to one conversation: of each the message, why it ended, and log probabilities."""
        return {
            "id": f"chat{self.id}",
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": [
                {
                    "index": index,
                    "message": cast(Any, message),
                    "logprobs": logprobs,
                    "finish_reason": finish_reason,
                }
                for index, (message, finish_reason, logprobs) in enumerate(answers)
            ],
            "usage": usage,
        }

    def chat_chunk(
        self,
        delta: dict[str, Any],
        finish_reason: str | None = None,
        logprobs: ChatCompletionLogprobs | None = None,
        index: int = 0,
    ) -> CreateChatCompletionStreamResponse:
        """Return a chunk of an answer."""
        return {
            "id": f"chat{self.id}",
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "choices": [
                {
                    "index": index,
                    "delta": cast(Any, delta),
                    "logprobs": logprobs,
                    "finish_reason": cast(Any, finish_reason),
                }
            ],
        }

    def last_completion(self, usage: CompletionUsage, timings: ResponseTimings) -> CreateCompletionResponse:
        """Return the chunk after all others, which tells the usage where ``stream_options`` asks for it."""
        return {**self.completion("", None), "choices": [], "usage": usage, "timings": timings}

    def last_chat_chunk(self, usage: CompletionUsage, timings: ResponseTimings) -> CreateChatCompletionStreamResponse:
        """Return the chunk after all others, which tells the usage where ``stream_options`` asks for it."""
        return {**self.chat_chunk({}), "choices": [], "usage": usage, "timings": timings}


def usage_of(completions: Sequence[Completion], vocab: Vocab) -> CompletionUsage:
    """Return the usage of all choices of one prompt, which counts once, as OpenAI has it.

    As in llama-cpp-python the token that ends a text is not counted.
    """
    n_tokens = 0
    for completion in completions:
        tokens = completion.tokens
        n_tokens += len(tokens) - (1 if tokens and vocab.is_eog(tokens[-1]) else 0)
    n_prompt = completions[0].usage.prompt_tokens
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_tokens,
        "total_tokens": n_prompt + n_tokens,
        "prompt_tokens_details": {"cached_tokens": _n_cached(completions)},
    }


def timings_of(completions: Sequence[Completion], n_together: int = 1) -> ResponseTimings:
    """Return the timings of all choices, as llama.cpp's server writes them; ``n_together`` ran at a time."""
    each = [completion.timings for completion in completions]
    n_prompt, n_predicted = sum(one.prompt_tokens for one in each), sum(len(one.tokens) for one in completions)
    # The first token comes with the prompt. Each was told the time of all steps that it took part in.
    prompt_s = _together([one.prompt_s for one in each], n_together)
    decode_s = _together([one.decode_s for one in each], n_together)
    n_decoded = sum(one.decode_tokens for one in each)
    return {
        "cache_n": _n_cached(completions),
        "prompt_n": n_prompt,
        "prompt_ms": prompt_s * 1e3,
        "prompt_per_token_ms": prompt_s * 1e3 / max(n_prompt, 1),
        "prompt_per_second": n_prompt / prompt_s if prompt_s > 0 else 0.0,
        "predicted_n": n_predicted,
        "predicted_ms": decode_s * 1e3,
        "predicted_per_token_ms": decode_s * 1e3 / max(n_decoded, 1),
        "predicted_per_second": n_decoded / decode_s if decode_s > 0 else 0.0,
    }


def _n_cached(completions: Sequence[Completion]) -> int:
    """Return what was there of the prompt before any of the choices: what one computed is cached for the others."""
    return min(completion.usage.cached_tokens for completion in completions)


def _together(seconds: Sequence[float], n_together: int) -> float:
    return max(*seconds, sum(seconds) / n_together) if n_together > 1 else sum(seconds)


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
    heading = Heading(completion["model"], completion["id"], completion["created"])
    answers: list[tuple[dict[str, Any], str | None, ChatCompletionLogprobs | None]] = []
    for choice in completion["choices"]:
        logprobs, text = _to_chat_logprobs(choice["logprobs"]), choice["text"]
        if tool_name is None:
            answers.append(({"role": "assistant", "content": text}, choice["finish_reason"], logprobs))
        else:
            function = {"name": tool_name, "arguments": text}
            call = {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}
            message = {"role": "assistant", "content": None, "function_call": dict(function), "tool_calls": [call]}
            answers.append((message, "tool_calls", logprobs))
    response = heading.chat(answers, completion["usage"])
    if "timings" in completion:
        response["timings"] = completion["timings"]
    return response


def chunks_to_chat(
    chunks: Iterable[CreateCompletionResponse], tool_name: str | None = None
) -> Iterator[CreateChatCompletionStreamResponse]:
    """Turn the chunks of a completion into those of an answer, or of a call of ``tool_name``."""
    heading: Heading | None = None
    begun: set[int] = set()
    for chunk in chunks:
        heading = heading or Heading(chunk["model"], chunk["id"], chunk["created"])
        if not chunk["choices"]:
            yield heading.last_chat_chunk(chunk["usage"], chunk["timings"])
            continue
        choice = chunk["choices"][0]
        index = choice["index"]
        if index not in begun:
            begun.add(index)
            yield heading.chat_chunk({"role": "assistant"}, index=index)
            if tool_name is not None:
                function = {"name": tool_name, "arguments": ""}
                call = {"index": 0, "id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}
                yield heading.chat_chunk({"tool_calls": [call]}, index=index)
        reason = choice["finish_reason"]
        if reason is not None:
            yield heading.chat_chunk({}, reason if tool_name is None else "tool_calls", index=index)
        elif tool_name is None:
            logprobs = _to_chat_logprobs(choice["logprobs"])
            yield heading.chat_chunk({"content": choice["text"]}, None, logprobs, index)
        else:
            piece = {"index": 0, "function": {"arguments": choice["text"]}}
            yield heading.chat_chunk({"tool_calls": [piece]}, index=index)


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
