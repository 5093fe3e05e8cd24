"""Generating text: what becomes of a request's tokens, and the calls that wait for it."""

from __future__ import annotations

import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import numpy as np
import numpy.typing as npt

from ._call_options import NO_OPTIONS, CallOptions
from ._cancel_scope import current_scope
from ._logits_processors import LogitsProcessor
from ._logprobs import log_probabilities
from .deadline import Deadline, current_deadline, within
from .errors import CancelledError, ContextFullError, GuestStoppedError, RequestError
from .lane import ENCODER, LORAS, PROMPT_LOGITS, SPECULATIVE
from .params import SamplingParams
from .sampler import Sampler
from .slots import NO_KEY, LaneKey, Request
from .text import TextAssembler
from .types import Completion, FinishReason, Timings, TokenLogprob, Usage

if TYPE_CHECKING:
    from .host import Watch
    from .model import Model

__all__ = ["Generation", "GenerationRequest", "TextStream", "context_size"]

C = TypeVar("C", bound=Completion)

# Context sizes are rounded up to few values, so that calls of similar length share lanes.
_SMALLEST_CTX = 512
_LARGE_CTX = 4096
_UNLIMITED_RESERVE = 1024

_LOOK_AGAIN_S = 0.02


@dataclass(frozen=True)
class GenerationRequest:
    """What to generate from and when to end."""

    tokens: tuple[int, ...]
    max_tokens: int | None
    """``None``: until the model ends or the context is full."""

    sampling: SamplingParams
    stops: tuple[str, ...] = ()
    logits_processors: tuple[LogitsProcessor, ...] = ()
    options: CallOptions = NO_OPTIONS
    echo: str = ""
    """What the text begins with, before anything is generated."""


