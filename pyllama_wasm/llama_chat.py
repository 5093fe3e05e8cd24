"""Chat answers as llama-cpp-python gives them, by ``Model.chat``."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, cast

from ._choices import check_choices, choice_params
from ._run_many import begin_streams, interleaved, n_together
from .chat_generation import ChatStream
from .errors import RequestError
from .llama_completion import max_tokens_of, seed_of, stops_of
from .llama_low_level import processors_of
from .llama_options import Options, includes_usage, listed, warn_meaningless
from .llama_response import (
    Heading,
    chat_logprobs,
    chunks_to_chat,
    completion_to_chat,
    timings_of,
    usage_of,
)
from .llama_types import ChatCompletionLogprobs, CreateChatCompletionResponse, CreateChatCompletionStreamResponse
from .text import check_stops
from .types import ChatCompletion

if TYPE_CHECKING:
    from .llama import Llama

__all__ = ["ChatRun", "complete_chat"]

_OF_CHATS = frozenset(
    {
        "messages", "functions", "function_call", "tools", "tool_choice", "response_format", "top_logprobs",
        "chat_template_kwargs", "parallel_tool_calls", "prefill", "reasoning_budget", "reasoning_format",
    }
)  # fmt: skip


class ChatRun:
    """One call of ``create_chat_completion``."""

    def __init__(self, llama: Llama, options: Options, template: str | None, stops: Sequence[str]) -> None:
        """Check ``options``, the call's keywords; ``template`` is rendered instead of the model's own."""
        warn_meaningless(options, stacklevel=5)
        self._llama, self._template = llama, template
        self.heading = Heading(options["model"] or llama.model_path)
        self._is_legacy = options["functions"] is not None
        self._n = check_choices(options.get("n", 1), "chat")
        self._includes_usage = includes_usage(options)
        self._messages = [_modern(message) for message in listed("messages", options["messages"])]
        self._arguments = self._arguments_of(options, stops)

    def _arguments_of(self, options: Options, stops: Sequence[str]) -> dict[str, Any]:
        """Return the keywords of ``Model.chat``; what is not asked for is left out."""
        llama = self._llama
        arguments = llama._call_arguments(
            max_tokens=max_tokens_of(options["max_tokens"]),
            stop=(*check_stops(stops_of(options["stop"])), *stops),
            sampling=llama._sampling_params(options, seed_of(llama, options["seed"])),
            logits_processors=processors_of(options["logits_processor"]),
        )
        tools, choice = options["tools"], options["tool_choice"]
        if options["functions"] is not None:
            tools = [
                {"type": "function", "function": function} for function in listed("functions", options["functions"])
            ]
        if options["function_call"] is not None:
            choice = _modern_choice(options["function_call"])
        optional = {
            "template": self._template,
            "tools": tools or None,
            "tool_choice": choice if tools else None,
            "response_format": options["response_format"],
            "logprobs": (options["top_logprobs"] or 0) if options["logprobs"] else None,
            "template_kwargs": options.get("chat_template_kwargs"),
            "reasoning": options.get("reasoning_format"),
            **{name: options.get(name) for name in ("parallel_tool_calls", "prefill", "reasoning_budget")},
        }
        return arguments | {name: value for name, value in optional.items() if value is not None}

    def whole(self) -> CreateChatCompletionResponse:
        """Compute all of it."""
        model = self._llama._model
        if self._n == 1:
            answers = [model.chat(self._messages, **self._arguments)]
        else:
            answers = model.chat_n(self._messages, self._n, **self._arguments)
        response = self.heading.chat([self._choice(answer) for answer in answers], usage_of(answers, model.vocab))
        response["timings"] = timings_of(answers, n_together(model))
        return response

    def _choice(self, answer: ChatCompletion) -> tuple[dict[str, Any], str | None, ChatCompletionLogprobs | None]:
        message: dict[str, Any] = {"role": "assistant", "content": None, **answer.message}
        reason: str = answer.finish_reason
        if self._is_legacy and message.get("tool_calls"):
            message["function_call"] = dict(message.pop("tool_calls")[0]["function"])
            reason = "function_call"
        return message, reason, chat_logprobs(answer.logprobs, self._llama._model.vocab)

    def chunks(self) -> Iterator[CreateChatCompletionStreamResponse]:
        """Compute it piece by piece; of each choice the last chunk is empty and tells why it ended."""
        model = self._llama._model
        each = choice_params(model, self._arguments["sampling"], self._n)
        with ExitStack() as stack:
            streams: list[ChatStream] = []
            for one in each:
                stream = model.chat(self._messages, stream=True, **{**self._arguments, "sampling": one})
                streams.append(stack.enter_context(stream))
            begin_streams(streams)
            yield from interleaved(streams, [self._chunks_of(i, stream) for i, stream in enumerate(streams)])
        if self._includes_usage:
            answers = [cast(ChatCompletion, stream.completion) for stream in streams]
            timings = timings_of(answers, n_together(model))
            yield self.heading.last_chat_chunk(usage_of(answers, model.vocab), timings)

    def _chunks_of(self, i: int, stream: ChatStream) -> Generator[CreateChatCompletionStreamResponse, None, None]:
        vocab = self._llama._model.vocab
        with stream:
            found = told = None
            for delta in stream.deltas():
                found, told = stream.logprobs, found
                logprobs = chat_logprobs(found if found is not told else None, vocab)
                if self._is_legacy and "tool_calls" in delta:
                    call = delta["tool_calls"][0]
                    if call["index"] == 0:
                        yield self.heading.chat_chunk({"function_call": call["function"]}, index=i)
                else:
                    yield self.heading.chat_chunk(dict(delta), None, logprobs, i)
        reason = cast(Any, stream.completion).finish_reason
        if self._is_legacy and reason == "tool_calls":
            reason = "function_call"
        yield self.heading.chat_chunk({}, reason, index=i)


def complete_chat(llama: Llama, options: Options, template: str | None, stops: Sequence[str]) -> Any:
    """Answer by a completion, where states and guesses take part; ``None`` where more is asked for than a text."""
    if any(options.get(name) is not None for name in ("reasoning_format", "reasoning_budget", "prefill")):
        return None
    if options["tools"] or options["functions"] or options["response_format"]:
        return None
    prompt = llama._model.chat_prompt(
        [_modern(message) for message in listed("messages", options["messages"])],
        template=template,
        template_kwargs=options.get("chat_template_kwargs"),
    )
    request = {name: value for name, value in options.items() if name not in _OF_CHATS}
    request |= {
        "prompt": prompt.prompt,
        "stop": [*check_stops(stops_of(options["stop"])), *stops, *prompt.stops],
        "logprobs": (options["top_logprobs"] or 0) if options["logprobs"] else None,
    }
    completion = llama.create_completion(**request)
    return chunks_to_chat(completion) if options["stream"] else completion_to_chat(completion)


def _modern(message: Any) -> Any:
    """Return a message with the deprecated function calls as tool calls, whose id is the function's name."""
    if not isinstance(message, Mapping):
        return message  # complained about with the others
    if message.get("role") == "function":
        return {"role": "tool", "tool_call_id": message.get("name"), **{k: message[k] for k in message if k != "role"}}
    call = message.get("function_call")
    if not isinstance(call, Mapping):
        return message
    rest = {key: value for key, value in message.items() if key != "function_call"}
    return {**rest, "tool_calls": [{"id": call.get("name"), "type": "function", "function": dict(call)}]}


def _modern_choice(function_call: Any) -> Any:
    if isinstance(function_call, str):
        return function_call
    if not isinstance(function_call, Mapping) or not isinstance(function_call.get("name"), str):
        raise RequestError("chat", f"function_call is {function_call!r:.80}", "none, auto, or {'name': ...}")
    return {"type": "function", "function": {"name": function_call["name"]}}
