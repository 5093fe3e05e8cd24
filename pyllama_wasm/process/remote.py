"""What the calls of a model in another process are made of, and what it refuses."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

import numpy as np

from .._call_options import CallOptions, split_options
from .._logits_processors import LogitsProcessor, LogitsProcessors
from ..adapter import LoraAdapter
from ..context import Context
from ..draft_model import DraftModel
from ..embedding import EmbeddingInput, Embeddings, _as_list
from ..errors import ClosedError, RequestError
from ..generate import Generation
from ..model import Model, Stop
from ..params import SamplingParams
from ..source import Source
from ..text import check_stops
from ..types import ChatCompletion, Completion
from . import values
from .call import Call
from .connection import Connection
from .held import RemoteAdapter, RemoteDraft
from .options import options_to_wire
from .results import Expected
from .stream import RemoteGeneration
from .vocab import PIECE_BYTES, ProcessVocab
from .wire import Value, WireError

__all__ = ["RemoteCalls"]

T = TypeVar("T")
C = TypeVar("C", bound=Completion)

_MOST_TOKENS = 1 << 16
"""More than any generation gives whose length nobody says, in a context whose size nobody says."""

_FORMAT_BYTES = 1 << 12  # that reading an answer may add to what the model has said

_HINT = 'load the model without isolation="process"'
_IN_THE_PROCESS = frozenset(
    {"engine", "native", "guest_log", "_ptr", "_vocab_ptr", "_scheduler", "_embedder", "_calls"}
)


class RemoteCalls(Model):
    """A ``Model`` without a sandbox in this process."""

    _connection: Connection
    _module_digest: str
    vocab: ProcessVocab

    # -- what there is not --------------------------------------------------------------------------------------------

    def context(self, *args: Any, **changes: Any) -> Context:
        """Raise ``RequestError``: a context is memory of the sandbox, and that is in another process."""
        return _refuse("create a context", "the sandbox is in another process")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Raise ``RequestError``: the process can write no file."""
        _refuse("save the model", "the model's process can write no file")

    if not TYPE_CHECKING:  # else every name would be one of Any

        def __getattr__(self, name: str) -> Any:
            """Refuse what only a model in this process has."""
            if name in _IN_THE_PROCESS:
                _refuse(f"use {name.strip('_')}", "the sandbox is in another process")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # -- what the process holds ---------------------------------------------------------------------------------------

    def load_lora(self, path: Source) -> LoraAdapter:
        """See ``Model.load_lora``; the adapter is for the calls of this model, ``loras={adapter: scale}``."""
        return RemoteAdapter(self, path)

    def load_draft(self, path: Source, *, n_draft: int = 8, p_min: float = 0.5) -> DraftModel:
        """See ``Model.load_draft``."""
        return RemoteDraft(self, path, n_draft, p_min)

    def _check_open(self, operation: str) -> None:
        super()._check_open(operation)
        if self._connection.is_closed:
            raise ClosedError(operation, "the model is closed (forked process)", "load it again")

    def _run(self, job: Callable[[], T], operation: str) -> T:
        self._check_open(operation)
        return _refuse(operation, "the sandbox is in another process")

    # -- inside -------------------------------------------------------------------------------------------------------

    def _begun(self, name: str, arguments: dict[str, Value], operation: str, **expected: Any) -> Call:
        """Ask for something; ``expected`` is as ``Connection.start`` takes it."""
        self._check_open(operation)
        with self._bounded(None):  # where nothing else holds, that of the limits
            return self._connection.start(name, arguments, operation, **expected)

    def _ask(self, name: str, arguments: dict[str, Value], operation: str, read: Callable[[Value], T]) -> T:
        call = self._begun(name, arguments, operation)
        value = self._connection.result(call)
        with self._connection.checked(call):
            return read(value)

    def _collected(self, call: Call, n: int, progress: Callable[[int, int], object] | None = None) -> list[Any]:
        """Wait for the ``n`` items of a call, in order; each was read when it came."""
        found: list[Any] = []
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
            if kind == "item":
                found.append(value)
                continue
            with self._connection.checked(call):
                if kind != "result" or len(found) != n:
                    raise WireError("it sent an answer of another kind")
            return found

    def _expected(
        self, kind: type[C], max_tokens: int | None, options: CallOptions, prompts: Iterable[str | Sequence[int]] = ()
    ) -> Expected:
        """Return the most that a call may give for each of ``prompts``."""
        echo_bytes = prompt_tokens = 0
        for prompt in prompts if options.echo else ():
            n_bytes, n_tokens = self._prompt_sizes(prompt)
            echo_bytes, prompt_tokens = max(echo_bytes, n_bytes), max(prompt_tokens, n_tokens)
        most = self.limits.output_bytes
        if most is not None:  # a byte that is part of no character is three bytes of text
            most = 3 * most + echo_bytes + (_FORMAT_BYTES if kind is ChatCompletion else 0)
        return Expected(
            kind,
            self.vocab.n_tokens,
            self.load_s,
            max_tokens=max(self.context_params.n_ctx, _MOST_TOKENS) if max_tokens is None else max_tokens,
            n_top=options.logprobs,
            is_scored=options.echo and options.logprobs is not None and not self.has_encoder,
            text_bytes=most,
            prompt_tokens=prompt_tokens,
        )

    def _prompt_sizes(self, prompt: str | Sequence[int]) -> tuple[int, int]:
        """Return how many bytes the text of a prompt has at most, and how many tokens."""
        if not isinstance(prompt, str):
            return len(prompt) * PIECE_BYTES, len(prompt)
        n_bytes = len(prompt.encode("utf-8", "surrogatepass"))
        return n_bytes, self.vocab.most_tokens(n_bytes)

    def _completed(self, name: str, arguments: dict[str, Value], expected: Expected) -> Any:
        return self._ask(name, arguments, "generate", expected.read)

    def _streamed(self, name: str, arguments: dict[str, Value], expected: Expected) -> Generation[Any]:
        """Have the process accept a stream; it computes when the first piece is asked for."""
        # It has the methods that a stream calls.
        return cast("Generation[Any]", RemoteGeneration(self, self._streaming(name, arguments), expected))

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

    def _asked(
        self, sampling: SamplingParams | None, changes: Mapping[str, Any]
    ) -> tuple[CallOptions, dict[str, Value]]:
        """Return the checked options of a call, and them and its parameters as plain values."""
        self._check_open("generate")
        self._check_continues_text()
        options, params = split_options(self, sampling, changes)
        return options, {"sampling": values.params_to_wire(params), "options": options_to_wire(options)}


def _refuse(operation: str, reason: str) -> NoReturn:
    raise RequestError(operation, reason, _HINT)