def context_size(n_prompt: int, max_tokens: int | None, n_ctx_train: int) -> int:
    """Return how large a context a request needs, at most ``n_ctx_train``."""
    wanted = n_prompt + max_tokens if max_tokens is not None else max(_LARGE_CTX, n_prompt + _UNLIMITED_RESERVE)
    size = _SMALLEST_CTX
    while size < min(wanted, _LARGE_CTX):
        size *= 2
    if wanted > _LARGE_CTX:
        size = -(-wanted // _LARGE_CTX) * _LARGE_CTX
    return min(size, n_ctx_train) if n_ctx_train > 0 else size


class Generation(Request, Generic[C]):
    """One run of a request: ``run`` and ``next_text`` wait for it, ``completion`` tells how it went."""

    def __init__(self, model: Model, request: GenerationRequest, kind: type[C], max_ahead: int | None = None) -> None:
        """Check the request against the model; nothing is computed yet. The thread's deadline holds for all of it."""
        self._model, self._request, self._kind = model, request, kind
        self._deadline, self._scope = current_deadline(), current_scope()
        if self._scope is not None:
            self._scope.add(self.interrupt)
        self._watch: Watch | None = None
        limit = model.context_params.n_ctx or model.n_ctx_train
        n_prompt = len(request.tokens)
        if limit and n_prompt >= limit:
            raise ContextFullError(
                "generate",
                f"the prompt of {n_prompt} tokens leaves no room in a context of {limit}",
                "shorten it, or raise n_ctx up to what the model was trained for",
            )
        prompt, source, key = np.asarray(request.tokens, np.int32), None, NO_KEY
        if model.has_encoder:
            prompt, source, key = _for_encoder(model, prompt)
        if request.options.loras:
            key = (*key, (LORAS, request.options.loras))
        if request.options.speculative is not None:
            key = (*key, (SPECULATIVE, request.options.speculative))
        n_ctx = model.context_params.n_ctx or context_size(len(prompt), request.max_tokens, model.n_ctx_train)
        # What an encoder reads has no logits.
        is_scored = request.options.echo and request.options.logprobs is not None and source is None
        if is_scored:
            key = (*key, (PROMPT_LOGITS, True))
        alone = model.params.deterministic
        super().__init__(prompt, n_ctx, source=source, key=key, max_ahead=max_ahead, is_alone=alone)
        self.takes_lane = self.takes_lane or request.options.speculative is not None
        self._n_ctx = n_ctx  # its own bound: the lane's may be larger
        self.is_cancelled = False
        self._sampler: Sampler | None = None
        self._assembler, self._has_stops = TextAssembler(request.stops), bool(request.stops)
        self._tokens: list[int] = []
        self._texts: list[str] = []
        self._unread: deque[tuple[str, int]] = deque()
        self._n_read = self._n_texts_read = 0
        self._finish_reason: FinishReason | None = None
        self.wants_logits = request.options.logprobs is not None
        self.wants_prompt_logits = is_scored
        self.wants_tokens = request.max_tokens != 0
        self._is_scored = False
        self._logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob | None] | None = [None] if is_scored else None
        """Those of the prompt's tokens, none of the first, where echo and logprobs were asked for."""

        self.read_logprobs: tuple[TokenLogprob, ...] | None = () if self.wants_logits else None
        """Of a stream those of the tokens of the text that was read last; ``None`` where they were not asked for."""

        if request.options.echo and not issubclass(Completion, kind):
            raise RequestError("set echo", "an answer does not begin with its conversation", "use generate or stream")
        if request.echo and not is_scored:  # else with its log-probabilities
            self._emit(request.echo)
        most = model.limits.output_bytes
        self._bytes_left = sys.maxsize if most is None else most

    # -- for who waits ------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Queue it. A call from a callback of the same model is refused: it would wait for itself."""
        if not self.is_computed:
            self._finish_reason, self.is_ended = "length", True
            return
        self.register()
        self._model._scheduler.submit(self)

    def register(self) -> None:
        """Count as a call of the model that runs, before it is queued; raises as ``begin``."""
        if threading.get_ident() == self._model.native.thread:
            raise RequestError("generate", "a callback of the model cannot wait for the model itself")
        self._model._calls.add(self)
        self.watch()

    @property
    def is_computed(self) -> bool:
        """Whether there is anything to compute."""
        return self._request.max_tokens != 0 or self.wants_prompt_logits

    def watch(self) -> None:
        """Have somebody look at it when its deadline comes."""
        if self._deadline is not None:
            self._watch = self._model.engine.watch(self._deadline.due_at, self._look)

    def end(self) -> None:
        """Give back what it holds, whatever it is at. Doing it twice is fine."""
        if self._watch is not None:
            self._watch.cancel()
        self._model._calls.discard(self)
        self._model._scheduler.release(self)

    def forget(self) -> None:
        """Do as ``end`` without blocking: a forgotten stream is collected in whatever thread, at whatever moment."""
        if self._watch is not None:
            self._watch.cancel()
        self._model._calls.discard(self)
        self._model._scheduler.abandon(self)

    def run(self) -> C:
        """Wait for the end and return the completion."""
        try:
            self.begin()
            self.wait()
            return self.completion()
        finally:
            self.end()

    def wait(self) -> None:
        """Wait until there is text or the end; raise what went wrong."""
        if self.is_computed:
            if self._deadline is None:
                self._model._scheduler.wait(self)
            else:
                self._wait_bounded(self._deadline)
        if self.error is not None and not self._unread:
            raise self.error

    def _wait_bounded(self, deadline: Deadline) -> None:
        try:
            with within(deadline):
                self._model._scheduler.wait(self)
        except GuestStoppedError as error:
            if deadline.is_due:
                raise deadline.error("generate", has_died=True) from error
            raise

    def _look(self) -> float | None:
        """End what computes it, now that its deadline has come; on the watchdog's thread, until nobody waits."""
        deadline = self._deadline
        if deadline is None or self.is_ended:
            return None
        self._model._scheduler.end_overdue(self, deadline.grace_s)
        return time.monotonic() + _LOOK_AGAIN_S if self.is_waited_for else None

    def listen(self, ring: Callable[[], None], is_lost: Callable[[], bool] = lambda: False) -> None:
        """Have ``ring`` called once there is something, for who waits in no thread: ``ListeningScheduler.listen``."""
        self._model._scheduler.listen(self, ring, is_lost)

    def heard(self) -> None:
        """Raise what went wrong, for who was rung."""
        self._model._scheduler.heard(self)

    def unlisten(self) -> None:
        """Take ``listen`` back."""
        self._model._scheduler.unlisten(self)

    def interrupt(self) -> None:
        """End the step that it takes part in, unless others do too: nobody wants what it gives."""
        self._model._scheduler.interrupt(self)

    def next_text(self) -> str | None:
        """Wait for the next text and return it; ``None`` at the end."""
        if self._unread:
            self.check()
        else:
            self.wait()
        if not self._unread:
            return None
        text, n_tokens = self._unread.popleft()
        self._n_texts_read += 1
        if self.wants_logits:
            self.read_logprobs = tuple(self._logprobs[self._n_read : n_tokens])
        self._n_read, self.n_unread = n_tokens, len(self._tokens) - n_tokens
        return text

    @property
    def text(self) -> str:
        """All text so far, of a stream all that was read."""
        return "".join(self._texts if self.max_ahead is None else self._texts[: self._n_texts_read])

    def completion(self) -> C:
        """Return what was generated so far; of a stream, what was read."""
        request, tokens = self._request, self._tokens
        is_whole = self._finish_reason is not None and not self._unread
        if not is_whole and self.max_ahead is not None:
            tokens = tokens[: self._n_read]
        return self._kind(
            text=self.text,
            tokens=tuple(tokens),
            finish_reason=(self._finish_reason if is_whole else None) or "cancelled",
            usage=Usage(len(request.tokens), len(tokens), self.n_cached),
            timings=Timings(
                prompt_s=self.prompt_s,
                decode_s=self.decode_s,
                load_s=self._model.load_s,
                prompt_tokens=len(request.tokens) - self.n_cached if self._tokens or self._is_scored else 0,
                decode_tokens=max(len(self._tokens) - 1, 0),
                draft_tokens=self.n_drafted,
                accepted_tokens=self.n_accepted,
            ),
            logprobs=tuple(self._logprobs[: len(tokens)]) if self.wants_logits else None,
            prompt_logprobs=None if self.prompt_logprobs is None else tuple(self.prompt_logprobs),
        )

    def check(self) -> None:
        """Raise if the call was cancelled or its model closed, or if its deadline has come before its end."""
        self._model._check_open("generate")
        if self.is_given_up:
            raise CancelledError("generate", "it was cancelled")
        if self._deadline is not None and not self.is_ended:
            self._deadline.check("generate")

    # -- for scheduler and lane ---------------------------------------------------------------------------------------

    @property
    def is_ready(self) -> bool:
        """Whether there is text to read, or the end."""
        return self.is_ended or bool(self._unread)

    @property
    def is_given_up(self) -> bool:
        """Whether it was cancelled, and who waits for it is about to find out."""
        return self.is_cancelled or (self._scope is not None and self._scope.is_cancelled)

    def sampler(self) -> Sampler:
        """Return the sampler, made and shown the prompt by the first call."""
        if self._sampler is None:
            request = self._request
            self._sampler = self._make_sampler(request)
            self._sampler._accept_prompt(list(request.tokens))
        return self._sampler

    def _make_sampler(self, request: GenerationRequest) -> Sampler:
        return Sampler(self._model, request.sampling, request.logits_processors)

    def see_logits(self, token: int, logits: npt.NDArray[np.float32]) -> None:
        """Note how likely a token was; before ``took`` is called with it."""
        self._logprobs.append(self._logprob_of(token, logits))

    def see_prompt_logits(self, i: int, logits: npt.NDArray[np.float32]) -> None:
        """Note how likely a token of the prompt was; a step that was repeated shows some again."""
        if self.prompt_logprobs is not None:
            del self.prompt_logprobs[i:]
            self.prompt_logprobs.append(self._logprob_of(int(self.prompt[i]), logits))

    def joined(self, twin: Request) -> None:
        """Take over what was computed of the prompt for another request of the same."""
        super().joined(twin)
        if isinstance(twin, Generation) and twin.prompt_logprobs is not None:
            self.prompt_logprobs = list(twin.prompt_logprobs)

    def _logprob_of(self, token: int, logits: npt.NDArray[np.float32]) -> TokenLogprob:
        vocab, n_top = self._model.vocab, self._request.options.logprobs or 0
        logprob, top = log_probabilities(logits, token, n_top)
        return TokenLogprob(
            token=token,
            text=vocab._step_text(token),
            bytes=vocab._step_piece(token)[0],
            logprob=logprob,
            top=tuple((other, vocab._step_text(other), value) for other, value in top),
        )

    def took(self, token: int, piece: bytes, is_eog: bool) -> None:
        """Turn a token into text, and end with the last one."""
        if self.is_ended:  # closed while it was computed
            return
        tokens, assembler, reason = self._tokens, self._assembler, None
        if not tokens:
            self.read_prompt()
        tokens.append(token)
        if is_eog:
            reason = "stop"
        elif len(piece) > self._bytes_left:
            reason = "length"
        else:
            self._bytes_left -= len(piece)
            text = assembler.feed(piece)
            if text:
                self._emit(text)
            if self._has_stops and assembler.is_stopped:
                reason = "stop"
            elif len(tokens) == self._request.max_tokens or len(self.prompt) + len(tokens) > self._n_ctx:
                reason = "length"
        self.n_unread = len(tokens) - self._n_read
        if reason is not None:
            self._emit_rest(assembler.finish())
            self._finish_reason = cast(FinishReason, reason)
            if self.keep is not None:
                self.keep()
            self.is_ended = True

    def read_prompt(self) -> None:
        """Begin the text with the prompt, whose logits were all seen; end there if nothing else is wanted."""
        if self.wants_prompt_logits and not self.is_ended:
            self._is_scored = True
            self._emit(self._request.echo)
            if not self.wants_tokens:
                self._finish_reason, self.is_ended = "length", True

    def released(self) -> None:
        """Have the sampler freed."""
        sampler, self._sampler, self.keep = self._sampler, None, None
        if sampler is not None:
            self._model._discard(sampler._release())

    def _emit(self, text: str) -> None:
        self._texts.append(text)
        if self.max_ahead is not None:
            self._unread.append((text, len(self._tokens)))

    def _emit_rest(self, text: str) -> None:
        """Emit the last text; once, with none left too, before the generation counts as ended."""
        if text:
            self._emit(text)


