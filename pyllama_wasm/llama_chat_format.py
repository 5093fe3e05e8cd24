"""Chat formats by llama-cpp-python's names, and those that a program registers; rendered in the sandbox."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from .errors import RequestError
from .llama_grammar import LlamaGrammar
from .llama_options import listed
from .llama_response import chunks_to_chat, completion_to_chat
from .llama_types import CreateChatCompletionResponse, CreateChatCompletionStreamResponse
from .structured import ResponseFormat
from .tools import TOOLS_TEMPLATE, choose_tools

if TYPE_CHECKING:
    from .llama import Llama

__all__ = [
    "CHAT_FORMATS",
    "ChatFormat",
    "ChatFormatter",
    "ChatFormatterResponse",
    "Jinja2ChatFormatter",
    "LlamaChatCompletionHandler",
    "LlamaChatCompletionHandlerNotFoundException",
    "call_functions",
    "chat_formatter_to_chat_completion_handler",
    "get_chat_completion_handler",
    "register_chat_completion_handler",
    "register_chat_format",
    "template_handler",
]

Answer = CreateChatCompletionResponse | Iterator[CreateChatCompletionStreamResponse]
F = TypeVar("F", bound=Callable[..., Any])

# -- formats by name --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChatFormat:
    """How a conversation becomes a prompt: what goes around the system message and each turn, and before an answer."""

    user: tuple[str, str]
    """Before and after what the user says."""

    assistant: tuple[str, str]
    """Before and after what the model said."""

    cue: str
    """What the answer comes after."""

    system: tuple[str, str] = ("", "")
    """Before and after the system message, where there is one."""

    default_system: str = ""
    stops: tuple[str, ...] = ()
    joins_system: bool = False
    """The system message is a part of the first turn: what comes before the user's first words is left out."""

    @property
    def template(self) -> str:
        """Return a jinja template that does it; roles other than system, user and assistant are left out."""
        text = {name: json.dumps(value) for name, value in self._texts().items()}
        begin = f"{text['user0']} if not (loop_state.joined) else ''"
        return (
            "{%- set loop_state = namespace(system=" + text["default"] + ", joined=false) -%}"
            "{%- for message in messages if message['role'] == 'system' -%}"
            "{%- set loop_state.system = message['content'] -%}{%- endfor -%}"
            "{%- if loop_state.system -%}{{- " + text["system0"] + " + loop_state.system + " + text["system1"] + " -}}"
            "{%- set loop_state.joined = " + ("true" if self.joins_system else "false") + " -%}{%- endif -%}"
            "{%- for message in messages -%}{%- if message['role'] == 'user' -%}"
            "{{- (" + begin + ") + message['content'] + " + text["user1"] + " -}}"
            "{%- set loop_state.joined = false -%}{%- elif message['role'] == 'assistant' -%}"
            "{{- " + text["assistant0"] + " + message['content'] + " + text["assistant1"] + " -}}"
            "{%- endif -%}{%- endfor -%}"
            "{%- if add_generation_prompt -%}{{- " + text["cue"] + " -}}{%- endif -%}"
        )

    def _texts(self) -> dict[str, str]:
        return {
            "default": self.default_system,
            "system0": self.system[0],
            "system1": self.system[1],
            "user0": self.user[0],
            "user1": self.user[1],
            "assistant0": self.assistant[0],
            "assistant1": self.assistant[1],
            "cue": self.cue,
        }


def _tagged(begin: str, end: str, assistant: str = "assistant", **others: Any) -> ChatFormat:
    """Return a format in which each turn has the name of its role: ``begin`` has ``{}`` where it goes."""
    user, answer = begin.format("user"), begin.format(assistant)
    system = others.pop("system", (begin.format("system"), end))
    return ChatFormat((user, end), (answer, end), answer, system, **others)


_CURIOUS = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_LLAMA_3 = "<|start_header_id|>{}<|end_header_id|>\n\n"
_OPENCHAT = "GPT4 Correct Assistant:"

