"""The plugin for Simon Willison's ``llm``: ``llm -m pyllama-wasm/user/repo:Q4_K_M "..."``.

``llm`` finds it by its entry point; nothing else in the package imports it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .demo import demo_model
from .errors import MissingExtraError, ModelFileError, PyllamaError

try:
    import click
    import llm
    from llm.models import EmbeddingModel as LlmEmbeddingModel
    from llm.parts import StreamEvent
    from pydantic import Field
except ImportError as error:
    raise MissingExtraError("load the plugin", "llm is not installed", "pip install 'pyllama-wasm[llm]'") from error

from ._llm_messages import ToolCalls, messages_of, response_format_of, tools_of
from ._llm_store import Kind, Known, Store
from .async_api import AsyncModel as AwaitedModel
from .gguf import GGUFReader
from .hub import resolve_model
from .oneliners import warm_model
from .types import Completion

__all__ = ["AsyncChatModel", "ChatModel", "EmbeddingModel", "register_commands", "register_embedding_models",
           "register_models"]  # fmt: skip

PREFIX = "pyllama-wasm/"
DEMO = "demo"
BATCH = 64
"""Texts embedded together."""


class _Options(llm.Options):
    """Options of a prompt: ``-o temperature 0``; what is not given keeps the package's own default."""

    temperature: float | None = Field(None, ge=0, description="Temperature; 0 always takes the likeliest token")
    top_k: int | None = Field(None, ge=0, description="Keep the k likeliest tokens; 0 keeps all")
    top_p: float | None = Field(None, ge=0, le=1, description="Keep the likeliest tokens up to this probability")
    min_p: float | None = Field(None, ge=0, le=1, description="Drop tokens below this share of the likeliest one's")
    repeat_penalty: float | None = Field(None, gt=0, description="Penalty of tokens that were there; 1 is none")
    presence_penalty: float | None = Field(None, description="Penalty of tokens that were there, once for each")
    frequency_penalty: float | None = Field(None, description="Penalty of tokens that were there, for each time")
    seed: int | None = Field(None, ge=0, le=0xFFFFFFFF, description="Seed of the random choice")
    max_tokens: int | None = Field(None, ge=1, description="Most tokens to generate")
    stop: str | None = Field(None, description="End the answer at this text")


class _Chat:
    """What the model and its async twin share."""

    can_stream = True
    supports_tools = True
    supports_schema = True
    reference: str

    def __init__(self, reference: str, name: str | None = None) -> None:
        """Note what is to be loaded when it is first used: a reference, a path, or ``demo``."""
        self.reference, self._name = reference, name or reference
        self.model_id = PREFIX + self._name

    def _arguments(self, prompt: llm.Prompt) -> dict[str, Any]:
        """Return the arguments of ``Model.chat``."""
        arguments = {key: value for key, value in prompt.options.model_dump().items() if value is not None}
        if tools := tools_of(prompt.tools):
            arguments["tools"] = tools
        if prompt.schema:
            arguments["response_format"] = response_format_of(prompt.schema)  # type: ignore[arg-type]
        return {"messages": messages_of(prompt.messages), **arguments}

    def _finish(self, response: Any, completion: Completion | None, calls: ToolCalls) -> None:
        """Tell ``llm`` what the answer was, and remember the model for the conversation to go on."""
        for call in calls.finished():
            response.add_tool_call(call)
        if completion is not None:
            usage = completion.usage
            details = {"cached_tokens": usage.cached_tokens} if usage.cached_tokens else None
            response.set_usage(input=usage.prompt_tokens, output=usage.completion_tokens, details=details)
            response.response_json = {"finish_reason": completion.finish_reason}
        _remember("chat", self._name, self.reference)


class ChatModel(_Chat, llm.Model):
    """A model that answers."""

    class Options(_Options):
        """Options of a prompt."""

    def execute(
        self, prompt: llm.Prompt, stream: bool, response: llm.Response, conversation: llm.Conversation | None
    ) -> Iterator[str | StreamEvent]:
        """Yield the pieces of the answer. Raises ``llm.ModelError``."""
        calls = ToolCalls()
        with _told():
            answer = warm_model(_source(self.reference)).chat(stream=True, **self._arguments(prompt))
            with contextlib.closing(answer):
                for delta in answer.deltas():
                    yield from _events(delta, calls)
            self._finish(response, answer.completion, calls)


class AsyncChatModel(_Chat, llm.AsyncModel):
    """A model that answers, awaited."""

    class Options(_Options):
        """Options of a prompt."""

    async def execute(
        self, prompt: llm.Prompt, stream: bool, response: llm.AsyncResponse, conversation: Any
    ) -> AsyncGenerator[str | StreamEvent, None]:
        """Yield the pieces of the answer. Raises ``llm.ModelError``."""
        calls = ToolCalls()
        with _told():
            model = await asyncio.to_thread(lambda: warm_model(_source(self.reference)))
            answer = await AwaitedModel(model).chat(stream=True, **self._arguments(prompt))
            async with answer:
                async for delta in answer.deltas():
                    for event in _events(delta, calls):
                        yield event
            self._finish(response, answer.completion, calls)


def _events(delta: Mapping[str, Any], calls: ToolCalls) -> Iterator[StreamEvent]:
    """Yield what ``llm`` is to know of a piece of an answer."""
    if reasoning := delta.get("reasoning_content"):
        yield StreamEvent(type="reasoning", chunk=reasoning)
    if content := delta.get("content"):
        yield StreamEvent(type="text", chunk=content)
    yield from calls.add(delta.get("tool_calls") or ())


