"""Generating text: prefill, then one token per turn, with every turn one job on the engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from .context import Context
from .errors import CancelledError, ContextFullError, RequestError
from .params import SamplingParams
from .sampler import Sampler
from .text import TextAssembler
from .types import ChatCompletion, Completion, FinishReason, Timings, Usage

if TYPE_CHECKING:
    from .model import Model

__all__ = ["ChatStream", "Generation", "GenerationRequest", "TextStream", "context_size"]

C = TypeVar("C", bound=Completion)

# Context sizes are rounded up to few values, so that calls of similar length share pooled contexts.
_SMALLEST_CTX = 512
_LARGE_CTX = 4096
_UNLIMITED_RESERVE = 1024


@dataclass(frozen=True)
class GenerationRequest:
    """What to generate from and when to end."""

    tokens: tuple[int, ...]
    max_tokens: int | None
    """``None``: until the model ends or the context is full."""

    sampling: SamplingParams
    stops: tuple[str, ...] = ()


def context_size(n_prompt: int, max_tokens: int | None, n_ctx_train: int) -> int:
    """Return how large a context a request needs, at most ``n_ctx_train``."""
    wanted = n_prompt + max_tokens if max_tokens is not None else max(_LARGE_CTX, n_prompt + _UNLIMITED_RESERVE)
    size = _SMALLEST_CTX
    while size < min(wanted, _LARGE_CTX):
        size *= 2
    if wanted > _LARGE_CTX:
        size = -(-wanted // _LARGE_CTX) * _LARGE_CTX
    return min(size, n_ctx_train) if n_ctx_train > 0 else size


class Generation(Generic[C]):
    """One run of a request: ``pieces`` drives it, ``completion`` tells how it went."""

    def __init__(self, model: Model, request: GenerationRequest, kind: type[C]) -> None:
        """Check the request against the model; nothing is computed yet."""
        self._model, self._request, self._kind = model, request, kind
        self.is_cancelled = False
        self._tokens: list[int] = []
        self._texts: list[str] = []
        self._prompt_s = self._decode_s = 0.0
        self._finish_reason: FinishReason | None = None
        limit = model.context_params.n_ctx or model.n_ctx_train
        n_prompt = len(request.tokens)
        if limit and n_prompt >= limit:
            raise ContextFullError(
                "generate",
                f"the prompt of {n_prompt} tokens leaves no room in a context of {limit}",
                "shorten it, or raise n_ctx up to what the model was trained for",
            )
        self._n_ctx = model.context_params.n_ctx or context_size(n_prompt, request.max_tokens, model.n_ctx_train)

    def completion(self) -> C:
        """Return what was generated so far."""
        request, n_tokens = self._request, len(self._tokens)
        return self._kind(
            text="".join(self._texts),
            tokens=tuple(self._tokens),
            finish_reason=self._finish_reason or "cancelled",
            usage=Usage(len(request.tokens), n_tokens),
            timings=Timings(
                prompt_s=self._prompt_s,
                decode_s=self._decode_s,
                load_s=self._model.load_s,
                prompt_tokens=len(request.tokens) if n_tokens else 0,
                decode_tokens=max(n_tokens - 1, 0),
            ),
        )

    def pieces(self) -> Iterator[str]:
        """Yield the text as it becomes certain.

        The clean-up calls no guest code, so it is safe wherever a forgotten generator is collected.
        """
        if self._request.max_tokens == 0:
            self._finish_reason = "length"
            return
        model = self._model
        model._calls.add(self)
        context: Context | None = None
        sampler: Sampler | None = None
        try:
            context = model._pool.acquire(self._n_ctx, self.check)
            sampler = Sampler(model, self._request.sampling)
            for text in self._steps(context, sampler):
                self._texts.append(text)
                yield text
        finally:
            model._calls.discard(self)
            if sampler is not None:
                model._discard(sampler._release())
            if context is not None:
                model._pool.release(context)

    def check(self) -> None:
        """Raise if the call was cancelled or its model closed."""
        if self.is_cancelled:
            raise CancelledError("generate", "it was cancelled")
        self._model._check_open("generate")

    def _steps(self, context: Context, sampler: Sampler) -> Iterator[str]:
        request, assembler = self._request, TextAssembler(self._request.stops)
        token, piece, is_eog = self._prefill(context, sampler)
        pos = len(request.tokens)
        while True:
            self._tokens.append(token)
            if is_eog:
                self._finish_reason = "stop"
                break
            text = assembler.feed(piece)
            if text:
                yield text
            if assembler.is_stopped:
                self._finish_reason = "stop"
                break
            if len(self._tokens) == request.max_tokens or pos >= context.n_ctx_seq:
                self._finish_reason = "length"
                break
            token, piece, is_eog = self._step(context, sampler, token, pos)
            pos += 1
        rest = assembler.finish()
        if rest:
            yield rest

    def _prefill(self, context: Context, sampler: Sampler) -> tuple[int, bytes, bool]:
        """Compute the prompt, one chunk per turn; sample the first token with the last chunk."""
        tokens, n_chunk, vocab = self._request.tokens, context.n_ubatch, self._model.vocab

        def first() -> None:
            self._model._drain_trash()
            context._native.llama_memory_clear(context._memory, False)
            sampler._accept_prompt(list(tokens))

        def chunk(start: int) -> tuple[int, bytes, bool] | None:
            self.check()
            began = perf_counter()
            if not start:
                first()
            part = tokens[start : start + n_chunk]
            is_last = start + n_chunk >= len(tokens)
            context._prefill(part, start, is_last)
            answer = None
            if is_last:
                token = sampler._sample(context)
                answer = (token, *vocab._step_piece(token))
            self._prompt_s += perf_counter() - began
            return answer

        for start in range(0, len(tokens), n_chunk):
            answer = self._model._run_cancellable(lambda at=start: chunk(at), "generate")  # type: ignore[misc]
            if answer is not None:
                return answer
        raise RequestError("generate", "the prompt is empty", "give at least one token")

    def _step(self, context: Context, sampler: Sampler, token: int, pos: int) -> tuple[int, bytes, bool]:
        """Decode one token and sample the next in one turn."""
        vocab = self._model.vocab

        def job() -> tuple[int, bytes, bool]:
            self.check()
            began = perf_counter()
            context._decode_one(token, pos)
            sampled = sampler._sample(context)
            piece, is_eog = vocab._step_piece(sampled)
            self._decode_s += perf_counter() - began
            return sampled, piece, is_eog

        return self._model._run_cancellable(job, "generate")


class TextStream(Iterator[str]):
    """Text pieces of a running generation: an iterator, a context manager, and the completion at the end.

    For one thread at a time. Leaving it unfinished is fine: ``close``, ``with`` or losing the last reference ends
    the generation.
    """

    def __init__(self, generation: Generation[Any]) -> None:
        """Wrap a generation that has not begun; it begins with the first piece asked for."""
        self._generation = generation
        self._pieces: Iterator[str] = generation.pieces()
        self._is_ended = False

    def __iter__(self) -> TextStream:
        """Return the stream itself."""
        return self

    def __next__(self) -> str:
        """Return the next piece of text, valid Unicode and not part of a stop string."""
        try:
            return next(self._pieces)
        except BaseException:
            self._is_ended = True
            raise

    def close(self) -> None:
        """End the generation. Doing it twice is fine."""
        self._is_ended = True
        close = getattr(self._pieces, "close", None)
        if close is not None:
            close()

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
        return "".join(self._generation._texts)

    @property
    def completion(self) -> Completion | None:
        """Return the completion when the stream has ended or was closed, ``None`` before."""
        return cast(Completion, self._generation.completion()) if self._is_ended else None


class ChatStream(TextStream):
    """The pieces of an answer; its completion is a ``ChatCompletion``."""

    @property
    def completion(self) -> ChatCompletion | None:
        """Return the completion when the stream has ended or was closed, ``None`` before."""
        return cast(ChatCompletion | None, super().completion)


def checked_prompt(tokens: Sequence[int], bos: int | None) -> tuple[int, ...]:
    """Return the prompt's tokens, ``bos`` in place of none at all; raise ``RequestError`` when there is no ``bos``."""
    if tokens:
        return tuple(tokens)
    if bos is None:
        raise RequestError("generate", "the prompt is empty", "give at least one character")
    return (bos,)