CHAT_FORMATS: dict[str, ChatFormat] = {
    "alpaca": ChatFormat(
        ("### Instruction:\n", "\n\n"), ("### Response:\n", "</s>"), "### Response:\n", ("", "\n\n"), stops=("###",)
    ),
    "baichuan": ChatFormat(("<reserved_102>", ""), ("<reserved_103>", ""), "<reserved_103>"),
    "baichuan-2": ChatFormat(("<reserved_106>", ""), ("<reserved_107>", ""), "<reserved_107>"),
    "chatglm3": ChatFormat(
        ("<|user|>\n ", ""), ("<|assistant|>\n ", ""), "<|assistant|>", ("<|system|>\n ", ""), stops=("<|user|>",)
    ),
    "chatml": _tagged("<|im_start|>{}\n", "<|im_end|>\n", stops=("<|im_end|>",)),
    "gemma": _tagged(
        "<start_of_turn>{}\n", "<end_of_turn>\n", "model", system=("", "\n\n"), stops=("<end_of_turn>",)
    ),
    "intel": ChatFormat(
        ("### User:\n", "\n"), ("### Assistant:\n", "\n"), "### Assistant:\n", ("### System:\n", "\n"),
        stops=("### User:",),
    ),
    "llama-2": ChatFormat(
        ("[INST] ", " [/INST]"), (" ", " </s><s>"), "", ("[INST] <<SYS>>\n", "\n<</SYS>>\n\n"), joins_system=True
    ),
    "llama-3": _tagged(_LLAMA_3, "<|eot_id|>", stops=("<|eot_id|>",)),
    "mistral-instruct": ChatFormat(("[INST] ", " [/INST]"), ("", "</s>"), "", ("[INST] ", "\n\n"), joins_system=True),
    "mistrallite": ChatFormat(
        ("<|prompter|>", "</s>"), ("<|assistant|>", "</s>"), "<|assistant|>", ("<|system|>", "</s>")
    ),
    "oasst_llama": ChatFormat(
        ("<|prompter|>", "</s>"), ("<|assistant|>", "</s>"), "<|assistant|>", ("[INST] <<SYS>>\n", "\n<</SYS>>\n\n")
    ),
    "open-orca": ChatFormat(
        ("User: ", "<|end_of_turn|>\n"), ("Assistant: ", "<|end_of_turn|>\n"), "Assistant:",
        ("", "<|end_of_turn|>\n"), stops=("<|end_of_turn|>", "User:"),
    ),
    "openbuddy": ChatFormat(("User: ", "\n"), ("Assistant: ", "\n"), "Assistant:", ("", "\n\n"), stops=("\nUser:",)),
    "openchat": ChatFormat(
        ("GPT4 Correct User: ", "<|end_of_turn|>"), (f"{_OPENCHAT} ", "<|end_of_turn|>"), _OPENCHAT,
        ("", "<|end_of_turn|>"), stops=("<|end_of_turn|>",),
    ),
    "phind": ChatFormat(
        ("### User Message\n", "\n\n"), ("### Assistant\n", "\n\n"), "### Assistant\n", ("### System Prompt\n", "\n\n"),
        "You are an intelligent programming assistant.", stops=("### User Message",),
    ),
    "pygmalion": ChatFormat(("<|user|>", ""), ("<|model|>", ""), "<|model|>", ("<|system|>", ""), stops=("<|user|>",)),
    "qwen": _tagged(
        "<|im_start|>{}\n", "<|im_end|>\n", default_system="You are a helpful assistant.",
        stops=("<|im_end|>", "<|endoftext|>"),
    ),
    "redpajama-incite": ChatFormat(("<human>: ", "\n"), ("<bot>: ", "\n"), "<bot>:", ("", "\n"), stops=("<human>",)),
    "saiga": ChatFormat(
        ("<s>user\n", "</s>\n"), ("<s>bot\n", "</s>\n"), "<s>bot\n", ("<s>system\n", "</s>\n")
    ),
    "snoozy": ChatFormat(
        ("### Prompt:\n", "\n"), ("### Response:\n", "\n"), "### Response:\n", ("### Instruction:\n", "\n"),
        "The prompt below is a question to answer, a task to complete, or a conversation to respond to; "
        "decide which and write an appropriate response.",
        stops=("###",),
    ),
    "vicuna": ChatFormat(("USER: ", " "), ("ASSISTANT: ", "</s>"), "ASSISTANT:", ("", " "), _CURIOUS),
    "zephyr": _tagged("<|{}|>\n", "</s>\n", stops=("</s>",)),
}  # fmt: skip
"""The formats that llama-cpp-python knows by name, as the models' authors describe them."""

