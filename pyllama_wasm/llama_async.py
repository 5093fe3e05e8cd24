"""``Llama`` for programs with an event loop: its calls, to be awaited."""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from ._async_bridge import in_thread, workers
from ._async_many import called
from ._cancel_scope import CancelScope
from .errors import ClosedError, RequestError
from .llama import Llama
from .llama_processors import StoppingCriteriaList

__all__ = ["AsyncChunks", "AsyncLlama"]

_END = object()


class AsyncChunks(AsyncIterator[Any]):
    """The chunks of an answer, for ``async for``; an async context manager too. Leaving it unfinished is fine."""

    def __init__(self, chunks: Iterator[Any], scope: CancelScope) -> None:
        """Wrap the chunks of a call that belongs to ``scope``."""
        self._chunks, self._scope = chunks, scope
        self._is_ended = False
        self._lock = threading.Lock()  # held by the thread that computes the next one, or ends it

    def __aiter__(self) -> AsyncChunks:
        """Return the object itself."""
        return self

    async def __anext__(self) -> Any:
        """Return the next chunk."""
        if self._is_ended:
            raise StopAsyncIteration
        try:
            chunk = await called(self._next, self._scope)
        except GeneratorExit:  # the task is collected: no lock may be taken
            self._is_ended = True
            raise
        except BaseException:
            self._is_ended = True
            workers().submit(self._close)  # behind the thread that is at it
            raise
        if chunk is _END:
            self._is_ended = True
            raise StopAsyncIteration
        return chunk

    async def close(self) -> None:
        """End the answer and wait for what is still computed of it. Doing it twice is fine."""
        self._is_ended = True
        await in_thread(self._close)

    def _next(self) -> Any:
        with self._lock:
            return next(self._chunks, _END)

    def _close(self) -> None:
        with self._lock:
            close = getattr(self._chunks, "close", None)
            if close is not None:
                close()

    async def __aenter__(self) -> AsyncChunks:
        """Return the object itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the answer."""
        await self.close()


class AsyncLlama:
    """A ``Llama`` whose calls are awaited; names, arguments and what is returned are those of ``Llama``.

    ::

        async with pw.AsyncLlama(model_path="model.gguf", n_ctx=2048) as llama:
            answer = await llama.create_chat_completion(messages)
            async for chunk in await llama.create_completion("Once", stream=True):
                ...

    What many tasks ask for at a time is computed together, sixteen calls at a time, in threads of the package's own. A
    task that is cancelled ends its request, and no other. See ``AsyncModel`` for a model without llama-cpp-python's
    shapes, and without these threads.
    """

    def __init__(self, model_path: str | os.PathLike[str] | Llama, **options: Any) -> None:
        """Stand for ``Llama(model_path, **options)``, loaded by ``async with``, ``load`` or the first call.

        Or for a ``Llama`` that is there already, which is not closed with it.
        """
        if isinstance(model_path, Llama) and options:
            raise RequestError("load a model", f"it is loaded already, {next(iter(options))} would have no effect")
        self._llama = model_path if isinstance(model_path, Llama) else None
        self._is_own, self._is_closed = self._llama is None, False
        self._lock = threading.Lock()
        self._model_path, self._options = model_path, options

    async def load(self) -> Llama:
        """Return the ``Llama``, loaded if it is not; raises as ``Llama`` does."""
        if self._llama is not None and not self._is_closed:
            return self._llama
        return await in_thread(self._load)

    def _load(self) -> Llama:
        with self._lock:  # those who come meanwhile wait for the same load, each in a thread of ours
            if self._is_closed:
                raise ClosedError("load a model", "the model is closed", "make a new one")
            if self._llama is None:
                self._llama = Llama(self._model_path, **self._options)  # type: ignore[arg-type]
            return self._llama

    async def create_completion(self, *args: Any, **options: Any) -> Any:
        """Await ``Llama.create_completion``; with ``stream=True`` the result is an ``AsyncChunks``."""
        return await self._call("create_completion", args, options)

    __call__ = create_completion

    async def create_chat_completion(self, *args: Any, **options: Any) -> Any:
        """Await ``Llama.create_chat_completion``; with ``stream=True`` the result is an ``AsyncChunks``."""
        return await self._call("create_chat_completion", args, options)

    async def create_chat_completion_openai_v1(self, *args: Any, **options: Any) -> Any:
        """Await ``Llama.create_chat_completion_openai_v1``; with ``stream=True`` the result is an ``AsyncChunks``."""
        return await self._call("create_chat_completion_openai_v1", args, options)

    async def create_embedding(self, *args: Any, **options: Any) -> Any:
        """Await ``Llama.create_embedding``."""
        return await self._call("create_embedding", args, options)

    async def embed(self, *args: Any, **options: Any) -> Any:
        """Await ``Llama.embed``."""
        return await self._call("embed", args, options)

    async def tokenize(self, text: bytes | str, add_bos: bool = True, special: bool = False) -> list[int]:
        """Await ``Llama.tokenize``."""
        tokens: list[int] = await self._call("tokenize", (text, add_bos, special), {})
        return tokens

    async def detokenize(self, tokens: Sequence[int], special: bool = False) -> bytes:
        """Await ``Llama.detokenize``."""
        text: bytes = await self._call("detokenize", (tokens,), {"special": special})
        return text

    async def rerank(self, *args: Any, **options: Any) -> Any:
        """Await ``Llama.rerank``."""
        return await self._call("rerank", args, options)

    async def infill(self, *args: Any, **options: Any) -> Any:
        """Await ``Llama.infill``; with ``stream=True`` the result is an ``AsyncChunks``."""
        return await self._call("infill", args, options)

    async def score(self, prompt: str | Sequence[int]) -> list[float | None]:
        """Await ``Llama.score``."""
        scores: list[float | None] = await self._call("score", (prompt,), {})
        return scores

    async def count_tokens(self, prompt: str | Sequence[Any]) -> int:
        """Await ``Llama.count_tokens``."""
        n: int = await self._call("count_tokens", (prompt,), {})
        return n

    async def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """Await ``Llama.apply_chat_template``."""
        prompt: str = await self._call("apply_chat_template", (messages,), options)
        return prompt

    async def close(self) -> None:
        """End running calls and close the model, unless it was given as a ``Llama``. Doing it twice is fine."""
        self._is_closed = True
        await in_thread(self._close)

    def _close(self) -> None:
        with self._lock:  # behind a load that goes on
            llama = self._llama
        if self._is_own and llama is not None:
            llama.close()

    async def __aenter__(self) -> AsyncLlama:
        """Load the model and return this object."""
        await self.load()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the model."""
        await self.close()

    async def _call(self, name: str, args: Sequence[Any], options: dict[str, Any]) -> Any:
        """Make a call in a thread, which ends when the task is cancelled."""
        llama, scope = await self.load(), CancelScope()
        criteria = options.get("stopping_criteria")
        is_stepwise = llama.cache is not None or llama.draft_model is not None or criteria is not None
        if name in ("create_completion", "infill") and is_stepwise:  # then it is ended by a criterion
            ends = StoppingCriteriaList([*(criteria or ()), lambda *_: scope.is_cancelled])
            options = {**options, "stopping_criteria": ends}
        answer = await called(lambda: getattr(llama, name)(*args, **options), scope)
        if isinstance(answer, Iterator) and not isinstance(answer, Mapping):
            return AsyncChunks(answer, scope)
        return answer
