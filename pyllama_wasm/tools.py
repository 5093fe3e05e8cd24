"""Tools: Python functions as a model is told of them, OpenAI's descriptions checked, and calls made."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ._schema import check_depth, normalized
from ._type_schema import check_value, is_model, type_hints, type_schema
from .errors import RequestError

__all__ = [
    "TOOLS_TEMPLATE",
    "Tool",
    "ToolChoice",
    "await_tool",
    "call_tool",
    "choose_tools",
    "function_tool",
    "is_coroutine_tool",
    "tool_name",
]

Json = Any
Tool = Callable[..., Any] | Mapping[str, Any]
"""A function, or OpenAI's description of one."""

ToolChoice = str | Mapping[str, Any]

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_CHOICES = ("none", "auto", "required")
_SECTION = re.compile(r"^(args|arguments|parameters|returns?|raises|yields?|examples?|notes?):\s*$", re.IGNORECASE)
_ARGUMENT = re.compile(r"^(\*{0,2}\w+)\s*(?:\(.*?\))?:\s*(.*)$")

TOOLS_TEMPLATE = """\
{%- if messages[0].role == 'system' %}{% set preamble = messages[0].content %}{% set rest = messages[1:] %}
{%- else %}{% set preamble = '' %}{% set rest = messages %}{% endif %}
{%- if tools or preamble %}
    {{- '<|im_start|>system\\n' + preamble }}
    {%- if tools %}
        {{- ('\\n\\n' if preamble else '') + 'These functions can be called, one JSON object each:\\n<tools>' }}
        {%- for tool in tools %}{{- '\\n' + (tool.function | tojson) }}{% endfor %}
        {{- '\\n</tools>\\n\\nTo call one, write a JSON object with its name and its arguments in these tags:\\n' }}
        {{- '<tool_call>\\n{"name": <name>, "arguments": <object>}\\n</tool_call>' }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in rest %}
    {%- if message.role == 'tool' %}
        {%- if loop.first or rest[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{% endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or rest[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{% endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
        {%- for tool_call in message.tool_calls or [] %}
            {{- ('' if loop.first and not message.content else '\\n') + '<tool_call>\\n{"name": "' }}
            {{- tool_call.function.name + '", "arguments": ' + (tool_call.function.arguments | tojson) }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""
"""A template that hands tools to models whose own does not, in ChatML's turns; what they make of it is their matter."""


def function_tool(function: Callable[..., Any]) -> dict[str, Json]:
    """Return OpenAI's description of a function: its name, what its docstring says, and a schema of its parameters.

    The schema comes from the annotations; the docstring is one in Google's style, whose ``Args`` describe the
    parameters. Raises ``RequestError`` for a function that cannot be described: one with ``*args``, or with a type
    that has no schema.
    """
    name = tool_name(function)
    try:
        parameters = inspect.signature(function).parameters
    except ValueError as error:
        raise RequestError("describe a tool", f"{name} has no signature that Python knows") from error
    described = function if inspect.isroutine(function) else type(function).__call__
    hints, defs = type_hints(described, name), dict[str, Json]()
    summary, texts = _read_docstring(inspect.getdoc(function) or "")
    properties, required = {}, []
    for parameter in parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise RequestError("describe a tool", f"{name} has the parameter {parameter}, which has no name of its own")
        schema = type_schema(hints.get(parameter.name, Any), defs)
        if text := texts.get(parameter.name):
            schema["description"] = text
        if parameter.default is parameter.empty:
            required.append(parameter.name)
        properties[parameter.name] = schema
    schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    if defs:
        schema["$defs"] = defs
    return {"type": "function", "function": {"name": name, "description": summary, "parameters": schema}}


def tool_name(tool: Tool) -> str:
    """Return the name of a tool."""
    if isinstance(tool, Mapping):
        function = tool.get("function")
        return str(function.get("name", "")) if isinstance(function, Mapping) else ""
    return getattr(tool, "__name__", None) or type(tool).__name__


def _read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """Return what comes before the first section, and what ``Args`` says of each parameter."""
    summary: list[str] = []
    arguments: dict[str, str] = {}
    section = name = ""
    indent = 0
    for line in text.splitlines():
        if found := _SECTION.match(line):
            section, name, indent = found[1].lower(), "", 0
            continue
        stripped, depth = line.strip(), len(line) - len(line.lstrip())
        if not section:
            summary.append(line)
        elif section in ("args", "arguments", "parameters") and stripped:
            indent = indent or depth
            argument = _ARGUMENT.match(stripped) if depth == indent else None
            if argument:
                name = argument[1]
                arguments[name] = argument[2]
            elif name:
                arguments[name] = f"{arguments[name]} {stripped}".strip()
    return "\n".join(summary).strip(), arguments


