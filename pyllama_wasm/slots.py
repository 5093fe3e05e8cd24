"""Requests and the slots they are computed in: values only, nothing here knows the sandbox."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["NO_KEY", "Group", "LaneKey", "Request", "Slot", "plan_step"]

LaneKey = tuple[Any, ...]
"""Pairs of what a lane is made with. Requests share a lane only when their keys are equal."""

NO_KEY: LaneKey = ()


class Group:
    """Requests that belong together: at most ``limit`` of them run at a time, in order."""

    def __init__(self, limit: int) -> None:
        """Start without requests."""
        self.limit = limit
        self.n_slots = limit
        """How many slots a lane for them should have; fewer where memory is short."""

        self.waiting: deque[Request] = deque()
        """Not in the scheduler's queue yet."""


class Request(ABC):
    """One request on its way through the scheduler; ``generate.Generation`` says what its tokens become.

    The lane calls ``sampler`` and ``took`` on the engine's thread; all else is the scheduler's.
    """

    def __init__(
        self,
        prompt: npt.NDArray[np.int32],
        n_ctx: int,
        *,
        source: npt.NDArray[np.int32] | None = None,
        key: LaneKey = NO_KEY,
        max_ahead: int | None = None,
        is_alone: bool = False,
    ) -> None:
        """Describe what is wanted: ``n_ctx`` tokens of room for ``prompt`` and what follows it.

        ``source`` is what the encoder of an encoder-decoder model reads. ``max_ahead`` bounds the tokens that nobody
        has read; ``None``: it runs until it ends, as long as anybody waits for anything. ``is_alone``: it is computed
        by itself and from the beginning, so that its result depends on nothing else.
        """
        self.prompt, self.n_ctx, self.source, self.key = prompt, n_ctx, source, key
        self.max_ahead, self.is_alone = max_ahead, is_alone
        self.group: Group | None = None
        self.slot: Slot | None = None
        self.n_cached = 0
        """Prompt tokens that were in the KV cache already; set by the lane."""

        self.prompt_s = self.decode_s = 0.0
        """Seconds of the steps it took part in, with its prompt and after it; added by the lane."""

        self.takes_lane = source is not None or is_alone
        """Whether it has a lane to itself: a context has room for what one encoder has read."""

        self.n_drafted = self.n_accepted = 0
        """Tokens that were proposed for it, and those of them that were right; added by the lane."""

        self.wants_logits = False
        """Whether ``see_logits`` is to be called for each of its tokens."""

        self.wants_prompt_logits = False
        """Whether ``see_prompt_logits`` is to be called for the tokens of its prompt: all of it is computed then."""

        self.wants_tokens = True
        """Whether anything is to follow its prompt; else it ends with ``read_prompt``."""

        self.twins: object = None
        """The same object for requests of one prompt, which is computed once for those in one lane."""

        self.n_unread = 0
        self.is_ended = self.is_waited_for = False
        self.keep: Callable[[], None] | None = None
        """Called on the engine's thread with its last token, where what was computed for it is to be kept."""

        self.error: BaseException | None = None
        self.bell = threading.Lock()
        """What a waiting thread sleeps on: it waits to get the lock a second time."""
        self.bell.acquire()

    @property
    def is_ready(self) -> bool:
        """Whether there is something for who waits."""
        return self.is_ended

    @property
    def is_given_up(self) -> bool:
        """Whether nobody wants it any more, though it has not been ended yet."""
        return False

    @property
    def is_wanted(self) -> bool:
        """Whether a step is worth it for this request alone."""
        return not self.is_ended and (self.max_ahead is None or (self.is_waited_for and self.is_short))

    @property
    def is_short(self) -> bool:
        """Whether a stream may get further tokens: whoever is woken for some may take a while to come and read them."""
        return self.max_ahead is None or self.n_unread < self.max_ahead or not self.is_ready

    @property
    def is_runnable(self) -> bool:
        """Whether a step may advance it."""
        if self.is_ended:
            return False
        # What is held back, as the beginning of a stop string may be, is unread for as long as it takes.
        return self.max_ahead is None or self.n_unread < self.max_ahead or (self.is_waited_for and self.is_short)

    @abstractmethod
    def sampler(self) -> Any:
        """Return the request's sampler; the first call makes it."""

    @abstractmethod
    def took(self, token: int, piece: bytes, is_eog: bool) -> None:
        """Take a sampled token; sets ``is_ended`` after the last one."""

    def see_logits(self, token: int, logits: npt.NDArray[np.float32]) -> None:  # noqa: B027  few want to
        """Look at the model's logits, of which ``token`` was chosen; before ``took``."""

    def see_prompt_logits(self, i: int, logits: npt.NDArray[np.float32]) -> None:  # noqa: B027  few want to
        """Look at the logits before token ``i`` of the prompt; in order, from 1 on, some perhaps twice."""

    def read_prompt(self) -> None:  # noqa: B027  few want no more
        """End: all of the prompt was seen, and nothing is to follow."""

    def joined(self, twin: Request) -> None:
        """Take over what was computed of the prompt for another request of the same."""
        self.n_cached = len(self.prompt)

    @abstractmethod
    def check(self) -> None:
        """Raise if the request must not go on: the place for cancelling and for deadlines."""

    def fail(self, error: BaseException) -> None:
        """End with an error, which is raised to who waits."""
        if not self.is_ended:
            self.error, self.is_ended = error, True

    @abstractmethod
    def released(self) -> None:
        """Let go of what the request has in the guest; no step uses it any more. Must not block."""


