"""What the calls return: completions, chat completions, and their usage and timings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypedDict

__all__ = ["ChatCompletion", "ChatMessage", "Completion", "ContextPerf", "FinishReason", "Timings", "Usage"]

FinishReason = Literal["stop", "length", "cancelled"]
"""``stop``: end-of-generation token or stop string; ``length``: ``max_tokens`` or the context is used up;
``cancelled``: a stream was closed before its end."""


class ChatMessage(TypedDict):
    """One message of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Usage:
    """How many tokens a call took in and gave out."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Tokens of the prompt that an earlier call had left in the KV cache, so that they were not computed again."""

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

    @property
    def prompt_tokens_per_s(self) -> float:
        """Return the prefill speed, 0 when nothing was measured."""
        return self.prompt_tokens / self.prompt_s if self.prompt_s > 0 else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Return the decode speed, 0 when nothing was measured."""
        return self.decode_tokens / self.decode_s if self.decode_s > 0 else 0.0


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

    def __str__(self) -> str:
        """Return the text."""
        return self.text


@dataclass(frozen=True)
class ChatCompletion(Completion):
    """A finished answer of a conversation."""

    @property
    def message(self) -> ChatMessage:
        """Return the answer as a message, ready to be appended to the conversation."""
        return {"role": "assistant", "content": self.text}


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