def _for_encoder(
    model: Model, source: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], LaneKey]:
    """Return where the decoder begins, what the encoder reads, and the key of a lane with room for it."""
    start = model.vocab.bos if model.decoder_start_token is None else model.decoder_start_token
    if start is None:
        raise RequestError("generate", "the model has neither a token to start with nor a beginning token")
    return np.asarray([start], np.int32), source, ((ENCODER, 1 << max(len(source) - 1, 31).bit_length()),)


class TextStream(Iterator[str]):
    """Text pieces of a running generation: an iterator, a context manager, and the completion at the end.

    For one thread at a time. Leaving it unfinished is fine: ``close``, ``with`` or losing the last reference ends
    the generation.
    """

    def __init__(self, generation: Generation[Any]) -> None:
        """Wrap a generation that has not begun; it begins with the first piece asked for."""
        self._generation = generation
        self._is_ended = False
        self._forget: weakref.finalize[Any, Any] | None = None

    def __iter__(self) -> TextStream:
        """Return the stream itself."""
        return self

    def __next__(self) -> str:
        """Return the next piece of text, valid Unicode and not part of a stop string."""
        if self._is_ended:
            raise StopIteration
        try:
            self._begin()
            text = self._generation.next_text()
        except BaseException:
            self.close()
            raise
        if text is None:
            self.close()
            raise StopIteration
        return text

    def _begin(self) -> None:
        """Have the generation begin, if it has not."""
        if self._forget is None:
            self._hold()
            self._generation.begin()

    def _hold(self) -> None:
        """Count as begun: from now on the generation is to be ended."""
        self._forget = weakref.finalize(self, self._generation.forget)
        self._forget.atexit = False

    @property
    def _is_at_hand(self) -> bool:
        """Whether who reads on waits for nothing but what is computed for this stream."""
        generation = self._generation
        return self._is_ended or generation.is_ready or getattr(generation, "slot", None) is not None

    def close(self) -> None:
        """End the generation. Doing it twice is fine."""
        self._is_ended = True
        if self._forget is not None and self._forget.detach() is not None:
            self._generation.end()

    def __enter__(self) -> TextStream:
        """Return the stream itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the generation."""
        self.close()

    @property
    def text(self) -> str:
        """Return all text so far."""
        return self._generation.text

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...] | None:
        """Those of the tokens of the last piece, where ``logprobs`` was given, else ``None``.

        A token that completes no text belongs to the piece of the next one that does, those at the end to none: the
        completion has all.
        """
        return self._generation.read_logprobs

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprob | None, ...] | None:
        """Those of the prompt's tokens, with the first piece, where ``echo`` and ``logprobs`` were given."""
        return cast(Completion, self._generation.completion()).prompt_logprobs

    @property
    def usage(self) -> Usage:
        """How many tokens went in, and came out with the pieces read so far."""
        return cast(Completion, self._generation.completion()).usage

    @property
    def timings(self) -> Timings:
        """Where the time went so far."""
        return cast(Completion, self._generation.completion()).timings

    @property
    def completion(self) -> Completion | None:
        """Return the completion when the stream has ended or was closed, ``None`` before."""
        return cast(Completion, self._generation.completion()) if self._is_ended else None


def checked_prompt(tokens: Sequence[int], bos: int | None) -> tuple[int, ...]:
    """Return the prompt's tokens, ``bos`` in place of none at all; raise ``RequestError`` when there is no ``bos``."""
    if tokens:
        return tuple(tokens)
    if bos is None:
        raise RequestError("generate", "the prompt is empty", "give at least one character")
    return (bos,)
