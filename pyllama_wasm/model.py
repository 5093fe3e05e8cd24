"""Text from a model: the calls that complete, stream and chat."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar, overload

from .chat import ChatPrompt, ChatRequest
from .context import Context
from .errors import GuestException, RequestError, UnsupportedModelError
from .generate import ChatStream, Generation, GenerationRequest, TextStream, checked_prompt
from .loaded_model import LoadedModel
from .params import DEFAULT_MAX_TOKENS, ContextParams, SamplingParams
from .pool import ContextPool
from .text import check_stops
from .types import ChatCompletion, Completion

__all__ = ["Model"]

C = TypeVar("C", bound=Completion)

Stop = str | Iterable[str] | None


class Model(LoadedModel):
    """A GGUF model, loaded into a sandbox of its own and mapped read-only: many models share one file's pages.

    All methods may be called from any thread. Calls take turns token by token, each with its own context. Close the
    model with ``close`` or ``with``; its contexts and samplers are closed with it.
    """

    def _prepare(self) -> None:
        self._calls: set[Generation[Any]] = set()
        self._pool = ContextPool(self)

    def context(self, params: ContextParams | None = None, **changes: Any) -> Context:
        """Create a context: ``llama_init_from_model``; ``changes`` are fields of ``ContextParams``."""
        params = params or self.context_params
        try:
            return Context(self, replace(params, **changes))
        except TypeError as error:
            raise RequestError("create a context", f"unknown parameter: {error}") from error

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = DEFAULT_MAX_TOKENS,
        stop: Stop = None,
        sampling: SamplingParams | None = None,
        **changes: Any,
    ) -> Completion:
        """Continue ``prompt`` and return the whole completion.

        ``prompt`` is text, in which special tokens such as ``<|im_start|>`` are understood, or tokens.
        ``max_tokens`` defaults to 128; ``None`` means until the model ends or the context is full. ``stop`` strings
        end the text and are not part of it. ``changes`` are fields of ``SamplingParams``: ``temperature=0``.

        Raises ``ContextFullError`` when the prompt leaves no room, ``CancelledError`` after ``cancel``.
        """
        return self._finish(self._request(prompt, max_tokens, stop, sampling, changes), Completion)

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = DEFAULT_MAX_TOKENS,
        stop: Stop = None,
        sampling: SamplingParams | None = None,
        **changes: Any,
    ) -> TextStream:
        """Continue ``prompt`` and return an iterator over the text pieces; see ``generate``.

        The pieces joined are the text that ``generate`` returns: each is valid Unicode, and what may become a stop
        string is held back. The stream's ``completion`` is there at the end.
        """
        return TextStream(Generation(self, self._request(prompt, max_tokens, stop, sampling, changes), Completion))

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
        **changes: Any,
    ) -> ChatCompletion | ChatStream:
        """Answer a conversation, rendered with the model's own jinja template inside the sandbox.

        ``messages`` are dicts with ``role`` and ``content``. ``template_kwargs`` are further variables of the
        template. ``max_tokens`` defaults to no limit but the context; the rest is as in ``generate`` and ``stream``.
        """
        prompt = self._apply_template(ChatRequest(messages, template_kwargs=template_kwargs or {}))
        stops = (*check_stops(stop), *prompt.stops)
        if prompt.grammar and "grammar" not in changes:
            changes["grammar"] = prompt.grammar
        request = self._request(prompt.prompt, max_tokens, stops, sampling, changes)
        if stream:
            return ChatStream(Generation(self, request, ChatCompletion))
        return self._finish(request, ChatCompletion)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template: str | None = None,
        enable_thinking: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
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
        return self._apply_template(request).prompt

    def cancel(self) -> None:
        """End every call of this model that is running now, from any thread: they raise ``CancelledError``.

        The model stays usable, unless a sampler or a chat template does not come back within 0.1 s: these can only
        be stopped together with their sandbox.
        """
        for call in tuple(self._calls):
            call.is_cancelled = True
        super().cancel()

    def _request(
        self,
        prompt: str | Sequence[int],
        max_tokens: int | None,
        stop: Stop,
        sampling: SamplingParams | None,
        changes: Mapping[str, Any],
    ) -> GenerationRequest:
        self._check_open("generate")
        if self.has_encoder or not self.has_decoder:
            raise UnsupportedModelError("generate", "the model does not simply continue text", "it has an encoder")
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
        return GenerationRequest(checked_prompt(tokens, vocab.bos), max_tokens, params, check_stops(stop))

    def _finish(self, request: GenerationRequest, kind: type[C]) -> C:
        generation = Generation(self, request, kind)
        for _ in generation.pieces():
            pass
        return generation.completion()

    def _apply_template(self, request: ChatRequest) -> ChatPrompt:
        text = request.to_json()

        def job() -> str:
            with self.native.array(text.encode() + b"\0") as ptr:
                answer = int(self.native.call("pw_chat_apply", self._ptr, ptr) or 0) & 0xFFFFFFFF
            return self.native.take_string(answer)

        try:
            return ChatPrompt.from_json(self._run_cancellable(job, "apply the chat template"))
        except GuestException as error:
            # The template raises on conversations it does not take: the request is at fault, not the sandbox.
            raise RequestError("apply the chat template", error.reason) from error