# -- handlers and formatters of the program's own ---------------------------------------------------------------------


class LlamaChatCompletionHandler(Protocol):
    """Answers conversations: for ``Llama(chat_handler=...)``, or registered by name.

    It gets the keywords of ``create_chat_completion`` and the ``Llama``, and returns what that would.
    """

    def __call__(self, *, llama: Llama, messages: Any, **kwargs: Any) -> Any:
        """Return an answer, or with ``stream`` an iterator over its chunks."""


@dataclass
class ChatFormatterResponse:
    """What a formatter makes of a conversation."""

    prompt: str
    stop: str | list[str] | None = None
    stopping_criteria: Any = None
    added_special: bool = False
    """Whether the prompt has its beginning token already."""


class ChatFormatter(Protocol):
    """Makes a prompt of a conversation."""

    def __call__(self, *, messages: Any, **kwargs: Any) -> ChatFormatterResponse:
        """Return prompt and stop strings."""


class LlamaChatCompletionHandlerNotFoundException(RequestError):
    """There is no chat format of that name."""


_handlers: dict[str, LlamaChatCompletionHandler] = {}


def get_chat_completion_handler(name: str) -> LlamaChatCompletionHandler:
    """Return the handler of that name; raises ``LlamaChatCompletionHandlerNotFoundException``."""
    if name in _handlers:
        return _handlers[name]
    if name in CHAT_FORMATS:
        return template_handler(CHAT_FORMATS[name].template, CHAT_FORMATS[name].stops)
    if name == _FUNCTION_CALLING:
        return call_functions
    hint = f"one of {', '.join(sorted({*CHAT_FORMATS, _FUNCTION_CALLING, *_handlers}))}"
    raise LlamaChatCompletionHandlerNotFoundException("chat", f"there is no chat format {name!r}", hint)


def register_chat_completion_handler(name: str, overwrite: bool = False) -> Callable[[F], F]:
    """Return a decorator that makes a handler known as ``chat_format=name``; ``RequestError`` for a known name."""

    def register(handler: F) -> F:
        if not overwrite and name in {*_handlers, *CHAT_FORMATS, _FUNCTION_CALLING}:
            raise RequestError("register a chat format", f"there is one named {name!r}", "give overwrite=True")
        _handlers[name] = handler
        return handler

    return register


def register_chat_format(name: str, overwrite: bool = False) -> Callable[[F], F]:
    """Return a decorator that makes a formatter known as ``chat_format=name``; ``RequestError`` for a known name."""

    def register(formatter: F) -> F:
        register_chat_completion_handler(name, overwrite)(chat_formatter_to_chat_completion_handler(formatter))
        return formatter

    return register


def chat_formatter_to_chat_completion_handler(formatter: ChatFormatter) -> LlamaChatCompletionHandler:
    """Return a handler that completes what ``formatter`` makes of a conversation."""

    def handle(*, llama: Llama, messages: Any, **options: Any) -> Answer:
        named = ("functions", "function_call", "tools", "tool_choice")
        request = {name: options.pop(name, None) for name in named}
        made = formatter(messages=messages, **request)
        options["prompt"] = llama.tokenize(made.prompt, add_bos=not made.added_special, special=True)
        options["stop"] = [*_as_list(options.get("stop")), *_as_list(made.stop)]
        options["stopping_criteria"] = made.stopping_criteria
        n_top = options.pop("top_logprobs", None) or 0
        options["logprobs"] = n_top if options.get("logprobs") else None
        tool_name, schema = _schema_of(options.pop("response_format", None), request)
        if schema is not None:
            options["grammar"] = LlamaGrammar.from_json_schema(schema)
        completion = llama.create_completion(**options)
        if options.get("stream"):
            return chunks_to_chat(completion, tool_name)
        return completion_to_chat(completion, tool_name)

    return handle


