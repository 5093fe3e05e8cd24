"""Command-line options as dataclasses, and the decorator that lets a command take them whole.

Every default is read from the package's parameter classes; none is written here.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from enum import Enum
from types import UnionType
from typing import Annotated, Any, Literal, TypedDict, TypeVar, Union, get_args, get_origin, get_type_hints

import typer
from typer.models import OptionInfo

from pyllama_wasm import ContextParams, Limits, SamplingParams

T = TypeVar("T")

_SAMPLING = SamplingParams()
_CONTEXT = ContextParams()


MODEL_HELP = "A GGUF file, hf:user/repo:Q4_K_M, user/repo, or the URL of a GGUF file."


class LoadMode(str, Enum):
    """How the model file reaches the sandbox."""

    map = "map"
    copy = "copy"
    snapshot = "snapshot"


class IsolationMode(str, Enum):
    """Where the sandbox lives."""

    none = "none"
    process = "process"

    @property
    def value_or_none(self) -> Literal["process"] | None:
        """Return the argument of ``Model``."""
        return "process" if self is IsolationMode.process else None


Isolated = Annotated[
    IsolationMode,
    typer.Option(
        "--isolation",
        help="Run the sandbox in a process of its own, confined where the system can.",
        case_sensitive=False,
    ),
]


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and the resources it gets."""

    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="MODEL", help=MODEL_HELP, show_default="the demo model, if installed"),
    ] = None
    threads: Annotated[
        int | None,
        typer.Option("--threads", "-t", min=1, help="Threads.", show_default="one per core"),
    ] = None
    ctx_size: Annotated[
        int, typer.Option("--ctx-size", "-c", min=0, help="Context size in tokens; 0: what the call needs.")
    ] = _CONTEXT.n_ctx
    load: Annotated[
        LoadMode | None,
        typer.Option(
            help="Map the file read-only into the sandbox, copy it in, or map a sealed copy.",
            case_sensitive=False,
            show_default="map; with --untrusted snapshot",
        ),
    ] = None
    untrusted: Annotated[bool, typer.Option("--untrusted", help="Set limits for a file or a prompt of a stranger.")] = (
        False
    )
    memory: Annotated[
        int | None,
        typer.Option(
            metavar="MIB",
            min=1,
            help="Most memory of the sandbox in MiB, the model file included.",
            show_default="4096; with --untrusted 2048",
        ),
    ] = None
    deadline: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="Most time that loading may take, and each answer.",
            show_default="no limit; with --untrusted 60",
        ),
    ] = None
    deterministic: Annotated[
        bool,
        typer.Option("--deterministic", help="Answer the same on every machine and each time, half as fast."),
    ] = False
    isolation: Isolated = IsolationMode.none

    def limits(self) -> Limits:
        """Return what the model may use. Raises ``RequestError`` for a deadline that is none."""
        limits = Limits.untrusted() if self.untrusted else Limits()
        if self.memory is not None:
            limits = replace(limits, memory_bytes=self.memory << 20)
        return limits if self.deadline is None else replace(limits, deadline_s=self.deadline)


class Keywords(TypedDict, total=False):
    """Keyword arguments of ``Model.stream`` and ``Model.chat``; what is absent keeps their own default."""

    sampling: SamplingParams
    stop: list[str]
    max_tokens: int


@dataclass(frozen=True)
class GenerationOptions:
    """How text is generated."""

    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            "-n",
            min=0,
            help="Most tokens to generate.",
            show_default="for complete a few lines, else no limit",
        ),
    ] = None
    temp: Annotated[float, typer.Option("--temp", min=0.0, help="Temperature; 0 always takes the likeliest token.")] = (
        _SAMPLING.temperature
    )
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")] = _SAMPLING.top_k
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Keep the likeliest tokens up to this total probability.")
    ] = _SAMPLING.top_p
    min_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Drop tokens below this share of the likeliest one's probability.")
    ] = _SAMPLING.min_p
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Seed of the random choice.", show_default="a new one; with --deterministic 0"),
    ] = None
    stop: Annotated[list[str], typer.Option(help="End at this text (repeatable).", show_default=False)] = field(
        default_factory=list
    )
    timings: Annotated[bool, typer.Option("--timings", help="Print speeds to standard error at the end.")] = False

    def keywords(self) -> Keywords:
        """Return the arguments for ``stream`` and ``chat``."""
        sampling = SamplingParams(
            temperature=self.temp,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=_SAMPLING.seed if self.seed is None else self.seed,
        )
        keywords: Keywords = {"sampling": sampling, "stop": self.stop}
        if self.max_tokens is not None:
            keywords["max_tokens"] = self.max_tokens
        return keywords


def with_options(command: Callable[..., T]) -> Callable[..., T]:
    """Let a command take dataclasses of options: the command line shows one option per field.

    Typer reads a function's signature, so the wrapper gets one in which each dataclass is replaced by its fields.
    """
    groups: dict[str, type] = {}
    parameters: list[inspect.Parameter] = []
    # Not get_type_hints: Python 3.10's wraps the hint of a parameter that defaults to None, and Typer's part is lost.
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        hint = parameter.annotation
        if is_dataclass(hint) and isinstance(hint, type):
            groups[parameter.name] = hint
            parameters += _field_parameters(hint)
        else:
            parameters.append(parameter.replace(annotation=_tidy(hint), kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def wrapper(**values: Any) -> T:
        for name, group in groups.items():
            values[name] = group(**{option.name: values.pop(option.name) for option in fields(group)})
        return command(**values)

    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapper


def _field_parameters(group: type) -> list[inspect.Parameter]:
    """Return one keyword parameter for each field of a dataclass of options."""
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            option.name, inspect.Parameter.KEYWORD_ONLY, default=_default(option), annotation=_tidy(hints[option.name])
        )
        for option in fields(group)
    ]


_METAVARS = {bool: "", int: "N", float: "X", str: "TEXT", list[int]: "N", list[str]: "TEXT"}


def _tidy(hint: Any) -> Any:
    """Return the hint of an option with a short word for its value, and none for a flag.

    Typer's own words are Python's, ``<int range>`` and ``<bool>``: at 80 columns they take the place of the help.
    """
    base, *extras = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    kinds = [kind for kind in get_args(base) if kind is not type(None)]
    kind = kinds[0] if get_origin(base) in (Union, UnionType) and len(kinds) == 1 else base
    if kind not in _METAVARS or not extras or not isinstance(extras[0], OptionInfo) or extras[0].metavar is not None:
        return hint
    option = copy.copy(extras[0])
    option.metavar = _METAVARS[kind]
    return Annotated[base, option]


def _default(option: Field[Any]) -> Any:
    """Return the default value of a dataclass field."""
    return option.default if option.default_factory is MISSING else option.default_factory()
