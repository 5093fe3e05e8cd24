"""A stream whose generation runs in another process."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import CancelledError
from ..scheduler import MAX_AHEAD
from ..types import Completion, Timings, TokenLogprob, Usage
from .call import Call
from .results import Expected
from .values import integer, items, mapping, number, text, tokens
from .wire import WireError

if TYPE_CHECKING:
    from .remote import RemoteCalls

__all__ = ["RemoteGeneration"]

_GRANT = MAX_AHEAD // 2
_MORE_PIECES = 2
"""How many more than tokens there may be: a text to begin with, and what was held back at the end."""


class RemoteGeneration:
    """What ``TextStream`` needs of a generation, made of the replies to one call."""

    def __init__(self, model: RemoteCalls, call: Call, expected: Expected) -> None:
        """Take over a call that the process has accepted; nothing is computed yet."""
        self._model, self._call, self._expected = model, call, expected
        self._connection = model._connection
        self._bytes_left = expected.text_bytes
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: tuple[TokenLogprob | None, ...] | None = (None,) if expected.is_scored else None
        self.read_logprobs: tuple[TokenLogprob, ...] | None = None if expected.n_top is None else ()
        """Those of the tokens of the text that was read last; ``None`` where they were not asked for."""

        self._texts: list[str] = []
        self._tokens: list[int] = []
        self._n_ungranted = 0
        self._counts: list[int | float] = [0, 0, 0, 0, 0.0, 0.0]
        self._completion: Completion | None = None

    def begin(self) -> None:
        """Have the process compute."""
        self._connection.grant(self._call, MAX_AHEAD)

    @property
    def is_ready(self) -> bool:
        """Whether there is a reply to read, or the end."""
        return self._completion is not None or not self._call.replies.empty()

    def listen(self, ring: Callable[[], None], is_lost: Callable[[], bool] | None = None) -> None:
        """Have ``ring`` called once there is a reply, in any thread, perhaps in this one; it goes no further alone."""
        self._call.ring = ring
        if self.is_ready:
            ring()

    def heard(self) -> None:
        """Do nothing: whatever goes wrong comes as a reply."""

    def unlisten(self) -> None:
        """Take ``listen`` back."""
        self._call.ring = None

    interrupt = unlisten
    """The process ends it by itself when it is told of the end."""

    def next_text(self) -> str | None:
        """Wait for the next text and return it; ``None`` at the end."""
        if self._completion is not None:
            return None
        self._model._check_open("generate")
        if self._call.cancelled_at is not None:
            raise CancelledError("generate", "it was cancelled")
        kind, value = self._connection.next(self._call)
        with self._connection.checked(self._call):
            if kind == "result":
                self._completion = self._expected.read(value)
                return None
            if kind != "piece":
                raise WireError("it sent an answer of another kind")
            piece = self._taken(value)
        self._n_ungranted += 1
        if self._n_ungranted == _GRANT:
            self._n_ungranted = 0
            self._connection.grant(self._call, _GRANT)
        return piece

    def end(self) -> None:
        """Have the process end it. Doing it twice is fine."""
        self._connection.end(self._call)

    forget = end
    """Neither blocks."""

    @property
    def text(self) -> str:
        """All text that was read."""
        return "".join(self._texts)

    def completion(self) -> Completion:
        """Return what was generated as far as it was read."""
        if self._completion is not None:
            return self._completion
        n_prompt, n_cached, n_draft, n_accepted, prompt_s, decode_s = self._counts
        n = len(self._tokens)
        return self._expected.kind(
            text=self.text,
            tokens=tuple(self._tokens),
            finish_reason="cancelled",
            usage=Usage(int(n_prompt), n, int(n_cached)),
            timings=Timings(
                prompt_s=prompt_s,
                decode_s=decode_s,
                load_s=self._model.load_s,
                prompt_tokens=int(n_prompt - n_cached) if n else 0,
                decode_tokens=max(n - 1, 0),
                draft_tokens=int(n_draft),
                accepted_tokens=int(n_accepted),
            ),
            logprobs=None if self.read_logprobs is None else tuple(self._logprobs),
            prompt_logprobs=self._prompt_logprobs,
        )

    def _taken(self, value: object) -> str:
        """Check a piece and note what is said with it."""
        sent = mapping(value)
        piece = text(sent.get("text"))
        found = tokens(sent.get("tokens"), self._expected.n_vocab, self._expected.tokens_left(len(self._tokens)))
        deltas = sent.get("deltas")
        if not piece and not found and not deltas and (self._texts or not self._expected.is_scored):
            raise WireError("it sent a piece of nothing")
        self._took_deltas(deltas, piece)
        self._texts.append(piece)
        self._tokens += found
        self._expected.check_tokens(len(self._texts) - _MORE_PIECES)
        *counts, prompt_s, decode_s = items(sent.get("counts"), 6)
        self._counts = [*(integer(count) for count in counts), number(prompt_s), number(decode_s)]
        if (logprobs := self._expected.logprobs(sent.get("logprobs"), len(found))) is not None:
            self._logprobs += logprobs
            self.read_logprobs = logprobs
        if sent.get("prompt_logprobs") is not None:
            n_prompt = int(self._counts[0])
            self._prompt_logprobs = self._expected.prompt_logprobs(sent["prompt_logprobs"], n_prompt)
        self._count(len(piece.encode()))
        return piece

    def _count(self, n_bytes: int) -> None:
        """Count text that was sent."""
        if self._bytes_left is not None:
            self._bytes_left -= n_bytes
            if self._bytes_left < 0:
                raise WireError("it sent more text than it may")

    def _took_deltas(self, values: object, piece: str) -> None:
        """Take what a conversation's piece is made of; other streams have none."""
        if values:
            raise WireError("it sent more than it was asked for")
