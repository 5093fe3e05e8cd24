"""A model for programs with an event loop: the calls of ``Model``, to be awaited."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextvars import copy_context
from functools import partial
from types import TracebackType
from typing import Any, Generic, Literal, TypeVar, cast, overload

import numpy as np
import numpy.typing as npt

from ._async_bridge import callers, in_thread, outcome, ready, workers
from ._async_embed import EmbedQueue
from ._async_many import called, is_remote, run_together
from .chat_generation import ChatStream
from .deadline import nested
from .embedding import EmbeddingInput, Embeddings, RankedDocument, is_single
from .errors import ClosedError, RequestError
from .generate import Generation, TextStream
from .model import Model
from .params import SamplingParams
from .source import Source
from .tool_loop import ToolRun, await_tools, tool_steps
from .tools import Tool
from .types import ChatCompletion, Completion

__all__ = ["AsyncChatStream", "AsyncModel", "AsyncTextStream"]

S = TypeVar("S", bound=TextStream)


class AsyncTextStream(AsyncIterator[str], Generic[S]):
    """Text pieces of a running generation, for ``async for``; an async context manager too.

    For one task at a time. It begins with the first piece asked for, and computes at most a few tokens ahead of who
    reads it. Leaving it unfinished is fine: ``close``, ``async with``, the end of the task that reads it or losing the
    last reference ends the generation.
    """

    def __init__(self, make: Callable[[], Awaitable[S]]) -> None:
        """Stand for the stream that ``make`` will return, which has not begun."""
        self._make = make
        self._stream: S | None = None
        self._is_ended = False

    def __aiter__(self) -> AsyncTextStream[S]:
        """Return the stream itself."""
        return self

    async def __anext__(self) -> str:
        """Return the next piece of text, valid Unicode and not part of a stop string."""
        while (piece := await self._next()) is not None:
            if piece:
                return piece
        raise StopAsyncIteration

    async def _next(self) -> str | None:
        """Return what comes next, empty where that is no text; ``None`` at the end."""
        if self._is_ended:
            return None
        try:
            stream = await self._begun()
            await ready(stream._generation)
            return TextStream.__next__(stream)  # a single step, that does not wait any more
        except StopIteration:
            self._is_ended = True
            return None
        except BaseException as error:
            self._end(is_unwanted=not isinstance(error, (Exception, GeneratorExit)))
            raise

    async def _begun(self) -> S:
        """Return the stream when its generation has begun."""
        stream = await self._made()
        stream._begin()
        return stream

    async def _made(self) -> S:
        if self._stream is None:
            self._stream = await self._make()
        return self._stream

    def _end(self, is_unwanted: bool) -> None:
        """End the generation, and what is computed for it alone if it is not wanted any more."""
        self._is_ended = True
        if self._stream is not None:
            if is_unwanted and self._stream._forget is not None and not self._stream._is_ended:
                self._stream._generation.interrupt()
            self._stream.close()

    async def close(self) -> None:
        """End the generation. Doing it twice is fine."""
        self._end(is_unwanted=True)

    async def __aenter__(self) -> AsyncTextStream[S]:
        """Return the stream itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the generation."""
        self._end(is_unwanted=True)

    @property
    def text(self) -> str:
        """Return all text so far."""
        return "" if self._stream is None else self._stream.text

    @property
    def completion(self) -> Completion | None:
        """Return the completion when the stream has ended or was closed, ``None`` before."""
        return self._stream.completion if self._is_ended and self._stream is not None else None


class AsyncChatStream(AsyncTextStream[ChatStream]):
    """The pieces of an answer's content; its completion is a ``ChatCompletion``.

    ``deltas`` gives everything, reasoning and tool calls too.
    """

    async def deltas(self) -> AsyncIterator[Mapping[str, Any]]:
        """Yield OpenAI's deltas, as ``ChatStream.deltas`` does: ``async for delta in stream.deltas()``."""
        yield {"role": "assistant"}
        stream = await self._made()
        unread: deque[dict[str, Any]] = cast(Any, stream._generation).unread_deltas
        unread.clear()
        while await self._next() is not None:
            while unread:
                yield unread.popleft()
        for delta in tuple(unread):
            yield delta

    @property
    def completion(self) -> ChatCompletion | None:
        """Return the completion when the stream has ended or was closed, ``None`` before."""
        return cast("ChatCompletion | None", super().completion)


