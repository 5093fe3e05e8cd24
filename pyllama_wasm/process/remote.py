"""What the calls of a model in another process are made of, and what it refuses."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

import numpy as np

from .._logits_processors import LogitsProcessor, LogitsProcessors
from ..adapter import LoraAdapter
from ..chat import ChatPrompt
from ..context import Context
from ..draft_model import DraftModel
from ..embedding import EmbeddingInput, Embeddings, _as_list
from ..errors import ClosedError, RequestError
from ..generate import Generation
from ..model import Model, Stop
from ..params import SamplingParams
from ..source import Source
from ..text import check_stops
from ..types import Completion
from . import values
from .connection import Call, Connection
from .stream import RemoteGeneration
from .vocab import ProcessVocab
from .wire import Value, WireError

__all__ = ["RemoteCalls"]

T = TypeVar("T")
C = TypeVar("C", bound=Completion)

_HINT = 'load the model without isolation="process"'
_IN_THE_PROCESS = frozenset(
    {"engine", "native", "guest_log", "_ptr", "_vocab_ptr", "_scheduler", "_embedder", "_calls"}
)


class RemoteCalls(Model):
    """A ``Model`` without a sandbox in this process."""

    _connection: Connection
    vocab: ProcessVocab

    # -- what there is not --------------------------------------------------------------------------------------------

    def context(self, *args: Any, **changes: Any) -> Context:
        """Raise ``RequestError``: a context is memory of the sandbox, and that is in another process."""
        return _refuse("create a context", "the sandbox is in another process")

    def load_lora(self, path: Source) -> LoraAdapter:
        """Raise ``RequestError``: an adapter is for a context, and there are none."""
        return _refuse("load a LoRA adapter", "the sandbox is in another process")

    def load_draft(self, path: Source, *, n_draft: int = 8, p_min: float = 0.5) -> DraftModel:
        """Raise ``RequestError``: what is computed with it is in another process."""
        return _refuse("load a draft model", "the sandbox is in another process")

    def chat_prompt(self, *args: Any, **options: Any) -> ChatPrompt:
        """Raise ``RequestError``: it is for who generates in the sandbox, and that is in another process."""
        return _refuse("make a prompt", "the sandbox is in another process")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Raise ``RequestError``: the process can write no file."""
        _refuse("save the model", "the model's process can write no file")

    if not TYPE_CHECKING:  # else every name would be one of Any

        def __getattr__(self, name: str) -> Any:
            """Refuse what only a model in this process has."""
            if name in _IN_THE_PROCESS:
                _refuse(f"use {name.strip('_')}", "the sandbox is in another process")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _check_open(self, operation: str) -> None:
        super()._check_open(operation)
        if self._connection.is_closed:
            raise ClosedError(operation, "the model is closed (forked process)", "load it again")

    def _run(self, job: Callable[[], T], operation: str) -> T:
        self._check_open(operation)
        return _refuse(operation, "the sandbox is in another process")

    # -- inside -------------------------------------------------------------------------------------------------------

    def _begun(
        self, name: str, arguments: dict[str, Value], operation: str, n_items: int = 0, is_stream: bool = False
    ) -> Call:
        self._check_open(operation)
        return self._connection.start(name, arguments, operation, n_items, is_stream)

    def _ask(self, name: str, arguments: dict[str, Value], operation: str, read: Callable[[Value], T]) -> T:
        call = self._begun(name, arguments, operation)
        value = self._connection.result(call)
        with self._connection.checked(call):
            return read(value)

    def _collected(self, call: Call, n: int, progress: Callable[[int, int], object] | None = None) -> list[Value]:
        """Wait for the ``n`` items of a call, in order."""
        found: list[Value] = []
        while True:
            kind, value = self._connection.next(call)
            if kind == "progress" and progress is not None:
                with self._connection.checked(call):
                    done, total = (values.integer(count, 0, n) for count in values.items(value, 2))
                try:
                    progress(done, total)
                except BaseException:
                    self._connection.end(call)
                    raise
                continue
            with self._connection.checked(call):
                if kind == "item":
                    found.append(value)
                elif kind != "result" or len(found) != n:
                    raise WireError("it sent an answer of another kind")
                else:
                    return found

    def _completion(self, value: Value, kind: type[C], max_tokens: int | None) -> C:
        completion = values.completion_from_wire(value, kind, self.vocab.n_tokens, self.load_s)
        if max_tokens is not None and len(completion.tokens) > max_tokens:
            raise WireError("it sent more tokens than were asked for")
        return cast(C, completion)

    def _completed(self, name: str, arguments: dict[str, Value], kind: type[C], max_tokens: int | None) -> C:
        return self._ask(name, arguments, "generate", lambda value: self._completion(value, kind, max_tokens))

    def _streamed(
        self, name: str, arguments: dict[str, Value], kind: type[Completion], max_tokens: int | None
    ) -> Generation[Any]:
        """Have the process accept a stream; it computes when the first piece is asked for."""
        # It has the methods that a stream calls.
        return cast("Generation[Any]", RemoteGeneration(self, self._streaming(name, arguments), kind, max_tokens))

    def _streaming(self, name: str, arguments: dict[str, Value]) -> Call:
        call = self._begun(name, arguments, "generate", is_stream=True)
        answer, _ = self._connection.next(call)
        with self._connection.checked(call):
            if answer != "made":
                raise WireError("it sent an answer of another kind")
        return call

    def _embedded(
        self, inputs: EmbeddingInput, pooling: str | None, normalize: bool, truncate: bool, deadline_s: float | None
    ) -> Embeddings:
        with self._bounded(deadline_s):
            texts = self._texts(inputs)
            arguments = {
                "inputs": texts,
                "pooling": pooling,
                "normalize": bool(normalize),
                "truncate": bool(truncate),
            }

            def read(value: Value) -> Embeddings:
                vectors, counts = values.items(value, 2)
                n_tokens = tuple(values.integer(n) for n in values.items(counts, len(texts)))
                return Embeddings(values.array(vectors, len(texts), self.n_embd_out), n_tokens)

            return self._ask("embed", arguments, "embed", read)

    def _texts(self, inputs: EmbeddingInput) -> list[Value]:
        """Return texts as they are and tokens as arrays."""
        return [item if isinstance(item, str) else self._ids(list(item), "embed") for item in _as_list(inputs)]

    def _prompt(self, prompt: str | Sequence[int]) -> Value:
        return prompt if isinstance(prompt, str) else self._ids(prompt, "generate")

    def _ids(self, ids: Iterable[int], operation: str) -> Value:
        return np.asarray([self.vocab._check(token, operation) for token in ids], np.int32)

    def _generation(
        self,
        given: dict[str, Value],
        max_tokens: int | None,
        stop: Stop,
        logits_processors: Iterable[LogitsProcessor],
    ) -> dict[str, Value]:
        processors = tuple(logits_processors)
        LogitsProcessors(processors)  # complains about what is no function
        if processors:
            _refuse("generate", "a logits processor cannot be called from the model's process")
        return {**given, "max_tokens": max_tokens, "stop": list(check_stops(stop))}

    def _sampling(self, sampling: SamplingParams | None, changes: Mapping[str, Any]) -> dict[str, Value]:
        """Return the parameters, and the changes apart: a chat's own grammar is only used where none is given."""
        changed = values.params_to_wire((sampling or SamplingParams()).replace(**changes))
        own = None if sampling is None else values.params_to_wire(sampling)
        return {"sampling": own, "changes": {name: changed[name] for name in changes}}


def _refuse(operation: str, reason: str) -> NoReturn:
    raise RequestError(operation, reason, _HINT)