def choose_tools(
    tools: Sequence[Tool] | None, choice: ToolChoice | None
) -> tuple[list[dict[str, Json]] | None, str | None]:
    """Return the tools as the template takes them, and ``none``, ``auto`` or ``required``; ``RequestError`` for others.

    Where one tool has to be called it is the only one.
    """
    if tools is None or (isinstance(tools, Sequence) and not len(tools)):
        if choice not in (None, "none", "auto"):
            raise RequestError("chat", f"tool_choice is {choice!r} and there are no tools")
        return None, None
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise RequestError("chat", f"tools is {type(tools).__name__} and no list")
    described = [_checked(i, tool) for i, tool in enumerate(tools)]
    names = [tool["function"]["name"] for tool in described]
    if len(set(names)) < len(names):
        raise RequestError("chat", f"two tools have the same name: {', '.join(names)}")
    if choice is None or choice in _CHOICES:
        return described, str(choice or "auto")
    name = choice if isinstance(choice, str) else tool_name(choice)
    if name not in names:
        raise RequestError("chat", f"tool_choice is {choice!r}", f"{', '.join(_CHOICES)} or one of {', '.join(names)}")
    return [tool for tool in described if tool["function"]["name"] == name], "required"


def _checked(index: int, tool: object) -> dict[str, Json]:
    if callable(tool):
        tool = function_tool(tool)
    function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
    if not isinstance(function, Mapping):
        raise RequestError(
            "chat", f"tool {index} is neither a function nor a description of one", '{"type": "function"…'
        )
    name, parameters = function.get("name"), function.get("parameters", {})
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError("chat", f"the name of tool {index} is {name!r}", "1 to 64 letters, digits, _, . and -")
    if not isinstance(function.get("description", ""), str):
        raise RequestError("chat", f"the description of tool {name} is no text")
    if not isinstance(parameters, Mapping):
        raise RequestError("chat", f"the parameters of tool {name} are no schema")
    check_depth(parameters)
    if function.get("strict") is True:
        parameters = normalized(parameters)  # refuses what cannot be kept
    return {"type": "function", "function": {"description": "", **function, "parameters": dict(parameters)}}


def is_coroutine_tool(tool: Tool) -> bool:
    """Whether calling a tool gives something to be awaited."""
    if not callable(tool):
        return False
    return inspect.iscoroutinefunction(tool) or inspect.iscoroutinefunction(getattr(tool, "__call__", None))  # noqa: B004


def call_tool(tool: Tool | None, name: str, arguments: str) -> str:
    """Call a function with JSON of its arguments and return the result as text, or what went wrong, for the model."""
    try:
        return _text(_bound(tool, name, arguments)())
    except Exception as error:  # noqa: BLE001  whatever a tool raises the model is told
        return _failure(error)


async def await_tool(
    tool: Tool | None, name: str, arguments: str, in_thread: Callable[[Callable[[], Any]], Awaitable[Any]]
) -> str:
    """Do as ``call_tool``: a coroutine function is awaited, any other is called by ``in_thread``."""
    try:
        call = _bound(tool, name, arguments)
        result = call() if tool is not None and is_coroutine_tool(tool) else await in_thread(call)
        return _text(await result if inspect.isawaitable(result) else result)
    except Exception as error:  # noqa: BLE001  whatever a tool raises the model is told
        return _failure(error)


def _bound(tool: Tool | None, name: str, arguments: str) -> Callable[[], Any]:
    given = json.loads(arguments or "{}")
    if not isinstance(given, dict):
        raise TypeError("the arguments are no object")
    if tool is None or not callable(tool):
        raise LookupError(f"there is no tool {name}")
    return partial(tool, **_converted(tool, given))


def _failure(error: Exception) -> str:
    return f"error: {type(error).__name__}: {error}"


def _converted(function: Callable[..., Any], given: dict[str, Json]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    hints = type_hints(function if inspect.isroutine(function) else type(function).__call__, tool_name(function))
    if unknown := sorted(set(given) - set(parameters)):
        raise TypeError(f"there is no parameter {unknown[0]!r}")
    missing = [name for name, p in parameters.items() if p.default is p.empty and name not in given]
    if missing:
        raise TypeError(f"the parameter {missing[0]!r} is missing")
    return {name: check_value(hints.get(name, Any), value) for name, value in given.items()}


def _text(result: Any) -> str:
    if isinstance(result, str):
        return result
    if is_model(type(result)):
        return str(result.model_dump_json())
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        result = dataclasses.asdict(result)
    return json.dumps(result, ensure_ascii=False, default=str)