class AsyncModel:
    """A ``Model`` whose calls are awaited: no call blocks the event loop, and no thread waits for one.

    What many tasks ask for at a time is computed together, one batch per step, as calls from several threads are. A
    task that is cancelled takes its request out of the batch, and the others go on; what is computed for it alone is
    ended at once. ``deadline`` and ``deadline_s`` hold as they do for threads.

    For ``asyncio``, and what runs on it. Several event loops may share one object.
    """

    def __init__(self, model: Source | Model, **options: Any) -> None:
        """Stand for the model of a file, loaded with ``options`` by the first call, ``load`` or ``async with``.

        Or for an open ``Model``, which stays usable beside it and is not closed with it. Nothing is read yet.
        """
        self._model = model if isinstance(model, Model) else None
        if self._model is not None and options:
            raise RequestError(
                "load a model", f"the model is loaded already, {next(iter(options))} would have no effect"
            )
        self._source, self._options = model, options
        self._is_own, self._is_closed = self._model is None, False
        self._lock = threading.Lock()
        self._load: _Load | None = None
        self._embeds = EmbedQueue()

    async def load(self) -> Model:
        """Return the model, loaded if it is not; raises as ``Model`` does.

        Tasks that ask for it at a time wait for one load. It is ended when all of them are cancelled.
        """
        with self._lock:
            if self._is_closed:
                raise ClosedError("load a model", "the model is closed", "make a new one")
            if self._model is not None:
                return self._model
            load = self._load = self._load or _Load(cast(Source, self._source), self._options)
            load.n_waiting += 1
        try:
            model = await outcome(load.future)
        except Exception as error:
            if self._is_closed:  # which ended the load
                raise self._closed() from error
            raise
        finally:
            self._loaded(load)
        if self._is_closed:
            raise self._closed()
        return model

    @staticmethod
    def _closed() -> ClosedError:
        return ClosedError("load a model", "the model was closed meanwhile", "make a new one")

    def _loaded(self, load: _Load) -> None:
        """Take the model that was loaded; end a load that nobody waits for any more."""
        with self._lock:
            load.n_waiting -= 1
            if self._load is load and load.future.done():
                self._load = None
                if not self._is_closed and not load.future.cancelled() and load.future.exception() is None:
                    self._model = load.future.result()
            elif self._load is load and not load.n_waiting:
                self._load = None
                load.give_up()

    @property
    def model(self) -> Model:
        """Return the model itself, for all else it can do; raises ``ClosedError`` unless it is loaded and open."""
        if self._model is None or self._is_closed:
            reason = "the model is closed" if self._is_closed else "the model is not loaded yet"
            raise ClosedError("use the model", reason, "" if self._is_closed else "await load() first")
        return self._model

    async def generate(
        self, prompt: str | Sequence[int], *, deadline_s: float | None = None, **options: Any
    ) -> Completion:
        """Continue ``prompt`` and return the whole completion; ``options`` are those of ``Model.generate``."""
        return await _whole(AsyncTextStream(self._made("stream", prompt, deadline_s=deadline_s, **options)))

    def stream(
        self, prompt: str | Sequence[int], *, deadline_s: float | None = None, **options: Any
    ) -> AsyncTextStream[TextStream]:
        """Continue ``prompt`` and return an async iterator over the text pieces, not to be awaited itself.

        ``options`` are those of ``Model.stream``. What is wrong with them is raised with the first piece.
        """
        return AsyncTextStream(self._made("stream", prompt, deadline_s=deadline_s, **options))

    @overload
    async def chat(
        self, messages: Sequence[Mapping[str, Any]], *, stream: Literal[False] = False, **options: Any
    ) -> ChatCompletion: ...

    @overload
    async def chat(
        self, messages: Sequence[Mapping[str, Any]], *, stream: Literal[True], **options: Any
    ) -> AsyncChatStream: ...

    async def chat(
        self, messages: Sequence[Mapping[str, Any]], *, stream: bool = False, **options: Any
    ) -> ChatCompletion | AsyncChatStream:
        """Answer a conversation; ``options`` are those of ``Model.chat``.

        With ``stream=True`` it returns an async iterator over the pieces: ``async for piece in await model.chat(...)``.
        """
        answer = AsyncChatStream(self._made("chat", messages, stream=True, **options))
        if not stream:
            return cast(ChatCompletion, await _whole(answer))
        await answer._made()
        return answer

    async def generate_many(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        n_parallel: int = 8,
        progress: Callable[[int, int], object] | None = None,
        deadline_s: float | None = None,
        **options: Any,
    ) -> list[Completion]:
        """Continue many prompts and return their completions in order.

        ``options`` are those of ``Model.generate_many``. ``progress`` is called in the event loop's thread. Where the
        task is cancelled all of them end.
        """
        model = await self.load()
        if is_remote(model):
            given = {"n_parallel": n_parallel, "progress": progress, "deadline_s": deadline_s, **options}
            return await called(lambda: model.generate_many(prompts, **given))
        return await run_together(
            model, lambda: model._many(prompts, **options), n_parallel, deadline_s=deadline_s, progress=progress
        )

    async def generate_n(
        self,
        prompt: str | Sequence[int],
        n: int,
        *,
        n_parallel: int = 8,
        sampling: SamplingParams | None = None,
        **options: Any,
    ) -> list[Completion]:
        """Return ``n`` completions of one prompt, which is computed once; see ``Model.generate_n``."""
        each = (await self.load())._choice_sampling(n, sampling, options)
        return await self.generate_many([prompt] * n, n_parallel=n_parallel, sampling=each, **options)

    async def chat_n(
        self,
        messages: Sequence[Mapping[str, Any]],
        n: int,
        *,
        n_parallel: int = 8,
        deadline_s: float | None = None,
        **options: Any,
    ) -> list[ChatCompletion]:
        """Return ``n`` answers to one conversation; ``options`` are those of ``Model.chat_n``."""
        model = await self.load()
        if is_remote(model):
            given = {"n_parallel": n_parallel, "deadline_s": deadline_s, **options}
            return await called(lambda: model.chat_n(messages, n, **given))
        limits = (options.pop("max_tokens", None), options.pop("stop", None), options.pop("logits_processors", ()))
        return await run_together(
            model, lambda: model._answers(messages, n, limits, **options), n_parallel, deadline_s=deadline_s
        )

    @overload
    async def infill(
        self, prefix: str, suffix: str, *, stream: Literal[False] = False, **options: Any
    ) -> Completion: ...

    @overload
    async def infill(
        self, prefix: str, suffix: str, *, stream: Literal[True], **options: Any
    ) -> AsyncTextStream[TextStream]: ...

    async def infill(
        self, prefix: str, suffix: str, *, stream: bool = False, **options: Any
    ) -> Completion | AsyncTextStream[TextStream]:
        """Return what stands between ``prefix`` and ``suffix``; ``options`` are those of ``Model.infill``."""
        found: AsyncTextStream[TextStream] = AsyncTextStream(
            self._made("infill", prefix, suffix, stream=True, **options)
        )
        if not stream:
            return await _whole(found)
        await found._made()
        return found

    async def run_tools(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Tool],
        *,
        max_rounds: int = 8,
        on_call: Callable[[str, Mapping[str, Any]], object] | None = None,
        **options: Any,
    ) -> ToolRun:
        """Answer a conversation, calling the functions among ``tools`` as the model asks for it.

        As ``Model.run_tools`` does. Coroutine functions are awaited, here and as ``on_call``; other tools are called in
        a thread. The calls of an answer are made one after the other.
        """
        run = partial(in_thread, pool=callers())  # a tool may take long, which tokenizing must not wait for
        return await await_tools(self.chat, tool_steps(messages, tools, max_rounds, options), on_call, run)

    async def embed(
        self,
        inputs: EmbeddingInput,
        *,
        pooling: str | None = None,
        normalize: bool = True,
        truncate: bool = False,
        deadline_s: float | None = None,
    ) -> npt.NDArray[np.float32] | list[npt.NDArray[np.float32]]:
        """Return the vector of a text, or of each of several; see ``Model.embed``.

        Texts of tasks that ask at a time are computed together.
        """
        if pooling != "none":
            found = await self.embed_with_usage(
                inputs, pooling=pooling, normalize=normalize, truncate=truncate, deadline_s=deadline_s
            )
            return found.vectors[0] if is_single(inputs) else found.vectors
        model = await self.load()
        options: dict[str, Any] = {"pooling": pooling, "normalize": normalize, "truncate": truncate}
        return await in_thread(lambda: model.embed(inputs, deadline_s=deadline_s, **options))

    async def embed_with_usage(
        self,
        inputs: EmbeddingInput,
        *,
        pooling: str | None = None,
        normalize: bool = True,
        truncate: bool = False,
        deadline_s: float | None = None,
    ) -> Embeddings:
        """Return the vectors of one or several texts, with the number of tokens of each; see ``embed``."""
        model = await self.load()
        with nested(deadline_s):
            options = {"pooling": pooling, "normalize": normalize, "truncate": truncate}
            return await self._embeds.embed(model, inputs, options)

    async def rerank(self, query: str, documents: Sequence[str], **options: Any) -> list[RankedDocument]:
        """Return ``documents`` from the best answer of ``query`` to the worst; see ``Model.rerank``."""
        model = await self.load()
        return await in_thread(lambda: model.rerank(query, documents, **options))

    async def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """Return the prompt that the model's template makes of a conversation; see ``Model.apply_chat_template``."""
        model = await self.load()
        return await in_thread(lambda: model.apply_chat_template(messages, **options))

    def cancel(self) -> None:
        """End every call of the model that is running, those of threads among them: they raise ``CancelledError``."""
        if self._model is not None:
            self._model.cancel()

    async def close(self) -> None:
        """End running calls and close the model, unless it was given as a ``Model``. Doing it twice is fine."""
        with self._lock:
            is_first, self._is_closed = not self._is_closed, True
            if self._load is not None:
                self._load.give_up()
        if is_first and self._is_own and self._model is not None:
            await in_thread(self._model.close)

    async def __aenter__(self) -> AsyncModel:
        """Load the model and return this object."""
        await self.load()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the model."""
        await self.close()

    def __repr__(self) -> str:
        """Return what it stands for and its state."""
        state = "closed" if self._is_closed else "not loaded" if self._model is None else repr(self._model)
        return f"<{type(self).__name__} {state}>"

    def _made(self, call: str, *args: Any, **options: Any) -> Callable[[], Awaitable[Any]]:
        """Return what makes a stream of the model: in a thread, since tokenizing and templates wait for the sandbox."""

        async def make() -> TextStream:
            model = await self.load()
            return await in_thread(lambda: cast(TextStream, getattr(model, call)(*args, **options)), _drop)

        return make


class _Load:
    """A model on its way, and how many tasks wait for it."""

    def __init__(self, source: Source, options: dict[str, Any]) -> None:
        self.n_waiting = 0
        self._is_unwanted = False
        self._progress = options.get("progress")
        self.future: Future[Model] = workers().submit(
            copy_context().run, lambda: Model(source, **{**options, "progress": self._goes_on})
        )

    def _goes_on(self, fraction: float) -> bool:
        wants_more = self._progress is None or self._progress(fraction) is not False
        return wants_more and not self._is_unwanted

    def give_up(self) -> None:
        """End it; a model that is loaded all the same is closed."""
        self._is_unwanted = True
        if not self.future.cancel():
            self.future.add_done_callback(_close_loaded)


def _close_loaded(done: Future[Model]) -> None:
    if done.exception() is None:
        done.result().close()


async def _whole(stream: AsyncTextStream[Any]) -> Completion:
    """Return the completion of a stream that nobody reads meanwhile, so that it need not wait for its reader."""
    generation = (await stream._made())._generation
    if isinstance(generation, Generation):
        generation.max_ahead = None
    async for _ in stream:
        pass
    return cast(Completion, stream.completion)


def _drop(stream: TextStream) -> None:
    """End a stream that has not begun and that nobody came for."""
    stream._generation.end()