class EmbeddingModel(LlmEmbeddingModel):
    """A model that embeds: ``llm embed -m pyllama-wasm/... -c "text"``."""

    batch_size = BATCH

    def __init__(self, reference: str, name: str | None = None) -> None:
        """Note what is to be loaded when it is first used."""
        self.reference, self._name = reference, name or reference
        self.model_id = PREFIX + self._name

    def embed_batch(self, items: Iterable[str | bytes], *, key: str | None = None) -> Iterator[list[float]]:
        """Yield the vector of each text, of length 1. Raises ``llm.ModelError``."""
        texts = [item if isinstance(item, str) else item.decode() for item in items]
        if not texts:
            return
        with _told():
            vectors = warm_model(_source(self.reference)).embed(texts)
            _remember("embedding", self._name, self.reference)
        yield from ([float(value) for value in vector] for vector in vectors)


@llm.hookimpl
def register_models(register: Any) -> None:
    """Register the models that have names, and the one that this command asks for."""
    for name, known in _known("chat").items():
        models = ChatModel(known.reference, name), AsyncChatModel(known.reference, name)
        register(*models, aliases=known.aliases)


@llm.hookimpl
def register_embedding_models(register: Any) -> None:
    """Register the models for embedding, as above."""
    for name, known in _known("embedding").items():
        register(EmbeddingModel(known.reference, name), aliases=known.aliases)


@llm.hookimpl
def register_commands(cli: click.Group) -> None:
    """Add ``llm pyllama-wasm add``, ``list`` and ``remove``."""

    @cli.group(name="pyllama-wasm")
    def group() -> None:
        """Name models that run in pyllama_wasm's sandbox."""

    @group.command(name="add")
    @click.argument("name")
    @click.argument("reference")
    @click.option("aliases", "-a", "--alias", multiple=True, help="Another name for it (repeatable).")
    @click.option("--embedding", is_flag=True, help="It embeds texts, and does not answer.")
    def add(name: str, reference: str, aliases: tuple[str, ...], embedding: bool) -> None:
        """Fetch the model REFERENCE (a path, user/repo:Q4_K_M, or a URL) and name it pyllama-wasm/NAME."""
        kind: Kind = "embedding" if embedding else "chat"
        try:
            path = _source(reference)
            GGUFReader(path)
            if Path(reference).exists():
                reference = str(path.absolute())
            _store().add(kind, name, Known(reference, aliases))
        except PyllamaError as error:
            raise click.ClickException(str(error)) from error
        click.echo(f"{PREFIX}{name}: {reference}", err=True)

    @group.command(name="list")
    def show() -> None:
        """List the models that have names."""
        kinds: tuple[Kind, ...] = ("chat", "embedding")
        for kind in kinds:
            for name, known in sorted(_store().read(kind).items()):
                aliases = f" ({', '.join(known.aliases)})" if known.aliases else ""
                click.echo(f"{kind:<9}  {PREFIX}{name}{aliases}  {known.reference}")

    @group.command(name="remove")
    @click.argument("name")
    def remove(name: str) -> None:
        """Forget the name NAME; the model's file stays."""
        try:
            was_known = _store().remove(name.removeprefix(PREFIX))
        except PyllamaError as error:
            raise click.ClickException(str(error)) from error
        if not was_known:
            raise click.ClickException(f"no model is named {name}")


def _folder() -> Path:
    return Path(llm.user_dir())  # type: ignore[no-untyped-call]


def _store() -> Store:
    return Store(_folder() / "pyllama-wasm")


def _known(kind: Kind) -> dict[str, Known]:
    """Return the models to register: with names, and what is asked for by reference, which ``llm`` cannot look up."""
    known = _store().read(kind)
    if kind == "chat":
        with contextlib.suppress(ModelFileError):
            known.setdefault(DEMO, Known(str(demo_model())))
    for name in _asked_for():
        known.setdefault(name, Known(name))
    return known


def _asked_for() -> Iterator[str]:
    """Yield what follows ``pyllama-wasm/`` on the command line, in ``llm``'s variables and among its defaults."""
    words = [*sys.argv[1:], os.environ.get("LLM_MODEL", ""), os.environ.get("LLM_EMBEDDING_MODEL", "")]
    for name in ("default_model.txt", "default_embedding_model.txt"):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            words.append((_folder() / name).read_text().strip())
    for word in words:
        before, found, reference = word.partition(PREFIX)
        # -m NAME, -mNAME and --model=NAME; elsewhere in a prompt it is only text.
        if found and reference and before in ("", "-m", "--model="):
            yield reference


def _remember(kind: Kind, name: str, reference: str) -> None:
    """Keep the name of a model that was used, so that ``llm -c`` and collections find it again."""
    if name == DEMO:
        return
    store = _store()
    with contextlib.suppress(ModelFileError):
        if name not in store.read(kind):
            store.add(kind, name, Known(str(Path(reference).absolute()) if Path(reference).exists() else reference))


def _source(reference: str) -> Path:
    return demo_model() if reference == DEMO else resolve_model(reference)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Turn the package's errors into the one that ``llm`` shows without a traceback."""
    try:
        yield
    except PyllamaError as error:
        raise llm.ModelError(str(error)) from error
