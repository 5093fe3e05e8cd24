"""The calls of a model that answer conversations: with tools, with reasoning, and in a format that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast, overload

from ._choices import check_parallel
from ._logits_processors import LogitsProcessor
from ._run_many import run_all
from ._template_check import check_template
from .chat import ChatPrompt, ChatRequest
from .chat_generation import ChatGeneration, ChatStream, GuestChat
from .errors import GuestException, RequestError, UnsupportedModelError
from .generate import GenerationRequest
from .loaded_model import LoadedModel
from .params import SamplingParams
from .scheduler import MAX_AHEAD
from .structured import ResponseFormat
from .text import check_stops
from .tool_loop import ToolRun, run_tools
from .tools import Tool, ToolChoice, choose_tools
from .types import ChatCompletion

if TYPE_CHECKING:
    from .model import Model

__all__ = ["ChatCalls"]

Stop = str | Iterable[str] | None
Reasoning = Literal["auto", "none", "deepseek"]
Format = Mapping[str, Any] | type

_APPLY = "apply the chat template"

_OF_THE_REQUEST = ("template", "template_kwargs", "parallel_tool_calls", "reasoning", "prefill")


@dataclass(frozen=True)
class _Asked:
    """The options of ``chat`` that are about the conversation."""

    tools: list[dict[str, Any]] | None
    tool_choice: str | None
    response: ResponseFormat | None
    reasoning_budget: int | None
    reasoning_budget_message: str
    more: dict[str, Any]

    @classmethod
    def split(cls, options: Mapping[str, Any]) -> tuple[_Asked, dict[str, Any]]:
        """Return them, and what is left of the options."""
        left = dict(options)
        response_format = left.pop("response_format", None)
        tools, choice = choose_tools(left.pop("tools", None), left.pop("tool_choice", None))
        asked = cls(
            tools=tools,
            tool_choice=choice,
            response=None if response_format is None else ResponseFormat.of(response_format),
            reasoning_budget=_checked_budget(left.pop("reasoning_budget", None)),
            reasoning_budget_message=left.pop("reasoning_budget_message", ""),
            more={name: left.pop(name) for name in _OF_THE_REQUEST if name in left},
        )
        return asked, left

    def request(self, messages: Sequence[Mapping[str, Any]]) -> ChatRequest:
        """Return what the template is rendered with."""
        schema = None if self.response is None else self.response.schema
        more = {name: value for name, value in self.more.items() if value is not None}
        return ChatRequest(messages, tools=self.tools, tool_choice=self.tool_choice, json_schema=schema, **more)

    def has_grammar(self, sampling: SamplingParams | None, changes: Mapping[str, Any]) -> bool:
        """Whether the caller gives a grammar; refuse one beside a budget, which is kept by what would replace it."""
        found = bool(changes.get("grammar", "" if sampling is None else sampling.grammar))
        if found and self.reasoning_budget is not None:
            raise RequestError("chat", "reasoning_budget does not go with a grammar of your own")
        return found


class ChatCalls(LoadedModel):
    """What a ``Model`` does with conversations."""

    if TYPE_CHECKING:  # of Model
        _request: Callable[..., GenerationRequest]
        _check_continues_text: Callable[[], None]
        _choice_sampling: Callable[..., list[SamplingParams]]

    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        stream: Literal[False] = False,
        max_tokens: int | None = None,
        stop: Stop = None,
        sampling: SamplingParams | None = None,
        template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Tool] | None = None,
        tool_choice: ToolChoice | None = None,
        parallel_tool_calls: bool | None = None,
        response_format: Format | None = None,
        reasoning: Reasoning = "auto",
        reasoning_budget: int | None = None,
        reasoning_budget_message: str = "",
        prefill: str | None = None,
        logits_processors: Iterable[LogitsProcessor] = (),
        deadline_s: float | None = None,
        **options: Any,
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
        template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Tool] | None = None,
        tool_choice: ToolChoice | None = None,
        parallel_tool_calls: bool | None = None,
        response_format: Format | None = None,
        reasoning: Reasoning = "auto",
        reasoning_budget: int | None = None,
        reasoning_budget_message: str = "",
        prefill: str | None = None,
        logits_processors: Iterable[LogitsProcessor] = (),
        deadline_s: float | None = None,
        **options: Any,
    ) -> ChatStream: ...

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        stream: bool = False,
        max_tokens: int | None = None,
        stop: Stop = None,
        sampling: SamplingParams | None = None,
        logits_processors: Iterable[LogitsProcessor] = (),
        deadline_s: float | None = None,
        **options: Any,
    ) -> ChatCompletion | ChatStream:
        """Answer a conversation, rendered with the model's own jinja template inside the sandbox.

        ``messages`` are dicts with ``role`` and ``content``. ``template`` is used in place of the model's own, and
        ``template_kwargs`` are further variables of it. ``max_tokens`` defaults to no limit but the context; the rest
        is as in ``generate`` and ``stream``.

        ``tools`` are functions, or OpenAI's descriptions of them, that the model may ask to be called; the calls are
        in the completion's ``tool_calls``, and ``run_tools`` makes them. ``tool_choice`` is ``"auto"``, ``"none"``,
        ``"required"``, the name of one of them, or OpenAI's way to say it. ``parallel_tool_calls`` allows several calls
        in one answer; the default is what the template can.

        ``response_format`` is OpenAI's: ``{"type": "json_object"}``, or ``{"type": "json_schema", "json_schema":
        {"schema": ...}}``; or a pydantic model, a dataclass or another type, of which ``completion.parsed`` is then
        one. What of a schema cannot be guaranteed is refused, not ignored.

        ``reasoning="none"`` leaves reasoning in the content; else it is in ``completion.reasoning_content``. It is
        ended after ``reasoning_budget`` tokens, with ``reasoning_budget_message``. ``prefill`` is how the answer
        begins; the completion is what follows.

        Raises ``RequestError`` for what does not fit, ``UnsupportedModelError`` for a template that takes no tools,
        and ``AnswerError`` for an answer that is not in the format of the template.
        """
        asked, changes = _Asked.split(options)
        self._check_continues_text()
        with self._bounded(deadline_s):
            limits = (max_tokens, stop, logits_processors)
            generation = self._answer(messages, asked, limits, sampling, changes, MAX_AHEAD if stream else None)
            return ChatStream(generation) if stream else generation.run()

    def _answer(
        self,
        messages: Sequence[Mapping[str, Any]],
        asked: _Asked,
        limits: tuple[int | None, Stop, Iterable[LogitsProcessor]],
        sampling: SamplingParams | None,
        changes: Mapping[str, Any],
        max_ahead: int | None = None,
    ) -> ChatGeneration:
        """Return an answer that has not begun; ``limits`` are ``max_tokens``, ``stop`` and ``logits_processors``."""
        max_tokens, stop, logits_processors = limits
        chat = self._open_chat(asked.request(messages), asked.has_grammar(sampling, changes))
        stops = (*check_stops(stop), *chat.prompt.stops)
        return ChatGeneration(
            cast("Model", self),
            self._request(chat.prompt.prompt, max_tokens, stops, sampling, changes, logits_processors),
            chat,
            max_ahead=max_ahead,
            reader=None if asked.response is None else asked.response.read,
            budget=asked.reasoning_budget,
            budget_message=asked.reasoning_budget_message,
            one_call=asked.more.get("parallel_tool_calls") is False,
        )

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
        **options: Any,
    ) -> list[ChatCompletion]:
        """Return ``n`` answers to one conversation, 1 to 1024, with seeds as ``generate_n`` has them.

        Up to ``n_parallel`` (1 to 64) are computed together, and the conversation once for these. ``options`` are those
        of ``chat``; raises as it does.
        """
        check_parallel(n_parallel)
        with self._bounded(deadline_s):
            limits = (max_tokens, stop, logits_processors)
            answers = self._answers(messages, n, limits, sampling, **options)
            return run_all(cast("Model", self), answers, n_parallel)

    def _answers(
        self,
        messages: Sequence[Mapping[str, Any]],
        n: int,
        limits: tuple[int | None, Stop, Iterable[LogitsProcessor]] = (None, None, ()),
        sampling: SamplingParams | None = None,
        **options: Any,
    ) -> list[ChatGeneration]:
        """Return the answers of ``chat_n``, which have not begun."""
        asked, changes = _Asked.split(options)
        self._check_continues_text()
        each = self._choice_sampling(n, sampling, changes)
        max_tokens, stop, logits_processors = limits
        limits = (max_tokens, check_stops(stop), tuple(logits_processors))  # each would take what an iterator gives
        return [self._answer(messages, asked, limits, params, changes) for params in each]

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
        """Return the prompt that the template makes, with the grammar and the stop strings of the answer.

        This is for who generates the answer by other means than ``chat``; raises as it does.
        """
        options = {"tools": tools, "tool_choice": tool_choice, "response_format": response_format}
        asked, _ = _Asked.split({**options, "template": template, "template_kwargs": template_kwargs})
        with self._bounded(deadline_s):
            return self._open_chat(asked.request(messages)).prompt

    def run_tools(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Tool],
        *,
        max_rounds: int = 8,
        on_call: Callable[[str, Mapping[str, Any]], object] | None = None,
        **options: Any,
    ) -> ToolRun:
        """Answer a conversation, calling the functions among ``tools`` as the model asks for it, until it asks no more.

        A round is an answer with calls, which are made one after the other; their results, or what went wrong with
        them, go back to the model as messages. ``on_call(name, arguments)`` is told before each; what it raises ends
        the run. After ``max_rounds`` the model has to answer without tools. ``options`` are as in ``chat``.
        """
        return run_tools(self.chat, messages, tools, max_rounds, on_call, options)

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
            return self._make_chat(request).prompt.prompt

    def _open_chat(self, request: ChatRequest, has_grammar: bool = False) -> GuestChat:
        """Render the template; refuse what it cannot do of what was asked for."""
        wants_tools = bool(request.tools) and request.tool_choice != "none"
        wants_format = request.json_schema is not None
        if wants_tools + wants_format + has_grammar > 1:
            reason = "tools, response_format and grammar each say what the answer is"
            raise RequestError("chat", reason, 'give one of them, or tool_choice="none"')
        chat = self._make_chat(request)
        if wants_tools and not chat.prompt.takes_tools:
            hint = "give template=pyllama_wasm.TOOLS_TEMPLATE, or a template that the model was trained with"
            raise UnsupportedModelError("chat", "the model's chat template takes no tools, or not in this way", hint)
        if wants_format and (not chat.prompt.grammar or chat.prompt.grammar_lazy):
            raise UnsupportedModelError("chat", "the model's chat template has no answers of a given format")
        return chat

    def _make_chat(self, request: ChatRequest) -> GuestChat:
        text = request.to_json()
        for template in (request.template or self.chat_template, self.metadata.get("tokenizer.chat_template.tool_use")):
            check_template(template or "")
        mark = self.guest_log.mark()
        try:
            return self._run_cancellable(lambda: GuestChat(cast("Model", self), text), _APPLY)
        except GuestException as error:
            # The template raises on conversations it does not take: the request is at fault, not the sandbox. Of what
            # the parser raises llama.cpp passes on the base class alone; what it was is in the log.
            lines = self.guest_log.since(mark).lines if error.reason == "std::exception" else ()
            reason = lines[0].partition("error: ")[2] if lines else ""
            raise RequestError(_APPLY, reason or error.reason) from error


def _checked_budget(budget: int | None) -> int | None:
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or not 0 <= budget < 1 << 31):
        raise RequestError("chat", f"reasoning_budget is {budget!r} and neither None nor a count of tokens")
    return budget
