"""``Model`` with its sandbox in another process: the same calls, asked across a pipe."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from .._call_options import NO_OPTIONS
from .._choices import check_parallel
from .._fork_locks import renew_after_fork
from .._logits_processors import LogitsProcessor
from .._model_limits import bounded, merged_limits
from .._repacked import LoadOptions
from ..chat import ChatPrompt, ChatRequest
from ..chat_calls import Format
from ..chat_generation import ChatStream
from ..deadline import current_deadline
from ..embedding import EmbeddingInput, Embeddings, RankedDocument, is_single
from ..errors import CancelledError, RequestError
from ..generate import TextStream
from ..host import load_module
from ..limits import Limits
from ..loaded_model import Progress
from ..logs import one_line
from ..model import Load, Stop
from ..params import DEFAULT_MAX_TOKENS, ContextParams, ModelParams, SamplingParams
from ..sandbox_report import SandboxReport, made_report
from ..source import ModelSource, Source
from ..tools import Tool, ToolChoice
from ..types import ChatCompletion, Completion
from . import values
from .call import Call
from .chat import RemoteChat, asked_options
from .connection import Connection
from .launch import child_command
from .logs import levels
from .remote import RemoteCalls
from .results import prompt_from_wire
from .vocab import ProcessVocab
from .weights import loading
from .wire import Value, WireError

__all__ = ["ProcessModel"]

logger = logging.getLogger("pyllama_wasm.model")


class ProcessModel(RemoteCalls):
    """A model in a process of its own; made by ``Model(path, isolation="process")``.

    What needs the sandbox's memory or Python code of the program inside it raises ``RequestError``.
    """

    def __init__(self, path: Source, *, isolation: str | None = None, **options: Any) -> None:
        """Start the process and load ``path`` there; see ``Model``."""
        began = perf_counter()
        given = _Options(**options)
        self.params = given.params or ModelParams()
        self.context_params = given.context_params or ContextParams()
        self._is_closed = False
        self._close_lock = threading.Lock()
        renew_after_fork(self, _close_lock=threading.Lock)
        self._metadata: dict[str, str] | None = None
        self.limits, n_threads = merged_limits(given.limits, given.n_threads, given.memory_limit_bytes)
        self.load = given.load or ("snapshot" if self.limits.snapshot else "map")
        self.vocab = ProcessVocab(self)
        # Compiled here, if it is not yet: the process takes the code from the folder and can then write no file.
        self._module_digest = load_module(deterministic=self.params.deterministic).digest
        with bounded(self.limits, None):
            has_weights = not (self.params.vocab_only or self.params.no_alloc)
            source = ModelSource(path, self.limits.memory_bytes, snapshot=self.load == "snapshot" and has_weights)
            self.path, self._snapshots = source.path, source.snapshots
            try:
                self._start(source, given.progress, n_threads)
            finally:
                source.close()
        self.load_s = perf_counter() - began
        what = f": {one_line(self.description)}" if self.description else ""
        extra = {"model": self.path.name}
        logger.info("loaded in %.2f s in process %d%s", self.load_s, self._connection.pid, what, extra=extra)

    def _start(self, source: ModelSource, progress: Progress | None, n_threads: int) -> None:
        """Start the process and have it load ``source``, whose files it is given; end it when that fails."""
        self._connection = Connection(self.path.name, child_command(self.params.deterministic))
        self._end = weakref.finalize(self, self._connection.kill, "the model was collected")
        self._end.atexit = False  # the connection sees to that
        try:
            self._confinement = self._ready(source.operation)
            arguments = {
                "params": values.params_to_wire(self.params),
                "context_params": values.params_to_wire(self.context_params),
                "limits": values.params_to_wire(self.limits),
                "n_threads": n_threads,
                "load": "copy" if self.load == "copy" else "map",
                "tells_progress": progress is not None,
                "log_levels": levels(),
            }
            options = LoadOptions(self.params, self.context_params, self.limits, self.load, self._module_digest)
            with loading(source, options, self.params.use_extra_bufts) as load:
                given = {**arguments, **load.arguments}
                call = self._connection.start("load", given, source.operation, files=load.descriptors)
                facts = self._loaded(call, progress)
                with self._connection.checked(call):
                    values.facts_from_wire(facts, self, self.vocab)
                load.keep(self, source.operation)
        except BaseException:
            self.close()
            raise

    def _ready(self, operation: str) -> dict[str, str]:
        """Wait until the process runs; return how it is confined, said before it has seen anything of the model."""
        call = self._connection.start_call
        call.operation = operation
        self._connection.bound(call, current_deadline())
        answer = self._connection.result(call)
        with self._connection.checked(call):
            return {name: values.text(state) for name, state in values.mapping(answer).items()}

    def _loaded(self, call: Call, progress: Progress | None) -> Value:
        """Wait for the load and return what it says, telling ``progress`` meanwhile."""
        while True:
            kind, value = self._connection.next(call)
            if kind == "result":
                return value
            with self._connection.checked(call):
                if kind != "progress" or progress is None:
                    raise WireError("it sent an answer of another kind")
                fraction = values.number(value)
            if progress(min(max(fraction, 0.0), 1.0)) is False:
                raise CancelledError(call.operation, "it was cancelled")

    # -- calls --------------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = DEFAULT_MAX_TOKENS,
        stop: Stop = None,
        sampling: SamplingParams | None = None,
        logits_processors: Iterable[LogitsProcessor] = (),
        deadline_s: float | None = None,
        **changes: Any,
    ) -> Completion:
        """See ``Model.generate``."""
        with self._bounded(deadline_s):
            options, arguments = self._asked(sampling, changes)
            given = {"prompt": self._prompt(prompt), **arguments}
            arguments = self._generation(given, max_tokens, stop, logits_processors)
            expected = self._expected(Completion, max_tokens, options, [prompt])
            return cast(Completion, self._completed("generate", arguments, expected))

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = DEFAULT_MAX_TOKENS,
        stop: Stop = None,
        sampling: SamplingParams | None = None,
        logits_processors: Iterable[LogitsProcessor] = (),
        deadline_s: float | None = None,
        **changes: Any,
    ) -> TextStream:
        """See ``Model.stream``."""
        with self._bounded(deadline_s):
            options, arguments = self._asked(sampling, changes)
            given = {"prompt": self._prompt(prompt), **arguments}
            arguments = self._generation(given, max_tokens, stop, logits_processors)
            expected = self._expected(Completion, max_tokens, options, [prompt])
            return TextStream(self._streamed("stream", arguments, expected))

    def generate_many(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_tokens: int | None = DEFAULT_MAX_TOKENS,
        n_parallel: int = 8,
        stop: Stop = None,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        logits_processors: Iterable[LogitsProcessor] = (),
        progress: Callable[[int, int], object] | None = None,
        deadline_s: float | None = None,
        **changes: Any,
    ) -> list[Completion]:
        """See ``Model.generate_many``."""
        if isinstance(prompts, str):
            raise RequestError("generate", "prompts is one text and not a list of them")
        check_parallel(n_parallel)
        each = [sampling] if sampling is None or isinstance(sampling, SamplingParams) else [*sampling]
        with self._bounded(deadline_s):
            asked = [self._asked(params, changes) for params in each]
            given: dict[str, Value] = {
                "prompts": [self._prompt(prompt) for prompt in prompts],
                "n_parallel": n_parallel,
                "is_one_sampling": sampling is None or isinstance(sampling, SamplingParams),
                "samplings": [arguments["sampling"] for _, arguments in asked],
                "options": asked[0][1]["options"] if asked else None,
                "tells_progress": progress is not None,
            }
            arguments = self._generation(given, max_tokens, stop, logits_processors)
            options = asked[0][0] if asked else NO_OPTIONS
            read = self._expected(Completion, max_tokens, options, prompts).read
            call = self._begun("generate_many", arguments, "generate", n_items=len(prompts), read_item=read)
            return self._collected(call, len(prompts), progress)

    def chat(  # type: ignore[override]  # its overloads stand there
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        stream: bool = False,
        max_tokens: int | None = None,
        stop: Stop = None,
        sampling: SamplingParams | None = None,
        logits_processors: Iterable[LogitsProcessor] = (),
        deadline_s: float | None = None,
        **changes: Any,
    ) -> ChatCompletion | ChatStream:
        """See ``Model.chat``."""
        self._check_continues_text()
        asked, response = asked_options(changes)
        with self._bounded(deadline_s):
            options, arguments = self._asked(sampling, changes)
            given = {"messages": _checked(messages, asked.get("template_kwargs")), **asked, **arguments}
            arguments = self._generation(given, max_tokens, stop, logits_processors)
            expected = self._expected(ChatCompletion, max_tokens, options)
            reader = None if response is None else response.read
            if stream:
                call = self._streaming("chat_stream", arguments)
                # It has the methods that a stream calls.
                return ChatStream(cast(Any, RemoteChat(self, call, expected, reader)))
            answer: ChatCompletion = self._completed("chat", arguments, expected)
            return replace(answer, reader=reader)

    def chat_n(
        self,
        messages: Sequence[Mapping[str, Any]],
        n: int,
        *,
        n_parallel: int = 8,
        max_tokens: int | None = None,
        stop: Stop = None,
        sampling: SamplingParams | None = None,
        logits_processors: Iterable[LogitsProcessor] = (),
        deadline_s: float | None = None,
        **changes: Any,
    ) -> list[ChatCompletion]:
        """See ``Model.chat_n``."""
        asked, response = asked_options(changes)
        self._check_continues_text()
        reader = None if response is None else response.read
        with self._bounded(deadline_s):
            options, arguments = self._asked(sampling, changes)
            messages = _checked(messages, asked.get("template_kwargs"))
            given = {"messages": messages, "n": n, "n_parallel": n_parallel, **asked, **arguments}
            arguments = self._generation(given, max_tokens, stop, logits_processors)
            read = self._expected(ChatCompletion, max_tokens, options).read
            n_items = n if isinstance(n, int) else 0  # which the process then refuses, as it does a number out of range
            call = self._begun("chat_n", arguments, "generate", n_items=n_items, read_item=read)
            return [replace(answer, reader=reader) for answer in self._collected(call, n_items)]

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Tool] | None = None,
        tool_choice: ToolChoice | None = None,
        response_format: Format | None = None,
        template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        deadline_s: float | None = None,
    ) -> ChatPrompt:
        """See ``Model.chat_prompt``."""
        options = {"tools": tools, "tool_choice": tool_choice, "response_format": response_format}
        asked, _ = asked_options({**options, "template": template, "template_kwargs": template_kwargs})
        arguments = {"messages": _checked(messages, asked.get("template_kwargs")), **asked}
        with self._bounded(deadline_s):
            read = partial(prompt_from_wire, n_vocab=self.vocab.n_tokens)
            return self._ask("chat_prompt", arguments, "apply the chat template", read)

    def embed(  # type: ignore[override]  # its overloads stand there
        self,
        inputs: EmbeddingInput,
        *,
        pooling: str | None = None,
        normalize: bool = True,
        truncate: bool = False,
        deadline_s: float | None = None,
    ) -> npt.NDArray[np.float32] | list[npt.NDArray[np.float32]]:
        """See ``Model.embed``."""
        if pooling != "none":
            vectors = self._embedded(inputs, pooling, normalize, truncate, deadline_s).vectors
            return vectors[0] if is_single(inputs) else vectors
        with self._bounded(deadline_s):
            texts = self._texts(inputs)
            arguments = {"inputs": texts, "normalize": bool(normalize), "truncate": bool(truncate)}

            def read(value: Value) -> npt.NDArray[np.float32]:
                return values.array(value, None, self.n_embd_out)

            call = self._begun("embed_tokens", arguments, "embed", n_items=len(texts), read_item=read)
            rows = self._collected(call, len(texts))
        return rows[0] if is_single(inputs) else rows

    def embed_with_usage(
        self,
        inputs: EmbeddingInput,
        *,
        pooling: str | None = None,
        normalize: bool = True,
        truncate: bool = False,
        deadline_s: float | None = None,
    ) -> Embeddings:
        """See ``Model.embed_with_usage``."""
        return self._embedded(inputs, pooling, normalize, truncate, deadline_s)

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        top_n: int | None = None,
        truncate: bool = False,
        deadline_s: float | None = None,
    ) -> list[RankedDocument]:
        """See ``Model.rerank``."""
        if isinstance(documents, str) or not all(isinstance(document, str) for document in documents):
            raise RequestError("rerank", "the documents are not a list of texts")
        arguments = {"query": query, "documents": list(documents), "top_n": top_n, "truncate": bool(truncate)}

        def read(value: Value) -> list[RankedDocument]:
            if len(values.items(value)) > len(documents):
                raise WireError("it sent more than it was asked for")
            found = []
            for item in value:
                index, scores = values.items(item, 2)
                index = values.integer(index, 0, len(documents) - 1)
                numbers = tuple(float(score) for score in values.array(scores, None))
                found.append(RankedDocument(index, numbers[0] if numbers else 0.0, documents[index], numbers))
            return found

        with self._bounded(deadline_s):
            return self._ask("rerank", arguments, "rerank", read)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template: str | None = None,
        enable_thinking: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
        deadline_s: float | None = None,
    ) -> str:
        """See ``Model.apply_chat_template``."""
        arguments = {
            "messages": _checked(messages, template_kwargs),
            "tools": None if tools is None else list(tools),
            "add_generation_prompt": bool(add_generation_prompt),
            "template": template,
            "enable_thinking": bool(enable_thinking),
            "template_kwargs": dict(template_kwargs or {}),
        }
        with self._bounded(deadline_s):
            return self._ask("apply_chat_template", arguments, "apply the chat template", values.text)

    # -- the model ----------------------------------------------------------------------------------------------------

    @property
    def metadata(self) -> Mapping[str, str]:
        """See ``Model.metadata``."""
        if self._metadata is None:
            self._metadata = self._ask("metadata", {}, "read metadata", _table)
        return self._metadata

    def get_chat_template(self, name: str | None = None) -> str | None:
        """See ``Model.get_chat_template``."""
        if name is None:
            return self.chat_template

        def read(value: Value) -> str | None:
            return None if value is None else values.text(value)

        return self._ask("get_chat_template", {"name": name}, "read a chat template", read)

    def cancel(self) -> None:
        """See ``Model.cancel``; a process that does not end its calls within some seconds is killed."""
        if not self._is_closed:
            self._connection.cancel()

    def close(self) -> None:
        """Kill the process; its memory goes with it. Doing it twice is fine."""
        with self._close_lock:
            if self._is_closed:
                return
            self._is_closed = True
        if hasattr(self, "_connection"):
            self._end.detach()
            self._connection.close()
        self._snapshots = ()

    @property
    def is_dead(self) -> bool:
        """Whether its sandbox or its process has died: then load the model again."""
        return self._connection.is_dead or self._connection.has_dead_sandbox

    def sandbox_report(self) -> SandboxReport:
        """See ``Model.sandbox_report``; what the process alone knows is what it says."""
        if self._is_closed or self._connection.is_dead:
            limits = {name: getattr(self.limits, name) for name in ("memory_bytes", "threads")}
            state = "closed" if self._is_closed else "dead"
            found = {"state": state, "imports": (), "files": (), "memory_bytes": 0, "blas": False, "limits": limits}
        else:
            found = self._ask("sandbox_report", {}, "report on the sandbox", values.report_from_wire)
        return made_report(self.limits, self.load, found, isolation="process", confinement=dict(self._confinement))


class _Options:
    """The keyword arguments of ``Model``, which says what they mean."""

    def __init__(
        self,
        params: ModelParams | None = None,
        context_params: ContextParams | None = None,
        progress: Progress | None = None,
        n_threads: int | None = None,
        memory_limit_bytes: int | None = None,
        load: Load | None = None,
        limits: Limits | None = None,
    ) -> None:
        if load not in (None, "map", "copy", "snapshot"):
            raise RequestError("load a model", f"load={load!r} is none of 'map', 'copy' and 'snapshot'")
        self.params, self.context_params, self.progress = params, context_params, progress
        self.n_threads, self.memory_limit_bytes, self.load, self.limits = n_threads, memory_limit_bytes, load, limits


def _checked(messages: Sequence[Mapping[str, Any]], template_kwargs: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Return the messages as plain values; raises ``RequestError`` as a model in this process does."""
    ChatRequest(messages, template_kwargs=template_kwargs or {}).to_json()
    return [dict(message) for message in messages]


def _table(value: Value) -> dict[str, str]:
    return {values.text(key): values.text(item) for key, item in values.mapping(value).items()}
