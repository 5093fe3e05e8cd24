"""Chat answers as llama-cpp-python gives them, by ``Model.chat``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from .errors import RequestError
from .llama_completion import max_tokens_of, seed_of, stops_of
from .llama_low_level import processors_of
from .llama_options import Options, listed, warn_meaningless
from .llama_response import Heading, chat_logprobs, chunks_to_chat, completion_to_chat, usage_of
from .llama_types import CreateChatCompletionResponse, CreateChatCompletionStreamResponse
from .text import check_stops

if TYPE_CHECKING:
    from .llama import Llama

__all__ = ["ChatRun", "complete_chat"]


class ChatRun:
    """One call of ``create_chat_completion``."""

    def __init__(self, llama: Llama, options: Options, template: str | None, stops: Sequence[str]) -> None:
        """Check ``options``, the call's keywords; ``template`` is rendered instead of the model's own."""
        warn_meaningless(options, stacklevel=5)
        self._llama, self._template = llama, template
        self.heading = Heading(options["model"] or llama.model_path)
        self._is_legacy = options["functions"] is not None
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
        }
        return arguments | {name: value for name, value in optional.items() if value is not None}

    def whole(self) -> CreateChatCompletionResponse:
        """Compute all of it."""
        llama = self._llama
        answer = llama._model.chat(self._messages, **self._arguments)
        message: dict[str, Any] = {"role": "assistant", "content": None, **answer.message}
        reason: str = answer.finish_reason
        if self._is_legacy and message.get("tool_calls"):
            message["function_call"] = dict(message.pop("tool_calls")[0]["function"])
            reason = "function_call"
        usage = usage_of(answer, llama._model.vocab)
        return self.heading.chat(message, reason, usage, chat_logprobs(answer.logprobs, llama._model.vocab))

    def chunks(self) -> Iterator[CreateChatCompletionStreamResponse]:
        """Compute it piece by piece; the last chunk is empty and tells why it ended."""
        vocab = self._llama._model.vocab
        stream = self._llama._model.chat(self._messages, stream=True, **self._arguments)
        with stream:
            found = told = None
            for delta in stream.deltas():
                found, told = stream.logprobs, found
                logprobs = chat_logprobs(found if found is not told else None, vocab)
                if self._is_legacy and "tool_calls" in delta:
                    call = delta["tool_calls"][0]
                    if call["index"] == 0:
                        yield self.heading.chat_chunk({"function_call": call["function"]})
                else:
                    yield self.heading.chat_chunk(dict(delta), None, logprobs)
        reason = cast(Any, stream.completion).finish_reason
        yield self.heading.chat_chunk({}, "function_call" if self._is_legacy and reason == "tool_calls" else reason)


def complete_chat(llama: Llama, options: Options, template: str | None, stops: Sequence[str]) -> Any:
    """Answer by a completion, where states and guesses take part; ``None`` where tools or a format are asked for."""
    if options["tools"] or options["functions"] or options["response_format"]:
        return None
    prompt = llama._model.chat_prompt(
        [_modern(message) for message in listed("messages", options["messages"])], template=template
    )
    left_out = ("messages", "functions", "function_call", "tools", "tool_choice", "response_format", "top_logprobs")
    request = {name: value for name, value in options.items() if name not in left_out}
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