class Jinja2ChatFormatter:
    """A jinja template as a format; it is rendered in the sandbox, and so by a handler only: ``to_chat_handler``."""

    def __init__(
        self,
        template: str,
        eos_token: str = "",
        bos_token: str = "",
        add_generation_prompt: bool = True,
        stop_token_ids: Sequence[int] | None = None,
    ) -> None:
        """Keep ``template``; the special tokens are the model's own, and these end an answer anyway."""
        self.template, self.eos_token, self.bos_token = template, eos_token, bos_token
        self.add_generation_prompt, self.stop_token_ids = add_generation_prompt, stop_token_ids

    def to_chat_handler(self) -> LlamaChatCompletionHandler:
        """Return a handler for ``Llama(chat_handler=...)``."""
        return template_handler(self.template, (self.eos_token,) if self.eos_token else ())


def template_handler(template: str | None, stops: Sequence[str]) -> LlamaChatCompletionHandler:
    """Return a handler that answers by a jinja template, ``None`` for the model's own."""

    def handle(*, llama: Llama, messages: Any, **options: Any) -> Any:
        return llama._chat({**options, "messages": messages}, template, stops)

    return handle


# -- calls of functions by any model ----------------------------------------------------------------------------------

_FUNCTION_CALLING = "chatml-function-calling"

_CALL = "<tool_call>\n"


def call_functions(*, llama: Llama, messages: Any, **options: Any) -> Any:
    """Answer with ``TOOLS_TEMPLATE``; of a tool that must be called only the arguments are generated."""
    named = {name: options.get(name) for name in ("functions", "function_call", "tools", "tool_choice")}
    tool_name, _ = _schema_of(None, named)
    if tool_name is None:
        return template_handler(TOOLS_TEMPLATE, ("<|im_end|>",))(llama=llama, messages=messages, **options)
    tools = _tools_of(named)

    def begin(*, messages: Any, **_: Any) -> ChatFormatterResponse:
        prompt = llama._model.chat_prompt(messages, tools=tools, template=TOOLS_TEMPLATE).prompt
        name = json.dumps(tool_name)
        return ChatFormatterResponse(f'{prompt}{_CALL}{{"name": {name}, "arguments": ', "<|im_end|>")

    return chat_formatter_to_chat_completion_handler(begin)(llama=llama, messages=messages, **options)


def _schema_of(response_format: Any, request: dict[str, Any]) -> tuple[str | None, Any]:
    """Return the tool that must be called, if any, and the JSON schema that the text must fit, if any."""
    choice = request["function_call"] or request["tool_choice"]
    if isinstance(choice, Mapping):
        named = choice.get("function", choice)
        tools = _tools_of(request)
        if not isinstance(named, Mapping) or not tools:
            raise RequestError("chat", f"tool_choice is {choice!r:.80}, and there is no such tool to choose")
        found, _ = choose_tools(tools, {"type": "function", "function": named})
        function = (found or [])[0]["function"]
        return function["name"], function["parameters"] or {"type": "object"}
    asked = None if response_format is None else ResponseFormat.of(response_format)
    return None, None if asked is None else asked.asked


def _tools_of(request: dict[str, Any]) -> list[Any]:
    """Return the tools of a request, the deprecated functions among them."""
    if request["functions"]:
        return [{"type": "function", "function": each} for each in listed("functions", request["functions"])]
    return listed("tools", request["tools"] or ())


def _as_list(stop: str | Sequence[str] | None) -> list[str]:
    return [] if stop is None else [stop] if isinstance(stop, str) else list(stop)