class Slot:
    """One sequence of a lane: the tokens it should hold, and how many of them the KV cache has.

    ``tokens[:n_past]`` is computed, ``tokens[n_past:n_tokens]`` is still to be; the cache may hold positions up to
    ``n_kv`` that are not valid any more, because a step was cancelled or another request has begun.
    """

    __slots__ = (
        "is_direct", "is_encoded", "is_following", "is_fresh", "n_kv", "n_past", "n_ready", "n_tokens", "run", "seq_id",
        "tokens",
    )  # fmt: skip

    def __init__(self, seq_id: int, n_ctx_seq: int) -> None:
        """Start empty and free."""
        self.seq_id = seq_id
        self.tokens = np.zeros(n_ctx_seq + 1, np.int32)
        self.n_past = self.n_tokens = self.n_kv = 0
        self.is_encoded = False
        self.is_direct = False
        """Whether a step of the request is one call of the guest: it has a token, and no Python chooses the next."""

        self.is_fresh = False
        """Whether the request has a slot and no step has looked at it yet."""

        self.is_following = False
        """Whether another slot computes the prompt of the request for it."""

        self.n_ready = -1
        """The ``n_past`` for which the guest has that call's arguments already."""

        self.run: Request | None = None

    def n_common(self, prompt: npt.NDArray[np.int32], may_trim: bool) -> int:
        """Return how much of ``prompt`` need not be computed again; its last token always must.

        Without ``may_trim`` the cache can only be continued where it ends.
        """
        n = min(self.n_past, len(prompt) - 1)
        differs = self.tokens[:n] != prompt[:n]
        if differs.any():
            n = int(differs.argmax())
        return n if may_trim or n == self.n_kv else 0

    def begin(self, run: Request, may_trim: bool) -> None:
        """Give the slot to a request."""
        prompt = run.prompt
        # The decoder's cache depends on all that the encoder read.
        is_new = run.source is not None or run.is_alone or run.wants_prompt_logits
        self.n_past = 0 if is_new else self.n_common(prompt, may_trim)
        self.n_tokens = len(prompt)
        self.tokens[self.n_past : self.n_tokens] = prompt[self.n_past :]
        self.is_encoded = run.source is None
        self.is_direct, self.n_ready, self.is_fresh, self.is_following = False, -1, True, False
        run.n_cached = self.n_past
        self.run = run

    def append(self, token: int) -> None:
        """Add a sampled token, to be computed with the next step."""
        self.tokens[self.n_tokens] = token
        self.n_tokens += 1


def plan_step(slots: Sequence[Slot], n_batch: int, turn: int) -> list[tuple[Slot, int]]:
    """Return which slots take part in the next step and with how many tokens each, by sequence id.

    Every sequence that is being continued gets its one token; prompts share the rest, beginning with another one each
    ``turn``, so that none starves. ``n_batch`` is at least the number of slots.
    """
    parts: list[tuple[Slot, int]] = []
    prompts: list[Slot] = []
    for slot in slots:
        if slot.run is not None and slot.run.is_runnable and not slot.is_following:
            if slot.n_tokens - slot.n_past == 1:
                parts.append((slot, 1))
            else:
                prompts.append(slot)
    if not prompts:
        return parts
    left = n_batch - len(parts)
    first = turn % len(prompts)
    for slot in (*prompts[first:], *prompts[:first]):
        n = min(slot.n_tokens - slot.n_past, left)
        if n:
            parts.append((slot, n))
            left -= n
    # llama.cpp computes neighbouring sequences together only when their ids ascend without gaps.
    parts.sort(key=lambda part: part[0].seq_id)
    return parts
