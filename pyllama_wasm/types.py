"""What the calls return: completions, chat completions, and their usage and timings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

__all__ = [
    "ChatCompletion",
    "ChatMessage",
    "Completion",
    "ContextPerf",
    "FinishReason",
    "Timings",
    "TokenLogprob",
    "ToolCall",
    "ToolCallFunction",
    "Usage",
]

FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]
"""``stop``: end-of-generation token or stop string; ``length``: ``max_tokens`` or the context is used up;
``tool_calls``: the answer of a chat calls tools; ``cancelled``: a stream was closed before its end."""


class ToolCallFunction(TypedDict):
    """Which function is called with what."""

    name: str
    arguments: str
    """JSON, unless ``max_tokens`` cut it short."""


class ToolCall(TypedDict):
    """A call of a tool that the model asks for, as OpenAI writes it."""

    id: str
    type: Literal["function"]
    function: ToolCallFunction


class _ChatMessage(TypedDict):
    role: str
    content: str | None


class ChatMessage(_ChatMessage, total=False):
    """One message of a conversation, as OpenAI writes it; ``content`` is ``None`` beside tool calls and no text."""

    reasoning_content: str
    tool_calls: list[ToolCall]


@dataclass(frozen=True)
class Usage:
    """How many tokens a call took in and gave out."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Tokens of the prompt that were in the KV cache, of an earlier call or of another choice, and so not computed."""

    @property
    def total_tokens(self) -> int:
        """Return prompt and completion tokens together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Timings:
    """Where a call spent its time, in seconds."""

    prompt_s: float
    """Time in the prefill steps, the first sampled token included."""

    decode_s: float
    """Time in the steps of the further tokens."""

    load_s: float
    """Time the model took to load, once, before this call."""

    prompt_tokens: int
    """Tokens computed in ``prompt_s``."""

    decode_tokens: int
    """Tokens computed in ``decode_s``: one fewer than were generated, as the first comes with the prompt."""

    draft_tokens: int = 0
    """Tokens that were proposed by what the call was told to speculate with."""

    accepted_tokens: int = 0
    """Those of them that the model would have chosen itself, so that they cost it no step."""

    @property
    def prompt_tokens_per_s(self) -> float:
        """Return the prefill speed, 0 when nothing was measured."""
        return self.prompt_tokens / self.prompt_s if self.prompt_s > 0 else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Return the decode speed, 0 when nothing was measured."""
        return self.decode_tokens / self.decode_s if self.decode_s > 0 else 0.0


@dataclass(frozen=True)
class TokenLogprob:
    """How likely the model found a token, and which ones it found likelier: of its logits, before any sampler."""

    token: int
    text: str
    """The token's text, that of control tokens too; incomplete characters are U+FFFD."""

    bytes: bytes
    """What the token adds to the text; of a control token nothing."""

    logprob: float
    """Natural logarithm of its probability; ``-inf`` for none."""

    top: tuple[tuple[int, str, float], ...] = ()
    """The likeliest tokens with their texts and log-probabilities, the likeliest first."""


@dataclass(frozen=True)
class Completion:
    """A finished generation; ``str()`` of it is its text."""

    text: str
    """What was generated, without the stop string."""

    tokens: tuple[int, ...]
    """Every sampled token, the end-of-generation token included."""

    finish_reason: FinishReason
    """``stop``: end-of-generation token or stop string; ``length``: ``max_tokens`` or the context is used up;
    ``cancelled``: a stream was closed before its end."""

    usage: Usage
    timings: Timings

    logprobs: tuple[TokenLogprob, ...] | None = field(default=None, kw_only=True)
    """One for each of ``tokens``, when they were asked for."""

    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = field(default=None, kw_only=True)
    """One for each token of the prompt, ``None`` for the first, when ``echo`` was asked for too.

    Not of what an encoder has read.
    """

    def __str__(self) -> str:
        """Return the text."""
        return self.text


@dataclass(frozen=True)
class ChatCompletion(Completion):
    """A finished answer of a conversation; ``text`` is its content, without reasoning and tool calls."""

    message: ChatMessage = field(default_factory=lambda: ChatMessage(role="assistant", content=None))
    """The answer as a message, ready to be appended to the conversation; made of ``text`` where none is given."""

    reader: Callable[[str], Any] | None = field(default=None, repr=False, compare=False)
    """What makes ``parsed`` of the content."""

    def __post_init__(self) -> None:
        """Have a message in any case."""
        if self.message["content"] is None and "tool_calls" not in self.message:
            object.__setattr__(self, "message", {**self.message, "content": self.text})

    @property
    def reasoning_content(self) -> str:
        """Return the reasoning before the answer, or an empty string."""
        return self.message.get("reasoning_content", "")

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """Return the calls of tools that the model asks for."""
        return tuple(self.message.get("tool_calls", ()))

    @property
    def parsed(self) -> Any:
        """Return what ``response_format`` asked for, read from the content: an object of its class, else plain values.

        ``None`` when none was asked for, or when the answer is not whole (``finish_reason`` is not ``stop``). Raises
        ``AnswerError`` for an answer that the class refuses for reasons that a schema cannot say.
        """
        if self.reader is None or self.finish_reason != "stop":
            return None
        return self.reader(self.text)


@dataclass(frozen=True)
class ContextPerf:
    """llama.cpp's counters of a context since it was made or reset: ``llama_perf_context_data``. Times in ms."""

    t_start_ms: float
    """When counting began, on the sandbox's clock."""

    t_load_ms: float
    """From then until the first batch was computed, the load of the model included."""

    t_p_eval_ms: float
    """Computing batches of several tokens."""

    t_eval_ms: float
    """Computing single tokens."""

    n_p_eval: int
    """Tokens in batches of several; llama.cpp says at least 1."""

    n_eval: int
    """Single tokens; llama.cpp says at least 1."""

    n_reused: int
    """How often the compute graph of the batch before was used again."""
