"""Text from a model: the calls that complete, stream and chat."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar, overload

import numpy as np
import numpy.typing as npt

from ._logits_processors import LogitsProcessor, LogitsProcessors
from ._template_check import check_template
from .adapter import LoraAdapter
from .chat import ChatPrompt, ChatRequest
from .context import Context
from .embedding import Embedder, EmbeddingInput, Embeddings, Pooling, RankedDocument, is_single
from .errors import GuestException, OutOfMemoryError, RequestError, UnsupportedModelError
from .generate import ChatStream, Generation, GenerationRequest, TextStream, checked_prompt, complete_all
from .lane import Lane, ModelJobs
from .loaded_model import LoadedModel
from .params import DEFAULT_MAX_TOKENS, ContextParams, SamplingParams
from .sampler import Sampler
from .scheduler import MAX_AHEAD, Scheduler
from .slots import LaneKey
from .source import Source
from .text import check_stops
from .types import ChatCompletion, Completion

__all__ = ["Model"]

C = TypeVar("C", bound=Completion)

Stop = str | Iterable[str] | None

MAX_PARALLEL = 64
"""Most sequences that ``generate_many`` computes together."""


class Model(LoadedModel):
    """A GGUF model, loaded into a sandbox of its own and mapped read-only: many models share one file's pages.

    All methods may be called from any thread. Calls take turns token by token, each with its own context. Close the
    model with ``close`` or ``with``; its contexts and samplers are closed with it.
    """

    def _prepare(self) -> None:
        self._embedder = Embedder(self)
        self._calls: set[Generation[Any]] = set()
        self._scheduler = Scheduler(self._open_lane, ModelJobs(self))

    def _open_lane(self, n_slots: int, n_ctx: int, key: LaneKey) -> Lane:
        try:
            return Lane(self, n_slots, n_ctx, key)
        except OutOfMemoryError:
            if not self._embedder.release():
                raise
            return Lane(self, n_slots, n_ctx, key)

    def context(
        self,
        params: ContextParams | None = None,
        *,
        samplers: Mapping[int, Sampler] | None = None,
        **changes: Any,
    ) -> Context:
        """Create a context: ``llama_init_from_model``; ``changes`` are fields of ``ContextParams``.

        ``samplers`` are chains for some of its sequences, as ``Context.set_sampler`` takes them.
        """
        try:
            params = replace(params or self.context_params, **changes)
        except TypeError as error:
            raise RequestError("create a context", f"unknown parameter: {error}") from error
        try:
            return Context(self, params, samplers)
        except OutOfMemoryError:
            # What finished calls have left for later ones may be in the way.
            if not any([self._scheduler.close_idle(), self._embedder.release()]):
                raise
            return Context(self, params, samplers)

    def load_lora(self, path: Source) -> LoraAdapter:
        """Load a LoRA adapter from a path, the bytes of a file or a binary file object: ``llama_adapter_lora_init``.

        Apply it with ``Context.set_loras``. Raises as ``LoraAdapter`` says.
        """
        return LoraAdapter(self, path)

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
        """Continue ``prompt`` and return the whole completion.

        ``prompt`` is text, in which special tokens such as ``<|im_start|>`` are understood, or tokens.
        ``max_tokens`` defaults to 128; ``None`` means until the model ends or the context is full. ``stop`` strings
        end the text and are not part of it. ``changes`` are fields of ``SamplingParams``: ``temperature=0``. Each of
        ``logits_processors`` is called as ``f(tokens, logits)`` before a token is chosen; see ``Sampler``.

        Calls from several threads are computed together, one batch per step. A prompt that begins as an earlier one
        did is computed from where they differ; ``usage.cached_tokens`` tells how much that saved. An encoder-decoder
        model reads the prompt with its encoder and answers it.

        ``deadline_s`` is how many seconds the call may take, all of it: then it raises ``DeadlineError``, and the model
        is usable as after ``cancel``. It defaults to that of the model's ``Limits``, if there is one.

        Raises ``ContextFullError`` when the prompt leaves no room, ``CancelledError`` after ``cancel``,
        ``UnsupportedModelError`` for a model that only computes embeddings or diffuses text.
        """
        with self._bounded(deadline_s):
            request = self._request(prompt, max_tokens, stop, sampling, changes, logits_processors)
            return self._finish(request, Completion)

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
        """Continue ``prompt`` and return an iterator over the text pieces; see ``generate``.

        The pieces joined are the text that ``generate`` returns: each is valid Unicode, and what may become a stop
        string is held back. The stream's ``completion`` is there at the end. ``deadline_s`` counts from this call on,
        whether somebody reads or not, until all is computed.
        """
        with self._bounded(deadline_s):
            request = self._request(prompt, max_tokens, stop, sampling, changes, logits_processors)
            return TextStream(Generation(self, request, Completion, max_ahead=MAX_AHEAD))

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
        """Continue many prompts and return their completions in the same order.

        Up to ``n_parallel`` (1 to 64) are computed together, token by token in one batch, which is much faster than
        one after the other; where one ends the next begins. Fewer run at a time when memory is short. ``sampling``
        is one set of parameters for all or one for each prompt. ``progress(n_done, n_prompts)`` is called now and
        then, in the calling thread. The rest is as in ``generate``.

        What is wrong with any prompt is raised before anything is computed; whatever is raised later, ``Ctrl-C`` and
        ``cancel`` included, ends all of them.
        """
        if isinstance(prompts, str):
            raise RequestError("generate", "prompts is one text and not a list of them")
        if isinstance(n_parallel, bool) or not isinstance(n_parallel, int) or not 1 <= n_parallel <= MAX_PARALLEL:
            raise RequestError("generate", f"n_parallel is {n_parallel!r} and not a count from 1 to {MAX_PARALLEL}")
        each = [sampling] * len(prompts) if sampling is None or isinstance(sampling, SamplingParams) else [*sampling]
        if len(each) != len(prompts):
            raise RequestError("generate", f"{len(each)} sampling parameters for {len(prompts)} prompts")
        processors = tuple(logits_processors)
        with self._bounded(deadline_s):
            requests = [
                self._request(prompt, max_tokens, stop, params, changes, processors)
                for prompt, params in zip(prompts, each, strict=True)
            ]
            return complete_all(self, requests, n_parallel, progress)

    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        stream: Literal[False] = False,
        max_tokens: int | None = None,
        stop: Stop = None,
        sampling: SamplingParams | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        logits_processors: Iterable[LogitsProcessor] = (),
        deadline_s: float | None = None,
        **changes: Any,
    ) -> ChatCompletion: ...

    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        stream: Literal[True],
        max_tokens: int | None = None,
        stop: Stop = None,
        sampling: SamplingParams | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        logits_processors: Iterable[LogitsProcessor] = (),
        deadline_s: float | None = None,
        **changes: Any,
    ) -> ChatStream: ...

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        stream: bool = False,
        max_tokens: int | None = None,
        stop: Stop = None,
        sampling: SamplingParams | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        logits_processors: Iterable[LogitsProcessor] = (),
        deadline_s: float | None = None,
        **changes: Any,
    ) -> ChatCompletion | ChatStream:
        """Answer a conversation, rendered with the model's own jinja template inside the sandbox.

        ``messages`` are dicts with ``role`` and ``content``. ``template_kwargs`` are further variables of the
        template. ``max_tokens`` defaults to no limit but the context; the rest is as in ``generate`` and ``stream``.
        """
        self._check_continues_text()
        with self._bounded(deadline_s):
            prompt = self._apply_template(ChatRequest(messages, template_kwargs=template_kwargs or {}))
            stops = (*check_stops(stop), *prompt.stops)
            if prompt.grammar and "grammar" not in changes:
                changes["grammar"] = prompt.grammar
            request = self._request(prompt.prompt, max_tokens, stops, sampling, changes, logits_processors)
            if stream:
                return ChatStream(Generation(self, request, ChatCompletion, max_ahead=MAX_AHEAD))
            return self._finish(request, ChatCompletion)

    @overload
    def embed(
        self,
        inputs: EmbeddingInput,
        *,
        pooling: Literal["none"],
        normalize: bool = True,
        truncate: bool = False,
        deadline_s: float | None = None,
    ) -> npt.NDArray[np.float32] | list[npt.NDArray[np.float32]]: ...

    @overload
    def embed(
        self,
        inputs: EmbeddingInput,
        *,
        pooling: Literal["mean", "cls", "last"] | None = None,
        normalize: bool = True,
        truncate: bool = False,
        deadline_s: float | None = None,
    ) -> npt.NDArray[np.float32]: ...

    def embed(
        self,
        inputs: EmbeddingInput,
        *,
        pooling: Pooling | None = None,
        normalize: bool = True,
        truncate: bool = False,
        deadline_s: float | None = None,
    ) -> npt.NDArray[np.float32] | list[npt.NDArray[np.float32]]:
        """Return the embedding of a text, ``(n_embd_out,)`` float32, or of several, ``(n, n_embd_out)``.

        A text may also be given as its tokens. ``pooling`` makes one vector of a text's tokens: ``mean``, the first
        (``cls``) or the ``last``; ``None`` takes the model's own way, and the mean where it has none. ``none`` gives
        every token's vector, ``(n_tokens, n_embd_out)`` for each text. Vectors have length 1 unless ``normalize`` is
        off. The order is kept; texts of similar length are computed together.

        Raises ``ContextFullError`` for a text longer than the model takes, unless ``truncate`` cuts it, and
        ``CancelledError`` after ``cancel`` or, as ``DeadlineError``, after ``deadline_s`` seconds.
        """
        with self._bounded(deadline_s):
            if pooling == "none":
                rows = self._embedder.embed_tokens(inputs, normalize, truncate)
                return rows[0] if is_single(inputs) else rows
            vectors: npt.NDArray[np.float32] = self._embedder.embed(inputs, pooling, normalize, truncate).vectors
        return vectors[0] if is_single(inputs) else vectors

    def embed_with_usage(
        self,
        inputs: EmbeddingInput,
        *,
        pooling: Literal["mean", "cls", "last"] | None = None,
        normalize: bool = True,
        truncate: bool = False,
        deadline_s: float | None = None,
    ) -> Embeddings:
        """Return what ``embed`` computes, always as of several texts, with the number of tokens of each."""
        with self._bounded(deadline_s):
            return self._embedder.embed(inputs, pooling, normalize, truncate)

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        top_n: int | None = None,
        truncate: bool = False,
        deadline_s: float | None = None,
    ) -> list[RankedDocument]:
        """Return ``documents`` from the best answer of ``query`` to the worst, or the ``top_n`` best.

        Needs a model with a classifier for this (pooling type ``rank``). Query and document are put together by the
        template that the model carries for it, else with its separator token, as llama.cpp's server does. Where there
        is a template, special tokens such as ``[SEP]`` are understood in the texts too.

        Raises ``UnsupportedModelError`` for other models, ``ContextFullError`` as ``embed`` does.
        """
        with self._bounded(deadline_s):
            return self._embedder.rerank(query, documents, top_n, truncate)

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
        """Return the prompt that the model's template, or ``template``, makes of a conversation."""
        request = ChatRequest(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            template=template,
            enable_thinking=enable_thinking,
            template_kwargs=template_kwargs or {},
        )
        with self._bounded(deadline_s):
            return self._apply_template(request).prompt

    def cancel(self) -> None:
        """End every call of this model that is running now, from any thread: they raise ``CancelledError``.

        The model stays usable, unless a sampler or a chat template does not come back within 0.1 s: these can only
        be stopped together with their sandbox.
        """
        self._embedder.cancel()
        for call in self._calls.copy():
            call.is_cancelled = True
        super().cancel()

    def _request(
        self,
        prompt: str | Sequence[int],
        max_tokens: int | None,
        stop: Stop,
        sampling: SamplingParams | None,
        changes: Mapping[str, Any],
        logits_processors: Iterable[LogitsProcessor],
    ) -> GenerationRequest:
        self._check_open("generate")
        self._check_continues_text()
        self.vocab._check_present("generate")
        if max_tokens is not None and (
            isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 0
        ):
            raise RequestError("generate", f"max_tokens is {max_tokens!r} and neither None nor a count")
        params = (sampling or SamplingParams()).replace(**changes)
        vocab = self.vocab
        if isinstance(prompt, str):
            tokens = vocab.tokenize(prompt, add_special=True, parse_special=True)
            # A template often writes the begin token that the tokenizer adds as well.
            if vocab.add_bos and len(tokens) > 1 and tokens[0] == tokens[1] == vocab.bos:
                del tokens[0]
        else:
            tokens = [vocab._check(token, "generate") for token in prompt]
        processors = tuple(logits_processors)
        LogitsProcessors(processors)  # complains about what is no function
        return GenerationRequest(checked_prompt(tokens, vocab.bos), max_tokens, params, check_stops(stop), processors)

    @property
    def _continues_text(self) -> bool:
        """Whether the model has a next token; llama.cpp counts encoders such as BERT as decoders."""
        return self.has_decoder and self._computes_logits and not self.is_diffusion

    def _check_continues_text(self) -> None:
        """Raise ``UnsupportedModelError`` for a model that has no next token: the guest would assert."""
        if not self._continues_text:
            hint = "" if self.is_diffusion else "it computes embeddings: use embed"
            raise UnsupportedModelError("generate", "the model does not continue text token by token", hint)

    def _finish(self, request: GenerationRequest, kind: type[C]) -> C:
        return Generation(self, request, kind).run()

    def _apply_template(self, request: ChatRequest) -> ChatPrompt:
        text = request.to_json()
        for template in (request.template or self.chat_template, self.metadata.get("tokenizer.chat_template.tool_use")):
            check_template(template or "")
        mark = self.guest_log.mark()

        def job() -> str:
            with self.native.array(text.encode() + b"\0") as ptr:
                answer = int(self.native.call("pw_chat_apply", self._ptr, ptr) or 0) & 0xFFFFFFFF
            return self.native.take_string(answer)

        try:
            return ChatPrompt.from_json(self._run_cancellable(job, "apply the chat template"))
        except GuestException as error:
            # The template raises on conversations it does not take: the request is at fault, not the sandbox. Of what
            # the parser raises llama.cpp passes on the base class alone; what it was is in the log.
            lines = self.guest_log.since(mark).lines if error.reason == "std::exception" else ()
            reason = lines[0].partition("error: ")[2] if lines else ""
            raise RequestError("apply the chat template", reason or error.reason) from error
