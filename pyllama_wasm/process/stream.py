"""A stream whose generation runs in another process."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import CancelledError
from ..scheduler import MAX_AHEAD
from ..types import Completion, Timings, Usage
from .connection import Call
from .values import completion_from_wire, integer, items, number, text, tokens
from .wire import WireError

if TYPE_CHECKING:
    from .remote import RemoteCalls

__all__ = ["RemoteGeneration"]

_GRANT = MAX_AHEAD // 2


class RemoteGeneration:
    """What ``TextStream`` needs of a generation, made of the replies to one call."""

    def __init__(self, model: RemoteCalls, call: Call, kind: type[Completion], max_tokens: int | None) -> None:
        """Take over a call that the process has accepted; nothing is computed yet."""
        self._model, self._call, self._kind = model, call, kind
        self._connection = model._connection
        most = model.limits.output_bytes
        # A byte that is part of no character is three bytes of text.
        self._max_tokens, self._bytes_left = max_tokens, None if most is None else 3 * most
        self._texts: list[str] = []
        self._tokens: list[int] = []
        self._n_ungranted = 0
        self._counts: list[int | float] = [0, 0, 0.0, 0.0]
        self._completion: Completion | None = None

    def begin(self) -> None:
        """Have the process compute."""
        self._connection.grant(self._call, MAX_AHEAD)

    @property
    def is_ready(self) -> bool:
        """Whether there is a reply to read, or the end."""
        return self._completion is not None or not self._call.replies.empty()

    def listen(self, ring: Callable[[], None]) -> None:
        """Have ``ring`` called once there is a reply, in any thread, perhaps in this one."""
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
                vocab = self._model.vocab
                self._completion = completion_from_wire(value, self._kind, vocab.n_tokens, self._model.load_s)
                self._check_most(len(self._completion.tokens))
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

    read_logprobs = None
    """They are not to be had from another process."""

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
        n_prompt, n_cached, prompt_s, decode_s = self._counts
        n = len(self._tokens)
        return self._kind(
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
            ),
        )

    def _taken(self, value: object) -> str:
        """Check a piece and note what is said with it."""
        said, ids, n_prompt, n_cached, prompt_s, decode_s, deltas = items(value, 7)
        piece = text(said)
        self._took_deltas(deltas)
        self._texts.append(piece)
        self._tokens += tokens(ids, self._model.vocab.n_tokens)
        self._counts = [integer(n_prompt), integer(n_cached), number(prompt_s), number(decode_s)]
        self._check_most(len(self._tokens))
        if self._bytes_left is not None:
            self._bytes_left -= len(piece.encode())
            if self._bytes_left < 0:
                raise WireError("it sent more text than it may")
        return piece

    def _took_deltas(self, values: object) -> None:
        """Take what a conversation's piece is made of; other streams have none."""
        if values:
            raise WireError("it sent more than it was asked for")

    def _check_most(self, n_tokens: int) -> None:
        if self._max_tokens is not None and n_tokens > self._max_tokens:
            raise WireError("it sent more tokens than were asked for")
